"""Configs made from the flags of ``attnzoo measure``."""

from __future__ import annotations

import argparse
import hashlib
import re
from typing import Any

from attnzoo import models
from attnzoo.bench.config import parse_override
from attnzoo.errors import ConfigError

VISION_TOKENS, ENCODER_TOKENS = [196, 784], [196]
PATCH = 16


def config_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Give the config, as plain data, that measures what the flags say; its key `task` names the task.

    Raises
    ------
    ConfigError
        If a flag has no meaning for the model.
    """
    library, name = models.split(flags.model)
    cost = {"dtype": flags.dtype, "repeats": flags.repeats, "min_seconds": flags.min_seconds}
    cost["timeout_seconds"] = flags.timeout
    if library == "timm":
        cost |= {"tokens": flags.tokens or VISION_TOKENS, "batch": flags.batch or 1}
        host = {"library": library, "model": name, "patch_size": flags.patch_size or PATCH}
        what: dict[str, Any] = {"task": "suite", "host": host, "cost": cost}
    else:
        what = {"task": "model", "model": flags.model, "cost": cost}
        if library == "transformers":
            cost |= {"tokens": flags.tokens or ENCODER_TOKENS, "batch": flags.batch or 1}
        elif flags.tokens or flags.batch:
            raise ConfigError(f"--tokens and --batch: the example input of {flags.model} says how large it is")
    if flags.patch_size and library != "timm":
        raise ConfigError("--patch-size is for models of timm, whose patches can be chosen")
    task, attentions = what.pop("task"), [attention(text) for text in flags.attention if text != "dense"]
    content = {"device": flags.device, "threads": flags.threads, **what, "attentions": attentions}
    key = hashlib.sha256(repr((content, models.source_of(flags.model))).encode()).hexdigest()[:8]
    title = f"measure-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{key}"
    return {"task": task, "name": title, **content, "output": flags.output}


def attention(text: str) -> str | dict[str, Any]:
    """Read ``NAME`` or ``NAME:option=value:option=value``, the values in YAML.

    Raises
    ------
    ConfigError
        If an option does not read so.
    """
    name, *options = text.split(":")
    if not options:
        return name
    given = [parse_override(option) for option in options]
    return {"name": name, "options": {".".join(keys): value for keys, value in given}}

"""Configs made from the flags of ``attnzoo measure``."""

from __future__ import annotations

import argparse
import hashlib
import re
from typing import Any

from attnzoo import models
from attnzoo.bench.config import parse_override
from attnzoo.command import split_outside_brackets
from attnzoo.errors import ConfigError
from attnzoo.imports import source_of

VISION, LANGUAGE = ["padre", "sdpa"], ["sdpa", "keydiff:budget=256"]  # by default
SIZES = ("tokens", "batch", "patch_size", "min_seconds", "new_tokens")  # flags that not every model has


def config_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Give the config, as plain data, that measures what the flags say; its key `task` names the task.

    Raises `ConfigError` if a flag has no meaning for the model.
    """
    library, name = models.split(flags.model)
    given = {key for key in SIZES if getattr(flags, key) is not None}
    if library == "timm":
        what = _timm(flags, name, given)
    elif library == "transformers" and models.is_causal_lm(name):
        what = _decoder(flags, name, given)
    else:
        what = _model(flags, library, given)
    if given:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in sorted(given))
        instead = ""
        if library not in ("timm", "transformers"):
            sizes = ": the example input that it returns says how large it is"
            instead = sizes if given != {"new_tokens"} else ": it is called once, without a cache; give a folder"
        elif "min_seconds" in given:
            instead = ": a language model is timed by --repeats alone"
        raise ConfigError(f"{names}: no meaning for {flags.model}{instead}")
    what["cost"] |= {"repeats": flags.repeats, "timeout_seconds": flags.timeout}
    named = flags.attention or (LANGUAGE if what["task"] == "decode" else VISION)
    what["attentions"] = [attention(text) for text in named if text != "dense"]
    content = {"device": flags.device, "threads": flags.threads, **what}
    sources = [models.source_of(flags.model), *map(source_of, flags.imports)]
    if flags.imports:
        content["imports"] = flags.imports
    key = hashlib.sha256(repr((content, *sources)).encode()).hexdigest()[:8]
    title = f"measure-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-')}-{key}"
    again = {"fresh": True} if flags.fresh else {}
    return {"task": content.pop("task"), "name": title, **content, "output": flags.output, **again}


def _timm(flags: argparse.Namespace, name: str, given: set[str]) -> dict[str, Any]:
    given -= {"tokens", "batch", "patch_size", "min_seconds"}
    model = {"library": "timm", "name": name, "patch_size": _or(flags.patch_size, 16)}
    cost = {"tokens": _or(flags.tokens, [196, 784]), "batch": _or(flags.batch, 1), "dtype": flags.dtype}
    return {"task": "suite", "model": model, "cost": {**cost, "min_seconds": _or(flags.min_seconds, 1.0)}}


def _decoder(flags: argparse.Namespace, name: str, given: set[str]) -> dict[str, Any]:
    """Prefill and decoding of random tokens; nothing is scored."""
    given -= {"tokens", "batch", "new_tokens"}
    cost = {
        "prompt_tokens": _or(flags.tokens, [1024]),
        "new_tokens": _or(flags.new_tokens, 128),
        "batches": [_or(flags.batch, 1)],
    }
    return {"task": "decode", "model": name, "dtype": flags.dtype, "text": None, "nll": None, "cost": cost}


def _model(flags: argparse.Namespace, library: str, given: set[str]) -> dict[str, Any]:
    given -= {"min_seconds"}
    cost = {"dtype": flags.dtype, "min_seconds": _or(flags.min_seconds, 1.0)}
    if library == "transformers":
        given -= {"tokens", "batch"}
        cost |= {"tokens": _or(flags.tokens, [196]), "batch": _or(flags.batch, 1)}
    return {"task": "model", "model": flags.model, "cost": cost}


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def attention(text: str) -> str | dict[str, Any]:
    """Read ``NAME`` or ``NAME:option=value:option=value``, the values in YAML; ``(8, 8)`` is a list, too.

    Raises `ConfigError` if an option does not read so.
    """
    name, *texts = split_outside_brackets(text, ":")
    options: dict[str, Any] = {}
    for option in texts:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--attention {text!r}: options read name=value, as padre:degree=3; a method of a file of your own "
                "goes by the name that it is registered by, after --import MODULE"
            )
        if value.startswith("(") and value.endswith(")"):
            value = f"[{value[1:-1]}]"
        keys, given = parse_override(f"{key}={value}")
        options[".".join(keys)] = given
    return {"name": name, "options": options} if options else name

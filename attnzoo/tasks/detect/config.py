"""Detection configs, mmengine's own: read, and checked before any work."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnzoo.bench.attentions import attention_problems
from attnzoo.bench.config import parse_override
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.imports import search_here
from attnzoo.tasks.classify.cost_config import vision_problems
from attnzoo.tasks.detect import data, mmcv_ext

RUNS = Path("runs/detect")
OF_THE_SWAP = ("name", "label", "where", "keep_original", "positions")
"""Keys of an attention that are not options of its method."""
AS_MMENGINE_HAS_IT = ("imports: [module] in a config", 'custom_imports = dict(imports=["module"]) in a config')
MAY_BE_NEW = ("asset_path", "work_dir", "resume", "load_from", "model.attention", "label", "cost")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a Python config of mmengine, with ``dotted.key=value`` overrides; gives an ``mmengine.Config``.

    Values are YAML, and numbers reach into lists. The `work_dir`, where none was given, is ``runs/detect/NAME/seedS``.

    Raises `ConfigError` if the file cannot be read, or an override sets what the config does not have.
    """
    mmcv_ext.ensure()
    from mmengine.config import Config

    search_here()  # for its custom_imports
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {str(path)!r} does not exist")
    try:
        config = Config.fromfile(path)
    except AttnZooError:
        raise
    except Exception as error:  # a config is Python and may raise anything
        raise ConfigError(f"{path} is not a config of mmengine: {type(error).__name__}: {error}") from error
    model = config.get("model")
    if not isinstance(model, Mapping) or "type" not in model:
        lacks = "it has no model" if not isinstance(model, Mapping) else "its model has no type"
        raise ConfigError(f"{path} is not a config of a detector: {lacks}; see configs/detect")
    values = {}
    for override in overrides:
        keys, value = parse_override(override)
        _check_known(config, keys, override)
        values[".".join(keys)] = value
    root = config.get("data_root")
    config.merge_from_dict(values)
    if "data_root" in values:
        data.move(config, str(root), str(values["data_root"]))
    config.resume = bool(values.get("resume", True))  # mmdet's own configs say False, and a broken run would start over
    config.setdefault("randomness", {"seed": 0})
    if not isinstance(config.randomness, dict):
        raise ConfigError(f"randomness={config.randomness!r} must be a dict; the seed alone is randomness.seed")
    if config.randomness.get("seed") is None:
        config.randomness["seed"] = 0  # a run that is resumed must know its seed
    seed = config.randomness["seed"]
    if config.get("work_dir") is None:
        config.work_dir = str(RUNS / path.stem / f"seed{seed}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"randomness.seed={seed!r} must be a whole number from 0 to 2**32 - 1")
    if isinstance(config.model.get("attention"), str):
        config.model.attention = {"name": config.model.attention}
    _check_counts(config)
    _check_attentions(config)
    return config


def _check_attentions(config: Any) -> None:
    """Refuse, before mmengine prints the config, attentions that no detector can have: of `model` and of `cost`."""
    cost = config.get("cost")
    more = (cost.get("attentions") or ()) if isinstance(cost, Mapping) else ()
    named = {"model.attention": config.model.get("attention")}
    named |= {f"cost.attentions.{at}": one for at, one in enumerate(more)}
    problems = []
    for where, attention in named.items():
        if attention is None:
            continue
        if not isinstance(attention, Mapping) or not isinstance(attention.get("name"), str):
            raise ConfigError(
                f"{where}={attention!r} must be the name of a registered attention, or a dict with a name"
            )
        options = {key: value for key, value in attention.items() if key not in OF_THE_SWAP}
        found = attention_problems([{"name": attention["name"], "options": options}], where, vision_problems)
        problems += [problem.replace(f"{where}.options", where).replace(*AS_MMENGINE_HAS_IT) for problem in found]
    if problems:
        raise ConfigError("\n".join(problems))


def _check_counts(config: Any) -> None:
    places = [(f"{part}_dataloader", "batch_size") for part in data.PARTS]
    for section, key in [("train_cfg", "max_epochs"), ("train_cfg", "max_iters"), *places]:
        held = config.get(section) or {}
        if not isinstance(held, Mapping):
            raise ConfigError(f"{section}={held!r} must be a dict, as in the configs of configs/detect")
        count = held.get(key, 1)
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"{section}.{key}={count!r} must be a whole number of at least 1")


def _check_known(config: Any, keys: Sequence[str], override: str) -> None:
    at: Any = config.to_dict()
    new = False
    for depth, key in enumerate(keys):
        new = new or ".".join(keys[: depth + 1]) in MAY_BE_NEW
        where = ".".join(keys[:depth]) or "the config"
        if isinstance(at, (list, tuple)):
            if not key.isdecimal() or int(key) >= len(at):
                raise ConfigError(f"{override}: {where} is a list of {len(at)}, without a {key!r}; give the whole list")
            at = at[int(key)]
        elif isinstance(at, Mapping) and key in at:
            at = at[key]
        elif new:
            return
        else:
            held = ", ".join(map(str, at)) if isinstance(at, Mapping) else repr(at)
            raise ConfigError(f"{override}: {where} has no {key!r}; it has {held}")


def config_of(text: str) -> Any:
    """Give mmengine's config out of its own text."""
    mmcv_ext.ensure()
    from mmengine.config import Config

    return Config.fromstring(text, ".py")


def plain(value: Any) -> Any:
    """A part of a config as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def seeds_of(config: Any) -> list[Any]:
    """The config once for each seed that was trained beside its own: ``.../seed0``, ``.../seed1``."""
    folder = Path(config.work_dir)
    own = f"seed{config.randomness.seed}"
    if folder.name != own:
        return [config]
    found = []
    for other in sorted(folder.parent.glob("seed*")):
        if other.name[4:].isdigit() and (other / "last_checkpoint").is_file():
            one = copy.deepcopy(config)
            one.work_dir, one.randomness.seed = str(other), int(other.name[4:])
            found.append(one)
    return found or [config]

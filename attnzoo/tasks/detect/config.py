"""Detection configs, mmengine's own: read, checked before any work, and their data put in place."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnzoo import assets, files
from attnzoo.bench.attentions import attention_problems
from attnzoo.bench.config import parse_override
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.tasks.classify.cost_config import vision_problems
from attnzoo.tasks.detect import check, mmcv_ext

RUNS = Path("runs/detect")
OF_THE_SWAP = ("name", "label", "where", "keep_original", "positions")
"""Keys of an attention that are not options of its method."""
MAY_BE_NEW = ("asset_path", "work_dir", "resume", "load_from", "model.attention", "label", "cost")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read an mmengine config and apply ``key=value`` overrides.

    Parameters
    ----------
    path
        A Python config of mmengine.
    overrides
        ``dotted.key=value``, the value in YAML; numbers reach into lists.

    Returns
    -------
    mmengine.Config
        Its `work_dir`, where none was given, is ``runs/detect/NAME/seedS``.

    Raises
    ------
    ConfigError
        If the file cannot be read, or an override sets what the config does not have.
    """
    mmcv_ext.ensure()
    from mmengine.config import Config

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
        _move_data(config, str(root), str(values["data_root"]))
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
    named = [("model.attention", config.model.get("attention"))]
    named += [(f"cost.attentions.{at}", one) for at, one in enumerate(more)]
    problems = []
    for where, attention in named:
        if attention is None:
            continue
        if not isinstance(attention, Mapping) or not isinstance(attention.get("name"), str):
            raise ConfigError(
                f"{where}={attention!r} must be the name of a registered attention, or a dict with a name"
            )
        options = {key: value for key, value in attention.items() if key not in OF_THE_SWAP}
        entry = {"name": attention["name"], "options": options}
        found = attention_problems([entry], where, vision_problems)
        problems += [problem.replace(f"{where}.options", where) for problem in found]
    if problems:
        raise ConfigError("\n".join(problems))


def _check_counts(config: Any) -> None:
    places = [(f"{part}_dataloader", "batch_size") for part in ("train", "val", "test")]
    for section, key in [("train_cfg", "max_epochs"), ("train_cfg", "max_iters"), *places]:
        held = config.get(section) or {}
        if not isinstance(held, Mapping):
            raise ConfigError(f"{section}={held!r} must be a dict, as in the configs of configs/detect")
        count = held.get(key, 1)
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"{section}.{key}={count!r} must be a whole number of at least 1")


def _check_known(config: Any, keys: Sequence[str], override: str) -> None:
    at: Any = config.to_dict()
    for depth, key in enumerate(keys):
        if ".".join(keys[: depth + 1]) in MAY_BE_NEW:
            return
        if isinstance(at, (list, tuple)) and key.isdigit() and int(key) < len(at):
            at = at[int(key)]
        elif isinstance(at, Mapping) and key in at:
            at = at[key]
        else:
            where = ".".join(keys[:depth]) or "the config"
            held = ", ".join(map(str, at)) if isinstance(at, Mapping) else repr(at)
            raise ConfigError(f"{override}: {where} has no {key!r}; it has {held}")


def _move_data(config: Any, before: str, now: str) -> None:
    """Have the data sets and metrics look under another root."""
    now = os.path.join(now, "")
    for part in ("train", "val", "test"):
        dataset = config.get(f"{part}_dataloader") or {}
        for one in check.innermost(dataset.get("dataset", {})):
            if os.path.normpath(one.get("data_root") or "") == os.path.normpath(before):
                one["data_root"] = now
        for metric in check.metrics(config.get(f"{part}_evaluator")):
            if str(metric.get("ann_file", "")).startswith(before):
                metric["ann_file"] = now + metric["ann_file"].removeprefix(before)
    config.data_root = now


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


def prepare(config: Any) -> list[check.Checked]:
    """Have the data in place, and check it: every annotation file of the config, before any work.

    Raises
    ------
    AttnZooError
        If something is missing or wrong; see `attnzoo.tasks.detect.check`.
    """
    root = config.get("data_root")
    if root:
        _check_used(config, str(root))
    if root and not Path(root).exists():
        if config.get("asset") != Path(root).name:  # a link in any other place would stand for data of another name
            raise ConfigError(f"data_root={str(root)!r} does not exist; put the data there or set data_root=PATH/")
        _link(assets.get(config.asset, config.get("asset_path")), Path(root))
    found = [one for part in loaders(config) for one in check.dataset(config[part].dataset)]
    for part in ("val", "test"):
        _check_metric(config, part)
        _score_what_is_checked(config, part)
    head = config.model.get("bbox_head")
    for one in found:
        if isinstance(head, Mapping) and head.get("num_classes") not in (None, len(one.classes)):
            raise ConfigError(
                f"model.bbox_head.num_classes is {head['num_classes']}, but {one.file} is read for {len(one.classes)} "
                f"classes: {', '.join(one.classes)}"
            )
    return found


def _check_metric(config: Any, part: str) -> None:
    """Refuse a metric that would hold predictions against the annotations of other images."""
    read = [check.annotations_of(one) for one in _tested(config, part)]
    for metric in check.metrics(config.get(f"{part}_evaluator")):
        told = metric.get("ann_file")
        if told and read and Path(told) not in [*read, *(_scored(config, one) for one in read)]:
            raise ConfigError(
                f"{part}_evaluator.ann_file={told!r} is not what {part}_dataloader reads, {', '.join(map(str, read))}; "
                "give that, or None"
            )


def _tested(config: Any, part: str) -> list[Any]:
    """Configs of the data sets that are tested on."""
    loader = config.get(f"{part}_dataloader")
    return [] if loader is None else check.innermost(loader.dataset)


def _scored(config: Any, file: Path) -> Path:
    """Where a copy of an annotation file goes that holds what is scored."""
    name = f"{file.stem}-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}.json"
    return Path(config.work_dir) / "scored" / name


def _score_what_is_checked(config: Any, part: str) -> None:
    """Have COCO's metric read a copy of its annotation file, where that holds boxes which the data set leaves out.

    Other metrics, and annotation files of other data sets than COCO's, such as LVIS, are left alone.
    """
    checked = [check.annotations_of(one) for one in _tested(config, part) if check.is_of(one, "CocoDataset")]
    for metric in check.metrics(config.get(f"{part}_evaluator")):
        told = metric.get("ann_file")
        if not told or not check.is_of(metric, "CocoMetric") or Path(told) not in checked:
            continue
        content = check.read(Path(told))
        scored = check.to_score(content)
        if scored["annotations"] != content["annotations"]:
            copy = _scored(config, Path(told))
            files.write_json(copy, scored)
            metric["ann_file"] = str(copy)


def _check_used(config: Any, root: str) -> None:
    """Refuse a `data_root` that no data set has: a config that inherits another must set that of each data set too."""
    roots = {os.path.normpath(one) for part in loaders(config) for one in check.roots(config[part].dataset)}
    if roots and not any(Path(one).is_relative_to(os.path.normpath(root)) for one in roots):
        raise ConfigError(
            f"data_root={root!r} is not that of any data set: they read {', '.join(sorted(roots))}; set data_root in "
            "the dataset of each dataloader too"
        )


def loaders(config: Any) -> list[str]:
    """Keys of the config's data loaders, each of other data than those before."""
    found: dict[str, str] = {}
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(part) is not None:
            found.setdefault(str(config[part].dataset), part)
    return list(found.values())


def _link(folder: Path, place: Path) -> None:
    """Make `place` stand for `folder`; a link that leads nowhere any more is replaced."""
    place = Path(os.path.normpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        if place.is_symlink() and not place.exists():
            place.unlink(missing_ok=True)
        place.symlink_to(folder, target_is_directory=True)
    except FileExistsError:  # another process was faster
        pass
    except OSError as error:
        raise ConfigError(f"{place} cannot be made a link to {folder}: {error}; set data_root={folder}/") from error
    if not place.is_dir():
        raise ConfigError(f"{place} is not a folder; remove it, or set data_root={folder}/")

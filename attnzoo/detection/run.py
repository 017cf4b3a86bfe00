"""Detection configs, mmengine's own, read and checked before any work, and their training on mmengine's Runner."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attnzoo import assets
from attnzoo.bench.strict import parse_override
from attnzoo.detection import check, mmcv_ext
from attnzoo.detection.voc import write_json
from attnzoo.errors import AttnZooError, ConfigError

RUNS = Path("runs/detect")
MAY_BE_NEW = ("asset_path", "work_dir", "resume", "load_from", "launcher", "model.attention", "label", "cost")
ANYWHERE = ("work_dir", "resume", "load_from", "launcher", "asset_path", "data_root", "cost", "label", "log_level")
"""Keys that leave the weights as they are."""
KEPT = "trained_by.json"


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
        raise ConfigError(f"{path} is no config of mmengine: {type(error).__name__}: {error}") from error
    values = {}
    for override in overrides:
        keys, value = parse_override(override)
        _check_known(config, keys, override)
        values[".".join(keys)] = value
    root = config.get("data_root")
    config.merge_from_dict(values)
    if "data_root" in values:
        _move_data(config, str(root), str(values["data_root"]))
    config.setdefault("randomness", {"seed": 0})
    if config.randomness.get("seed") is None:
        config.randomness.seed = 0  # a run that is resumed must know its seed
    if config.get("work_dir") is None:
        config.work_dir = str(RUNS / path.stem / f"seed{config.randomness.seed}")
    return config


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
        dataset, metric = (config.get(f"{part}_{what}") or {} for what in ("dataloader", "evaluator"))
        dataset = dataset.get("dataset", {})
        while dataset.get("dataset") is not None:  # inside a wrapper
            dataset = dataset["dataset"]
        if dataset.get("data_root") == before:
            dataset["data_root"] = now
        if isinstance(metric, dict) and str(metric.get("ann_file", "")).startswith(before):
            metric["ann_file"] = now + metric["ann_file"].removeprefix(before)
    config.data_root = now


def prepare(config: Any) -> list[check.Checked]:
    """Have the data in place, and check it: every annotation file of the config, before any work.

    Raises
    ------
    AttnZooError
        If something is missing or wrong; see `attnzoo.detection.check`.
    """
    root = config.get("data_root")
    if root and not Path(root).exists():
        if not config.get("asset"):
            raise ConfigError(f"data_root={str(root)!r} does not exist; put the data there or set data_root=PATH/")
        _link(assets.get(config.asset, config.get("asset_path")), Path(root))
    found = (check.dataset(config[part].dataset) for part in loaders(config))
    return [one for one in found if one is not None]


def loaders(config: Any) -> list[str]:
    """Keys of the config's data loaders, each of other data than those before."""
    found: dict[str, str] = {}
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(part) is not None:
            found.setdefault(str(config[part].dataset), part)
    return list(found.values())


def _link(folder: Path, place: Path) -> None:
    """Make `place` stand for `folder`."""
    place = Path(os.path.normpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(folder, target_is_directory=True)
    except FileExistsError:  # another process was faster
        pass
    except OSError as error:
        raise ConfigError(f"{place} cannot be made a link to {folder}: {error}; set data_root={folder}/") from error


def fit_to_machine(config: Any, launcher: str) -> None:
    """Set what depends on where the processes run: without a GPU, many of them talk through gloo."""
    config.launcher = launcher
    if launcher == "none" or torch.cuda.is_available():
        return
    if launcher != "pytorch":
        raise ConfigError(f"launcher={launcher!r} needs GPUs; without them use torchrun and --launcher pytorch")
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            raise ConfigError(
                "--launcher pytorch is for processes that torchrun started: torchrun --nproc_per_node 2 ..."
            )
        torch.distributed.init_process_group("gloo")
    config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}


def mixed_precision(config: Any) -> None:
    """Train by mmengine's AmpOptimWrapper; it needs a GPU."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "mixed precision is mmengine's AmpOptimWrapper, which needs a GPU, and PyTorch sees none here"
        )
    config.optim_wrapper.type = "AmpOptimWrapper"


def train(config: Any) -> Path:
    """Train by mmengine's Runner, from the last checkpoint in the run's folder where there is one.

    Returns
    -------
    Path
        The run's folder.

    Raises
    ------
    ConfigError
        If the folder holds a run of another config.
    DataError
        If images or annotations cannot be used.
    """
    from mmengine.runner import Runner

    folder = Path(config.work_dir)
    if config.get("resume", True):
        changed = changes(config)
        if changed and (folder / "last_checkpoint").exists():
            raise ConfigError(
                f"{folder} holds a run of another config ({'; '.join(changed[:5])}); give another folder with "
                "work_dir=PATH, or begin anew with resume=false"
            )
        config.resume = True
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(_plain(config), folder / KEPT)
    Runner.from_cfg(config).train()
    return folder


def changes(config: Any) -> list[str]:
    """What differs from the config by which the run's folder was trained: ``key: before -> now``; empty if nothing."""
    kept = Path(config.work_dir) / KEPT
    if not kept.is_file():
        return []
    before = dict(_leaves(json.loads(kept.read_text(encoding="utf-8"))))
    now = dict(_leaves(json.loads(json.dumps(_plain(config)))))
    keys = [key for key in [*before, *(k for k in now if k not in before)] if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key, 'nothing')} -> {now.get(key, 'nothing')}" for key in keys]


def _plain(config: Any) -> dict[str, Any]:
    """What decides the weights that come out, as JSON has it."""
    content = {key: value for key, value in config.to_dict().items() if key not in ANYWHERE}
    used = ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "custom_hooks", "randomness")
    return json.loads(json.dumps({key: content[key] for key in used if key in content}, default=str))


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        pairs: Any = content.items()
    elif isinstance(content, list):
        pairs = enumerate(content)
    else:
        yield path, content
        return
    for key, value in pairs:
        if key != "data_root":
            yield from _leaves(value, f"{path}.{key}" if path else str(key))


def last_checkpoint(config: Any) -> Path | None:
    """The newest checkpoint of a run, or None."""
    told = Path(config.work_dir) / "last_checkpoint"
    if not told.is_file():
        return None
    path = Path(told.read_text(encoding="utf-8").strip())
    return path if path.is_file() else Path(config.work_dir) / path.name

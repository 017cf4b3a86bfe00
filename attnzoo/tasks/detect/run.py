"""Training of detectors on mmengine's Runner, alone or with other processes, and what a run's folder was trained by."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnzoo import files
from attnzoo.errors import ConfigError, DataError
from attnzoo.tasks.detect import mmcv_ext
from attnzoo.tasks.detect.config import plain

TRAINED_BY = "trained_by.json"
WEIGHTS = ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "custom_hooks", "randomness")
"""The config's keys that decide the weights that come out, beside `load_from`."""
FITTED = (
    *(f"train_dataloader.{key}" for key in ("batch_size", "num_workers", "persistent_workers")),
    *(f"optim_wrapper.{key}" for key in ("type", "dtype", "loss_scale")),
    "images_a_step",
)
"""Keys that fit a training to its machine: an evaluation does not ask for them again."""


def fit_to_machine(config: Any, launcher: str) -> None:
    """Join the other processes, where a launcher started some: without a GPU they talk through gloo.

    Raises `ConfigError` if no launcher started this process, or its kind needs GPUs that are not here.
    """
    config.launcher = launcher
    if launcher == "none":
        return
    distributed = mmcv_ext.load("mmengine.dist")
    if torch.cuda.is_available():
        if not distributed.is_distributed():
            distributed.init_dist(launcher, **config.get("env_cfg", {}).get("dist_cfg", {}))
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


def is_main() -> bool:
    """Whether this is the process that writes."""
    return bool(mmcv_ext.load("mmengine.dist").is_main_process())


def train(config: Any) -> Path:
    """Train by mmengine's Runner, from the last checkpoint in the run's folder where there is one; give that folder.

    With ``resume=False`` what the folder holds is set aside first, in ``FOLDER.old`` or ``FOLDER.old2`` and so on.

    Raises `ConfigError` if the config trains nothing, the folder holds a run of another config, another process is
    training into it, or `load_from` is missing; `DataError` if the run's checkpoint is damaged.
    """
    from mmengine.dist import barrier
    from mmengine.runner import Runner

    missing = [key for key in ("train_dataloader", "train_cfg", "optim_wrapper") if config.get(key) is None]
    if missing:
        raise ConfigError(f"this config trains nothing: it has no {', '.join(missing)}; see configs/detect")
    given, folder = config.get("load_from"), Path(config.work_dir)
    begins = not (config.resume and last_checkpoint(config))
    if given and begins and "://" not in given and not Path(given).expanduser().is_file():
        raise ConfigError(f"load_from={given!r} does not exist")
    with files.locked(folder) if is_main() else contextlib.nullcontext():
        if not config.resume and is_main():
            files.set_aside(folder, itertools.chain([".old"], map(".old{}".format, itertools.count(2))))
        barrier()
        begun = last_checkpoint(config) is not None
        changed = changes(config) if begun else []
        if changed:
            raise ConfigError(
                f"{folder} holds a run of another config ({'; '.join(changed[:5])}); give another folder with "
                "work_dir=PATH, or start over with resume=false"
            )
        config.resume = begun
        if begun:
            config.load_from = None  # mmengine would go on from that one
        trained_by = _trained_by(config)
        if config.get("experiment_name") is None:
            # mmengine names a run by the second it began in, and two of one name share where they write their logs
            config.experiment_name = f"{Path(config.filename or 'run').stem}-{uuid.uuid4().hex[:8]}"
        runner = Runner.from_cfg(config)
        if not begun and is_main():
            files.write_json(folder / TRAINED_BY, trained_by)
        runner.train()
    return folder


def changes(config: Any, ignore: Sequence[str] = ()) -> list[str]:
    """What differs from the config by which the run's folder was trained: ``key: before -> now``; empty if nothing."""
    kept = Path(config.work_dir) / TRAINED_BY
    if not kept.is_file():
        return []
    before, now = _leaves(files.read_json(kept)), _leaves(_trained_by(config))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in ignore]
    return [f"{key}: {before.get(key, 'nothing')} -> {now.get(key, 'nothing')}" for key in keys]


def _trained_by(config: Any) -> dict[str, Any]:
    """What decides the weights that come out, as JSON has it."""
    held = {key: value for key, value in config.to_dict().items() if key in WEIGHTS or (key == "load_from" and value)}
    world = mmcv_ext.load("mmengine.dist").get_world_size()
    held["images_a_step"] = config.train_dataloader.get("batch_size", 1) * world
    found: dict[str, Any] = plain(held)
    for key in ("batch_size", "num_workers", "persistent_workers"):
        found["train_dataloader"].pop(key, None)
    return found


def _leaves(content: Any, path: str = "") -> dict[str, Any]:
    """All values by their dotted paths, but for where the data lie."""
    if not isinstance(content, (dict, list)):
        return {path.lstrip("."): content}
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    parts = [_leaves(value, f"{path}.{key}") for key, value in pairs if key != "data_root"]
    return {place: value for part in parts for place, value in part.items()}


def last_checkpoint(config: Any) -> Path | None:
    """The newest checkpoint of a run, None where none was written, or `DataError` if it is gone or damaged."""
    told = Path(config.work_dir) / "last_checkpoint"
    if not told.is_file():
        return None
    name = Path(told.read_text(encoding="utf-8", errors="replace").strip()).name  # the folder may have moved
    path = told.with_name(name) if name else told
    mend = f"name one that is whole in {told}, or start over with resume=false"
    if path == told or not path.is_file():
        raise DataError(f"{told} names no checkpoint that is there ({name!r}); {mend}")
    if not zipfile.is_zipfile(path):  # as all that torch.save writes is, with its list at the end
        raise DataError(f"{path} is cut short; {mend}")
    try:
        with zipfile.ZipFile(path) as held:
            altered = held.testzip()  # by the checksums that it holds
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        altered = str(error)
    if altered:
        raise DataError(f"{path} is damaged, at {altered}; {mend}")
    return path

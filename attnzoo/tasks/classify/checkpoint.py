"""Checkpoints: a folder each, written beside and renamed, with the hash of every file in it.

A checkpoint holds what Accelerate saves (weights, optimizer, gradient scaler, random states and what was registered:
progress and averaged weights) and ``model.json``. ``manifest.json`` is written last and names every other file with its
size and SHA-256, so that one that was cut short or altered is known.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from attnzoo import files
from attnzoo.assets import sha256_of
from attnzoo.errors import ConfigError, TrainingError
from attnzoo.tasks.classify.config import MANIFEST
from attnzoo.units import megabytes

PART = ".part-"
PREFIX = "step-"


def step_of(folder: Path) -> int:
    """The number of steps done at a checkpoint."""
    return int(folder.name.removeprefix(PREFIX))


def all_checkpoints(parent: Path) -> list[Path]:
    """Checkpoints by their steps, good or not."""
    found = [path for path in parent.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


@contextlib.contextmanager
def writing(folder: Path, kept: str, main: bool = True, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder`, whole, when all is written.

    Raises `TrainingError` if it cannot be written, because the disk is full or another reason; nothing of it is left.

    A `folder` that is there is replaced; `kept` tells what is left if it fails. `main` says whether this is the process
    that makes and renames the folder, `wait` has processes wait for one another.
    """
    part = folder.with_name(PART + folder.name)
    try:
        if main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait()
        yield part
        wait()
        if main:
            _seal(part)
            _discard(folder)
            os.replace(part, folder)
            _sync(folder.parent)
        wait()
    except Exception as error:  # safetensors and torch.save have errors of their own for a full disk
        free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(
            f"{folder} could not be written: {error} ({megabytes(free)} were free there). {kept}"
        ) from error


def problem(folder: Path) -> str | None:
    """Say what is wrong with a folder that was written here, or give None."""
    try:
        manifest = files.read_json(folder / MANIFEST)["files"]
        listed = {str(name): (int(size), str(sha256)) for name, (size, sha256) in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if not listed:
        return f"its {MANIFEST} lists nothing"
    for name, (size, sha256) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes where {size} were written"
        if sha256_of(path) != sha256:
            return f"{name} was altered: its SHA-256 is not the one written"
    return None


def newest_good(parent: Path) -> Path | None:
    """The newest checkpoint that is whole, or None where none was written; a warning names each that is refused.

    Raises `ConfigError` if checkpoints were written and none of them is whole.
    """
    refused: dict[Path, str] = {}
    for folder in reversed(all_checkpoints(parent)):
        wrong = problem(folder)
        if wrong is None:
            for each, reason in refused.items():
                warnings.warn(f"checkpoint {each} is refused: {reason}; {folder.name} is used", stacklevel=2)
            return folder
        refused[folder] = wrong
    if refused:
        told = "; ".join(f"{folder.name}: {reason}" for folder, reason in refused.items())
        raise ConfigError(f"{parent} has no usable checkpoint ({told}); start over with resume=never")
    return None


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in all_checkpoints(parent)[:-keep]:
        _discard(folder)


def tidy(parent: Path, step: int) -> None:
    """Before going on from `step`: remove what a killed run was writing, and set aside checkpoints that were refused.

    Those are of later steps; left where they are, they would be kept instead of new ones.
    """
    for folder in parent.glob(f"{PART}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in all_checkpoints(parent):
        if step_of(folder) > step:
            aside = folder.with_name(f"refused-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)


def _discard(folder: Path) -> None:
    """Remove a folder, if it is there, without ever leaving a part of it under its name."""
    gone = folder.with_name(f"{PART}gone-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _seal(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        _sync(path)
    listed = {str(path.relative_to(folder)): [path.stat().st_size, sha256_of(path)] for path in paths}
    files.write_json(folder / MANIFEST, {"files": listed})
    _sync(folder / MANIFEST)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

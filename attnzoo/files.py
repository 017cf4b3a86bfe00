"""Files that are written whole or not at all, and folders that one process at a time may write into."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from attnzoo.errors import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def atomic(path: str | Path, suffix: str = ".part") -> Iterator[Path]:
    """Give the path of a new file beside `path`, which takes the place of `path` when the block ends.

    The folder is made if it is not there. The content is on disk before the name is; if the block raises, `path` stays
    as it was and nothing is left beside it.

    Parameters
    ----------
    path
        What the file will be called.
    suffix
        How the name of the new file ends, for tools that go by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{suffix}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8 with the line ends that it has."""
    with atomic(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file, whole or not at all, for people to read as well."""
    write(path, json.dumps(content, indent=1) + "\n")


def check_folder(path: str | Path, key: str, inside: str = "") -> None:
    """Check, before any work, that a folder can be written into.

    A file is made in it, or in the nearest folder above that is there, and goes again.

    Parameters
    ----------
    path
        The folder, which need not be there yet.
    key
        By what the user sets it, for the message: ``output``.
    inside
        A folder in it that will be written into.

    Raises
    ------
    ConfigError
        If it, or something on the way to it, is a file, or nothing can be written there.
    """
    path = Path(path)
    place = path / inside
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        what = "is a file" if os.path.exists(place) else "is a link that leads nowhere"
        told = f"{what}; give a folder" if place == path else f"cannot be a folder: {place} {what}; give another"
        raise ConfigError(f"{key}={path} {told}")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        at = "" if place == path else f"{place}: "
        raise ConfigError(f"{key}={path} cannot be written into: {at}{error.strerror}; give another folder") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, for one process; the system lets go when that ends, however it ends.

    Raises
    ------
    ConfigError
        If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise ConfigError(
            f"another run is writing into {folder}; wait for it, or give another folder with output=PATH"
        ) from None
    with lock:
        yield


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that `write_json` wrote; `OSError` or `ValueError` if that is not there."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def set_aside(folder: Path, suffixes: Iterable[str]) -> None:
    """Move what a folder holds, but for its lock, into a new one beside it.

    Its name is that of the folder with the first of `suffixes` that is not taken: what was set aside before stays.
    """
    held = [entry for entry in folder.iterdir() if entry.name != LOCK]
    if held:
        aside = next(new for end in suffixes if not (new := folder.with_name(folder.name + end)).exists())
        aside.mkdir()
        for entry in held:
            entry.rename(aside / entry.name)

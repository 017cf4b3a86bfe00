"""Images in folders: the class of an image is the first folder under its split; what is left out is counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from attnzoo.errors import ConfigError
from attnzoo.pixels import Mode, to_mode

MOST_NAMED = 3
# formats that PIL knows by their headers, but decodes only with another program, or that have no fixed range of pixels
NOT_DECODED = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"})
# folders that tools leave behind, beside those whose name begins with a dot
LEFT_BEHIND = frozenset({"__MACOSX", "__pycache__", "@eaDir"})
HIDDEN = "hidden or left behind by a tool"
STRAY = "beside the class folders, so of no class"
FORMAT = "without the ending of an image format that PIL reads"
LINK = "linked to a folder that is read anyway"
UNMAPPED = "of classes that class_map does not name"


@dataclass
class LeftOut:
    """What a folder holds that is not read: how many by reason, and the first few names."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, name: str, count: int = 1) -> None:
        """Count something that is not read."""
        self.counts[reason] += count
        named = self.names.setdefault(reason, [])
        if len(named) < MOST_NAMED:
            named.append(name)

    def __str__(self) -> str:
        told = []
        for reason, count in self.counts.items():
            more = ", ..." if count > len(self.names[reason]) else ""
            told.append(f"{count:,} {reason} ({', '.join(self.names[reason])}{more})")
        return "; ".join(told)


class ImageFolder:
    """A split's images, class by class.

    Parameters
    ----------
    folder
        The split: every folder in it is a class, and every image at any depth below that is of the class. Links are
        followed, but not to what is read anyway. Hidden files and folders are left out, such as
        ``.ipynb_checkpoints``, and so are files in the split's own folder and files that are not images; `left_out`
        counts them.
    mode
        ``"L"`` or ``"RGB"``; see `attnzoo.pixels.to_mode`.
    class_map
        Numbers of classes by name; by default they are sorted as timm does, without regard to case, ``img2`` before
        ``img10``.
    suffixes
        Read files with these endings alone; by default every format that PIL decodes.

    Raises
    ------
    ConfigError
        If the folder cannot be read, a class has no image, links of two classes lead to one folder, or `class_map` is
        no numbering from 0 on.
    """

    def __init__(
        self,
        folder: Path,
        mode: Mode,
        class_map: Mapping[str, int] | None = None,
        suffixes: frozenset[str] | None = None,
    ) -> None:
        self.folder, self.mode, self.left_out = folder, mode, LeftOut()
        self._suffixes = image_suffixes() if suffixes is None else suffixes
        self._own = os.path.realpath(folder)
        self._followed: dict[str, str] = {}  # folders beyond links, and the class that each is read for
        found = dict(self._class_folders(class_map))
        if not any(found.values()):
            told = f"; left out: {self.left_out}" if self.left_out.counts else ""
            raise ConfigError(f"data: Found 0 images in {str(folder)!r}: it should have a folder for each class{told}")
        ordered = tuple(sorted(found, key=_natural)) if class_map is None else _in_order(class_map)
        self.classes: tuple[str, ...] | None = ordered
        # (path, class), in the order of timm's reader
        self.files = sorted(
            ((path, number) for number, name in enumerate(ordered) for path in found.get(name, ())),
            key=lambda file: _natural(file[0]),
        )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Give an image and its class."""
        path, target = self.files[index]
        with Image.open(path) as image:
            return to_mode(image, self.mode), target

    def name(self, index: int) -> str:
        """The path of an image below the split's folder."""
        return os.path.relpath(self.files[index][0], self.folder)

    def _class_folders(self, class_map: Mapping[str, int] | None) -> Iterator[tuple[str, list[str]]]:
        for entry in _entries(self.folder):
            if self._hidden(entry):
                continue
            if not _is_folder(entry):
                if entry.is_symlink() and not os.path.exists(entry.path):
                    raise ConfigError(f"data: {entry.path!r} is a broken link; fix or remove it")
                self.left_out.note(STRAY, entry.name)
                continue
            linked = entry.is_symlink()
            if linked and self._read_anyway(entry.path, entry.name):
                self.left_out.note(LINK, entry.name)
                continue
            before = self.left_out.counts.copy()
            files = list(self._images(entry.path, entry.name, linked))
            if class_map is not None and entry.name not in class_map:
                if files:
                    self.left_out.note(UNMAPPED, entry.name, len(files))
            elif files:
                yield entry.name, files
            else:
                found = sum((self.left_out.counts - before).values())
                raise ConfigError(
                    f"data: {entry.path!r} holds no image that can be read ({found:,} other files in it), and each "
                    f"folder in {str(self.folder)!r} is a class. Remove or move it, or begin its name with a dot; "
                    "images that PIL does not read must be converted"
                )

    def _images(self, folder: str, name: str, linked: bool) -> Iterator[str]:
        """Images of the class `name` in a folder at any depth; `linked` where that lies beyond a link."""
        if linked:
            self._followed[os.path.realpath(folder)] = name
        for entry in _entries(folder):
            if self._hidden(entry):
                continue
            if _is_folder(entry):
                beyond = linked or entry.is_symlink()
                if beyond and self._read_anyway(entry.path, name):
                    self.left_out.note(LINK, self._below(entry))
                else:
                    yield from self._images(entry.path, name, beyond)
            elif os.path.splitext(entry.name)[1].lower() in self._suffixes:
                yield entry.path
            else:
                self.left_out.note(FORMAT, self._below(entry))

    def _hidden(self, entry: os.DirEntry[str]) -> bool:
        if not entry.name.startswith(".") and entry.name not in LEFT_BEHIND:
            return False
        folder = entry.is_dir(follow_symlinks=False)
        count = sum(len(files) for _, _, files in os.walk(entry.path)) if folder else 1
        if count:
            self.left_out.note(HIDDEN, self._below(entry), count)
        return True

    def _read_anyway(self, path: str, name: str) -> bool:
        """Whether a folder beyond a link is in the split, around it, or read by another link of the class `name`.

        Raises
        ------
        ConfigError
            If it is read by a link of another class.
        """
        real = os.path.realpath(path)
        if _within(real, self._own) or _within(self._own, real):
            return True
        owner = self._followed.get(real, name)
        if owner != name:
            raise ConfigError(
                f"data: {path!r} leads to {real!r}, whose images are of another class already, {owner!r}; mend or "
                "remove the link"
            )
        return real in self._followed

    def _below(self, entry: os.DirEntry[str]) -> str:
        return os.path.relpath(entry.path, self.folder)


def image_suffixes() -> frozenset[str]:
    """Endings of the files that PIL decodes, in lower case with the dot; plugins that are registered count."""
    Image.init()
    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NOT_DECODED
    )


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"data: {str(folder)!r} cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder or leads to one; a link to itself is an error for ``DirEntry.is_dir``."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _natural(text: str) -> tuple[list[str | int], str]:
    """Order numbers in names by value, without regard to case; the text itself decides between equals."""
    parts = re.split(r"([0-9]+)", text.lower())
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], text


def _in_order(class_map: Mapping[str, int]) -> tuple[str, ...]:
    if sorted(class_map.values()) != list(range(len(class_map))):
        raise ConfigError(
            f"data.options.class_map: it must number its {len(class_map)} classes from 0 to {len(class_map) - 1}, each "
            "once"
        )
    return tuple(sorted(class_map, key=class_map.__getitem__))

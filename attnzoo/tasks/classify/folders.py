"""Images in folders: the class of an image is the first folder under its split; what is left out is counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
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


class LeftOut:
    """What a folder holds that is not read: how many by reason, and the first few names."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.names: dict[str, list[str]] = {}

    def note(self, reason: str, name: str, count: int = 1) -> None:
        """Count something that is not read."""
        self.counts[reason] += count
        self.names[reason] = [*self.names.get(reason, ()), name][:MOST_NAMED]

    def __str__(self) -> str:
        more = {reason: ", ..." if count > len(self.names[reason]) else "" for reason, count in self.counts.items()}
        return "; ".join(f"{n:,} {why} ({', '.join(self.names[why])}{more[why]})" for why, n in self.counts.items())


class ImageFolder:
    """A split's images, class by class, in a `mode` of `attnzoo.pixels.to_mode`.

    Every folder in `folder` is a class, numbered by `class_map` or sorted as timm does (without regard to case,
    ``img2`` before ``img10``), and every image at any depth below that is of the class. Links are followed, but not to
    what is read anyway. Hidden files and folders are left out, such as ``.ipynb_checkpoints``, and so are
    files in the split's own folder and files that are not images: whose ending is none of `suffixes`, by default those
    of all formats that PIL decodes. `left_out` counts them.

    Raises `ConfigError` if the folder cannot be read, a class has no image, links of two classes lead to one folder, or
    `class_map` is no numbering from 0 on.
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
        found: dict[str, list[str]] = {}
        for entry, beyond in self._entries(str(folder)):
            if beyond is None:
                if entry.is_symlink() and not os.path.exists(entry.path):
                    raise ConfigError(f"data: {entry.path!r} is a broken link; fix or remove it")
                self.left_out.note(STRAY, entry.name)
                continue
            before = self.left_out.counts.total()
            images = list(self._images(entry.path, entry.name, beyond))
            known = class_map is None or entry.name in class_map
            if known and not images:
                others = self.left_out.counts.total() - before
                raise ConfigError(
                    f"data: {entry.path!r} holds no image that can be read ({others:,} other files in it), and each "
                    f"folder in {str(folder)!r} is a class. Remove or move it, or begin its name with a dot; images "
                    "that PIL does not read must be converted"
                )
            if known:
                found[entry.name] = images
            elif images:
                self.left_out.note(UNMAPPED, entry.name, len(images))
        if not found:
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

    def _images(self, folder: str, name: str, beyond: bool) -> Iterator[str]:
        """Images of the class `name` in a folder at any depth; `beyond` where that lies beyond a link."""
        for entry, inner in self._entries(folder, name, beyond):
            if inner is not None:
                yield from self._images(entry.path, name, inner)
            elif os.path.splitext(entry.name)[1].lower() in self._suffixes:
                yield entry.path
            else:
                self.left_out.note(FORMAT, self._below(entry))

    def _entries(
        self, folder: str, name: str = "", beyond: bool = False
    ) -> Iterator[tuple[os.DirEntry[str], bool | None]]:
        """What is not left out in a folder of the class `name`, with whether it lies beyond a link; None for files."""
        if beyond:
            self._followed[os.path.realpath(folder)] = name
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"data: {folder!r} cannot be read: {error.strerror}") from error
        for entry in entries:
            # a link to itself is an error for DirEntry.is_dir
            is_folder = entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))
            inner = beyond or entry.is_symlink() if is_folder else None
            if entry.name.startswith(".") or entry.name in LEFT_BEHIND:
                inside = os.walk(entry.path) if entry.is_dir(follow_symlinks=False) else [("", [], [entry.name])]
                if count := sum(len(files) for _, _, files in inside):
                    self.left_out.note(HIDDEN, self._below(entry), count)
            elif inner and self._read_anyway(entry.path, name or entry.name):
                self.left_out.note(LINK, self._below(entry))
            else:
                yield entry, inner

    def _read_anyway(self, path: str, name: str) -> bool:
        """Whether a folder beyond a link is in the split, around it, or read by another link of the class `name`.

        Raises `ConfigError` if it is read by a link of another class.
        """
        real = os.path.realpath(path)
        if os.path.commonpath([real, self._own]) in (real, self._own):
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
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in NOT_DECODED)


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

"""What a row has scored and been answered so far, on disk, so that a row that was ended goes on where it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from attnzoo.bench.jsonl import append_line, read_lines
from attnzoo.bench.record import SCHEMA_VERSION, Count, Entry
from attnzoo.errors import AttnZooError
from attnzoo.tasks.decode.lm import Answer, Scored

T = TypeVar("T", Scored, Answer)


class Line(Entry):
    """A window scored or a prompt answered; `role` is what for, such as the canary."""

    role: str
    number: Count
    made: Scored | Answer


class KeptSamples:
    """The windows and prompts of one row: each is on disk, whole, before the next begins.

    The file is named after all that the row's figures depend on. One that cannot be read is begun anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._made: dict[tuple[str, int], Any] = {}
        try:
            lines = read_lines(path, Line, SCHEMA_VERSION, mend=True)
        except FileNotFoundError:
            return
        except AttnZooError as error:
            warnings.warn(f"{error}; it is begun anew", stacklevel=2)
            path.unlink()
            return
        self._made = {(line.role, line.number): line.made for line in lines}

    def get(self, role: str, number: int, make: Callable[[], T]) -> T:
        """Give what an earlier run has made, or else make and keep it."""
        found: T | None = self._made.get((role, number))
        if found is None:
            found = make()
            append_line(self.path, Line(role=role, number=number, made=found))
        return found

    def remove(self) -> None:
        """Take the file away, where all is done."""
        self.path.unlink(missing_ok=True)

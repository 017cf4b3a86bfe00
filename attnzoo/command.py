"""How the scripts of train/ and eval/ end: one sentence and an exit status, never a traceback for what users can fix.

0: everything that was asked for is there. 1: the run broke off, something could not be written or read, or a row
that the config asks for did not end well. 2: refused before any work. 130: interrupted.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from attnzoo.errors import AttnZooError, RunError

if TYPE_CHECKING:
    from rich.console import Console

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
PIPED_WIDTH = 160  # columns of a table where there is no terminal to ask
RESUME = "finished work is kept; run the same command again to resume"

_OF_FILES = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "EISDIR", "ENAMETOOLONG", "ENOENT", "ENOSPC", "ENOTDIR", "EPERM",
        "EROFS",
    )
    if hasattr(errno, name)
)  # fmt: skip


class Ended(Protocol):
    """A row of a benchmark, as far as its end goes."""

    @property
    def label(self) -> str:
        """What tables call it."""

    @property
    def status(self) -> str:
        """``ok``, or what went wrong."""

    @property
    def message(self) -> str:
        """Why; empty if it is ok."""


Row = TypeVar("Row", bound=Ended)


def output_console() -> Console:
    """The console that tables are printed on: as wide as the terminal, or `PIPED_WIDTH` where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def run_script(body: Callable[[], int | None], resume: str = RESUME) -> int:
    """Do what a script does and give its exit status.

    Parameters
    ----------
    body
        Gives the exit status of what it did; None is success.
    resume
        What a user is told where the run broke off.
    """
    try:
        return body() or OK
    except RunError as error:
        print(f"error: {error}\n{resume}", file=sys.stderr)
        return FAILED
    except AttnZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"interrupted; {resume}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit would fail
        return FAILED
    except OSError as error:
        if error.errno not in _OF_FILES:
            raise
        where = f"{os.fspath(error.filename)!r}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror}; {resume}", file=sys.stderr)
        return FAILED


def check_rows(rows: Iterable[Row], unsupported: Callable[[Row], bool] = lambda row: False) -> int:
    """Say on stderr which rows did not end well, and give the exit status that follows.

    Parameters
    ----------
    rows
        All rows that the config asks for.
    unsupported
        Whether the config says ``expect: unsupported`` of a row.
    """
    rows = list(rows)
    bad = [row for row in rows if row.status != "ok" and not (row.status == "unsupported" and unsupported(row))]
    for label in sorted({row.label for row in rows if row.status == "ok" and unsupported(row)}):
        print(f"note: {label} is expected to be unsupported, and works; the config can say so", file=sys.stderr)
    if not bad:
        return OK
    print(f"error: {len(bad)} of {len(rows)} rows did not end well:", file=sys.stderr)
    for row in bad:
        why = f": {_reason(row.message)}" if row.message.strip() else ""
        print(f"  {_name(row)}: {row.status}{why}", file=sys.stderr)
    return FAILED


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split at a character where it stands in no brackets and no quotes: ``a=(1,2),b`` at commas is two."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == separator and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _reason(message: str) -> str:
    """The first line of a message, and what it announces; of a traceback the last, which says what was raised."""
    lines = message.strip().splitlines()
    if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", lines[-1]):
        return lines[-1]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _name(row: Ended) -> str:
    """The row's label, and what was measured of it where it says so."""
    kind, tokens = getattr(row, "kind", ""), getattr(row, "tokens", 0)
    phase = getattr(row, "phase", "")  # that of most rows is not said
    phase = "" if kind != "cost" or phase == "forward" else phase
    told = " ".join(filter(None, [kind and f"{kind} of", row.label, f"at {tokens:,} tokens" if tokens else ""]))
    return ", ".join(filter(None, [told, phase, getattr(row, "workload", "")]))

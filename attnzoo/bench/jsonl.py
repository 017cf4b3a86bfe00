"""Files of JSON lines: each line is written whole or not at all, and only one run writes into a folder."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from attnzoo.errors import AttnZooError

M = TypeVar("M", bound=BaseModel)


def append_line(path: Path, entry: BaseModel) -> None:
    """Put one entry on disk, whole, before returning."""
    with open(path, "ab") as handle:
        handle.write(entry.model_dump_json().encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def read_lines(path: Path, model: type[M], schema: int, mend: bool = False, stacklevel: int = 2) -> list[M]:
    """Read a file of entries; a last line that a killed writer left torn is dropped with a warning.

    Raises `OSError` if the file cannot be read; `AttnZooError` if a line is not an entry.

    With `mend` that line is also taken out of the file, and a last line that has no end is ended, so that more can be
    appended. `schema` is the number of the lines' schema, for messages; `stacklevel` is of the warning.
    """
    content, entries = path.read_bytes(), list[M]()
    *lines, last = content.split(b"\n")  # nothing follows the end of a last line that is whole
    for number, line in enumerate([*lines, last] if last else lines, 1):
        try:
            entries.append(model.model_validate_json(line))
        except ValidationError as error:
            if number > len(lines) and not is_json(line):
                torn = f"{path}: dropped a torn last line of {len(line)} bytes, left by a killed run"
                warnings.warn(torn, stacklevel=stacklevel + 1)
                if mend:
                    os.truncate(path, len(content) - len(line))
                return entries
            reason = error.errors()[0]
            where = ".".join(map(str, reason["loc"])) or "line"
            told = f"not a record of schema {schema}: {where}: {reason['msg']}"
            raise AttnZooError(f"{path}, line {number}: {told}") from error
    if mend and last:
        with open(path, "ab") as handle:
            handle.write(b"\n")
    return entries


def is_json(line: bytes) -> bool:
    """Whether these bytes are JSON: what a killed writer left torn is not."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

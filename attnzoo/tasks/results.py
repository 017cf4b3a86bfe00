"""Which task shows which records on the results page, and how files that do not name their task are known."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from attnzoo.bench.highlights import Source, of_records
from attnzoo.errors import AttnZooError
from attnzoo.tasks import read_records, task_of

COLUMNS = ("classify", "decode", "detect", "distill", "export", "operations")
LEFT_OUT = ("samples.*.jsonl", "records.old*.jsonl")  # of a run under way, and set aside


FORMATS = {  # files whose lines name no task, by keys that every line has, and what they hold that is no method's
    frozenset({"kernel", "case", "registers"}): "registers and memory of the compiled Triton kernels",
    frozenset({"degree", "rms", "largest"}): "how large PADRe's activations are at the start, by degree",
}
SHARED = frozenset({"benchmark", "kind", "attention"})  # of the engine's own records, which may name no task


def gather(folder: Path) -> list[Source]:
    """Read all files of records in a folder and the folders in it.

    Raises `AttnZooError` that names the file, if one is of no known kind, broken or cut off; or if there is none.
    """
    paths = sorted(folder.rglob("*.jsonl"))
    paths = [path for path in paths if not any(fnmatch(path.name, pattern) for pattern in LEFT_OUT)]
    if not paths:
        raise AttnZooError(f"there are no records (*.jsonl) in {str(folder)!r}")
    return [_source(path) for path in paths]


def _source(path: Path) -> Source:
    try:
        return _read(path)
    except AttnZooError as error:
        raise error if str(path) in str(error) else AttnZooError(f"{path}: {error}") from error


def _read(path: Path) -> Source:
    lines = _lines(path)
    first = lines[0].keys()
    known = next((keys for keys in FORMATS if keys <= first), None)
    if known is None and ("task" in first or first >= SHARED):
        task = task_of(path)
        records = read_records(path)
        found = of_records(records, lambda _: task.name) if task.highlights is None else task.highlights(records)
        return Source(path, tuple(found), task.others)
    if known is None:
        keys = ", ".join(first)
        raise AttnZooError(f"{path}: no known kind of records; the first line names no task and has the keys {keys}")
    for number, line in enumerate(lines, 1):
        if not known <= line.keys():
            raise AttnZooError(f"{path}, line {number}: it lacks {', '.join(sorted(known - line.keys()))}")
    return Source(path, (), FORMATS[known])


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AttnZooError(f"{path}: cannot be read: {error}") from error
    if not text:
        raise AttnZooError(f"{path}: it is empty")
    lines = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise AttnZooError(f"{path}, line {number}: not JSON; a last line may be cut off: {error}") from error
        if not isinstance(lines[-1], dict):
            raise AttnZooError(f"{path}, line {number}: not a record")
    return lines

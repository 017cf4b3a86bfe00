"""Tasks: what is measured, trained and evaluated. One lazy line per task, as a method has in the registry."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.errors import ConfigError

if TYPE_CHECKING:
    from attnzoo.bench.task import Task

TASKS = {
    "suite": "attnzoo.tasks.suite:TASK",
    "classify": "attnzoo.tasks.classify.task:TASK",
    "decode": "attnzoo.tasks.decode.task:TASK",
    "operations": "attnzoo.tasks.operations.task:TASK",
    "kvpress": "attnzoo.tasks.decode.kvpress.task:TASK",
    "train_bytes": "attnzoo.tasks.decode.byte_run:TASK",
}


def find(name: str) -> Task:
    """Give a task by its name here, or by the ``module:NAME`` of another package's.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    from attnzoo.bench.work import load

    if ":" not in name and name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        raise ConfigError(
            f"task: {name!r} is unknown; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(TASKS)}")
        )
    return load(TASKS.get(name, name))


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Task, Any]:
    """Read a config of any task, with ``key=value`` overrides; give the task that its key `task` names, and the config.

    Raises
    ------
    ConfigError
        If there is no such task, or with every problem of the config.
    """
    from attnzoo.bench.config import read_yaml

    if path.suffix == ".py":
        raise ConfigError(f"{path} is a config of mmengine's; run: python eval/detect.py {path}")
    task = find(str(read_yaml(path, overrides).get("task", "suite")))
    return task, task.config.load(path, overrides)


def task_of(records: Path) -> Task:
    """Give the task whose records a file holds."""
    try:
        with records.open(encoding="utf-8") as lines:
            first: Any = json.loads(next(lines, "{}"))
    except (OSError, ValueError):
        first = {}  # reading it in earnest will tell what is wrong
    return find(first.get("task") or "suite" if isinstance(first, dict) else "suite")


def read_records(path: Path) -> list[Any]:
    """Read a records file of any task; see `attnzoo.bench.record.read_records`.

    Raises
    ------
    AttnZooError
        If the file cannot be read, or is not of its task's records.
    """
    from attnzoo.bench.record import read_records

    return read_records(path, task_of(path).record)

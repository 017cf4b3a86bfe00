"""Tasks: what is measured, trained and evaluated. One lazy line per task, as a method has in the registry."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.errors import ConfigError
from attnzoo.imports import search_here

if TYPE_CHECKING:
    from attnzoo.bench.task import Task

TASKS = {
    "suite": "attnzoo.tasks.suite:TASK",
    "classify": "attnzoo.tasks.classify.task:TASK",
    "decode": "attnzoo.tasks.decode.task:TASK",
    "detect": "attnzoo.tasks.detect.task:TASK",
    "model": "attnzoo.tasks.model:TASK",
    "operations": "attnzoo.tasks.operations.task:TASK",
    "kvpress": "attnzoo.tasks.decode.kvpress.task:TASK",
    "export": "attnzoo.tasks.export:TASK",
    "distill": "attnzoo.tasks.distill.task:TASK",
    "train_bytes": "attnzoo.tasks.decode.byte_lm:TASK",
}


def find(name: str) -> Task:
    """Give a task by its name here, or by the ``module:NAME`` of another package's.

    Raises `ConfigError` if there is none of this name.
    """
    from attnzoo.bench.work import load

    if ":" not in name and name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        raise ConfigError(
            f"task: {name!r} is unknown; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(TASKS)}")
        )
    ref = TASKS.get(name, name)
    if ":" in name:
        search_here()
    task = load(ref)
    if (task.name, task.ref) != (name, ref):
        raise ConfigError(f"task: {ref} calls itself {task.name!r} at {task.ref!r}, which must be {name!r} and {ref!r}")
    return task


def load(path: Path, overrides: Sequence[str] = (), default: str = "suite") -> tuple[Task, Any]:
    """Read a config of any task, with ``key=value`` overrides; give the task that its key `task` names, and the config.

    `default` is the task of a config that names none. Python configs are mmengine's, of detectors; further ones to
    compare may stand among the overrides.

    Raises `ConfigError` if there is no such task, or with every problem of the config.
    """
    from attnzoo.bench.config import read_yaml

    if path.suffix == ".py":
        task = find("detect")
        return task, task.config.load(path, overrides)
    content = read_yaml(path, overrides)
    if "task" not in content and "operations" in content:
        raise ConfigError(f"{path}: a config of single operations; add the line task: operations")
    task = find(str(content.get("task", default)))
    return task, task.config.load(path, overrides)


def task_of(records: Path) -> Task:
    """Give the task whose records a file holds."""
    try:
        with records.open(encoding="utf-8") as lines:
            first: Any = json.loads(next(lines, "{}"))
    except (OSError, ValueError):
        first = {}  # reading it in earnest will tell what is wrong
    first = first if isinstance(first, dict) else {}
    if first and not {"task", "benchmark", "kind"} & first.keys():
        raise ConfigError(f"{records} is not of a benchmark: report it with the script of eval/ or train/ that made it")
    return find(first.get("task") or "suite")


def read_records(path: Path) -> list[Any]:
    """Read a records file of any task; see `attnzoo.bench.store.read_records`.

    Raises `AttnZooError` if the file cannot be read, or is not of its task's records.
    """
    from attnzoo.bench.store import read_records

    return read_records(path, task_of(path).record)

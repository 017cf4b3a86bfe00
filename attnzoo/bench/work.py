"""The work of one cell, in a process of its own or in this one: what can go wrong becomes a status."""

from __future__ import annotations

import importlib
import json
import traceback
from collections.abc import Mapping
from typing import Any

from attnzoo.bench.config import RunConfig, import_listed
from attnzoo.bench.gate import OracleError
from attnzoo.bench.isolate import LAST_WORDS, is_out_of_memory, set_threads
from attnzoo.bench.record import Entry
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.errors import (
    AttnZooError,
    ConfigError,
    MissingExtraError,
    OptionError,
    ShapeError,
    SwapError,
    UnsupportedError,
)


class Job(Entry):
    """What a process is given: the task, its config as JSON, the cell and what all cells share."""

    task: str
    config: str
    cell: Cell
    given: Mapping[str, Any]


def load(ref: str) -> Task:
    """Import a task by its ``module:NAME``.

    Raises `ConfigError` if there is no such module, or no task of this name in it.
    """
    module, _, name = ref.partition(":")
    if not module or not name or module.startswith("."):
        raise ConfigError(f"task: {ref!r} must be module:NAME")
    try:
        task = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"task: {ref!r} cannot be imported: {error}") from error
    if not isinstance(task, Task):
        raise ConfigError(f"task: {module} has no task {name!r}; give module:NAME of an attnzoo.bench.task.Task")
    return task


def work(job: str, say: OnProgress) -> str:
    """Do a `Job`; gives a `Result`. Both are JSON."""
    asked = Job.model_validate_json(job)
    task = load(asked.task)
    import_listed(json.loads(asked.config))
    config = task.config.model_validate_json(asked.config)
    return work_here(task, config, asked.cell, asked.given, say).model_dump_json()


def work_here(task: Task, config: RunConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Measure a cell; what cannot be measured is told by its status."""
    set_threads(cell.threads)
    try:
        return task.measure(config, cell, given, say)
    except (SwapError, UnsupportedError, OptionError, ShapeError, MissingExtraError) as error:  # the swap was refused
        return Result(status="unsupported", message=str(error))
    except (AttnZooError, OracleError) as error:
        return Result(status="failed", message=str(error))
    except Exception as error:  # a mistake of the task's, or of a library's: the other cells may still run
        if is_out_of_memory(error):
            return Result(status="oom", message=str(error) or type(error).__name__)
        return Result(status="failed", message=traceback.format_exc()[-LAST_WORDS:])

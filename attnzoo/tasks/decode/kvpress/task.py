"""The comparison with kvpress as a task: a process per row, each in the environment of its library."""

from __future__ import annotations

import sys

from attnzoo.bench.task import Task
from attnzoo.tasks.decode.kvpress.config import Comparison
from attnzoo.tasks.decode.kvpress.environment import kvpress_python
from attnzoo.tasks.decode.kvpress.run import run
from attnzoo.tasks.decode.kvpress.table import report


def say(text: str) -> None:
    """Tell a person how it goes; the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def compare(config: Comparison, command: str) -> int:
    """Run every policy that is not done yet, and print the table."""
    config.check_folder()
    print(report(run(config, kvpress_python(None, say), command, [], say)), end="")
    return 0


TASK = Task(name="kvpress", ref="attnzoo.tasks.decode.kvpress.task:TASK", config=Comparison, run=compare)

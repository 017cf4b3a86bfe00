"""What the scripts of train/ and eval/ share that run a config of a task."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.command import OK, check_rows, output_console, run_script
from attnzoo.errors import ConfigError

if TYPE_CHECKING:
    from attnzoo.bench.task import Task


def run_task(
    script: str, about: str | None, arguments: Sequence[str] | None = None, task: str = "suite", only: bool = False
) -> int:
    """Run a script's command line; give the exit status, as in `attnzoo.command`.

    `script` is its path, for the command in the records, `about` its docstring; `arguments` are those of the command
    line by default; `task` is of configs that name none, and of all where it is the `only` one.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config out of configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--report", type=Path, metavar="RECORDS", help="report from these records; measure nothing")
    parser.add_argument("--readme", type=Path, help="also rewrite the part of this file between the bench markers")
    parser.add_argument("--so-far", action="store_true", help="show what the run of CONFIG has done; measure nothing")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.config is None) == (parsed.report is None):
        parser.error("give either a config or --report RECORDS")
    if parsed.so_far and (parsed.report is not None or parsed.readme is not None):
        parser.error("--so-far goes with a config alone")

    def body() -> int:
        from attnzoo import tasks
        from attnzoo.bench.publish import publish

        if parsed.report is not None:
            shown, records = tasks.task_of(parsed.report), tasks.read_records(parsed.report)
            publish(shown, records, parsed.report, output_console(), parsed.readme)
            return OK
        found, config = tasks.load(parsed.config, parsed.overrides, task)
        if only and found.name != task:
            raise ConfigError(f"{parsed.config} is of the task {found.name!r}, and {script} is for {task!r} alone")
        if parsed.so_far:
            so_far(found, config)
            return OK
        lasting = [argument for argument in arguments if not argument.startswith("fresh=")]
        command = shlex.join(["python", script, *lasting])
        return measure(found, config, command, parsed.readme)

    return run_script(body)


def measure(task: Task, config: Any, command: str, readme: Path | None) -> int:
    """Measure what a config asks for, report, and give the exit status: 1 where a row did not end as expected."""
    from attnzoo import processes
    from attnzoo.bench.publish import check_readme, publish
    from attnzoo.bench.record import RECORDS_FILE
    from attnzoo.bench.run import run

    check_readme(task, readme)  # rather now than after an hour
    if task.assist(config):
        processes.leave()
        return OK
    records = run(task, config, command)
    publish(task, records, config.folder / RECORDS_FILE, output_console(), readme)
    processes.leave()
    unsupported = task.expected(config)
    return check_rows(records, lambda row: (row.part, row.label) in unsupported)


def so_far(task: Task, config: Any) -> None:
    """Show what a run of a config has done."""
    from attnzoo.bench.publish import publish
    from attnzoo.bench.record import RECORDS_FILE
    from attnzoo.bench.run import asked, difference
    from attnzoo.bench.store import read_records

    path = config.folder / RECORDS_FILE
    if not path.is_file():
        raise ConfigError(f"--so-far: there are no records in {config.folder} yet")
    records = read_records(path, task.record)
    own = asked(task, config, records)
    if len(own) < len(records):
        print(f"{len(records) - len(own)} rows of the folder are left out: this config does not ask for them")
    if not own:
        differs = difference(config)
        why = (
            f"{differs}; give the key=value of the run, too"
            if differs
            else ": a file or method that it names has changed"
        )
        raise ConfigError(f"--so-far: no row in {config.folder} is one that this config asks for{why}")
    publish(task, own, path, output_console())
    whole = sum(len(cell.keys) for cell in task.plan(config))
    print(f"{len(own)} of {whole} rows so far")

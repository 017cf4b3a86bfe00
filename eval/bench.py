"""Run the benchmark of a config, whatever its task, and report it.

python eval/bench.py configs/bench/quickstart.yaml [key=value ...]   measure; an interrupted run resumes
python eval/bench.py CONFIG [key=value ...] --so-far                 table and page of what a run under way has done
python eval/bench.py --report RECORDS.jsonl [--readme README.md]     report again from records, without measuring
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.command import output_console, run_script
from attnzoo.errors import ConfigError

if TYPE_CHECKING:
    from attnzoo.bench.record import Envelope
    from attnzoo.bench.task import Task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config, such as configs/bench/quickstart.yaml")
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

        if parsed.report is not None:
            report(tasks.task_of(parsed.report), parsed.report, parsed.readme)
            return 0
        if parsed.so_far:
            so_far(parsed.config, parsed.overrides)
            return 0
        lasting = [argument for argument in arguments if not argument.startswith("fresh=")]
        return measure(
            parsed.config, parsed.overrides, shlex.join(["python", "eval/bench.py", *lasting]), parsed.readme
        )

    return run_script(body)


def measure(path: Path, overrides: Sequence[str], command: str, readme: Path | None) -> int:
    """Measure what a config asks for, report, and give the exit status: 1 where a row did not end as expected."""
    from attnzoo import tasks
    from attnzoo.bench import publish

    task, config = tasks.load(path, overrides)
    if task.run is None:
        return publish.measure(task, config, command, readme)
    if readme is not None:
        raise ConfigError(f"--readme is for tables of attentions; {task.name} has its own")
    return task.run(config, command)


def so_far(path: Path, overrides: Sequence[str]) -> None:
    """Show what a run of a config has done."""
    from attnzoo import tasks
    from attnzoo.bench.record import RECORDS_FILE, read_records
    from attnzoo.bench.run import asked

    task, config = tasks.load(path, overrides)
    if task.so_far is not None:
        task.so_far(config)
    elif task.run is not None:
        raise ConfigError(f"--so-far: {task.name} shows how far it is while it runs, and has no table before its end")
    elif not (config.folder / RECORDS_FILE).is_file():
        raise ConfigError(f"--so-far: there are no records in {config.folder} yet")
    else:
        path = config.folder / RECORDS_FILE
        report(task, path, None, asked(task, config, read_records(path, task.record)))


def report(task: Task, path: Path, readme: Path | None, records: Sequence[Envelope] | None = None) -> None:
    """Print the table and write the page of records, by default of all in the file at `path`."""
    from attnzoo.bench.publish import publish
    from attnzoo.bench.record import read_records

    console = output_console()
    publish(task, read_records(path, task.record) if records is None else records, path, console, readme)


if __name__ == "__main__":
    sys.exit(main())

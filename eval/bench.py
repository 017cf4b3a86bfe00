"""Measure what attentions cost and how well they learn, and report it.

python eval/bench.py configs/bench/quickstart.yaml [key=value ...]   measure; a broken run goes on where it stopped
python eval/bench.py --report RECORDS.jsonl [--readme README.md]     report again from records, without measuring

A config that lists `operations` is one of single operations beside PyTorch's, as in configs/bench/gpu_kernels.yaml.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from attnzoo import files
from attnzoo.command import check_rows, run_script
from attnzoo.errors import ConfigError

PIPED_WIDTH = 160  # columns of the table where there is no terminal to ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config, such as configs/bench/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--report", type=Path, metavar="RECORDS", help="report from these records; measure nothing")
    parser.add_argument("--readme", type=Path, help="also rewrite the part of this file between the bench markers")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.config is None) == (parsed.report is None):
        parser.error("give either a config or --report RECORDS")

    def body() -> int:
        if parsed.report is not None:
            (report_operations if _of_operations(parsed.report) else report)(parsed.report, parsed.readme)
            return 0
        lasting = [argument for argument in arguments if not argument.startswith("fresh=")]
        again = shlex.join(["python", "eval/bench.py", *lasting])
        return measure(parsed.config, parsed.overrides, again, parsed.readme)

    return run_script(body)


def measure(config_path: Path, overrides: Sequence[str], command: str, readme: Path | None) -> int:
    """Measure what a config asks for, report, and give the exit status: 1 where a row did not end as expected."""
    from attnzoo.bench.config import load_config
    from attnzoo.bench.record import RECORDS_FILE
    from attnzoo.bench.report import read_marked
    from attnzoo.bench.run import run
    from attnzoo.bench.strict import read_yaml

    if "operations" in read_yaml(config_path, overrides):
        return measure_operations(config_path, overrides, command, readme)
    config = load_config(config_path, overrides)
    if readme is not None:
        read_marked(readme)  # rather now than after an hour
    records = run(config, command)
    report(config.folder / RECORDS_FILE, readme)
    unsupported = config.unsupported
    return check_rows(records, lambda row: (row.part, row.label) in unsupported)


def measure_operations(config_path: Path, overrides: Sequence[str], command: str, readme: Path | None) -> int:
    """Measure single operations, report, and give the exit status."""
    from attnzoo.tasks.operations.config import load_config
    from attnzoo.tasks.operations.record import read_records
    from attnzoo.tasks.operations.run import run

    config = load_config(config_path, overrides)
    _no_readme(readme)
    path = run(config, command)
    report_operations(path, None)
    return check_rows(read_records(path))


def report_operations(records_path: Path, readme: Path | None) -> None:
    """Print the table and write the page of a records file of operations."""
    from rich.console import Console

    from attnzoo.tasks.operations.record import read_records
    from attnzoo.tasks.operations.report import html_page, print_report

    _no_readme(readme)
    records = read_records(records_path)
    page = _write_page(records_path, lambda config: html_page(records, config))
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    print_report(records, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)


def _no_readme(readme: Path | None) -> None:
    if readme is not None:
        raise ConfigError("--readme is for benchmarks of attentions; one of operations has its own table")


def _of_operations(records_path: Path) -> bool:
    """Whether a records file is one of single operations."""
    import json

    try:
        with records_path.open(encoding="utf-8") as lines:
            return "rivals" in json.loads(next(lines, "{}"))
    except (OSError, ValueError):
        return False  # reading it in earnest will tell what is wrong


def _write_page(records_path: Path, html: Callable[[str | None], str]) -> Path:
    """Write ``report.html`` in a run's folder, else a page of the records' name beside them."""
    from attnzoo.bench.record import RECORDS_FILE

    config = records_path.with_suffix(".yaml")
    page = records_path.with_name("report.html" if records_path.name == RECORDS_FILE else f"{records_path.stem}.html")
    files.write(page, html(config.read_text(encoding="utf-8") if config.is_file() else None))
    return page


def report(records_path: Path, readme: Path | None) -> None:
    """Print the table and write the page of a records file."""
    from rich.console import Console

    from attnzoo.bench.page import html_page
    from attnzoo.bench.record import read_records
    from attnzoo.bench.report import print_report, read_marked, rewrite_readme

    if readme is not None:
        read_marked(readme)  # rather before the page is written
    records = read_records(records_path)
    page = _write_page(records_path, lambda config: html_page(records, config))
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    print_report(records, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    if readme is not None:
        rewrite_readme(readme, records)
        console.print(f"rewritten: {readme}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

"""Measure what cache eviction costs a language model in quality, and what it saves, and report it.

python eval/decode.py configs/decode/prose.yaml [key=value ...]    run; a broken run goes on where it stopped
accelerate launch eval/decode.py configs/decode/prose.yaml         the same, the samples split over GPUs
torchrun --standalone --nproc_per_node 2 eval/decode.py CONFIG     the same, split over 2 processes on CPUs
python eval/decode.py CONFIG --so-far                              table of what a run under way has done
python eval/decode.py --report RECORDS.jsonl                       report again from records, without running
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo import files, processes
from attnzoo.command import run_script

PIPED_WIDTH = 160  # columns of the table where there is no terminal to ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config, such as configs/decode/smoke.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--report", type=Path, metavar="RECORDS", help="report from these records; run nothing")
    parser.add_argument("--so-far", action="store_true", help="show what the run of CONFIG has done; run nothing")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.config is None) == (parsed.report is None):
        parser.error("give either a config or --report RECORDS")

    def body() -> None:
        if parsed.report is not None:
            report(parsed.report)
        elif parsed.so_far:
            show(parsed.config, parsed.overrides)
        else:
            lasting = [argument for argument in arguments if not argument.startswith("fresh=")]
            evaluate(parsed.config, parsed.overrides, shlex.join(["python", "eval/decode.py", *lasting]))
        processes.leave()

    return run_script(body)


def evaluate(config_path: Path, overrides: Sequence[str], command: str) -> None:
    """Run what a config asks for; then the main process reports."""
    from attnzoo.tasks.decode.config import load_config
    from attnzoo.tasks.decode.record import RECORDS_FILE
    from attnzoo.tasks.decode.run import run

    config = load_config(config_path, overrides)
    if run(config, command):
        report(config.folder / RECORDS_FILE)


def show(config_path: Path, overrides: Sequence[str]) -> None:
    """Print the table of the samples that a run has finished."""
    from rich.console import Console

    from attnzoo.tasks.decode.config import load_config
    from attnzoo.tasks.decode.report import print_report
    from attnzoo.tasks.decode.run import so_far

    records = so_far(load_config(config_path, overrides), "")
    print_report(records, Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))


def report(records_path: Path) -> None:
    """Print the table and write the page of a records file: ``report.html`` in a run's folder, else beside it."""
    from rich.console import Console

    from attnzoo.tasks.decode.page import html_page
    from attnzoo.tasks.decode.record import RECORDS_FILE, read_records
    from attnzoo.tasks.decode.report import print_report

    records = read_records(records_path)
    config = records_path.with_suffix(".yaml")
    page = records_path.with_name("report.html" if records_path.name == RECORDS_FILE else f"{records_path.stem}.html")
    files.write(page, html_page(records, config.read_text(encoding="utf-8") if config.is_file() else None))
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    print_report(records, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate what train/classify.py trained: accuracy, calibration, cost beside the dense model, the worst mistakes.

python eval/classify.py configs/classify/digits.yaml [key=value ...]             what was evaluated before is kept
accelerate launch eval/classify.py configs/classify/digits.yaml [key=value ...]  processes share the test images
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo import files, processes
from attnzoo.command import check_rows, run_script

PIPED_WIDTH = 160  # columns of the table where there is no terminal to ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML config, such as configs/classify/digits.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--batch", type=int, default=256, help="test images at a time (256)")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.batch < 1:
        parser.error("--batch must be at least 1")

    def body() -> int:
        command = shlex.join(["python", "eval/classify.py", *arguments])
        status = evaluate(parsed.config, parsed.overrides, parsed.batch, command)
        processes.leave()
        return status

    return run_script(body)


def evaluate(path: Path, overrides: Sequence[str], batch: int, command: str) -> int:
    """Score all runs, measure what they cost, report, and give the exit status."""
    from rich.console import Console

    from attnzoo.bench.page import html_page
    from attnzoo.bench.record import CONFIG_FILE, RECORDS_FILE, Record, read_records
    from attnzoo.bench.report import print_report
    from attnzoo.tasks.classify import report
    from attnzoo.tasks.classify.config import load_config
    from attnzoo.tasks.classify.score import FOLDER, qualities_of, record_all, score_all

    config = load_config(path, overrides)
    progress, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    scored, splits = score_all(config, batch, progress)
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return 0
    qualities = qualities_of(config, scored)
    folders = record_all(config, scored, splits.classes, command, progress)
    measured: list[Record] = []
    for folder in folders:
        records = read_records(folder / RECORDS_FILE)
        measured += records
        files.write(folder / "report.html", html_page(records, (folder / CONFIG_FILE).read_text(encoding="utf-8")))
        print_report(records, out)
    page = config.folder / FOLDER / "report.html"
    steps = report.step_costs(measured)
    files.write(page, report.html_page(scored, qualities, steps, splits, folders))
    out.print(report.results_table(qualities, steps).rich())
    out.print(report.how_to_read(qualities, steps), highlight=False)
    out.print(f"page: {page}", highlight=False, soft_wrap=True)
    unsupported = {one.label for one in config.attentions if one.expect == "unsupported"}
    return check_rows(measured, lambda row: row.label in unsupported)


if __name__ == "__main__":
    sys.exit(main())

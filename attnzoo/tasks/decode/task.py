"""Decoding with a bounded cache as a task: prose, needles and timings, the samples split over the processes."""

from __future__ import annotations

from pathlib import Path

from attnzoo import files, processes
from attnzoo.bench.publish import page_beside
from attnzoo.bench.task import Task
from attnzoo.command import output_console
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.page import html_page
from attnzoo.tasks.decode.record import RECORDS_FILE, read_records
from attnzoo.tasks.decode.report import print_report
from attnzoo.tasks.decode.run import run, so_far


def evaluate(config: DecodeConfig, command: str) -> int:
    """Run what a config asks for; then the main process reports."""
    if run(config, command):
        report(config.folder / RECORDS_FILE)
    processes.leave()
    return 0


def show(config: DecodeConfig) -> None:
    """Print the table of the samples that a run has finished."""
    print_report(so_far(config, ""), output_console())


def report(path: Path) -> None:
    """Print the table and write the page of a records file: ``report.html`` in a run's folder, else beside it."""
    records = read_records(path)
    config = path.with_suffix(".yaml")
    page = page_beside(path)
    files.write(page, html_page(records, config.read_text(encoding="utf-8") if config.is_file() else None))
    console = output_console()
    print_report(records, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)


TASK = Task(name="decode", ref="attnzoo.tasks.decode.task:TASK", config=DecodeConfig, run=evaluate, so_far=show)

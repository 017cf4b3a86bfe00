"""Classifiers as a task: train/classify.py trains them; this tests them and measures what they cost."""

from __future__ import annotations

from rich.console import Console

from attnzoo import files, processes
from attnzoo.bench.publish import page_of
from attnzoo.bench.record import RECORDS_FILE
from attnzoo.bench.report import print_report
from attnzoo.bench.run import asked
from attnzoo.bench.task import Task
from attnzoo.command import check_rows, output_console
from attnzoo.tasks import read_records, suite
from attnzoo.tasks.classify import report
from attnzoo.tasks.classify.config import ClassifyConfig
from attnzoo.tasks.classify.images import Splits
from attnzoo.tasks.classify.score import FOLDER, Scored, qualities_of, record_all, score_all
from attnzoo.tasks.records import Record

BATCH = 256  # test images at a time


def evaluate(config: ClassifyConfig, command: str, batch: int = BATCH) -> int:
    """Test all trained runs, measure what they cost, report, and give the exit status.

    Raises
    ------
    ConfigError
        If a run is not trained yet, or by another config or with other data.
    """
    console = Console(stderr=True)
    scored, splits = score_all(config, batch, console)
    from accelerate import PartialState

    status = _measured(config, scored, splits, command, console) if PartialState().is_main_process else 0
    processes.leave()
    return status


def _measured(config: ClassifyConfig, scored: list[Scored], splits: Splits, command: str, console: Console) -> int:
    """Measure costs and report, in the main process alone."""
    out = output_console()
    qualities = qualities_of(config, scored)
    benchmarks = record_all(config, scored, splits.classes, command, console)
    measured: list[Record] = []
    for benchmark in benchmarks:
        records = asked(suite.TASK, benchmark, read_records(benchmark.folder / RECORDS_FILE))
        measured += records
        files.write(benchmark.folder / "report.html", page_of(suite.TASK, records, benchmark.to_yaml()))
        print_report(records, out)
    page = config.folder / FOLDER / "report.html"
    steps = report.step_costs(measured)
    files.write(
        page, report.html_page(scored, qualities, steps, splits, [benchmark.folder for benchmark in benchmarks])
    )
    out.print(report.results_table(qualities, steps).rich())
    out.print(report.how_to_read(qualities, steps), highlight=False)
    out.print(f"page: {page}", highlight=False, soft_wrap=True)
    unsupported = {one.label for one in config.attentions if one.expect == "unsupported"}
    return check_rows(measured, lambda row: row.label in unsupported)


TASK = Task(name="classify", ref="attnzoo.tasks.classify.task:TASK", config=ClassifyConfig, run=evaluate)

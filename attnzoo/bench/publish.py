"""What a reader gets of any task's records: the table on the terminal, the page, and the README's part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from attnzoo import files
from attnzoo.bench.page import page_of, pairs_of
from attnzoo.bench.readme import read_marked, rewrite_readme
from attnzoo.bench.record import RECORDS_FILE, Envelope
from attnzoo.bench.report import print_report
from attnzoo.bench.task import Task
from attnzoo.errors import ConfigError


def publish(task: Task, records: Sequence[Envelope], path: Path, console: Console, readme: Path | None = None) -> Path:
    """Print the table on the console and write the page; give the page's path.

    The page of the file of records `path` is ``report.html`` in a run's folder, else of the file's name beside it. The
    part of `readme`, a Markdown file, between the markers is rewritten, too; see `check_readme`.
    """
    check_readme(task, readme)
    config, page = path.with_suffix(".yaml"), page_beside(path)
    told = config.read_text(encoding="utf-8") if config.is_file() else None
    files.write(page, page_of(task, records, told, path.parent))
    table = None if task.columns is None else task.columns(records)
    print_report(records, console, table, pairs_of(task, records, told))
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    if readme is not None:
        rewrite_readme(readme, records)
        console.print(f"rewritten: {readme}", highlight=False, soft_wrap=True)
    return page


def check_readme(task: Task, readme: Path | None) -> None:
    """Raise `AttnZooError` if a README cannot have a table of this task, or has no markers."""
    if readme is not None:
        if task.columns is not None:
            raise ConfigError(f"--readme is for tables of attentions; {task.name} has its own columns")
        read_marked(readme)


def page_beside(records: Path) -> Path:
    """Where the page of a file of records is: ``report.html`` in a run's folder, else of the file's name beside it."""
    return records.with_name("report.html" if records.name == RECORDS_FILE else f"{records.stem}.html")

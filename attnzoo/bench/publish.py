"""What a reader gets of any task's records: the table on the terminal, the page, and the README's part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from attnzoo import files
from attnzoo.bench.html import Section
from attnzoo.bench.page import html_page
from attnzoo.bench.readme import read_marked, rewrite_readme
from attnzoo.bench.record import RECORDS_FILE, Envelope
from attnzoo.bench.report import print_report
from attnzoo.bench.task import Task
from attnzoo.errors import ConfigError
from attnzoo.tables import Table

PAIRS_NOTE = (
    "The first row's figure minus the second's, window by window or prompt by prompt, with the 95% interval of the "
    "bootstrap over these. Green where the first is better and red where it is worse, only where the whole interval "
    "says so."
)


def publish(task: Task, records: Sequence[Envelope], path: Path, console: Console, readme: Path | None = None) -> Path:
    """Print the table and write the page; give the page's path.

    Parameters
    ----------
    task
        That measured the records.
    records, path
        The records and their file: the page is ``report.html`` in a run's folder, else of the file's name beside it.
    console
        Where the table goes.
    readme
        A Markdown file whose part between the markers is rewritten, too.

    Raises
    ------
    ConfigError
        If the README cannot have a table of this task.
    AttnZooError
        If there is no record, or the README has no markers.
    """
    if readme is not None:
        if task.columns is not None:
            raise ConfigError(f"--readme is for tables of attentions; one of {task.name} has its own columns")
        read_marked(readme)  # rather before the page is written
    beside = path.with_suffix(".yaml")
    config = beside.read_text(encoding="utf-8") if beside.is_file() else None
    content = page_of(task, records, config, path.parent)
    page = page_beside(path)
    files.write(page, content)
    print_report(records, console, _own_table(task, records), _pairs(task, records, config))
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    if readme is not None:
        rewrite_readme(readme, records)
        console.print(f"rewritten: {readme}", highlight=False, soft_wrap=True)
    return page


def page_beside(records: Path) -> Path:
    """Where the page of a file of records is: ``report.html`` in a run's folder, else of the file's name beside it."""
    return records.with_name("report.html" if records.name == RECORDS_FILE else f"{records.stem}.html")


def page_of(task: Task, records: Sequence[Envelope], config: str | None = None, folder: Path | None = None) -> str:
    """Give the page of a task's records, with what lies beside them in `folder`; `config`, as text, is its end."""
    attached = () if folder is None else task.attached(records, folder)
    pairs = _pairs(task, records, config)
    paired = None if pairs is None else Section(pairs.html(), "Pairs", PAIRS_NOTE)
    sections = [paired, *task.sections(records), *attached]
    more: dict[str, Any] = {"sections": sections, "drawn": task.plots(records)}
    table = _own_table(task, records)
    if table is not None:
        more |= {"table": table, "how_to_read": task.how_to_read, "found": task.verdict(records)}
    return html_page(records, config, **more)


def _pairs(task: Task, records: Sequence[Envelope], config: str | None) -> Table | None:
    """The rows that the config, as text, sets against each other."""
    content = yaml.safe_load(config) if config else None
    return task.pairs(records, content) if isinstance(content, dict) else None


def _own_table(task: Task, records: Sequence[Envelope]) -> Table | None:
    return None if task.columns is None else task.columns(records)

"""A table is described once, and says the same wherever it is shown."""

import csv
import io

import pytest
from rich.console import Console

from attnzoo.bench import html
from attnzoo.tables import Cell, Column, Table


@pytest.fixture
def table():
    found = Table((Column("attention", code=True), Column("ms", "p50"), Column("path", left=True), "cache"))
    found.section("vit & more", "ms per forward")
    found.add("dense", "1.0", "sdpa", "-", base=True)
    found.add("a|b", Cell("<2.0>", "worse", "3 images/s\nmore"), "", "")
    found.add("broken", Cell("oom", "worse", "no memory"))
    return found


def test_markdown_has_equal_columns_and_escapes_what_would_add_one(table):
    lines = table.markdown().splitlines()
    assert lines[0] == "| attention | ms | path | cache |"
    assert lines[1] == "| --- | ---: | --- | ---: |"
    assert lines[2] == "| **vit & more** |  |  |  |"
    assert lines[4] == "| `a\\|b` | <2.0> |  |  |"
    assert lines[5] == "| `broken` | oom |  |  |"


def test_columns_in_which_there_is_nothing_are_left_out(table):
    shown = table.without_empty_columns()
    assert [column.head for column in shown.columns] == ["attention", "ms", "path"]
    assert shown.markdown().splitlines()[-1] == "| `broken` | oom |  |"
    assert [c.head for c in Table(("a", "b"), [("x", Cell("-", small="why"))]).without_empty_columns().columns] == [
        "a",
        "b",
    ]
    assert len(Table(("a", "b")).without_empty_columns().columns) == 2


def test_a_page_shows_verdicts_and_small_lines_and_no_markup_of_its_content(table):
    page = table.html()
    assert '<span class="worse">&lt;2.0&gt;</span><br><small>3 images/s</small><br><small>more</small>' in page
    assert '<tr class="base"><td class="text">dense</td>' in page
    assert '<td colspan="4"><span>vit &amp; more <small>(ms per forward)</small></span>' in page
    assert '<td class="text" colspan="3"><span class="worse">oom</span><br><small>no memory</small></td>' in page


def test_a_terminal_and_csv_have_the_same_figures(table):
    console = Console(record=True, width=100)
    console.print(table.rich("title [x]"))
    text = console.export_text()
    for part in ("title [x]", "vit & more", "dense", "<2.0>", "oom"):
        assert part in text
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert rows[0] == ["section", "attention", "ms", "path", "cache"]
    assert rows[2] == ["vit & more", "a|b", "<2.0>", "", ""]


def test_a_row_that_does_not_fit_is_refused(table):
    with pytest.raises(ValueError, match="5 cells for 4 columns"):
        table.add(*"abcde")
    with pytest.raises(ValueError, match="0 cells"):
        table.add()


def test_cells_may_link_and_rows_have_what_filters_go_by():
    table = Table(("method", "speed-up"))
    table.section("a task", tags={"task": "a&b"})
    table.add("padre", Cell("2.00x", "better", link='page.html?"'), tags={"task": "a&b"})
    table.add("conv", "-")
    text = table.html(labeled=True)
    assert '<tr class="group" data-task="a&amp;b">' in text
    assert '<tr data-task="a&amp;b"><td class="text" data-head="method">padre</td>' in text
    assert '<td data-head="speed-up"><a href="page.html?&quot;"><span class="better">2.00x</span></a></td>' in text
    assert '<td data-head="speed-up" data-empty>-</td></tr>' in text
    assert "data-head" not in table.html()
    assert "page.html" not in table.markdown() + table.csv()


def test_lists_may_be_broken_on_a_page_and_figures_may_not():
    page = Table(("method", "top-1", "each seed"), [("padre", "49.8 (49.3-50.4)", "49.1, 49.9, 50.5")]).html()
    assert '<td>49.8 (49.3-50.4)</td><td class="list">49.1, 49.9, 50.5</td>' in page
    rule = next(line for line in html.page("nothing", []).splitlines() if "td.list" in line)
    assert "white-space: normal" in rule

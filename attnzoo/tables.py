"""Tables: described once, shown in a terminal, in Markdown, on a page and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Verdict = Literal["better", "worse", "same"]
STYLES: dict[Verdict, str] = {"better": "green", "worse": "red", "same": ""}
EMPTY = frozenset({"", "-"})


@dataclass(frozen=True)
class Cell:
    """What stands in one place.

    Attributes
    ----------
    text
        What is shown everywhere.
    verdict
        Against the dense baseline; it colors the text.
    small
        Further lines, on a page only.
    link
        Where the text leads, on a page only.
    """

    text: str
    verdict: Verdict = "same"
    small: str = ""
    link: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether it tells nothing."""
        return self.text in EMPTY and not self.small


@dataclass(frozen=True)
class Column:
    """A column's head; `small` is a second line of it, on a page only; `code` cells are set as code in Markdown."""

    head: str
    small: str = ""
    left: bool = False
    code: bool = False


@dataclass(frozen=True)
class Row:
    """A row; the last cell spans what is left where there are fewer than columns. `base` is the dense baseline's.

    `tags` are what the filters of a page go by.
    """

    cells: tuple[Cell, ...]
    base: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A line across the table, above the rows that it is about."""

    title: str
    small: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """Columns and rows; the first column is aligned left, others right unless they say so."""

    columns: tuple[Column, ...]
    rows: list[Row | Section] = field(default_factory=list)

    def __init__(self, heads: Iterable[Column | str], rows: Iterable[Sequence[Cell | str]] = ()) -> None:
        columns = [head if isinstance(head, Column) else Column(head) for head in heads]
        columns[0] = replace(columns[0], left=True)
        self.columns, self.rows = tuple(columns), []
        for row in rows:
            self.add(*row)

    def add(self, *cells: Cell | str, base: bool = False, tags: Mapping[str, str] | None = None) -> None:
        """Add a row.

        Raises
        ------
        ValueError
            If it has more cells than there are columns.
        """
        if not 0 < len(cells) <= len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        shown = tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
        self.rows.append(Row(shown, base, tags or {}))

    def section(self, title: str, small: str = "", tags: Mapping[str, str] | None = None) -> None:
        """Begin a section."""
        self.rows.append(Section(title, small, tags or {}))

    def without_empty_columns(self) -> Table:
        """The same without columns in which no row has anything; the first always stays."""
        whole = [row for row in self.rows if isinstance(row, Row) and len(row.cells) == len(self.columns)]
        used = [
            index
            for index in range(len(self.columns))
            if index == 0 or not whole or not all(row.cells[index].is_empty for row in whole)
        ]
        table = Table([self.columns[index] for index in used])
        for row in self.rows:
            if isinstance(row, Section):
                table.section(row.title, row.small, row.tags)
            elif len(row.cells) == len(self.columns):
                table.add(*(row.cells[index] for index in used), base=row.base, tags=row.tags)
            else:
                table.add(*row.cells[: len(used)], base=row.base, tags=row.tags)
        return table

    def markdown(self) -> str:
        """GitHub's Markdown; sections are bold lines."""
        heads = [column.head for column in self.columns]
        lines = [heads, ["---" if column.left else "---:" for column in self.columns]]
        for row in self.rows:
            cells = [f"**{row.title}**"] if isinstance(row, Section) else self._markdown_cells(row)
            lines.append(cells + [""] * (len(heads) - len(cells)))
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def _markdown_cells(self, row: Row) -> list[str]:
        pairs = zip(row.cells, self.columns, strict=False)
        return [f"`{cell.text}`" if column.code and cell.text else cell.text for cell, column in pairs]

    def rich(self, title: str | None = None) -> RichTable:
        """For `rich.console.Console.print`."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=title and escape(title), title_justify="left", title_style="bold")
        for column in self.columns:
            table.add_column(column.head, justify="left" if column.left else "right")
        for row in self.rows:
            if isinstance(row, Section):
                table.add_section()
                table.add_row(f"[bold]{escape(row.title)}[/bold]")
                continue
            styled = [(STYLES[cell.verdict], escape(cell.text)) for cell in row.cells]
            table.add_row(*(f"[{style}]{text}[/{style}]" if style else text for style, text in styled))
        return table

    def html(self, labeled: bool = False) -> str:
        """A ``table`` of a page, in a box that scrolls where the table is wider than the page.

        With `labeled`, each cell names its column in ``data-head``, for pages that show rows as cards on a phone.
        """
        head = "".join(f"<th{_left(column)}>{_lines(column.head, column.small)}</th>" for column in self.columns)
        body = "\n".join(self._html_row(row, labeled) for row in self.rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'

    def _html_row(self, row: Row | Section, labeled: bool) -> str:
        count = len(self.columns)
        if isinstance(row, Section):
            small = f" <small>({escape(row.small)})</small>" if row.small else ""
            opening = f'<tr class="group"{_tags(row)}>'
            return f'{opening}<td colspan="{count}"><span>{escape(row.title)}{small}</span></td></tr>'
        spanned = count - len(row.cells) + 1
        found = []
        for index, (cell, column) in enumerate(zip(row.cells, self.columns, strict=False)):
            text = _lines(cell.text, cell.small, cell.verdict, cell.link)
            if index == len(row.cells) - 1 and spanned > 1:
                found.append(f'<td class="text" colspan="{spanned}">{text}</td>')
            else:
                kind = _left(column) or (' class="list"' if ", " in cell.text else "")
                found.append(f"<td{kind}{_label(column, cell) if labeled else ''}>{text}</td>")
        base = ' class="base"' if row.base else ""
        return f"<tr{base}{_tags(row)}>{''.join(found)}</tr>"

    def csv(self) -> str:
        """Comma-separated values; the title of a row's section is the first column."""
        out = io.StringIO()
        writer, title = csv.writer(out, lineterminator="\n"), ""
        sections = any(isinstance(row, Section) for row in self.rows)
        writer.writerow([*(["section"] if sections else []), *(column.head for column in self.columns)])
        for row in self.rows:
            if isinstance(row, Section):
                title = row.title
            else:
                writer.writerow([*([title] if sections else []), *(cell.text for cell in row.cells)])
        return out.getvalue()


def _left(column: Column) -> str:
    return ' class="text"' if column.left else ""


def _label(column: Column, cell: Cell) -> str:
    return f' data-head="{escape(column.head)}"' + (" data-empty" if cell.is_empty else "")


def _tags(row: Row | Section) -> str:
    return "".join(f' data-{escape(name)}="{escape(value)}"' for name, value in row.tags.items())


def _lines(text: str, small: str, verdict: Verdict = "same", link: str = "") -> str:
    shown = escape(text) if verdict == "same" else f'<span class="{verdict}">{escape(text)}</span>'
    shown = f'<a href="{escape(link)}">{shown}</a>' if link else shown
    return shown + "".join(f"<br><small>{escape(line)}</small>" for line in small.splitlines())

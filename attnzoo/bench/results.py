"""The results page of the whole zoo, made from all files of records, and the same as CSV."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from attnzoo import files
from attnzoo.bench import words
from attnzoo.bench.highlights import CACHE, MEASURES, PEAK, QUALITY, SPEED, Figure, Highlight, Measure, Source
from attnzoo.bench.html import Section, fragment, page
from attnzoo.bench.words import one_line
from attnzoo.errors import AttnZooError
from attnzoo.registry import REQUIRED, AttentionInfo, Kind, describe, list_attentions
from attnzoo.tables import Cell, Column, Table

MOST_QUALITIES = 2  # columns of quality on the page; the CSV has all
NAME = "results"
BUILT_WITH = re.compile(r"\s*\([^()]*=[^()]*\)")
Shown = tuple[str, Measure]  # what a figure is called, and its measure
IN_SHORT = (
    "Ratios to the dense attention of the same model in the same run: quality kept above 1x is better, a speed-up "
    "above 1x is faster, memory below 1x is less. Each figure leads to the page of its record."
)
HOW_TO_READ = (
    "In brackets is the 95% interval of quality, and the 20th to 80th percentile of speed-ups; none of fewer than 5 "
    "windows or pairs of calls. Green is better than dense and red worse, only where the whole interval says so. Where "
    "dense is no better than chance, quality is told in points above dense's. Of operations, the speed-up is over "
    "PyTorch's fastest "
    "way to do the same work. Two figures of a column can be compared where what stands below them is the same. The "
    "first view shows whole models rather than a layer alone; of several workloads the largest at which at least half "
    "of the methods were measured; of several settings of a method that nearest to its defaults. All else is folded "
    "below each method."
)
CSV_HEADS = (
    "method", "kind", "task", "setting", "options (JSON)", "model", "workload", "tokens", "budget", "machine",
    "measured (UTC)", "status",
    *(head for m in MEASURES for head in (f"{m.name} ({m.unit})", *(f"{m.name}, {b}" for b in (m.low, m.high) if b))),
    "points of quality above dense",
    "record", "page",
)  # fmt: skip


def write(sources: Sequence[Source], tasks: Sequence[str], folder: Path, command: str) -> list[Path]:
    """Write ``results.html``, ``results.csv`` and ``policies.csv`` into a folder and give their paths.

    Raises `AttnZooError` if a record is of a method that the registry does not know; then nothing is written.

    Links are relative to `folder`. `tasks` are the columns, in order; tasks that only the highlights name follow them.
    `command` makes all again.
    """
    made = {
        folder / f"{NAME}.html": html(sources, tasks, folder, command),
        folder / f"{NAME}.csv": csv(sources, tasks, folder),
        folder / "policies.csv": policies_table(sources, folder).csv(),
    }
    for path, text in made.items():
        files.write(path, text)
    return list(made)


POLICIES = (
    "Each figure as a ratio to the dense cache of the same run, below it the figure itself, of keys found in percent. "
    "The budget is in entries per key/value head, or else a part of the tokens or bytes. In each group the policy that "
    "keeps most of the quality stands first. The cache is that after the text that was scored, else after the last new "
    "token. A column that is blank in a whole group was not measured in that run."
)


def html(sources: Sequence[Source], tasks: Sequence[str], folder: Path, command: str) -> str:
    """Give the page: a row per method and a column per task."""
    found = _methods(sources, folder)
    tasks = _columns(found, tasks)
    views = {task: _first_view([one for rows in found.values() for one in rows if one.task == task]) for task in tasks}
    methods = [_shown(describe(name), rows, views) for name, rows in found.items()]
    others, policies = _others(sources, folder), policies_table(sources, folder, MOST_QUALITIES)
    side_by_side = f'<div id="policies" class="more">{policies.html(labeled=True)}</div>'
    return page(
        "attnzoo: results",
        [
            Section("", note=IN_SHORT),
            Section("", "How to read it", HOW_TO_READ, folded=True),
            Section(fragment("results", tasks=tasks, methods=methods, csv=f"{NAME}.csv", policies=bool(policies.rows))),
            Section(side_by_side, "Policies at one budget", POLICIES) if policies.rows else None,
            Section(others.html(), "Other records") if others.rows else None,
        ],
        filters={"task": tasks, "kind": get_args(Kind)},
        verdict=_verdict(found, tasks),
        facts={"Records": f"{len(sources)} files", "Again": command},
    )


def csv(sources: Sequence[Source], tasks: Sequence[str], folder: Path) -> str:
    """Give the same as CSV: a line per workload, and one per method and task of which nothing was measured."""
    table, found = Table(CSV_HEADS), _methods(sources, folder)
    for name, rows in found.items():
        kind = describe(name).kind
        for task in _columns(found, tasks):
            these = [one for one in rows if one.task == task]
            if not these:
                line = {"method": name, "kind": kind, "task": task, "status": "not measured"}
                table.add(*(line.get(head, "") for head in CSV_HEADS))
            for one in these:
                options = json.dumps(dict(one.options), sort_keys=True)
                about = (name, kind, task, one.label, options, one.host, one.workload)
                sizes = (str(one.tokens or ""), str(one.budget or ""))
                figures = [text for measure in MEASURES for text in _numbers(measure, one.figures.get(measure))]
                kept = one.figures.get(QUALITY)
                points = "" if kept is None or not kept.points else f"{kept.value:.6g}"
                table.add(*about, *sizes, one.machine, one.utc, one.status, *figures, points, one.record, one.page)
    return table.csv()


def _numbers(measure: Measure, figure: Figure | None) -> list[str]:
    values = [None] * 3 if figure is None or figure.points else [figure.value, figure.low, figure.high]
    kept = values[: 1 + (measure.low is not None) + (measure.high is not None)]
    return ["" if value is None else f"{value:.6g}" for value in kept]


def _methods(sources: Sequence[Source], folder: Path) -> dict[str, list[Highlight]]:
    """Give what was measured of every method of the registry, in its order.

    What a file tells several times, as the same training beside several costs, counts once.
    """
    found: dict[str, list[Highlight]] = {name: [] for name in list_attentions()}
    for source in sources:
        seen = []
        for one, placed in zip(source.highlights, _placed(source, folder), strict=True):
            if one.method not in found:
                raise AttnZooError(
                    f"{source.path}: it measures {one.method!r}, which the registry does not know; install the package "
                    "that brings it, or leave the file out"
                )
            same = replace(one, utc="")
            if QUALITY in one.figures and same in seen:
                continue
            seen.append(same)
            found[one.method].append(placed)
    return found


def _placed(source: Source, folder: Path) -> list[Highlight]:
    """The highlights of a file with their links."""
    record, page = _link(source.path, folder), _link(source.page, folder)
    return [replace(one, record=record, page=page) for one in source.highlights]


def _columns(found: Mapping[str, Sequence[Highlight]], tasks: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*tasks, *(one.task for rows in found.values() for one in rows)]))


def _first_view(found: Sequence[Highlight]) -> dict[Shown, dict[str, Highlight]]:
    """Choose what is shown first: for each figure of one task, the highlight of each method. See `HOW_TO_READ`."""
    kinds = dict.fromkeys(kind for one in found for kind in _kinds(one))
    views = {kind: _chosen([one for one in found if kind in _kinds(one)], kind[1]) for kind in kinds}
    return dict(sorted(views.items(), key=lambda view: (MEASURES.index(view[0][1]), -len(view[1]))))


def _kinds(one: Highlight) -> list[Shown]:
    """What the figures of a highlight are called: several kinds of quality do not stand for each other."""
    return [(one.kept if measure is QUALITY else measure.name, measure) for measure in one.figures]


def _chosen(found: Sequence[Highlight], measure: Measure) -> dict[str, Highlight]:
    places: dict[tuple[str | float | None, ...], list[Highlight]] = {}
    for one in found:
        places.setdefault((one.record, one.host, one.workload, one.tokens, one.budget), []).append(one)
    methods = {one.method for one in found}

    def worth(rows: Sequence[Highlight]) -> tuple[bool, bool, int, bool, int, float]:
        """Of a workload: the more, the rather it is shown."""
        one = rows[0]
        broad = 2 * len({row.method for row in rows}) >= len(methods)
        usual = one.phase not in ("training", "prefill")
        entries = one.budget if isinstance(one.budget, int) else 0
        return one.typical, broad, one.tokens, usual, entries, _precision(rows, measure)

    chosen: dict[str, Highlight] = {}
    for rows in sorted(places.values(), key=worth, reverse=True):
        for row in sorted(rows, key=_unusual):
            chosen.setdefault(row.method, row)
    return chosen


def _precision(rows: Sequence[Highlight], measure: Measure) -> float:
    """How narrow the intervals of a quality are; of costs nobody asks."""
    if measure is not QUALITY:
        return 0.0
    bounds = [(one.figures[measure].low, one.figures[measure].high) for one in rows]
    widths = [high - low for low, high in bounds if low is not None and high is not None]
    return -sum(widths) / len(widths) if widths else float("-inf")


def _unusual(one: Highlight) -> int:
    """How many options differ from the method's defaults."""
    defaults = describe(one.method).options
    return sum(defaults.get(name, value) not in (value, REQUIRED) for name, value in one.options.items())


def _shown(
    info: AttentionInfo, rows: Sequence[Highlight], views: Mapping[str, Mapping[Shown, Mapping[str, Highlight]]]
) -> dict[str, Any]:
    """What the template needs of a method."""
    by_task = {task: [one for one in rows if one.task == task] for task in views}
    return {
        "name": info.name,
        "kind": info.kind,
        "summary": info.summary,
        "cells": {task: _cell(info.name, these, views[task]) for task, these in by_task.items() if these},
        "count": len(rows),
        "table": _table(by_task).html(labeled=True) if rows else "",
    }


def _cell(name: str, rows: Sequence[Highlight], view: Mapping[Shown, Mapping[str, Highlight]]) -> dict[str, Any]:
    """The figures of a method in a task, those of one workload together; then what only other methods have."""
    groups: list[tuple[Highlight, dict[str, Cell]]] = []
    for (head, measure), chosen in view.items():
        if name in chosen:
            one = chosen[name]
            lines = next((lines for other, lines in groups if other is one), None)
            if lines is None:
                groups.append((one, lines := {}))
            lines[head] = _figure_cell(one, measure)
    if not groups:
        groups.append((rows[0], {"": _ended(rows[0])}))
    has = {measure for (_, measure), chosen in view.items() if name in chosen}
    missing = {measure.name: _without(measure, rows) for _, measure in view if measure not in has}
    return {"shown": [{"figures": lines, "about": _about(one, name)} for one, lines in groups], "missing": missing}


def _without(measure: Measure, rows: Sequence[Highlight]) -> Cell:
    """In the place of a figure that a method has not: how the row that should have given it ended, if there is one."""
    for one in rows:
        gives = measure is CACHE or (one.phase is None) == (measure is QUALITY)  # a cache's size is told by both kinds
        if gives and one.status != "ok":
            return _ended(one)
    return Cell("not measured")


def _about(one: Highlight, name: str) -> str:
    """What a figure is of, without how its model was built."""
    label = "" if one.label == name else f"{one.label}; "
    budget = f", budget {_budget(one)}" if one.budget else ""
    return f"{label}{one.host}: {BUILT_WITH.sub('', one.workload)}{budget}; {one.machine}"


def _table(by_task: Mapping[str, Sequence[Highlight]]) -> Table:
    """All that was measured of a method, in sections by task."""
    heads = [Column(m.name, f"{m.low} to {m.high}" if m.low else "") for m in MEASURES]
    table = Table(("setting", "budget", *heads, Column("workload", left=True)))
    for task, rows in by_task.items():
        if rows:
            table.section(task, tags={"task": task})
        for one in rows:
            figures = [_figure_cell(one, measure) for measure in MEASURES]
            if not one.figures:
                figures[0] = _ended(one)
            about = [one.workload, ", ".join(filter(None, (one.machine, one.utc[:10]))), one_line(one.message)]
            workload = Cell(one.host, small="\n".join(filter(None, about)))
            table.add(one.label, _budget(one), *figures, workload, tags={"task": task})
    return table.without_empty_columns()


def policies_table(sources: Sequence[Source], folder: Path, qualities: int | None = None) -> Table:
    """Eviction policies side by side: a section per run, model and budget, a column per figure that any of them has.

    Of the columns of quality there are at most as many as `qualities`, those that most rows have.
    """
    groups: dict[tuple[str, str, str], list[Highlight]] = {}
    for one in (one for source in sources for one in _placed(source, folder)):
        if one.budget and describe(one.method).kind == "eviction":
            groups.setdefault((one.record, one.host, _budget(one)), []).append(one)
    found = [one for rows in groups.values() for one in rows]
    heads = {_head(one, m): m for m in (CACHE, QUALITY, SPEED, PEAK) for one in found if m in one.figures}
    counts = Counter(_head(one, QUALITY) for one in found if QUALITY in one.figures)
    shown = {head for head, _ in counts.most_common(qualities)}
    heads = {head: measure for head, measure in heads.items() if measure is not QUALITY or head in shown}
    table = Table(("policy", "budget", *heads, Column("record", left=True)))
    for (record, host, budget), rows in groups.items():
        tags = {"task": rows[0].task, "kind": "eviction"}
        about = dict.fromkeys([*(one.workload for one in rows), *(one.machine for one in rows)])
        entries = " entries per head" if isinstance(rows[0].budget, int) else ""
        table.section(f"{host}, budget {budget}{entries}", "; ".join(about), tags)
        policies: dict[str, list[Highlight]] = {}
        for one in rows:
            policies.setdefault(one.label, []).append(one)
        measured = {_head(one, measure) for one in rows for measure in one.figures}
        for label, own in sorted(policies.items(), key=_most_kept, reverse=True):
            cells = [_policy_cell(own, head, measure) if head in measured else "" for head, measure in heads.items()]
            source = Cell(record.removesuffix(".jsonl"), link=own[0].page)
            table.add(label, budget, *cells, source, tags=tags)
    return table


def _head(one: Highlight, measure: Measure) -> str:
    """What a figure is called beside those of other policies: speed-ups by phase."""
    if measure is QUALITY:
        return one.kept
    return f"{measure.name}, {one.phase}" if measure is SPEED else measure.name


def _most_kept(policy: tuple[str, Sequence[Highlight]]) -> float:
    return next((one.figures[QUALITY].value for one in policy[1] if QUALITY in one.figures), 0.0)


def _policy_cell(rows: Sequence[Highlight], head: str, measure: Measure) -> Cell:
    """A figure with what it is in absolute terms; of several batches the others below it; or why there is none."""
    found = [one for one in rows if measure in one.figures and _head(one, measure) == head]
    if not found:
        ended = [one for one in rows if one.status != "ok" and (one.phase is None) == (measure is QUALITY)]
        if not ended:
            return Cell("-", small="not measured")
        return replace(_ended(ended[0]), small=one_line(ended[0].message), link="")
    one, *others = found
    below = [f"{other.figures[measure].text} {_apart(other, one)}" for other in others if measure is SPEED]
    small = "\n".join(filter(None, [one.figures[measure].absolute, *below]))
    return replace(_figure_cell(one, measure), small=small)


def _budget(one: Highlight) -> str:
    return "" if one.budget is None else words.budget(one.budget)


def _apart(one: Highlight, other: Highlight) -> str:
    """What the workload of one says that the other's does not: ``batch 8``."""
    return ", ".join(word for word in one.workload.split(", ") if word not in other.workload.split(", "))


def _figure_cell(one: Highlight, measure: Measure) -> Cell:
    figure = one.figures.get(measure)
    return Cell("-") if figure is None else Cell(figure.text, figure.verdict, link=one.page)


def _ended(one: Highlight) -> Cell:
    """In the place of figures: how the row ended, or that there is nothing to set it against."""
    if one.status == "ok":
        return Cell("no ratio to dense", link=one.page)
    return Cell(one.status, "worse", link=one.page)


def _others(sources: Sequence[Source], folder: Path) -> Table:
    table = Table((Column("file"), Column("what it holds", left=True)))
    for source in sources:
        if source.others:
            table.add(Cell(_link(source.path, folder), link=_link(source.page, folder)), source.others)
    return table


def _verdict(found: Mapping[str, Sequence[Highlight]], tasks: Sequence[str]) -> str:
    """How much was measured of what."""
    counts = [(task, sum(any(one.task == task for one in rows) for rows in found.values())) for task in tasks]
    told = ", ".join(f"{count} {'were measured ' if i == 0 else ''}in {task}" for i, (task, count) in enumerate(counts))
    without = [name for name, rows in found.items() if not rows]
    never = f" Not measured in any: {', '.join(without)}." if without else ""
    return f"{len(found)} methods, each against dense attention: {told}.{never}"


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()

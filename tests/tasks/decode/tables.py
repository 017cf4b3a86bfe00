"""The tables of eviction policies that the docs show, made from their records."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnzoo.bench.record import Record
from attnzoo.bench.words import difference
from attnzoo.tables import Cell, Column, Table


def settings_of(records: Sequence[Record]) -> list[str]:
    """The settings of a grid that were measured for all policies, by the end of the labels: ``128 block``."""
    rows = [record.label.rsplit(" ", 2) for record in records if not record.is_baseline]
    found = dict.fromkeys(" ".join(setting) for _, *setting in rows)
    names = {name for name, *_ in rows}
    return [setting for setting in found if names == {name for name, *of in rows if " ".join(of) == setting}]


def lost_table(records: Sequence[Record]) -> Table:
    """NLL above dense of each policy in each setting, the least in the first setting first."""
    quality: Mapping[str, Any] = {record.label: record.quality for record in records if not record.is_baseline}
    settings = settings_of(records)
    names = dict.fromkeys(label.rsplit(" ", 2)[0] for label in quality)
    table = Table((Column("policy", code=True), *settings))
    for name in sorted(names, key=lambda name: quality[f"{name} {settings[0]}"].nll):
        table.add(name, *(difference(quality[f"{name} {setting}"].difference) for setting in settings))
    return table


def pairs_by_setting(records: Sequence[Record], pairs: Sequence[Sequence[str]]) -> Table:
    """NLL of one policy minus that of another on the same windows, in each setting; of pairs that were measured."""
    quality: Mapping[str, Any] = {record.label: record.quality for record in records if not record.is_baseline}
    settings = settings_of(records)
    table = Table((Column("pair", code=True), *(f"{setting} (95%)" for setting in settings)))
    for first, second in pairs:
        if not {f"{first} {settings[0]}", f"{second} {settings[0]}"} <= quality.keys():
            continue
        cells = []
        for setting in settings:
            interval, verdict = quality[f"{first} {setting}"].minus(quality[f"{second} {setting}"])["NLL"]
            cells.append(Cell(difference(interval), verdict))
        table.add(f"{first} - {second}", *cells)
    return table

"""The tables of eviction policies that the docs show, made from their records."""

import math
from collections.abc import Sequence
from typing import Any

from attnzoo.bench.record import Record
from attnzoo.bench.words import difference, ratio, times
from attnzoo.tables import Cell, Column, Table
from attnzoo.tasks.decode.quality import KIND_TITLES, Perplexity, Retrieval

MILD = ("128 block", "256 block", "128 prompt", "256 prompt")
ENDS = ("64 block", "512 block", "64 prompt")
# the name of a table in docs/eviction.md: its record, its config, and the settings that it shows
TABLES = {
    "claims": ("claims", "claims", MILD),
    "claims-ends": ("claims", "claims", ENDS),
    "claims-reference": ("claims_reference", "claims", MILD),
    "claims-reference-ends": ("claims_reference", "claims", ENDS),
    "budgets": ("budgets", "budgets", MILD),
    "budgets-ends": ("budgets", "budgets", ENDS),
    "budgets-reference": ("budgets_reference", "budgets", MILD),
    "budgets-reference-ends": ("budgets_reference", "budgets", ENDS),
}


def measured(records: Sequence[Record], settings: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Give qualities by label, and the names of the rows and the `settings` that the records have, as they come.

    A row's label is its name and its setting, such as ``caote 128 block``. Left out is a setting that a row lacks.
    """
    quality: dict[str, Any] = {record.label: record.quality for record in records if not record.is_baseline}
    rows = [label.rsplit(" ", 2) for label in quality]
    names = list(dict.fromkeys(name for name, *setting in rows if " ".join(setting) in settings))
    return quality, names, [one for one in settings if names and all(f"{name} {one}" in quality for name in names)]


def lost_table(records: Sequence[Record], settings: Sequence[str]) -> Table:
    """NLL above dense of each policy in each setting, the least in the first setting first."""
    quality, names, settings = measured(records, settings)
    budgets: dict[str, str] = {}  # the first setting of each
    for setting in settings:
        budgets.setdefault(setting.split()[0], setting)
    held = f"cache held at {' and '.join(budgets)}"
    table = Table((Column("policy", code=True), *settings, held))
    for name in sorted(names, key=lambda name: quality[f"{name} {settings[0]}"].nll):
        rows = [quality[f"{name} {setting}"] for setting in settings]
        bytes_held = [quality[f"{name} {setting}"] for setting in budgets.values()]
        shares = (f"{one.cache.held / one.cache_dense.held:.2f}x" for one in bytes_held)
        table.add(name, *(difference(one.difference) for one in rows), ", ".join(shares))
    return table


def cost_table(records: Sequence[Record]) -> Table:
    """What each policy costs and saves, as ratios to dense, the fastest in decoding first after dense itself."""
    costs: dict[str, dict[str, Any]] = {}
    for record in records:
        costs.setdefault(record.attention or record.label, {})[record.phase] = record.cost
    dense = next(record.label for record in records if record.is_baseline)
    names = sorted(costs, key=lambda name: (name != dense, -costs[name]["decode"].ratios.speedup.p50))
    table = Table((Column("policy", code=True), "TTFT", "TPOT", "peak memory of the prefill", "cache held"))
    for name in names:
        prefill, decode = (costs[name][phase].ratios for phase in ("prefill", "decode"))
        peak = ratio(prefill.activation_peak)
        table.add(name, times(prefill.speedup), times(decode.speedup), peak, ratio(decode.cache_held))
    return table


def pairs_by_setting(records: Sequence[Record], settings: Sequence[str], pairs: Sequence[Sequence[str]]) -> Table:
    """NLL of one policy minus that of another on the same windows, in each setting; of pairs that were measured."""
    quality, names, settings = measured(records, settings)
    table = Table((Column("pair", code=True), *(f"{setting} (95%)" for setting in settings)))
    for first, second in pairs:
        if not {first, second} <= set(names):
            continue
        cells = []
        for setting in settings:
            interval, verdict = quality[f"{first} {setting}"].minus(quality[f"{second} {setting}"])["NLL"]
            cells.append(Cell(difference(interval), verdict))
        table.add(f"{first} - {second}", *cells)
    return table


def survival_table(records: Sequence[Record]) -> Table:
    """What each policy loses on prose, and of each kind of needles what was found and what share of them was held."""
    prose = {record.label: record.quality for record in records if isinstance(record.quality, Perplexity)}
    needles = [(record.label, record.quality) for record in records if isinstance(record.quality, Retrieval)]
    asked = {(label, quality.kind): quality for label, quality in needles}
    kinds = [kind for kind in KIND_TITLES if all((label, kind) in asked for label in prose)]
    table = Table((Column("policy", code=True), "NLL above dense", *(KIND_TITLES[kind] for kind in kinds)))
    for label, quality in prose.items():
        cells = []
        for kind in kinds:
            one = asked[label, kind]
            held = f" (held {math.fsum(one.held) / len(one.held):.0%})" if one.held and quality.difference else ""
            cells.append(f"{sum(one.hits)} of {len(one.hits)}{held}")
        table.add(label, "-" if quality.difference is None else difference(quality.difference), *cells)
    return table

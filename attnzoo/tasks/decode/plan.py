"""What is run on what: the rows, the samples, and the order, in which all rows of a sample come before the next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import attnzoo
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.errors import ConfigError
from attnzoo.tasks.decode import needles
from attnzoo.tasks.decode.config import DENSE, DecodeConfig
from attnzoo.tasks.decode.needles import Sample
from attnzoo.tasks.decode.record import Key, Task
from attnzoo.tasks.decode.text import Text, Window, windows


@dataclass(frozen=True)
class Row:
    """A model to measure: `attention` None is the dense one."""

    label: str
    attention: AttentionConfig | None = None


@dataclass(frozen=True)
class Unit:
    """One sample and the rows that are still to be run on it, by one process, dense first."""

    task: Task
    kind: str
    sample: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Samples:
    """All inputs of a run; `prompts` are for timing, one per row of the largest batch."""

    windows: tuple[Window, ...]
    retrieval: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    prompts: tuple[Window, ...] = ()


def rows(config: DecodeConfig) -> list[Row]:
    """The rows of the table: dense, then every attention."""
    return [Row(DENSE), *(Row(attention.label, attention) for attention in config.attentions)]


def canary_rows(config: DecodeConfig) -> list[Row]:
    """The rows of the canary: dense, one with too small a budget, and every method with more than it can use."""
    full: dict[str, Row] = {}
    for attention in config.attentions:
        row = _unbounded(attention, config.nll.tokens)
        full.setdefault(row.label, row)
    return [Row(DENSE), Row(config.canary.tiny.label, config.canary.tiny), *full.values()]


def canary_units(config: DecodeConfig) -> list[Unit]:
    """The canaries' work."""
    return [Unit("canary", "", index, tuple(canary_rows(config))) for index in range(config.canary.windows)]


def quality_units(config: DecodeConfig) -> list[Unit]:
    """The work on windows and prompts; kinds of prompts take turns, so that a run cut short has some of each."""
    everyone = tuple(rows(config))
    units = [Unit("nll", "", index, everyone) for index in range(config.nll.windows)]
    counts = config.retrieval.counts if config.retrieval is not None else []
    for index in range(max((count for _, count in counts), default=0)):
        units += [Unit("retrieval", kind, index, everyone) for kind, count in counts if index < count]
    return units


def cost_units(config: DecodeConfig) -> list[Unit]:
    """The timings, one unit a row: one process makes them while no other works."""
    return [Unit("cost", "", 0, (row,)) for row in rows(config)] if config.cost is not None else []


def remaining(units: Iterable[Unit], done: Collection[Key]) -> list[Unit]:
    """What is left of `units`."""
    left = []
    for unit in units:
        todo = tuple(row for row in unit.rows if (unit.task, unit.kind, unit.sample, row.label) not in done)
        if todo:
            left.append(Unit(unit.task, unit.kind, unit.sample, todo))
    return left


def make_samples(config: DecodeConfig, text: Text, tokenizer: Any) -> Samples:
    """Cut windows and hide needles.

    Raises
    ------
    ConfigError
        With every reason why the text does not do.
    """
    problems: list[str] = []
    scored: tuple[Window, ...] = ()
    prompts: tuple[Window, ...] = ()
    retrieval: dict[str, tuple[Sample, ...]] = {}
    nll, cost, wanted, seed = config.nll, config.cost, config.retrieval, config.seed
    try:
        scored = tuple(windows(text, tokenizer, count=nll.windows, tokens=nll.tokens, seed=seed))
    except ConfigError as error:
        problems.append(f"nll: {error}")
    try:
        if cost is not None:
            count = cost.batches[0]
            prompts = tuple(windows(text, tokenizer, count=count, tokens=cost.prompt_tokens, seed=seed))
    except ConfigError as error:
        problems.append(f"cost: {error}")
    try:
        for kind, count in wanted.counts if wanted is not None else ():
            made = needles.make_samples(
                text, tokenizer, kind=kind, count=count, tokens=wanted.tokens if wanted else 0, seed=seed
            )
            retrieval[kind] = tuple(made)
    except ConfigError as error:
        problems.append(f"retrieval: {error}")
    if problems:
        raise ConfigError("\n".join(["this config cannot be run on this text:", *(f"  {p}" for p in problems)]))
    return Samples(scored, retrieval, prompts)


def _unbounded(attention: AttentionConfig, tokens: int) -> Row:
    """Give the same method with a budget that a text of `tokens` tokens does not fill; a core stays as it is."""
    options = dict(attention.options)
    if attnzoo.describe(attention.name).kind == "eviction":
        options["budget"] = tokens
    where = [] if attention.where is None else [f"in {attention.where}"]
    label = " ".join([attention.name, *(f"{key}={options[key]}" for key in sorted(options)), *where])
    return Row(label, AttentionConfig(name=attention.name, options=options, where=attention.where, label=label))

"""What all reports share: records put in order, figures put in words, and better told from worse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from attnzoo.bench import words
from attnzoo.bench.record import MIN_SAMPLES, Cost, Phase, Quality, Quantiles, Record
from attnzoo.bench.words import noise, points, quality_kept, quality_verdict, speed_verdict, times
from attnzoo.errors import AttnZooError

PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Group:
    """Rows of cost that were measured alike: of one part, phase, token count and workload, the dense baseline first."""

    part: str
    phase: Phase
    tokens: int
    workload: str
    rows: list[Record]

    @property
    def host(self) -> str:
        """The host's name, without its library's."""
        return self.rows[0].host.partition(":")[2]

    @property
    def items(self) -> str:
        """What gets done in a second; of a model that may take anything, just items."""
        if self.phase in ("prefill", "decode"):
            return "tokens"
        return "images" if any(row.shapes is not None for row in self.rows) else "items"

    @property
    def title(self) -> str:
        """What was timed, in words."""
        done = {"forward": "forward, ", "training": "forward and backward, ", "prefill": "prefill, "}
        return f"{done.get(self.phase, 'decode, after ')}{self.size}"

    @property
    def size(self) -> str:
        """Tokens and workload, in words."""
        return ", ".join(filter(None, [f"{self.tokens:,} tokens" if self.tokens else "", self.workload]))


@dataclass(frozen=True)
class Summary:
    """The records of one benchmark, in the order of first appearance.

    `groups` are rows of cost by part, then by token count, ascending, then by workload and phase: prefill before
    decoding. `quality` are rows of quality, one per attention, part and workload. `labels` are the attentions of each
    part, the dense baseline first.
    """

    groups: tuple[Group, ...]
    quality: list[Record]
    labels: dict[str, tuple[str, ...]]

    @property
    def last(self) -> Record:
        """The record that was measured last, for the config and the command of a run that was added to."""
        return max(self.records, key=lambda record: record.utc)

    @property
    def records(self) -> list[Record]:
        """All records."""
        return [row for group in self.groups for row in group.rows] + self.quality

    @property
    def parts(self) -> list[str]:
        """Parts that have rows of cost."""
        return list(dict.fromkeys(group.part for group in self.groups))

    @property
    def scored(self) -> list[str]:
        """Parts that have rows of quality."""
        return list(dict.fromkeys(row.part for row in self.quality))

    def of(self, part: str) -> list[Group]:
        """The groups of a part."""
        return [group for group in self.groups if group.part == part]

    def drawn(self, part: str) -> list[Group]:
        """The groups of a part that plots show: of each token count those of its first workload."""
        groups, first = self.of(part), dict[int, str]()
        return [group for group in groups if first.setdefault(group.tokens, group.workload) == group.workload]

    def quality_of(self, part: str, label: str) -> Quality | None:
        """The quality of an attention, that without a workload."""
        found = (r for r in self.quality if r.part == part and r.label == label and not r.workload)
        return next((row.quality for row in found), None)


def summarize(records: Iterable[Any]) -> Summary:
    """Put records in order.

    Raises `AttnZooError` if there is none, or they are of several configs and do not say what of each their figures
    depend on.
    """
    records = list(records)
    if not records:
        raise AttnZooError("there are no records to report")
    hashes = sorted({record.config_hash for record in records if not record.measured})
    if len(hashes) > 1:
        raise AttnZooError(f"records of {len(hashes)} configs in one file: {', '.join(hashes)}")
    found = sorted(records, key=lambda record: not record.is_baseline)
    in_order = sorted(records, key=lambda record: record.kind != "cost")
    parts = list(dict.fromkeys(record.part for record in in_order))
    labels: dict[str, tuple[str, ...]] = {
        part: tuple(dict.fromkeys(r.label for r in found if r.part == part)) for part in parts
    }

    workloads = list(dict.fromkeys(record.workload for record in in_order))

    def place(record: Record) -> tuple[int, ...]:
        order = parts.index(record.part), record.tokens, workloads.index(record.workload), PHASES.index(record.phase)
        return *order, labels[record.part].index(record.label)

    groups: dict[tuple[str, Phase, int, str], list[Record]] = {}
    for record in sorted((r for r in records if r.kind == "cost"), key=place):
        groups.setdefault((record.part, record.phase, record.tokens, record.workload), []).append(record)
    quality = sorted((r for r in records if r.kind == "quality"), key=place)
    return Summary(tuple(Group(*key, rows) for key, rows in groups.items()), quality, labels)


def machine(summary: Summary) -> str:
    """The machines and thread counts of the timings, in words."""
    rows = [row for group in summary.groups for row in group.rows] or summary.quality
    return "; ".join(dict.fromkeys(words.machine(row.environment) for row in rows))


def drifted(summary: Summary) -> str:
    """Warn where dense's own time is not the same in all rows of a workload; empty where it is."""
    found = {f"{group.host}, {group.title}": words.drift(group.rows) for group in summary.groups}
    told = [f"{place} ({times:.2f}x)" for place, times in found.items() if times > words.DRIFT]
    if not told:
        return ""
    return (
        "Dense's own time drifts between the rows of one run, its largest p50 over its smallest being above "
        f"{words.DRIFT:g}x: {'; '.join(told)}. The machine was not equally free: compare ratios, not "
        "milliseconds of two rows."
    )


def unsteady(summary: Summary) -> str:
    """Warn where dense is not as fast as a second copy of itself; empty where it is."""
    found = [
        (f"{group.host}, {group.title}", row.cost.ratios.speedup)
        for group in summary.groups
        for row in group.rows
        if row.is_baseline and isinstance(row.cost, Cost)
    ]
    told = [f"{place} ({times(one)})" for place, one in found if not 1 / words.DRIFT <= one.p50 <= words.DRIFT]
    if not told:
        return ""
    return (
        f"Dense is not as fast as a second copy of itself, by more than {words.DRIFT:g}x: {'; '.join(told)}. No ratio "
        "there can be relied on: measure again on a free machine, or with more repeats."
    )


def keeps_freed_memory(summary: Summary) -> bool:
    """Whether the processes kept what was freed while they were timed."""
    return any(isinstance(row.cost, Cost) and row.cost.freed_memory_kept for row in summary.records)


def versions(summary: Summary) -> dict[str, list[str]]:
    """Give the versions of each library, and of the system, that measured something, as they come."""
    found: dict[str, dict[str, None]] = {}
    for record in summary.records:
        e = record.environment
        commit = "outside git" if e.commit is None else e.commit[:12] + (" with uncommitted changes" if e.dirty else "")
        libraries = {"torch": e.torch, "timm": e.timm, "transformers": e.transformers, "Python": e.python}
        own = {"attnzoo": f"{e.attnzoo} ({commit})", **libraries, "": e.system, "C++ compiler": e.compiler}
        for name, version in own.items():
            if version:
                found.setdefault(name, {})[version] = None
    return {name: list(each) for name, each in found.items()}


def dates(summary: Summary) -> str:
    """First and last time of measurement."""
    times = sorted(record.utc for record in summary.records)
    first, last = times[0][:16].replace("T", " "), times[-1][:16].replace("T", " ")
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"


def verdict(summary: Summary) -> str:
    """What was found, in sentences: who is fastest at the largest size, what it keeps, and how many are slower.

    There is one for each phase of a part, such as prefill and decoding. Where no cost was measured: who keeps most of
    dense's quality, and how many are worse.
    """
    if not summary.parts:
        return " ".join(_most_kept(summary))
    told = []
    for part in summary.parts:
        measured = [(group, rows) for group in summary.of(part) if (rows := _speedups(group))]
        largest = {group.phase: (group, rows) for group, rows in measured}  # they are in order of size
        told += [
            f"{group.host}, {group.title}: {_fastest(group, rows)}.{_bound(group)}" for group, rows in largest.values()
        ]
    return " ".join(told)


def _fastest(group: Group, rows: list[tuple[Record, Quantiles]]) -> str:
    """Which row is fastest and how many are faster or slower, judging by those that were timed often enough."""
    enough = [(row, speedup) for row, speedup in rows if speedup.bounds is not None]
    if not enough:
        best, speedup = max(rows, key=lambda row: row[1].p50)
        return (
            f"{best.label} comes first, {times(speedup)} dense's speed{_keeps(best.quality)}; "
            f"{_too_few(speedup.n, 'pair of calls', 'pairs of calls')} faster from slower"
        )
    verdicts = [speed_verdict(one, noise(group.rows)) for _, one in enough]
    beyond_noise = [row for row, found in zip(enough, verdicts, strict=True) if found == "better"]
    best, speedup = max(beyond_noise or enough, key=lambda row: row[1].p50)
    keeps = _keeps(best.quality)
    faster, slower = verdicts.count("better"), verdicts.count("worse")
    first = f"{best.label} is fastest, {times(speedup)} dense's speed{keeps}"
    counted = f"of {len(rows)} measured, {faster} faster than dense, {slower or 'none'} slower"
    if not faster:
        nearest = f"nearest is {best.label}, {times(speedup)} its speed{keeps}"
        first = f"none is faster than dense beyond the noise; {nearest}"
        counted = f"of {len(rows)} measured, {slower or 'none'} slower"
    few = len(rows) - len(enough)
    return f"{first}; {counted}" + (f", {few} timed too few times to tell" if few else "")


def _too_few(count: int, one: str, several: str) -> str:
    """``3 pairs of calls are too few (of 5 at least) to tell``."""
    return f"{count} {f'{one} is' if count == 1 else f'{several} are'} too few (of {MIN_SAMPLES} at least) to tell"


def _most_kept(summary: Summary) -> list[str]:
    """A sentence for each part and workload of quality."""
    told = []
    for part, workload in dict.fromkeys((row.part, row.workload) for row in summary.quality):
        rows = [row for row in summary.quality if (row.part, row.workload) == (part, workload)]
        dense = next((row.quality for row in rows if row.is_baseline), None)
        methods = [row for row in rows if not row.is_baseline and (row.attention or row.options)]
        results = [(row.label, row.quality) for row in methods if row.quality and not row.quality.is_control]
        found = [(one.ratio, label, one) for label, one in results if one.ratio is not None]
        if not found:
            continue
        metric = found[0][2].METRIC.removesuffix(" %")
        place = [rows[0].host.partition(":")[2], part if len(summary.scored) > 1 else "", workload or metric]
        told.append(f"{', '.join(filter(None, place))}: {_kept(found, dense, metric)}.")
    return told


def _kept(found: list[tuple[float, str, Quality]], dense: Quality | None, metric: str) -> str:
    """Which row keeps most of dense's quality, and how many are worse, as far as there were samples enough."""
    most, label, best = max(found, key=lambda one: one[0])
    verdicts = [quality_verdict(one, dense) for *_, one in found]
    better, worse = (verdicts.count(which) or "none" for which in ("better", "worse"))
    counted = f"of {len(found)} measured, {worse} worse than dense beyond the interval, {better} better"
    if all(one.ratio_low is None for *_, one in found):
        counted = f"of {len(found)} measured, none with an interval that could tell better from worse"
    few = best.compared is not None and best.compared < MIN_SAMPLES and best.ratio_low is None
    if few and best.compared is not None:
        counted = f"{_too_few(best.compared, 'sample', 'samples')} better from worse"
    if not most:
        reference = "" if dense is None else f" ({metric}: {dense.figure} of dense)"
        return f"none of {len(found)} measured found any{reference}" + (f"; {counted}" if few else "")
    alike = sum(ratio == most for ratio, *_ in found) - 1
    does, do = ("comes first", "come first") if few else ("keeps most", "keep most")
    keeps = f"{label} and {alike} more {do}" if alike else f"{label} {does}"
    return f"{keeps}, {quality_kept(best, digits=3)} of dense's quality; {counted}"


def _speedups(group: Group) -> list[tuple[Record, Quantiles]]:
    """The rows that were measured, but for dense, each with its speed-up."""
    return [(row, row.cost.ratios.speedup) for row in group.rows if row.cost is not None and not row.is_baseline]


def _keeps(quality: Quality | None) -> str:
    """What is left of dense's quality: as a part of it, or in points; empty where that is not known."""
    if quality is not None and quality.points is not None:
        return f", its {quality.METRIC.removesuffix(' %')} {points(quality.points)} from dense's"
    kept = quality_kept(quality)
    return "" if kept == "-" else f", keeping {kept} of dense's quality"


def _bound(group: Group) -> str:
    """What attention takes of the dense model's time, and Amdahl's bound on what any swap can gain."""
    share = next((row.cost.attention_share for row in group.rows if row.is_baseline and row.cost is not None), None)
    if share is None or share >= 1:
        return ""
    above = [
        row.label for row, speedup in _speedups(group) if speedup.bounds is not None and speedup.p20 > 1 / (1 - share)
    ]
    noise = f" That of {' and '.join(above)} is above this: one of the two is noise." if above else ""
    return (
        f" The attention layers, projections included, take {share:.0%} of dense's time, so no swap can gain more than "
        f"{1 / (1 - share):.2f}x, and a core, which leaves the projections, gains less.{noise}"
    )

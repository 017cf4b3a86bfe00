"""What all reports share: records put in order, figures put in words, and better told from worse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from attnzoo.bench.record import Detection, Part, Perplexity, Phase, Quality, Quantiles, Record
from attnzoo.errors import AttnZooError
from attnzoo.tables import Verdict

Qualities = Quality | Detection | Perplexity
METRIC: dict[Part, str] = {"vision": "top-1 %", "detection": "AP %", "language": "perplexity"}
PARTS: tuple[Part, ...] = get_args(Part)
PHASES: tuple[Phase, ...] = get_args(Phase)
SAME = 0.01  # ratios nearer to 1 than this are called the same
SAME_MEMORY = 0.05
SAME_MEMORY_BYTES = 256 * 1024  # the kernel counts the resident set of each CPU in batches


@dataclass(frozen=True)
class Group:
    """Rows of cost that were measured alike: of one part, phase and token count, the dense baseline first."""

    part: Part
    phase: Phase
    tokens: int
    rows: list[Record]

    @property
    def host(self) -> str:
        """The host's name, without its library's."""
        return self.rows[0].host.partition(":")[2]

    @property
    def title(self) -> str:
        """What was timed, in words."""
        return {
            "forward": f"forward, {self.tokens:,} tokens",
            "training": f"forward and backward, {self.tokens:,} tokens",
            "prefill": f"prefill, {self.tokens:,} tokens",
            "decode": f"decode, after {self.tokens:,} tokens",
        }[self.phase]


@dataclass(frozen=True)
class Summary:
    """The records of one benchmark, in the order of first appearance.

    Attributes
    ----------
    groups
        Rows of cost: those of vision models by token count, ascending; then prefill and decoding of a language model.
    quality
        Rows of quality, one an attention and part.
    labels
        Attentions of each part, the dense baseline first.
    """

    groups: tuple[Group, ...]
    quality: list[Record]
    labels: dict[Part, tuple[str, ...]]

    @property
    def any(self) -> Record:
        """Some record, for what all have in common."""
        return next((row for group in self.groups for row in group.rows), None) or self.quality[0]

    @property
    def records(self) -> list[Record]:
        """All records."""
        return [row for group in self.groups for row in group.rows] + self.quality

    @property
    def cost(self) -> dict[int, list[Record]]:
        """Rows of cost of the vision model, by token count."""
        return {group.tokens: group.rows for group in self.of("vision")}

    @property
    def parts(self) -> list[Part]:
        """Parts that have rows of cost."""
        return list(dict.fromkeys(group.part for group in self.groups))

    def of(self, part: Part) -> list[Group]:
        """The groups of a part."""
        return [group for group in self.groups if group.part == part]

    def row(self, label: str, tokens: int) -> Record | None:
        """The vision model's row of cost of an attention at a token count."""
        return next((row for row in self.cost.get(tokens, []) if row.label == label), None)

    def quality_of(self, part: Part, label: str) -> Qualities | None:
        """The quality of an attention."""
        return next((r.quality for r in self.quality if r.part == part and r.label == label), None)


def summarise(records: Iterable[Record]) -> Summary:
    """Put records in order.

    Raises
    ------
    AttnZooError
        If there is none, or they are of more than one config.
    """
    records = list(records)
    if not records:
        raise AttnZooError("there are no records to report")
    hashes = sorted({record.config_hash for record in records})
    if len(hashes) > 1:
        raise AttnZooError(f"records of {len(hashes)} configs in one file: {', '.join(hashes)}")
    found = sorted(records, key=lambda record: not record.is_baseline)
    labels: dict[Part, tuple[str, ...]] = {
        part: tuple(dict.fromkeys(r.label for r in found if r.part == part)) for part in PARTS
    }

    def place(record: Record) -> tuple[int, int, int, int]:
        order = PARTS.index(record.part), record.tokens, PHASES.index(record.phase)
        return *order, labels[record.part].index(record.label)

    groups: dict[tuple[Part, Phase, int], list[Record]] = {}
    for record in sorted((r for r in records if r.kind == "cost"), key=place):
        groups.setdefault((record.part, record.phase, record.tokens), []).append(record)
    quality = sorted((r for r in records if r.kind == "quality"), key=place)
    return Summary(tuple(Group(*key, rows) for key, rows in groups.items()), quality, labels)


def machine(summary: Summary) -> str:
    """The machines and thread counts of the timings, in words."""
    rows = [row for group in summary.groups for row in group.rows] or summary.quality
    threads = dict.fromkeys((row.environment.device, row.environment.threads) for row in rows)
    return "; ".join(f"{device}, {count} thread{'s' if count != 1 else ''}" for device, count in threads)


def keeps_freed_memory(summary: Summary) -> bool:
    """Whether the processes kept what was freed while they were timed."""
    return any(row.cost is not None and row.cost.freed_memory_kept for row in summary.records)


def versions(summary: Summary) -> list[str]:
    """Software versions, one line for each set of them that measured something."""
    lines: dict[str, None] = {}
    for record in summary.records:
        e = record.environment
        commit = "outside git" if e.commit is None else e.commit[:12] + (" with uncommitted changes" if e.dirty else "")
        libraries = f"torch {e.torch}, timm {e.timm}, transformers {e.transformers}, Python {e.python}"
        compiler = f", C++ compiler {e.compiler}" if e.compiler else ""
        lines[f"attnzoo {e.attnzoo} ({commit}), {libraries}, {e.system}{compiler}"] = None
    return list(lines)


def dates(summary: Summary) -> str:
    """First and last time of measurement."""
    times = sorted(record.utc for record in summary.records)
    first, last = times[0][:16].replace("T", " "), times[-1][:16].replace("T", " ")
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"


def verdict(summary: Summary) -> str:
    """What was found, in a sentence: who is fastest at the largest size, what it keeps, and how many are slower."""
    groups = [group for group in summary.groups if any(row.cost is not None for row in group.rows)]
    told = []
    for part in summary.parts:
        group = next((group for group in reversed(groups) if group.part == part), None)
        rows = [row for row in group.rows if not row.is_baseline and row.cost is not None] if group else []
        if group is None or not rows:
            continue
        best = max(rows, key=lambda row: row.cost.ratios.speedup.p50 if row.cost is not None else 0.0)
        verdicts = [speed_verdict(row.cost.ratios.speedup, noise(group.rows)) for row in rows if row.cost is not None]
        speed = times(best.cost.ratios.speedup) if best.cost is not None else "-"
        keeps = f", keeping {kept(best.quality)} of dense's quality" if kept(best.quality) != "-" else ""
        told.append(
            f"{group.host}, {group.title}: {best.label} is fastest, {speed} dense's speed{keeps}; of {len(rows)} "
            f"measured, {verdicts.count('better')} faster than dense, {verdicts.count('worse')} slower.{_bound(group)}"
        )
    return " ".join(told)


def _bound(group: Group) -> str:
    """What attention takes of the dense model's time, and Amdahl's bound on what any swap can gain."""
    share = next((row.cost.attention_share for row in group.rows if row.is_baseline and row.cost is not None), None)
    if share is None or share >= 1:
        return ""
    return f" Attention takes {share:.0%} of dense's time, so no swap of it can gain more than {1 / (1 - share):.2f}x."


def milliseconds(q: Quantiles) -> str:
    """A latency and its spread: ``12.3 (12.1-12.9)``."""
    return f"{_figures(q.p50)} ({_figures(q.p20)}-{_figures(q.p80)})"


def times(q: Quantiles) -> str:
    """A speed-up and its spread: ``1.52x (1.49-1.55)``."""
    return f"{q.p50:.2f}x ({q.p20:.2f}-{q.p80:.2f})"


def ratio(value: float | None) -> str:
    """A ratio to the dense baseline, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}x"


def absolute(quality: Qualities | None) -> str:
    """Top-1 with its interval, in percent: ``95.1 (93.1-96.6)``; a perplexity: ``ppl 17.2``; or COCO's: ``AP 41.2``."""
    if quality is None:
        return "-"
    if isinstance(quality, Perplexity):
        return f"ppl {_figures(quality.perplexity)}"
    if isinstance(quality, Detection):
        return f"AP {quality.ap * 100:.1f}"
    return f"{quality.accuracy * 100:.1f} ({quality.low * 100:.1f}-{quality.high * 100:.1f})"


def kept(quality: Qualities | None) -> str:
    """Quality as a part of dense, with its interval: ``0.97x (0.96-0.99)``."""
    if quality is None or quality.ratio_low is None or quality.ratio_high is None:
        return ratio(None if quality is None else quality.ratio)
    return f"{ratio(quality.ratio)} ({quality.ratio_low:.2f}-{quality.ratio_high:.2f})"


def cache(record: Record) -> str:
    """Bytes of the cache against dense, held and allocated: ``0.27x / 0.31x``; a dash where there is no cache."""
    ratios = None if record.cost is None else record.cost.ratios
    if ratios is None or ratios.cache_held is None:
        return "-"
    return f"{ratio(ratios.cache_held)} / {ratio(ratios.cache_allocated)}"


def noise(rows: Iterable[Record]) -> Quantiles | None:
    """The speed-up of dense over a second copy of itself, where it was measured: what is not a difference."""
    return next((row.cost.ratios.speedup for row in rows if row.is_baseline and row.cost is not None), None)


def speed_verdict(q: Quantiles, still: Quantiles | None = None) -> Verdict:
    """Faster or slower only where the whole spread is on one side of 1, and of the `noise` (`still`)."""
    high = max(1 + SAME, still.p80 if still else 1.0)
    low = min(1 - SAME, still.p20 if still else 1.0)
    if q.p20 > high:
        return "better"
    return "worse" if q.p80 < low else "same"


def need_verdict(value: float | None) -> Verdict:
    """Judge a ratio of something of which less is better."""
    if value is None or abs(value - 1) <= SAME:
        return "same"
    return "better" if value < 1 else "worse"


def quality_verdict(quality: Qualities | None, dense: Qualities | None) -> Verdict:
    """Better or worse only where the ratio's interval leaves 1 out or, where it has none, the two intervals differ."""
    if quality is None or dense is None:
        return "same"
    if quality.ratio_low is not None and quality.ratio_high is not None:
        low, high = quality.ratio_low, quality.ratio_high
        return "better" if low > 1 else "worse" if high < 1 else "same"
    if not isinstance(quality, Quality) or not isinstance(dense, Quality):
        return "same"
    if quality.low > dense.high:
        return "better"
    return "worse" if quality.high < dense.low else "same"


def activation_ratio(record: Record) -> float | None:
    """Peak memory against the dense baseline: of the resident set, or of the allocator where that is not known."""
    if record.cost is None:
        return None
    ratios = record.cost.ratios
    return ratios.activation_peak if ratios.activation_peak is not None else ratios.allocator_peak


def size(record: Record) -> int | None:
    """Parameters of what was timed: of the whole model, or of its attention layers where one was timed alone."""
    if record.cost is None:
        return None
    side = record.cost.candidate
    return side.attention_parameters if record.scope == "layer" else side.parameters


def size_ratio(record: Record) -> float | None:
    """Parameters of what was timed against the dense baseline's."""
    if record.cost is None:
        return None
    ratios = record.cost.ratios
    return ratios.attention_parameters if record.scope == "layer" else ratios.parameters


def memory_verdict(record: Record) -> Verdict:
    """More or less only where it is more than the kernel's own inexactness."""
    value = activation_ratio(record)
    if record.cost is None or value is None:
        return "same"
    memory = record.cost.candidate.memory
    held = memory.activation_peak_bytes if memory.activation_peak_bytes is not None else memory.allocator_peak_bytes
    dense = record.cost.baseline.memory
    other = dense.activation_peak_bytes if memory.activation_peak_bytes is not None else dense.allocator_peak_bytes
    apart = None if held is None or other is None else abs(held - other)
    near = abs(value - 1) <= SAME_MEMORY or (apart is not None and apart <= SAME_MEMORY_BYTES)
    return "same" if near else need_verdict(value)


def one_line(text: str, limit: int = 600) -> str:
    """A message on one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def spread(values: Sequence[float], gap: float, within: tuple[float, float] | None = None) -> list[float]:
    """Move values apart, as little as needed for neighbours to be `gap` apart; their order stays.

    With `within` they are then moved, from the top down, so that they stay inside where there is room for all.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(values[index])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            merged = groups[-2] + groups[-1]
            groups[-2:] = [merged]
            centres[-2:] = [sum(values[i] for i in merged) / len(merged)]
    placed = [0.0] * len(values)
    for group, centre in zip(groups, centres, strict=True):
        for rank, index in enumerate(group):
            placed[index] = centre + gap * (rank - (len(group) - 1) / 2)
    if within is not None:
        edge = within[1]
        for index in reversed(order):
            placed[index] = min(placed[index], edge)
            edge = placed[index] - gap
    return placed


def _figures(value: float) -> str:
    """About three figures, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"

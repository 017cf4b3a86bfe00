"""The quality of language models: prose scored through the cache, and numbers found in it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

from pydantic import Field

from attnzoo.bench.record import Count, Entry, Interval, NonNegative, Quality, Share, bounds
from attnzoo.bench.stats import mcnemar, paired_difference, ratio_of_shares, wilson_interval
from attnzoo.bench.words import difference, figures, quality_kept
from attnzoo.eviction.size import CacheBytes
from attnzoo.tables import Cell, Verdict
from attnzoo.tasks.decode.lm import Answer, Scored, largest
from attnzoo.tasks.decode.needles import TASKS, Kind, Sample
from attnzoo.units import megabytes

KIND_TITLES: Mapping[Kind, str] = {kind: task.title for kind, task in TASKS.items()}
CURVE_POINTS = 20
DENSE_FLOOR = 0.75  # dense must find so much itself, or a kind of prompts says nothing of what policies keep
Differences = Mapping[str, tuple[Interval, Verdict]]  # by what differs


class Canary(Entry):
    """A check that what is scored depends on the cache: NLL of a tiny cache above dense, in nats per token."""

    label: str
    above_dense: float
    at_least: float

    @property
    def passed(self) -> bool:
        """Whether the tiny cache did harm enough."""
        return self.above_dense >= self.at_least

    @property
    def row(self) -> tuple[str, str, str]:
        """What was checked, the figure in nats, and its limit."""
        return f"NLL above dense, of {self.label}", f"{self.above_dense:.2g}", f"at least {self.at_least:g}"


class DenseLimit(Entry):
    """A check of a method with a budget that nothing exceeds: its largest difference from dense at a token, in nats."""

    label: str
    difference: NonNegative
    at_most: NonNegative

    @property
    def passed(self) -> bool:
        """Whether no more than rounding sets it apart from dense."""
        return self.difference <= self.at_most

    @property
    def row(self) -> tuple[str, str, str]:
        """What was checked, the figure in nats, and its limit."""
        what = f"largest difference from dense at one token, of {self.label}"
        return what, f"{self.difference:.2g}", f"at most {self.at_most:g}"


class Read(Quality):
    """What was read through a cache, whose size is the largest of all samples."""

    tokens: Count
    cache: CacheBytes | None = None
    cache_dense: CacheBytes | None = None

    @property
    def cache_ratio(self) -> float | None:
        """Bytes held over those of the dense cache."""
        if self.cache is None or self.cache_dense is None or not self.cache_dense.held:
            return None
        return self.cache.held / self.cache_dense.held

    def shown(self, what: str) -> str:
        """Bytes of the cache beside dense: ``51.3 MB (0.56x)``; `what` is the figure's name."""
        if self.cache is None:
            return "-"
        own, dense = getattr(self.cache, what), self.cache_dense and getattr(self.cache_dense, what)
        return megabytes(own) + (f" ({own / dense:.2f}x)" if dense else "")


class Perplexity(Read):
    """Prose scored through a language model's cache.

    `window_nll` is the mean NLL of each window in nats per token, `nll` their mean, `perplexity` its exponential;
    `windows` counts them where a record does not hold each. `position_nll` is the mean over windows in equal parts of
    the window, in order. `difference` is NLL above dense, window by window, `curve` the same in equal parts of the
    window. `window_kl` is, of each window, the mean over its tokens of the KL divergence of dense's predictions from
    this one's, in nats, and `kl` their mean. `ratio`, the quality kept, is dense perplexity over this one, with the
    interval of `difference`. `canary`, without which no row counts, is the baseline's alone, and `dense_limit` that of
    all others.
    """

    METRIC: ClassVar[str] = "perplexity"

    perplexity: NonNegative
    nll: NonNegative
    windows: Count = 0
    window_nll: tuple[NonNegative, ...] = ()
    position_nll: tuple[NonNegative, ...] = ()
    window_kl: tuple[NonNegative, ...] = ()
    kl: Interval | None = None
    difference: Interval | None = None
    curve: tuple[float, ...] = ()
    canary: Canary | None = None
    dense_limit: DenseLimit | None = None
    text_sha256: str = ""

    def against(self, dense: Self) -> Self:
        """The same with its difference and its ratio to dense, over pairs of windows."""
        found = paired_difference(self.window_nll, dense.window_nll)
        low, high = found.bounds or (None, None)
        positions = zip(self.position_nll, dense.position_nll, strict=False)
        update = {
            "difference": found,
            "ratio": math.exp(-found.mean),
            "ratio_low": None if high is None else math.exp(-high),
            "ratio_high": None if low is None else math.exp(-low),
            "curve": tuple(round(own - other, 6) for own, other in positions),
            "cache_dense": dense.cache,
        }
        return self.model_copy(update=update)

    def minus(self, other: Self) -> Differences:
        """What is less than another's on the same windows; nothing where windows are not known one by one."""
        pairs = {"NLL": (self.window_nll, other.window_nll), "KL to dense": (self.window_kl, other.window_kl)}
        if self.text_sha256 != other.text_sha256:
            return {}
        return {name: _minus(*pair, less_is_better=True) for name, pair in pairs.items() if all(pair)}

    @property
    def compared(self) -> int | None:
        """Windows that both read."""
        return None if self.difference is None else self.difference.n

    @property
    def figure(self) -> str:
        """``ppl 17.2``."""
        return f"ppl {figures(self.perplexity)}"

    @property
    def details(self) -> Mapping[str, Cell | str]:
        """Columns of the table of quality."""
        return {
            "perplexity": Cell(f"{self.perplexity:.2f}", small=f"NLL {self.nll:.3f}"),
            "kept (95%)": quality_kept(self),
            "NLL to dense (95%)": Cell(difference(self.difference), verdict(self.difference, less_is_better=True)),
            "KL to dense (95%)": difference(self.kl),
            "cache held": Cell(self.shown("held"), small=f"{self.shown('allocated')} allocated" if self.cache else ""),
        }

    @property
    def checks(self) -> list[Canary | DenseLimit]:
        """The canaries that were tried on the row."""
        return [check for check in (self.canary, self.dense_limit) if check is not None]

    @property
    def refused(self) -> str:
        """Why nothing that was scored counts; empty where the canaries passed."""
        rows = [check.row for check in self.checks if not check.passed]
        return "; ".join(f"a canary failed: {what} is {figure}, must be {limit}" for what, figure, limit in rows)

    @property
    def remark(self) -> str:
        """What the canary said."""
        if self.canary is None:
            return ""
        return (
            f"Canary: {self.canary.label} is {self.canary.above_dense:+.2f} nats per token from dense, must be "
            f"{self.canary.at_least:+g} or more."
        )


class Retrieval(Read):
    """Numbers, or words, found in prompts of one kind.

    `by_depth` says of each number asked for, prompt by prompt, how deep it was hidden and whether it was found; `low`
    and `high` are the 95% Wilson interval of the `recall`, which takes the numbers of one prompt for independent.
    `said` are the answers. `difference` is in recall, prompt by prompt; `p_value` that of McNemar's exact test over the
    numbers asked for. `dense_recall` is the ceiling, and says nothing of policies where it is below `DENSE_FLOOR`;
    `ratio` is recall over it (Katz et al. 1978). `held` says of each prompt what share of the needles' entries was
    still in the cache once it was read.
    """

    METRIC: ClassVar[str] = "numbers found %"

    kind: Kind
    samples: Annotated[int, Field(ge=1)]
    recall: Share
    low: Share
    high: Share
    by_depth: tuple[tuple[float, bool], ...]
    said: tuple[str, ...] = ()
    held: tuple[Share, ...] = ()
    difference: Interval | None = None
    p_value: Share | None = None
    dense_recall: Share | None = None

    @property
    def hits(self) -> list[bool]:
        """Of each number asked for, whether it was found."""
        return [hit for _, hit in self.by_depth]

    @property
    def recalls(self) -> list[float]:
        """Share of the numbers that was found, of each prompt."""
        each = len(self.by_depth) // self.samples
        return [sum(self.hits[at : at + each]) / each for at in range(0, len(self.by_depth), each)]

    def against(self, dense: Self) -> Self:
        """The same with its difference and its ratio to dense, over pairs of prompts."""
        own, other = self.hits, dense.hits
        ratio, low, high = ratio_of_shares(sum(own), len(own), sum(other), len(other))
        update = {
            "difference": paired_difference(self.recalls, dense.recalls),
            "p_value": mcnemar(own, other),
            "ratio": ratio,
            "ratio_low": low,
            "ratio_high": high,
            "cache_dense": dense.cache,
            "dense_recall": dense.recall,
        }
        return self.model_copy(update=update)

    def as_dense(self) -> Self:
        """The same as that of the dense baseline itself."""
        return super().as_dense().model_copy(update={"dense_recall": self.recall})

    def minus(self, other: Self) -> Differences:
        """What is more than another's in the same prompts: recall, and the share of the needles that is held."""
        title = KIND_TITLES[self.kind]
        pairs = {title: (self.recalls, other.recalls), f"{title} held": (self.held, other.held)}
        found = {name: _minus(*pair) for name, pair in pairs.items() if all(pair)}
        return {**found, title: (found[title][0], "same")} if self.dense_fails else found

    @property
    def dense_fails(self) -> bool:
        """Whether dense itself finds too little for the kind to say anything of what is kept."""
        return self.dense_recall is not None and self.dense_recall < DENSE_FLOOR

    @property
    def remark(self) -> str:
        """What the kind measures, and whether dense itself fails."""
        task = TASKS[self.kind]
        told = f"{task.title[:1].upper()}{task.title[1:]}: {task.measures}."
        if not self.dense_fails:
            return told
        return f"{told} Dense itself finds {self.dense_recall:.0%}, less than {DENSE_FLOOR:.0%}: it tells nothing here."

    @property
    def compared(self) -> int | None:
        """Prompts that both were asked."""
        return None if self.difference is None else self.difference.n

    @property
    def figure(self) -> str:
        """In percent, with its interval: ``88 (76-94)``; where dense itself fails, with dense's."""
        ends = f" ({self.low * 100:.0f}-{self.high * 100:.0f})" if bounds(self.low, self.high, len(self.hits)) else ""
        ceiling = f", dense {self.dense_recall:.0%}" if self.dense_fails and self.difference is not None else ""
        return f"{self.recall * 100:.0f}{ends}{ceiling}"

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's."""
        return self.low, self.high

    @property
    def details(self) -> Mapping[str, Cell | str]:
        """Columns of the table of quality."""
        title = KIND_TITLES[self.kind]
        counted = f"{sum(self.hits)} of {len(self.hits)}"
        p_value = "" if self.p_value is None else "< 0.001" if self.p_value < 0.001 else f"= {self.p_value:.3f}"
        tested = p_value and f"McNemar's p {p_value}"
        judged: Verdict = "same" if self.dense_fails else verdict(self.difference)
        to_dense = "dense fails" if self.dense_fails else difference(self.difference)
        held = f"{math.fsum(self.held) / len(self.held) * 100:.1f}" if self.held else "-"
        return {
            f"{title}, % (95%)": Cell(self.figure, judged, small=counted),
            f"{title} to dense (95%)": Cell(to_dense, small=tested),
            f"{title} held, %": held,
        }


def verdict(interval: Interval | None, less_is_better: bool = False) -> Verdict:
    """Better or worse only where the whole interval of paired differences is on one side of 0."""
    if interval is None or interval.bounds is None or interval.low <= 0 <= interval.high:
        return "same"
    return "better" if (interval.mean < 0) == less_is_better else "worse"


def _minus(own: Sequence[float], other: Sequence[float], less_is_better: bool = False) -> tuple[Interval, Verdict]:
    found = paired_difference(own, other)
    return found, verdict(found, less_is_better)


def perplexity_of(scores: Sequence[Scored], note: str) -> Perplexity:
    """Put the windows of one attention together, all of one length; what is against dense is left open."""
    means = [math.fsum(score.nll) / len(score.nll) for score in scores]
    mean, length = math.fsum(means) / len(means), len(scores[0].nll)
    parts = min(CURVE_POINTS, length)
    edges = [round(part * length / parts) for part in range(parts + 1)]
    ends = list(itertools.pairwise(edges))
    kl = tuple(math.fsum(score.kl) / len(score.kl) for score in scores if score.kl)
    sums = [math.fsum(value for score in scores for value in score.nll[a:b]) for a, b in ends]
    return Perplexity(
        perplexity=math.exp(mean),
        nll=mean,
        tokens=length + 1,
        windows=len(scores),
        window_nll=tuple(means),
        position_nll=tuple(total / ((b - a) * len(scores)) for total, (a, b) in zip(sums, ends, strict=True)),
        window_kl=kl,
        kl=paired_difference(kl, [0.0] * len(kl)) if kl else None,
        cache=functools.reduce(largest, [score.cache for score in scores]),
        note=note,
    )


def retrieval_of(samples: Sequence[Sample], answers: Sequence[Answer], note: str) -> Retrieval:
    """Put the answers to all prompts of one kind together; what is against dense is left open."""
    depths = [depth for sample in samples for depth in sample.depths]
    hits = [hit for answer in answers for hit in answer.hits]
    low, high = wilson_interval(sum(hits), len(hits))
    return Retrieval(
        kind=samples[0].kind,
        samples=len(samples),
        tokens=len(samples[0].ids),
        recall=sum(hits) / len(hits),
        low=low,
        high=high,
        by_depth=tuple(zip(depths, hits, strict=True)),
        said=tuple(answer.text for answer in answers),
        held=tuple(answer.held for answer in answers if answer.held is not None),
        cache=functools.reduce(largest, [answer.cache for answer in answers]),
        note=note,
    )

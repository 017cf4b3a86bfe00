"""The quality of language models: prose scored through the cache, and numbers found in it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

from pydantic import Field

from attnzoo.bench.record import Count, Entry, Interval, NonNegative, Quality, Share
from attnzoo.bench.stats import MIN_SAMPLES, mcnemar, paired_difference, ratio_of_shares, wilson_interval
from attnzoo.bench.words import figures, quality_kept
from attnzoo.eviction.size import CacheBytes
from attnzoo.tables import Cell, Verdict
from attnzoo.tasks.decode.lm import Answer, Scored, largest
from attnzoo.tasks.decode.needles import Kind, Sample
from attnzoo.units import megabytes

KIND_TITLES: Mapping[Kind, str] = {"single": "pass key", "multi_key": "one of 4 keys", "multi_value": "3 values"}
CURVE_POINTS = 20


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
    window. `ratio`, the quality kept, is dense perplexity over this one, with the interval of `difference`. `canary`,
    without which no row counts, is the baseline's alone, and `dense_limit` that of all others.
    """

    METRIC: ClassVar[str] = "perplexity"

    perplexity: NonNegative
    nll: NonNegative
    windows: Count = 0
    window_nll: tuple[NonNegative, ...] = ()
    position_nll: tuple[NonNegative, ...] = ()
    difference: Interval | None = None
    curve: tuple[float, ...] = ()
    canary: Canary | None = None
    dense_limit: DenseLimit | None = None
    text_sha256: str = ""

    def against(self, dense: Self) -> Self:
        """The same with its difference and its ratio to dense, over pairs of windows."""
        found = paired_difference(self.window_nll, dense.window_nll)
        some = found.n >= MIN_SAMPLES
        positions = zip(self.position_nll, dense.position_nll, strict=False)
        update = {
            "difference": found,
            "ratio": math.exp(-found.mean),
            "ratio_low": math.exp(-found.high) if some else None,
            "ratio_high": math.exp(-found.low) if some else None,
            "curve": tuple(round(own - other, 6) for own, other in positions),
            "cache_dense": dense.cache,
        }
        return self.model_copy(update=update)

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
            "NLL to dense (95%)": Cell(told(self.difference), verdict(self.difference, less_is_better=True)),
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
    """Numbers found in prompts of one kind.

    `by_depth` says of each number asked for, prompt by prompt, how deep it was hidden and whether it was found; `low`
    and `high` are the 95% Wilson interval of the `recall`, which takes the numbers of one prompt for independent.
    `said` are the answers. `difference` is in recall, prompt by prompt; `p_value` that of McNemar's exact test over the
    numbers asked for. `ratio` is recall over dense recall (Katz et al. 1978).
    """

    METRIC: ClassVar[str] = "numbers found %"

    kind: Kind
    samples: Annotated[int, Field(ge=1)]
    recall: Share
    low: Share
    high: Share
    by_depth: tuple[tuple[float, bool], ...]
    said: tuple[str, ...] = ()
    difference: Interval | None = None
    p_value: Share | None = None

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
        }
        return self.model_copy(update=update)

    @property
    def figure(self) -> str:
        """In percent, with its interval: ``88 (76-94)``."""
        return f"{self.recall * 100:.0f} ({self.low * 100:.0f}-{self.high * 100:.0f})"

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
        return {
            f"{title}, % (95%)": Cell(self.figure, verdict(self.difference), small=counted),
            f"{title} to dense (95%)": Cell(told(self.difference), small=p_value and f"McNemar's p {p_value}"),
        }


def told(interval: Interval | None) -> str:
    """A difference and its interval: ``+0.021 (+0.015 to +0.028)``; too few samples have none."""
    if interval is None:
        return "-"
    if interval.n < MIN_SAMPLES:
        return f"{interval.mean:+.3f} ({interval.n} sample{'s' if interval.n > 1 else ''})"
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def verdict(interval: Interval | None, less_is_better: bool = False) -> Verdict:
    """Better or worse only where the whole interval of paired differences is on one side of 0."""
    if interval is None or interval.n < MIN_SAMPLES or interval.low <= 0 <= interval.high:
        return "same"
    return "better" if (interval.mean < 0) == less_is_better else "worse"


def perplexity_of(scores: Sequence[Scored], note: str) -> Perplexity:
    """Put the windows of one attention together, all of one length; what is against dense is left open."""
    means = [math.fsum(score.nll) / len(score.nll) for score in scores]
    mean, length = math.fsum(means) / len(means), len(scores[0].nll)
    parts = min(CURVE_POINTS, length)
    edges = [round(part * length / parts) for part in range(parts + 1)]
    ends = list(itertools.pairwise(edges))
    sums = [math.fsum(value for score in scores for value in score.nll[a:b]) for a, b in ends]
    return Perplexity(
        perplexity=math.exp(mean),
        nll=mean,
        tokens=length + 1,
        windows=len(scores),
        window_nll=tuple(means),
        position_nll=tuple(total / ((b - a) * len(scores)) for total, (a, b) in zip(sums, ends, strict=True)),
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
        cache=functools.reduce(largest, [answer.cache for answer in answers]),
        note=note,
    )

"""The quality of language models: prose scored through the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self

from attnzoo.bench.record import Count, Entry, Interval, NonNegative, Quality
from attnzoo.bench.stats import paired_difference
from attnzoo.bench.words import figures, quality_kept
from attnzoo.tasks.decode.cost_config import LanguageConfig


class Canary(Entry):
    """A check that what is scored depends on the cache: NLL of a tiny cache above dense, in nats per token."""

    label: str
    above_dense: float
    at_least: float

    @property
    def passed(self) -> bool:
        """Whether the tiny cache did harm enough."""
        return self.above_dense >= self.at_least


class Perplexity(Quality):
    """Prose scored through a language model's cache.

    `window_nll` is the mean NLL of each window in nats per token, `nll` their mean, `perplexity` its exponential.
    `difference` is NLL above dense, window by window. `ratio`, the quality kept, is dense perplexity over this one,
    with the interval of `difference`; both are null where there is no dense baseline, the interval also for the
    baseline itself. `canary` is the baseline's alone.
    """

    METRIC: ClassVar[str] = "perplexity"

    perplexity: NonNegative
    nll: NonNegative
    tokens: Count
    window_nll: tuple[NonNegative, ...]
    difference: Interval | None = None
    canary: Canary | None = None

    def against(self, dense: Self) -> Self:
        """The same with its difference and its ratio to dense, over pairs of windows."""
        found = paired_difference(self.window_nll, dense.window_nll)
        update = {
            "difference": found,
            "ratio": math.exp(-found.mean),
            "ratio_low": math.exp(-found.high),
            "ratio_high": math.exp(-found.low),
        }
        return self.model_copy(update=update)

    @property
    def figure(self) -> str:
        """``ppl 17.2``."""
        return f"ppl {figures(self.perplexity)}"

    @property
    def details(self) -> dict[str, str]:
        """Columns of the table of quality."""
        d = self.difference
        return {
            "perplexity": f"{self.perplexity:.2f}",
            "kept (95%)": quality_kept(self),
            "NLL, nats per token": f"{self.nll:.3f}",
            "above dense (95%)": "-" if d is None else f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})",
            "windows of tokens": f"{len(self.window_nll)} of {self.tokens:,}",
        }

    @property
    def remark(self) -> str:
        """What the canary said."""
        if self.canary is None:
            return ""
        return (
            f"Canary: {self.canary.label} is {self.canary.above_dense:+.2f} nats per token from dense, must be "
            f"{self.canary.at_least:+g} or more."
        )


def perplexity_of(config: LanguageConfig, window_nll: Sequence[float], canary_nll: Sequence[float]) -> Perplexity:
    """Put the windows of one attention together; the difference and the ratio to dense are left open."""
    mean = math.fsum(window_nll) / len(window_nll)
    quality, canary = config.quality, None
    assert quality is not None
    if canary_nll:
        above = math.fsum(canary_nll) - math.fsum(window_nll[: len(canary_nll)])
        tiny = " ".join([quality.canary.name, *(f"{key}={value}" for key, value in quality.canary.options.items())])
        canary = Canary(label=tiny, above_dense=above / len(canary_nll), at_least=quality.canary_nats)
    return Perplexity(
        perplexity=math.exp(mean),
        nll=mean,
        tokens=quality.tokens,
        window_nll=tuple(window_nll),
        canary=canary,
        note=f"{config.model} on {len(window_nll)} windows of {quality.tokens:,} tokens of {config.text}",
    )

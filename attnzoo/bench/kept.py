"""Quality and what is kept of it: a ratio to the dense baseline, for classifiers and for language models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnzoo.bench.config import LanguageConfig, QualityConfig
from attnzoo.bench.record import Canary, Detection, Perplexity, Quality, Training
from attnzoo.bench.stats import paired_difference, ratio_of_shares, wilson_interval
from attnzoo.bench.summary import Qualities
from attnzoo.tasks.classify import small as classify


def accuracy_of(config: QualityConfig, trainings: Sequence[Training]) -> Quality:
    """Put the trainings of one attention together; the ratio to dense is left open."""
    correct, images = sum(t.correct for t in trainings), sum(t.images for t in trainings)
    low, high = wilson_interval(correct, images)
    tokens = (classify.IMAGE_SIDE[config.dataset] // config.host.patch_size) ** 2
    options = ", ".join(f"{key}={value}" for key, value in config.host.options.items())
    seeds = f"{len(trainings)} seed{'s' if len(trainings) > 1 else ''}"
    note = (
        f"{config.host.model} ({options}) from scratch on {config.dataset}, {tokens} tokens, "
        f"{config.recipe.epochs} epochs, {seeds}, {trainings[0].images:,} test images"
    )
    return Quality(
        accuracy=correct / images,
        low=low,
        high=high,
        images=images,
        ratio=None,
        trainings=tuple(trainings),
        note=note,
    )


def perplexity_of(config: LanguageConfig, window_nll: Sequence[float], canary_nll: Sequence[float]) -> Perplexity:
    """Put the windows of one attention together; the difference and the ratio to dense are left open."""
    mean = math.fsum(window_nll) / len(window_nll)
    quality, canary = config.quality, None
    if canary_nll:
        above = math.fsum(canary_nll) - math.fsum(window_nll[: len(canary_nll)])
        tiny = " ".join([quality.canary.name, *(f"{key}={value}" for key, value in quality.canary.options.items())])
        canary = Canary(label=tiny, above_dense=above / len(canary_nll), at_least=quality.canary_nats)
    return Perplexity(
        perplexity=math.exp(mean),
        nll=mean,
        tokens=quality.tokens,
        window_nll=tuple(window_nll),
        ratio=None,
        canary=canary,
        note=f"{config.model} on {len(window_nll)} windows of {quality.tokens:,} tokens of {config.text}",
    )


def against(quality: Qualities, dense: Qualities | None) -> Qualities:
    """Give the same with its ratio to the dense baseline's, and the ratio's 95% interval.

    Parameters
    ----------
    quality
        Of an attention.
    dense
        The baseline's; None where there is none, and then there is no ratio.
    """
    update: dict[str, object] = {"ratio": None, "ratio_low": None, "ratio_high": None}
    if isinstance(quality, Quality) and isinstance(dense, Quality):
        right, right_dense = (sum(t.correct for t in q.trainings) for q in (quality, dense))
        ratio, low, high = ratio_of_shares(right, quality.images, right_dense, dense.images)
        update = {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    elif isinstance(quality, Detection) and isinstance(dense, Detection):
        update["ratio"] = quality.ap / dense.ap if dense.ap else None
    elif isinstance(quality, Perplexity) and isinstance(dense, Perplexity):
        found = paired_difference(quality.window_nll, dense.window_nll)
        update = {
            "difference": found,
            "ratio": math.exp(-found.mean),
            "ratio_low": math.exp(-found.high),
            "ratio_high": math.exp(-found.low),
        }
    return quality.model_copy(update=update)

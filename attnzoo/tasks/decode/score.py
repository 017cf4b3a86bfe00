"""What a language model reads through one attention's cache: windows of prose, and prompts that hide numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attnzoo
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.task import OnProgress, Result
from attnzoo.errors import AttnZooError
from attnzoo.eviction.budgets import ample
from attnzoo.tasks.decode import lm
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.decoder import load_dense, swapped_twin
from attnzoo.tasks.decode.kept import KeptSamples
from attnzoo.tasks.decode.needles import Sample
from attnzoo.tasks.decode.quality import Canary, DenseLimit, perplexity_of, retrieval_of

# Largest difference of one token's NLL from dense, in nats, that rounding explains.
ROUNDING = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
Windows = Sequence[Sequence[int]]
Score = Callable[[str, str, Any, Windows], list[lm.Scored]]


class NotFiniteError(AttnZooError):
    """An NLL that is not finite, of which nothing can be said."""


def measure_nll(
    config: DecodeConfig, spec: AttentionConfig | None, given: Mapping[str, Any], kept: KeptSamples, say: OnProgress
) -> Result:
    """Score every window, and the first few as the canaries ask; where one fails there is no quality."""
    windows: Windows = given["windows"]
    say("load")
    dense = load_dense(config)
    score = partial(_scores, config, kept, say)
    try:
        label = config.baseline if spec is None else spec.label
        scores = score("windows", label, swapped_twin(dense, spec), windows)
        last = f", the last {len(scores[0].nll):,} scored" if len(scores[0].nll) < len(windows[0]) - 1 else ""
        note = _note(config, f"{len(windows)} windows of {len(windows[0]):,} tokens{last}")
        quality = perplexity_of(scores, note).model_copy(update={"text_sha256": given["text_sha256"]})
        first = slice(config.canary.windows)
        if spec is None:
            checked = quality.model_copy(
                update={"canary": _canary(config, dense, windows[first], scores[first], score)}
            )
        else:
            checked = quality.model_copy(update={"dense_limit": _limit(config, dense, spec, windows[first], score)})
    except NotFiniteError as error:
        return Result(status="failed", message=str(error))
    wrong = checked.refused
    return Result(status="failed", message=wrong) if wrong else Result(status="ok", quality=checked)


def measure_retrieval(
    config: DecodeConfig, spec: AttentionConfig | None, samples: Sequence[Sample], kept: KeptSamples, say: OnProgress
) -> Result:
    """Let the model answer every prompt of one kind."""
    say("load")
    model, tokenizer = swapped_twin(load_dense(config), spec), lm.load_tokenizer(config.model)

    def answer(sample: Sample) -> lm.Answer:
        say(f"prompt {sample.index + 1}/{len(samples)}")
        return lm.retrieve(model, tokenizer, sample)

    answers = [kept.get("prompts", sample.index, partial(answer, sample)) for sample in samples]
    what = f"{len(samples)} prompts of {len(samples[0].ids):,} tokens"
    return Result(status="ok", quality=retrieval_of(samples, answers, _note(config, what)))


def unbounded(spec: AttentionConfig, tokens: int) -> AttentionConfig:
    """Give the same method with a budget that a text of `tokens` tokens does not fill; a core stays as it is."""
    evicts = attnzoo.describe(spec.name).kind == "eviction"
    options = dict(sorted((ample(spec.options, tokens) if evicts else spec.options).items()))
    return AttentionConfig(name=spec.name, options=options, where=spec.where)


def _note(config: DecodeConfig, what: str) -> str:
    return f"{config.model} on {what} of {config.text}, {config.dtype}"


def _canary(config: DecodeConfig, dense: Any, windows: Windows, scores: Sequence[lm.Scored], score: Score) -> Canary:
    """Score windows with too small a cache, beside what dense scored."""
    tiny = config.canary.tiny
    own, small = _tokens(scores), _tokens(score("canary", tiny.label, swapped_twin(dense, tiny), windows))
    label = " ".join([tiny.name, *(f"{key}={value}" for key, value in sorted(tiny.options.items()))])
    above = (math.fsum(small) - math.fsum(own)) / len(own)
    return Canary(label=label, above_dense=above, at_least=config.canary.worse_by)


def _limit(config: DecodeConfig, dense: Any, spec: AttentionConfig, windows: Windows, score: Score) -> DenseLimit:
    """Score windows with a cache that holds everything, and as dense does."""
    whole = unbounded(spec, len(windows[0]))
    own = _tokens(score("unbounded", whole.label, swapped_twin(dense, whole), windows))
    oracle = _tokens(score("dense", config.baseline, dense, windows))
    most = max(abs(a - b) for a, b in zip(own, oracle, strict=True))
    return DenseLimit(label=whole.label, difference=most, at_most=ROUNDING[config.dtype])


def _tokens(scores: Sequence[lm.Scored]) -> list[float]:
    """NLL of every token of all windows."""
    return [value for score in scores for value in score.nll]


def _scores(
    config: DecodeConfig, kept: KeptSamples, say: OnProgress, role: str, label: str, model: Any, windows: Windows
) -> list[lm.Scored]:
    """Score windows, but for those that an earlier run has scored for the same `role`."""

    def scored(number: int) -> lm.Scored:
        assert config.nll is not None
        say(f"{label}: window {number}/{len(windows)}")
        score = lm.nll(model, windows[number - 1], config.nll.scored)
        where = next((at for at, value in enumerate(score.nll, 1) if not math.isfinite(value)), None)
        if where is not None:
            raise NotFiniteError(f"{label} gives an NLL that is not finite at token {where} of window {number}")
        return score

    return [kept.get(role, number, partial(scored, number)) for number in range(1, len(windows) + 1)]

"""What is measured of a language model: the cost of prefill and decoding, or prose scored through the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.bench import gate as gates
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.cost import attention_paths, ratios_of, side_of
from attnzoo.bench.gate import gate_message
from attnzoo.bench.measure import Interleaved, clock_for, quantiles
from attnzoo.bench.memory import Peak, keep_buffers, map_buffers, peak_memory
from attnzoo.bench.record import Cost, Gate, Shapes
from attnzoo.bench.task import Result, Say
from attnzoo.bench.trace import Trace, trace
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.size import CacheBytes
from attnzoo.hosts.versions import cache_arguments, output_cache
from attnzoo.registry import build_policy
from attnzoo.tasks.decode.cost_config import LanguageConfig
from attnzoo.tasks.decode.lm import load_model, nll
from attnzoo.tasks.decode.quality import perplexity_of
from attnzoo.tasks.decode.timings import Decoder, decode_in_turn, read, twin

GATE_TOKENS, GATE_STEPS = 48, 4  # the gate's prompt, and the single steps after it
CANARY_WINDOWS = 2
NO_STEP_PEAK = "none"


def measure_cost(
    language: LanguageConfig, spec: AttentionConfig | None, ids: Sequence[Sequence[int]], where: str, say: Say
) -> Result:
    """Load, swap, gate; then, only where the gate passed, memory and time of candidate and baseline in turn.

    `ids` are the prompts' tokens, `where` is the device.
    """
    device = torch.device(where)
    map_buffers()
    say("load")
    dense = _load(language, device)
    layers = attention_paths(dense)
    candidate = swapped_twin(dense, spec)
    prompts = torch.tensor(ids, device=device)
    shapes = _shapes(dense, layers, prompts)
    with torch.inference_mode():
        say("gate")
        gate, baseline_gate = check(dense, layers, spec, prompts)
        run, run_dense = Decoder(candidate, prompts, policy_of(spec)), Decoder(dense, prompts)
        traced, traced_dense = _traced(run), _traced(run_dense)
        result = Result(
            status="ok",
            shapes=shapes,
            gate=run.bounded(gate),
            baseline_gate=baseline_gate,
            backends=tuple(sorted({*traced[0].backends, *traced[1].backends})),
        )
        if failed := _failed(result):
            return failed
        say("memory")
        steps = _step_peaks(run, run_dense, device)
        run.forget()
        run_dense.forget()
        calls = [lambda: read(candidate, prompts), lambda: read(dense, prompts)]
        reads = peak_memory(calls, device, warm=True, exact=False)  # a prefill takes seconds
        keep_buffers()
        prefills, tokens = _timed(run, run_dense, language, device, say)
        result = result.model_copy(update={"gate": run.bounded(gate)})
        if failed := _failed(result):
            return failed
    models, batch = (candidate, dense), len(prompts)
    costs = [
        _cost(models, layers, times, items, traces, peaks, caches)
        for times, items, traces, peaks, caches in (
            (prefills, prompts.numel(), (traced[0], traced_dense[0]), reads, (run.read_bytes, run_dense.read_bytes)),
            (tokens, batch, (traced[1], traced_dense[1]), steps, (run.step_bytes, run_dense.step_bytes)),
        )
    ]
    return Result(**{**dict(result), "costs": {"prefill": costs[0], "decode": costs[1]}})


def measure_quality(
    language: LanguageConfig, spec: AttentionConfig | None, windows: Sequence[Sequence[int]], where: str, say: Say
) -> Result:
    """Score every window on the device `where`; for the dense baseline also the first few with the canary's attention.

    Dense has no quality where the canary is not far enough from it: what was scored then does not depend on the cache.
    """
    asked = language.quality
    assert asked is not None
    say("load")
    dense = _load(language, torch.device(where))
    scores = _scores(swapped_twin(dense, spec), windows, say)
    canary: tuple[float, ...] = ()
    if spec is None:
        canary = _scores(swapped_twin(dense, asked.canary), windows[:CANARY_WINDOWS], say)
    if not all(map(math.isfinite, (*scores, *canary))):
        return Result(status="failed", message=f"the NLL of a window is not finite: {scores} {canary}")
    quality = perplexity_of(language, scores, canary)
    if quality.canary is not None and not quality.canary.passed:
        found = quality.canary
        message = (
            f"the canary ({found.label}) is {found.above_dense:.3f} nats per token above dense, must be at least "
            f"{found.at_least:g}: what was scored does not depend on the cache"
        )
        return Result(status="failed", message=message)
    return Result(status="ok", quality=quality)


def swapped_twin(dense: Any, spec: AttentionConfig | None) -> Any:
    """Give a second model on the same weights, with the attention of `spec`; with None, the same attention."""
    model = twin(dense)
    return model if spec is None else attnzoo.replace_attention(model, spec.name, **spec.swap)


def policy_of(spec: AttentionConfig | None) -> Policy | None:
    """Give the policy that `spec` names; None for cores and the dense baseline."""
    if spec is None or attnzoo.describe(spec.name).kind != "eviction":
        return None
    return build_policy(attnzoo.describe(spec.name), spec.options)


def check(dense: Any, layers: Sequence[str], spec: AttentionConfig | None, prompts: Tensor) -> tuple[Gate, Gate]:
    """Compare, on the first tokens of a prompt, the candidate with the dense model and that with the softmax core.

    A policy gets a budget past those tokens, if it has less: it then evicts nothing, and any difference is a mistake.
    Outputs of all attention layers are compared, the logits of the prompt and those of single steps after it.
    """
    ids = prompts[:1, : GATE_TOKENS + GATE_STEPS]
    tolerance = gates.TOLERANCE[dense.dtype]
    own = _outputs(dense, layers, ids)
    core = _outputs(swapped_twin(dense, AttentionConfig(name="softmax")), layers, ids)
    baseline = gates.compare(own, core, "softmax core, same weights and tokens", tolerance)
    if spec is None:
        return baseline, baseline
    policy, oracle = policy_of(spec), "transformers' own attention and cache, same weights and tokens"
    if policy is not None:
        budget = max(policy.budget, ids.shape[1])
        spec = spec.model_copy(update={"options": {**spec.options, "budget": budget}})
        oracle += f", budget {budget} of {ids.shape[1]} tokens"
    return gates.compare(_outputs(swapped_twin(dense, spec), layers, ids), own, oracle, tolerance), baseline


def _traced(run: Decoder) -> tuple[Trace, Trace]:
    """Trace a prefill and a step, and look at the cache after each."""
    prefill = trace(run.read)
    run.look()
    step = trace(run.step)
    run.look()
    return prefill, step


def _step_peaks(run: Decoder, dense: Decoder, device: torch.device) -> list[Peak]:
    """Peak memory of a step, where it can be known: on a CPU it cannot.

    The resident set rises by less than the kernel's own inexactness, and the profiler does not see the release of what
    was taken before it began to look, which here is the old cache.
    """
    if device.type == "cuda":
        return peak_memory([run.step, dense.step], device, warm=True)
    return [Peak(None, None, NO_STEP_PEAK, "one step is too small to be measured on a CPU; see the cache")] * 2


def _timed(
    run: Decoder, dense: Decoder, language: LanguageConfig, device: torch.device, say: Say
) -> tuple[Interleaved, Interleaved]:
    """Seconds of prefills, in turn, and of a step: the mean of the steps after each prefill, taken in turn."""
    prefills: tuple[list[float], list[float]] = ([], [])
    tokens: tuple[list[float], list[float]] = ([], [])
    for repeat in range(language.cost.repeats):
        say(f"time {repeat + 1}/{language.cost.repeats}")
        once, then = decode_in_turn(run, dense, language.cost.new_tokens, clock_for(device))
        for kept, seconds in zip((*prefills, *tokens), (once.a, once.b, then.a, then.b), strict=True):
            kept.append(math.fsum(seconds) / len(seconds))
    return Interleaved(*map(tuple, prefills)), Interleaved(*map(tuple, tokens))


def _cost(
    models: tuple[Any, Any],
    layers: Sequence[str],
    times: Interleaved,
    items: int,
    traces: tuple[Trace, Trace],
    peaks: Sequence[Peak],
    caches: tuple[CacheBytes, CacheBytes],
) -> Cost:
    side, side_dense = (
        side_of(model, layers, quantiles(seconds, 1e3), items, traced, peak, cache)
        for model, seconds, traced, peak, cache in zip(models, (times.a, times.b), traces, peaks, caches, strict=True)
    )
    uncounted = tuple(sorted({*traces[0].uncounted, *traces[1].uncounted}))
    ratios = ratios_of(side, side_dense, quantiles(times.ratios))
    return Cost(candidate=side, baseline=side_dense, ratios=ratios, uncounted_ops=uncounted)


def _scores(model: Any, windows: Sequence[Sequence[int]], say: Say) -> tuple[float, ...]:
    scores = []
    for number, ids in enumerate(windows, 1):
        say(f"window {number}/{len(windows)}")
        losses = nll(model, ids).nll
        scores.append(math.fsum(losses) / len(losses))
    return tuple(scores)


def _outputs(model: Any, layers: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    with gates.noted(model, layers) as found:
        out = model(ids[:, :GATE_TOKENS], use_cache=True)
    for position in range(GATE_TOKENS, ids.shape[1]):
        out = model(ids[:, position : position + 1], **cache_arguments(model, output_cache(out)), use_cache=True)
        found[f"logits of token {position + 1}"] = out.logits
    return found


def _failed(result: Result) -> Result | None:
    """Give the result as failed where a gate did not pass."""
    for name, gate in (("gate", result.gate), ("the baseline's gate", result.baseline_gate)):
        if gate is not None and not gate.passed:
            return result.model_copy(update={"status": "failed", "message": gate_message(name, gate)})
    return None


def _load(language: LanguageConfig, device: torch.device) -> Any:
    """Load the model without transformers' progress bar, whose lock would outlive a child that is killed."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return load_model(language.model, dtype=getattr(torch, language.dtype), device=device)


def _shapes(model: Any, layers: Sequence[str], prompts: Tensor) -> Shapes:
    return Shapes(
        batch=len(prompts),
        tokens=prompts.shape[1],
        prefix=0,
        dim=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        depth=len(layers),
    )

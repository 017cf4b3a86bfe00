"""What prefill and decoding cost through one attention, beside the dense model in the same process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.bench import gate as gates
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.cost import attention_paths, cost_of
from attnzoo.bench.measure import Interleaved, clock_for, interleave, share_of
from attnzoo.bench.memory import Peak, keep_buffers, map_buffers, peak_memory
from attnzoo.bench.record import Gate, Shapes
from attnzoo.bench.task import OnProgress, Result
from attnzoo.bench.trace import Trace, trace
from attnzoo.eviction.budgets import ample
from attnzoo.hosts.versions import cache_arguments, output_cache
from attnzoo.tasks.decode.config import DecodeConfig, DecodeCostConfig
from attnzoo.tasks.decode.decoder import Decoder, load_dense, policy_of, read, swapped_twin

GATE_TOKENS, GATE_STEPS = 48, 4  # the gate's prompt, and the single steps after it
NO_STEP_PEAK = "none"
SHARE_READS, SHARE_STEPS = 3, 15  # calls of which attention's share is the median


def measure_cost(
    config: DecodeConfig, spec: AttentionConfig | None, ids: Sequence[Sequence[int]], batch: int, say: OnProgress
) -> Result:
    """Load, swap, gate; then, only where the gate passed, memory and time of candidate and baseline in turn.

    Without `spec` dense itself is measured. `ids` are the prompts' tokens, as many prompts as the first batch size.
    Where the `batch` of decoding is larger, each row is repeated after the prefill, whose own cost is then left out.
    """
    assert config.cost is not None
    device = torch.device(config.device)
    map_buffers()
    say("load")
    dense = load_dense(config)
    layers = attention_paths(dense)
    candidate = swapped_twin(dense, spec)
    prompts = torch.tensor(ids, device=device)
    rows = batch // len(prompts)
    with torch.inference_mode():
        say("gate")
        gate, baseline_gate = check(dense, layers, spec, prompts)
        run, run_dense = Decoder(candidate, prompts, policy_of(spec)), Decoder(dense, prompts)
        traced, traced_dense = _traced(run, rows), _traced(run_dense, rows)
        result = Result(
            status="ok",
            shapes=Shapes(
                batch=batch,
                tokens=prompts.shape[1],
                prefix=0,
                dim=dense.config.hidden_size,
                heads=dense.config.num_attention_heads,
                depth=len(layers),
            ),
            gate=run.bounded(gate),
            baseline_gate=baseline_gate,
            backends=tuple(sorted({*traced[0].backends, *traced[1].backends})),
        )
        if failed := result.refused:
            return failed
        say("memory")
        steps = _step_peaks(run, run_dense, device)
        run.forget()
        run_dense.forget()
        calls = [lambda: read(candidate, prompts), lambda: read(dense, prompts)]
        # a prefill takes seconds, so that the allocator is not looked at besides
        reads = peak_memory(calls, device, warm=True, exact=False) if rows == 1 else []
        keep_buffers()
        prefills, tokens = _timed(run, run_dense, config.cost, device, rows, say)
        result = result.model_copy(update={"gate": run.bounded(gate)})
        if failed := result.refused:
            return failed
        shares: tuple[float | None, float | None] = None, None
        if spec is None:  # which is the same beside every row
            say("share")
            run.forget()
            shares = _shares(run_dense, layers, config.cost, device, rows)
    models = (candidate, dense)
    caches = (run.step_bytes, run_dense.step_bytes)
    traces = (traced[1], traced_dense[1])
    costs = {"decode": cost_of(models, layers, tokens, batch, traces, steps, caches, attention_share=shares[1])}
    if rows == 1:
        caches = (run.read_bytes, run_dense.read_bytes)
        traces = (traced[0], traced_dense[0])
        costs["prefill"] = cost_of(
            models, layers, prefills, prompts.numel(), traces, reads, caches, attention_share=shares[0]
        )
    return Result(**{**dict(result), "costs": costs})


def check(dense: Any, layers: Sequence[str], spec: AttentionConfig | None, prompts: Tensor) -> tuple[Gate, Gate]:
    """Compare, on the first tokens of a prompt, the candidate with the dense model and that with the softmax core.

    A policy gets a budget of those tokens: it then evicts nothing, and any difference is a mistake.
    Outputs of all attention layers are compared, the logits of the prompt and those of single steps after it.
    """
    ids = prompts[:1, : GATE_TOKENS + GATE_STEPS]
    tolerance = gates.TOLERANCE[dense.dtype]
    own = _outputs(dense, layers, ids)
    core = _outputs(swapped_twin(dense, AttentionConfig(name="softmax")), layers, ids)
    baseline = gates.compare(own, core, "softmax core, same weights and tokens", tolerance)
    if spec is None:
        return baseline, baseline
    oracle = "transformers' own attention and cache, same weights and tokens"
    if policy_of(spec) is not None:
        options = ample(spec.options, ids.shape[1])
        spec = spec.model_copy(update={"options": options})
        oracle += f", budget {options['budget']} of {ids.shape[1]} tokens"
    return gates.compare(_outputs(swapped_twin(dense, spec), layers, ids), own, oracle, tolerance), baseline


def _traced(run: Decoder, rows: int) -> tuple[Trace, Trace]:
    """Trace a prefill and a step, and look at the cache after each."""
    prefill = trace(run.read)
    run.look()
    run.repeat_rows(rows)
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
    run: Decoder, dense: Decoder, cost: DecodeCostConfig, device: torch.device, rows: int, say: OnProgress
) -> tuple[Interleaved, Interleaved]:
    """Seconds of prefills, in turn, and of a step: the mean of the steps after each prefill, taken in turn."""
    clock, both = clock_for(device), (run, dense)
    prefills: tuple[list[float], list[float]] = ([], [])
    tokens: tuple[list[float], list[float]] = ([], [])

    def looked(call: Any) -> float:
        seconds = clock(call)
        (run if call == run.step else dense).look()
        return seconds

    for repeat in range(cost.repeats):
        say(f"time {repeat + 1}/{cost.repeats}")
        for each in both:
            each.forget()
        once = interleave(run.read, dense.read, clock, warmup=0, repeats=1, min_seconds=0)
        for each in both:
            each.look()
            each.repeat_rows(rows)
        then = interleave(run.step, dense.step, looked, warmup=0, repeats=cost.new_tokens, min_seconds=0)
        for kept, seconds in zip((*prefills, *tokens), (once.a, once.b, then.a, then.b), strict=True):
            kept.append(math.fsum(seconds) / len(seconds))
    return Interleaved(*map(tuple, prefills)), Interleaved(*map(tuple, tokens))


def _shares(
    run: Decoder, layers: Sequence[str], cost: DecodeCostConfig, device: torch.device, rows: int
) -> tuple[float | None, float | None]:
    """What part of a prefill's time, and of a step's, the dense model spends in its attention layers."""
    modules = [run.model.get_submodule(path) for path in layers]
    prefill = share_of(device, modules, run.read, SHARE_READS) if rows == 1 else None
    if rows > 1:
        run.read()
        run.repeat_rows(rows)
    steps = max(1, min(SHARE_STEPS, cost.new_tokens - 2))  # of as many as the prompt leaves room for
    return prefill or None, share_of(device, modules, run.step, steps) or None


def _outputs(model: Any, layers: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    with gates.noted(model, layers) as found:
        out = model(ids[:, :GATE_TOKENS], use_cache=True)
    for position in range(GATE_TOKENS, ids.shape[1]):
        out = model(ids[:, position : position + 1], **cache_arguments(model, output_cache(out)), use_cache=True)
        found[f"logits of token {position + 1}"] = out.logits
    return found

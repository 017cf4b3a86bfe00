"""What the children of all parts share: the work one is given, what it answers, and how figures become records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn

import attnzoo
from attnzoo.bench.config import AttentionConfig, BenchConfig
from attnzoo.bench.memory import Peak
from attnzoo.bench.record import Cost, Entry, Gate, Memory, Part, Quantiles, Ratios, Shapes, Side, Status, Training
from attnzoo.bench.trace import Trace
from attnzoo.errors import AttnZooError
from attnzoo.eviction.size import CacheBytes

Say = Callable[[str], None]


class Job(Entry):
    """One child's work. `attention` is an index into the part's attentions; None is its dense baseline.

    `data` is the folder of a vision model's images, `prompts` and `windows` are token ids for a language model.
    """

    config: BenchConfig
    attention: int | None
    part: Part = "vision"
    tokens: int = 0
    data: str = ""
    prompts: tuple[tuple[int, ...], ...] = ()
    windows: tuple[tuple[int, ...], ...] = ()

    @property
    def spec(self) -> AttentionConfig | None:
        """The attention's part of the config."""
        language = self.config.language if self.part == "language" else None
        attentions = self.config.attentions if language is None else language.attentions
        return None if self.attention is None else attentions[self.attention]


class Outcome(Entry):
    """What a child found. What it did not get to is None.

    A language model's `cost` is that of the prefill; `nll` is the mean of each window, `canary_nll` that of the first
    few with the canary's attention.
    """

    status: Status
    message: str = ""
    shapes: Shapes | None = None
    gate: Gate | None = None
    baseline_gate: Gate | None = None
    backends: tuple[str, ...] = ()
    cost: Cost | None = None
    decode_cost: Cost | None = None
    trainings: tuple[Training, ...] = ()
    nll: tuple[float, ...] = ()
    canary_nll: tuple[float, ...] = ()


class OracleError(RuntimeError):
    """The oracle could not be computed, so nothing could be checked."""


class Measure(Protocol):
    """What a child does with its job, telling how far it is."""

    def __call__(self, job: Job, say: Say) -> Outcome:
        """Do it."""


def guarded(measure: Measure, job: str, say: Say) -> str:
    """Do the job, and turn what can go wrong into a status; job and `Outcome` go as JSON."""
    try:
        outcome = measure(Job.model_validate_json(job), say)
    except AttnZooError as error:
        outcome = Outcome(status="unsupported", message=str(error))
    except OracleError as error:
        outcome = Outcome(status="failed", message=str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        outcome = Outcome(status="oom", message=str(error) or type(error).__name__)
    return outcome.model_dump_json()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by type or by PyTorch's words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text


def set_threads(threads: int | None) -> None:
    """Set the threads of this process; None leaves PyTorch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def attention_paths(model: nn.Module) -> list[str]:
    """Paths of the attention layers, as a swap would find them."""
    return [layer.path for layer in attnzoo.swap_report(model).layers]


def side_of(
    model: nn.Module,
    layers: Iterable[str],
    latency: Quantiles,
    items: int,
    traced: Trace,
    peak: Peak,
    cache: CacheBytes | None = None,
) -> Side:
    """Put together what one model costs; `items` is how many images or tokens a call works on."""
    parameters = list(model.parameters())
    attention = {id(p): p.numel() for path in layers for p in model.get_submodule(path).parameters()}
    memory = Memory(
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        activation_peak_bytes=peak.activation_bytes,
        allocator_peak_bytes=peak.allocator_bytes,
        cache_held_bytes=None if cache is None else cache.held,
        cache_allocated_bytes=None if cache is None else cache.allocated,
        method=peak.method,
        note=peak.note,
    )
    return Side(
        latency_ms=latency,
        throughput=items / (latency.p50 / 1e3),
        flops=traced.flops,
        flops_note=traced.flops_note,
        parameters=sum(p.numel() for p in parameters),
        attention_parameters=sum(attention.values()),
        memory=memory,
    )


def ratios_of(candidate: Side, baseline: Side, speedup: Quantiles) -> Ratios:
    """Set the candidate's figures against the baseline's."""

    def over(a: int | None, b: int | None) -> float | None:
        return None if a is None or not b else a / b

    parameters = over(candidate.parameters, baseline.parameters)
    if parameters is None:
        raise AttnZooError("a host without parameters cannot be compared")
    return Ratios(
        speedup=speedup,
        flops=over(candidate.flops, baseline.flops),
        parameters=parameters,
        attention_parameters=over(candidate.attention_parameters, baseline.attention_parameters),
        activation_peak=over(candidate.memory.activation_peak_bytes, baseline.memory.activation_peak_bytes),
        allocator_peak=over(candidate.memory.allocator_peak_bytes, baseline.memory.allocator_peak_bytes),
        cache_held=over(candidate.memory.cache_held_bytes, baseline.memory.cache_held_bytes),
        cache_allocated=over(candidate.memory.cache_allocated_bytes, baseline.memory.cache_allocated_bytes),
    )


def gate_message(name: str, gate: Gate) -> str:
    """Say why nothing was timed."""
    error = "not finite" if gate.max_abs_error is None else f"{gate.max_abs_error:.3g}"
    allowed = "?" if gate.scale is None else f"{gate.tolerance * gate.scale:.3g}"
    detail = f" ({gate.detail})" if gate.detail else ""
    return f"{name} did not pass, so nothing was timed: error {error}, allowed {allowed}, at {gate.at}{detail}"

"""What a detector costs stage by stage: backbone, encoder, decoder, and the encoder's attention within the encoder.

All variants of a detector are called in turn, so that the noise of the machine falls on all alike, and the calls of
each stage's modules are timed within. FLOPs and peak memory are those of each stage called alone with the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.bench.measure import Forward, around, clock_parts, quantiles
from attnzoo.bench.memory import Peak, peak_memory
from attnzoo.bench.record import Quantiles, Stage
from attnzoo.bench.trace import Trace, trace

Need = tuple[Trace, Peak]
WHOLE = "detector"
ENCODER = "encoder"
ATTENTION = "encoder's attention"
STAGES: dict[str, tuple[str, ...]] = {
    "backbone": ("backbone", "neck"),
    ENCODER: ("encoder",),
    "decoder": ("decoder", "bbox_head"),
}
"""Stages by the names of their modules in the detector."""


@dataclass(frozen=True)
class Timed:
    """Seconds of each call, by stage; `rounds` of all variants are neighbors in time."""

    rounds: tuple[Mapping[str, float], ...]

    def seconds(self, stage: str) -> list[float]:
        """Of one stage, call by call."""
        return [one[stage] for one in self.rounds]

    def latency(self, stage: str) -> Quantiles:
        """Milliseconds of one stage."""
        return quantiles(self.seconds(stage), 1e3)

    def share(self, part: str, of: str) -> float:
        """What part of a stage's time another is, by their medians."""
        return self.latency(part).p50 / self.latency(of).p50

    def speedup(self, dense: Timed, stage: str) -> Quantiles:
        """The dense detector's time over this one's, round by round."""
        return quantiles([b / a for a, b in zip(self.seconds(stage), dense.seconds(stage), strict=True)])


def modules_of(detector: Any, attention: Sequence[str]) -> dict[str, list[nn.Module]]:
    """Modules of each stage, and those of the encoder's attention at the paths `attention`."""
    found = {
        stage: [m for name in names if isinstance(m := getattr(detector, name, None), nn.Module)]
        for stage, names in STAGES.items()
    }
    return {**found, ATTENTION: [detector.get_submodule(path) for path in attention]}


def clock(
    detector: nn.Module, stages: Mapping[str, Sequence[nn.Module]], run: Callable[[], object]
) -> dict[str, float]:
    """Seconds of one call, by stage and whole."""
    whole, parts = clock_parts(next(detector.parameters()).device, stages, run)
    return {**parts, WHOLE: whole}


def in_turn(calls: Sequence[Callable[[], dict[str, float]]], *, warmup: int, repeats: int) -> list[Timed]:
    """Call all variants in turn, `warmup` rounds that do not count and `repeats` that do."""
    for _ in range(warmup):
        for call in calls:
            call()
    rounds = [[call() for call in calls] for _ in range(repeats)]
    return [Timed(tuple(one[place] for one in rounds)) for place in range(len(calls))]


@contextmanager
def caught(modules: Sequence[nn.Module]) -> Iterator[list[Callable[[], object]]]:
    """Catch what goes into modules during a call, as functions that call them with it again."""
    found: list[Callable[[], object]] = []

    def catching(forward: Forward) -> Forward:
        def call(*inputs: Any, **named: Any) -> Any:
            kept, options = _copied(inputs), _copied(named)
            found.append(lambda: forward(*kept, **options))
            return forward(*inputs, **named)

        return call

    with around(dict.fromkeys(modules, catching)):
        yield found


def _copied(value: Any) -> Any:
    """The same inputs with tensors of their own, for a module may write into what it gets."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(one) for one in value)
    return {key: _copied(one) for key, one in value.items()} if isinstance(value, dict) else value


def calls_of(stages: Mapping[str, Sequence[nn.Module]], run: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Calls of each stage alone, with what it gets in `run`."""
    found: dict[str, Callable[[], object]] = {}
    for stage, modules in stages.items():
        with caught(modules) as calls:
            run()

        def again(calls: Sequence[Callable[[], object]] = tuple(calls)) -> None:
            for call in calls:
                call()

        found[stage] = again
    return found


def needs(variants: Sequence[Mapping[str, Callable[[], object]]], device: torch.device) -> list[dict[str, Need]]:
    """FLOPs and peak memory of each call of each variant.

    The memory of all comes before the first count of FLOPs, which leaves holes in the heap that later peaks would show.
    """
    peaks = iter(peak_memory([call for one in variants for call in one.values()], device))
    return [{stage: (trace(call), next(peaks)) for stage, call in one.items()} for one in variants]


def stages_of(
    stages: Mapping[str, Sequence[nn.Module]],
    timed: Timed,
    dense: Timed,
    needed: Mapping[str, Need],
) -> tuple[Stage, ...]:
    """Put together what each stage costs."""
    found = []
    for stage, modules in stages.items():
        traced, peak = needed[stage]
        found.append(
            Stage(
                name=stage,
                latency_ms=timed.latency(stage),
                speedup=timed.speedup(dense, stage),
                share=timed.share(stage, WHOLE),
                flops=traced.flops,
                flops_note=traced.flops_note,
                parameters=sum({id(p): p.numel() for m in modules for p in m.parameters()}.values()),
                activation_peak_bytes=peak.activation_bytes,
                allocator_peak_bytes=peak.allocator_bytes,
            )
        )
    return tuple(found)

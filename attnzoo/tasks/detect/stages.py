"""What a detector costs stage by stage: backbone, encoder, decoder, and the encoder's attention within the encoder.

Two detectors are called in turn, so that the noise of the machine falls on both alike, and the calls of each stage's
modules are timed within. FLOPs and peak memory are those of each stage called alone with the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attnzoo.bench import measure
from attnzoo.bench.measure import Forward, Run, around, clock_parts, quantiles
from attnzoo.bench.memory import Peak, peak_memory
from attnzoo.bench.record import Quantiles, Stage
from attnzoo.bench.trace import Trace, trace

Modules = Mapping[str, Sequence[nn.Module]]
Seconds = Mapping[str, Sequence[float]]
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


def modules_of(detector: Any, attention: Sequence[str]) -> dict[str, list[nn.Module]]:
    """Modules of each stage, and those of the encoder's attention at the paths `attention`."""
    found = {
        stage: [m for name in names if isinstance(m := getattr(detector, name, None), nn.Module)]
        for stage, names in STAGES.items()
    }
    return {**found, ATTENTION: [detector.get_submodule(path) for path in attention]}


def in_turn(
    calls: Mapping[Run, Modules], device: torch.device, *, warmup: int, repeats: int
) -> list[dict[str, list[float]]]:
    """Call detectors in turn and give the seconds of each call that counts, by stage and whole.

    `calls` are one of each detector, with the modules of its stages.
    """
    found: dict[Run, list[dict[str, float]]] = {call: [] for call in calls}

    def clock(call: Run) -> float:
        whole, parts = clock_parts(device, calls[call], call)
        found[call].append({**parts, WHOLE: whole})
        return whole

    measure.in_turn(list(calls), clock, warmup=warmup, repeats=repeats, min_seconds=0.0)
    return [{stage: [one[stage] for one in rounds] for stage in rounds[0]} for rounds in found.values()]


def speedup(own: Seconds, dense: Seconds, stage: str) -> Quantiles:
    """The dense detector's time over this one's, round by round."""
    return quantiles([b / a for a, b in zip(own[stage], dense[stage], strict=True)])


def calls_of(stages: Modules, run: Run) -> dict[str, Run]:
    """Calls of each stage alone, with what it gets in `run`."""
    found: dict[str, list[Run]] = {}
    for stage, modules in stages.items():
        with around(dict.fromkeys(modules, partial(_caught, found.setdefault(stage, [])))):
            run()
    return {stage: partial(_all, calls) for stage, calls in found.items()}


def _caught(calls: list[Run], forward: Forward) -> Forward:
    """Let `forward` leave calls of it with the same inputs, in tensors of their own: a module may write into them."""

    def call(*inputs: Any, **named: Any) -> Any:
        kept, options = tree_map_only(Tensor, Tensor.clone, (inputs, named))
        calls.append(partial(forward, *kept, **options))
        return forward(*inputs, **named)

    return call


def _all(calls: Sequence[Run]) -> None:
    for call in calls:
        call()


def needs(calls: Sequence[Mapping[str, Run]], device: torch.device) -> list[dict[str, Need]]:
    """FLOPs and peak memory of each call of each detector.

    The memory of all comes before the first count of FLOPs, which leaves holes in the heap that later peaks would show.
    """
    peaks = iter(peak_memory([call for one in calls for call in one.values()], device))
    return [{stage: (trace(call), next(peaks)) for stage, call in one.items()} for one in calls]


def stages_of(stages: Modules, own: Seconds, dense: Seconds, needed: Mapping[str, Need]) -> tuple[Stage, ...]:
    """Put together what each stage costs."""
    found = []
    whole = quantiles(own[WHOLE]).p50
    for stage, modules in stages.items():
        traced, peak = needed[stage]
        found.append(
            Stage(
                name=stage,
                latency_ms=quantiles(own[stage], 1e3),
                speedup=speedup(own, dense, stage),
                share=quantiles(own[stage]).p50 / whole,
                flops=traced.flops,
                flops_note=traced.flops_note,
                parameters=sum({id(p): p.numel() for m in modules for p in m.parameters()}.values()),
                activation_peak_bytes=peak.activation_bytes,
                allocator_peak_bytes=peak.allocator_bytes,
            )
        )
    return tuple(found)

"""Measure one operation beside PyTorch's own ways of doing the same work: gate first, then all in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attnzoo.bench import gate as gates
from attnzoo.bench.gate import gate_message
from attnzoo.bench.isolate import is_out_of_memory
from attnzoo.bench.measure import clock_for, in_turn, quantiles
from attnzoo.bench.record import Gate
from attnzoo.bench.task import Cell, OnProgress, Result
from attnzoo.bench.words import one_line
from attnzoo.kernels.dispatch import record_paths
from attnzoo.tasks.operations.cases import Function, Work, work
from attnzoo.tasks.operations.config import OperationsConfig
from attnzoo.tasks.operations.record import Ceilings, OperationCost, Rival

COPIED_BYTES = {"cuda": 2**31, "cpu": 2**28}
MULTIPLIED = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrices
WARMUP = 3


def measure(config: OperationsConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Measure the operation that `cell` asks for."""
    case = config.operations[cell.asks["operation"]]
    device = torch.device(config.device)
    torch.compiler.reset()  # or rivals of later cases would run by what was compiled for earlier shapes
    say("gate and times")
    result = _measured(config, work(config, case), device, Ceilings.model_validate(given["ceilings"]))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def ceilings(config: OperationsConfig) -> Ceilings:
    """What the device reaches: copy a large tensor and multiply large matrices, as often as a case is run."""
    device = torch.device(config.device)
    clock, dtype = clock_for(device), getattr(torch, config.dtype)
    source = torch.randn(COPIED_BYTES[device.type] // 2, device=device, dtype=torch.float16)
    target = torch.empty_like(source)
    size = MULTIPLIED[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for call in (lambda: target.copy_(source), lambda: a @ b):
        times = in_turn([call], clock, warmup=1, repeats=config.repeats, min_seconds=config.min_seconds)[0]
        seconds.append(quantiles(times).p50)
    return Ceilings(
        bytes_per_second=2 * source.numel() * source.element_size() / seconds[0],
        flops_per_second=2 * size**3 / seconds[1],
    )


def _measured(config: OperationsConfig, task: Work, device: torch.device, limits: Ceilings) -> Result:
    """Gate first, then times of the operation and its rivals in turn."""
    known: dict[str, Any] = {}
    try:
        dtype = getattr(torch, config.dtype)
        for module in task.modules:
            module.to(device, None if module is task.oracle else dtype)
        sets = _inputs(config, task, device, dtype)
        with torch.inference_mode() if not task.backward else nullcontext():
            known["gate"], known["backends"] = _gate(task, sets[0])
            if not known["gate"].passed:
                return Result(status="failed", message=gate_message("gate", known["gate"]), **known)
            cost = _times(config, task, sets, device, limits)
        return Result(status="ok", costs={"training" if task.backward else "forward": cost}, **known)
    except Exception as error:  # of Triton's, of the compiler's: the next case may still run
        status: Any = "oom" if is_out_of_memory(error) else "failed"
        return Result(status=status, message=f"{type(error).__name__}: {error}", **known)


def _inputs(config: OperationsConfig, task: Work, device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """As many sets as take `spread_bytes`, of random numbers all of them."""
    generator = torch.Generator(device).manual_seed(config.seed)
    size = sum(torch.Size(shape).numel() for shape, _ in task.shapes) * dtype.itemsize
    sets = []
    for _ in range(max(-(-config.spread_bytes // size), 1)):
        made = [torch.randn(s, generator=generator, device=device, dtype=torch.float32) * d for s, d in task.shapes]
        sets.append([x.to(dtype).requires_grad_(task.backward) for x in made])
    return sets


def _gate(task: Work, inputs: Sequence[Tensor]) -> tuple[Gate, tuple[str, ...]]:
    """Compare outputs, and gradients where there are any, with the oracle in float64; give the paths taken, too."""
    some = [x.detach()[: task.checked] if x.dim() > 1 else x.detach() for x in inputs]
    with record_paths() as paths:
        got = _all_of(task.run, some, task.backward)
    expected = _all_of(task.oracle, [x.double() for x in some], task.backward)
    tolerance = gates.TOLERANCE[inputs[0].dtype]
    gate = gates.compare(got, expected, "the definition in float64", tolerance)
    return gate, tuple(f"{op}: {path}" for op, path in Counter(paths))


def _all_of(function: Function, inputs: Sequence[Tensor], backward: bool) -> dict[str, Tensor]:
    leaves = [x.requires_grad_(backward) for x in inputs]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    found = {f"output {i}": x for i, x in enumerate(outputs)}
    found |= {f"{name}, last eighth": _last_eighth(x, -1 if i else -2) for i, (name, x) in enumerate(found.items())}
    if backward:
        cotangent = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0)).to(outputs[0])
        grads = torch.autograd.grad(outputs[0], leaves, cotangent)
        found |= {f"gradient {i}": g for i, g in enumerate(grads)}
    return {name: x.detach() for name, x in found.items()}


def _last_eighth(x: Tensor, dim: int) -> Tensor:
    """The last of the tokens: an average over many keys is small beside one over few, and must be right by its size."""
    count = max(x.shape[dim] // 8, 1)
    return x.narrow(dim, x.shape[dim] - count, count)


def _times(
    config: OperationsConfig, task: Work, sets: list[list[Tensor]], device: torch.device, limits: Ceilings
) -> OperationCost:
    own, graph = _round(task.run, task, sets, device)
    rounds, rivals, names, graphs = [own], [], [], []
    for name, function in task.rivals.items():
        try:
            ready, as_graph = _round(function, task, sets, device)
            rounds.append(ready)
            names.append(name)
            graphs.append(as_graph)
        except Exception as error:  # a backend that is not there, a compiler that fails, too little memory
            rivals.append(Rival(name=name, latency_ms=None, message=one_line(f"{type(error).__name__}: {error}")))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    taken = in_turn(rounds, clock_for(device), warmup=1, repeats=config.repeats, min_seconds=config.min_seconds)
    times = [[t / len(sets) for t in each] for each in taken]
    latency = quantiles(times[0], 1e3)
    measured = [
        Rival(name=n, latency_ms=quantiles(t, 1e3), graph=g) for n, t, g in zip(names, times[1:], graphs, strict=True)
    ]
    best = min(range(len(names)), key=lambda i: quantiles(times[i + 1]).p50, default=None)
    alike = best is not None and graphs[best] == graph
    seconds = latency.p50 / 1e3
    shares: dict[str, Any] = {}
    if not task.backward:
        shares["share_of_bandwidth"] = task.bytes / seconds / limits.bytes_per_second
        if task.flops is not None:
            shares["share_of_arithmetic"] = task.flops / seconds / limits.flops_per_second
    speedup = None
    if best is not None and alike:
        speedup = quantiles([b / a for a, b in zip(times[0], times[best + 1], strict=True)])
    return OperationCost(
        latency_ms=latency,
        graph=graph,
        sets=len(sets),
        rivals=(*measured, *rivals),
        fastest=None if best is None else names[best],
        speedup=speedup,
        bytes=task.bytes,
        flops=task.flops,
        ceilings=limits,
        **shares,
    )


def _round(
    function: Function, task: Work, sets: list[list[Tensor]], device: torch.device
) -> tuple[Callable[[], object], bool]:
    """One call on every set; on CUDA as a graph where it can be one, so that launches take no time."""

    def once() -> None:
        for inputs in sets:
            out = function(*inputs)
            if task.backward:
                torch.autograd.grad(out, inputs, torch.ones_like(out))

    for _ in range(WARMUP):  # autotuning and compilation happen here
        once()
    if device.type != "cuda":
        return once, False
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            once()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        torch.cuda.synchronize(device)
        return once, False
    return graph.replay, True

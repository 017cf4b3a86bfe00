"""Measure a config's operations, one after another, each line on disk before the next begins."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from attnzoo import files
from attnzoo.bench import gate as gates
from attnzoo.bench.environment import environment
from attnzoo.bench.jobs import gate_message, is_out_of_memory, set_threads
from attnzoo.bench.lines import append_line
from attnzoo.bench.measure import Clock, clock_for, quantiles
from attnzoo.bench.record import CONFIG_FILE, FINAL, RECORDS_FILE, Gate
from attnzoo.bench.summary import one_line
from attnzoo.errors import ConfigError
from attnzoo.extras import require
from attnzoo.kernels.dispatch import record_paths
from attnzoo.tasks.operations.cases import Function, Work, work
from attnzoo.tasks.operations.config import OperationsConfig
from attnzoo.tasks.operations.record import Ceilings, OperationRecord, Rival, read_records

COPIED_BYTES = {"cuda": 2**31, "cpu": 2**28}
MULTIPLIED = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrices
WARMUP = 3


def run(config: OperationsConfig, command: str, console: Console | None = None) -> Path:
    """Measure what the config's folder does not hold yet, and give the records' file.

    Raises
    ------
    ConfigError
        If the device is not there, or the folder holds records of another config.
    """
    require("matplotlib")
    config.check_folder()
    console = console or Console(stderr=True)
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {config.device!r} asked for, but PyTorch sees no CUDA device here; use device=cpu")
    set_threads(config.threads)
    with files.locked(config.folder):
        path = config.folder / RECORDS_FILE
        if config.fresh and path.exists():
            os.replace(path, path.with_name("records.old.jsonl"))
        held = read_records(path, mend=True) if path.exists() else []
        if any(record.config_hash != config.hash for record in held):
            raise ConfigError(
                f"{config.folder} holds records of another config. Give another folder with output=PATH, or set them "
                "aside with fresh=true."
            )
        (config.folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        done = {record.label for record in held if record.status in FINAL}
        todo = [case for case in config.operations if case.label not in done]
        if done:
            console.print(f"{len(done)} operations of an earlier run are kept, {len(todo)} to measure", highlight=False)
        where = environment(config.device, config.threads)
        ceilings = _ceilings(config, device) if todo else None
        for case in track(todo, "operations", console=console):
            start = time.monotonic()
            torch.compiler.reset()  # or rivals of later cases would run by what was compiled for earlier shapes
            found = _measured(config, work(config, case), device, ceilings)
            append_line(
                path,
                OperationRecord(
                    config_hash=config.hash,
                    benchmark=config.name,
                    command=command,
                    label=case.label,
                    case=case.model_dump(mode="json"),
                    utc=datetime.now(UTC).isoformat(timespec="seconds"),
                    seconds=round(time.monotonic() - start, 3),
                    environment=where,
                    dtype=config.dtype,
                    **found,
                ),
            )
            why = f": {one_line(found['message'])}" if found["message"] else ""
            console.print(f"{case.label}: {found['status']}{why}", highlight=False, markup=False, soft_wrap=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return path


def _ceilings(config: OperationsConfig, device: torch.device) -> Ceilings:
    """Copy a large tensor and multiply large matrices, as often as a case is run."""
    clock, dtype = clock_for(device), getattr(torch, config.dtype)
    source = torch.randn(COPIED_BYTES[device.type] // 2, device=device, dtype=torch.float16)
    target = torch.empty_like(source)
    size = MULTIPLIED[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for call in (lambda: target.copy_(source), lambda: a @ b):
        times = _in_turn([call], clock, config)[0]
        seconds.append(quantiles(times).p50)
    return Ceilings(
        bytes_per_second=2 * source.numel() * source.element_size() / seconds[0],
        flops_per_second=2 * size**3 / seconds[1],
    )


def _measured(config: OperationsConfig, task: Work, device: torch.device, ceilings: Ceilings | None) -> dict[str, Any]:
    """All of a record that is found by running: gate first, then times of the operation and its rivals in turn."""
    found: dict[str, Any] = {
        "status": "failed", "message": "", "paths": {}, "gate": None, "graph": False, "sets": 0, "latency_ms": None,
        "rivals": (), "fastest": None, "speedup": None, "bytes": task.bytes, "flops": task.flops,
        "ceilings": ceilings, "share_of_bandwidth": None, "share_of_arithmetic": None,
    }  # fmt: skip
    try:
        dtype = getattr(torch, config.dtype)
        for module in task.modules:
            module.to(device, None if module is task.oracle else dtype)
        sets = _inputs(config, task, device, dtype)
        found["sets"] = len(sets)
        with torch.inference_mode() if not task.backward else nullcontext():
            found["gate"], found["paths"] = _gate(task, sets[0])
            if not found["gate"].passed:
                return {**found, "message": gate_message("gate", found["gate"])}
            return {**found, **_times(config, task, sets, device, ceilings)}
    except Exception as error:  # of Triton's, of the compiler's: the next case may still run
        status = "oom" if is_out_of_memory(error) else "failed"
        return {**found, "status": status, "message": f"{type(error).__name__}: {error}"}


def _inputs(config: OperationsConfig, task: Work, device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """As many sets as take `spread_bytes`, of random numbers all of them."""
    generator = torch.Generator(device).manual_seed(config.seed)
    size = sum(torch.Size(shape).numel() for shape, _ in task.shapes) * dtype.itemsize
    sets = []
    for _ in range(max(-(-config.spread_bytes // size), 1)):
        made = [torch.randn(s, generator=generator, device=device, dtype=torch.float32) * d for s, d in task.shapes]
        sets.append([x.to(dtype).requires_grad_(task.backward) for x in made])
    return sets


def _gate(task: Work, inputs: Sequence[Tensor]) -> tuple[Gate, dict[str, int]]:
    """Compare outputs, and gradients where there is a backward, with the oracle in float64."""
    some = [x.detach()[: task.checked] if x.dim() > 1 else x.detach() for x in inputs]
    with record_paths() as paths:
        got = _all_of(task.run, some, task.backward)
    expected = _all_of(task.oracle, [x.double() for x in some], task.backward)
    tolerance = gates.TOLERANCE[inputs[0].dtype]
    gate = gates.compare(got, expected, "the definition in float64", tolerance)
    return gate, {f"{op}: {path}": count for (op, path), count in Counter(paths).items()}


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
    config: OperationsConfig, task: Work, sets: list[list[Tensor]], device: torch.device, ceilings: Ceilings | None
) -> dict[str, Any]:
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
    times = [[t / len(sets) for t in each] for each in _in_turn(rounds, clock_for(device), config)]
    latency = quantiles(times[0], 1e3)
    measured = [
        Rival(name=n, latency_ms=quantiles(t, 1e3), graph=g) for n, t, g in zip(names, times[1:], graphs, strict=True)
    ]
    best = min(range(len(names)), key=lambda i: quantiles(times[i + 1]).p50, default=None)
    alike = best is not None and graphs[best] == graph
    seconds = latency.p50 / 1e3
    shares: dict[str, Any] = {}
    if ceilings is not None and not task.backward:
        shares["share_of_bandwidth"] = task.bytes / seconds / ceilings.bytes_per_second
        if task.flops is not None:
            shares["share_of_arithmetic"] = task.flops / seconds / ceilings.flops_per_second
    return {
        "status": "ok",
        "graph": graph,
        "latency_ms": latency,
        "rivals": (*measured, *rivals),
        "fastest": None if best is None else names[best],
        "speedup": None
        if best is None or not alike
        else quantiles([b / a for a, b in zip(times[0], times[best + 1], strict=True)]),
        **shares,
    }


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


def _in_turn(rounds: Sequence[Callable[[], object]], clock: Clock, config: OperationsConfig) -> list[list[float]]:
    """Seconds of each, in the order A B C A B C ..."""
    times: list[list[float]] = [[] for _ in rounds]
    for each in rounds:
        each()
    while len(times[0]) < config.repeats or sum(map(sum, times)) < config.min_seconds:
        for each, kept in zip(rounds, times, strict=True):
            kept.append(clock(each))
    return times

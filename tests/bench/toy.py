"""A task in two files: this one, and the config that the test writes; its line is its name, `tests.bench.toy:TASK`."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from attnzoo.bench import gate as gates
from attnzoo.bench.config import RunConfig
from attnzoo.bench.cost import ratios_of, side_of
from attnzoo.bench.measure import interleave, quantiles, wall_clock
from attnzoo.bench.memory import Peak
from attnzoo.bench.record import Quality, Record
from attnzoo.bench.task import Cell, Result, Task
from attnzoo.bench.trace import trace


class Config(RunConfig):
    """Matrices to multiply in lower precision."""

    task: Literal["tests.bench.toy:TASK"] = "tests.bench.toy:TASK"
    sizes: tuple[int, ...] = (16, 64)
    wrong: bool = False
    isolated: bool = True


class Digits(Quality):
    """Correct digits of a product."""

    METRIC: ClassVar[str] = "digits"
    digits: float

    def against(self, dense: Digits) -> Digits:
        return self.model_copy(update={"ratio": self.digits / dense.digits})

    @property
    def figure(self) -> str:
        return f"{self.digits:.1f}"


class Row(Record):
    """A row of the toy."""

    quality: Digits | None


def plan(config: Config) -> list[Cell]:
    """Float64 is dense, float32 the method."""
    shared = {"part": "toy", "host": "toy:matrices", "stage": "toy", "isolated": config.isolated}
    rows = [{**shared, "label": f"float{bits}", "attention": None, "is_baseline": bits == 64} for bits in (64, 32)]
    quality = [Cell(**row, kind="quality", dtype=row["label"], depends_on={"row": row["label"]}) for row in rows]
    return quality + [
        Cell(
            **row,
            kind="cost",
            tokens=size,
            dtype=row["label"],
            depends_on={"row": row["label"], "size": size, "wrong": config.wrong},
        )
        for size in config.sizes
        for row in rows
    ]


def measure(config: Config, cell: Cell, given, say) -> Result:
    """Multiply."""
    dtype = getattr(torch, cell.dtype)
    if cell.kind == "quality":
        return Result(status="ok", quality=Digits(digits=-math.log10(torch.finfo(dtype).eps), note="by its eps"))
    dense = torch.nn.Linear(cell.tokens, cell.tokens).double()
    candidate = torch.nn.Linear(cell.tokens, cell.tokens).double()
    candidate.load_state_dict(dense.state_dict())
    candidate.to(dtype)
    x = torch.randn(4, cell.tokens, dtype=torch.float64)
    calls = [lambda: candidate(x.to(dtype)), lambda: dense(x)]
    got, expected = (call().double() + config.wrong * index for index, call in enumerate(calls))
    gate = gates.compare({"product": got}, {"product": expected}, "float64", 1e-4)
    if not gate.passed:
        return Result(status="failed", message=gates.gate_message("gate", gate), gate=gate)
    times = interleave(*calls, wall_clock, warmup=1, repeats=3, min_seconds=0)
    peak = Peak(1000, 1000, "none", "")
    own, base = (
        side_of(model, [], quantiles(seconds, 1e3), 4, trace(call), peak)
        for model, seconds, call in zip((candidate, dense), (times.a, times.b), calls, strict=True)
    )
    cost = {"candidate": own, "baseline": base, "ratios": ratios_of(own, base, quantiles(times.ratios))}
    return Result(status="ok", gate=gate, costs={"forward": {**cost, "uncounted_ops": ()}})


TASK = Task(
    name="tests.bench.toy:TASK",
    ref="tests.bench.toy:TASK",
    config=Config,
    plan=plan,
    measure=measure,
    record=Row,
    preload=lambda config: ("tests.bench.toy",),
)

"""Single operations, each beside the fastest that PyTorch has for the same work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.bench.highlights import SPEED, Highlight, highlight, speed
from attnzoo.bench.task import Cell, Task
from attnzoo.extras import require
from attnzoo.tasks.operations.config import OperationsConfig
from attnzoo.tasks.operations.record import Record
from attnzoo.tasks.operations.report import HOW_TO_READ, results_table, rivals_section, speed_plot, verdict
from attnzoo.tasks.operations.run import ceilings, measure


def plan(config: OperationsConfig) -> list[Cell]:
    """A cell per operation; all in this process, for what the device reaches is measured once for all."""
    shared = config.model_dump(mode="json", exclude={"task", "name", "operations", "output", "fresh"})
    return [
        Cell(
            part="operations",
            kind="cost",
            label=case.label,
            phases=("training",) if getattr(case, "backward", False) else ("forward",),
            attention=None,
            options=case.model_dump(mode="json"),
            is_baseline=False,
            host=f"width {config.width}, {config.heads} heads",
            dtype=config.dtype,
            depends_on={**shared, "case": case.model_dump(mode="json")},
            asks={"operation": index},
            stage="operations",
            threads=config.threads,
            isolated=False,
        )
        for index, case in enumerate(config.operations)
    ]


def prepare(config: OperationsConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """What the device reaches, once for all operations."""
    return {"ceilings": ceilings(config).model_dump()} if cells else {}


METHODS = {"module": "padre", "scored": "flash_scored"}  # the method that is timed; other operations serve several


def highlights(records: Sequence[Record]) -> list[Highlight]:
    """What the results page shows: speed-ups of attention layers and of scored attention over PyTorch's fastest."""
    found = []
    for record in (record for record in records if record.options["op"] in METHODS):
        asked, cost = record.options, record.cost
        beside = "" if cost is None or cost.fastest is None else f" beside {cost.fastest}"
        workload = f"{record.phase}{beside}, {record.dtype}"
        figures = {} if cost is None or cost.speedup is None else {SPEED: speed(cost.speedup)}
        other: dict[str, Any] = {"method": METHODS[asked["op"]], "host": record.host}
        other |= {"options": {"degree": asked["degree"]} if "degree" in asked else {}}
        other |= {"tokens": asked.get("tokens") or asked["keys"]}
        other |= {"typical": asked.get("beside", "fused") == "fused"}
        found.append(highlight(record, "operations", workload, figures, **other))
    return found


TASK = Task(
    name="operations",
    ref="attnzoo.tasks.operations.task:TASK",
    config=OperationsConfig,
    plan=plan,
    measure=measure,
    prepare=prepare,
    check=lambda config: require("matplotlib"),
    record=Record,
    columns=results_table,
    how_to_read=HOW_TO_READ,
    verdict=verdict,
    plots=lambda records: [("Speed-up over the fastest rival", speed_plot(records))],
    sections=rivals_section,
    highlights=highlights,
    others="kernels that several methods use, each beside PyTorch's fastest",
)

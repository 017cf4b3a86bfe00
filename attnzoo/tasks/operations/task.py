"""Single operations, each beside the fastest that PyTorch has for the same work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.bench.task import Cell, Task
from attnzoo.extras import require
from attnzoo.tasks.operations.config import OperationsConfig
from attnzoo.tasks.operations.record import Record
from attnzoo.tasks.operations.report import HOW_TO_READ, results_table, rivals_section, speed_plot
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
    plots=lambda records: [("Speed-up over the fastest rival", speed_plot(records))],
    sections=rivals_section,
)

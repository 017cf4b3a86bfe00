"""What a suite measures of a vision model, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.bench.attentions import row_of
from attnzoo.bench.cost import attention_paths
from attnzoo.bench.task import Cell, OnProgress, Result
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require
from attnzoo.tasks.classify.build import check_model_name
from attnzoo.tasks.classify.cost import measure_cost
from attnzoo.tasks.classify.small import IMAGE_SIDE, measure_quality
from attnzoo.tasks.classify.workload import PART, Workload, cost_cells

if TYPE_CHECKING:
    from attnzoo.tasks.suite import SuiteConfig

PRELOAD = ("attnzoo.tasks.suite", "timm")


def plan(config: SuiteConfig) -> list[Cell]:
    """Quality of every attention, then cost by token count; the dense baseline first in each."""
    who: list[int | None] = [None, *range(len(config.attentions))]
    cells = [_quality_cell(config, index) for index in who] if config.quality is not None else []
    shared = (config.model, config.baseline, config.attentions)
    return cells + cost_cells(config, config.costs or (config.cost,), *shared, named=bool(config.costs))


def _quality_cell(config: SuiteConfig, index: int | None) -> Cell:
    quality, spec = config.quality, None if index is None else config.attentions[index]
    whose = row_of(spec, config.baseline.label, PART)
    assert quality is not None
    how = quality.model_dump(mode="json", exclude={"workers", "timeout_seconds"})
    about = {"attention": whose["attention"], "options": whose["options"]}
    return Cell(
        **whose,
        kind="quality",
        host=f"{quality.model.library}:{quality.model.name}",
        dtype="float32",
        depends_on={"quality": how, "fused": config.baseline.fused, "device": config.device, **about},
        asks={"attention": index},
        stage="train",
        timeout=quality.timeout_seconds,
        threads=quality.threads,
        workers=quality.workers,
    )


def problems(config: SuiteConfig) -> list[str]:
    """What the schema cannot find: the host's name and the shapes of the quality model."""
    require("timm", "matplotlib")
    found: list[str] = []
    models = {"model.name": config.model.name}
    if config.quality is not None:
        models["quality.model.name"] = config.quality.model.name
        side = IMAGE_SIDE[config.quality.dataset]
        if side % config.quality.model.patch_size:
            found.append(
                f"quality.model.patch_size: {config.quality.model.patch_size} does not divide the {side} pixels of "
                f"{config.quality.dataset}"
            )
    for key, model in models.items():
        try:
            check_model_name(model)
        except ConfigError as error:
            found.append(f"{key}: {error}")
    return found or _host_problems(config)


def _host_problems(config: SuiteConfig) -> list[str]:
    """What shows only when the host is built, at its smallest."""
    try:
        costs = [cell for cell in plan(config) if cell.kind == "cost"]
        model = _workload(min(costs, key=lambda cell: cell.tokens)).build() if costs else None
    except Exception as error:  # a factory of timm's may raise anything
        return [f"model: {error if isinstance(error, AttnZooError) else f'{type(error).__name__}: {error}'}"]
    if model is not None and not attention_paths(model):
        return [f"model.name: {config.model.name!r} has no attention layer that attnzoo can swap"]
    return []


def _workload(cell: Cell) -> Workload:
    return Workload.model_validate(cell.asks["workload"])


def measure(config: SuiteConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Measure the cost of one attention in one workload, or train and test it."""
    if cell.kind == "cost":
        return measure_cost(_workload(cell), say)
    index = cell.asks["attention"]
    spec, quality = None if index is None else config.attentions[index], config.quality
    assert quality is not None
    return measure_quality(quality, spec, config.baseline.fused, Path(given["data"]), config.device, say)

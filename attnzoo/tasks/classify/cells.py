"""What a suite measures of a vision model, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnzoo.bench.cost import attention_paths
from attnzoo.bench.task import Cell, Result, Say
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require
from attnzoo.tasks.classify import small as classify
from attnzoo.tasks.classify.cost import build_host, measure_cost, measure_quality

if TYPE_CHECKING:
    from attnzoo.tasks.suite import SuiteConfig

PART = "vision"
PRELOAD = ("attnzoo.tasks.suite", "timm")


def plan(config: SuiteConfig) -> list[Cell]:
    """Quality of every attention, then cost by token count; the dense baseline first in each."""
    who: list[int | None] = [None, *range(len(config.attentions))]
    cells = [_quality_cell(config, index) for index in who] if config.quality is not None else []
    return cells + [
        _cost_cell(config, index, tokens)
        for tokens in config.cost.tokens
        for index in who
        if _is_measured(config, index, tokens)
    ]


def _is_measured(config: SuiteConfig, index: int | None, tokens: int) -> bool:
    """Whether a row has a cost at a token count; the dense baseline has at all that all attentions share."""
    own = [attention.tokens for attention in config.attentions]
    if index is None:
        return any(counts is None or tokens in counts for counts in own)
    counts = own[index]
    return counts is None or tokens in counts


def _row(config: SuiteConfig, index: int | None) -> dict[str, Any]:
    """The part of a cell that says whose it is."""
    spec = None if index is None else config.attentions[index]
    return {
        "part": PART,
        "label": config.baseline.label if spec is None else spec.label,
        "attention": None if spec is None else spec.name,
        "options": {} if spec is None else spec.swap,
        "is_baseline": spec is None,
        "asks": {"attention": index},
    }


def _quality_cell(config: SuiteConfig, index: int | None) -> Cell:
    quality, row = config.quality, _row(config, index)
    assert quality is not None
    how = quality.model_dump(mode="json", exclude={"workers", "timeout_seconds"})
    return Cell(
        **row,
        kind="quality",
        host=f"{quality.host.library}:{quality.host.model}",
        dtype="float32",
        depends_on={"quality": how, "fused": config.baseline.fused, "device": config.device, **_attention(row)},
        stage="train",
        timeout=quality.timeout_seconds,
        threads=quality.threads,
        workers=quality.workers,
    )


def _cost_cell(config: SuiteConfig, index: int | None, tokens: int) -> Cell:
    row, cost = _row(config, index), config.cost
    spec = None if index is None else config.attentions[index]
    how = cost.model_dump(mode="json", exclude={"tokens", "batch", "timeout_seconds"})
    alone = ", its first attention layer alone" if cost.of == "layer" else ""
    fused = config.baseline.fused if spec is None or spec.fused is None else spec.fused
    return Cell(
        **row,
        kind="cost",
        tokens=tokens,
        phases=("training",) if cost.gradient else ("forward",),
        host=f"{config.host.library}:{config.host.model}{alone}",
        dtype=cost.dtype,
        scope=cost.of,
        depends_on={
            "cost": how,
            "host": config.host.model_dump(mode="json"),
            "tokens": tokens,
            "batch": cost.batch[tokens],
            "fused": [config.baseline.fused, fused],
            "seed": config.seed,
            "device": config.device,
            "threads": config.threads,
            **_attention(row),
        },
        stage="time",
        timeout=cost.timeout_seconds,
        threads=config.threads,
        weight=3 + tokens / 500 + (tokens / 1000) ** 2,
    )


def _attention(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention": row["attention"], "options": row["options"]}


def problems(config: SuiteConfig) -> list[str]:
    """What the schema cannot find: the host's name and the shapes of the quality model."""
    require("timm", "matplotlib")
    found: list[str] = []
    hosts = {"host.model": config.host.model}
    if config.quality is not None:
        hosts["quality.host.model"] = config.quality.host.model
        side = classify.IMAGE_SIDE[config.quality.dataset]
        if side % config.quality.host.patch_size:
            found.append(
                f"quality.host.patch_size: {config.quality.host.patch_size} does not divide the {side} pixels of "
                f"{config.quality.dataset}"
            )
    for key, model in hosts.items():
        try:
            classify.check_model_name(model)
        except ConfigError as error:
            found.append(f"{key}: {error}")
    return found or _host_problems(config)


def _host_problems(config: SuiteConfig) -> list[str]:
    """What shows only when the host is built, at its smallest."""
    try:
        model = build_host(config, min(config.cost.tokens))
    except Exception as error:  # a factory of timm's may raise anything
        return [f"host: {error if isinstance(error, AttnZooError) else f'{type(error).__name__}: {error}'}"]
    if not attention_paths(model):
        return [f"host.model: {config.host.model!r} has no attention layer that attnzoo can swap"]
    return []


def measure(config: SuiteConfig, cell: Cell, given: Mapping[str, Any], say: Say) -> Result:
    """Measure the cost of one attention at one token count, or train and test it."""
    index = cell.asks["attention"]
    spec = None if index is None else config.attentions[index]
    if cell.kind == "quality":
        return measure_quality(config, spec, given["data"], say)
    return measure_cost(config, spec, cell.tokens, say)

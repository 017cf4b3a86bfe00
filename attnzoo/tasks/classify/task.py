"""Classifiers as a task: train/classify.py trains them; this tests them and measures what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnzoo import files
from attnzoo.bench.attentions import AttentionConfig, row_of
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.errors import ConfigError
from attnzoo.tasks.classify import page, score
from attnzoo.tasks.classify.build import build_model
from attnzoo.tasks.classify.config import ClassifyConfig
from attnzoo.tasks.classify.cost import measure_cost
from attnzoo.tasks.classify.cost_config import BaselineConfig, HostConfig
from attnzoo.tasks.classify.model import ABOUT
from attnzoo.tasks.classify.workload import PART, Workload, cost_cells
from attnzoo.tasks.records import Record

OWN = ("patch_size", "weight_init")  # an initialization may make the classifier zero, and that passes no gate


def plan(config: ClassifyConfig) -> list[Cell]:
    """The quality of every attention that is trained, and its cost in every workload; the dense baseline first."""
    specs = {run.label: run.attention for run in config.runs()}
    cells = [
        Cell(
            **row_of(spec, config.baseline, PART),
            kind="quality",
            host=f"{config.model.library}:{config.model.name}",
            dtype="float32",
            depends_on={"runs": [[one.hash, one.weights] for one in config.runs() if one.label == label]},
            stage="test",
            threads=config.threads,
            isolated=False,
            renewed=True,  # where it was trained again
        )
        for label, spec in specs.items()
    ]
    return cells + (_cost_cells(config) if config.costs else [])


def _cost_cells(config: ClassifyConfig) -> list[Cell]:
    model, data = config.model, config.data
    sizes: dict[str, Any] = {"channels": data.channels, "classes": _classes(config)}
    built: Any = build_model(model.name, image_size=data.image_size, options=model.options, seed=0, **sizes)
    (patch, _), prefix = built.patch_embed.patch_size, int(getattr(built, "num_prefix_tokens", 0))
    options = {key: value for key, value in model.options.items() if key not in OWN}
    attentions = []
    for spec in {run.label: run.attention for run in config.runs()}.values():
        if spec is not None:
            own = spec.options.get("tokens")  # weights for one number of tokens, the prefix included
            tokens = None if own is None else (own - prefix,)
            shared = {key: getattr(spec, key) for key in ("name", "options", "where", "label")}
            attentions.append(AttentionConfig(**shared, tokens=tokens))
    host = HostConfig(name=model.name, patch_size=patch, options=options, **sizes)
    try:
        return cost_cells(config, config.costs, host, BaselineConfig(label=config.baseline), attentions, named=True)
    except ConfigError as error:
        raise ConfigError(f"costs: {error}") from error


def _classes(config: ClassifyConfig) -> int:
    """How many classes the trained models tell apart; before there is one, what the config says, or ImageNet's."""
    for run in config.runs():
        if (run.final / ABOUT).is_file():
            return int(files.read_json(run.final / ABOUT)["classes"])
    return config.data.classes or 1000


def measure(config: ClassifyConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Test an attention's trained models, or time a model with it."""
    if cell.kind == "quality":
        return score.measure_quality(config, cell.label, say)
    return measure_cost(Workload.model_validate(cell.asks["workload"]), say)


def unsupported(config: ClassifyConfig) -> set[tuple[str, str]]:
    """The rows that are expected to be unsupported."""
    return {(PART, attention.label) for attention in config.attentions if attention.expect == "unsupported"}


TASK = Task(
    name="classify",
    ref="attnzoo.tasks.classify.task:TASK",
    config=ClassifyConfig,
    plan=plan,
    measure=measure,
    prepare=score.prepare,
    assist=score.assist,
    check=score.check,
    record=Record,
    preload=lambda config: ("attnzoo.tasks.classify.task", "timm"),
    expected=unsupported,
    plots=page.plots,
    sections=lambda records: [page.mistakes(records)],
)

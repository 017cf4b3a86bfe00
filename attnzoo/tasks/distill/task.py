"""Distillation as a task: every mixer in every choice of layers, repaired and scored beside its teacher."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from attnzoo.bench.attentions import own_sources, row_of
from attnzoo.bench.config import digest
from attnzoo.bench.highlights import Highlight, of_records
from attnzoo.bench.plots import mean_curves
from attnzoo.bench.record import Record
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require
from attnzoo.processes import refuse_launcher
from attnzoo.tasks.classify.config import slug
from attnzoo.tasks.distill.classifier import Classifier
from attnzoo.tasks.distill.config import SCRATCH, DistillConfig, Layers, RepairedMixer
from attnzoo.tasks.distill.quality import Point, RepairedQuality, Trial
from attnzoo.tasks.distill.subject import subject_of
from attnzoo.tasks.distill.trial import SENSITIVITY, TRIALS, from_scratch, repaired


class DistillRecord(Record):
    """A row of a distillation."""

    quality: RepairedQuality | None


def plan(config: DistillConfig) -> list[Cell]:
    """The teacher, then each mixer in each choice of layers, repaired and, where asked for, from scratch."""
    vision, of_transformers = config.vision, config.language or config.features
    host = f"{vision.model.library}:{vision.model.name}" if vision else ""
    if of_transformers is not None:
        host = f"transformers:{of_transformers.model}"
    how = config.inputs
    shared: dict[str, Any] = {
        "kind": "quality",
        "host": host,
        "dtype": "float32",
        "threads": config.threads,
        "workers": config.workers,
        "isolated": config.workers > 1,
        "timeout": config.timeout_seconds,
        "renewed": True,  # a trial that is done is kept in the folder, whatever is added to its row
    }
    part = "language" if config.language else "vision"
    cells: list[Cell] = []
    common = config.model_dump(mode="json", include={"points", "sensitivity_steps"})
    common |= {"autocast": config.autocast} if config.autocast else {}
    exported = {"precisions": config.precisions} if config.precisions else {}
    cells.append(Cell(**row_of(None, config.baseline, part), **shared, depends_on={**how, **exported}, stage="score"))
    known: list[Any] = []  # networks that a row from scratch is of: how a mixer begins makes no difference to it
    for index, attention in enumerate(config.attentions):
        stages = [stage.model_dump(mode="json") for stage in config.stages_of(attention)]
        repair = {**common, "stages": stages}
        for layers in attention.layers or config.layers:
            about: dict[str, Any] = {
                "attention": [attention.name, attention.swap],
                "layers": layers.model_dump(mode="json"),
            }
            about["seeds"] = config.seeds_of(attention)
            by_cost = layers.order == "cheapest" and layers.share < 1
            if by_cost and not attention.is_mixer:
                about["chosen_by"] = _choice(config, config.chosen_by(attention))
            label = f"{attention.label} {layers.label}"
            row = {**row_of(attention, config.baseline, part), **shared, "label": label}
            asks = {"attention": index, "layers": about["layers"], "scratch": False}
            cells.append(Cell(**row, depends_on={**how, **repair, **exported, **about}, asks=asks, stage="repair"))
            steps = [[stage.samples, stage.train] for stage in config.stages_of(attention)]
            network = [attention.name, attention.options, layers, config.seeds_of(attention), steps]
            # these decide which layers are cheap
            network += [attention.init, config.stages_of(attention)[0].lr] if by_cost else []
            control = attention.scratch and attention.is_mixer and network not in known
            scratch = config.scratch
            if scratch is None or not control or (scratch.shares is not None and layers.share not in scratch.shares):
                continue
            known.append(network)
            about["scratch"] = scratch.model_dump(mode="json", exclude={"shares"})
            row, asks = {**row, "label": f"{label} {SCRATCH}"}, {**asks, "scratch": True}
            cells.append(Cell(**row, depends_on={**how, **repair, **about}, asks=asks, stage=SCRATCH))
    return cells


def _choice(config: DistillConfig, mixer: RepairedMixer) -> list[Any]:
    """What the layers of a control depend on: the mixer that chooses them."""
    found: list[Any] = [mixer.name, mixer.swap]
    found += [mixer.stages[0].lr] if mixer.stages else []  # else it is among the stages of all
    sources = own_sources(mixer.name, mixer.options) if config.imports else {}
    return [*found, sources] if sources else found


def check(config: DistillConfig) -> None:
    """Check that the model can be built, and every mixer can stand in it; raises `ConfigError` with every problem."""
    import attnzoo

    refuse_launcher()
    require("transformers" if config.language else "timm", "accelerate", "matplotlib", extra="train")
    if config.precisions:
        require("onnx", "onnxscript", "onnxruntime", extra="dev")
    subject = subject_of(config)
    teacher, problems = subject.teacher(), []
    for index, attention in enumerate(config.attentions):
        try:
            attnzoo.replace_attention(copy.deepcopy(teacher), attention.name, **attention.swap)
        except AttnZooError as error:
            problems.append(f"attentions.{index}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def prepare(config: DistillConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """With ``fresh=true`` layers are chosen and trials begun anew."""
    for begun in (TRIALS, SENSITIVITY) if config.fresh else ():
        shutil.rmtree(config.folder / begun, ignore_errors=True)
    return {}


def measure(config: DistillConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Score the teacher, or repair a swapped copy of it once per seed."""
    subject = subject_of(config)
    if cell.is_baseline:
        say("score")
        teacher = subject.teacher()
        points = (Point(stage="teacher", samples=0, seconds=0.0, **subject.score(teacher)._asdict()),)
        quantized = {}
        if isinstance(subject, Classifier):  # the config has precisions of nothing else
            quantized = subject.quantized(teacher, config.precisions, config.threads or 1)
        trial = Trial(seed=0, points=points, quantized=quantized)
        quality = RepairedQuality(metric=subject.metric, trials=(trial,), note="as it was trained")
        return Result(status="ok", quality=quality)
    attention, layers = config.attentions[cell.asks["attention"]], Layers.model_validate(cell.asks["layers"])
    # a trial depends neither on the other seeds nor on what is measured of it at the end
    how = digest({key: value for key, value in cell.depends_on.items() if key not in ("seeds", "precisions")})
    trials = []
    for seed in config.seeds_of(attention):
        folder = config.folder / TRIALS / f"{slug(cell.label)}-seed{seed}-{how}"
        run = from_scratch if cell.asks["scratch"] else repaired
        trials.append(run(config, subject, attention, layers, seed, folder, partial(_say, say, seed)))
    control = cell.asks["scratch"] or not attention.is_mixer
    note = _note(config, cell.asks["scratch"], attention)
    quality = RepairedQuality(metric=subject.metric, trials=tuple(trials), control=control, note=note)
    return Result(status="ok", quality=quality)


def _say(say: OnProgress, seed: int, text: str) -> None:
    say(f"seed {seed}: {text}")


def _note(config: DistillConfig, scratch: bool, attention: RepairedMixer) -> str:
    if not attention.is_mixer:
        return "a control: nothing is repaired"
    stages = " then ".join(f"{stage.objective} on {stage.samples:,}" for stage in config.stages_of(attention))
    what = f"sequences of {config.language.tokens} tokens" if config.language else "images"
    computed = f", computed in {config.autocast}" if config.autocast else ""
    return f"{SCRATCH}, on as many {what}{computed}" if scratch else f"repaired by {stages} {what}{computed}"


def plots(records: Sequence[DistillRecord]) -> list[tuple[str, str]]:
    """The repair curves."""
    lines = {r.label: r.quality.curves for r in records if r.quality is not None and not r.is_baseline}
    return [("Share of the gap to the teacher that is closed", mean_curves(lines, "samples seen", "gap closed, %"))]


def highlights(records: Sequence[DistillRecord]) -> list[Highlight]:
    """What the results page shows: repaired models, and no controls."""
    results = [
        record
        for record in records
        if not (record.quality.is_control if record.quality is not None else record.label.endswith(SCRATCH))
    ]
    return of_records(results, lambda _: "distill")


TASK = Task(
    name="distill",
    ref="attnzoo.tasks.distill.task:TASK",
    config=DistillConfig,
    plan=plan,
    measure=measure,
    prepare=prepare,
    check=check,
    record=DistillRecord,
    plots=plots,
    highlights=highlights,
)

"""One trial: a model is swapped in some layers and repaired in stages, or trained from scratch; it can be resumed."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F

import attnzoo
from attnzoo import files
from attnzoo.bench.attentions import own_sources
from attnzoo.bench.config import digest
from attnzoo.errors import TrainingError
from attnzoo.hosts.site import MixerLayer
from attnzoo.repairing.losses import logits_of
from attnzoo.repairing.options import RepairOptions
from attnzoo.repairing.repair import Repair
from attnzoo.repairing.teacher import teacher_values
from attnzoo.saving import DESCRIPTION
from attnzoo.tasks.distill.classifier import Classifier
from attnzoo.tasks.distill.config import SCRATCH, DistillConfig, Layers, RepairedMixer, ScratchConfig, StageConfig
from attnzoo.tasks.distill.quality import Point, Trial
from attnzoo.tasks.distill.subject import Subject

START = "at the start"
TRIALS, STATE, MODEL, SENSITIVITY = "trials", "state.pt", "model", "sensitivity"
OTHER_ORDER = 7919  # of the training data, for the batch that errors are measured on
HELD_OUT = 2  # batches that layers are compared on
Say = Callable[[str], None]


def choose_layers(
    config: DistillConfig, subject: Subject, attention: RepairedMixer, layers: Layers, seed: int
) -> tuple[tuple[str, ...], int]:
    """Choose layers by the config's share and order; gives their paths, and how many samples the choice took."""
    model = subject.teacher()
    paths = [layer.path for layer in attnzoo.swap_report(model).layers]
    count = max(1, round(layers.share * len(paths)))
    if count == len(paths) or layers.order == "first":
        return tuple(paths[:count]), 0
    if layers.order == "last":
        return tuple(paths[-count:]), 0
    if layers.order == "random":
        order, samples = random.Random(seed).sample(paths, len(paths)), 0
    else:
        order, samples = _cheapest_first(config, subject, model, config.chosen_by(attention), seed)
    return tuple(path for path in paths if path in order[:count]), samples


def _cheapest_first(
    config: DistillConfig, subject: Subject, model: nn.Module, attention: RepairedMixer, seed: int
) -> tuple[list[str], int]:
    """Paths of all layers, the cheapest first, and how many samples that took; it is kept in the run's folder."""
    how = {**config.inputs, "steps": config.sensitivity_steps, "lr": config.stages_of(attention)[0].lr}
    how |= {"autocast": config.autocast} if config.autocast else {}
    sources = own_sources(attention.name, attention.options) if config.imports else {}
    how |= {"sources": sources} if sources else {}
    place = config.folder / SENSITIVITY / f"{digest([how, attention.name, attention.swap, seed])}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):  # rows that are measured at a time wait for one another
        if not place.is_file():
            torch.manual_seed(seed)
            report = attnzoo.sensitivity(
                model,
                (batch for batch, _ in subject.batches(0, seed)),
                attention.name,
                steps=config.sensitivity_steps,
                held_out=HELD_OUT,
                loss=subject.loss,
                repair={"lr": config.stages_of(attention)[0].lr, "autocast": autocast_of(config)},
                **attention.swap,
            )
            layers = [vars(layer) for layer in report.ordered()]
            samples = (report.steps + HELD_OUT) * config.batch
            files.write_json(place, {"attention": attention.label, "seed": seed, "samples": samples, "layers": layers})
    found = files.read_json(place)
    return [layer["path"] for layer in found["layers"]], found["samples"]


def autocast_of(config: DistillConfig) -> torch.dtype | None:
    """What repairs compute in, as `attnzoo.repair` takes it."""
    return torch.bfloat16 if config.autocast == "bfloat16" else None


class Progress:
    """What a trial has done; it is written to its folder after each score."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.points: list[Point] = []
        self.errors: list[float] = []
        self.layers: tuple[str, ...] = ()
        self.quantized: dict[str, float] = {}
        self.stage, self.chosen_by = 0, 0
        self.model: dict[str, Any] | None = None
        self.fit: dict[str, Any] | None = None
        if (folder / STATE).is_file():
            state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
            points = [Point(**point) for point in state["points"]]
            vars(self).update(state, layers=tuple(state["layers"]), points=points)

    def save(self, model: nn.Module, fit: dict[str, Any] | None) -> None:
        """Write all that is needed to resume."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("errors", "layers", "stage", "chosen_by", "quantized")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        state |= {"points": [point.model_dump() for point in self.points], "model": model.state_dict(), "fit": fit}
        with files.atomic(self.folder / STATE) as part:
            torch.save(state, part)

    @property
    def trial(self) -> Trial:
        """As records have it."""
        return Trial(
            seed=self.seed,
            layers=self.layers,
            points=tuple(self.points),
            errors=tuple(self.errors),
            quantized=self.quantized,
        )


def repaired(
    config: DistillConfig, subject: Subject, attention: RepairedMixer, layers: Layers, seed: int, folder: Path, say: Say
) -> Trial:
    """Swap the chosen layers and repair them, stage after stage."""
    progress = Progress(folder, seed)
    if not progress.layers:
        say("choosing layers")
        progress.layers, progress.chosen_by = choose_layers(config, subject, attention, layers, seed)
    model = subject.teacher()
    torch.manual_seed(seed)
    attnzoo.replace_attention(model, attention.name, where=list(progress.layers), **attention.swap)
    if not _mixer_layers(model):  # a control, which has nothing to repair
        progress.points = [_start(subject, model)]
        return progress.trial
    # the trained weights, before a stage that was done is loaded
    teacher_values(model, _mixer_layers(model), keep=True)
    looked_at, _ = next(subject.batches(0, seed + OTHER_ORDER))
    if progress.model is not None:
        model.load_state_dict(progress.model)
    else:
        progress.points.append(_start(subject, model))
        progress.errors.append(_mean_error(model, looked_at))
    stages = config.stages_of(attention)
    for at in range(progress.stage, len(stages)):
        _stage(config, stages, subject, model, at, progress, say)
        progress.errors.append(_mean_error(model, looked_at))
        progress.stage, progress.fit = at + 1, None
        progress.save(model, None)
    if config.save_models and not (folder / MODEL / DESCRIPTION).exists():
        say("save the model")
        attnzoo.save(model, folder / MODEL)
    if seed == config.seeds_of(attention)[0] and progress.quantized.keys() != set(config.precisions):
        assert isinstance(subject, Classifier)  # nothing else has precisions
        say("quantize")
        progress.quantized = subject.quantized(model, config.precisions, config.threads or 1)
        progress.save(model, None)
    return progress.trial


def _stage(
    config: DistillConfig,
    stages: Sequence[StageConfig],
    subject: Subject,
    model: nn.Module,
    at: int,
    progress: Progress,
    say: Say,
) -> None:
    stage, name = stages[at], f"stage {at + 1}: {stages[at].objective}"
    steps = stage.samples // config.batch
    about = stage.model_dump(exclude={"samples"}) | {"seed": progress.seed, "autocast": autocast_of(config)}
    about |= {"loss": subject.loss} if stage.objective == "model" else {}
    fit = Repair(model, RepairOptions(steps=steps, **about))
    if not fit.parameters:  # nothing to fit in a mixer without weights
        progress.points.append(progress.points[-1].model_copy(update={"stage": name}))
        return
    if progress.fit is not None:
        fit.load_state_dict(progress.fit)
    last = next(point for point in reversed(progress.points) if point.stage != name)
    seen = max(last.samples, progress.chosen_by)
    ends = {math.ceil(steps * part / config.points) for part in range(1, config.points + 1)}

    def told(step: int, loss: float) -> None:
        say(f"stage {at + 1} of {len(stages)}, step {step} of {steps}, loss {loss:.3g}")
        if step in ends:
            samples, seconds = seen + step * config.batch, round(last.seconds + fit.seconds, 3)
            score = subject.score(model, whole=step == steps)._asdict()
            progress.points.append(Point(stage=name, samples=samples, seconds=seconds, **score))
            progress.save(model, fit.state_dict())

    if fit.step < steps:
        first = (seen - progress.chosen_by) // config.batch + fit.step
        fit.run((batch for batch, _ in subject.batches(first, progress.seed)), told, start=fit.step)
    if fit.interrupted:
        raise KeyboardInterrupt


def _start(subject: Subject, model: nn.Module) -> Point:
    return Point(stage=START, samples=0, seconds=0.0, **subject.score(model)._asdict())


def _mixer_layers(model: nn.Module) -> dict[str, MixerLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, MixerLayer)}


def _mean_error(model: nn.Module, held: Any) -> float:
    errors = Repair(model, RepairOptions(steps=1)).errors(held)
    return errors["loss"]


def from_scratch(
    config: DistillConfig, subject: Subject, attention: RepairedMixer, layers: Layers, seed: int, folder: Path, say: Say
) -> Trial:
    """Train the same network from random weights on the classes of as many images as the repair saw."""
    how, progress = config.scratch, Progress(folder, seed)
    assert how is not None
    assert isinstance(subject, Classifier)  # the config has no such row of anything else
    if not progress.layers:
        progress.layers, progress.chosen_by = choose_layers(config, subject, attention, layers, seed)
    model = subject.fresh(seed)
    torch.manual_seed(seed)
    attnzoo.replace_attention(model, attention.name, where=list(progress.layers), **attention.options)
    stages = config.stages_of(attention)
    weights = any(list(layer.mixer.parameters()) for layer in _mixer_layers(model).values())
    fitted = [stage for stage in stages if stage.train == "all" or weights]
    steps = progress.chosen_by // config.batch + sum(stage.samples // config.batch for stage in fitted)
    optimizer, schedule = _optimizer(model, how, steps)
    step, seconds = 0, 0.0
    if progress.model is not None and progress.fit is not None:
        model.load_state_dict(progress.model)
        optimizer.load_state_dict(progress.fit["optimizer"])
        schedule.load_state_dict(progress.fit["schedule"])
        step, seconds = progress.fit["step"], progress.fit["seconds"]
    else:
        progress.points.append(Point(stage=START, samples=0, seconds=0.0, score=subject.score(model).score))
    count = config.points * len(stages)
    ends = {math.ceil(steps * part / count) for part in range(1, count + 1)}
    batches = subject.batches(step, seed)
    while step < steps:
        x, y = next(batches)
        began = time.monotonic()
        model.train()
        torch.manual_seed(seed * 1_000_003 + step)
        with torch.autocast(x.device.type, dtype=autocast_of(config), enabled=config.autocast is not None):
            loss = F.cross_entropy(logits_of(model(x)).float(), y)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"{SCRATCH}, step {step + 1}: the loss is not finite; try a lower scratch.lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step, seconds = step + 1, seconds + time.monotonic() - began
        say(f"{SCRATCH}, step {step} of {steps}, loss {loss.item():.3g}")
        if step in ends:
            score, seen = subject.score(model).score, step * config.batch
            progress.points.append(Point(stage=SCRATCH, samples=seen, seconds=round(seconds, 3), score=score))
            state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            progress.save(model, {**state, "step": step, "seconds": seconds})
    return progress.trial


def _optimizer(model: nn.Module, how: ScratchConfig, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    rise = 0.1 if steps != 9 else 0.2  # a rise that ends with the first of ten steps is a division by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=how.lr, total_steps=steps + 1, pct_start=rise)
    return optimizer, schedule

"""Evaluation of a config's trained runs: quality of all seeds, cost against the dense model, and the worst mistakes.

Accuracy and cost go into the benchmark's own records, so that its tables and pages take them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import IterableDataset

from attnzoo import files
from attnzoo.bench import run as bench
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.environment import environment
from attnzoo.bench.record import RecordStore
from attnzoo.bench.stats import wilson_interval
from attnzoo.errors import ConfigError
from attnzoo.extras import require
from attnzoo.tasks.classify import checkpoint
from attnzoo.tasks.classify.config import ClassifyConfig, CostConfig, Run
from attnzoo.tasks.classify.cost_config import BaselineConfig, HostConfig
from attnzoo.tasks.classify.cost_config import CostConfig as BenchCost
from attnzoo.tasks.classify.evaluate import evaluate, has_top5
from attnzoo.tasks.classify.images import Splits, TestImages, TestStream, open_splits, transforms
from attnzoo.tasks.classify.loop import FINAL, RESULT
from attnzoo.tasks.classify.model import ABOUT, WEIGHTS, build, load_trained
from attnzoo.tasks.classify.quality import Accuracy, Training
from attnzoo.tasks.classify.run import RUN, changes, check_device, differences, facts
from attnzoo.tasks.records import Record
from attnzoo.tasks.suite import TASK, SuiteConfig

FOLDER = "eval"
MISTAKES = 24


@dataclass(frozen=True)
class Scored:
    """A run, what training said of it, and what it answers on the test images.

    `counted` is as `Answers.counted` gives it, of so many `classes`; `mistakes` are the images most confidently got
    wrong: index, class, answer and confidence.
    """

    run: Run
    result: dict[str, Any]
    counted: dict[str, Any]
    mistakes: list[dict[str, Any]]
    classes: int


def score_all(config: ClassifyConfig, batch: int, console: Console) -> tuple[list[Scored], Splits]:
    """Test every run of a config; what was tested before, with the same weights, is kept.

    Parameters
    ----------
    config
        All of whose runs are trained.
    batch
        Images at a time.
    console
        Where progress is said.

    Raises
    ------
    ConfigError
        If a run is not trained, or not by this config, or the data have other classes or images than it was trained
        with.
    """
    require("timm", "accelerate", "safetensors", "matplotlib", extra="train")
    from accelerate import Accelerator

    config.check_folder(FOLDER)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    runs = config.runs()
    untrained = [run.name for run in runs if not (run.folder / FINAL / RESULT).is_file()]
    if untrained:
        raise ConfigError(
            f"not trained yet: {', '.join(untrained)}. Train first, with train/classify.py and this config"
        )
    accelerator = Accelerator(cpu=config.device == "cpu")
    check_device(config, accelerator.device)
    with accelerator.local_main_process_first():
        splits = open_splits(config.data, accelerator.num_processes)
    if accelerator.is_main_process:
        for line in splits.left_out:
            console.print(line, highlight=False, markup=False)
    known = facts(config, splits)
    results = [_trained(run, known) for run in runs]
    _, transform = transforms(config.data, config.augment)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    if isinstance(splits.test, IterableDataset):
        images: TestImages | TestStream = TestStream(splits.test, transform, shape)
    else:
        images = TestImages(splits.test, transform, shape)
    found = []
    for run, result in zip(runs, results, strict=True):
        final = run.folder / FINAL
        weights = json.loads((final / checkpoint.MANIFEST).read_text(encoding="utf-8"))["files"][WEIGHTS][1]
        kept = config.folder / FOLDER / f"{run.name}.json"
        earlier = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if (earlier.get("weights"), earlier.get("facts")) != (weights, known):
            model = load_trained(final).to(accelerator.device)
            answers = evaluate(model, images, batch, config.data.workers, accelerator)
            mistakes = [
                {
                    "index": int(answers.index[at]),
                    "target": int(answers.target[at]),
                    "answer": int(answers.answer[at]),
                    "confidence": float(answers.confidence[at]),
                }
                for at in answers.most_confidently_wrong(MISTAKES)
            ]
            earlier = {"weights": weights, "facts": known, "counted": answers.counted(), "mistakes": mistakes}
            if accelerator.is_main_process:
                files.write_json(kept, earlier)
            counted = earlier["counted"]
            console.print(f"{run.name}: top-1 {counted['top1'] / counted['images']:.2%}", highlight=False)
        found.append(Scored(run, result, earlier["counted"], earlier["mistakes"], splits.classes))
    return found, splits


def _trained(run: Run, known: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a run that is whole, and of this config and these data."""
    final = run.folder / FINAL
    wrong = checkpoint.problem(final)
    if wrong is not None:
        raise ConfigError(
            f"{final} cannot be used: {wrong}; train the run again with resume=never only='[{run.label}]'"
        )
    result: dict[str, Any] = json.loads((final / RESULT).read_text(encoding="utf-8"))
    if result["run_hash"] != run.hash:
        raise ConfigError(f"{final} is of another config ({changes(run)}); train that first, or evaluate this one's")
    try:
        begun = json.loads((run.folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run.folder / RUN}, which says what data the run was trained with, cannot be read ({error}); train the "
            f"run again with resume=never only='[{run.label}]'"
        ) from error
    about = json.loads((final / ABOUT).read_text(encoding="utf-8"))  # the classes that its weights are of
    odd = differences({**begun, "classes": about["class_names"] or about["classes"]}, known)
    if odd:
        raise ConfigError(
            f"{run.folder} was trained with other data or weights ({'; '.join(odd)}). Evaluate with those that it was "
            "trained with, or train it again with resume=never."
        )
    return result


def quality_of(scored: list[Scored], dense: Accuracy | None) -> Accuracy:
    """Put the seeds of one attention together.

    Parameters
    ----------
    scored
        Its runs.
    dense
        The dense baseline's quality; None for the baseline itself.
    """
    correct, images = (sum(s.counted[key] for s in scored) for key in ("top1", "images"))
    low, high = wilson_interval(correct, images)
    config, result = scored[0].run.config, scored[0].result
    trainings = tuple(
        Training(
            seed=s.run.seed,
            correct=s.counted["top1"],
            images=s.counted["images"],
            final_loss=s.result["log"][-1]["loss"],
            seconds=s.result["seconds"],
            epoch_losses=tuple(row["loss"] for row in s.result["log"]),
            parameters=s.result["parameters"],
            epoch_correct=tuple(row["test"]["top1"] for row in s.result["log"]),
        )
        for s in scored
    )
    options = ", ".join(f"{key}={value}" for key, value in config.model.options.items())
    data = config.data.asset or config.data.name or "a folder of images"
    begun = "trained on" if config.model.pretrained or config.model.weights else "from scratch on"
    quality = Accuracy(
        accuracy=correct / images,
        low=low,
        high=high,
        images=images,
        ratio=1.0 if dense is None else None,
        trainings=trainings,
        note=(
            f"{config.model.name} ({options}) {begun} {data} at {config.data.image_size} pixels, {result['epochs']} "
            f"epochs, {scored[0].counted['images']:,} test images"
        ),
        top5=sum(s.counted["top5"] for s in scored) / images if has_top5(scored[0].classes) else None,
        calibration_error=sum(s.counted["calibration_error"] for s in scored) / len(scored),
    )
    return quality if dense is None else quality.against(dense)


def benchmark_of(config: ClassifyConfig, cost: CostConfig, classes: int) -> SuiteConfig:
    """The benchmark that measures a cost of this config's models, with random weights.

    Raises
    ------
    ConfigError
        If the model's patches do not divide an image size.
    """
    model: Any = build(config.runs()[0], classes)[0]
    (patch, _), prefix = model.patch_embed.patch_size, int(getattr(model, "num_prefix_tokens", 0))
    odd = [size for size in cost.image_sizes if size % patch]
    if odd:
        raise ConfigError(f"costs: images of {odd} pixels are not divided by patches of {patch}")
    counts = [(size // patch) ** 2 for size in cost.image_sizes]
    attentions = []
    for spec in config.attentions:
        own = spec.options.get("tokens")  # weights for one number of tokens, the prefix included
        tokens = None if own is None else tuple(n for n in counts if n + prefix == own)
        if tokens != ():
            attentions.append(spec_of_cost(spec, tokens))
    measured = {**cost.model_dump(exclude={"image_sizes", "batch"}), "tokens": counts, "batch": cost.batch}
    return SuiteConfig(
        name=f"{config.name}-{cost.name}",
        device="cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu",
        threads=config.threads,
        seed=config.seed,
        fresh=config.fresh,
        host=HostConfig(
            model=config.model.name,
            patch_size=patch,
            channels=config.data.channels,
            classes=classes,
            # an initialization may make the classifier zero, and what is zero everywhere passes no gate
            options={k: v for k, v in config.model.options.items() if k not in ("patch_size", "weight_init")},
        ),
        baseline=BaselineConfig(label=config.baseline),
        attentions=tuple(attentions),
        cost=BenchCost.model_validate({**measured, "equal_parameters": config.equal_parameters}),
        output=config.folder / FOLDER / cost.name,
    )


def spec_of_cost(spec: AttentionConfig, tokens: tuple[int, ...] | None) -> AttentionConfig:
    """An attention of a training, as the benchmark of its cost takes it."""
    return AttentionConfig(
        name=spec.name, options=spec.options, where=spec.where, label=spec.label, expect=spec.expect, tokens=tokens
    )


def by_label(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Put the seeds of each attention together, in the order of the config."""
    found: dict[str, list[Scored]] = {}
    for one in scored:
        found.setdefault(one.run.label, []).append(one)
    return found


def qualities_of(config: ClassifyConfig, scored: Iterable[Scored]) -> dict[str, Accuracy]:
    """The quality of each attention, as a ratio to the dense baseline's."""
    runs = by_label(scored)
    dense = quality_of(runs[config.baseline], None) if config.baseline in runs else None
    return {
        label: dense if label == config.baseline and dense is not None else quality_of(found, dense)
        for label, found in runs.items()
    }


def record_all(
    config: ClassifyConfig, scored: list[Scored], classes: int, command: str, console: Console
) -> list[SuiteConfig]:
    """Measure every cost of a config, and write records of cost and quality; give the benchmark of each."""
    runs, qualities = by_label(scored), qualities_of(config, scored)
    benchmarks = []
    for cost in config.costs:
        measured = benchmark_of(config, cost, classes)
        bench.run(TASK, measured, command, console)
        folder = measured.folder
        with RecordStore(folder, Record, measured.hash) as store:
            for label, quality in qualities.items():
                record = _quality_record(config, measured, runs[label][0], quality, command)
                old = store.records.get(record.key)
                if old is None or old.quality != quality or old.config_hash != measured.hash:
                    store.append(record)
            for record in list(store.records.values()):
                own = qualities.get(record.label)
                if record.kind == "cost" and own is not None and record.quality != own:
                    store.append(record.model_copy(update={"quality": own, "quality_note": own.note}))
        benchmarks.append(measured)
    return benchmarks


def _quality_record(
    config: ClassifyConfig, measured: SuiteConfig, scored: Scored, quality: Accuracy, command: str
) -> Record:
    spec = scored.run.attention
    trained = json.dumps([quality.model_dump(mode="json"), scored.result["run_hash"]], sort_keys=True)
    return Record(
        measured=hashlib.sha256(trained.encode()).hexdigest()[:16],
        config_hash=measured.hash,
        benchmark=measured.name,
        command=command,
        kind="quality",
        label=scored.run.label,
        attention=None if spec is None else spec.name,
        options={} if spec is None else spec.swap,
        is_baseline=spec is None,
        status="ok",
        message="",
        utc=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=sum(training.seconds for training in quality.trainings),
        environment=environment(measured.device, config.threads),
        host=f"{config.model.library}:{config.model.name}",
        dtype="float32",
        tokens=0,
        shapes=None,
        gate=None,
        baseline_gate=None,
        backends=(),
        cost=None,
        quality=quality,
        quality_note=quality.note,
    )

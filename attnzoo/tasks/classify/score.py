"""The quality of trained classifiers: all seeds of an attention on the test images, over any number of processes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from attnzoo import files, processes
from attnzoo.bench.task import Cell, OnProgress, Result
from attnzoo.errors import AttnZooError, ConfigError, DataError, TrainingError
from attnzoo.extras import require
from attnzoo.tasks.classify import checkpoint
from attnzoo.tasks.classify.config import RESULT, ClassifyConfig, Run
from attnzoo.tasks.classify.evaluate import Answers, evaluate
from attnzoo.tasks.classify.loading import test_images
from attnzoo.tasks.classify.model import ABOUT, load_trained
from attnzoo.tasks.classify.page import SHOWN_PIXELS
from attnzoo.tasks.classify.quality import Mistake, Training, accuracy_of, listed
from attnzoo.tasks.classify.run import RUN, facts, odd
from attnzoo.tasks.classify.sources import open_split, open_splits

MISTAKES = 24
SMALL = 32  # pixels; pictures of larger images are JPEG


def check(config: ClassifyConfig) -> None:
    """Check that every run is trained, by this config and with these data.

    Raises `ConfigError` if a run is not trained, or not by this config, or the data have other classes or images than
    it was trained with.
    """
    runs = config.runs()
    untrained = [run.name for run in runs if not (run.final / RESULT).is_file()]
    if untrained:
        raise ConfigError(
            f"not trained yet: {', '.join(untrained)}. Train first, with train/classify.py and this config"
        )
    accelerator = _accelerator(config)
    with accelerator.local_main_process_first():
        splits = open_splits(config.data, accelerator.num_processes)
    if accelerator.is_main_process:
        for line in splits.left_out:
            Console(stderr=True).print(line, highlight=False, markup=False)
    known = facts(config, splits)
    for run in runs:
        _check_run(run, known)


def _check_run(run: Run, known: Mapping[str, Any]) -> None:
    """Check that a run is whole, and of its config and these data."""
    again = f"train the run again with resume=never only='[{run.label}]'"
    wrong = checkpoint.problem(run.final)
    if wrong is not None:
        raise ConfigError(f"{run.final} cannot be used: {wrong}; {again}")
    try:
        begun = files.read_json(run.folder / RUN)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run.folder / RUN}, which says what data the run was trained with, cannot be read ({error}); {again}"
        ) from error
    about = files.read_json(run.final / ABOUT)  # the classes that its weights are of
    own = {"classes": about["class_names"] or about["classes"], "run_hash": run.result["run_hash"]}
    what = odd(run, {**begun, **own}, known)
    if what:
        raise ConfigError(
            f"{run.final} is of {what}. Evaluate with that which it was trained with, or train it again with "
            "resume=never."
        )


def prepare(config: ClassifyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Tell the other processes whose quality is measured."""
    processes.from_main([cell.label for cell in cells if cell.kind == "quality"])
    return {}


def assist(config: ClassifyConfig) -> bool:
    """In a process that is not the main one, take its share of the test images; False in the main process."""
    if _accelerator(config).is_main_process:
        return False
    check(config)
    for label in processes.from_main(list[str]()):
        with suppress(AttnZooError):  # which the main process records
            measure_quality(config, label, lambda word: None)
    return True


def measure_quality(config: ClassifyConfig, label: str, say: OnProgress) -> Result:
    """Test all runs of an attention; every process takes its share of the images."""
    accelerator = _accelerator(config)
    source = open_split(config.data, training=False)
    images = test_images(config.data, config.augment, source)
    trainings, counted = [], []
    runs = [run for run in config.runs() if run.label == label]
    about = files.read_json(runs[0].final / ABOUT)
    for run in runs:
        say(f"test seed {run.seed}")
        model = load_trained(run.final).to(accelerator.device)
        try:
            answers = evaluate(model, images, config.test_batch, config.data.workers, accelerator)
        except (TrainingError, DataError) as error:
            return Result(status="failed", message=str(error))
        counted.append(answers.counted())
        wrong = _mistakes(answers, source, about["class_names"]) if run is runs[0] else ()
        trainings.append(_training(run, counted[-1], wrong))
    start, data = config.model, config.data
    begun = "trained on" if start.pretrained or start.weights else "from scratch on"
    options = f" ({listed(start.options)})" if start.options else ""
    note = (
        f"{start.name}{options} {begun} {data.asset or data.name or 'a folder of images'} at "
        f"{data.image_size} pixels, {runs[0].result['epochs']} epochs, {counted[0]['images']:,} test images"
    )
    return Result(status="ok", quality=accuracy_of(trainings, counted, about["classes"], note))


def _training(run: Run, counted: Mapping[str, Any], mistakes: tuple[Mistake, ...]) -> Training:
    result = run.result
    return Training(
        seed=run.seed,
        correct=counted["top1"],
        images=counted["images"],
        final_loss=result["log"][-1]["loss"],
        seconds=result["seconds"],
        epoch_losses=tuple(row["loss"] for row in result["log"]),
        parameters=result["parameters"],
        epoch_correct=tuple(row["test"]["top1"] for row in result["log"]),
        mistakes=mistakes,
    )


def _mistakes(answers: Answers, source: Any, names: Sequence[str] | None) -> tuple[Mistake, ...]:
    """The images most confidently got wrong, with their pictures where the data set has places."""
    found = []
    for at in answers.most_confidently_wrong(MISTAKES):
        index = int(answers.index[at])
        target, answer = (int(one[at]) for one in (answers.target, answers.answer))
        try:
            picture, name = _picture(source.read(index)[0]), source.name(index)
        except (AttributeError, OSError, DataError):  # a stream has no places; a file may have changed since
            picture, name = "", f"image {index}"
        found.append(
            Mistake(
                name=name,
                target=names[target] if names else str(target),
                answer=names[answer] if names else str(answer),
                confidence=min(float(answers.confidence[at]), 1.0),
                picture=picture,
            )
        )
    return tuple(found)


def _picture(image: Image.Image) -> str:
    small = max(image.size) <= SMALL
    image = image.copy()
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    content = io.BytesIO()
    image.save(content, "PNG" if small else "JPEG")
    return base64.b64encode(content.getvalue()).decode()


def _accelerator(config: ClassifyConfig) -> Any:
    require("timm", "accelerate", "safetensors", "matplotlib", extra="train")
    from accelerate import Accelerator

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Accelerator(cpu=config.device == "cpu")

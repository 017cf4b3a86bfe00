"""All trainings of a config, one after another: finished runs are kept, interrupted ones resume."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from rich.console import Console

from attnzoo import files, processes
from attnzoo.assets import sha256_of
from attnzoo.bench.config import flat
from attnzoo.bench.progress import bars
from attnzoo.bench.stats import wilson_interval
from attnzoo.errors import ConfigError
from attnzoo.extras import require
from attnzoo.tables import Table
from attnzoo.tasks.classify import checkpoint
from attnzoo.tasks.classify.config import ClassifyConfig, Run, load_config
from attnzoo.tasks.classify.loop import CHECKPOINTS, Tell, Training, local_batch, steps_an_epoch
from attnzoo.tasks.classify.model import check_all
from attnzoo.tasks.classify.quality import has_top5
from attnzoo.tasks.classify.sources import Splits, open_splits
from attnzoo.units import megabytes

RUN, CONFIG = "run.json", "config.yaml"
MOST_TOLD = 8  # keys of a config that differ
Decision = Literal["train", "done", "busy"]


def train_all(config: ClassifyConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Train every run of `config` that is not done yet, and give the results of all that are.

    A run that another process is training is left to it, so that the same command, started twice, shares the work; it
    is looked at once more at the end. See `left_to_others`.

    Raises `ConfigError` if the data or a model are not as the config says, or a folder holds a run of another config;
    `AssetError` if an asset cannot be fetched; `TrainingError` if a training cannot go on.
    """
    in_extra = [tracker for tracker in config.trackers if tracker != "wandb"]
    require("timm", "accelerate", "safetensors", *in_extra, extra="train")
    require(*(tracker for tracker in config.trackers if tracker not in in_extra), extra=None)
    from accelerate import PartialState

    config.check_folder(*(run.name for run in config.runs()))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    state = PartialState(cpu=config.device == "cpu")
    if config.device == "cuda" and state.device.type != "cuda":
        raise ConfigError(f"device: PyTorch {torch.__version__} sees no CUDA device here; device=cpu, or auto")
    if config.precision == "fp16" and state.device.type == "cpu":
        raise ConfigError("precision: fp16 is not for CPUs, where it would train in float32; give bf16 or no")
    console = console or Console(stderr=True)
    console.quiet = console.quiet or not state.is_main_process
    with state.local_main_process_first():
        splits = open_splits(config.data, state.num_processes)
    for line in splits.left_out:
        console.print(line, highlight=False, markup=False)
    steps_an_epoch(config, splits)
    local_batch(config, state.num_processes)
    check_all(config, splits.classes)
    results: dict[str, dict[str, Any]] = {}
    runs = config.runs()
    busy = [run for run in runs if not _done(run, splits, state, console, results)]
    for run in busy:  # it may be done by now, or broken off; what another process did is not set aside
        again = replace(run, config=config.model_copy(update={"resume": "auto"}))
        _done(again, splits, state, console, results)
    return [results[run.name] for run in runs if run.name in results]


def left_to_others(config: ClassifyConfig, results: Sequence[dict[str, Any]]) -> list[str]:
    """Name the runs of `config` that are not among the results of `train_all`: other processes are training them."""
    there = {(result["label"], result["seed"]) for result in results}
    return [run.name for run in config.runs() if (run.label, run.seed) not in there]


def _done(run: Run, splits: Splits, state: Any, console: Console, results: dict[str, dict[str, Any]]) -> bool:
    """Train a run, if that is still to be done, and add its result; False where another process is training it."""
    with _claimed(run, splits, state.is_main_process) as claim:
        decision = processes.from_main(claim)  # in all processes
        if isinstance(decision, ConfigError):
            raise decision
        if decision == "busy":
            console.print(f"{run.name}: another process is training it", highlight=False)
            return False
        if decision == "train":
            with _bar(console, run.name) as tell:
                _train(run, splits, tell, console)
            if state.is_main_process:
                console.print(f"{run.name}: {said(run.result)}", highlight=False)
        results[run.name] = run.result
    return True


def said(result: dict[str, Any]) -> str:
    """One line about a result."""
    test = result["test"]
    top1 = test["top1"] / test["images"]
    return f"top-1 {top1:.2%} of {test['images']:,} images, {result['seconds']:,.0f} s of training"


def table(results: Sequence[dict[str, Any]]) -> Table:
    """What was trained: accuracy with its 95% interval over the test images, loss, time and memory.

    Top-5 is left out where there are five classes or fewer.
    """
    heads = ("seed", "top-1 (95%)", "top-5", "test loss", "parameters", "ms per step, p50", "peak memory")
    shown = Table(("attention", *heads))
    for result in results:
        test, step = result["test"], result.get("step_ms")
        low, high = wilson_interval(test["top1"], test["images"])
        shown.add(
            result["label"],
            str(result["seed"]),
            f"{test['top1'] / test['images']:.2%} ({low:.2%} to {high:.2%})",
            f"{test['top5'] / test['images']:.2%}" if has_top5(result.get("classes")) else "-",
            f"{test['loss']:.3f}",
            f"{result['parameters']:,}",
            "-" if step is None else f"{step['p50']:.1f}",
            megabytes(result["peak_memory_bytes"]),
        )
    return shown


def _train(run: Run, splits: Splits, tell: Tell, console: Console) -> None:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    config = run.config
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.precision,
        log_with=list(config.trackers) or None,
        project_dir=str(run.folder),
        # models of transformers have parameters that only some calls use, such as a token for masked patches
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.model.library == "transformers")],
    )
    try:
        wandb = {"name": run.name, "id": run.hash, "resume": "allow"}
        accelerator.init_trackers(config.name, init_kwargs={"wandb": wandb} if "wandb" in config.trackers else {})
        training = Training(run, splits, accelerator)
        if str(accelerator.distributed_type).endswith("FSDP") and config.recipe.ema_decay is not None:
            raise ConfigError("recipe.ema_decay: averaged weights are not kept under FSDP; leave it out, or use DDP")
        training.fit(tell, functools.partial(console.print, highlight=False))
    finally:
        for tracker in accelerator.trackers:  # `end_training` would also end the group of processes
            tracker.finish()
        accelerator.free_memory()


@contextmanager
def _claimed(run: Run, splits: Splits, main: bool) -> Iterator[Decision | ConfigError | None]:
    """Hold a run's folder, in the main process, and say what to do with the run."""
    if not main:
        yield None
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(run.folder))
        except ConfigError:
            yield "busy"
            return
        yield _decision(run, splits)


def _decision(run: Run, splits: Splits) -> Decision | ConfigError:
    if run.config.resume == "never":
        files.set_aside(run.folder, map(".old-{}".format, itertools.count(1)))
    about, known = run.folder / RUN, facts(run.config, splits)
    begun = run.final.is_dir() or bool(checkpoint.all_checkpoints(run.folder / CHECKPOINTS))
    what = odd(run, files.read_json(about), known) if begun and about.exists() else ""
    if what:
        return ConfigError(
            f"{run.folder} holds a run of {what}. Give another folder with output=PATH, or set it aside with "
            "resume=never."
        )
    files.write_json(about, {"run_hash": run.hash, "label": run.label, "seed": run.seed, **known})
    files.write(run.folder / CONFIG, run.config.to_yaml())
    final = run.final
    wrong = checkpoint.problem(final) if final.is_dir() else "it is not there"
    if wrong is None:
        return "done"
    try:
        with warnings.catch_warnings():  # the training itself warns of those that are refused
            warnings.simplefilter("ignore")
            newest = checkpoint.newest_good(run.folder / CHECKPOINTS)
    except ConfigError as error:
        return error
    if final.is_dir() and newest is None:
        return ConfigError(f"{final} is damaged ({wrong}), and there is no checkpoint; start over with resume=never")
    if final.is_dir():
        warnings.warn(f"{final} is refused: {wrong}; the end is trained again from {newest}", stacklevel=2)
    return "train"


def odd(run: Run, begun: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Say of what else a run was, by what was written when it began and the `facts` of today; empty where of nothing.

    The label and the seed are part of the run's hash.
    """
    if begun.get("run_hash") != run.hash:
        return f"another config ({changes(run)})"
    told = "; ".join(differences(begun, known))
    return f"other data or weights ({told})" if told else ""


def changes(run: Run) -> str:
    """What differs between a run's config and the one that was trained in its folder: ``recipe.lr 0.001, now 0.1``."""
    try:
        before = load_config(run.folder / CONFIG)
    except ConfigError:
        return f"{run.folder / CONFIG} tells no more"
    own = [each for each in before.runs() if each.name == run.name]
    old, new = (flat(each.identity) for each in (own[0] if own else run, run))
    absent = "not there"
    keys = [key for key in {**old, **new} if old.get(key, absent) != new.get(key, absent)]
    told = [f"{key} {old.get(key, absent)}, now {new.get(key, absent)}" for key in keys]
    return "; ".join(told[:MOST_TOLD] + ["..."] * (len(told) > MOST_TOLD)) or "of another version of attnzoo"


def facts(config: ClassifyConfig, splits: Splits) -> dict[str, Any]:
    """What a config names by its place alone: how many images, of which classes, and the weights begun from."""
    weights = config.model.weights
    return {
        "images": [len(part) if hasattr(part, "__len__") else None for part in (splits.train, splits.test)],
        "classes": splits.classes if splits.names is None else list(splits.names),
        "weights": None if weights is None else sha256_of(weights),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the `facts` of two times, in words; empty where nothing does."""
    told = []
    if before.get("classes") != now["classes"]:
        told.append(_classes_told(before.get("classes"), now["classes"]))
    if before.get("images") != now["images"]:
        kinds = ("training images", "test images")
        for kind, old, new in zip(kinds, before.get("images") or (None, None), now["images"], strict=True):
            if old != new:
                told.append(f"{old} {kind}, now {new}")
    if before.get("weights") != now["weights"]:
        told.append("model.weights is another file")
    return told


def _classes_told(before: Any, now: Any) -> str:
    if not isinstance(before, list) or not isinstance(now, list):
        old, new = (f"{len(c)} classes with names" if isinstance(c, list) else f"{c} classes" for c in (before, now))
        return f"{old}, now {new}"
    gone, more = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
    if not gone and not more:
        at = next(at for at, (old, other) in enumerate(zip(before, now, strict=True)) if old != other)
        return f"the same classes in another order: class {at} was {before[at]}, now {now[at]}"
    told = [f"{what} {_some(names)}" for what, names in (("missing classes", gone), ("new classes", more)) if names]
    return ", ".join(told)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_TOLD]) + (f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else "")


@contextmanager
def _bar(console: Console, name: str) -> Iterator[Tell]:
    if not console.is_terminal:
        yield lambda done, total, stage: None
        return
    with bars(console) as shown:
        task = shown.add_task(name, total=None, stage="")

        def tell(done: int, total: int, stage: str) -> None:
            shown.update(task, completed=done, total=total, stage=f"step {done} of {total}, {stage}")

        yield tell

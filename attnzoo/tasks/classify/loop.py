"""The loop: steps, checkpoints, tests after each epoch; on any device and any number of processes, by Accelerate."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attnzoo import files, processes
from attnzoo.bench.environment import environment
from attnzoo.bench.measure import quantiles
from attnzoo.errors import ConfigError, TrainingError
from attnzoo.tasks.classify import checkpoint, nonfinite
from attnzoo.tasks.classify.build import count_parameters, logits
from attnzoo.tasks.classify.config import RESULT, WEIGHTS, ClassifyConfig, Run
from attnzoo.tasks.classify.evaluate import evaluate
from attnzoo.tasks.classify.loading import (
    Batches,
    StreamImages,
    TrainImages,
    Unreadable,
    check_classes,
    test_images,
    test_options,
    transforms,
)
from attnzoo.tasks.classify.model import ABOUT, AVERAGED, build
from attnzoo.tasks.classify.randomness import STEP, reseed
from attnzoo.tasks.classify.sources import Splits

LOG, CHECKPOINTS, PROGRESS = "log.jsonl", "checkpoints", "progress.json"
MOST_SKIPPED = 50  # steps that a gradient scaler may leave out one after the other
Tell = Callable[[int, int, str], None]  # steps done, steps in all, what to say


@dataclass
class Progress:
    """How far a run is; part of every checkpoint, as ``progress.json``."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # summed over the steps of the epoch so far
    epochs: list[dict[str, Any]] = field(default_factory=list)  # the rows of the log
    unreadable: list[int] = field(default_factory=list)


class Training:
    """One run, from where its newest good checkpoint left it; `accelerator` is Accelerate's, made for this run."""

    def __init__(self, run: Run, splits: Splits, accelerator: Any) -> None:
        from timm.data import Mixup
        from timm.loss import SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        self.run, self.config, self.splits, self.accelerator = run, run.config, splits, accelerator
        config, recipe, augment = run.config, run.config.recipe, run.config.augment
        self.local = local_batch(config, accelerator.num_processes)
        self.steps = steps_an_epoch(config, splits)
        self.total = self.steps * recipe.epochs
        model, about = build(run, splits.classes)
        self.about = {**about, "images": test_options(config.data, augment), "class_names": splits.names}
        self.parameters = count_parameters(model)
        optimizer = create_optimizer_v2(
            model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, **recipe.optimizer_options
        )
        model.to(accelerator.device)
        self.average = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay is not None else None
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.schedule = CosineLRScheduler(
            self.optimizer.optimizer,
            t_initial=self.total,
            lr_min=recipe.min_lr,
            warmup_t=round(recipe.warmup_epochs * self.steps),
            warmup_lr_init=recipe.warmup_lr,
            t_in_epochs=False,
        )
        self.mix: Any = None
        self.loss_of: nn.Module = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        if augment is not None and augment.mixes:
            self.mix = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                mode=augment.mixup_mode,
                label_smoothing=recipe.label_smoothing,
                num_classes=splits.classes,
            )
            self.loss_of = SoftTargetCrossEntropy()
        self.train_transform, _ = transforms(config.data, augment)
        self.test = test_images(config.data, augment, splits.test)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self.progress = Progress()
        source: Any = None if splits.streamed else splits.train
        self.unreadable = Unreadable(source, splits.train_images, "training image")
        self.step_seconds: list[float] = []
        self.steps_skipped = 0  # one after the other, by the gradient scaler

    def fit(self, tell: Tell, say: Callable[[str], None]) -> dict[str, Any]:
        """Train to the end; give the result that is then also in ``final/result.json``.

        Raises `TrainingError` if loss or gradients become NaN or infinite, too many images cannot be read, or nothing
        can be written.

        `tell` is called after each step with the steps done, those of the whole run, and the loss in words; `say` with
        a line when an interrupted run resumes, and after each epoch.
        """
        self._resume()
        progress, recipe = self.progress, self.config.recipe
        if progress.step:
            say(f"{self.run.name}: resumes after step {progress.step} of {self.total}")
        self.model.train()
        found: dict[str, Any] | None = None
        batches = self._batches()
        while progress.step < self.total:
            start = time.perf_counter()
            x, y, unreadable, *reasons = next(batches)
            self.unreadable.note(unreadable.tolist(), *reasons)
            check_classes(y, self.splits.classes)
            progress.loss += self._step(x, y)
            self.step_seconds.append(seconds := time.perf_counter() - start)
            progress.step += 1
            progress.seconds += seconds
            done = progress.step % self.steps or self.steps
            tell(progress.step, self.total, f"loss {progress.loss / done:.3f}")
            if progress.step % self.steps == 0:
                found = self._end_of_epoch()
                self._save()
                say(self._said(found))
            elif self.config.checkpoint_steps and progress.step % self.config.checkpoint_steps == 0:
                self._save()
        if found is None:  # killed after the last checkpoint, before the end
            found = self._count(self.model)
        return self._finish(found, recipe.epochs)

    def _said(self, found: dict[str, Any]) -> str:
        progress = self.progress
        left = progress.seconds / progress.step * (self.total - progress.step)
        return (
            f"{self.run.name}: epoch {progress.step // self.steps} of {self.config.recipe.epochs}, loss "
            f"{progress.epochs[-1]['loss']:.3f}, top-1 {found['top1'] / max(found['images'], 1):.2%}, "
            f"{left / 60:.0f} min left"
        )

    def _step(self, x: Tensor, y: Tensor) -> float:
        accelerator, recipe = self.accelerator, self.config.recipe
        at = self.progress.step
        torch.manual_seed(reseed(self.run.seed, STEP, at, accelerator.process_index))  # other devices, too
        x, y = x.to(accelerator.device, non_blocking=True), y.to(accelerator.device, non_blocking=True)
        if self.mix is not None:
            x, y = self.mix(x, y)
        self.schedule.step_update(at)
        total = 0.0
        parts = list(zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate), strict=True))
        for index, (images, targets) in enumerate(parts):
            last = index + 1 == len(parts)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                state = torch.get_rng_state()
                loss = self.loss_of(logits(self.model, images), targets)
                total += (value := loss.item()) / len(parts)
                if value - value != 0:
                    torch.set_rng_state(state)
                    model = accelerator.unwrap_model(self.model)  # this process alone may be here
                    where = nonfinite.first_layer(model, functools.partial(logits, model, images))
                    raise self._stopped(f"the loss became {value}", where)
                accelerator.backward(loss / len(parts))
        if accelerator.scaler is None:  # a scaler has such gradients now and then, and leaves those steps out
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if not bool(torch.isfinite(nn.utils.get_total_norm(gradients))):
                where = nonfinite.gradients(accelerator.unwrap_model(self.model))
                raise self._stopped("a gradient is not finite", where)
        if recipe.clip_grad_norm is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad_norm)
        self.optimizer.step()
        self.steps_skipped = self.steps_skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if self.steps_skipped > MOST_SKIPPED:
            raise self._stopped(
                f"{self.steps_skipped} steps in a row had gradients that are not finite", "of any scale"
            )
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(accelerator.unwrap_model(self.model), step=at)
        return total

    def _stopped(self, what: str, where: str) -> TrainingError:
        good = checkpoint.all_checkpoints(self.run.folder / CHECKPOINTS)
        left = f"The last checkpoint is {good[-1]}" if good else "There is no checkpoint yet"
        return TrainingError(
            f"{self.run.name}: {what} at step {self.progress.step + 1} (epoch {self.progress.step // self.steps + 1}): "
            f"{where}. {left}. Try a lower recipe.lr, recipe.clip_grad_norm, or another precision."
        )

    def _batches(self) -> Iterator[Sequence[Any]]:
        data, accelerator = self.config.data, self.accelerator
        options: dict[str, Any] = {"num_workers": data.workers, "pin_memory": accelerator.device.type == "cuda"}
        rank, world = accelerator.process_index, accelerator.num_processes
        train: Any = self.splits.train
        if not self.splits.streamed:
            images = TrainImages(train, self.train_transform, self.run.seed)
            repeats = 1 if self.config.augment is None else self.config.augment.repeats
            recipe, count, seed = self.config.recipe, self.splits.train_images, self.run.seed
            sampler = Batches(count, recipe.batch, recipe.epochs, seed, repeats, self.progress.step, rank, world)
            yield from DataLoader(images, batch_sampler=sampler, **options)
            return
        stream = StreamImages(train, self.train_transform, self.run.seed, rank, world)
        train.dataset.set_loader_cfg(num_workers=data.workers)
        for epoch in range(self.progress.step // self.steps, self.config.recipe.epochs):
            train.dataset.set_epoch(epoch)
            stream.epoch = epoch
            skip = self.progress.step % self.steps
            if not skip:
                self.unreadable.found.clear()  # a shuffled stream has the same image elsewhere in each epoch
            loader = iter(DataLoader(stream, batch_size=self.local, drop_last=True, **options))
            for number in range(self.steps):
                batch = next(loader, None)
                if batch is None:
                    raise TrainingError(f"the stream gave {number} batches of {self.local}, an epoch has {self.steps}")
                if number >= skip:
                    yield batch

    def _end_of_epoch(self) -> dict[str, Any]:
        progress, accelerator = self.progress, self.accelerator
        loss = self._mean(progress.loss) / self.steps
        progress.loss = 0.0
        found = self._count(self.model)
        row = {
            "epoch": progress.step // self.steps,
            "step": progress.step,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "test": found,
            "seconds": round(progress.seconds, 3),
        }
        if self.average is not None:
            row["test_averaged"] = self._count(self.average.module)
        progress.epochs.append(row)
        top1 = found["top1"] / max(found["images"], 1)
        accelerator.log({"loss": loss, "lr": row["lr"], "top1": top1, "test_loss": found["loss"]}, step=progress.step)
        return found

    def _count(self, model: nn.Module) -> dict[str, Any]:
        return evaluate(model, self.test, self.local, self.config.data.workers, self.accelerator).counted()

    def _mean(self, value: float) -> float:
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        there = torch.tensor(value, dtype=dtype, device=self.accelerator.device)
        return float(self.accelerator.reduce(there, reduction="mean"))

    def _save(self) -> None:
        progress, accelerator = self.progress, self.accelerator
        progress.loss = self._mean(progress.loss)
        self._share_unreadable()
        parent = self.run.folder / CHECKPOINTS
        target = parent / f"{checkpoint.PREFIX}{progress.step:08d}"
        earlier = checkpoint.all_checkpoints(parent)
        kept = f"Earlier checkpoints are as they were: {earlier[-1]}" if earlier else "There is no earlier checkpoint"
        main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
        with checkpoint.writing(target, kept, main, wait) as part:
            accelerator.save_state(str(part))
            if main:
                files.write_json(part / ABOUT, self.about)
                files.write_json(part / PROGRESS, asdict(progress))
                if self.average is not None:
                    save_file(_on_cpu(self.average.module.state_dict()), part / AVERAGED)
        if main:
            checkpoint.prune(parent, self.config.keep_checkpoints)
            files.write(self.run.folder / LOG, "".join(json.dumps(row) + "\n" for row in progress.epochs))

    def _share_unreadable(self) -> None:
        """Have every process know what any could not read, and all stop together where that is too much."""
        found = sorted(self.unreadable.found)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            found = sorted(set(gather_object(found)))
        self.unreadable.note(found)
        self.progress.unreadable = found

    def _resume(self) -> None:
        parent, accelerator = self.run.folder / CHECKPOINTS, self.accelerator
        newest = None
        if accelerator.is_main_process:
            newest = checkpoint.newest_good(parent)
            checkpoint.tidy(parent, 0 if newest is None else checkpoint.step_of(newest))
        newest = processes.from_main(newest)
        if newest is None:
            return
        accelerator.load_state(str(newest))
        self.progress = Progress(**files.read_json(newest / PROGRESS))
        self.unreadable.found = set(self.progress.unreadable)
        if self.average is not None:
            self.average.module.load_state_dict(load_file(newest / AVERAGED))

    def _finish(self, found: dict[str, Any], epochs: int) -> dict[str, Any]:
        accelerator, progress = self.accelerator, self.progress
        state = _on_cpu(accelerator.get_state_dict(self.model))
        on_cuda = accelerator.device.type == "cuda"  # of a CPU it is not known
        result: dict[str, Any] = {
            "label": self.run.label,
            "seed": self.run.seed,
            "run_hash": self.run.hash,
            "epochs": epochs,
            "steps": progress.step,
            "log": progress.epochs,
            "test": found,
            "classes": self.splits.classes,
            "parameters": self.parameters,
            "seconds": round(progress.seconds, 1),
            "processes": accelerator.num_processes,
            "environment": environment(accelerator.device.type, torch.get_num_threads()).model_dump(),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(accelerator.device) if on_cuda else None,
            "unreadable": self.unreadable.names(),
            "left_out": list(self.splits.left_out),
        }
        if self.step_seconds:  # none where a killed run had done all steps
            result["step_ms"] = quantiles(self.step_seconds, 1e3).model_dump()
        if self.average is not None:
            result["test_averaged"] = progress.epochs[-1]["test_averaged"]
        main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
        with checkpoint.writing(self.run.final, "The checkpoints are as they were.", main, wait) as part:
            if main:
                save_file(state, part / WEIGHTS, metadata={"format": "pt"})
                if self.average is not None:
                    save_file(_on_cpu(self.average.module.state_dict()), part / AVERAGED, metadata={"format": "pt"})
                files.write_json(part / ABOUT, self.about)
                files.write_json(part / RESULT, result)
        return result


def steps_an_epoch(config: ClassifyConfig, splits: Splits) -> int:
    """Whole batches an epoch.

    Raises `ConfigError` if there are fewer images than a batch has.
    """
    steps = splits.train_images // config.recipe.batch
    if steps == 0:
        raise ConfigError(
            f"recipe.batch: {config.recipe.batch} images per step, but there are {splits.train_images} in all"
        )
    return steps


def local_batch(config: ClassifyConfig, processes: int) -> int:
    """Images of one step in one process.

    Raises `ConfigError` if the batch cannot be cut into so many equal parts, or into parts of an even number where
    images are mixed.
    """
    recipe = config.recipe
    if recipe.batch % (processes * recipe.accumulate):
        raise ConfigError(
            f"recipe.batch: {recipe.batch} images cannot be cut into {processes} processes and {recipe.accumulate} "
            "parts each"
        )
    local = recipe.batch // processes
    if config.augment is not None and config.augment.mixes and local % 2:
        raise ConfigError(f"augment.mixup and cutmix pair images, and a process has {local} of a batch, an odd number")
    return local


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as safetensors takes them: side by side, and none a view of another."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}

"""Repair of a swapped model: its mixers are fitted to the layers that they replaced, from data without labels.

Two stages, as in LoLCATs (https://arxiv.org/abs/2410.10254) and MOHAWK (https://arxiv.org/abs/2408.10189): first each
layer is matched to the attention that it replaced, then the whole network. The objectives are in
`attnzoo.repairing.losses`. The swapped layers hold their originals, so that the teacher is the same model with these in
their place.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import AttnZooError, OptionError, SwapError, TrainingError, UnsupportedError
from attnzoo.hosts.site import MixerLayer, original_of, swapped_record
from attnzoo.repairing.batches import call, repeated, rows_of
from attnzoo.repairing.kept import (
    buffers_kept,
    modes_kept,
    only_trained,
    recompute_without_dropout,
    watched_outputs,
)
from attnzoo.repairing.losses import divergence, headless, logits_of, real_rows
from attnzoo.repairing.options import Forward, Loss, RepairOptions
from attnzoo.repairing.report import RepairedLayer, RepairReport
from attnzoo.repairing.teacher import (
    Visit,
    as_teacher,
    layer_error,
    own_values,
    teacher_values,
    uninterrupted,
)
from attnzoo.swap import matches, swapped_layers

Tell = Callable[[int, float], None]


def repair(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    objective: str = "layer",
    layers: str | Sequence[str] = "all",
    train: str = "mixers",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    clip: float = 1.0,
    temperature: float = 1.0,
    hidden: float = 0.0,
    loss: Loss | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    accelerator: Any = None,
    progress: Tell | None = None,
) -> RepairReport:
    """Fit the mixers of a swapped model to the attention that they replaced.

    The model is trained in place, by AdamW. Ctrl-C ends it between two steps, and the report says so. The teacher is
    the network before any repair: of what ``train="all"`` changes besides mixers the model keeps a copy, which
    `restore_attention` puts back.

    Parameters
    ----------
    model
        A model with layers swapped for mixers, which keep their originals.
    batches
        Yields what the model takes: a tensor, or a tuple or mapping of all its arguments. Labels are not used: give a
        loader of images and classes as ``[(x,) for x, y in loader]``. It is iterated again where it ends before the
        last step. The ``attention_mask`` of a mapping tells which tokens count.
    steps
        Optimizer steps.
    objective
        ``layer``: every mixer is fitted to its original's output on the original network's input, all of them in one
        forward pass of that. ``model``: the swapped network is fitted to the original network's output.
    layers
        Which swapped layers are fitted: ``"all"``, or patterns as for ``where=`` of `replace_attention`.
    train
        With ``objective="model"``: ``mixers`` alone, or ``all`` other parameters that require a gradient besides; the
        teacher keeps its own.
    lr, weight_decay
        Of AdamW. The learning rate rises, and then falls to 0 as a cosine.
    warmup
        Share of the steps over which it rises.
    clip
        Largest norm of the gradient; 0 for any.
    temperature
        Of the softmax of both networks' logits.
    hidden
        With ``objective="model"``: weight of the mean error of the swapped layers' outputs in the loss.
    loss
        With ``objective="model"``: compares the outputs of both networks, ``loss(swapped, original)``, in place of the
        divergence of their logits, which of a detector are those of classes alone.
    forward
        Calls the model: ``forward(model, batch)``.
    seed
        Of what is random in a step, such as dropout. The global generator is left alone.
    autocast
        ``torch.bfloat16``, to compute in it. Weights in bfloat16 are trained through a copy in float32.
    accelerator
        Accelerate's `Accelerator`, for mixed precision and several processes. Each process has the model, which is not
        prepared, on its device, and its own share of the data.
    progress
        Called after each step with the number of steps done and the loss.

    Raises
    ------
    SwapError
        If no layer is swapped for a mixer, one was swapped with ``keep_original=False``, or a batch does not reach one.
    OptionError
        For a value that an option cannot take, batches that yield nothing, or a batch that the model does not take.
    UnsupportedError
        For weights in float16, a model wrapped for parallel training, or an output without logits and no `loss`.
    TrainingError
        If the loss or a gradient is not finite; the weights are those of before that step.
    """
    options = RepairOptions(
        steps=steps,
        objective=objective,
        layers=layers,
        train=train,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        temperature=temperature,
        hidden=hidden,
        loss=loss,
        forward=forward,
        seed=seed,
        autocast=autocast,
        accelerator=accelerator,
    )
    return Repair(model, options).run(batches, progress)


class Repair:
    """A repair that can be saved and resumed.

    Attributes
    ----------
    layers
        The layers that are fitted, by path.
    step, samples, seconds
        How far it is.
    interrupted
        Whether Ctrl-C ended the last `run`.
    """

    def __init__(self, model: nn.Module, options: RepairOptions) -> None:
        self.model, self.options = model, options
        self.layers = _fitted(model, options.layers)
        self.swapped = _fitted(model, "all")  # of which the teacher has none
        mixers = {p: None for layer in self.layers.values() for p in layer.mixer.parameters() if p.is_floating_point()}
        others = {p: None for layer in self.swapped.values() for p in layer.mixer.parameters()}
        rest = [p for p in model.parameters() if p.is_floating_point() and p.requires_grad and p not in others]
        trained = [*mixers, *rest] if options.train == "all" else list(mixers)
        _refuse_model(model, trained)
        if options.objective == "model" and options.loss is None and options.forward is None and headless(model):
            raise UnsupportedError(
                "this model has no classifier (num_classes=0): give loss=, which compares its outputs"
            )
        self.parameters: dict[nn.Parameter, nn.Parameter] = {p: _master(p) for p in trained}
        self._share_weights()
        self.teacher = teacher_values(model, self.swapped, keep=options.train == "all")
        masters = list(self.parameters.values()) or [nn.Parameter(torch.zeros(()))]  # `run` refuses to fit nothing
        self.optimizer = torch.optim.AdamW(masters, lr=options.lr, weight_decay=options.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.calls: dict[str, int] = {}  # of each fitted layer in one call of the model
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.interrupted = False
        self.before: dict[str, float] | None = None
        self._first: Any = None

    def run(
        self, batches: Iterable[Any], progress: Tell | None = None, *, start: int = 0, until: int | None = None
    ) -> RepairReport:
        """Train to the last step, or to the step `until`, and report.

        `batches` begin with that of step `start`. A resumed repair passes over those that it was trained on before.
        """
        if not self.parameters:
            names = sorted({_name(layer) for layer in self.layers.values()})
            raise SwapError(f"{', '.join(names)} has no parameters that could be fitted; train='all' fits the others")
        if isinstance(batches, (Tensor, Mapping, str)):
            raise OptionError(f"batches must yield batches, and is one {type(batches).__name__}: give a list of it")
        last, ended = self.options.steps if until is None else min(until, self.options.steps), ""
        self.interrupted = False
        with torch.enable_grad(), modes_kept(self.model), only_trained(self.parameters, self.model):
            try:
                for index, batch in enumerate(self._shared_batches(repeated(batches, last - start)), start):
                    if self._first is None:
                        self.before = self.before or self.errors(batch)
                        self._first = batch
                    if index < self.step:
                        continue
                    loss = self.take(batch)
                    if progress is not None:
                        progress(self.step, loss)
                if self._first is None:
                    raise OptionError("batches yielded nothing")
                if self.step < last:
                    ended = f"the data ended after {self.step:,} of {last:,} steps; a list or a loader is begun anew"
                    warnings.warn(ended, stacklevel=3)
            except KeyboardInterrupt:
                self.interrupted = True
                ended = f"interrupted after {self.step:,} of {last:,} steps"
                if self.before is None or self._first is None:
                    raise
            return self.report(ended)

    def take(self, batch: Any) -> float:
        """Take one step on one batch, and give its loss.

        Raises
        ------
        TrainingError
            If the loss or a gradient is not finite.
        """
        began = time.monotonic()
        for parameter in self.parameters:
            parameter.grad = None
        with buffers_kept(self.model, self.options.train == "all"), self._seeded():
            loss = self._layer_step(batch) if self.options.objective == "layer" else self._model_step(batch)
            self._share_gradients()
            self._check_finite(loss, batch)
        if self.options.clip:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), self.options.clip)
        with uninterrupted(), torch.no_grad():
            self.optimizer.step()
            self.schedule.step()
            for parameter, master in self.parameters.items():
                if master is not parameter:
                    parameter.copy_(master)
            self.step += 1
            self.samples += rows_of(batch) * self._processes
            self.seconds += time.monotonic() - began
        return float(loss)

    def errors(self, batch: Any) -> dict[str, float]:
        """Error of every fitted layer by path, and the objective under ``loss``, on one batch; nothing is trained."""
        found: dict[str, list[Tensor]] = {}

        def seen(path: str, visit: Visit) -> None:
            if path in self.layers:
                found.setdefault(path, []).append(visit.error())

        self._set_modes(training=False)
        with torch.no_grad(), self.autocast():
            with own_values(self.teacher), as_teacher(self.model, self.swapped, seen):
                self.call(batch)
            missed = [path for path in self.layers if path not in found]
            if missed:
                raise SwapError(f"a call of the model with this batch does not reach {', '.join(missed)}")
            self.calls = {path: len(each) for path, each in found.items()}
            errors = {path: float(torch.stack(found[path]).mean()) for path in self.layers}
            mean = sum(errors.values()) / len(errors)
            by_layer = self.options.objective == "layer"
            errors["loss"] = mean if by_layer else float(self._model_loss(batch, training=False))
        return errors

    def report(self, ended: str = "") -> RepairReport:
        """Say what was done so far, measured on the first batch."""
        before, after = self.before or {}, self.errors(self._first)
        layers = tuple(
            RepairedLayer(path, _name(layer), before[path], after[path]) for path, layer in self.layers.items()
        )
        loss = before["loss"], after["loss"]
        return RepairReport(
            self.options.objective,
            layers,
            *loss,
            steps=self.step,
            samples=self.samples,
            seconds=self.seconds,
            ended=ended,
            hidden=self.options.hidden,
        )

    def call(self, batch: Any) -> Any:
        """Call the model with a batch; raises `OptionError` where it does not take the first one."""
        try:
            return (self.options.forward or call)(self.model, batch)
        except (TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
            if self._first is not None or isinstance(error, (AttnZooError, torch.OutOfMemoryError)):
                raise
            several = isinstance(batch, (tuple, list, Mapping)) and self.options.forward is None
            hint = (
                ". A batch holds all that the model takes and nothing else: of a loader of images and labels give "
                "forward=lambda model, batch: model(batch[0])"
            )
            raise OptionError(
                f"the model cannot be called with the first batch, {_said(batch)}: {type(error).__name__}: "
                f"{str(error).rstrip('.')}"
                f"{hint if several else ''}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume, but for the model's weights."""
        return {
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "before": self.before,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "masters": [master.detach() for master in self.parameters.values()],
            "teacher": {name: value for name, (_, value) in self.teacher.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`, with the same options and the weights that the model had then."""
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.before = state["before"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["teacher"] and not self.teacher:
            self.teacher = teacher_values(self.model, self.swapped, keep=True)
        with torch.no_grad():
            for master, value in zip(self.parameters.values(), state["masters"], strict=True):
                master.copy_(value)
            for name, value in state["teacher"].items():
                if name in self.teacher:  # or it is in an original, which has the value anyway
                    self.teacher[name][1].copy_(value)

    def _layer_step(self, batch: Any) -> Tensor:
        """Fit every mixer as the original network goes by: its graph is gone before the next one's begins."""
        errors: list[Tensor] = []

        def seen(path: str, visit: Visit) -> None:
            if path in self.layers:
                with torch.enable_grad():
                    with self.autocast():
                        error = visit.error() / (len(self.layers) * self.calls.get(path, 1))
                    self._backward(error)
                errors.append(error.detach())

        self._set_modes(training=True)
        with torch.no_grad(), self.autocast(), own_values(self.teacher), as_teacher(self.model, self.swapped, seen):
            self.call(batch)
        return torch.stack(errors).sum()

    def _model_step(self, batch: Any) -> Tensor:
        loss = self._model_loss(batch, training=True)
        self._backward(loss)
        return loss.detach()

    def _model_loss(self, batch: Any, training: bool) -> Tensor:
        """Loss of the swapped network's output, and of its layers' outputs where that is asked for."""
        targets: dict[str, list[Tensor]] = {}

        def seen(path: str, visit: Visit) -> None:
            targets.setdefault(path, []).append(visit.target)

        watched = self.layers if self.options.hidden > 0 else {}
        self._set_modes(training=False)
        with torch.no_grad(), self.autocast(), own_values(self.teacher), as_teacher(self.model, self.swapped, seen):
            original = self.call(batch)
        self._set_modes(training)
        with self.autocast(), watched_outputs(watched) as found:
            swapped = self.call(batch)
            if self.options.loss is not None:
                loss = self.options.loss(swapped, original)
            else:
                mine, theirs = logits_of(swapped), logits_of(original)
                loss = divergence(mine, theirs, self.options.temperature, real_rows(batch, theirs))
            each = [
                layer_error(self.layers[path], out, target, mask)
                for path, outs in found.items()
                for (out, mask), target in zip(outs, targets[path], strict=True)
            ]
            return loss + self.options.hidden * torch.stack(each).mean() if each else loss

    def _rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        warm = math.ceil(self.options.warmup * self.options.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.options.steps - warm)))

    def _set_modes(self, training: bool) -> None:
        """What is trained is in training mode, all else in evaluation mode.

        Modules of transformers recompute activations (gradient checkpointing) in training mode alone. Where that is
        switched on they are put into it, without their children and without dropout.
        """
        everything = training and self.options.train == "all"
        self.model.train(everything)
        for layer in self.layers.values():
            layer.mixer.train(training)
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                recompute_without_dropout(module, training and not everything and self.options.objective == "model")

    @property
    def _processes(self) -> int:
        return 1 if self.options.accelerator is None else int(self.options.accelerator.num_processes)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which models are called."""
        if self.options.accelerator is not None:
            manager: contextlib.AbstractContextManager[Any] = self.options.accelerator.autocast()
            return manager
        if self.options.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=self.options.autocast)

    def _backward(self, loss: Tensor) -> None:
        if self.options.accelerator is None:
            loss.backward()
        else:
            self.options.accelerator.backward(loss)

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Make what is random in a step depend on seed, step and process alone."""
        devices = sorted({p.device.index or 0 for p in self.parameters if p.device.type == "cuda"})
        rank = 0 if self.options.accelerator is None else int(self.options.accelerator.process_index)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((self.options.seed * 1_000_003 + self.step) * 1_009 + rank)
            yield

    def _shared_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Stop where the batches of any process end, so that none waits for another."""
        if self._processes == 1:
            yield from batches
            return
        while True:
            batch = next(batches, None)
            there = torch.tensor(float(batch is not None), device=self.options.accelerator.device)
            if float(self.options.accelerator.reduce(there, "sum")) < self._processes:
                return
            yield batch

    def _share_weights(self) -> None:
        """Have every process begin with the main one's weights."""
        if self._processes > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                for parameter, master in self.parameters.items():
                    parameter.copy_(broadcast(parameter.detach()))
                    master.copy_(parameter)

    def _share_gradients(self) -> None:
        """Give the optimizer's copies the gradients: the mean over the processes."""
        for parameter, master in self.parameters.items():
            grad = parameter.grad
            if self._processes > 1:
                grad = torch.zeros_like(parameter) if grad is None else grad
                grad = self.options.accelerator.reduce(grad, "mean")
            master.grad = None if grad is None else grad.to(master.dtype)

    def _check_finite(self, loss: Tensor, batch: Any) -> None:
        """Raise `TrainingError`, before the weights are changed, if the loss or a gradient is not finite."""
        gradients = [master.grad for master in self.parameters.values() if master.grad is not None]
        if math.isfinite(float(loss)) and bool(torch.isfinite(nn.utils.get_total_norm(gradients))):
            return
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        broken = [
            names[id(parameter)]
            for parameter, master in self.parameters.items()
            if master.grad is not None and not master.grad.isfinite().all()
        ]
        layers = [path for path, error in self.errors(batch).items() if path != "loss" and not math.isfinite(error)]
        where = f"layer {layers[0]}" if layers else f"the gradient of {broken[0]}" if broken else "the model's output"
        raise TrainingError(
            f"step {self.step + 1}: {where} is not finite; the weights are those of before this step. Try a lower lr, "
            "or another precision"
        )


def _fitted(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, MixerLayer]:
    """The swapped layers that `wanted` selects, by path."""
    layers = {path: layer for path, layer in swapped_layers(model).items() if isinstance(layer, MixerLayer)}
    if not layers:
        raise SwapError(
            "no layer of this model is swapped for a mixer, so there is nothing to fit: call replace_attention(model, "
            "'padre') first; cores run on the model's own weights and need no repair"
        )
    gone = [path for path, layer in layers.items() if original_of(layer) is None]
    if gone:
        raise SwapError(
            "swapped with keep_original=False, or loaded by attnzoo.load, which keeps no originals, so there is "
            f"nothing to fit to: {', '.join(gone)}; repair a model before it is saved"
        )
    if wanted == "all":
        return layers
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    for pattern in patterns:
        if not any(matches(path, pattern) for path in layers):
            raise OptionError(f"layers={pattern!r} matches none of the swapped layers: {', '.join(layers)}")
    return {path: layer for path, layer in layers.items() if any(matches(path, pattern) for pattern in patterns)}


def _refuse_model(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Refuse what cannot be trained here."""
    if any(p.dtype == torch.float16 for p in trained):
        raise UnsupportedError("weights in float16 lose small gradients; repair the model in bfloat16 or float32")
    wrapped = next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    if wrapped is not None:
        raise UnsupportedError(
            "the model is wrapped in DistributedDataParallel, which sums gradients in its own way: give the model "
            "inside it, and accelerator="
        )


def _said(batch: Any) -> str:
    """A batch in a few words."""
    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"{len(batch)} values: {', '.join(map(_said, batch))}"
    return f"a tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"


def _name(layer: nn.Module) -> str:
    record = swapped_record(layer)
    assert record is not None
    return record.info.name


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimizer trains: the parameter itself, or a copy in float32 of one in half precision."""
    half = parameter.dtype == torch.bfloat16
    return nn.Parameter(parameter.detach().float().clone()) if half else parameter

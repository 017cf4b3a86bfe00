"""Repair of a swapped model: mixers are fitted to the layers that they replaced, from data without labels.

    layer:  |mixer(x) - original(x)|^2 / |original(x)|^2, x what the original network gives the layer; every layer apart
    model:  T^2 KL(softmax(original(x) / T) || softmax(swapped(x) / T)), and of swapped layers' outputs where asked

The two stages of LoLCATs (https://arxiv.org/abs/2410.10254) and MOHAWK (https://arxiv.org/abs/2408.10189): attention is
matched layer by layer first, the whole network after. The swapped layers hold their originals, so that the teacher is
the same model with these in their place (`attnzoo.teacher`).
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import check_choice, check_int, check_number
from attnzoo.errors import OptionError, SwapError, TrainingError, UnsupportedError
from attnzoo.hosts.site import MixerLayer, original_of, swapped_record
from attnzoo.swap import matches, swapped_layers
from attnzoo.tables import Column, Table
from attnzoo.teacher import Visit, as_teacher, first_tensor, normalized_error, own_weights

OBJECTIVES = ("layer", "model")
TRAINED = ("mixers", "all")
Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class RepairedLayer:
    """One swapped layer.

    Attributes
    ----------
    path, attention
        Its name in the model, and the mixer's.
    before, after
        Squared error of the mixer's output relative to the original's, on the first batch.
    """

    path: str
    attention: str
    before: float
    after: float


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes
    ----------
    layers
        The layers, in the model's order.
    loss_before, loss_after
        The objective on the first batch, which is trained on as well where `batches` begins anew.
    steps, samples
        Steps taken, and rows of all batches together.
    seconds
        Wall-clock time of the steps.
    ended
        Why it ended before its last step; empty if it did not.
    """

    objective: str
    layers: tuple[RepairedLayer, ...]
    loss_before: float
    loss_after: float
    steps: int
    samples: int
    seconds: float
    ended: str = ""

    def __str__(self) -> str:
        table = Table((Column("layer", code=True), "mixer", "error before", "error after"))
        for layer in self.layers:
            table.add(layer.path, layer.attention, f"{layer.before:.3g}", f"{layer.after:.3g}")
        ended = f"; {self.ended}" if self.ended else ""
        return (
            f"{table.markdown()}\n{self.objective}: {self.loss_before:.3g} to {self.loss_after:.3g} in {self.steps:,} "
            f"steps of {self.samples:,} samples, {self.seconds:.1f} s{ended}"
        )


@dataclass
class RepairOptions:
    """How a repair is done; see `repair`."""

    steps: int
    objective: str = "layer"
    lr: float = 1e-3
    layers: str | Sequence[str] = "all"
    train: str = "mixers"
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0
    temperature: float = 2.0
    hidden: float = 0.0
    loss: Loss | None = None
    forward: Forward | None = None
    autocast: torch.dtype | None = None
    accelerator: Any = None

    def __post_init__(self) -> None:
        check_int("steps", self.steps, minimum=1)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("train", self.train, TRAINED)
        for name in ("lr", "weight_decay", "clip", "hidden"):
            check_number(name, getattr(self, name), minimum=0)
        check_number("warmup", self.warmup, minimum=0, maximum=1)
        check_number("temperature", self.temperature, minimum=1e-3)
        if self.objective == "layer" and self.train == "all":
            raise OptionError('train="all" is for objective="model": layer by layer, nothing but mixers is fitted')


def repair(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    objective: str = "layer",
    progress: Callable[[int, float], None] | None = None,
    **options: Any,
) -> RepairReport:
    """Fit the mixers of a swapped model to the layers that they replaced.

    Parameters
    ----------
    model
        A model with swapped layers that keep their originals. It is trained in place.
    batches
        Gives what the model takes: a tensor, or a tuple or mapping of arguments. No labels are needed. It is begun anew
        where it ends before the last step.
    steps
        Optimizer steps.
    objective
        ``layer``: every mixer is fitted to the original's output on the original network's input, all at once, with one
        forward pass of it. ``model``: the swapped network is fitted to the original one's output.
    progress
        Called after each step with the number of steps done and the loss.
    **options
        lr, weight_decay, clip
            Of AdamW; the learning rate rises over `warmup`, a share of the steps, and falls to 0 as a cosine.
        layers
            Which swapped layers are fitted: ``"all"``, or patterns as for ``where=`` of `replace_attention`.
        train
            ``mixers``, or with ``objective="model"`` ``all`` parameters; the teacher keeps its own.
        temperature
            Of the softmax of both outputs.
        hidden
            With ``objective="model"``, how much the mean error of the swapped layers' outputs adds to the loss.
        loss
            Called with both outputs in place of the divergence: ``loss(swapped, original)``.
        forward
            How the model is called: ``forward(model, batch)``.
        autocast
            A dtype to compute in, or None.
        accelerator
            Accelerate's `Accelerator`, for its device, its precision and several processes.

    Raises
    ------
    SwapError
        If no layer is swapped for a mixer, or one was swapped with ``keep_original=False``.
    OptionError
        For an option that cannot be.
    TrainingError
        If the loss or a gradient is not finite; the weights are those of before that step.
    """
    fit = Repair(model, RepairOptions(steps=steps, objective=objective, **options))
    return fit.run(batches, progress)


class Repair:
    """A repair, step by step, that can be saved and gone on with.

    Attributes
    ----------
    layers
        The layers that are fitted, by path.
    step, samples, seconds
        How far it is.
    """

    def __init__(self, model: nn.Module, options: RepairOptions) -> None:
        self.model, self.options = model, options
        self.layers = _fitted(model, options.layers)
        self.all_layers = _fitted(model, "all")  # the teacher has none of them
        mixers = {p: None for layer in self.layers.values() for p in layer.mixer.parameters() if p.is_floating_point()}
        rest = [p for p in model.parameters() if p.is_floating_point() and p not in mixers]
        trained = [*mixers, *rest] if options.train == "all" else list(mixers)
        if not trained:
            raise SwapError("the mixers have no parameters that could be fitted")
        self.parameters: dict[nn.Parameter, nn.Parameter] = {p: _master(p) for p in trained}
        self.teacher = {p: p.detach().clone() for p in rest} if options.train == "all" else {}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=options.lr, weight_decay=options.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.before: dict[str, float] | None = None
        self.check: Any = None

    def run(self, batches: Iterable[Any], progress: Callable[[int, float], None] | None = None) -> RepairReport:
        """Go on to the last step, and report; an interrupt ends it early, and the report says so."""
        ended = ""
        with _modes_kept(self.model), _trained(self.parameters, self.model):
            try:
                stream = _again_and_again(batches, self.options.steps - self.step)
                for batch in stream:
                    if self.check is None:
                        self.check = batch
                        self.before = self.errors(batch)
                    loss = self.take(batch)
                    if progress is not None:
                        progress(self.step, loss)
                if self.step < self.options.steps:
                    ended = f"the data ended after {self.step:,} of {self.options.steps:,} steps"
                    warnings.warn(ended, stacklevel=3)
            except KeyboardInterrupt:
                ended = f"interrupted after {self.step:,} of {self.options.steps:,} steps"
            return self.report(ended)

    def take(self, batch: Any) -> float:
        """Take one step on one batch, and give its loss."""
        began = time.monotonic()
        self._prepare()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None
        loss = self._layer_step(batch) if self.options.objective == "layer" else self._model_step(batch)
        self._share_gradients()
        self._check_finite(loss, batch)
        if self.options.clip:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.options.clip)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for parameter, master in self.parameters.items():
                if master is not parameter:
                    parameter.copy_(master)
        self.step += 1
        self.samples += _rows(batch) * (1 if self.options.accelerator is None else self.options.accelerator.num_processes)
        self.seconds += time.monotonic() - began
        return float(loss)

    def errors(self, batch: Any) -> dict[str, float]:
        """Error of every fitted layer, and under ``loss`` the objective, on one batch; nothing is trained."""
        found: dict[str, list[Tensor]] = {}

        def seen(path: str, visit: Visit) -> None:
            if path in self.layers:
                found.setdefault(path, []).append(visit.error())

        self._prepare(training=False)
        with torch.no_grad(), self._autocast(), as_teacher(self.model, self.all_layers, seen), self._teacher_weights():
            self.call(batch)
            errors = {path: float(torch.stack(each).mean()) for path, each in found.items()}
        missed = [path for path in self.layers if path not in errors]
        if missed:
            raise SwapError(f"a call of the model with this batch does not reach {', '.join(missed)}")
        with torch.no_grad():
            mean = sum(errors.values()) / len(errors)
            errors["loss"] = mean if self.options.objective == "layer" else float(self._model_loss(batch))
        return errors

    def report(self, ended: str = "") -> RepairReport:
        """Say what was done so far."""
        if self.check is None:
            raise OptionError("batches gave nothing")
        before, after = self.before or {}, self.errors(self.check)
        layers = tuple(
            RepairedLayer(path, _name(layer), before[path], after[path]) for path, layer in self.layers.items()
        )
        return RepairReport(
            self.options.objective, layers, before["loss"], after["loss"], self.step, self.samples, self.seconds, ended
        )

    def state_dict(self) -> dict[str, Any]:
        """All that goes on with the repair, but for the model's own weights and the place in the data."""
        return {
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "before": self.before,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "masters": [master.detach() for master in self.parameters.values()],
            "teacher": list(self.teacher.values()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, of the same model with the weights that it had then."""
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.before = state["before"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        with torch.no_grad():
            for master, value in zip(self.parameters.values(), state["masters"], strict=True):
                master.copy_(value)
            for mine, value in zip(self.teacher.values(), state["teacher"], strict=True):
                mine.copy_(value)

    # ------------------------------------------------------------------------------------------------------ objectives

    def _layer_step(self, batch: Any) -> Tensor:
        """Every mixer is fitted while the original network goes by: its graph is gone before the next one's begins."""
        errors: list[Tensor] = []

        def seen(path: str, visit: Visit) -> None:
            if path in self.layers:
                with torch.enable_grad(), self._autocast():
                    error = visit.error() / len(self.layers)
                self._backward(error)
                errors.append(error.detach())

        with torch.no_grad(), self._autocast(), as_teacher(self.model, self.all_layers, seen):
            self.call(batch)
        return torch.stack(errors).sum()

    def _model_step(self, batch: Any) -> Tensor:
        loss = self._model_loss(batch)
        self._backward(loss)
        return loss.detach()

    def _model_loss(self, batch: Any) -> Tensor:
        """Loss of the swapped network's output, and of its layers' outputs where that is asked for."""
        wanted = self.options.hidden > 0
        targets: dict[str, list[Tensor]] = {}

        def seen(path: str, visit: Visit) -> None:
            targets.setdefault(path, []).append(visit.target)

        with torch.no_grad(), self._autocast(), self._teacher_weights(), as_teacher(self.model, self.all_layers, seen):
            original = self.call(batch)
        with self._autocast(), _outputs(self.layers if wanted else {}) as found:
            swapped = self.call(batch)
            if self.options.loss is not None:
                loss = self.options.loss(swapped, original)
            else:
                loss = divergence(logits_of(swapped), logits_of(original), self.options.temperature)
            if wanted:
                each = [
                    normalized_error(mine, theirs)
                    for path, outs in found.items()
                    for mine, theirs in zip(outs, targets[path], strict=True)
                ]
                loss = loss + self.options.hidden * torch.stack(each).mean()
        return loss

    # ----------------------------------------------------------------------------------------------------------- parts

    def _rate(self, step: int) -> float:
        warm = max(1, math.ceil(self.options.warmup * self.options.steps))
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.options.steps - warm)))

    def _prepare(self, training: bool = True) -> None:
        """Put the mode: what is trained as in training, all else as in evaluation."""
        self.model.train(training and self.options.train == "all")
        for layer in self.layers.values():
            layer.mixer.train(training)

    def call(self, batch: Any) -> Any:
        """Call the model with a batch."""
        if self.options.forward is not None:
            return self.options.forward(self.model, batch)
        return call(self.model, batch)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.accelerator is not None:
            return self.options.accelerator.autocast()
        if self.options.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(next(iter(self.parameters)).device.type, dtype=self.options.autocast)

    def _teacher_weights(self) -> contextlib.AbstractContextManager[None]:
        return own_weights(self.teacher)

    def _backward(self, loss: Tensor) -> None:
        if self.options.accelerator is None:
            loss.backward()
        else:
            self.options.accelerator.backward(loss)

    def _share_gradients(self) -> None:
        """Give the optimizer's copies their gradients: the mean over the processes."""
        for parameter, master in self.parameters.items():
            if parameter.grad is None:
                continue
            grad = parameter.grad
            if self.options.accelerator is not None and self.options.accelerator.num_processes > 1:
                grad = self.options.accelerator.reduce(grad, "mean")
            master.grad = grad.to(master.dtype)

    def _check_finite(self, loss: Tensor, batch: Any) -> None:
        """Raise `TrainingError` before the weights are touched."""
        broken = [] if math.isfinite(float(loss)) else self._broken_layers(batch)
        names = {id(p): name for name, p in self.model.named_parameters()}
        bad = [names.get(id(p), "") for p, m in self.parameters.items() if m.grad is not None and not m.grad.isfinite().all()]
        if math.isfinite(float(loss)) and not bad:
            return
        where = f"layer {broken[0]}" if broken else f"the gradient of {bad[-1]}" if bad else "the output of the model"
        raise TrainingError(
            f"step {self.step + 1}: {where} is not finite; the weights are those of before this step. A lower lr, or "
            "autocast=None, may help"
        )

    def _broken_layers(self, batch: Any) -> list[str]:
        with contextlib.suppress(AttributeError), torch.no_grad():
            return [path for path, error in self.errors(batch).items() if path != "loss" and not math.isfinite(error)]
        return []


def divergence(swapped: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over rows of ``T^2 KL(original || swapped)`` of softmaxes over the last dimension."""
    mine, theirs = (x.float().flatten(0, -2) / temperature for x in (swapped, original.detach()))
    return F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean") * temperature**2


def logits_of(output: Any) -> Tensor:
    """The logits of what a model gives: a tensor, an output of transformers, or the first of a tuple.

    Raises
    ------
    UnsupportedError
        If none of these is there.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        found = output[0]
    if found is None:
        raise UnsupportedError(
            f"the model gives {type(output).__name__}, which has no logits: say by loss= how two of them are compared"
        )
    return found


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a mapping of them, moved to where it is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{name: _moved(value, device) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*(_moved(value, device) for value in batch))
    return model(_moved(batch, device))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _rows(batch: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)


def _fitted(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, MixerLayer]:
    layers = {path: layer for path, layer in swapped_layers(model).items() if isinstance(layer, MixerLayer)}
    if not layers:
        raise SwapError("no layer of this model is swapped for a mixer, so there is nothing to fit; call replace_attention first")
    gone = [path for path, layer in layers.items() if original_of(layer) is None]
    if gone:
        raise SwapError(f"swapped with keep_original=False, so that there is nothing to fit to: {', '.join(gone)}")
    if wanted == "all":
        return layers
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    unmet = [pattern for pattern in patterns if not any(matches(path, pattern) for path in layers)]
    if unmet:
        raise SwapError(f"layers={unmet} fits no swapped layer; they are {', '.join(layers)}")
    return {path: layer for path, layer in layers.items() if any(matches(path, pattern) for pattern in patterns)}


def _name(layer: nn.Module) -> str:
    record = swapped_record(layer)
    assert record is not None
    return record.info.name


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimizer trains: the parameter itself, or a copy in float32 of one in half precision."""
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return nn.Parameter(parameter.detach().float().clone()) if half else parameter


def _again_and_again(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """So many batches; those of an iterable that can be begun anew, again and again."""
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            return


@contextlib.contextmanager
def _outputs(layers: Mapping[str, MixerLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what layers give, with their graphs."""
    found: dict[str, list[Tensor]] = {}

    def look(path: str) -> Callable[..., None]:
        return lambda module, args, out: found.setdefault(path, []).append(first_tensor(out))

    hooks = [layer.register_forward_hook(look(path)) for path, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Within, modules may change between training and evaluation; after, each is as it was."""
    modes = {module: module.training for module in model.modules()}
    originals = {o: o.training for layer in swapped_layers(model).values() if (o := original_of(layer)) is not None}
    try:
        yield
    finally:
        for module, mode in (modes | originals).items():
            module.training = mode


@contextlib.contextmanager
def _trained(parameters: Iterable[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Within, these parameters alone have gradients; after, none has any, and each asks for one as before."""
    asked = {p: p.requires_grad for p in [*model.parameters(), *parameters]}
    try:
        for p in asked:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, was in asked.items():
            p.requires_grad_(was)
            p.grad = None

"""Which layers can do without their attention: what a swap of each one alone costs, after a short fit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnzoo.checks import check_int
from attnzoo.errors import OptionError, SwapError, UnsupportedError
from attnzoo.extras import require
from attnzoo.hosts.site import MixerLayer, original_of
from attnzoo.registry import describe
from attnzoo.repairing.losses import divergence, headless, logits_of, real_rows
from attnzoo.repairing.options import Loss, RepairOptions
from attnzoo.repairing.repair import Repair
from attnzoo.repairing.teacher import as_teacher
from attnzoo.swap import replace_attention, restore_attention, swapped_layers
from attnzoo.tables import Column, Table

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes
    ----------
    path
        Its name in the model.
    cost
        What the model loses with this layer swapped and all others its own: the divergence of its output from the
        original's, in nats per row, or what `metric` lost.
    error
        Squared error of the fitted mixer's output relative to the original's, on the first batch held out.
    share
        Share of the model's time that the layer's own attention takes, from 0 to 1.
    """

    path: str
    cost: float
    error: float
    share: float


@dataclass(frozen=True)
class SensitivityReport:
    """What `sensitivity` found; prints as a table, the cheapest layer first.

    Attributes
    ----------
    attention
        The mixer.
    layers
        In the model's order.
    steps
        Steps that the mixers were fitted for.
    """

    attention: str
    layers: tuple[LayerSensitivity, ...]
    steps: int

    def cheapest(self, count: int) -> list[str]:
        """Names of the `count` layers that cost least, in the model's order: what ``where=`` takes.

        Raises
        ------
        OptionError
            If there are not so many.
        """
        check_int("count", count, minimum=1)
        if count > len(self.layers):
            raise OptionError(f"there are {len(self.layers)} layers, not {count}")
        chosen = {layer.path for layer in self.ordered()[:count]}
        return [layer.path for layer in self.layers if layer.path in chosen]

    def ordered(self) -> list[LayerSensitivity]:
        """The layers, the cheapest first."""
        return sorted(self.layers, key=lambda layer: layer.cost)

    def plot(self, path: str | Path) -> None:
        """Draw cost and share of time of each layer, in the model's order, into a picture."""
        require("matplotlib", extra="vision")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(5.0, 0.45 * len(self.layers)), 4.2), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        places = range(len(self.layers))
        above.bar(places, [layer.cost for layer in self.layers])
        above.set_ylabel("cost of the swap")
        below.bar(places, [100 * layer.share for layer in self.layers], color="0.6")
        below.set_ylabel("share of time, %")
        below.set_xticks(places, [layer.path for layer in self.layers], rotation=60, ha="right", fontsize=8)
        above.set_title(f"{self.attention} in one layer at a time, fitted for {self.steps:,} steps", fontsize=10)
        figure.savefig(path)

    def __str__(self) -> str:
        table = Table((Column("layer", code=True), "cost", "error", "share of time"))
        for layer in self.ordered():
            table.add(layer.path, f"{layer.cost:.3g}", f"{layer.error:.3g}", f"{layer.share:.1%}")
        return table.markdown()


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    name: str,
    *,
    steps: int = 200,
    held_out: int = 2,
    where: str | Sequence[str] | None = None,
    metric: Metric | None = None,
    loss: Loss | None = None,
    repair: Mapping[str, Any] | None = None,
    **options: Any,
) -> SensitivityReport:
    """Swap every layer for a mixer, fit them all to their originals, and see what each costs alone.

    The model is as it was at the end; the mixers' weights are drawn from the global generator, as in a swap.

    Parameters
    ----------
    model
        A model with its own attention.
    batches
        As for `attnzoo.repair`. Where they end before the last step and are iterated again, their order must be the
        same, or those held out are trained on.
    name
        A mixer.
    steps
        Steps of ``attnzoo.repair(..., objective="layer")``.
    held_out
        Number of batches, the first ones, that are not trained on: costs are measured on them.
    where
        Which layers are looked at.
    metric
        Quality of the model, the higher the better, in place of the divergence of its output.
    loss
        Compares the model's output with the original's, in place of the divergence of their logits.
    repair
        Options of `attnzoo.repair` for the fit, such as ``{"lr": 3e-3, "forward": call}``.
    **options
        Of `replace_attention`: the mixer's own, and `init`.

    Raises
    ------
    SwapError
        If the model has swapped layers, or `name` is no mixer.
    UnsupportedError
        For a model without a classifier, with neither `metric` nor `loss`.
    OptionError
        If the batches are too few, an option is invalid, or both `metric` and `loss` are given.
    """
    check_int("held_out", held_out, minimum=1)
    if metric is not None and loss is not None:
        raise OptionError("metric and loss both stand in place of the divergence: give one of them")
    if describe(name).kind != "mixer":
        raise SwapError(f"{name!r} is no mixer: it runs on the model's own weights, and there is nothing to fit")
    if wrong := sorted({"steps", "objective", "layers"} & set(repair or ())):
        raise OptionError(f"repair={wrong}: steps and where are options of sensitivity itself, which fits by layer")
    if swapped_layers(model):
        raise SwapError("this model has swapped layers; sensitivity looks at its own: call restore_attention first")
    stream = iter(batches)
    held = list(itertools.islice(stream, held_out))
    first = [*itertools.islice(stream, 1)]
    few = f"batches gave {len(held)}, of which {held_out} are held out and none are left to fit to: give more"
    if len(held) < held_out:
        raise OptionError(few)
    if metric is None and loss is None and headless(model):
        raise UnsupportedError("this model has no classifier (num_classes=0): give metric=, or loss=")
    modes = {module: module.training for module in model.modules()}
    replace_attention(model, name, where=where, **options)
    try:
        fit = Repair(model, RepairOptions(steps=steps, objective="layer", **(repair or {})))
        if fit.parameters:  # or there is nothing to fit
            if not first:
                raise OptionError(few)
            fit.run(_Rest(itertools.chain(first, stream), batches, held_out))
        if fit.interrupted:
            raise KeyboardInterrupt
        model.eval()
        errors = fit.errors(held[0])
        with torch.no_grad(), fit.autocast():
            costs = _divergences(model, fit, held, loss) if metric is None else _lost(model, fit, metric)
            shares = _shares(model, fit, held[0])
    finally:
        restore_attention(model)
        for module, mode in modes.items():
            module.training = mode
    layers = tuple(LayerSensitivity(path, costs[path], errors[path], shares[path]) for path in fit.layers)
    return SensitivityReport(name, layers, fit.step)


def _alone(fit: Repair, path: str | None) -> dict[str, MixerLayer]:
    """The layers that are their originals where that at `path` alone, or none, is swapped."""
    return {other: layer for other, layer in fit.swapped.items() if other != path}


def _divergences(model: nn.Module, fit: Repair, held: Sequence[Any], loss: Loss | None) -> dict[str, float]:
    """How far the output is from the original's with each layer swapped alone; the mean of the batches."""
    compared: Callable[[Any], Any] = logits_of if loss is None else lambda output: output
    found: dict[str, list[float]] = {path: [] for path in fit.layers}
    for batch in held:
        with as_teacher(model, _alone(fit, None)):
            original = compared(fit.call(batch))
        for path, each in found.items():
            with as_teacher(model, _alone(fit, path)):
                swapped = compared(fit.call(batch))
            if loss is None:
                each.append(float(divergence(swapped, original, mask=real_rows(batch, original))))
            else:
                each.append(float(loss(swapped, original)))
    return {path: sum(each) / len(each) for path, each in found.items()}


def _lost(model: nn.Module, fit: Repair, metric: Metric) -> dict[str, float]:
    """What `metric` loses with each layer swapped alone."""

    def quality(path: str | None) -> float:
        with as_teacher(model, _alone(fit, path)):
            return metric(model)

    original = quality(None)
    return {path: original - quality(path) for path in fit.layers}


def _shares(model: nn.Module, fit: Repair, batch: Any, repeats: int = 3) -> dict[str, float]:
    """Share of the original model's time that each layer takes: the median of a few calls."""
    seconds: dict[str, list[float]] = {path: [] for path in fit.layers}
    whole: list[float] = []
    with as_teacher(model, fit.swapped), _timed(fit.layers, seconds):
        for _ in range(repeats + 1):
            began = _now()
            fit.call(batch)
            whole.append(_now() - began)
    calls = {path: len(each) // (repeats + 1) or 1 for path, each in seconds.items()}
    total = sorted(whole[1:])[repeats // 2]
    shares = {}
    for path, each in seconds.items():
        later = sorted(each[calls[path] :])  # without those of the first call of the model
        shares[path] = min(1.0, later[len(later) // 2] * calls[path] / total) if later else 0.0
    return shares


@contextmanager
def _timed(layers: Mapping[str, MixerLayer], seconds: Mapping[str, list[float]]) -> Iterator[None]:
    hooks = []

    def begin(module: nn.Module, args: Any) -> None:
        module.__dict__["attnzoo_began"] = _now()

    def end(path: str) -> Callable[..., None]:
        return lambda module, args, out: seconds[path].append(_now() - module.__dict__.pop("attnzoo_began"))

    for path, layer in layers.items():
        original = original_of(layer)
        assert original is not None
        hooks += [original.register_forward_pre_hook(begin), original.register_forward_hook(end(path))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _now() -> float:
    """The clock, once the device is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Rest:
    """The batches after those held out: what is left of a stream, and then, if it can be begun anew, all again."""

    def __init__(self, stream: Iterator[Any], batches: Iterable[Any], held_out: int) -> None:
        self.stream, self.batches, self.held_out = stream, batches, held_out

    def __iter__(self) -> Iterator[Any]:
        stream, self.stream = self.stream, iter(())
        yield from stream
        if not isinstance(self.batches, Iterator):
            yield from itertools.islice(iter(self.batches), self.held_out, None)

"""What a repair did."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.tables import Column, Table


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
    """What a repair did; prints as a table.

    Attributes
    ----------
    objective
        ``layer`` or ``model``.
    layers
        The layers that were fitted, in the model's order.
    loss_before, loss_after
        The objective on the first batch, which is one of those trained on.
    steps, samples
        Optimizer steps, and rows of all batches together: images, or sequences.
    seconds
        Wall-clock time of the steps.
    ended
        Why it ended before its last step; empty if it did not.
    hidden
        Weight of the layers' errors in the loss.
    """

    objective: str
    layers: tuple[RepairedLayer, ...]
    loss_before: float
    loss_after: float
    steps: int
    samples: int
    seconds: float
    ended: str = ""
    hidden: float = 0.0

    def __str__(self) -> str:
        table = Table((Column("layer", code=True), "mixer", "error before", "error after"))
        for layer in self.layers:
            table.add(layer.path, layer.attention, f"{layer.before:.3g}", f"{layer.after:.3g}")
        ended = f"; {self.ended}" if self.ended else ""
        worse = "; it rose: take more steps, or a lower lr" if self.loss_after > self.loss_before else ""
        others = (
            " (errors of single layers are not what is minimized)"
            if self.objective == "model" and not self.hidden
            else ""
        )
        return (
            f"{table.markdown()}\n{self.objective} loss {self.loss_before:.3g} -> {self.loss_after:.3g} in "
            f"{self.steps:,} steps, {self.samples:,} samples, {self.seconds:.1f} s{worse}{others}{ended}"
        )

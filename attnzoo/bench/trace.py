"""What one forward really ran: the operators by name, and their FLOPs where PyTorch has a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry

MIXING_WORDS = ("attention", "softmax", "bmm", "conv", "depthwise", "fft")
MOVES = frozenset(
    {
        "_to_copy",
        "_unsafe_view",
        "cat",
        "clone",
        "copy_",
        "detach",
        "empty",
        "empty_like",
        "fill_",
        "new_empty",
        "zeros",
    }
)
"""Operators of ATen that only make or move data, beside the views."""


def _convolution_backward(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: Any, **options: Any,
) -> int:  # fmt: skip
    """As many operations for each gradient as for the convolution; torch's own formula counts groups as if dense."""
    return (bool(output_mask[0]) + bool(output_mask[1])) * conv_flop_count(x, weight, grad, transposed=transposed)


FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward}


@dataclass(frozen=True)
class Trace:
    """FLOPs of one call (a multiply and an add are two), the operators that ran, and those that no formula counts."""

    flops: int
    ops: tuple[str, ...]
    uncounted: tuple[str, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """The operators that say which attention ran."""
        return tuple(op for op in self.ops if any(word in op for word in MIXING_WORDS))


def trace(run: Callable[[], object]) -> Trace:
    """Call `run` once and give its operators and FLOPs."""
    seen = _Seen()
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with seen, counter:  # the counter, inside, takes composite operators apart; `seen` gets what is left
        run()
    return Trace(counter.get_total_flops(), tuple(sorted(seen.ops)), tuple(sorted(seen.uncounted)))


class _Seen(TorchDispatchMode):
    """Notes every operator that gets this far."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        self.ops.add(name)
        if func.overloadpacket not in flop_registry and not self._only_moves(func, name):
            self.uncounted.add(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _only_moves(func: Any, name: str) -> bool:
        library, _, operator = name.partition(".")
        return func.is_view or library == "prim" or (library == "aten" and operator in MOVES)


def missing_op(found: tuple[str, ...], word: str) -> str | None:
    """Say what is wrong where no operator has `word` in its name; None if one has."""
    if any(word in op for op in found):
        return None
    return f"no operator with {word!r} in its name ran; seen: {', '.join(found) or 'none'}"

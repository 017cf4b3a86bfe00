"""What one call really ran: the operators by name, and their FLOPs, or why these are not known.

Formulas are PyTorch's where it has one. `FORMULAS` holds those that some supported release lacks or gets wrong, handed
to the counter of each trace. Where an operator that multiplies matrices ran without a formula, there is no figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry

Shape = tuple[int, ...]
BY_PRODUCT = 1  # how `torch.cdist` hands down compute_mode="use_mm_for_euclid_dist"; 0 and None: where there are many
MANY_ROWS = 25  # above which `torch.cdist` makes Euclidean distances of a product, unless told not to
MIXING_WORDS = ("attention", "softmax", "bmm", "conv", "fft", "attnzoo")  # the last of all operators of our own
MOVES = frozenset({"_to_copy", "_unsafe_view", "cat", "clone", "copy_", "detach", "empty", "empty_like", "fill_",
                   "new_empty", "zeros"})  # fmt: skip
"""Operators of ATen that only make or move data, besides the views."""
FUSED = (
    "flash_attention_for_cpu",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
)
"""Backends of torch's attention. Up to torch 2.11 its own formulas refuse grouped queries, where these count them."""

FAST_PATH = frozenset({"aten._transformer_encoder_layer_fwd", "aten._native_multi_head_attention"})
"""A whole layer of torch's encoders, and its whole attention, as one operator."""


def _convolution_backward(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: Any, **options: Any,
) -> int:  # fmt: skip
    """As many operations for each gradient as for the convolution; torch's own formula counts groups as if dense."""
    return (bool(output_mask[0]) + bool(output_mask[1])) * conv_flop_count(x, weight, grad, transposed=transposed)


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    """Two products, ``(B, H, N, D) x (B, H, D, S)`` and ``(B, H, N, S) x (B, H, S, Dv)``, counted whole if causal."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (3 * width + 2 * value[-1])


def _euclidean(a: Shape, b: Shape, *rest: Any, **options: Any) -> int:
    """One product, ``(*, N, D) x (*, D, M)``, of which distances ``(*, N, M)`` are made."""
    return 2 * math.prod(a) * b[-2]


def _distances(a: Shape, b: Shape, p: float, mode: int | None = None, *rest: Any, **options: Any) -> int:
    """The product of Euclidean distances between many rows; none where differences are taken, element by element."""
    by_product = mode == BY_PRODUCT or (not mode and max(a[-2], b[-2]) > MANY_ROWS)
    return _euclidean(a, b) if p == 2 and by_product else 0


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    own: dict[str, Callable[..., int]] = {
        "convolution_backward": _convolution_backward,
        **{f"_scaled_dot_product_{backend}": _attention for backend in FUSED},
        **{f"_scaled_dot_product_{backend}_backward": _attention_backward for backend in FUSED},
        "_cdist_forward": _distances,
        "_euclidean_dist": _euclidean,
    }
    return {getattr(aten, name): formula for name, formula in own.items() if hasattr(aten, name)}


FORMULAS = _formulas()

MULTIPLIES = re.compile(
    r"(^|_)((add|baddb|addb|b|int|grouped|scaled|foreach)*mm|(add)?mv|v?dot|addr|matmul|(bi)?linear|conv\d?d?|convolution|"
    r"depthwise\w*|attention|einsum|cdist|dist|rnn|lstm|gru)(_|$)"
)
"""Names of operators that multiply matrices: without a formula for one of them there is no count."""


@dataclass(frozen=True)
class Trace:
    """What one call ran: its operators, and those of them that no formula counts.

    `flops` are floating-point operations, a multiply and an add being two; None if something that counts had no
    formula, and then `flops_note` says what.
    """

    flops: int | None
    ops: tuple[str, ...]
    uncounted: tuple[str, ...]
    flops_note: str = ""

    @property
    def backends(self) -> tuple[str, ...]:
        """The operators that say which attention ran."""
        return tuple(op for op in self.ops if any(word in op for word in MIXING_WORDS))


def trace(run: Callable[[], object]) -> Trace:
    """Call `run` and give its operators and FLOPs.

    It is called once; where torch's fast path ran, a second time without, for its FLOPs: no formula sees into it.
    """
    found = _traced(run)
    if not FAST_PATH.intersection(found.ops):
        return found
    with without_fast_path():
        return replace(_traced(run), ops=found.ops)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Have torch's encoders call their attention layers, which the fast path goes round."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _traced(run: Callable[[], object]) -> Trace:
    seen = _Seen()
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with seen, counter:  # the counter, inside, takes composite operators apart; `seen` gets what is left
        run()
    ops, uncounted = tuple(sorted(seen.ops)), tuple(sorted(seen.uncounted))
    missing = [op for op in uncounted if MULTIPLIES.search(op.rpartition(".")[2])]
    if missing:
        return Trace(None, ops, uncounted, f"no formula for the FLOPs of {', '.join(missing)}")
    return Trace(counter.get_total_flops(), ops, uncounted)


class _Seen(TorchDispatchMode):
    """Notes every operator that gets this far."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        self.ops.add(name)
        known = func.overloadpacket in flop_registry or func.overloadpacket in FORMULAS
        if not known and not self._only_moves(func, name):
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

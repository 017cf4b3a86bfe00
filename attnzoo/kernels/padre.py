"""A layer of PADRe without gradients, in one call on a CPU.

    Y_i = A_i X B_i,   Z_1 = Y_1,   Z_{i+1} = (C_i Z_i D_i) * Y_{i+1}     (* elementwise, i = 1..d)

https://arxiv.org/abs/2407.11306, with A and C depthwise convolutions over the grid, zeros beyond its edges, B and D
maps over channels, each with a bias; what A and C do with prefix tokens is in `attnzoo.mixers.token_mixing`. C++,
compiled at the first call (see `native`), computes it in float32: maps over channels a few rows ahead of the
convolutions that read them, products where a convolution ends, so that only Z_i are written to memory, and with C and D
the identity only Z_d. `fits` says where it runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.kernels.depthwise import in_transform, side_by_side
from attnzoo.kernels.native import library

SYMBOLS = ("attnzoo_padre",)
NO_PREFIX = (0, 0, 0)
PLAIN = (Tensor, nn.Parameter)


class Weights(NamedTuple):
    """Weights of a layer of degree d, C channels, kernels of K x K, K odd. The parts of C and D may all be empty lists.

    Attributes
    ----------
    b, b_bias
        B_1 to B_d below each other: ``(d C, C)`` as (out, in), and ``(d C,)``.
    a, a_bias
        A_1 to A_d: ``(C, 1, K, K)`` each, and ``(C,)``.
    d, d_bias
        D_1 to D_{d-1}: ``(C, C)`` each, and ``(C,)``.
    c, c_bias
        C_1 to C_{d-1}: as A.
    a_prefix, c_prefix
        Where there are prefix tokens, the weights ``own``, ``to_prefix`` and ``to_patches`` of A_1, then those of A_2
        and so on: ``(C,)`` each; otherwise empty.
    """

    b: Tensor
    b_bias: Tensor
    a: Sequence[Tensor]
    a_bias: Sequence[Tensor]
    d: Sequence[Tensor] = ()
    d_bias: Sequence[Tensor] = ()
    c: Sequence[Tensor] = ()
    c_bias: Sequence[Tensor] = ()
    a_prefix: Sequence[Tensor] = ()
    c_prefix: Sequence[Tensor] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        mixings = *self.a, *self.a_bias, *self.c, *self.c_bias, *self.a_prefix, *self.c_prefix
        return self.b, self.b_bias, *self.d, *self.d_bias, *mixings


def fits(x: Tensor, weights: Weights) -> bool:
    """Whether `padre` can compute this: float32 on a CPU, no gradient recorded, and a compiler found.

    As with `depthwise2d`, an exported program and torch.func's transforms go through torch's own operators alone; so do
    subclasses of tensors. Of the weights' dtypes only B's is looked at, which all others must have in a layer that
    works at all.
    """
    if any(t.dtype is not torch.float32 or t.device.type != "cpu" for t in (x, weights.b)):
        return False
    if any(type(t) not in PLAIN or t.layout is not torch.strided for t in (x, *weights.tensors)):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in weights.tensors)):
        return False
    return not in_transform((x, *weights.tensors)) and is_compiled()


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Whether the C++ is there."""
    return library("padre", SYMBOLS) is not None


def padre(x: Tensor, weights: Weights, height: int, width: int) -> Tensor:
    """Compute Z_d.

    Parameters
    ----------
    x
        ``(B, P + height * width, C)``, the prefix of P tokens first.
    weights
        Those of the layer.
    height, width
        Size of the grid.

    Returns
    -------
    Tensor
        ``(B, P + height * width, C)``.

    Raises
    ------
    ShapeError
        If shapes do not fit together.
    UnsupportedError
        If gradients are recorded, tensors are not float32 on a CPU, or there is no compiler.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights.tensors)):
        raise UnsupportedError("attnzoo::padre has no gradient; call the mixer `padre`")
    out: Tensor = torch.ops.attnzoo.padre(x, *weights, height, width)
    return out


# not `torch.library.custom_op`, which takes a tenth of the time of a small layer to look for gradients
_LIBRARY = torch.library.Library("attnzoo", "FRAGMENT")
_LIBRARY.define(
    "padre(Tensor x, Tensor b, Tensor b_bias, Tensor[] a, Tensor[] a_bias, Tensor[] d, Tensor[] d_bias, Tensor[] c, "
    "Tensor[] c_bias, Tensor[] a_prefix, Tensor[] c_prefix, SymInt height, SymInt width) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "padre", "CPU")
def _padre(
    x: Tensor,
    b: Tensor,
    b_bias: Tensor,
    a: list[Tensor],
    a_bias: list[Tensor],
    d: list[Tensor],
    d_bias: list[Tensor],
    c: list[Tensor],
    c_bias: list[Tensor],
    a_prefix: list[Tensor],
    c_prefix: list[Tensor],
    height: int,
    width: int,
) -> Tensor:
    weights = Weights(b, b_bias, a, a_bias, d, d_bias, c, c_bias, a_prefix, c_prefix)
    _check(x, weights, height, width)
    if not x.numel():
        return torch.empty_like(x)
    x = side_by_side(x)
    batch, tokens, channels = x.shape
    count, factors, keep = _factors(weights)
    out = x.new_empty(x.shape)
    spare = torch.empty_like(out) if d else None
    failed = _function()(
        x.data_ptr(), x.stride(0), x.stride(1), factors, count, None if spare is None else spare.data_ptr(),
        out.data_ptr(), batch, tokens - height * width, height, width, channels, a[0].shape[-1],
        torch.get_num_threads(),
    )  # fmt: skip
    del keep
    if failed:
        raise MemoryError("a layer of PADRe ran out of memory")
    return out


@torch.library.register_fake("attnzoo::padre")
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.attnzoo.padre)
def _flops(
    x: tuple[int, ...], b: Any, b_bias: Any, a: Any, a_bias: Any, d: Any, d_bias: Any, c: Any, *args: Any, **kwargs: Any
) -> int:
    """A multiply and an add per weight of a map for each token, and per tap for each patch, from arguments' shapes."""
    (batch, tokens, channels), (height, width) = x, args[-2:]
    return 2 * batch * channels * sum(tokens * channels + height * width * taps[-1] ** 2 for taps in (*a, *c))


def _factors(weights: Weights) -> tuple[int, ctypes.Array[ctypes.c_int64], list[Tensor]]:
    """Number of factors, a ``Factor`` of ``padre.cpp`` for each, and the tensors to keep while they are in use."""
    keep: list[Tensor] = []

    def addresses(tensors: Sequence[Tensor]) -> list[int]:
        found = [t.contiguous() for t in tensors]
        keep.extend(found)
        return [t.data_ptr() for t in found]

    (b, b_bias), a, a_bias, d, d_bias, c, c_bias, a_prefix, c_prefix = map(addresses, (weights[:2], *weights[2:]))
    channels, size = weights.b.shape[1], weights.b.element_size()
    fields: list[int] = []
    for i in range(len(a)):
        if i and d:
            prefix = c_prefix[3 * i - 3 : 3 * i] or NO_PREFIX
            fields += (d[i - 1], d_bias[i - 1], c[i - 1], c_bias[i - 1], *prefix, i, 0)
        own = b + i * channels * channels * size, b_bias + i * channels * size
        prefix = a_prefix[3 * i : 3 * i + 3] or NO_PREFIX
        fields += (*own, a[i], a_bias[i], *prefix, i if d else 0, 1)
    return len(a) + len(d), (ctypes.c_int64 * len(fields))(*fields), keep


def _function() -> Any:
    """`attnzoo_padre`, told the types of its arguments."""
    found = library("padre", SYMBOLS)
    if found is None:
        raise UnsupportedError("attnzoo::padre needs its C++, which could not be compiled; call the mixer `padre`")
    if found.attnzoo_padre.argtypes is None:
        address, number = ctypes.c_void_p, ctypes.c_int64
        found.attnzoo_padre.argtypes = (
            address, number, number, address, number, address, address, *[number] * 6, ctypes.c_int
        )  # fmt: skip
    return found.attnzoo_padre


def _check(x: Tensor, weights: Weights, height: int, width: int) -> None:
    if x.dim() != 3 or min(height, width) < 1 or x.shape[1] < height * width:
        raise ShapeError(f"tokens of a grid {(height, width)} are (B, P + {height * width}, C), not {tuple(x.shape)}")
    channels, degree, between = x.shape[2], len(weights.a), len(weights.d)
    size = weights.a[0].shape[-1] if degree else 0  # and 0 is not odd
    prefix = x.shape[1] > height * width
    row, square, taps = (channels,), (channels, channels), (channels, 1, size, size)
    fitting = (
        size % 2 == 1
        and weights.b.shape == (degree * channels, channels)
        and weights.b_bias.shape == (degree * channels,)
        and len(weights.a_bias) == degree
        and between in (0, degree - 1)
        and len(weights.d_bias) == len(weights.c) == len(weights.c_bias) == between
        and all(t.shape == taps for t in (*weights.a, *weights.c))
        and all(t.shape == square for t in weights.d)
        and len(weights.a_prefix) == 3 * degree * prefix
        and len(weights.c_prefix) == 3 * between * prefix
        and all(t.shape == row for some in (weights.a_bias, weights.d_bias, weights.c_bias) for t in some)
        and all(t.shape == row for t in (*weights.a_prefix, *weights.c_prefix))
    )
    if not fitting:
        shapes = [[tuple(t.shape) for t in ([part] if isinstance(part, Tensor) else part)] for part in weights]
        raise ShapeError(f"weights of degree {degree} and {channels} channels do not fit together: {shapes}")
    tensors = (x, *weights.tensors)
    if any(t.dtype is not torch.float32 or t.device.type != "cpu" for t in tensors):
        kinds = sorted({f"{t.dtype} on {t.device}" for t in tensors})
        raise UnsupportedError(f"attnzoo::padre is for float32 on CPUs, not {kinds}; call the mixer `padre`")

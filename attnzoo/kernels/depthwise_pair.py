"""Fused depthwise pair: two depthwise convolutions of tokens, and the product of what they give.

    O = add + (w_a (*) X_a + b_a) * (w_b (*) X_b + b_b)       ((*) a convolution, * elementwise)

One step of PADRe's recursion, Z_{i+1} = (C_i Z_i D_i) * (A_{i+1} X B_{i+1}), https://arxiv.org/abs/2407.11306, and what
its time goes into. Without w_b the second factor is X_b itself (Conv2Former); without X_b there is no product.

Tokens are ``(B, H * W, C)``, channels last, on a grid with zeros beyond its edges; a sequence is a grid of one row.
``causal`` puts a kernel's last tap on the token itself, otherwise its middle one. Sums are in float32 (float64 for
float64). On GPUs in Triton: a tile of outputs stays in registers while the rows under it pass by, each value of X being
read from memory once and from the cache for every tap. `_plain` multiplies and adds; `_banded` writes the taps along a
row as a band of a matrix, so that tensor cores multiply (half precision, 2-D kernels); what is faster is found out at
the first call of a kind. For the backward both convolutions are kept; their gradients are convolutions with the kernels
turned round, and those of the weights are summed in parts, in one order. On CPUs the convolutions are those of
`depthwise`, elsewhere torch's.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from attnzoo.errors import ShapeError
from attnzoo.kernels.depthwise import depthwise2d, depthwise2d_product
from attnzoo.kernels.dispatch import launch, need_triton, note, side_by_side, sums_dtype, triton_works, wide
from attnzoo.kernels.language import tl, triton

LINE, PIXELS = 1, 2  # dimensions of a kernel
PROGRAMS = 4096  # that sum a weight's gradient: several for each processor of a large GPU


def depthwise_pair(
    x_a: Tensor,
    weight_a: Tensor,
    bias_a: Tensor | None = None,
    x_b: Tensor | None = None,
    weight_b: Tensor | None = None,
    bias_b: Tensor | None = None,
    *,
    grid: tuple[int, int],
    causal: bool = False,
    mask: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Convolve, and multiply.

    Parameters
    ----------
    x_a, x_b
        ``(B, H * W, C)``. Without `x_b` the convolution of `x_a` is given as it is.
    weight_a, weight_b
        ``(C, 1, K, K)``, or ``(C, 1, K)`` to convolve along rows alone; K odd unless `causal`. Both have one shape.
        Without `weight_b` the second factor is `x_b` itself.
    bias_a, bias_b
        ``(C,)``, or ``(B, C)``: one an image.
    grid
        Height H and width W.
    causal
        Let a token see those before it in its row and itself; for kernels along rows.
    mask
        ``(B, H * W)``, True where a token is real. What stands elsewhere (NaN included) is read as zero, and the output
        there is zero.
    add
        ``(B, H * W, C)``, added to the product.

    Returns
    -------
    Tensor
        ``(B, H * W, C)``, in the dtype of `x_a`.

    Raises
    ------
    ShapeError
        If shapes do not fit together.
    """
    _check(x_a, weight_a, bias_a, x_b, weight_b, bias_b, grid, causal, mask, add)
    if not triton_works(x_a.device):
        note("depthwise_pair", "torch")
        return reference(x_a, weight_a, bias_a, x_b, weight_b, bias_b, grid=grid, causal=causal, mask=mask, add=add)
    given = (x_a, weight_a, bias_a, x_b, weight_b, bias_b, add)
    dtype = x_a.dtype
    if torch.is_autocast_enabled(x_a.device.type):
        dtype = torch.get_autocast_dtype(x_a.device.type)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    a, w_a, b_a, b, w_b, b_b, added = (None if t is None else t.to(dtype) for t in given)
    taps = [None if w is None else _taps(w) for w in (w_a, w_b)]
    outputs: list[Tensor] = _pair(a, taps[0], b_a, b, taps[1], b_b, mask, added, *grid, causal, save)
    return outputs[0]


def reference(
    x_a: Tensor,
    weight_a: Tensor,
    bias_a: Tensor | None = None,
    x_b: Tensor | None = None,
    weight_b: Tensor | None = None,
    bias_b: Tensor | None = None,
    *,
    grid: tuple[int, int],
    causal: bool = False,
    mask: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Compute the same, one step after the other; see `depthwise_pair`."""
    x_a = _hide(x_a, mask)
    if x_b is not None and weight_b is not None and weight_b.dim() == PIXELS + 2:
        biases = [w.new_zeros(len(w)) if b is None else b for w, b in ((weight_a, bias_a), (weight_b, bias_b))]
        out = depthwise2d_product(x_a, weight_a, biases[0], _hide(x_b, mask), weight_b, biases[1], *grid)
    else:
        out = _convolve(x_a, weight_a, bias_a, grid, causal)
        if x_b is not None:
            out = out * (x_b if weight_b is None else _convolve(_hide(x_b, mask), weight_b, bias_b, grid, causal))
    return _hide(out if add is None else add + out, mask)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], causal: bool) -> Tensor:
    if weight.dim() == PIXELS + 2:
        return depthwise2d(x, weight, weight.new_zeros(len(weight)) if bias is None else bias, *grid)
    if not x.numel():
        return x
    size, an_image = weight.shape[-1], bias is not None and bias.dim() == 2
    rows = rearrange(x, "b (h w) c -> (b h) c w", h=grid[0], w=grid[1])
    rows = F.pad(rows, (size - 1, 0) if causal else (size // 2, size // 2))
    out = F.conv1d(rows, weight, None if an_image else bias, groups=len(weight))
    out = rearrange(out, "(b h) c w -> b (h w) c", h=grid[0])
    return out + bias.unsqueeze(1) if bias is not None and an_image else out


def _hide(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)


def _check(
    x_a: Tensor, weight_a: Tensor, bias_a: Tensor | None, x_b: Tensor | None, weight_b: Tensor | None,
    bias_b: Tensor | None, grid: tuple[int, int], causal: bool, mask: Tensor | None, add: Tensor | None,
) -> None:  # fmt: skip
    if x_a.dim() != 3 or x_a.shape[1] != grid[0] * grid[1]:
        raise ShapeError(f"tokens of a grid {grid} are (B, {grid[0] * grid[1]}, C), not {tuple(x_a.shape)}")
    batch, tokens, channels = x_a.shape
    size = weight_a.shape[-1]
    dimensions = {(channels, 1, size): LINE, (channels, 1, size, size): PIXELS}.get(tuple(weight_a.shape))
    if dimensions is None or (size % 2 == 0 and not causal):
        raise ShapeError(
            f"weights of {channels} channels are ({channels}, 1, K, K) or ({channels}, 1, K), K odd unless causal, "
            f"not {tuple(weight_a.shape)}"
        )
    if causal and dimensions == PIXELS:
        raise ShapeError(f"causal kernels are ({channels}, 1, K), along a row, not {tuple(weight_a.shape)}")
    if x_b is None and weight_b is not None:
        raise ShapeError("weight_b needs x_b")
    if weight_b is None and bias_b is not None:
        raise ShapeError("bias_b needs weight_b")
    of_a_bias = ((channels,), (batch, channels))
    for name, given, wanted in (
        ("x_b", x_b, (tuple(x_a.shape),)),
        ("weight_b", weight_b, (tuple(weight_a.shape),)),
        ("bias_a", bias_a, of_a_bias),
        ("bias_b", bias_b, of_a_bias),
        ("mask", mask, ((batch, tokens),)),
        ("add", add, (tuple(x_a.shape),)),
    ):
        # by the number of dimensions first: a batch is not to be compared with channels while a program is exported
        fits = [shape for shape in wanted if given is not None and len(shape) == given.dim()]
        if given is not None and (not fits or tuple(given.shape) != fits[0]):
            raise ShapeError(f"{name} must be {' or '.join(map(str, wanted))}, not {tuple(given.shape)}")


def _taps(weight: Tensor) -> Tensor:
    """``(KH, KW, C)``."""
    return (weight if weight.dim() == PIXELS + 2 else weight.unsqueeze(2)).squeeze(1).permute(1, 2, 0)


def _weight(taps: Tensor) -> Tensor:
    """``(C, 1, K, K)``, or ``(C, 1, K)`` of taps in one row."""
    weight = taps.permute(2, 0, 1).unsqueeze(1)
    return weight.squeeze(2) if taps.shape[0] == 1 else weight


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _product(value, weight, at, tap_row, KH: tl.constexpr, line, known, WIDE: tl.constexpr):
    """Values times the taps that meet them, or zero where the kernel does not reach; `line` is a row of taps."""
    tap = tl.load(weight + at + tap_row * line, mask=known & (tap_row >= 0) & (tap_row < KH), other=0.0)
    return value * tap.to(WIDE)


@triton.jit
def _plain(
    x, x_token, weight, mask, row, column, channel, height, width, channels,
    TOP: tl.constexpr, LEFT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Convolve a tile of 1 or 4 rows, each ``(COLUMNS, CHANNELS)``: a value that is read serves all of them."""
    row_0 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    row_1 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    row_2 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    row_3 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    across = column + tl.arange(0, COLUMNS)[:, None]
    deep = channel + tl.arange(0, CHANNELS)[None, :]
    known = deep < channels
    line = KW * channels
    for step in range(tl.maximum(TOP - row, 0), tl.minimum(KH + ROWS - 1, height - row + TOP)):
        source = (row + step - TOP) * width
        tap_row = step + tl.zeros((1, 1), tl.int32)
        for j in range(KW):
            at = across + j - LEFT
            inside = (at >= 0) & (at < width)
            if mask is not None:
                inside = tl.load(mask + source + at, mask=inside, other=0) != 0
            pixel = (source + at).to(tl.int64) * x_token
            value = tl.load(x + pixel + deep, mask=inside & known, other=0.0).to(WIDE)
            tap = j * channels + deep
            row_0 += _product(value, weight, tap, tap_row, KH, line, known, WIDE)
            if ROWS == 4:
                row_1 += _product(value, weight, tap, tap_row - 1, KH, line, known, WIDE)
                row_2 += _product(value, weight, tap, tap_row - 2, KH, line, known, WIDE)
                row_3 += _product(value, weight, tap, tap_row - 3, KH, line, known, WIDE)
    return row_0, row_1, row_2, row_3


@triton.jit
def _banded(
    x, x_token, weight, mask, row, column, channel, height, width, channels,
    TOP: tl.constexpr, LEFT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Convolve a tile ``(CHANNELS, ROWS, COLUMNS)`` by products of 16 pixels with a band of taps at a time."""
    total = tl.zeros((CHANNELS, ROWS, COLUMNS), WIDE)
    down = row + tl.arange(0, ROWS)[None, :, None]
    deep = channel + tl.arange(0, CHANNELS)[:, None, None]
    across = tl.arange(0, 16)
    out_column = tl.arange(0, COLUMNS)[None, None, :]
    for i in range(KH):
        source = down + i - TOP
        for first in range(0, COLUMNS + KW - 1, 16):
            at = column + first + across[None, None, :] - LEFT
            inside = (source >= 0) & (source < height) & (at >= 0) & (at < width)
            if mask is not None:
                inside = tl.load(mask + source * width + at, mask=inside, other=0) != 0
            pixel = (source * width + at).to(tl.int64) * x_token + deep
            value = tl.load(x + pixel, mask=inside & (deep < channels), other=0.0)
            tap_column = first + across[None, :, None] - out_column
            reached = (tap_column >= 0) & (tap_column < KW) & (deep < channels)
            band = tl.load(weight + (i * KW + tap_column) * channels + deep, mask=reached, other=0.0)
            total = tl.dot(value, band, total)
    return total


@triton.jit
def _biased(u, kept, bias, own, inside, deep, channels, WIDE: tl.constexpr):
    """Add the bias to a convolution, and write it for the backward if that is asked for."""
    if bias is not None:
        u += tl.load(bias + deep, mask=deep < channels, other=0.0).to(WIDE)
    if kept is not None:
        tl.store(kept + own, u.to(kept.dtype.element_ty), mask=inside)
    return u


@triton.jit
def _finish(
    out, a, b, u_a, u_b, x_b, x_b_token, bias_a, bias_b, mask, add, add_token, ys, xs, deep, height, width, channels,
    FACTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """From convolutions of some places to their outputs; all pointers are those of the image."""
    here = (ys < height) & (xs < width)
    inside = here & (deep < channels)
    token = (ys * width + xs).to(tl.int64)
    own = token * channels + deep
    a = _biased(a, u_a, bias_a, own, inside, deep, channels, WIDE)
    if FACTORS == 2:
        a *= _biased(b, u_b, bias_b, own, inside, deep, channels, WIDE)
    elif x_b is not None:
        a *= tl.load(x_b + token * x_b_token + deep, mask=inside, other=0.0).to(WIDE)
    if add is not None:
        a += tl.load(add + token * add_token + deep, mask=inside, other=0.0).to(WIDE)
    if mask is not None:
        a = tl.where(tl.load(mask + token, mask=here, other=0) != 0, a, 0.0)
    tl.store(out + own, a.to(out.dtype.element_ty), mask=inside)


def _fitting(configs: Sequence[Any], named: Mapping[str, Any], **constants: Any) -> list[Any]:
    """Configurations that can be taken: bands are for 2-D kernels in half precision, tiles of a row for 1-D kernels."""
    named = {**named, **constants}
    tall, half = named["KH"] > 1, named["x_a"].dtype in (torch.float16, torch.bfloat16)
    return [c for c in configs if (tall and half if c.kwargs["BANDED"] else (c.kwargs["ROWS"] > 1) == tall)]


def _config(rows: int, columns: int, channels: int, warps: int, *, banded: bool = False) -> Any:
    tile = {"ROWS": rows, "COLUMNS": columns, "CHANNELS": channels, "BANDED": banded}
    return triton.Config(tile, num_warps=warps, num_stages=2)


CONFIGS = [
    _config(4, 16, 64, 4),
    _config(4, 32, 64, 8),
    _config(4, 32, 32, 4),
    _config(1, 64, 64, 4),
    _config(1, 128, 32, 4),
    _config(16, 16, 4, 4, banded=True),
    _config(16, 16, 8, 4, banded=True),
    _config(16, 16, 16, 8, banded=True),
    _config(32, 16, 8, 8, banded=True),
]


@triton.autotune(
    CONFIGS, ["AREA", "KH", "KW", "channels", "FACTORS"], {"early_config_prune": _fitting}, cache_results=True
)
@triton.jit
def _forward_kernel(
    out, u_a, u_b, x_a, x_b, x_a_image, x_a_token, x_b_image, x_b_token, weight_a, weight_b,
    bias_a, bias_b, bias_a_image, bias_b_image, mask, add, add_image, add_token, height, width, channels,
    TOP: tl.constexpr, LEFT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, WIDE: tl.constexpr,
    FACTORS: tl.constexpr, AREA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    depth, across, down = tl.cdiv(channels, CHANNELS), tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    channel = program % depth * CHANNELS
    column = program // depth % across * COLUMNS
    row = program // (depth * across) % down * ROWS
    image = (program // (depth * across * down)).to(tl.int64)
    whole = image * height * width
    out += whole * channels
    x_a += image * x_a_image
    # one by one: the oldest Triton that is supported cannot hand None back from a function
    if u_a is not None:
        u_a += whole * channels
    if u_b is not None:
        u_b += whole * channels
    if x_b is not None:
        x_b += image * x_b_image
    if add is not None:
        add += image * add_image
    if bias_a is not None:
        bias_a += image * bias_a_image
    if bias_b is not None:
        bias_b += image * bias_b_image
    if mask is not None:
        mask += whole
    if BANDED:
        a = _banded(
            x_a, x_a_token, weight_a, mask, row, column, channel, height, width, channels,
            TOP, LEFT, KH, KW, ROWS, COLUMNS, CHANNELS, WIDE,
        )  # fmt: skip
        b = a
        if FACTORS == 2:
            b = _banded(
                x_b, x_b_token, weight_b, mask, row, column, channel, height, width, channels,
                TOP, LEFT, KH, KW, ROWS, COLUMNS, CHANNELS, WIDE,
            )  # fmt: skip
        ys = row + tl.arange(0, ROWS)[None, :, None]
        xs = column + tl.arange(0, COLUMNS)[None, None, :]
        deep = channel + tl.arange(0, CHANNELS)[:, None, None]
        _finish(
            out, a, b, u_a, u_b, x_b, x_b_token, bias_a, bias_b, mask, add, add_token, ys, xs, deep,
            height, width, channels, FACTORS, WIDE,
        )  # fmt: skip
    else:
        a_0, a_1, a_2, a_3 = _plain(
            x_a, x_a_token, weight_a, mask, row, column, channel, height, width, channels,
            TOP, LEFT, KH, KW, ROWS, COLUMNS, CHANNELS, WIDE,
        )  # fmt: skip
        b_0, b_1, b_2, b_3 = a_0, a_1, a_2, a_3
        if FACTORS == 2:
            b_0, b_1, b_2, b_3 = _plain(
                x_b, x_b_token, weight_b, mask, row, column, channel, height, width, channels,
                TOP, LEFT, KH, KW, ROWS, COLUMNS, CHANNELS, WIDE,
            )  # fmt: skip
        ys = row + tl.zeros((1, 1), tl.int32)
        xs = column + tl.arange(0, COLUMNS)[:, None]
        deep = channel + tl.arange(0, CHANNELS)[None, :]
        _finish(
            out, a_0, b_0, u_a, u_b, x_b, x_b_token, bias_a, bias_b, mask, add, add_token, ys, xs, deep,
            height, width, channels, FACTORS, WIDE,
        )  # fmt: skip
        if ROWS == 4:
            _finish(
                out, a_1, b_1, u_a, u_b, x_b, x_b_token, bias_a, bias_b, mask, add, add_token, ys + 1, xs, deep,
                height, width, channels, FACTORS, WIDE,
            )  # fmt: skip
            _finish(
                out, a_2, b_2, u_a, u_b, x_b, x_b_token, bias_a, bias_b, mask, add, add_token, ys + 2, xs, deep,
                height, width, channels, FACTORS, WIDE,
            )  # fmt: skip
            _finish(
                out, a_3, b_3, u_a, u_b, x_b, x_b_token, bias_a, bias_b, mask, add, add_token, ys + 3, xs, deep,
                height, width, channels, FACTORS, WIDE,
            )  # fmt: skip


@triton.jit
def _meeting(
    grad, x, x_token, mask, line, at, inside, deep, known, width, j,
    LEFT: tl.constexpr, KW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients times the values that tap `j` of a row lets them meet; `x` points to that row, `mask + line` too."""
    at += j - LEFT
    inside &= (at >= 0) & (at < width) & (j < KW)
    if mask is not None:
        inside = tl.load(mask + line + at, mask=inside, other=0) != 0
    value = tl.load(x + at.to(tl.int64) * x_token + deep, mask=inside & known, other=0.0)
    return grad * value.to(WIDE)


WEIGHT_CONFIGS = [
    triton.Config({"COLUMNS": columns, "CHANNELS": channels}, num_warps=4, num_stages=2)
    for columns, channels in ((32, 64), (64, 32))
]
TAPS = 4  # of a row, whose gradients a program sums


@triton.autotune(WEIGHT_CONFIGS, ["AREA", "KH", "KW", "channels"], cache_results=True)
@triton.jit
def _weight_kernel(
    parts, grad, x, grad_image, grad_token, x_image, x_token, mask, images, height, width, channels, count,
    TOP: tl.constexpr, LEFT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, WIDE: tl.constexpr,
    AREA: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Four taps of a row and a block of channels, summed over every `count`-th row of pixels of all images."""
    part = tl.program_id(0)
    groups: tl.constexpr = (KW + 3) // 4
    tap_row = tl.program_id(1) // groups
    j = tl.program_id(1) % groups * 4 + tl.zeros((1, 1), tl.int32)
    step = tl.arange(0, COLUMNS)[:, None]
    deep = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = deep < channels
    sum_0 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    sum_1 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    sum_2 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    sum_3 = tl.zeros((COLUMNS, CHANNELS), WIDE)
    for nth in range(part, images * height, count):
        image, row = (nth // height).to(tl.int64), nth % height
        source = row + tap_row - TOP
        if (source >= 0) & (source < height):
            line_x = x + image * x_image + source.to(tl.int64) * width * x_token
            line = (image * height + source) * width
            for first in range(0, width, COLUMNS):
                at = first + step
                inside = at < width
                near = image * grad_image + (row * width + at).to(tl.int64) * grad_token
                g = tl.load(grad + near + deep, mask=inside & known, other=0.0).to(WIDE)
                sum_0 += _meeting(g, line_x, x_token, mask, line, at, inside, deep, known, width, j, LEFT, KW, WIDE)
                sum_1 += _meeting(g, line_x, x_token, mask, line, at, inside, deep, known, width, j + 1, LEFT, KW, WIDE)
                sum_2 += _meeting(g, line_x, x_token, mask, line, at, inside, deep, known, width, j + 2, LEFT, KW, WIDE)
                sum_3 += _meeting(g, line_x, x_token, mask, line, at, inside, deep, known, width, j + 3, LEFT, KW, WIDE)
    out = parts + ((part * KH + tap_row) * KW + j) * channels + deep
    tl.store(out, tl.sum(sum_0, 0)[None, :], mask=known)
    tl.store(out + channels, tl.sum(sum_1, 0)[None, :], mask=known & (j + 1 < KW))
    tl.store(out + 2 * channels, tl.sum(sum_2, 0)[None, :], mask=known & (j + 2 < KW))
    tl.store(out + 3 * channels, tl.sum(sum_3, 0)[None, :], mask=known & (j + 3 < KW))


# ------------------------------------------------------------------------------------------------------- launching


def _offsets(taps: Tensor, causal: bool) -> tuple[int, int]:
    """Rows above and columns to the left of a token that its kernel reaches."""
    return taps.shape[0] // 2, taps.shape[1] - 1 if causal else taps.shape[1] // 2


def _image_stride(bias: Tensor | None) -> int:
    return bias.stride(0) if bias is not None and bias.dim() == 2 else 0


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _run(
    x_a: Tensor, taps_a: Tensor, bias_a: Tensor | None, x_b: Tensor | None, taps_b: Tensor | None,
    bias_b: Tensor | None, mask: Tensor | None, add: Tensor | None, height: int, width: int,
    offsets: tuple[int, int], save: bool,
) -> list[Tensor]:  # fmt: skip
    """The output, and where `save` both convolutions, as far as a backward needs them."""
    out = torch.empty(x_a.shape, dtype=x_a.dtype, device=x_a.device)
    u_a = torch.empty_like(out) if save and x_b is not None else None
    u_b = torch.empty_like(out) if save and taps_b is not None else None
    if out.numel():
        x_a, x_b, add = side_by_side(x_a), side_by_side(x_b), side_by_side(add)
        taps_a = taps_a.contiguous()
        taps_b, bias_a, bias_b = (None if t is None else t.contiguous() for t in (taps_b, bias_a, bias_b))
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        batch, channels = len(x_a), x_a.shape[2]

        def grid(tile: dict[str, Any]) -> tuple[int]:
            sizes = zip((height, width, channels), (tile["ROWS"], tile["COLUMNS"], tile["CHANNELS"]), strict=True)
            return (batch * math.prod(triton.cdiv(size, block) for size, block in sizes),)

        launch(
            _forward_kernel, grid, x_a.device,
            out, u_a, u_b, x_a, x_b, *_strides(x_a), *_strides(x_b), taps_a, taps_b,
            bias_a, bias_b, _image_stride(bias_a), _image_stride(bias_b), mask, add, *_strides(add),
            height, width, channels, TOP=offsets[0], LEFT=offsets[1], KH=taps_a.shape[0], KW=taps_a.shape[1],
            WIDE=wide(x_a.dtype), FACTORS=1 + (taps_b is not None), AREA=_bucket(height * width),
        )  # fmt: skip
    return [t for t in (out, u_a, u_b) if t is not None]


def _bucket(area: int) -> int:
    """One of a few sizes, for which configurations are chosen."""
    return min(max(triton.next_power_of_2(area), 256), 16384)


def _weight_gradient(
    grad: Tensor, x: Tensor, taps: Tensor, mask: Tensor | None, height: int, width: int, offsets: tuple[int, int]
) -> Tensor:
    batch, _, channels = x.shape
    (rows, columns), dtype = taps.shape[:2], sums_dtype(x.dtype)
    groups = rows * triton.cdiv(columns, TAPS)
    count = max(1, min(batch * height, PROGRAMS // (groups * triton.cdiv(channels, 32))))
    parts = torch.empty(count, *taps.shape, dtype=dtype, device=x.device)
    if not parts.numel() or not x.numel():
        return torch.zeros_like(taps)
    grad, x = side_by_side(grad), side_by_side(x)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    launch(
        _weight_kernel, lambda tile: (count, groups, triton.cdiv(channels, tile["CHANNELS"])), x.device,
        parts, grad, x, *_strides(grad), *_strides(x), mask, batch, height, width, channels, count,
        TOP=offsets[0], LEFT=offsets[1], KH=rows, KW=columns, WIDE=wide(x.dtype), AREA=_bucket(height * width),
    )  # fmt: skip
    return parts.sum(0).to(taps.dtype)


# ----------------------------------------------------------------------------------------------------- registration


@torch.library.custom_op("attnzoo::depthwise_pair", mutates_args=())
def _pair(
    x_a: Tensor, taps_a: Tensor, bias_a: Tensor | None, x_b: Tensor | None, taps_b: Tensor | None,
    bias_b: Tensor | None, mask: Tensor | None, add: Tensor | None, height: int, width: int, causal: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    """The output, then where `save` the convolutions. Taps are ``(KH, KW, C)``; all but the mask have one dtype."""
    need_triton(x_a, "depthwise_pair")
    note("depthwise_pair", "triton")
    offsets = _offsets(taps_a, causal)
    return _run(x_a, taps_a, bias_a, x_b, taps_b, bias_b, mask, add, height, width, offsets, save)


@torch.library.custom_op("attnzoo::depthwise_pair_backward", mutates_args=())
def _pair_backward(
    grad: Tensor, x_a: Tensor, taps_a: Tensor, x_b: Tensor | None, taps_b: Tensor | None, u_a: Tensor | None,
    u_b: Tensor | None, mask: Tensor | None, height: int, width: int, causal: bool,
    wanted: list[bool], an_image: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x_a, taps_a, bias_a, x_b, taps_b, bias_b, as far as `wanted`; a bias for all or `an_image`."""
    need_triton(x_a, "depthwise_pair")
    note("depthwise_pair_backward", "triton")
    grad = _hide(grad, mask)
    second = u_b if u_b is not None else x_b
    grad_a = grad if second is None else _hide(grad * second, mask)
    grad_b = grad * u_a if u_a is not None and any(wanted[3:]) else None
    grads = _convolution_gradients(grad_a, x_a, taps_a, mask, height, width, causal, wanted[:3], an_image[0])
    if grad_b is not None and taps_b is not None and x_b is not None:
        grads += _convolution_gradients(grad_b, x_b, taps_b, mask, height, width, causal, wanted[3:], an_image[1])
    elif grad_b is not None:
        grads.append(grad_b)
    return grads


def _convolution_gradients(
    grad: Tensor, x: Tensor, taps: Tensor, mask: Tensor | None, height: int, width: int, causal: bool,
    wanted: Sequence[bool], an_image: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of one convolution's input, taps and bias, of that of its output, which is zero where the mask is."""
    offsets, grads = _offsets(taps, causal), []
    if wanted[0]:
        turned = taps.shape[0] - 1 - offsets[0], taps.shape[1] - 1 - offsets[1]
        found = _run(grad, taps.flip(0, 1), None, None, None, None, mask, None, height, width, turned, save=False)
        grads += found
    if wanted[1]:
        grads.append(_weight_gradient(grad, x, taps, mask, height, width, offsets))
    if wanted[2]:
        grads.append(grad.sum(1 if an_image else (0, 1), dtype=sums_dtype(grad.dtype)).to(grad.dtype))
    return grads


@_pair.register_fake
def _(
    x_a: Tensor, taps_a: Tensor, bias_a: Tensor | None, x_b: Tensor | None, taps_b: Tensor | None,
    bias_b: Tensor | None, mask: Tensor | None, add: Tensor | None, height: int, width: int, causal: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    count = 1 + (save and x_b is not None) + (save and taps_b is not None)
    return [torch.empty(x_a.shape, dtype=x_a.dtype, device=x_a.device) for _ in range(count)]


@_pair_backward.register_fake
def _(
    grad: Tensor, x_a: Tensor, taps_a: Tensor, x_b: Tensor | None, taps_b: Tensor | None, u_a: Tensor | None,
    u_b: Tensor | None, mask: Tensor | None, height: int, width: int, causal: bool,
    wanted: list[bool], an_image: list[bool],
) -> list[Tensor]:  # fmt: skip
    biases = [(x_a.shape[0], x_a.shape[2]) if one else (x_a.shape[2],) for one in an_image]
    shapes = (x_a.shape, taps_a.shape, biases[0], x_a.shape, taps_a.shape, biases[1])
    return [
        torch.empty(shape, dtype=x_a.dtype, device=x_a.device)
        for shape, asked in zip(shapes, wanted, strict=True)
        if asked
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_a, taps_a, bias_a, x_b, taps_b, bias_b, mask, _, ctx.height, ctx.width, ctx.causal, _ = inputs
    u_a = output[1] if len(output) > 1 else None
    u_b = output[2] if len(output) > 2 else None
    ctx.an_image = [bias is not None and bias.dim() == 2 for bias in (bias_a, bias_b)]
    ctx.save_for_backward(x_a, taps_a, bias_a, x_b, taps_b, bias_b, mask, u_a, u_b)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    x_a, taps_a, bias_a, x_b, taps_b, bias_b, mask, u_a, u_b = ctx.saved_tensors
    wanted, of_add = list(ctx.needs_input_grad[:6]), ctx.needs_input_grad[7]
    grad, shape = grads[0], (ctx.height, ctx.width, ctx.causal)
    if torch.is_grad_enabled():  # gradients of gradients
        inputs = (x_a, taps_a, bias_a, x_b, taps_b, bias_b)
        found = iter(_backward_by_torch(grad, inputs, mask, *shape, wanted))
    else:
        found = iter(_pair_backward(grad, x_a, taps_a, x_b, taps_b, u_a, u_b, mask, *shape, wanted, ctx.an_image))
    each = [next(found) if asked else None for asked in wanted]
    return *each, None, _hide(grad, mask) if of_add else None, None, None, None, None


def _backward_by_torch(
    grad: Tensor, inputs: tuple[Tensor | None, ...], mask: Tensor | None, height: int, width: int, causal: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients, in a way that can be differentiated again."""
    x_a, taps_a, bias_a, x_b, taps_b, bias_b = inputs
    weight_a, weight_b = (None if taps is None else _weight(taps) for taps in (taps_a, taps_b))
    factors = (cast(Tensor, x_a), cast(Tensor, weight_a), bias_a, x_b, weight_b, bias_b)
    out = reference(*factors, grid=(height, width), causal=causal, mask=mask)
    leaves = [t for t, asked in zip(inputs, wanted, strict=True) if asked and t is not None]
    return list(torch.autograd.grad(out, leaves, grad, create_graph=True))


_pair.register_autograd(_backward, setup_context=_save)


def _flops_of(x: tuple[int, ...], taps: tuple[int, ...] | None) -> int:
    return 0 if taps is None else 2 * math.prod(x) * taps[0] * taps[1]


@register_flop_formula(torch.ops.attnzoo.depthwise_pair)
def _flops(x_a: Any, taps_a: Any, bias_a: Any, x_b: Any, taps_b: Any, *args: Any, **kwargs: Any) -> int:
    """A multiply and an add a tap; products of elements are not counted, as nowhere."""
    return _flops_of(x_a, taps_a) + _flops_of(x_a, taps_b)


@register_flop_formula(torch.ops.attnzoo.depthwise_pair_backward)
def _flops_backward(
    grad: Any, x_a: Any, taps_a: Any, x_b: Any, taps_b: Any, u_a: Any, u_b: Any, mask: Any,
    height: int, width: int, causal: bool, wanted: list[bool], *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """As much again for each gradient of an input, and as much for each of taps."""
    return sum(wanted[:2]) * _flops_of(x_a, taps_a) + sum(wanted[3:5]) * _flops_of(x_a, taps_b)

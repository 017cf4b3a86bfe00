"""Hadamard chain: products, their weighted sum and the bias in one pass over memory.

    Z_t = X_t            for each plain term
    Z_t = U_t * Y_t      for each product, after the plain ones          (* elementwise)
    P   = sum over t of W_t * Z_t + L

PADRe's equation, https://arxiv.org/abs/2407.11306, where U_{i+1} = C_i Z_i D_i. W has a weight a channel, or a weight a
token and channel; where it is None all weigh 1, and where L is None there is none.

In the forward no product is written; in the backward each is computed again from its factors. Sums are in float32
(float64 for float64). On GPUs in Triton, elsewhere in plain PyTorch.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo.errors import ShapeError
from attnzoo.kernels.dispatch import launch, need_triton, note, side_by_side, sums_dtype, triton_works, wide
from attnzoo.kernels.language import tl, triton

BLOCK = 1024  # elements of a tile
PROGRAMS = 2048  # some 15 for each multiprocessor of the largest GPUs
MOST_STEPS = 8  # a program's tiles of the gradient, 16 KiB in half precision, stay in the first cache


def hadamard_chain(
    plain: Sequence[Tensor] = (),
    products: Sequence[tuple[Tensor, Tensor]] = (),
    weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum terms and products of two.

    Parameters
    ----------
    plain
        Terms, each ``(B, N, C)``.
    products
        Pairs of factors, each ``(B, N, C)``.
    weights
        ``(terms, C)`` or ``(terms, N, C)``, plain terms first.
    bias
        ``(C,)`` or ``(N, C)``.

    Returns
    -------
    Tensor
        ``(B, N, C)``, in the dtype of the terms.

    Raises
    ------
    ShapeError
        If there is no term, or shapes do not fit together.
    """
    us, ys = [u for u, _ in products], [y for _, y in products]
    _check(plain, us, ys, weights, bias)
    if not triton_works((*plain, *us)[0].device):
        note("hadamard_chain", "torch")
        return reference(plain, us, ys, weights, bias)
    out: Tensor = _chain(list(plain), us, ys, weights, bias)
    return out


def reference(
    plain: Sequence[Tensor], us: Sequence[Tensor], ys: Sequence[Tensor], weights: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Compute the same in plain PyTorch."""
    terms = [*plain, *(u * y for u, y in zip(us, ys, strict=True))]
    dtype = terms[0].dtype
    if weights is not None:
        terms = [w * z for w, z in zip(weights, terms, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return (total if bias is None else total + bias).to(dtype)


def _check(
    plain: Sequence[Tensor], us: Sequence[Tensor], ys: Sequence[Tensor], weights: Tensor | None, bias: Tensor | None
) -> None:
    terms = [*plain, *us, *ys]
    if not terms:
        raise ShapeError("a Hadamard chain needs at least one term")
    shape = terms[0].shape
    if len(shape) != 3 or any(term.shape != shape for term in terms):
        raise ShapeError(f"terms must all be (B, N, C); they are {[tuple(term.shape) for term in terms]}")
    count = len(plain) + len(us)
    for name, given, before in (("weights", weights, (count,)), ("bias", bias, ())):
        if given is not None and tuple(given.shape) not in ((*before, shape[2]), (*before, *shape[1:])):
            wanted = f"{(*before, shape[2])} or {(*before, *shape[1:])}"
            raise ShapeError(f"{name} of terms {tuple(shape)} must be {wanted}, not {tuple(given.shape)}")


@triton.jit
def _tile(tokens, channels, steps, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Batch, tokens ``(TOKENS, 1)``, channels ``(1, CHANNELS)`` of a program, and its number but for the channels.

    Its tokens are those of the first of `steps` tiles, one under the other.
    """
    program = tl.program_id(0)
    across, down = tl.cdiv(channels, CHANNELS), tl.cdiv(tokens, TOKENS * steps)
    channel = program % across * CHANNELS + tl.arange(0, CHANNELS)
    token = program // across % down * (TOKENS * steps) + tl.arange(0, TOKENS)
    batch = (program // (across * down)).to(tl.int64)
    return batch, token[:, None].to(tl.int64), channel[None, :].to(tl.int64), (program // across).to(tl.int64)


@triton.jit
def _forward_kernel(
    out, plain, us, ys, plain_strides, u_strides, y_strides, weights, weight_strides, bias, bias_stride,
    tokens, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    batch, token, channel, _ = _tile(tokens, channels, 1, TOKENS, CHANNELS)
    inside = (token < tokens) & (channel < channels)
    total = tl.zeros((TOKENS, CHANNELS), WIDE)
    for t in tl.static_range(len(plain)):
        at = batch * plain_strides[t][0] + token * plain_strides[t][1] + channel
        z = tl.load(plain[t] + at, mask=inside, other=0.0).to(WIDE)
        if weights is not None:
            at = t * weight_strides[0] + token * weight_strides[1] + channel
            z *= tl.load(weights + at, mask=inside, other=0.0).to(WIDE)
        total += z
    for t in tl.static_range(len(us)):
        at = batch * u_strides[t][0] + token * u_strides[t][1] + channel
        z = tl.load(us[t] + at, mask=inside, other=0.0).to(WIDE)
        at = batch * y_strides[t][0] + token * y_strides[t][1] + channel
        z *= tl.load(ys[t] + at, mask=inside, other=0.0).to(WIDE)
        if weights is not None:
            at = (len(plain) + t) * weight_strides[0] + token * weight_strides[1] + channel
            z *= tl.load(weights + at, mask=inside, other=0.0).to(WIDE)
        total += z
    if bias is not None:
        total += tl.load(bias + token * bias_stride + channel, mask=inside, other=0.0).to(WIDE)
    at = (batch * tokens + token) * channels + channel
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, grad_strides, plain, us, ys, plain_strides, u_strides, y_strides, weights, weight_strides,
    grad_plain, grad_us, grad_ys, grad_weights, grad_bias,
    tokens, channels, steps, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of `steps` tiles; those of weights and bias per channel as sums over the tokens of them all.

    One term after the other, so that the sums of a single one are in registers; a tile of `grad` that was read for one
    term is still in the cache for the next.
    """
    batch, first, channel, part = _tile(tokens, channels, steps, TOKENS, CHANNELS)
    of_weight = part * (len(plain) + len(us)) * channels + channel
    for t in tl.static_range(len(plain)):
        total = tl.zeros((TOKENS, CHANNELS), WIDE)
        for step in range(steps):
            token = first + step * TOKENS
            inside = (token < tokens) & (channel < channels)
            g = tl.load(grad + batch * grad_strides[0] + token * grad_strides[1] + channel, mask=inside, other=0.0)
            g = g.to(WIDE)
            gz = g
            if weights is not None:
                at = t * weight_strides[0] + token * weight_strides[1] + channel
                gz *= tl.load(weights + at, mask=inside, other=0.0).to(WIDE)
            own = (batch * tokens + token) * channels + channel
            tl.store(grad_plain[t] + own, gz.to(grad_plain[t].dtype.element_ty), mask=inside)
            if grad_weights is not None:
                at = batch * plain_strides[t][0] + token * plain_strides[t][1] + channel
                total += g * tl.load(plain[t] + at, mask=inside, other=0.0).to(WIDE)
        if grad_weights is not None:
            tl.store(grad_weights + of_weight + t * channels, tl.sum(total, 0)[None, :], mask=channel < channels)
    for t in tl.static_range(len(us)):
        total = tl.zeros((TOKENS, CHANNELS), WIDE)
        for step in range(steps):
            token = first + step * TOKENS
            inside = (token < tokens) & (channel < channels)
            g = tl.load(grad + batch * grad_strides[0] + token * grad_strides[1] + channel, mask=inside, other=0.0)
            g = g.to(WIDE)
            gz = g
            if weights is not None:
                at = (len(plain) + t) * weight_strides[0] + token * weight_strides[1] + channel
                gz *= tl.load(weights + at, mask=inside, other=0.0).to(WIDE)
            at = batch * u_strides[t][0] + token * u_strides[t][1] + channel
            u = tl.load(us[t] + at, mask=inside, other=0.0).to(WIDE)
            at = batch * y_strides[t][0] + token * y_strides[t][1] + channel
            y = tl.load(ys[t] + at, mask=inside, other=0.0).to(WIDE)
            own = (batch * tokens + token) * channels + channel
            tl.store(grad_us[t] + own, (gz * y).to(grad_us[t].dtype.element_ty), mask=inside)
            tl.store(grad_ys[t] + own, (gz * u).to(grad_ys[t].dtype.element_ty), mask=inside)
            total += g * u * y
        if grad_weights is not None:
            own_weight = of_weight + (len(plain) + t) * channels
            tl.store(grad_weights + own_weight, tl.sum(total, 0)[None, :], mask=channel < channels)
    if grad_bias is not None:
        total = tl.zeros((TOKENS, CHANNELS), WIDE)
        for step in range(steps):
            token = first + step * TOKENS
            at = batch * grad_strides[0] + token * grad_strides[1] + channel
            total += tl.load(grad + at, mask=(token < tokens) & (channel < channels), other=0.0).to(WIDE)
        tl.store(grad_bias + part * channels + channel, tl.sum(total, 0)[None, :], mask=channel < channels)


def _blocks(channels: int) -> tuple[int, int]:
    """Tokens and channels of a tile."""
    across = min(triton.next_power_of_2(channels), 256)
    return BLOCK // across, across


def _grid(shape: torch.Size, steps: int = 1) -> tuple[int]:
    down, across = _blocks(shape[2])
    return (max(shape[0] * triton.cdiv(shape[1], down * steps) * triton.cdiv(shape[2], across), 1),)


def _steps(shape: torch.Size) -> int:
    """Tiles of a program that sums: fewer partial sums to write and read again, and programs enough for a large GPU."""
    return min(max(_grid(shape)[0] // PROGRAMS, 1), MOST_STEPS)


def _rows(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[int, int], ...]]:
    """The tensors with channels side by side, and the strides of batch and token."""
    tensors = [side_by_side(t) for t in tensors]
    return tuple(tensors), tuple((t.stride(0), t.stride(1)) for t in tensors)


def _weights(weights: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, tuple[int, int], Tensor | None, int]:
    """Weights and bias with the strides of term and token; 0 where there is none a token."""
    weights = None if weights is None else weights.contiguous()
    bias = None if bias is None else bias.contiguous()
    strides = (0, 0) if weights is None else (weights.stride(0), weights.stride(1) if weights.dim() == 3 else 0)
    return weights, strides, bias, bias.stride(0) if bias is not None and bias.dim() == 2 else 0


# ----------------------------------------------------------------------------------------------------- registration


@torch.library.custom_op("attnzoo::hadamard_chain", mutates_args=())
def _chain(
    plain: list[Tensor], us: list[Tensor], ys: list[Tensor], weights: Tensor | None, bias: Tensor | None
) -> Tensor:
    like = (*plain, *us)[0]
    need_triton(like, "hadamard_chain")
    note("hadamard_chain", "triton")
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if out.numel():
        (p, ps), (u, u_strides), (y, y_strides) = map(_rows, (plain, us, ys))
        tokens, channels = _blocks(like.shape[2])
        launch(
            _forward_kernel, _grid(like.shape), like.device,
            out, p, u, y, ps, u_strides, y_strides, *_weights(weights, bias), *like.shape[1:],
            TOKENS=tokens, CHANNELS=channels, WIDE=wide(like.dtype),
        )  # fmt: skip
    return out


@torch.library.custom_op("attnzoo::hadamard_chain_backward", mutates_args=())
def _chain_backward(
    grad: Tensor, plain: list[Tensor], us: list[Tensor], ys: list[Tensor], weights: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """Gradients of plain terms, of us and of ys, then of weights and of bias where they are."""
    need_triton(grad, "hadamard_chain")
    note("hadamard_chain_backward", "triton")
    shape, count = grad.shape, len(plain) + len(us)
    outs = [grad.new_empty(shape) for _ in (*plain, *us, *ys)]
    dtype = sums_dtype(grad.dtype)
    tokens, channels = _blocks(shape[2])
    of_channels = [t is not None and t.dim() == d for t, d in ((weights, 2), (bias, 1))]
    steps = _steps(shape) if any(of_channels) else 1
    parts = shape[0] * triton.cdiv(shape[1], tokens * steps)
    grad_weights = grad_bias = None
    if of_channels[0]:
        grad_weights = grad.new_empty(parts, count, shape[2], dtype=dtype)
    if of_channels[1]:
        grad_bias = grad.new_empty(parts, shape[2], dtype=dtype)
    if grad.numel():
        (g,), (g_strides,) = _rows([grad])
        (p, ps), (u, u_strides), (y, y_strides) = map(_rows, (plain, us, ys))
        split = len(plain), len(plain) + len(us)
        launch(
            _backward_kernel, _grid(shape, steps), grad.device,
            g, g_strides, p, u, y, ps, u_strides, y_strides, *_weights(weights, None)[:2],
            tuple(outs[: split[0]]), tuple(outs[split[0] : split[1]]), tuple(outs[split[1] :]), grad_weights, grad_bias,
            *shape[1:], steps, TOKENS=tokens, CHANNELS=channels, WIDE=wide(grad.dtype),
        )  # fmt: skip
    if weights is not None:
        if grad_weights is None:  # a weight for each token: sums over the batch, as large as the terms
            terms = [*plain, *(a * b for a, b in zip(us, ys, strict=True))]
            outs.append(torch.stack([(grad * z).sum(0, dtype=dtype) for z in terms]).to(weights.dtype))
        else:
            outs.append(grad_weights.sum(0).to(weights.dtype))
    if bias is not None:
        whole = grad.sum(0, dtype=dtype) if grad_bias is None else grad_bias.sum(0)
        outs.append(whole.to(bias.dtype))
    return outs


def _backward_by_torch(
    grad: Tensor, plain: Sequence[Tensor], us: Sequence[Tensor], ys: Sequence[Tensor],
    weights: Tensor | None, bias: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients, in a way that can be differentiated again."""
    count = len(plain) + len(us)
    weighted = [grad if weights is None else grad * weights[t] for t in range(count)]
    products = list(zip(weighted[len(plain) :], us, ys, strict=True))
    outs = [*weighted[: len(plain)], *(g * y for g, _, y in products), *(g * u for g, u, _ in products)]
    outs = [g.clone() if g is grad else g for g in outs]
    if weights is not None:
        over = (0, 1) if weights.dim() == 2 else (0,)
        terms = [*plain, *(u * y for u, y in zip(us, ys, strict=True))]
        outs.append(torch.stack([(grad * z).sum(over) for z in terms]))
    if bias is not None:
        outs.append(grad.sum((0, 1) if bias.dim() == 1 else (0,)))
    return outs


@_chain.register_fake
def _(plain: list[Tensor], us: list[Tensor], ys: list[Tensor], weights: Tensor | None, bias: Tensor | None) -> Tensor:
    like = (*plain, *us)[0]
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@_chain_backward.register_fake
def _(
    grad: Tensor, plain: list[Tensor], us: list[Tensor], ys: list[Tensor], weights: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    outs = [torch.empty(grad.shape, dtype=t.dtype, device=t.device) for t in (*plain, *us, *ys)]
    return outs + [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weights, bias) if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    plain, us, ys, weights, bias = inputs
    ctx.counts = len(plain), len(us), weights is not None, bias is not None
    ctx.save_for_backward(*plain, *us, *ys, *(t for t in (weights, bias) if t is not None))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    plain, products, weighted, biased = ctx.counts
    saved = list(ctx.saved_tensors)
    bias = saved.pop() if biased else None
    weights = saved.pop() if weighted else None
    lists = saved[:plain], saved[plain : plain + products], saved[plain + products :]
    grads = (_backward_by_torch if torch.is_grad_enabled() else _chain_backward)(grad, *lists, weights, bias)
    of_bias = grads.pop() if biased else None
    of_weights = grads.pop() if weighted else None
    return grads[:plain], grads[plain : plain + products], grads[plain + products :], of_weights, of_bias


_chain.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.attnzoo.hadamard_chain)
def _flops(
    plain: list[tuple[int, ...]], us: list[tuple[int, ...]], ys: Any, weights: Any, bias: Any, *a: Any, **k: Any
) -> int:
    """A multiplication a product and a weight, an addition between terms and for the bias, for each element."""
    count = len(plain) + len(us)
    each = len(us) + (count if weights is not None else 0) + count - 1 + (bias is not None)
    return each * math.prod((*plain, *us)[0])


@register_flop_formula(torch.ops.attnzoo.hadamard_chain_backward)
def _flops_backward(
    grad: tuple[int, ...], plain: list[Any], us: list[Any], ys: Any, weights: Any, bias: Any, *a: Any, **k: Any
) -> int:
    """Two multiplications a product, one a weight; for a weight's gradient one more, a product again, and its sum."""
    count = len(plain) + len(us)
    each = 2 * len(us) + (0 if weights is None else 3 * count + len(us)) + (bias is not None)
    return each * math.prod(grad)

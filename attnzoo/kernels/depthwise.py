"""Depthwise 2-D convolution of tokens ``(B, H * W, C)``, channels last.

    O[y, x, c] = bias[c] + sum over i, j of weight[c, i, j] X[y + i - K // 2, x + j - K // 2, c], zeros beyond the edges

`depthwise2d` takes the fastest way there is: on CPUs, in float32, C++ that is compiled at the first call (see
`native`), everywhere else and where there is no compiler torch's convolution, which is `reference`. Half precision on
CPUs is computed by the same C++ in float32: torch's convolution is tens of times slower there.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.kernels.native import library

SYMBOLS = ("attnzoo_depthwise", "attnzoo_depthwise_weight")


def depthwise2d(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Convolve.

    Parameters
    ----------
    x
        ``(B, height * width, C)``.
    weight
        ``(C, 1, K, K)``, K odd.
    bias
        ``(C,)``, or ``(B, C)``: one an image.
    height, width
        Size of the grid.

    Returns
    -------
    Tensor
        ``(B, height * width, C)``.

    Raises
    ------
    ShapeError
        If shapes do not fit together.
    """
    _check(x, weight, bias, height, width)
    if _by_compiled(x, weight, bias):
        out: Tensor = _depthwise2d(x.float(), weight.float(), bias.float(), height, width)
        return out.to(_dtype_of_result(x))
    return reference(x, weight, bias, height, width)


def depthwise2d_product(
    x_a: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    x_b: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Convolve twice and multiply, without gradients in one pass less; arguments as for `depthwise2d`."""
    tensors = (x_a, weight_a, bias_a, x_b, weight_b, bias_b)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if recorded or not _by_compiled(*tensors):
        return depthwise2d(x_a, weight_a, bias_a, height, width) * depthwise2d(x_b, weight_b, bias_b, height, width)
    _check(x_a, weight_a, bias_a, height, width)
    _check(x_b, weight_b, bias_b, height, width)
    if x_a.shape != x_b.shape:
        raise ShapeError(f"factors must have one shape; they have {tuple(x_a.shape)} and {tuple(x_b.shape)}")
    out: Tensor = _product(*(t.float() for t in tensors), height, width)
    return out.to(_dtype_of_result(x_a))


def reference(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Convolve by torch; see `depthwise2d`."""
    image = rearrange(x, "b (h w) c -> b c h w", h=height, w=width)  # channels-last in memory
    own = bias if bias.dim() == 1 else None
    image = F.conv2d(image, weight, own, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    out = rearrange(image, "b c h w -> b (h w) c")
    return out if own is not None else out + bias.unsqueeze(1)


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Whether the C++ is there."""
    return library("depthwise", SYMBOLS) is not None


def _by_compiled(*tensors: Tensor) -> bool:
    """Whether the C++ is there and can take these tensors.

    An exported program is for other machines too, and torch.func's transforms and forward-mode differentiation go
    through torch's own operators alone.
    """
    dtypes = {t.dtype for t in tensors}
    fitting = all(t.device.type == "cpu" for t in tensors) and dtypes <= {torch.float32, torch.float16, torch.bfloat16}
    if not fitting or (len(dtypes) > 1 and not torch.is_autocast_enabled("cpu")):
        return False
    return not torch.compiler.is_exporting() and not in_transform(tensors) and is_compiled()


def _dtype_of_result(x: Tensor) -> torch.dtype:
    """What torch's convolution would give."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def in_transform(tensors: Sequence[Tensor]) -> bool:
    """Whether torch.func or forward-mode differentiation looks on."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    differentiating = getattr(forward_ad, "_current_level", 0) >= 0  # asking tensor by tensor takes long
    return differentiating and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> None:
    if x.dim() != 3 or x.shape[1] != height * width:
        raise ShapeError(f"tokens of a grid {(height, width)} are (B, {height * width}, C), not {tuple(x.shape)}")
    channels, size = x.shape[2], weight.shape[-1]
    if weight.shape != (channels, 1, size, size) or size % 2 == 0:
        raise ShapeError(f"weights of {channels} channels are ({channels}, 1, K, K), K odd, not {tuple(weight.shape)}")
    batch = x.shape[0]
    if bias is not None and tuple(bias.shape) != ((channels,) if bias.dim() == 1 else (batch, channels)):
        wanted = f"({channels},) or {(batch, channels)}"
        raise ShapeError(f"the bias of {batch} images and {channels} channels is {wanted}, not {tuple(bias.shape)}")


@torch.library.custom_op("attnzoo::depthwise2d", mutates_args=(), device_types="cpu")
def _depthwise2d(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return _convolve(x, weight, bias, height, width)


@_depthwise2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("attnzoo::depthwise2d_product", mutates_args=(), device_types="cpu")
def _product(
    x_a: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    x_b: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """For inference: it has no gradient."""
    return _convolve(x_a, weight_a, bias_a, height, width, into=_convolve(x_b, weight_b, bias_b, height, width))


@_product.register_fake
def _(
    x_a: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    x_b: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    height: int,
    width: int,
) -> Tensor:
    return x_a.new_empty(x_a.shape)


@torch.library.custom_op("attnzoo::depthwise2d_backward", mutates_args=(), device_types="cpu")
def _depthwise2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, wanted: list[bool], an_image: bool
) -> list[Tensor]:
    """Gradients of x, weight and bias (one `an_image`, or one for all), as far as `wanted`."""
    for tensor in (grad, x):
        _check(tensor, weight, None, height, width)
    grad, x, grads = side_by_side(grad), side_by_side(x), []
    if wanted[0]:
        grads.append(_convolve(grad, weight, None, height, width, flip=True))
    if wanted[1]:
        _check_kinds(grad, x, weight)
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        sizes, threads = _sizes(x, weight, height, width), torch.get_num_threads()
        failed = _library().attnzoo_depthwise_weight(
            *_tokens(x), *_tokens(grad), _address(grad_weight), *sizes, threads
        )
        _raise_if(failed)
        grads.append(grad_weight)
    if wanted[2]:
        grads.append(grad.sum(1) if an_image else grad.sum((0, 1)))
    return grads


@_depthwise2d_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, wanted: list[bool], an_image: bool
) -> list[Tensor]:
    bias = weight.shape[:1] if not an_image else (x.shape[0], weight.shape[0])
    all_of_them = (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(bias))
    return [t for t, asked in zip(all_of_them, wanted, strict=True) if asked]


@register_flop_formula(torch.ops.attnzoo.depthwise2d)
def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """A multiply and an add a tap; the shapes are those of the arguments."""
    return 2 * math.prod(x) * weight[-1] ** 2


@register_flop_formula(torch.ops.attnzoo.depthwise2d_product)
def _flops_product(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Two convolutions; products of elements are not counted anywhere."""
    return 2 * _flops(x, weight)


@register_flop_formula(torch.ops.attnzoo.depthwise2d_backward)
def _flops_backward(
    grad: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...], h: int, w: int, wanted: list[bool],
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """As much again for the input's gradient, and as much for the weight's."""
    return sum(wanted[:2]) * _flops(x, weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.height, ctx.width = inputs
    ctx.an_image = bias.dim() == 2
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    backward = _backward_by_torch if torch.is_grad_enabled() else _depthwise2d_backward
    grads = iter(backward(grad, x, weight, ctx.height, ctx.width, wanted, ctx.an_image))
    return (*(next(grads) if asked else None for asked in wanted), None, None)


def _backward_by_torch(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, wanted: list[bool], an_image: bool
) -> list[Tensor]:
    """The gradients, in a way that can be differentiated again."""
    images = [rearrange(t, "b (h w) c -> b c h w", h=height, w=width) for t in (grad, x)]
    channels, half = weight.shape[0], weight.shape[-1] // 2
    shape = ([channels], [1, 1], [half, half], [1, 1], False, [0, 0], channels, [*wanted[:2], False])
    image, taps, _ = torch.ops.aten.convolution_backward(*images, weight, *shape)
    grads = [None if image is None else rearrange(image, "b c h w -> b (h w) c"), taps]
    grads.append(grad.sum(1) if an_image else grad.sum((0, 1)))
    return [g for g, asked in zip(grads, wanted, strict=True) if asked]


_depthwise2d.register_autograd(_backward, setup_context=_save)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    *,
    flip: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """The convolution, by kernels turned by 180 degrees if `flip` (the input's gradient); times `into`, in place."""
    _check(x, weight, bias, height, width)
    _check_kinds(x, weight, *(() if bias is None else (bias,)))
    x, weight = side_by_side(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape) if into is None else into
    failed = _library().attnzoo_depthwise(
        *_tokens(x),
        _address(weight),
        None if bias is None else _address(bias),
        ctypes.c_int64(0 if bias is None or bias.dim() == 1 else bias.stride(0)),
        *_tokens(out),
        *_sizes(x, weight, height, width),
        ctypes.c_int(flip),
        ctypes.c_int(into is not None),
        torch.get_num_threads(),
    )
    _raise_if(failed)
    return out


def _check_kinds(*tensors: Tensor) -> None:
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        kinds = [f"{t.dtype} on {t.device}" for t in tensors]
        raise UnsupportedError(f"the compiled convolution is for float32 on CPUs, not {kinds}; call depthwise2d(...)")


def _library() -> ctypes.CDLL:
    found = library("depthwise", SYMBOLS)
    if found is None:
        raise UnsupportedError("attnzoo::depthwise2d needs its C++, which could not be compiled; call depthwise2d(...)")
    return found


def side_by_side(x: Tensor) -> Tensor:
    """`x` with the channels of a token side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _tokens(x: Tensor) -> tuple[Any, ...]:
    return _address(x), ctypes.c_int64(x.stride(0)), ctypes.c_int64(x.stride(1))


def _sizes(x: Tensor, weight: Tensor, height: int, width: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, (x.shape[0], height, width, x.shape[2], weight.shape[-1])))


def _raise_if(failed: int) -> None:
    if failed:
        raise MemoryError("a depthwise convolution ran out of memory")

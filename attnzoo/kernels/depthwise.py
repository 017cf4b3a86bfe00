"""Depthwise 2-D convolution of tokens ``(B, H * W, C)``, channels last.

    O[y, x, c] = bias[c] + sum over i, j of weight[c, i, j] X[y + i - K // 2, x + j - K // 2, c], zeros beyond the edges

`depthwise2d` takes the fastest way there is: on CPUs, in float32, C++ that is compiled at the first call (see
`native`), everywhere else and where there is no compiler torch's convolution, which is `reference`.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from attnzoo.errors import UnsupportedError
from attnzoo.kernels.native import library


def depthwise2d(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Convolve.

    Parameters
    ----------
    x
        ``(B, height * width, C)``.
    weight
        ``(C, 1, K, K)``, K odd.
    bias
        ``(C,)``.
    height, width
        Size of the grid.

    Returns
    -------
    Tensor
        ``(B, height * width, C)``.
    """
    narrow = x.dtype == weight.dtype == bias.dtype == torch.float32
    if narrow and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and is_compiled():
        out: Tensor = _depthwise2d(x, weight, bias, height, width)
        return out
    return reference(x, weight, bias, height, width)


def reference(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Convolve by torch; see `depthwise2d`."""
    image = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # channels-last in memory
    image = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return image.permute(0, 2, 3, 1).flatten(1, 2)


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Whether the C++ is there."""
    return library("depthwise") is not None


@torch.library.custom_op("attnzoo::depthwise2d", mutates_args=(), device_types="cpu")
def _depthwise2d(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return _convolve(x, weight, bias, height, width, turned=False)


@_depthwise2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("attnzoo::depthwise2d_backward", mutates_args=(), device_types="cpu")
def _depthwise2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad, x = _side_by_side(grad), _side_by_side(x)
    failed = _library().attnzoo_depthwise_weight(
        *_tokens(x), *_tokens(grad), _address(grad_weight), *_sizes(x, weight, height, width), torch.get_num_threads()
    )
    _check(failed)
    return _convolve(grad, weight, None, height, width, turned=True), grad_weight, grad.sum((0, 1))


@_depthwise2d_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


@register_flop_formula(torch.ops.attnzoo.depthwise2d)
def _flops(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """A multiply and an add a tap; the shapes are those of the arguments."""
    return 2 * math.prod(x) * weight[-1] ** 2


@register_flop_formula(torch.ops.attnzoo.depthwise2d_backward)
def _flops_backward(grad: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kw: Any) -> int:
    """As much again for the input's gradient, and as much for the weight's."""
    return 4 * math.prod(x) * weight[-1] ** 2


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.height, ctx.width = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    backward = _backward_by_torch if torch.is_grad_enabled() else _depthwise2d_backward
    return (*backward(grad, x, weight, ctx.height, ctx.width), None, None)


def _backward_by_torch(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, in a way that can be differentiated again."""
    images = [t.unflatten(1, (height, width)).permute(0, 3, 1, 2) for t in (grad, x)]
    channels, half = weight.shape[0], weight.shape[-1] // 2
    shape = ([channels], [1, 1], [half, half], [1, 1], False, [0, 0], channels, [True, True, True])
    image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(*images, weight, *shape)
    return image.permute(0, 2, 3, 1).flatten(1, 2), grad_weight, grad_bias


_depthwise2d.register_autograd(_backward, setup_context=_save)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, turned: bool) -> Tensor:
    """The convolution, by kernels turned by 180 degrees if `turned` (the gradient of the input)."""
    x, weight = _side_by_side(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape)
    failed = _library().attnzoo_depthwise(
        *_tokens(x),
        _address(weight),
        None if bias is None else _address(bias),
        *_tokens(out),
        *_sizes(x, weight, height, width),
        ctypes.c_int(turned),
        torch.get_num_threads(),
    )
    _check(failed)
    return out


def _library() -> ctypes.CDLL:
    found = library("depthwise")
    if found is None:
        raise UnsupportedError("attnzoo::depthwise2d needs its C++, which could not be compiled; call depthwise2d(...)")
    return found


def _side_by_side(x: Tensor) -> Tensor:
    """`x` with the channels of a token side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _tokens(x: Tensor) -> tuple[Any, ...]:
    return _address(x), ctypes.c_int64(x.stride(0)), ctypes.c_int64(x.stride(1))


def _sizes(x: Tensor, weight: Tensor, height: int, width: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, (x.shape[0], height, width, x.shape[2], weight.shape[-1])))


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("a depthwise convolution ran out of memory")

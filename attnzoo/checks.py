"""Checks of arguments that more than one method makes, each with an error that says what was expected."""

from __future__ import annotations

import math
import sys
import warnings

import torch
from torch import Tensor

from attnzoo.errors import OptionError, ShapeError, UnsupportedError, short

Grid = tuple[int, int] | Tensor
MOST = sys.float_info.max  # of the finite numbers


def check_int(name: str, value: object, *, minimum: int) -> int:
    """Give `value` back if it is a whole number of at least `minimum`, else raise `OptionError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OptionError(f"{name} must be a whole number of at least {minimum}, not {short(value)}")
    return value


def check_odd(name: str, value: object) -> int:
    """Give `value` back if it is an odd whole number of at least 1, so that there is a middle, else `OptionError`."""
    size = check_int(name, value, minimum=1)
    if size % 2 == 0:
        raise OptionError(f"{name} must be odd, so that there is a middle, not {size}")
    return size


def check_number(name: str, value: object, *, minimum: float, maximum: float = math.inf) -> float:
    """Give `value` back if it is a finite number from `minimum` to `maximum`, else raise `OptionError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= min(maximum, MOST):
        bounds = f"of at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise OptionError(f"{name} must be a number {bounds}, not {short(value)}")
    return value


def check_bool(name: str, value: object) -> bool:
    """Give `value` back if it is True or False, else raise `OptionError`."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {short(value)}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Give `value` back if it is one of `choices`, else raise `OptionError`."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, not {short(value)}")
    return value


def renamed_choice(name: str, value: object, old: str, new: str) -> object:
    """Give `value`, or `new` with a `DeprecationWarning` where it is `old`, the spelling of an earlier version."""
    if value != old:
        return value
    warnings.warn(
        f"{name}={old!r} is now spelled {new!r}; the old spelling will be refused from version 0.2 on",
        DeprecationWarning,
        stacklevel=4,
    )
    return new


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ShapeError` unless q is ``(B, H, N, D)``, k ``(B, Hkv, S, D)``, v ``(B, Hkv, S, Dv)``, Hkv dividing H."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError(f"q, k and v are (B, H, N, D), got {_shapes(q, k, v)}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) do not fit together: {_shapes(q, k, v)}")
    if 0 in (q.shape[1], k.shape[1], q.shape[3]):
        raise ShapeError(f"attention needs at least one head and a width of at least 1, got {_shapes(q, k, v)}")
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{k.shape[1]} key/value heads do not divide {q.shape[1]} query heads")


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Raise `ShapeError` unless `mask` is boolean or floating and broadcasts to ``(B, H, N, S)``.

    Masks of whole numbers are refused, as by torch: it would depend on the code that reads them whether 1 means seen,
    hidden or a score of 1.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ShapeError(
            f"a mask is boolean (True where seen) or floating (added to the scores), not {mask.dtype}; "
            "call mask.bool() if 1 means seen"
        )
    full = (*q.shape[:3], k.shape[2])  # (B, H, N, S)
    fits = mask.dim() <= 4 and all(
        wide == size or size == 1 for size, wide in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ShapeError(f"a mask must broadcast to (B, H, N, S) = {full}, got {tuple(mask.shape)}")


def check_tokens(x: Tensor, dim: int, mask: Tensor | None) -> None:
    """Raise `ShapeError` unless x is ``(B, N, dim)`` and mask, if given, is boolean ``(B, N)``."""
    if x.dim() != 3 or x.shape[2] != dim:
        raise ShapeError(f"x must be (B, N, {dim}), got {tuple(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ShapeError(
            f"mask must be boolean of shape {tuple(x.shape[:2])} (True where a token is real, prefix included), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def check_prefix(prefix: int, tokens: int) -> None:
    """Raise `ShapeError` unless `prefix` is a whole number of at most `tokens`."""
    if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix <= tokens:
        raise ShapeError(f"prefix must be a whole number from 0 to the {tokens} tokens there are, not {short(prefix)}")


def check_grid(grid: Grid | None, tokens: int, batch: int, prefix: int) -> None:
    """Raise `ShapeError` unless `grid` and `prefix` fit the shape of the tokens.

    `grid` is ``(h, w)`` with ``prefix + h * w == tokens``, or an integer tensor ``(B, 2)`` of one grid an image.
    """
    check_prefix(prefix, tokens)
    if grid is None:
        raise ShapeError("this method needs grid=(h, w), the grid of the tokens after the prefix")
    if isinstance(grid, Tensor):
        if grid.shape != (batch, 2) or grid.dtype.is_floating_point:
            raise ShapeError(
                f"a tensor grid must hold integers of shape {(batch, 2)}, got {grid.dtype} {tuple(grid.shape)}"
            )
        if int(grid.amin()) < 1 or prefix + int(grid.prod(1).amax()) > tokens:
            raise ShapeError(
                f"grids {grid.tolist()} must be at least 1 x 1 and hold at most {tokens - prefix} tokens each"
            )
        return
    pair = isinstance(grid, (tuple, list, torch.Size)) and len(grid) == 2
    if not pair or not all(isinstance(n, (int, torch.SymInt)) for n in grid) or min(grid) < 1:
        raise ShapeError(f"grid must be (h, w), whole numbers of at least 1, not {short(grid)}")
    if prefix + grid[0] * grid[1] != tokens:
        raise ShapeError(
            f"{tokens} tokens are not {prefix} prefix tokens and a grid of {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def refuse_tracing() -> None:
    """Raise `UnsupportedError` under ``torch.jit.trace``, which ``torch.onnx.export(..., dynamo=False)`` uses too."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise UnsupportedError(
            "torch.jit.trace, and so torch.onnx.export(..., dynamo=False), cannot export a swapped model: it keeps the "
            "sizes and choices of the one call that it sees. Use torch.export.export, or torch.onnx.export(..., "
            "dynamo=True)"
        )


def not_square(count: int) -> str:
    """Say that a count is not a square: ``200 is not a square (the nearest are 196 and 225)``."""
    side = math.isqrt(count)
    return f"{count} is not a square (the nearest are {max(side, 1) ** 2} and {(side + 1) ** 2})"

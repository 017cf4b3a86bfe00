"""Attention that no host knows: layers that attend, whatever their class is called.

A swap must not pass over them in silence, for what it leaves standing is what a user measures. At the time of a swap
no input of the model is known, so it cannot be watched at work; what can be known is which of torch's functions the
code of its class calls. Those names are torch's interface, not the library's. A module is taken to attend if its class
calls ``scaled_dot_product_attention``, or a softmax and a product of matrices: a gate, a router or a classifier calls a
softmax alone.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

FUSED = frozenset({"scaled_dot_product_attention", "flash_attn_func", "flex_attention", "multi_head_attention_forward"})
SOFTMAX = frozenset({"softmax", "Softmax"})
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})


def attends(module: nn.Module) -> bool:
    """Whether the code of the module's own class attends; what its children do is theirs."""
    called, multiplies = _calls(type(module))  # type: ignore[arg-type]
    if called & FUSED:
        return True
    normalizes = bool(called & SOFTMAX) or any(isinstance(child, nn.Softmax) for child in module.children())
    return normalizes and (multiplies or bool(called & PRODUCTS))


@lru_cache(maxsize=1024)
def _calls(cls: type) -> tuple[frozenset[str], bool]:
    """Names that the methods of a class use, and whether one of them multiplies matrices by ``@``."""
    names: set[str] = set()
    multiplies = False
    for code in _codes(cls):
        names.update(code.co_names)
        multiplies |= any(
            one.opname == "BINARY_OP" and one.argrepr in ("@", "@=") for one in dis.get_instructions(code)
        )
    return frozenset(names), multiplies


def _codes(cls: type) -> Iterator[CodeType]:
    """The code of a class's methods, inherited ones included, as far as they are not torch's."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for member in vars(base).values():
            function: Any = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
            if isinstance(function, FunctionType) and function.__name__ != "__init__":
                yield from _nested(inspect.unwrap(function).__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)

"""Attention that no host knows: layers that attend, whatever their class is called.

A swap must not pass over them in silence, for what it leaves standing is what a user measures. At the time of a swap
no input of the model is known, so it cannot be watched at work; what can be known is which of torch's functions the
code of its class calls. Those names are torch's interface, not the library's. A module is taken to attend if its class
calls ``scaled_dot_product_attention`` or another library's fused attention, or a softmax and a product of matrices: a
gate, a router or a classifier calls a softmax alone. A function that a method calls by name, as ``attend`` in
``attend(q, k, v)``, counts as a part of it; what that calls in turn does not.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

FUSED = frozenset(
    {
        "scaled_dot_product_attention",
        "flex_attention",
        "multi_head_attention_forward",
        "flash_attn_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_kvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_with_kvcache",
        "memory_efficient_attention",
        "sageattn",
    }
)
GLOBAL = "LOAD_GLOBAL"  # the instruction that looks up a function of the module
SOFTMAX = frozenset({"softmax", "Softmax"})
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})


def attends(module: nn.Module) -> bool:
    """Whether the code of the module's own class attends; what its children do is theirs."""
    own: type = type(module)
    called, multiplies = _calls(own)
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
    """The code of a class's methods, inherited ones included, and of the functions that they call by name."""
    for base in cls.__mro__:
        for member in vars(base).values():
            function: Any = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
            if not isinstance(function, FunctionType) or function.__name__ == "__init__" or _is_torchs(base):
                continue
            function = _unwrapped(function)
            codes = list(_nested(function.__code__))
            yield from codes
            for name in {one.argval for code in codes for one in dis.get_instructions(code) if one.opname == GLOBAL}:
                helper = function.__globals__.get(name)
                if isinstance(helper, FunctionType) and not _is_torchs(helper):
                    yield from _nested(_unwrapped(helper).__code__)


def _unwrapped(function: FunctionType) -> FunctionType:
    """What a decorated function was; itself where it says that it wraps something without Python code."""
    inner = inspect.unwrap(function)
    return inner if isinstance(inner, FunctionType) else function


def _is_torchs(one: type | FunctionType) -> bool:
    return one.__module__.partition(".")[0] in ("torch", "builtins")


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)

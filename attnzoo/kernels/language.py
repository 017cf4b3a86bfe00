"""Triton, or where it is not installed what lets the files of kernels be read all the same."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:

    class _Missing:
        """Takes part in nothing but the definition of kernels that nobody will launch."""

        constexpr = Any

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **options: args[0] if args and callable(args[0]) else self.__getattr__(name)

    triton = tl = _Missing()
    AVAILABLE = False

__all__ = ["AVAILABLE", "interpreting", "tl", "triton"]


def interpreting() -> bool:
    """Whether kernels were defined for Triton's interpreter (``TRITON_INTERPRET=1``), which runs them in NumPy."""
    return AVAILABLE and bool(triton.knobs.runtime.interpret)

"""FlashAttention: exact softmax attention in tiles, without the N x S matrix in memory.

Paper: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691 (FlashAttention-3: https://arxiv.org/abs/2407.08608)

    for each tile of keys:  m' = max(m, rowmax(S)),  l' = e^(m-m') l + rowsum(e^(S-m')),  O' = e^(m-m') O + e^(S-m') V
    O = O / l,  with S = scale * Q K^T

Differs from the paper: nothing in the algorithm; the kernels are others' (see `backend`).

The name is a promise: this core runs a FlashAttention kernel or raises. It never falls back to another algorithm.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnzoo.checks import check_choice, check_qkv
from attnzoo.cores.sdpa import torch_sdpa
from attnzoo.errors import MissingExtraError, UnsupportedError

_PACKAGES = {"flash_attn": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
_INSTALL = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "fa3": "python setup.py install, in the folder 'hopper' of the flash-attention repository",
    "fa4": "pip install flash-attn-4",
}


@dataclass(frozen=True, kw_only=True)
class Flash:
    """FlashAttention as a core.

    Parameters
    ----------
    backend
        ``torch``: PyTorch's own flash kernel, on CPU and CUDA. ``flash_attn`` (FlashAttention-2), ``fa3`` and ``fa4``:
        the authors' packages, on CUDA, where installed.

    Raises
    ------
    OptionError
        For another backend.
    MissingExtraError
        If the backend's package is not installed.
    """

    backend: str = "torch"

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, ("torch", *_PACKAGES))
        if self.backend != "torch":
            _package_function(self.backend)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """Attend; see `attnzoo.cores` for the shapes.

        Raises
        ------
        UnsupportedError
            For anything that the chosen FlashAttention kernel cannot do; the message names it.
        """
        check_qkv(q, k, v)
        if dropout > 0 and not (self.backend in ("torch", "flash_attn") and q.is_cuda):
            raise self._refusal(f"attention dropout ({dropout}) on {q.device.type}")
        if softcap is not None and self.backend == "torch":
            raise self._refusal("a soft cap on the scores")
        if self.backend == "torch":
            return self._torch(q, k, v, mask, causal, scale, dropout)
        return self._package(q, k, v, mask, causal, scale, dropout, softcap)

    def _torch(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float
    ) -> Tensor:
        if v.shape[-1] != q.shape[-1]:
            raise self._refusal(f"values of width {v.shape[-1]} beside keys of width {q.shape[-1]}")
        if q.is_cuda:
            if mask is not None or (causal and 1 < q.shape[2] != k.shape[2]):
                raise self._refusal("an attention mask, or causal attention with a cache, on CUDA")
            if q.dtype not in (torch.float16, torch.bfloat16):
                raise self._refusal(f"{q.dtype} on CUDA (float16 and bfloat16 only)")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch_sdpa(q, k, v, mask, causal, scale, dropout)

    def _package(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        dropout: float,
        softcap: float | None,
    ) -> Tensor:
        if mask is not None:
            raise self._refusal("an attention mask")
        if not q.is_cuda:
            raise self._refusal(f"tensors on {q.device.type}")
        options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
        if softcap is not None:
            options["softcap"] = softcap
        if dropout > 0:
            options["dropout_p"] = dropout
        out = _package_function(self.backend)(*(t.transpose(1, 2) for t in (q, k, v)), **options)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)

    def _refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"flash (backend {self.backend!r}) cannot do {what}; use 'sdpa' or 'softmax'")


def _package_function(backend: str) -> Callable[..., Any]:
    try:
        return importlib.import_module(_PACKAGES[backend]).flash_attn_func
    except (ImportError, AttributeError) as error:
        raise MissingExtraError(
            f"flash backend {backend!r} needs the package {_PACKAGES[backend]!r}: {_INSTALL[backend]}"
        ) from error

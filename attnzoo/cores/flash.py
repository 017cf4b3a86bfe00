"""FlashAttention: exact softmax attention in tiles, without the N x S matrix in memory.

Paper: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691 (FlashAttention-3: https://arxiv.org/abs/2407.08608)

    for each tile of keys:  m' = max(m, rowmax(S)),  l' = e^(m-m') l + rowsum(e^(S-m')),  O' = e^(m-m') O + e^(S-m') V
    O = O / l,  with S = scale * Q K^T

Differs from the paper: nothing in the algorithm; the kernels are others' (see `backend`), and dropout is left out.

The name is a promise: this core calls a FlashAttention kernel by its own name, or raises. PyTorch's operators are
called directly, since the switch between its backends (`sdpa_kernel`) is one for the whole process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.checks import check_choice, check_mask, check_qkv
from attnzoo.cores.masks import additive, with_causal, without_tokens
from attnzoo.errors import MissingExtraError, UnsupportedError

_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CUDA_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention
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
        check_mask(mask, q, k)
        if dropout > 0:
            raise self._refusal(f"attention dropout ({dropout})")
        if softcap is not None and self.backend == "torch":
            raise self._refusal("a soft cap on the scores")
        if v.shape[-1] != q.shape[-1]:
            raise self._refusal(f"values of width {v.shape[-1]} with keys of width {q.shape[-1]}")
        if 0 in (q.shape[0], q.shape[2], k.shape[2]):  # the kernels divide by their number of tiles
            return without_tokens(q, k, v)
        if causal and q.shape[2] == 1:
            causal = False  # the one query is the last: it sees every key
        if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
            q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
        if self.backend != "torch":
            return self._package(q, k, v, mask, causal, scale, softcap)
        return self._cuda(q, k, v, mask, causal, scale) if q.is_cuda else self._cpu(q, k, v, mask, causal, scale)

    def _cpu(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        if mask is not None and mask.requires_grad:
            raise self._refusal("an attention mask that requires a gradient")
        if causal and (mask is not None or q.shape[2] != k.shape[2]):
            mask, causal = with_causal(mask, q.shape[2], k.shape[2], q.device), False
        if mask is not None:
            mask = additive(mask, q.dtype)
            mask = mask[(None,) * (4 - mask.dim())]
        return _CPU_KERNEL(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[0]

    def _cuda(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        if mask is not None or (causal and q.shape[2] != k.shape[2]):
            raise self._refusal("an attention mask, or causal attention with a cache, on CUDA")
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise self._refusal(f"{q.dtype} on CUDA (float16 and bfloat16 only)")
        width = q.shape[-1]
        scale = width**-0.5 if scale is None else scale
        q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))  # the kernel takes multiples of 8
        return _CUDA_KERNEL(q, k, v, 0.0, causal, False, scale=scale)[0][..., :width]

    def _package(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        if mask is not None:
            raise self._refusal("an attention mask")
        if not q.is_cuda:
            raise self._refusal(f"tensors on {q.device.type}")
        options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
        if softcap is not None:
            options["softcap"] = softcap
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

"""Mamba: a selective state space, here run over the sequence in both directions.

Papers: Gu and Dao, Mamba, COLM 2024, https://arxiv.org/abs/2312.00752; for images Zhu et al., Vision Mamba, ICML 2024,
https://arxiv.org/abs/2401.09417

    u, z = W_in X,   u <- silu(DWConv_4(u)),   dt = softplus(W_dt W_r u + b),   B = W_B u,   C = W_C u
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,   y_t = C_t h_t + D u_t,   O = W_out (y . silu(z))

It is not a polynomial. With constant steps dt and without the silu, y is one of degree 3 exactly (C_t times the sum
over s of exp((t-s) dt A) B_s u_s, each of C, B and u linear in X), and O, with the gate z, of degree 4.

Differs from the papers: nothing for ``bidirectional=False``. Bidirectional as Vision Mamba's second form: a
convolution, a selection and a state for each direction, one W_in, z and W_out; their sum is not halved. The class token
stands where the host has put it, not in the middle.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_bool, check_int, check_tokens
from attnzoo.kernels.depthwise_pair import depthwise_pair
from attnzoo.mixers.canvas import Canvas, real_tokens

SMALLEST_STEP, LARGEST_STEP = 0.001, 0.1
PART = 64  # tokens whose decays and inputs are made at a time: many at once for speed, not all for memory
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that mamba_ssm takes


class Mamba(nn.Module):
    """The Mamba block over the sequence of all tokens.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Not used: there are no heads.
    state_size
        Number of states of each channel.
    kernel_size
        Length of the causal convolution.
    expand
        Number of inner channels for each of `dim`.
    bidirectional
        Run a second scan from the end: without it tokens do not see those after them.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        state_size: int = 16,
        kernel_size: int = 4,
        expand: int = 2,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        check_int("state_size", state_size, minimum=1)
        check_int("kernel_size", kernel_size, minimum=1)
        inner = check_int("expand", expand, minimum=1) * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        directions = 2 if check_bool("bidirectional", bidirectional) else 1
        self.directions = nn.ModuleList(Selective(inner, dim, state_size, kernel_size) for _ in range(directions))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    @staticmethod
    def abilities(*, bidirectional: bool = True, **options: object) -> dict[str, bool]:
        """Say which capabilities depend on the options."""
        return {"causal": bidirectional is False}

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together.
        """
        check_tokens(x, self.dim, mask)
        line = Canvas.line(x, None, 0, real_tokens(x, grid, prefix, mask))
        head, x = line.lay(x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.directions[0](u, line.patch_mask)
        for backward in self.directions[1:]:
            real = None if line.patch_mask is None else line.patch_mask.flip(1)
            y = y + backward(u.flip(1), real).flip(1)
        return line.take(head, self.out_proj(y * F.silu(z)))

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, bidirectional={len(self.directions) == 2}"


class Selective(nn.Module):
    """Convolution, selection and scan of one direction.

    Parameters
    ----------
    inner
        Number of channels.
    dim
        Width of the host's tokens, of which the rank of the step's map is a sixteenth.
    state_size, kernel_size
        As for `Mamba`.
    """

    def __init__(self, inner: int, dim: int, state_size: int, kernel_size: int) -> None:
        super().__init__()
        self.state_size, self.rank = state_size, math.ceil(dim / 16)
        self.conv1d = nn.Conv1d(inner, inner, kernel_size, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state_size + 1.0).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():  # so that softplus(bias) is spread evenly, on a log scale, between the two steps
            step = torch.empty(inner).uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP)).exp()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scan ``(B, N, inner)``; where `mask` ``(B, N, 1)`` is False nothing goes into the state."""
        real = None if mask is None else mask.squeeze(-1)
        u = depthwise_pair(u, self.conv1d.weight, self.conv1d.bias, grid=(1, u.shape[1]), causal=True, mask=real)
        u = F.silu(u)  # padding stays 0
        step, b, c = self.x_proj(u).split([self.rank, self.state_size, self.state_size], dim=-1)
        wide = torch.promote_types(u.dtype, torch.float32)
        a = -self.A_log.to(wide).exp()
        dt, bias = self._step(step)
        return selective_scan(u, dt, a, b, c, self.D, bias)

    def _step(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """The step of each channel ``(B, N, inner)`` and its bias, which the scan adds in float32.

        What replaces the linear map (quantized, or with an adapter) is called, and adds its bias itself.
        """
        if type(self.dt_proj) is nn.Linear:
            return F.linear(step, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(step), self.D.new_zeros(self.D.shape)


def selective_scan(u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, step_bias: Tensor) -> Tensor:
    """``h_t = exp(dt_t a) h_{t-1} + dt_t b_t u_t``, ``y_t = c_t h_t + d u_t`` with ``dt = softplus(step + step_bias)``.

    On CUDA by the authors' kernel where the package mamba_ssm is installed, else token by token; the state is kept in
    float32 at least.

    Parameters
    ----------
    u, step
        ``(B, N, C)``.
    a
        ``(C, S)``, negative.
    b, c
        ``(B, N, S)``.
    d, step_bias
        ``(C,)``.

    Returns
    -------
    Tensor
        ``(B, N, C)``.
    """
    fast = _kernel() if _on_cuda(u) and u.dtype in KERNEL_DTYPES else None
    if fast is not None:
        wide = {"D": d.float(), "delta_bias": step_bias.float(), "delta_softplus": True}
        y: Tensor = fast(u.mT.contiguous(), step.mT.contiguous(), a, b.mT.contiguous(), c.mT.contiguous(), **wide)
        return y.mT
    if u.numel() == 0:
        return u * step
    dt = F.softplus((step + step_bias).to(a.dtype))
    inputs = dt * u.to(a.dtype)
    h = u.new_zeros(u.shape[0], *a.shape, dtype=a.dtype)
    out = []
    for dt_part, in_part, b_part, c_part in zip(
        *(x.to(a.dtype).split(PART, 1) for x in (dt, inputs, b, c)), strict=True
    ):
        decay = torch.exp(dt_part.unsqueeze(-1) * a)
        given = in_part.unsqueeze(-1) * b_part.unsqueeze(2)
        states = []
        for decay_t, given_t in zip(decay.unbind(1), given.unbind(1), strict=True):
            h = torch.addcmul(given_t, decay_t, h)
            states.append(h)
        out.append((torch.stack(states, dim=1) @ c_part.unsqueeze(-1)).squeeze(-1))
    return (torch.cat(out, dim=1) + d * u).to(u.dtype)


def _on_cuda(u: Tensor) -> bool:
    return u.is_cuda


@lru_cache
def _kernel() -> Any:
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        return None

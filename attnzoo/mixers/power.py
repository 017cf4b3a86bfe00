"""Power attention: an even power of the scores in the place of their exponential.

Paper: Gelada et al., Scaling Context Requires Rethinking Attention, 2025, https://arxiv.org/abs/2507.04239

    Y_i = sum_j g_ij (q_i . k_j)^p v_j / sum_j g_ij (q_i . k_j)^p,   g_ij = product of sigmoid(W_g x_l) for j < l <= i
    (q . k)^p = phi(q) . phi(k),  phi(x): the products of p channels of x, each set of channels once

Its sums over j are a state of (D + p - 1 choose p) features by D + 1, so that the cost is linear in the number of
tokens. Numerator and denominator are polynomials of degree 2p + 1 and 2p exactly, where nothing is forgotten (g = 1).

Differs from the paper: by default j runs over all tokens, and nothing is forgotten; queries and keys are not rotated by
their positions, of which only ``gate`` knows; where all scores of a token are 0 its output is 0; scores are not divided
by the largest of their row, so that powers of large ones overflow (inputs of about 10,000 with p = 4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnzoo.checks import Grid, check_bool, check_int, check_tokens
from attnzoo.errors import OptionError, ShapeError, UnsupportedError
from attnzoo.mixers.canvas import Canvas, hide, real_tokens
from attnzoo.mixers.heads import check_heads, inherit_values, join_heads, split_heads

MOST_FEATURES = 16384  # of a head; with more it is computed by scores, at quadratic cost
CHUNK = 128  # tokens of a causal sequence that look at each other; those before them are in the state
REMEMBERED = 5.0  # bias of the gate: sigmoid(5) = 0.993 of what was before is kept from token to token


class Power(nn.Module):
    """Attention by an even power of the scores.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Number of heads, a divisor of `dim`.
    power
        Exponent p of the scores, even. Heads of width 16 have 136 features with p = 2 and 3,876 with 4, of width 64
        2,080 and 766,480: up to so many tokens, and of heads with more than 16,384 features always, the cost is
        quadratic in the number of tokens.
    bidirectional
        Let tokens see those after them.
    gate
        Forget what came before, by a learned share for each head and token; needs ``bidirectional=False``.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    causal_form = "bidirectional=False"  # what messages tell where a causal mixer is needed

    def __init__(
        self, dim: int, num_heads: int = 1, *, power: int = 2, bidirectional: bool = True, gate: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = check_heads(dim, num_heads)
        if check_int("power", power, minimum=2) % 2:
            raise OptionError(
                f"power must be even, not {power}: odd powers of scores have signs and no sum to divide by"
            )
        if check_bool("gate", gate) and check_bool("bidirectional", bidirectional):
            raise OptionError("gate forgets what came before a token, so it needs bidirectional=False")
        self.power, self.bidirectional = power, check_bool("bidirectional", bidirectional)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate = nn.Linear(dim, num_heads) if gate else None
        self.proj = nn.Linear(dim, dim)
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, REMEMBERED)
        width = dim // num_heads
        self.count = math.comb(width + power - 1, power)
        if self.count > MOST_FEATURES and not bidirectional:
            raise OptionError(
                f"power={power} of heads of width {width} has {self.count:,} features, too many for a state: take a "
                "lower power, or narrower heads"
            )
        sets: list[tuple[int, ...]] = []
        if self.count <= MOST_FEATURES:
            sets += itertools.combinations_with_replacement(range(width), power)
        counts = [math.factorial(power) // math.prod(math.factorial(one.count(c)) for c in set(one)) for one in sets]
        self.sets: Tensor  # of channels, (p, F)
        self.counts: Tensor  # orders in which each set's channels can stand, (F,)
        self.register_buffer("sets", torch.tensor(sets, dtype=torch.long).view(-1, power).mT, persistent=False)
        self.register_buffer("counts", torch.tensor(counts), persistent=False)

    @staticmethod
    def abilities(*, bidirectional: bool = True, **options: object) -> dict[str, bool]:
        """Say which capabilities depend on the options."""
        one_way = bidirectional is False
        return {"causal": one_way, "decode": one_way, "any_order": not one_way}

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
        q, k, v = self._heads(x, line.patch_mask)
        kept = self._kept(x, line.patch_mask)
        with torch.autocast(x.device.type, enabled=False):
            if not self.bidirectional:
                sums = self._ahead(q, k, v, kept, None, last=False)[0]
            elif self._by_scores(x.shape[1]):
                sums = (q @ k.mT) ** self.power @ v
            else:
                sums = self.features(q) @ (self.features(k).mT @ v)
            mean = _mean(sums)
        return line.take(head, self.proj(mean.to(x.dtype)))

    def extend(
        self, x: Tensor, state: Sequence[Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mix the tokens that come next, with ``bidirectional=False``: for decoding.

        Parameters
        ----------
        x
            ``(B, N, C)``.
        state
            What the call before gave; None at the beginning.
        mask
            ``(B, N)``, True where a token is real. Padding leaves no trace in the state.

        Returns
        -------
        tuple
            The output ``(B, N, C)``, and the state, one tensor ``(B, H, F, D + 1)`` in float32 at least: 0.5 MB of
            each head of width 64.

        Raises
        ------
        UnsupportedError
            If this module is not causal.
        ShapeError
            If x and mask do not fit together, or the state is not of this module and as many rows.
        """
        if self.bidirectional:
            raise UnsupportedError("only power with bidirectional=False can decode from a state")
        check_tokens(x, self.dim, mask)
        wanted = [(x.shape[0], self.num_heads, self.count, self.dim // self.num_heads + 1)]
        if state is not None and [tuple(part.shape) for part in state] != wanted:
            raise ShapeError(f"the state must be {wanted}, not {[tuple(part.shape) for part in state]}")
        line = Canvas.line(x, None, 0, mask)
        head, x = line.lay(x)
        q, k, v = self._heads(x, line.patch_mask)
        kept = self._kept(x, line.patch_mask)
        with torch.autocast(x.device.type, enabled=False):
            sums, after = self._ahead(q, k, v, kept, None if state is None else state[0], last=True)
            mean = _mean(sums)
        assert after is not None
        return line.take(head, self.proj(mean.to(x.dtype))), (after,)

    def features(self, x: Tensor) -> Tensor:
        """Give the features phi ``(B, H, N, F)`` of queries or keys ``(B, H, N, D)``."""
        parts = [x[..., channels] for channels in self.sets]
        return math.prod(parts[1:], start=parts[0]) * self.counts.to(x.dtype).sqrt()

    def inherit(self, weight: Tensor, bias: Tensor) -> None:
        """Begin with the values of attention, see `attnzoo.mixers.heads.inherit_values`."""
        inherit_values(self.qkv, self.proj, weight, bias)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, num_heads={self.num_heads}, power={self.power}, bidirectional={self.bidirectional}"

    def _heads(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``(B, H, N, D)``, and values with a one after each, ``(B, H, N, D + 1)``, in float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (part.to(wide) for part in split_heads(self.qkv(x), self.num_heads, mask))
        q = q * q.shape[-1] ** -0.5  # changes no weight, and leaves powers more room
        return q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1)

    def _kept(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Logarithm of what each token keeps of those before it, ``(B, H, N)``: padding keeps all."""
        if self.gate is None:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        return hide(nn.functional.logsigmoid(self.gate(x).to(wide)), mask).mT

    def _ahead(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, state: Tensor | None, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sums over the tokens up to each one, ``(B, H, N, D + 1)``; and the state, if asked for after the last."""
        size = CHUNK if q.shape[2] > max(self.count, CHUNK) else max(1, q.shape[2])
        chunks = [*zip(*(part.split(size, 2) for part in (q, k, v)), strict=True)]
        logs = [None] * len(chunks) if kept is None else kept.split(size, 2)
        found = []
        for index, ((q_c, k_c, v_c), log) in enumerate(zip(chunks, logs, strict=True)):
            scores = ((q_c @ k_c.mT) ** self.power).tril()
            since = None if log is None else log.cumsum(2).unsqueeze(-1)  # (B, H, n, 1)
            if since is not None:
                scores = scores * (since - since.mT).tril().exp()
            sums = scores @ v_c
            if state is not None:
                before = self.features(q_c) @ state
                sums = sums + (before if since is None else before * since.exp())
            found.append(sums)
            if last or index + 1 < len(chunks):
                whole = None if log is None else log.sum(2)[..., None, None]
                if whole is not None and since is not None:
                    v_c = v_c * (whole - since).exp()
                    state = None if state is None else state * whole.exp()
                for k_p, v_p in zip(k_c.split(CHUNK, 2), v_c.split(CHUNK, 2), strict=True):
                    added = self.features(k_p).mT @ v_p
                    state = added if state is None else state + added
        return torch.cat(found, 2), state

    def _by_scores(self, tokens: int) -> bool:
        """Whether scores of all pairs cost less than features; a graph that is exported has one way for all lengths."""
        return self.count > MOST_FEATURES or (not torch.compiler.is_exporting() and tokens < self.count)


def _mean(sums: Tensor) -> Tensor:
    """Divide ``(B, H, N, D + 1)`` by its last channel, the sum of weights, and join the heads to ``(B, N, H * D)``."""
    total = sums[..., -1:]
    return join_heads(sums[..., :-1] / torch.where(total == 0, 1.0, total))

"""Expected attention: what future queries will give an entry, if they are drawn like the last ones.

Paper: Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution,
https://arxiv.org/abs/2510.00636

    q ~ Gaussian with the mean m and covariance C of the queries before rotary embedding
    R   = mean over the next `future` positions of the rotation to them
    e_j = exp(k_j R m * scale + k_j R C R^T k_j * scale^2 / 2)        (the expectation of exp(k_j R q * scale))
    s_j = (e_j / sum of e + epsilon) * ||v_j||_2

The layer's rotary embedding comes from the host; a layer whose embedding depends on more than the position, or that has
none, is refused at the swap.

Differs from the paper: it takes the statistics from all tokens of the prompt but the first few; here from the last
`window` queries, whose rotation is reverted. Evicts after each block of `block_size` tokens, in decoding too. Query
heads that share a key/value head are averaged, as in kvpress, the authors' code, which leaves the sinks out of the sum
of e (``count_sinks=False``). Half the budget is kept for recent entries by default, for that loses less; ``recent=0``
is the paper's. A soft cap on the logits is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_bool, check_int, check_number
from attnzoo.errors import OptionError, UnsupportedError
from attnzoo.eviction.layer_data import Rotary
from attnzoo.eviction.policy import AttentionPolicy, CacheView, wide

AS_PUBLISHED = {"recent": 0, "count_sinks": False, "schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(AttentionPolicy):
    """Attention of queries to come, times the norm of the value.

    Parameters
    ----------
    window
        Number of last queries that the statistics are made of.
    future
        Number of positions to come that are averaged over.
    covariance
        Take the covariance of the queries in, or their mean alone.
    epsilon
        Added to the expected attention before it is multiplied by the norm: the larger, the more the norm counts.
    count_sinks
        Let the first `sink` entries have their share of the expected attention, which sums to 1 in each query head. If
        they are left out, a head that mostly attends to sinks weighs more in the mean.
    """

    window: int = 128
    future: int = 512
    covariance: bool = True
    epsilon: float = 0.0
    count_sinks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)
        check_int("future", self.future, minimum=1)
        check_bool("covariance", self.covariance)
        if not check_bool("count_sinks", self.count_sinks) and self.sink == 0:
            raise OptionError(
                "count_sinks=False leaves the first `sink` entries out, and sink=0 says that there are none"
            )
        check_number("epsilon", self.epsilon, minimum=0)

    @property
    def queries_kept(self) -> int:
        """The window."""
        return self.window

    @property
    def sums_window(self) -> bool:
        """The queries themselves are needed, not their attention."""
        return False

    @property
    def uses_rotary(self) -> bool:
        """To look ahead."""
        return True

    def default_sink(self) -> int:
        """As in the authors' code."""
        return 4

    def default_recent(self, sink: int) -> int:
        """Half the budget."""
        return int(self.budget) // 2

    def attention_scores(self, view: CacheView) -> Tensor:
        """The expected attention, which sums to 1 over the entries that count, for each query head.

        Raises
        ------
        UnsupportedError
            If the cache has no model to ask for its rotary embedding, having been read from a file.
        """
        assert view.queries is not None
        assert view.query_positions is not None
        if view.data is None or view.data.rotary is None:
            raise UnsupportedError(
                "this policy reads the model's rotary embedding, and the cache has no model: call the model with the "
                "cache first"
            )
        queries = ahead(wide(view.queries), view.counts[:, None] - view.query_positions, view.data.rotary, self.future)
        scale = queries.shape[-1] ** -0.5 if view.scale is None else view.scale
        asked = (view.query_positions >= 0)[:, None, :, None].to(queries)
        count = asked.sum(2, keepdim=True).clamp(min=1)
        mean = (queries * asked).sum(2, keepdim=True) / count  # (B, H, 1, D)
        groups = queries.shape[1] // view.kv_heads
        keys = wide(view.keys).to(queries)[:, :, None]  # (B, Hkv, 1, S, D)
        logits = (keys @ mean.unflatten(1, (-1, groups)).mT).squeeze(-1) * scale  # (B, Hkv, G, S)
        if self.covariance:
            apart = (queries - mean) * asked
            covariance = (apart.mT @ apart / count).unflatten(1, (-1, groups))  # (B, Hkv, G, D, D)
            logits = logits + ((keys @ covariance) * keys).sum(-1) * (scale**2 / 2)
        if not self.count_sinks:
            sinks = view.positions < self.protected[0]  # (B, Hkv, S)
            logits = logits.masked_fill(sinks[:, :, None], torch.finfo(logits.dtype).min)
        return logits.softmax(-1).flatten(1, 2)

    def score(self, view: CacheView) -> Tensor:
        """Expected attention, aggregated, times the l2 norm of the value."""
        return (self.aggregated(view) + self.epsilon) * wide(view.values).norm(dim=-1)


def ahead(queries: Tensor, back: Tensor, rotary: Rotary, future: int) -> Tensor:
    """Turn queries to the positions to come, and average over these.

    Parameters
    ----------
    queries
        ``(B, H, w, D)``, after rotary embedding.
    back
        ``(B, w)``: how many positions before the next token each of them stands.
    rotary
        The layer's.
    future
        Number of positions to come.

    Returns
    -------
    Tensor
        ``(B, H, w, D)``.
    """
    here = torch.zeros(1, device=queries.device)  # a turn by a difference of positions has no scaling of its own
    next_ones = rotary.rotate(rotary.undo(queries, here), back[:, None])
    return rotary.mean_rotated(rotary.undo(next_ones, here), torch.arange(future, device=queries.device))

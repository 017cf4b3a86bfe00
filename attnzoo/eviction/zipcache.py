"""ZipCache's saliency: the attention that the last queries give an entry, per query that could see it.

Paper: He et al., ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification,
https://arxiv.org/abs/2405.14256

    s_j = sum over the probes i of A_ij / number of probes i that see j        (Eq. 8)

Differs from the paper: it ranks entries by this to quantize the lower ones to fewer bits; here those are evicted. Its
probes are recent and random tokens, a twentieth of the prompt each; here they are the last `window` queries, which is
what is left of them at an eviction. The authors' code divides by the number of all queries that could see an entry, not
of probes. The attention is that over the entries still there, after each block of `block_size` tokens. Half the budget
is kept for recent entries by default, as in `h2o`, for that loses less; the paper, which evicts nothing, has no such
window.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.checks import check_int
from attnzoo.eviction.policy import AttentionPolicy, CacheView

AS_PUBLISHED = {"recent": 0, "schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class ZipCache(AttentionPolicy):
    """Normalized attention of the last queries.

    Parameters
    ----------
    window
        Number of last queries that are asked.
    """

    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)

    @property
    def queries_kept(self) -> int:
        """The window."""
        return self.window

    def default_recent(self, sink: int) -> int:
        """Half the budget."""
        return int(self.budget) // 2

    def attention_scores(self, view: CacheView) -> Tensor:
        """What an entry got from the window's queries that see it, per query."""
        assert view.query_positions is not None
        sums = view.attention_of_window()  # (B, H, S)
        asked = view.query_positions[:, None, None, :]  # (B, 1, 1, w), -1 where there was no query yet
        seen = (view.positions[..., None] <= asked).sum(-1)  # (B, Hkv, S)
        return sums / seen.clamp(min=1).repeat_interleave(sums.shape[1] // view.kv_heads, 1)

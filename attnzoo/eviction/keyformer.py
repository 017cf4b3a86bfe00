"""Keyformer: H2O with Gumbel noise on the logits, so that what is gone by now does not decide what is kept.

Paper: Adnan et al., Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference,
https://arxiv.org/abs/2403.09054

    s_j = sum over all queries i since j came of softmax_j((q_i k_j + g_ij) / t_i),   g_ij from a standard Gumbel
    normalize: s_j / number of those queries
    t_i = from 1 to 2 in equal steps, and 2 from then on

The noise is a hash of seed, layer, query head and the positions of query and key, so that it is the same in any batch
and however a text is cut into calls. It goes into the logits, so the weights are computed once more and unfused,
whatever the core; `flash_scored`, whose sums are those of plain attention, saves nothing here.

Differs from the paper: its temperature rises with the steps of decoding, from 1 in the prompt to 2 at the last token to
be generated, whose number it knows; a cache does not know where a prompt ends and a text will, so here it rises over
the first `steps` tokens of the text. Evicts after each block of `block_size` tokens, in the prompt too (the authors'
code once after the prompt and then at each step). Recent entries have half the budget by default, as in `h2o`, which
loses less than the 30% of the authors' code. Query heads that share a key/value head are averaged. As in `h2o`, the
default divides by the number of queries that have seen an entry; ``normalize=False`` is the paper's form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_int, check_number
from attnzoo.eviction.h2o import H2O
from attnzoo.eviction.noise import gumbel
from attnzoo.eviction.policy import CacheView
from attnzoo.eviction.weights import attention_logits, visible_softmax

AS_PUBLISHED = {"normalize": False, "schedule": "prompt", "block_size": 1}


@dataclass(frozen=True, kw_only=True)
class Keyformer(H2O):
    """Accumulated attention with noise.

    Parameters
    ----------
    temperature
        That of the last step, at least 1; that of the first is 1.
    steps
        Tokens over which the temperature rises.
    seed
        Another seed is other noise.
    """

    temperature: float = 2.0
    steps: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, minimum=1)
        check_int("steps", self.steps, minimum=1)
        check_int("seed", self.seed, minimum=0)

    @property
    def own_weights(self) -> bool:
        """Those with noise."""
        return True

    def weights(self, view: CacheView) -> Tensor:
        """Softmax of the noisy logits."""
        assert view.queries is not None
        assert view.query_positions is not None
        logits = attention_logits(view.queries, view.keys, view.scale, view.softcap)  # (B, H, w, S)
        asked = view.query_positions[:, None, :, None]
        risen = (asked.clamp(min=0) / self.steps).clamp(max=1).to(logits)
        noisy = (logits + self.noise(view).to(logits)) / (1 + (self.temperature - 1) * risen)
        return visible_softmax(noisy, view.visible())

    def noise(self, view: CacheView) -> Tensor:
        """Noise of each query head, query and entry, ``(B, H, w, S)``, float64."""
        assert view.queries is not None
        assert view.query_positions is not None
        group = view.queries.shape[1] // view.kv_heads
        heads = torch.arange(view.queries.shape[1], device=view.queries.device)[:, None, None] + view.first_head * group
        entries = view.positions.repeat_interleave(group, 1)[:, :, None]
        asked = view.query_positions[:, None, :, None]
        return gumbel(self.seed, torch.tensor(view.layer, device=heads.device), heads, asked, entries)

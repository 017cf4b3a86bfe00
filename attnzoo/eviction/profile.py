"""The profile of a model: how much the attention output of each layer loses when only a share of its entries is kept.

    python -m attnzoo.eviction.profile MODEL TEXT --out FILE

MODEL is a folder, a name on the Hugging Face hub, or an asset such as smollm2_135m_instruct; TEXT a file, or a name
such as debian_handbook. The model reads the first `--tokens` tokens of the text once, and FILE, a small JSON file,
serves every swap of that model: ``replace_attention(llm, "h2o", budget=512, budgets="measured", profile=FILE)``.

Sources: Gulhan et al., BaKlaVa, https://arxiv.org/abs/2502.13176, and XKV: memory by layer, from one profiling pass.

    e_l(share) = min(1, |o' - o|^2 / |o|^2)

where o are the outputs of the last `queries` queries of layer l, all heads together, and o' the same over the `share`
of the entries of each key/value head that got most attention from these queries. A total is shared out by water filling
on these curves, made convex: the next entry goes where it lowers the sum of errors most.

Differs from the papers: BaKlaVa compares the inputs and outputs of the heads, XKV searches for the least accuracy that
is lost; here the loss of the output is measured itself, at the choice of an oracle, so that one profile serves all
policies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.checks import check_int
from attnzoo.command import run_script
from attnzoo.errors import OptionError
from attnzoo.eviction.layer_profile import LayerCurve, Profile
from attnzoo.eviction.policy import by_group, highest, wide
from attnzoo.eviction.reading import cache_after, last_queries_kept, model_and_tokens, parser, text_hash
from attnzoo.eviction.store import Store

SHARES = (0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
QUERIES = 64
TOKENS = 2048


def profile_layers(model: Any, ids: Sequence[int] | Tensor, *, queries: int = QUERIES) -> Profile:
    """Measure, in one pass over a text, what each layer's attention output loses when entries go.

    Parameters
    ----------
    model
        A causal language model of transformers with its own attention.
    ids
        ``(N,)``: the tokens of the text; as many as the texts that the profile is for.
    queries
        Number of last queries whose outputs are compared.

    Raises
    ------
    UnsupportedError
        If the model is swapped, or no policy can bound its layers.
    OptionError
        If the text has no more tokens than `queries`.
    """
    check_int("queries", queries, minimum=1)
    tokens = torch.as_tensor(ids).flatten()
    if len(tokens) <= queries:
        raise OptionError(f"a profile needs more than {queries} tokens (queries), the text has {len(tokens)}")
    with last_queries_kept(model, queries, len(tokens), "a profile is") as told:
        curves = tuple(_curve(layer.store) for layer in cache_after(model, tokens).own)
    return Profile(told[0].model.name, told[0].model.digest, len(tokens), text_hash(tokens), SHARES, curves)


@torch.no_grad()
def _curve(store: Store) -> LayerCurve:
    """Errors of a layer that holds all entries of one row, and the last queries."""
    view = store.view([0])
    values = wide(view.values)  # (1, Hkv, S, Dv)
    attention = by_group(view.window_attention(), view.kv_heads).to(values)  # (1, Hkv, G, w, S)
    mass = attention.sum((2, 3))  # (1, Hkv, S)
    whole = attention @ values[:, :, None]
    errors = []
    for share in SHARES:
        kept = highest(mass, max(1, int(share * mass.shape[-1])))
        left = attention.gather(-1, kept[:, :, None, None].expand(*attention.shape[:-1], -1))
        left = left / left.sum(-1, keepdim=True).clamp_min(1e-30)
        there = values.gather(2, kept[..., None].expand(-1, -1, -1, values.shape[-1]))
        error = (left @ there[:, :, None] - whole).square().sum() / whole.square().sum().clamp_min(1e-30)
        errors.append(round(min(float(error), 1.0), 6))
    return LayerCurve(store.layer, view.kv_heads, tuple(errors))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    about = (__doc__ or "").split("\n\n")[0]
    parsed = parser("python -m attnzoo.eviction.profile", about, "where the profile goes (JSON)", TOKENS).parse_args(
        arguments
    )

    def body() -> int:
        profile = replace(profile_layers(*model_and_tokens(parsed)), model=parsed.model)
        profile.save(parsed.out)
        print(f"{parsed.out}: {len(profile.layers)} layers of {profile.model}, measured on {profile.tokens:,} tokens")
        return 0

    return run_script(body, resume="run it again")


if __name__ == "__main__":
    sys.exit(main())

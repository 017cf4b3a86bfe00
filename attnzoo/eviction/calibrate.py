"""The direction along which the queries of each head lie, for the policy `qfilters`.

    python -m attnzoo.eviction.calibrate MODEL TEXT --out FILE

MODEL is a folder, a name on the Hugging Face hub, or an asset such as smollm2_135m_instruct; TEXT a file, or a name
such as debian_handbook, as `attnzoo.tasks.decode.text.load_text` takes it. The model reads the first `--tokens` tokens
of the text, `--window` at a time, and FILE serves every swap of that model: ``replace_attention(llm, "qfilters",
budget=512, filters=FILE)``.
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
from attnzoo.eviction.directions import Directions
from attnzoo.eviction.reading import cache_after, last_queries_kept, model_and_tokens, parser, text_hash

TOKENS = 16_384
WINDOW = 2048


def calibrate(model: Any, ids: Sequence[int] | Tensor, *, window: int = WINDOW) -> Directions:
    """Find the direction along which the queries of each head lie, from a text.

    Queries are those that attention is given, after rotary embedding. Of each query head it is the top right singular
    vector of its queries, with the sign that makes their mean projection positive; heads that share a key/value head
    are averaged.

    Parameters
    ----------
    model
        A causal language model of transformers with its own attention. It is as before when this returns.
    ids
        ``(N,)``: the tokens of a text like those that the model will read.
    window
        Tokens that the model reads at a time.

    Raises
    ------
    UnsupportedError
        If the model is swapped, or no policy can bound its layers.
    OptionError
        If there are fewer than two tokens.
    """
    check_int("window", window, minimum=2)
    tokens = torch.as_tensor(ids).flatten()
    if len(tokens) < 2:
        raise OptionError(f"directions are made from two tokens of text at least, not {len(tokens)}")
    window = min(window, len(tokens))
    with last_queries_kept(model, window, window, "directions are") as told:
        layers = {data.index: data for data in told}
        squares: dict[int, Tensor] = {}
        sums: dict[int, Tensor] = {}
        for part in tokens.split(window):
            cache = cache_after(model, part)
            for index in layers:
                queries = cache.layers[index].store.state()["queries"][0, :, -len(part) :].cpu().double()  # (H, N, D)
                squares[index] = squares.get(index, 0) + queries.mT @ queries
                sums[index] = sums.get(index, 0) + queries.sum(1)
    found = {index: _directions(squares[index], sums[index], data.kv_heads) for index, data in layers.items()}
    return Directions(found, next(iter(layers.values())).model, len(tokens), text_hash(tokens))


def _directions(squares: Tensor, sums: Tensor, kv_heads: int) -> Tensor:
    """From the sums of q q^T ``(H, D, D)`` and of q ``(H, D)``: the directions ``(Hkv, D)``."""
    top = torch.linalg.eigh(squares).eigenvectors[..., -1]  # (H, D)
    sign = torch.where((top * sums).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (sign * top).unflatten(0, (kv_heads, -1)).mean(1).float()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    about = (__doc__ or "").split("\n\n")[0]
    asked = parser("python -m attnzoo.eviction.calibrate", about, "where the directions go (safetensors)", TOKENS)
    asked.add_argument("--window", type=int, default=WINDOW, help=f"so many at a time ({WINDOW})")
    parsed = asked.parse_args(arguments)

    def body() -> int:
        directions = calibrate(*model_and_tokens(parsed), window=parsed.window)
        directions = replace(directions, model=replace(directions.model, name=parsed.model))
        directions.save(parsed.out)
        print(f"{parsed.out}: {len(directions.layers)} layers of {directions.model.name}, {directions.tokens:,} tokens")
        return 0

    return run_script(body, resume="run it again")


if __name__ == "__main__":
    sys.exit(main())

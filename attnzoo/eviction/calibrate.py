"""The direction along which the queries of each head lie, for the policy `qfilters`.

    python -m attnzoo.eviction.calibrate MODEL TEXT --out FILE

MODEL is a folder, a name on the Hugging Face hub, or an asset such as smollm2_135m_instruct; TEXT a file, or a name
such as debian_handbook, as `attnzoo.tasks.decode.text.load_text` takes it. The model reads the first `--tokens` tokens
of the text, `--window` at a time, and FILE serves every swap of that model: ``replace_attention(llm, "qfilters",
budget=512, filters=FILE)``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.checks import check_int
from attnzoo.command import run_script
from attnzoo.errors import ConfigError, OptionError, UnsupportedError
from attnzoo.eviction.directions import Directions
from attnzoo.eviction.layer_data import LayerData

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
    from attnzoo.hosts import versions
    from attnzoo.swap import replace_attention, restore_attention, swapped_layers

    check_int("window", window, minimum=2)
    tokens = torch.as_tensor(ids).flatten()
    if len(tokens) < 2:
        raise OptionError(f"directions are made from two tokens of text at least, not {len(tokens)}")
    if swapped_layers(model):
        raise UnsupportedError("directions are made from the model's own attention: call restore_attention first")
    window, modes = min(window, len(tokens)), {module: module.training for module in model.modules()}
    core = "softmax" if any(getattr(m, "attn_logit_softcapping", None) for m in model.modules()) else "sdpa"
    # a policy that keeps all queries of a window, with room for all entries, so that nothing is evicted
    replace_attention(model, "snapkv", window=window, core=core, budget=window, block_size=window)
    try:
        model.eval()
        told: list[LayerData] = [vars(layer)["attnzoo_layer"] for layer in swapped_layers(model).values()]
        layers = {data.index: data for data in told}
        squares: dict[int, Tensor] = {}
        sums: dict[int, Tensor] = {}
        last = {"logits_to_keep": 1} if "logits_to_keep" in versions.parameters(type(model).forward) else {}
        device = next(model.parameters()).device
        for part in tokens.split(window):
            with torch.no_grad():
                cache = versions.output_cache(model(input_ids=part[None].to(device), use_cache=True, **last))
            for index in layers:
                queries = cache.layers[index].store.state()["queries"][0, :, -len(part) :].cpu().double()  # (H, N, D)
                squares[index] = squares.get(index, 0) + queries.mT @ queries
                sums[index] = sums.get(index, 0) + queries.sum(1)
    finally:
        restore_attention(model)
        for module, mode in modes.items():
            module.training = mode
    found = {index: _directions(squares[index], sums[index], data.kv_heads) for index, data in layers.items()}
    said = hashlib.sha256(" ".join(map(str, tokens.tolist())).encode()).hexdigest()
    return Directions(found, next(iter(layers.values())).model, len(tokens), said)


def _directions(squares: Tensor, sums: Tensor, kv_heads: int) -> Tensor:
    """From the sums of q q^T ``(H, D, D)`` and of q ``(H, D)``: the directions ``(Hkv, D)``."""
    top = torch.linalg.eigh(squares).eigenvectors[..., -1]  # (H, D)
    sign = torch.where((top * sums).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (sign * top).unflatten(0, (kv_heads, -1)).mean(1).float()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    parser = argparse.ArgumentParser(
        prog="python -m attnzoo.eviction.calibrate", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a name on the Hugging Face hub, or an asset")
    parser.add_argument("text", metavar="TEXT", help="a file or a text's name, like what the model will read")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where the directions go (safetensors)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"read so many of the text at most ({TOKENS})")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"so many at a time ({WINDOW})")
    parsed = parser.parse_args(arguments)

    def body() -> int:
        from attnzoo.tasks.decode.text import load_text

        check_int("tokens", parsed.tokens, minimum=2)
        text = load_text(parsed.text).text
        model, tokenizer = _loaded(parsed.model)
        ids = tokenizer(text)["input_ids"][: parsed.tokens]
        directions = calibrate(model, ids, window=parsed.window)
        directions.save(parsed.out)
        print(f"{parsed.out}: {len(directions.layers)} layers of {directions.model.name}, {directions.tokens:,} tokens")
        return 0

    return run_script(body, resume="run it again")


def _loaded(name: str) -> tuple[Any, Any]:
    """The model, with its weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attnzoo.tasks.decode.lm import model_folder

    place = str(model_folder(name) or name)
    try:
        return AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {name!r}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())

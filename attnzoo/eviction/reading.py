"""What `calibrate` and `profile` share: a model reads a text, and what its cache then holds is looked at."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo import files
from attnzoo.assets import model_folder
from attnzoo.checks import check_int
from attnzoo.errors import ConfigError, UnsupportedError
from attnzoo.eviction.layer_data import LayerData


@contextlib.contextmanager
def last_queries_kept(model: Any, queries: int, tokens: int, what: str) -> Iterator[list[LayerData]]:
    """Have the caches of `model` keep the last queries that it made and all entries.

    Parameters
    ----------
    model
        A causal language model of transformers with its own attention. It is as before when the block ends.
    queries
        Number of last queries.
    tokens
        The most that are read into a cache.
    what
        What is made, for messages: "a profile is".

    Yields
    ------
    list of LayerData
        What is known of the layers that a policy can bound.

    Raises
    ------
    UnsupportedError
        If the model is swapped, or no policy can bound its layers.
    """
    from attnzoo.swap import replace_attention, restore_attention, swapped_layers

    if swapped_layers(model):
        raise UnsupportedError(f"{what} made from the model's own attention: call restore_attention first")
    modes = {module: module.training for module in model.modules()}
    core = "softmax" if any(getattr(m, "attn_logit_softcapping", None) for m in model.modules()) else "sdpa"
    replace_attention(model, "snapkv", window=queries, core=core, budget=tokens, block_size=tokens)
    try:
        model.eval()
        yield [vars(layer)["attnzoo_layer"] for layer in swapped_layers(model).values()]
    finally:
        restore_attention(model)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def cache_after(model: Any, tokens: Tensor) -> Any:
    """The cache of `model` after it has read tokens ``(N,)``."""
    from attnzoo.hosts import versions

    last = {"logits_to_keep": 1} if "logits_to_keep" in versions.parameters(type(model).forward) else {}
    ids = tokens[None].to(next(model.parameters()).device)
    return versions.output_cache(model(input_ids=ids, use_cache=True, **last))


def text_hash(tokens: Tensor) -> str:
    """SHA-256 of token ids ``(N,)``."""
    return hashlib.sha256(" ".join(map(str, tokens.tolist())).encode()).hexdigest()


def parser(command: str, about: str, out: str, tokens: int) -> argparse.ArgumentParser:
    """The command line of what makes a file from a model and a text.

    Parameters
    ----------
    command
        How it is called.
    about
        What it does.
    out
        What the file is.
    tokens
        How many of the text are read by default.
    """
    made = argparse.ArgumentParser(prog=command, description=about)
    made.add_argument("model", metavar="MODEL", help="a folder, a name on the Hugging Face hub, or an asset")
    made.add_argument("text", metavar="TEXT", help="a file or a text's name, like what the model will read")
    made.add_argument("--out", metavar="FILE", type=Path, required=True, help=out)
    made.add_argument("--tokens", type=int, default=tokens, help=f"read so many of the text at most ({tokens})")
    return made


def model_and_tokens(parsed: argparse.Namespace) -> tuple[Any, Sequence[int]]:
    """The model that a command line names, with its weights, and the tokens of the text.

    Raises
    ------
    AssetError, ConfigError, OptionError
        If the text cannot be read, the model not be loaded, or the file not be written.
    """
    check_int("tokens", parsed.tokens, minimum=2)
    files.check_folder(parsed.out.parent, "--out")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attnzoo.tasks.decode.text import load_text

    text = load_text(parsed.text).text
    place = str(model_folder(parsed.model) or parsed.model)
    try:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {parsed.model!r}: {error}") from error
    model.config._name_or_path = parsed.model  # what the file calls it: not where an asset lies on this machine
    return model.eval(), tokenizer(text)["input_ids"][: parsed.tokens]

"""A language model through its own cache, bounded or not: negative log-likelihood of a text, and answers to prompts.

Nothing here knows of policies. What is measured is the model as it is given: swapped by `attnzoo.replace_attention`,
its cache evicts while the prompt is read; else its cache holds everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo import assets
from attnzoo.errors import ConfigError
from attnzoo.eviction.size import CacheBytes, kv_bytes
from attnzoo.extras import require
from attnzoo.hosts.versions import cache_arguments, output_cache
from attnzoo.tasks.decode.needles import Sample, found

CHUNK = 256  # positions whose float32 log-probabilities are held at a time
ROOM_FOR_WORDS = 12  # tokens that an answer may have besides the numbers asked for
CONVERTED = "_safetensors"  # ends the name of an asset that is another one in a form that loads fast


@dataclass(frozen=True)
class Scored:
    """What a text costs the model.

    Attributes
    ----------
    nll
        Of each token but the first, given all before it that the cache still holds, in nats.
    cache
        Bytes of the cache after the last token.
    """

    nll: tuple[float, ...]
    cache: CacheBytes


@dataclass(frozen=True)
class Answer:
    """What the model said to a prompt: `hits` says of each number asked for whether it is there."""

    text: str
    hits: tuple[bool, ...]
    cache: CacheBytes


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model; `name` and errors as in `load_model`."""
    return _from_pretrained("AutoTokenizer", name, "load the tokenizer of")


def longest(name: str) -> int | None:
    """Tokens that a model is made for, as its config says, or None; `name` and errors as in `load_model`."""
    return getattr(_from_pretrained("AutoConfig", name, "read the config of"), "max_position_embeddings", None)


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> Any:
    """Load a causal language model, ready to be evaluated.

    Parameters
    ----------
    name
        An asset of attnzoo, such as ``smollm2_135m_instruct``; a folder; or a name on the Hugging Face hub.
    dtype, device
        Of the weights.
    attention
        Which of transformers' own attentions the dense model uses.

    Raises
    ------
    MissingExtraError
        If transformers is not installed.
    AssetError
        If the asset cannot be fetched.
    ConfigError
        If transformers finds no such model, or cannot load it.
    """
    settings = {"dtype": dtype, "attn_implementation": attention}
    return _from_pretrained("AutoModelForCausalLM", name, "load the model", **settings).to(device).eval()


def _from_pretrained(kind: str, name: str, doing: str, **settings: Any) -> Any:
    require("transformers", extra="llm")
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(str(model_folder(name) or name), **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot {doing} {name!r}: {error}") from error


def model_folder(name: str) -> Path | None:
    """Give the folder of a model that is an asset, which is fetched first where need be; None for all other names."""
    known = {asset.name for asset in assets.list_assets()}
    if name + CONVERTED in known:
        return assets.get(name + CONVERTED)
    return assets.get(name) if name in known else None


@torch.inference_mode()
def nll(model: Any, ids: Sequence[int] | Tensor) -> Scored:
    """Score a text of T tokens in one call of the model, so that an evicting cache works as it does in a prefill.

    All logits come out of that one call, ``T x vocabulary`` in the model's own dtype (2,000 tokens of a vocabulary of
    49,152 in float32: 390 MB): a head applied to hidden states chunk by chunk would need less, but would leave out what
    some models do to their logits. Log-probabilities are computed in float32, `CHUNK` positions at a time.

    Parameters
    ----------
    model
        A causal language model of transformers.
    ids
        ``(T,)``, 2 tokens or more.
    """
    row = torch.as_tensor(ids, device=model.device).reshape(1, -1)
    out = model(row, use_cache=True)
    cache = kv_bytes(output_cache(out))
    losses = [
        F.cross_entropy(logits.float(), targets, reduction="none")
        for logits, targets in zip(out.logits[0, :-1].split(CHUNK), row[0, 1:].split(CHUNK), strict=True)
    ]
    return Scored(tuple(torch.cat(losses).tolist()), cache)


@torch.inference_mode()
def retrieve(model: Any, tokenizer: Any, sample: Sample) -> Answer:
    """Let the model answer a prompt greedily.

    It stops at an end token, at the end of a line, when all numbers have been said, or after as many tokens as the
    numbers need and `ROOM_FOR_WORDS` more. `Answer.cache` is the largest cache of all steps.
    """
    ends = _end_tokens(model, tokenizer)
    words = " ".join(f"{value}," for value in sample.answers)
    limit = len(tokenizer(words, add_special_tokens=False).input_ids) + ROOM_FOR_WORDS
    row = torch.as_tensor(sample.ids, device=model.device).reshape(1, -1)
    out = model(row, use_cache=True, logits_to_keep=1)
    cache = kv_bytes(output_cache(out))
    said: list[int] = []
    text = ""
    while True:
        token = int(out.logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
        text = tokenizer.decode(said)
        complete = not text[-1:].isdigit() and all(found(sample, text))  # more digits could follow a digit
        if complete or len(said) >= limit or "\n" in text.lstrip():
            break
        step = torch.tensor([[token]], device=model.device)
        out = model(step, **cache_arguments(model, output_cache(out)), use_cache=True)
        cache = largest(cache, kv_bytes(output_cache(out)))
    return Answer(text, found(sample, text), cache)


def largest(a: CacheBytes, b: CacheBytes) -> CacheBytes:
    """The larger of each figure."""
    return CacheBytes(max(a.entries, b.entries), max(a.held, b.held), max(a.allocated, b.allocated))


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = {tokenizer.eos_token_id}
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    ends |= set(more if isinstance(more, (list, tuple)) else [more])
    return ends - {None}

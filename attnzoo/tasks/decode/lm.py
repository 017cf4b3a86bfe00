"""A language model through its own cache, bounded or not: negative log-likelihood of a text, and answers to prompts.

Nothing here knows of policies. What is measured is the model as it is given: swapped by `attnzoo.replace_attention`,
its cache evicts while the prompt is read; else its cache holds everything.
"""

from __future__ import annotations

import copy
import functools
import math
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

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")  # files of a folder that hold them, or say which do
CHUNK = 256  # positions whose float32 log-probabilities are held at a time
ROOM_FOR_WORDS = 12  # tokens that an answer may have besides the numbers asked for


@dataclass(frozen=True)
class Scored:
    """What a text costs the model, and the bytes of its `cache` after the last token.

    `nll` is of each token but the first, given all before it that the cache still holds, in nats; `kl`, where it was
    asked for, the divergence of the dense model's distribution of each of these tokens from this model's, in nats.
    """

    nll: tuple[float, ...]
    cache: CacheBytes
    kl: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said to a prompt: its `text`, a line for each question, and `hits`, which answers are in it.

    `cache` is the largest of all steps, `held` the share of the needles' tokens whose entries the cache held when the
    prompt had been read, the mean over layers and key/value heads; None where nothing is ever evicted, or the prompt
    does not say which they are.
    """

    text: str
    hits: tuple[bool, ...]
    cache: CacheBytes
    held: float | None = None


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model; `name` and errors as in `load_model`."""
    return _from_pretrained("AutoTokenizer", name, "load the tokenizer of")


def longest(name: str) -> int | None:
    """Tokens that a model is made for, as its config says, or None; `name` and errors as in `load_model`."""
    return getattr(_from_pretrained("AutoConfig", name, "read the config of"), "max_position_embeddings", None)


def vocabulary(name: str) -> int:
    """How many tokens a model knows; `name` and errors as in `load_model`."""
    return int(_from_pretrained("AutoConfig", name, "read the config of").vocab_size)


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> Any:
    """Load a causal language model, ready to be evaluated; with random weights, if its folder holds none.

    `name` is an asset of attnzoo, such as ``smollm2_135m_instruct``, a folder, or a name on the Hugging Face hub;
    `attention` says which of transformers' own the dense model uses.

    Raises `MissingExtraError` without transformers, `AssetError` if the asset cannot be fetched, and `ConfigError` if
    transformers finds no such model, or cannot load it.
    """
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    folder = Path(name)
    if folder.is_dir() and not any(path for kind in WEIGHTS for path in folder.glob(kind)):
        torch.manual_seed(0)
        config = _from_pretrained("AutoConfig", name, "read the config of")
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, **settings).to(device).eval()
    return _from_pretrained("AutoModelForCausalLM", name, "load the model", **settings).to(device).eval()


def _from_pretrained(kind: str, name: str, doing: str, **settings: Any) -> Any:
    require("transformers", extra="llm")
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(str(assets.model_folder(name) or name), **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot {doing} {name!r}: {error}") from error


@torch.inference_mode()
def nll(
    model: Any, ids: Sequence[int] | Tensor, scored: int | None = None, step: int | None = None, dense: Any = None
) -> Scored:
    """Score a text of T tokens ``(T,)``, 2 or more, through the cache of a causal language model of transformers.

    All logits are kept until they are scored, ``T x vocabulary`` in the model's own dtype (2,000 tokens of a vocabulary
    of 49,152 in float32: 390 MB; as much again with `dense`): a head applied to hidden states chunk by chunk would need
    less, but would leave out what some models do to their logits. Log-probabilities are computed in float32, `CHUNK`
    positions at a time.

    With `scored` the last so many tokens alone are scored, after a call that reads those before as a prompt; else all
    but the first, in one call, so that an evicting cache works as it does in a prefill. After the prompt each call
    takes `step` tokens, by default all: with 1 the model decodes, each token given as the text has it (teacher
    forcing), so that a cache works as it does when text is generated. `dense`, the same model with a cache that holds
    everything, is compared with, which costs a pass of it and its logits.
    """
    row = torch.as_tensor(ids, device=model.device).reshape(1, -1)
    logits, cache = _logits(model, row, scored, step)
    theirs = None if dense is None else _logits(dense, row, scored, None)[0].split(CHUNK)
    losses, apart = [], []
    targets = row[0, -len(logits) :].split(CHUNK)
    for index, some in enumerate(logits.split(CHUNK)):
        own = some.float().log_softmax(-1)
        losses.append(F.nll_loss(own, targets[index], reduction="none"))
        if theirs is not None:
            wanted = theirs[index].float().log_softmax(-1)
            kl = torch.where(wanted > -math.inf, wanted.exp() * (wanted - own), 0.0).sum(-1)  # some tokens are masked
            apart.append(kl.clamp(min=0))  # which only rounding is below
    return Scored(tuple(torch.cat(losses).tolist()), cache, tuple(torch.cat(apart).tolist()) if apart else ())


def _logits(model: Any, row: Tensor, scored: int | None, step: int | None) -> tuple[Tensor, CacheBytes]:
    """Logits of the tokens to score, ``(n, vocabulary)``, and the bytes of the cache after the last."""
    if scored is None:
        out = model(row, use_cache=True)
        return out.logits[0, :-1], kv_bytes(output_cache(out))
    out = model(row[:, :-scored], use_cache=True, logits_to_keep=1)
    found = [out.logits[0, -1:]]
    _end_prompt(output_cache(out))
    for tokens in row[:, -scored:].split(step or scored, 1):
        out = model(tokens, **cache_arguments(model, output_cache(out)), use_cache=True)
        found.append(out.logits[0])
    return torch.cat(found)[:-1], kv_bytes(output_cache(out))


def _end_prompt(cache: Any) -> None:
    """Evict what a bounded cache puts off until the end of the prompt."""
    getattr(cache, "end_prompt", lambda: None)()


@torch.inference_mode()
def retrieve(model: Any, tokenizer: Any, sample: Sample) -> Answer:
    """Let the model answer a prompt greedily.

    It stops at an end token, at the end of a line, when all that is asked for has been said, or after as many tokens as
    that needs and `ROOM_FOR_WORDS` more. Of several questions, the text before them is read once and its cache evicted
    where that is put off to the end of a prompt; each is then asked on a copy.
    """
    ids = torch.as_tensor(sample.ids, device=model.device)[None]
    prompt = ids[:, : sample.question_at] if sample.others else ids
    out = model(prompt, use_cache=True, logits_to_keep=1)
    cache = output_cache(out)
    size = kv_bytes(cache)
    _end_prompt(cache)
    held = _held(cache, sample.needles_at)
    if not sample.others:
        text, hits, largest_step = _answer(model, tokenizer, out, sample.answers)
        return Answer(text, hits, largest(size, largest_step), held)
    said: list[tuple[str, tuple[bool, ...], CacheBytes]] = []
    tails = [ids[:, sample.question_at :], *(torch.as_tensor(x, device=model.device)[None] for x in sample.others)]
    for tail, answer in zip(tails, sample.answers, strict=True):
        own = getattr(cache, "copy", functools.partial(copy.deepcopy, cache))()
        out = model(tail, **cache_arguments(model, own), use_cache=True, logits_to_keep=1)
        said.append(_answer(model, tokenizer, out, (answer,)))
    texts, found_each, sizes = zip(*said, strict=True)
    hits = tuple(hit for one in found_each for hit in one)
    return Answer("\n".join(texts), hits, functools.reduce(largest, sizes, size), held)


def _answer(model: Any, tokenizer: Any, out: Any, answers: Sequence[str]) -> tuple[str, tuple[bool, ...], CacheBytes]:
    """Go on greedily from an output: what was said, what of it was asked for, and the largest cache."""
    ends = _end_tokens(model, tokenizer)
    words = " ".join(f"{value}," for value in answers)
    limit = len(tokenizer(words, add_special_tokens=False).input_ids) + ROOM_FOR_WORDS
    cache = kv_bytes(output_cache(out))
    said: list[int] = []
    text = ""
    while True:
        token = int(out.logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
        text = tokenizer.decode(said)
        complete = not text[-1:].isalnum() and all(found(answers, text))  # a number or word could go on
        if complete or len(said) >= limit or "\n" in text.lstrip():
            break
        step = torch.tensor([[token]], device=model.device)
        out = model(step, **cache_arguments(model, output_cache(out)), use_cache=True)
        cache = largest(cache, kv_bytes(output_cache(out)))
    return text, found(answers, text), cache


def _held(cache: Any, tokens: Sequence[int]) -> float | None:
    """Share of some tokens whose entries a cache still holds; see `Answer`."""
    layers = [
        positions for layer in getattr(cache, "own", ()) if (positions := getattr(layer, "positions", None)) is not None
    ]
    if not layers or not tokens:
        return None
    shares = []
    for positions in layers:
        wanted = torch.as_tensor(tokens, device=positions.device)
        held = (positions[0, :, :, None] == wanted).any(1)  # (Hkv, held, tokens) -> (Hkv, tokens)
        shares.append(float(held.float().mean()))
    return math.fsum(shares) / len(shares)


def largest(a: CacheBytes, b: CacheBytes) -> CacheBytes:
    """The larger of each figure."""
    return CacheBytes(max(a.entries, b.entries), max(a.held, b.held), max(a.allocated, b.allocated))


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = {tokenizer.eos_token_id}
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    ends |= set(more if isinstance(more, (list, tuple)) else [more])
    return ends - {None}

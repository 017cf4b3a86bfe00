"""Small random language models for the tests of eviction, and how to call them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import attnzoo
from attnzoo.eviction.directions import Directions
from attnzoo.hosts.layer_data import identity_of
from attnzoo.hosts.versions import facts
from attnzoo.hosts.versions import output_cache as cache_of
from attnzoo.registry import build_policy, describe

CACHE = facts().cache_argument  # what this release of transformers calls the cache of a call
POLICIES = attnzoo.list_attentions("eviction")
BY_COORDINATE = {"lagkv", "lsh", "qfilters"}  # look at single coordinates of keys, which a shift of all positions turns
VOCABULARY = 53
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 12}),
    "phi3": (transformers.Phi3Config, {"num_key_value_heads": 2}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1, "head_dim": 16}),
    "olmo": (transformers.OlmoConfig, {"num_key_value_heads": 4}),
    "gpt-neox": (transformers.GPTNeoXConfig, {}),
}


def language_model(name: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A model with its own attention, in evaluation mode."""
    config, own = CONFIGS[name]
    made = config(**{**TEXT, **own, **options})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").eval()
    with torch.no_grad():  # the initialization is too small for attention to tell tokens apart
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # kept, and so not deleted, for as long as the process lives


def directions_of(host: str = "llama", **options: Any) -> str:
    """A file of random directions for the models that `language_model` gives."""
    config = CONFIGS[host][0](**{**TEXT, **CONFIGS[host][1], **options})
    heads, identity = config.num_attention_heads, identity_of(config)
    path = Path(_folder().name) / identity.digest
    if not path.exists():
        kv_heads = getattr(config, "num_key_value_heads", heads)
        shape = kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
        generator = torch.Generator().manual_seed(0)
        layers = {index: torch.randn(shape, generator=generator) for index in range(config.num_hidden_layers)}
        Directions(layers, identity, 1, "").save(path)
    return str(path)


def needed(name: str, host: str = "llama", **options: Any) -> dict[str, Any]:
    """The options without which a policy cannot be swapped into a model that `language_model` gives."""
    return {"filters": directions_of(host, **options)} if name == "qfilters" else {}


def is_adaptive(name: str, **options: Any) -> bool:
    """Whether heads can share a budget by the scores of a policy."""
    return not build_policy(describe(name), {"budget": 1, **needed(name), **options}).not_adaptive()


def bounded(name: str, host: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A model swapped for the policy `name`."""
    return attnzoo.replace_attention(language_model(host, dtype, seed), name, **{**needed(name, host), **options})


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def feed(model: nn.Module, ids: Tensor, cuts: list[list[int]], padding: list[list[int]]) -> tuple[Tensor, Any, int]:
    """Feed every row of `ids` in calls: call c takes ``cuts[c][b]`` tokens of row b behind some padding.

    Gives the logits of the real tokens ``(B, N, vocabulary)``, the cache, and the most entries that were held.
    """
    rows, length = ids.shape
    done, masks = [0] * rows, []
    cache, most = None, 0
    logits: list[list[Tensor]] = [[] for _ in range(rows)]
    for cut, pad in zip(cuts, padding, strict=True):
        width = max(n + p for n, p in zip(cut, pad, strict=True))
        new = torch.zeros(rows, width, dtype=torch.long)
        mask, positions = torch.zeros_like(new), torch.ones_like(new)
        for row, n in enumerate(cut):
            here = slice(width - n, width)
            new[row, here] = ids[row, done[row] : done[row] + n]
            mask[row, here] = 1
            positions[row, here] = torch.arange(done[row], done[row] + n)
        masks.append(mask)
        out = model(new, attention_mask=torch.cat(masks, 1), position_ids=positions, **{CACHE: cache})
        cache = cache_of(out)
        most = max(most, *(0 if layer.keys is None else layer.keys.shape[2] for layer in cache.layers))
        for row, n in enumerate(cut):
            logits[row].append(out.logits[row, width - n :])
        done = [d + n for d, n in zip(done, cut, strict=True)]
    assert done == [length] * rows
    return torch.stack([torch.cat(parts) for parts in logits]), cache, most


ADAPTIVE = [name for name in POLICIES if is_adaptive(name)]

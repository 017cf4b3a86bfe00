"""What a layer of transformers is, for policies that ask: see `attnzoo.eviction.layer_data`.

Where a layer puts its rotary embedding and its output projection is not read from its code, which differs by family.
A twin with one head, of the layer's own class, is built on the CPU from a copy of its config and called with a few
positions: what it hands to the attention interface, and which child takes what comes back, is seen.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from attnzoo.eviction.layer_data import LayerData, ModelIdentity, Rotary
from attnzoo.hosts import versions

PROBE = "attnzoo_layer_probe"  # in transformers' attention interface
_SEEN = "attnzoo_seen"  # where a twin keeps what it handed over and got back
SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "rope_parameters",
)
"""Fields of a config that make two models one to the eye of a policy."""


@dataclass(frozen=True)
class Probed:
    """What a twin of a layer told; None where it did not.

    Attributes
    ----------
    output, rotary
        As in `LayerData`.
    """

    output: str | None = None
    rotary: Rotary | None = None


def identity_of(config: Any) -> ModelIdentity:
    """Which model a config describes."""
    told = {name: getattr(config, name, None) for name in SHAPE}
    text = json.dumps({name: value for name, value in told.items() if value is not None}, sort_keys=True, default=str)
    name = getattr(config, "_name_or_path", "") or config.model_type
    return ModelIdentity(name, hashlib.sha256(text.encode()).hexdigest())


def layer_data(module: Any, config: Any, probed: Probed) -> LayerData:
    """Facts about an attention layer of a model of `config`."""
    heads, width = _heads(config), _width(module, config)
    kv_heads = heads // (getattr(module, "num_key_value_groups", 1) or 1)
    index, model = module.layer_idx, identity_of(config)
    return LayerData(index, heads, kv_heads, width, model, probed.output, probed.rotary)


def probe(module: Any, owner: Any) -> Probed:
    """Ask a twin of a layer where its output goes and how it rotates; `owner` is the model that makes its positions."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            return _probe(module, owner)
    except Exception:  # whatever a class of somebody else's raises: it does not tell
        return Probed()


def rotary_embedding(module: Any, owner: Any) -> Any:
    """The module of `owner` that makes what a layer turns its queries and keys by; None where it takes none."""
    takes = "position_embeddings" in versions.parameters(type(module).forward)
    return getattr(owner, "rotary_emb", None) if takes else None


def angles(module: Any, embedding: Any, x: Tensor, position: int) -> dict[str, Any]:
    """What a layer is given besides tokens ``(B, 1, C)`` at a position."""
    typed = "layer_type" in versions.parameters(type(embedding).forward)
    more = (getattr(module, "layer_type", None),) if typed else ()
    return {"position_embeddings": embedding(x, torch.tensor([[position]], device=x.device), *more)}


def seen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Note the queries ``(B, H, N, D)`` that a twin hands over, and give the values ``(B, N, H, Dv)`` back."""
    out = value.transpose(1, 2)
    vars(module)[_SEEN] = (query, out.flatten())
    return out, None


def _heads(config: Any) -> int:
    return getattr(config, "num_attention_heads", None) or 1


def _width(module: Any, config: Any) -> int:
    told = [getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "head_size")]
    return next((width for width in told if width), getattr(config, "hidden_size", 0) // _heads(config))


def _probe(module: Any, owner: Any) -> Probed:
    AttentionInterface.register(PROBE, seen_attention)
    config = copy.deepcopy(getattr(module, "attnzoo_model_config", module.config))
    width = _width(module, config)
    sizes = {"hidden_size": width, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": width}
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    config._attn_implementation_internal = PROBE
    twin = type(module)(config, layer_idx=module.layer_idx).eval().float()
    taken: list[str] = []
    for name, child in twin.named_children():
        child.register_forward_pre_hook(lambda child, args, name=name: _note(twin, name, args, taken))
    x = torch.randn(1, 1, width)
    embedding = rotary_embedding(module, owner)
    if embedding is None:
        _handed(twin, x, {})
        return Probed(output=taken[-1] if taken else None)
    embedding = type(embedding)(config=config)
    layer_type = getattr(twin, "layer_type", None)

    def at(position: int) -> Tensor:
        return _handed(twin, x, angles(twin, embedding, x, position))

    last = 2 * int(getattr(config, "max_position_embeddings", 2048)) + 3  # past what a dynamic embedding is made for
    positions = [1, 5, 977, last]
    start, seen = at(0), {position: at(position) for position in positions}
    candidates = _candidates(embedding, layer_type, width)
    rotary = next((one for one in candidates if _agrees(one, start, seen)), None)
    return Probed(taken[-1] if taken else None, rotary)


def _note(twin: nn.Module, name: str, args: tuple[Any, ...], taken: list[str]) -> None:
    """Take down a child that is called with what the attention gave."""
    seen = vars(twin).get(_SEEN)
    if seen is not None and args and isinstance(args[0], Tensor) and torch.equal(args[0].flatten(), seen[1]):
        taken.append(name)


def _handed(twin: Any, x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The query ``(D,)`` that a twin hands to the attention for one token."""
    vars(twin).pop(_SEEN, None)
    twin(hidden_states=x, attention_mask=None, **given)
    query: Tensor = vars(twin)[_SEEN][0]
    return query.flatten()


def _candidates(embedding: Any, layer_type: str | None, width: int) -> list[Rotary]:
    """Rotary embeddings that a host's could be; the first is none at all."""
    found = [Rotary(())]
    prefix = f"{layer_type}_" if hasattr(embedding, f"{layer_type}_inv_freq") else ""
    frequencies = getattr(embedding, f"{prefix}inv_freq", None)
    if frequencies is not None and 2 * len(frequencies) <= width:
        scaling = float(getattr(embedding, f"{prefix}attention_scaling", 1.0))
        told = tuple(frequencies.tolist())
        found += [Rotary(told, scaling, interleaved) for interleaved in (False, True)]
    return found


def _agrees(rotary: Rotary, start: Tensor, seen: Mapping[int, Tensor]) -> bool:
    """Whether `rotary` turns the query at position 0 into those at other positions."""
    plain = rotary.undo(start[None], torch.zeros(1))
    return all(
        torch.allclose(rotary.rotate(plain, torch.tensor([position]))[0], query, rtol=1e-3, atol=1e-4)
        for position, query in seen.items()
    )

"""A call of a model whose attention was swapped: what is looked at before it, and the attention through the cache.

1. A hook on the model that makes masks and caches (`CacheHook`) looks at the call: it turns an empty `DynamicCache`,
   whoever made it, into a `BoundedCache`, takes the padding from the 2-D mask, refuses what cannot be, and sends both
   down as one keyword argument, for the attention interface is handed neither.
2. The attention module calls ``cache.update``. A bounded layer gives the new keys and values back as they are.
3. The module calls the attention interface, which is `bounded_attention`: it puts them in and attends.

The 4-D masks that the model makes are not read: one serves all layers and heads, and cannot describe survivors that
differ by head. Padding and order are all there is to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from attnzoo.checks import refuse_tracing
from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.eviction.cache import BoundedCache
from attnzoo.eviction.layer_data import LayerData, OutputProjection
from attnzoo.eviction.layers import Maker, SwappedCacheLayer
from attnzoo.eviction.ragged import store_for
from attnzoo.eviction.scan import BoundedAttention, Padding
from attnzoo.hosts import versions

NAME = "attnzoo_bounded"  # in transformers' attention interface
CALL = "attnzoo_call"  # the keyword argument that the hook sends down


@dataclass(frozen=True)
class Call:
    """What the hook sends down to the layers of one call: the cache, and which tokens are real (None: all)."""

    cache: BoundedCache | None
    real: Tensor | None
    padding: Padding | None


class CacheHook:
    """The hooks on a model that makes masks and caches; see the head of this file."""

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Look at the arguments of a call, and add what the layers need; what is refused leaves all as it was."""
        if next(own_layers(model), None) is None:  # a part of the model was restored by itself
            drop_hook(model)
            return args, kwargs
        refuse_tracing()
        names = list(versions.parameters(type(model).forward))
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None:
            return args, kwargs  # the model's own error tells more
        rows, new = tokens.shape[:2]
        cache = self._cache(model, given, versions.pop_cache(dict(given)), rows)
        seen = 0 if cache is None else cache.get_seq_length()
        past = cache.real if isinstance(cache, BoundedCache) else None
        real = _real_tokens(given.get("attention_mask"), rows, new, seen, past)
        _refuse_packed(given.get("position_ids"), real, versions.separates(given, cache))
        if given.get("is_causal") is False:
            raise UnsupportedError("is_causal=False: a bounded cache is for causal attention")
        padding = None if real is None else Padding.of(real)
        values, kwargs = list(args), dict(kwargs)
        if cache is not None:
            bounded = _make_bounded(cache, model)
            call = Call(bounded, None if padding is None else real, padding)
            bounded.real = _with_new(past, None if padding is None else real, rows, seen, new)
            for layer in bounded.own:
                layer.begin(call)
            versions.pop_cache(kwargs)
            (name,) = versions.cache_arguments(model, bounded)
            if name in names[: len(values)]:
                values[names.index(name)] = bounded
            else:
                kwargs[name] = bounded
        else:
            call = Call(None, None if padding is None else real, padding)
        return tuple(values), {**kwargs, CALL: call}

    def end(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Close what the call opened, however it ended."""
        call = kwargs.get(CALL)
        if isinstance(call, Call) and call.cache is not None:
            for layer in call.cache.own:
                layer.end()

    def _cache(self, model: Any, given: Mapping[str, Any], cache: Any, rows: int) -> DynamicCache | None:
        """The cache of a call, not changed yet: the one given, or a new one where the model would make one."""
        checkpointing = model.training and getattr(model, "gradient_checkpointing", False)
        if cache is not None and checkpointing:
            raise UnsupportedError("gradient checkpointing takes tokens in twice; in training with it, give no cache")
        if cache is None:
            wanted = given.get("use_cache")
            wanted = getattr(model.config, "use_cache", True) if wanted is None else wanted
            return DynamicCache(config=model.config) if wanted and not checkpointing else None
        if type(cache) is DynamicCache:
            _check_empty(cache)
            return cache
        if not isinstance(cache, BoundedCache):
            raise UnsupportedError(
                f"{type(cache).__name__} cannot be bounded: the swapped attention works with the default cache, "
                "DynamicCache (leave cache_implementation unset)"
            )
        for index, maker in own_layers(model):
            layer = cache.layers[index] if index < len(cache.layers) else None
            if isinstance(layer, SwappedCacheLayer):
                differs = maker.mismatch(layer.maker)
            else:
                differs = f"{layer!r}, and the model has {maker}"
            if differs:
                raise UnsupportedError(
                    f"this cache was made by another swap: layer {index} is of {differs}; give the call its own cache"
                )
        cache.check_whole()
        for layer in cache.own:
            if layer.batch_size not in (-1, rows):
                raise ShapeError(f"the cache holds {layer.batch_size} rows, the call has {rows}")
        return cache


def bounded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend through the cache, as transformers' attention interface asks.

    `query` is ``(B, H, N, D)``, `key` and `value` are ``(B, Hkv, N, D)`` of the new tokens; returns ``(B, N, H, D)``
    and None instead of weights.

    Raises
    ------
    UnsupportedError
        If the hook did not see the call.
    """
    call = kwargs.get(CALL)
    if not isinstance(call, Call):
        raise UnsupportedError(
            f"{type(module).__name__} was called without its model: call the model that holds it, so that padding and "
            "cache are known"
        )
    for name in versions.UNREAD:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{type(module).__name__} passes {name!r}, which a bounded cache does not support")
    attention: BoundedAttention = module.attnzoo_core
    layer = None if call.cache is None else call.cache.layers[module.layer_idx]
    if layer is not None:
        layer.take(key, value)
    store = store_for(attention.policy, module.layer_idx) if layer is None else layer.store
    data: LayerData = module.attnzoo_layer
    store.data, store.projection = data, OutputProjection(module, data.output or "")
    out = attention(store, query, key, value, call.padding, scale=scaling, dropout=dropout, softcap=softcap)
    if layer is not None:
        layer.taken(query.shape[2])
    return out.transpose(1, 2).contiguous(), None


def own_layers(model: nn.Module) -> Iterator[tuple[int, Maker]]:
    """The swapped layers in `model` that need a cache layer of their own: its index, and what makes it."""
    module: Any
    for module in model.modules():
        maker = vars(module).get("attnzoo_cache")
        if maker is not None:
            yield module.layer_idx, maker


def add_hook(model: nn.Module) -> None:
    """Have `model` look at its calls."""
    if not any(isinstance(hook, CacheHook) for hook in model._forward_pre_hooks.values()):
        hook = CacheHook()
        model.register_forward_pre_hook(hook, with_kwargs=True)
        model.register_forward_hook(hook.end, with_kwargs=True, always_call=True)


def drop_hook(model: nn.Module) -> None:
    """Undo `add_hook`."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, CacheHook)]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [
        k for k, hook in model._forward_hooks.items() if isinstance(getattr(hook, "__self__", None), CacheHook)
    ]:
        del model._forward_hooks[key]
        model._forward_hooks_with_kwargs.pop(key, None)
        model._forward_hooks_always_called.pop(key, None)


def _check_empty(cache: DynamicCache) -> None:
    """Refuse what cannot be turned into a bounded cache."""
    if cache.offloading:
        raise UnsupportedError("an offloaded cache cannot be bounded; leave cache_implementation unset")
    if any(_is_filled(layer) for layer in cache.layers):
        raise UnsupportedError(
            "this cache was filled by another model, or before the swap: a bounded cache must see all tokens. Give the "
            "call an empty cache, or none"
        )


def _make_bounded(cache: DynamicCache, model: nn.Module) -> BoundedCache:
    """Turn an empty cache into a bounded one, in place: its maker may hold on to it.

    The layers that were not swapped are those that the model's config asks for: a cache that was made without a config
    would let layers with a sliding window grow without bound.
    """
    if isinstance(cache, BoundedCache):
        return cache
    cache.layers = DynamicCache(config=model.config).layers
    for index, maker in own_layers(model):
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        cache.layers[index] = maker(index)
    cache.__class__ = BoundedCache
    return cast(BoundedCache, cache)


def _is_filled(layer: Any) -> bool:
    """Whether a layer holds tokens; one without a length (of no attention, or of shared keys) tells nothing."""
    tracks = isinstance(layer, CacheLayerMixin) and bool(getattr(layer, "is_initialized", False))
    return tracks and layer.get_seq_length() > 0


def _with_new(past: Tensor | None, real: Tensor | None, rows: int, seen: int, new: int) -> Tensor | None:
    """Which tokens are real, ``(B, seen + new)``; None if all are."""
    if past is None and real is None:
        return None
    like = past if past is not None else real
    assert like is not None
    before = like.new_ones(rows, seen) if past is None else past
    return torch.cat([before, like.new_ones(rows, new) if real is None else real.to(before.device)], 1)


def _real_tokens(mask: Any, rows: int, tokens: int, seen: int, past: Tensor | None) -> Tensor | None:
    """Which of the new tokens are real, ``(B, N)``; None if the mask does not say. `past` are those seen before."""
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        raise UnsupportedError(
            f"an attention mask ({type(mask).__name__}) is not supported by layers that keep a bounded cache or a "
            "state: it holds masks that were made outside of the language model (as some vision-language models do, so "
            "that the tokens of an image see one another); load the language model alone, by its ...ForCausalLM class"
        )
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"({type(mask).__name__})"
        raise UnsupportedError(
            f"an attention mask {what} is not supported by layers that keep a bounded cache or a state; give a 2-D "
            "mask (B, tokens) that tells padding, or none"
        )
    if mask.shape != (rows, seen + tokens):
        raise ShapeError(
            f"attention_mask is {tuple(mask.shape)}, but the cache has seen {seen} tokens and {tokens} are new: it "
            f"must be {(rows, seen + tokens)}"
        )
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise UnsupportedError(
            "attention_mask (B, tokens) must hold 1 where a token is real and 0 where it is padding, and holds other "
            "numbers: a mask that is added to the scores is not supported by layers that keep a bounded cache or a "
            "state; give (mask == 0).long() if 0 means seen"
        )
    mask = mask.bool()
    before = mask[:, :seen]
    if not bool(before.all() if past is None else torch.equal(before, past.to(before.device))):
        raise UnsupportedError(
            "attention_mask tells other padding among the tokens seen before than the calls that brought them; padding "
            "must be told when its tokens come, for then it is decided what is kept"
        )
    return mask[:, seen:]


def _refuse_packed(positions: Any, real: Tensor | None, separates: bool) -> None:
    """Refuse sequences packed into one row: the cache would mix them.

    `positions` are ``(B, N)``; or those of a model with several axes of position (M-RoPE), ``(axes, B, N)``, of which
    four begin with the positions in the text, by which the host itself separates sequences. Positions that run
    backwards are those of several sequences; and all that do not rise by 1, where the host itself `separates` them.
    On the axes of an image positions run backwards within a sequence, but never on all of them at once.
    """
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3) or positions.shape[-1] == 1:
        return
    if positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]
    steps = positions.diff(dim=-1)
    packed = steps != 1 if separates and positions.dim() == 2 else steps < 0
    if positions.dim() == 3:
        packed = packed.all(0)
    if real is not None:
        packed = packed & real[:, 1:] & real[:, :-1]
    if bool(packed.any()):
        raise UnsupportedError(
            "position_ids run backwards or jump, as those of several sequences packed into one row do, which cannot "
            "share a bounded cache; give each its own row"
        )


AttentionInterface.register(NAME, bounded_attention)  # here, so that a swapped model unpickled elsewhere finds it

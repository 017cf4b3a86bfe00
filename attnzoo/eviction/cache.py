"""The bounded cache as transformers sees it: a `DynamicCache` whose swapped layers are attnzoo's own.

The only file that touches the moving parts of transformers' cache. How a call goes:

1. A hook on the model that makes masks and caches (`CacheHook`) looks at the call: it turns an empty `DynamicCache`,
   whoever made it, into a `BoundedCache`, takes the padding from the 2-D mask, refuses what cannot be, and sends both
   down as one keyword argument, for the attention interface is handed neither.
2. The attention module calls ``cache.update``. A bounded layer gives the new keys and values back as they are.
3. The module calls the attention interface, which is `bounded_attention`: it puts them in and attends.

The 4-D masks that the model makes are not read: one serves all layers and heads, and cannot describe survivors that
differ by head. Padding and order are all there is to know.
"""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from attnzoo import files
from attnzoo.checks import refuse_tracing
from attnzoo.errors import AssetError, ShapeError, UnsupportedError
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.scan import BoundedAttention, Padding
from attnzoo.eviction.size import CacheBytes
from attnzoo.eviction.store import Store
from attnzoo.hosts import versions
from attnzoo.registry import build_policy, describe

NAME = "attnzoo_bounded"  # in transformers' attention interface
CALL = "attnzoo_call"  # the keyword argument that the hook sends down
FILE_FORMAT = 1


class SwappedCacheLayer(CacheLayerMixin):
    """Base of the cache layers that belong to swapped attention layers: `BoundedLayer`, and the `StateLayer` of mixers.

    Whatever would need tokens that are no longer kept, such as cropping, is refused.

    Attributes
    ----------
    maker
        What made it: a layer is for the modules that carry an equal one.
    columns
        Tokens seen, padding included.
    torn
        Whether tokens were being put in when the last call broke off.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.columns = 0
        self.torn = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.maker}, seen={self.columns})"

    @abstractmethod
    def bytes(self) -> CacheBytes:
        """Bytes held and allocated; see `attnzoo.kv_bytes`."""

    @abstractmethod
    def copy(self) -> SwappedCacheLayer:
        """A layer of its own with the same content."""

    @abstractmethod
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of all that is kept: `change` maps ``(B, ...)`` to ``(B', ...)``."""

    def begin(self, call: Call) -> None:
        """A call begins."""

    def end(self) -> None:
        """The call is over, however it ended."""

    def flush(self) -> None:
        """Evict now, where anything is ever evicted."""

    def end_prompt(self) -> None:
        """Evict, where that is put off to the end of the prompt."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the first call makes the buffers."""

    def get_seq_length(self, *args: Any) -> int:
        """Logical length: tokens seen, padding included, however few are kept."""
        return self.columns

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        """Length and offset of the mask, as if all entries were kept: layers that were not swapped need it."""
        return self.columns + versions.new_tokens(query), 0

    def get_max_length(self) -> int:
        """There is no end to the logical length."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int = 0, *args: Any) -> None:
        """Refuse to take tokens back: nothing of the time before them was kept."""
        if tokens_to_remove != 0:
            raise UnsupportedError(
                f"a cache of {self.maker.name!r} cannot be cropped: what it held before the tokens to remove came is "
                "gone. Assisted and prompt-lookup decoding need cropping; decode without them, or keep a copy() of the "
                "cache to go back to"
            )

    def offload(self) -> None:
        """Refuse."""
        raise UnsupportedError(
            f"a cache of {self.maker.name!r} is not offloaded: it is small; leave cache_implementation unset"
        )

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in another order (beam search)."""
        self.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.map_rows(lambda x: x[indices.to(x.device)])


class Maker(Protocol):
    """Makes the cache layer of a swapped module, which carries it as ``attnzoo_cache``; compared by what it says."""

    @property
    def name(self) -> str:
        """What messages call the method."""

    def __call__(self, index: int) -> SwappedCacheLayer:
        """Make an empty one."""


@dataclass(frozen=True)
class MakesBounded:
    """Makes a `BoundedLayer`.

    Attributes
    ----------
    name, policy
        What decides what it keeps.
    """

    name: str
    policy: Policy

    def __call__(self, index: int) -> BoundedLayer:
        """Make an empty one."""
        return BoundedLayer(self, index)

    def __str__(self) -> str:
        return f"{self.name} with budget {self.policy.budget}"


class BoundedLayer(SwappedCacheLayer):
    """One layer of a `BoundedCache`.

    Attributes
    ----------
    keys, values
        ``(B, Hkv, held, D)`` in time order; None before the first call.
    positions
        ``(B, Hkv, held)``, int32: which real token of its row an entry is, -1 for an empty slot.
    name, policy
        What decides what it keeps.
    """

    def __init__(self, maker: MakesBounded, index: int) -> None:
        super().__init__(maker)
        self.name, self.policy = maker.name, maker.policy
        self.store = Store(self.policy, index)
        self._call: weakref.ref[Call] | None = None
        self.pending: tuple[Tensor, Tensor] | None = None

    @property
    def keys(self) -> Tensor | None:
        """Keys held."""
        return self.store.keys

    @property
    def values(self) -> Tensor | None:
        """Values held."""
        return self.store.values

    @property
    def positions(self) -> Tensor | None:
        """Positions held."""
        return self.store.positions

    @property
    def is_initialized(self) -> bool:
        """Whether anything was put in."""
        return self.store.batch > 0

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first call."""
        return self.store.batch or -1

    def bytes(self) -> CacheBytes:
        """Bytes held and allocated; see `attnzoo.kv_bytes`."""
        return self.store.bytes()

    @property
    def open(self) -> bool:
        """Whether a call is under way that has not put its keys and values in yet."""
        return self._call is not None and self._call() is not None

    def begin(self, call: Call) -> None:
        """Take in the keys and values of one `update`, as long as `call` lives: an interrupt closes no hook."""
        self._call, self.pending = weakref.ref(call), None

    def end(self) -> None:
        """Take in nothing more."""
        self._call = self.pending = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give the new keys and values back: the attention itself takes them in.

        Raises
        ------
        UnsupportedError
            If the model that calls is not one whose attention was swapped for an eviction policy.
        """
        if not self.open:
            raise UnsupportedError(
                "this cache is bounded by attnzoo and can only be used by a model swapped in the same way; "
                "give this model its own cache"
            )
        self.pending, self.torn = (key_states, value_states), True
        return key_states, value_states

    def take(self, key: Tensor, value: Tensor) -> None:
        """Check that the attention is handed what was put in, once.

        Raises
        ------
        UnsupportedError
            If it is handed anything else.
        """
        if self.pending is None or self.pending[0] is not key or self.pending[1] is not value:
            raise UnsupportedError(
                "the model passes its attention other keys and values than it put into the cache, or the same ones "
                "more than once: such a model cannot be bounded"
            )
        self._call = self.pending = None

    def taken(self, tokens: int) -> None:
        """All tokens of the call are in."""
        self.columns += tokens
        self.torn = False

    def flush(self) -> None:
        """Evict now, though the block, or the prompt, is not at its end."""
        self.store.end_prompt()
        self.store.evict(range(self.store.batch))

    def end_prompt(self) -> None:
        """Evict, where that is put off to the end of the prompt."""
        self.store.end_prompt()

    def reset(self) -> None:
        """Forget everything."""
        self.store, self.columns, self.torn = Store(self.policy, self.store.layer), 0, False

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows."""
        self.store.map_rows(change)

    def copy(self) -> BoundedLayer:
        """A layer of its own with the same content."""
        other = BoundedLayer(MakesBounded(self.name, self.policy), self.store.layer)
        other.store, other.columns, other.torn = self.store.copy(), self.columns, self.torn
        return other


class BoundedCache(DynamicCache):
    """A `DynamicCache` some or all of whose layers are attnzoo's own.

    It is never made by hand: a model whose attention was swapped turns any empty `DynamicCache` into one.

    Attributes
    ----------
    real
        ``(B, tokens seen)``, True where a token was real; None if all were.
    """

    real: Tensor | None = None

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask.

        Where every layer that would read it is bounded, only the new tokens: nobody looks at the rest.
        """
        layer = self.layers[layer_idx]
        readers = [other for other in self.layers if not getattr(other, "is_sliding", False)]
        if isinstance(layer, SwappedCacheLayer) and all(isinstance(other, SwappedCacheLayer) for other in readers):
            return versions.new_tokens(query), layer.columns
        return super().get_mask_sizes(query, layer_idx)

    def flush(self) -> None:
        """Evict now, in every bounded layer, though blocks are not at their end."""
        for layer in self.own:
            layer.flush()

    def end_prompt(self) -> None:
        """Evict in layers whose policy waits for the end of the prompt; others go on as they are."""
        for layer in self.own:
            layer.end_prompt()

    @property
    def is_initialized(self) -> bool:
        """Whether every layer took tokens in."""
        return bool(self.layers) and all(layer.is_initialized for layer in self.layers)

    def check_whole(self) -> None:
        """Refuse to go on from a call that broke off between layers or within one.

        Raises
        ------
        UnsupportedError
            If layers have seen different numbers of tokens.
        """
        seen = {layer.get_seq_length() for layer in self.layers if _counts(layer)}
        if len(seen) > 1 or any(layer.torn for layer in self.own):
            numbers = " and ".join(map(str, sorted(seen)))
            raise UnsupportedError(
                f"an earlier call with this cache broke off on its way through the layers, which have seen {numbers} "
                "tokens; give the call a new cache, or a copy() that was made before"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in another order (beam search)."""
        super().reorder_cache(beam_idx)
        self._map_real(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._map_real(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._map_real(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.real = None

    def _map_real(self, change: Callable[[Tensor], Tensor]) -> None:
        self.real = None if self.real is None else change(self.real)

    @property
    def own(self) -> list[SwappedCacheLayer]:
        """The layers that are attnzoo's own."""
        return [layer for layer in self.layers if isinstance(layer, SwappedCacheLayer)]

    def copy(self) -> BoundedCache:
        """A cache of its own with the same content, cut off from autograd: to use a prompt more than once."""
        other = copy.copy(self)
        other.layers = [
            layer.copy() if isinstance(layer, SwappedCacheLayer) else _copy_plain(layer) for layer in self.layers
        ]
        return other

    def save(self, path: str | Path) -> None:
        """Write the cache to a file, whole or not at all; `attnzoo.load_cache` reads it back.

        Raises
        ------
        UnsupportedError
            If it holds layers that are neither bounded, nor plain, nor of a sliding window, or a call that broke off.
        AssetError
            If the file cannot be written.
        """
        self.check_whole()
        path = Path(path)
        layers = [_layer_state(layer) for layer in self.layers]
        content = {"format": FILE_FORMAT, "layers": layers, "real": None if self.real is None else self.real.clone()}
        if path.is_dir():
            raise AssetError(f"the cache cannot be written to {str(path)!r}, a folder: name a file in it")
        try:
            with files.atomic(path) as part, part.open("wb") as file:
                torch.save(content, file)
        except OSError as error:
            raise AssetError(f"the cache cannot be written to {str(path)!r}: {error.strerror or error}") from error


def load_cache(path: str | Path, device: str | torch.device | None = None) -> BoundedCache:
    """Read a cache that `BoundedCache.save` wrote.

    Parameters
    ----------
    path
        The file.
    device
        Where its tensors go; by default where they were.

    Raises
    ------
    AssetError
        If the file cannot be read or is not a saved cache.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise AssetError(f"the cache {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content["format"] != FILE_FORMAT:
            raise ValueError(f"format {content['format']}, expected {FILE_FORMAT}")
        layers = [_layer_from(state, index) for index, state in enumerate(content["layers"])]
        real = content.get("real")
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise AssetError(f"{str(path)!r} is not a cache saved by attnzoo, or is damaged ({why})") from error
    cache = BoundedCache()
    cache.layers, cache.real = layers, real
    return cache


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
            if not isinstance(layer, SwappedCacheLayer) or layer.maker != maker:
                raise UnsupportedError(
                    f"this cache was made by another swap: its layer {index} is {layer!r}, the model's is {maker}; "
                    "give the call its own cache"
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
    store = Store(attention.policy, module.layer_idx) if layer is None else layer.store
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


def _counts(layer: Any) -> bool:
    """Whether a layer counts the tokens that it has seen."""
    return isinstance(layer, (SwappedCacheLayer, DynamicLayer))


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


def _copy_plain(layer: Any) -> Any:
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(other, name, _copy_tensors(value))
    return other


def _copy_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy_tensors(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy_tensors, value))
    return value


def _layer_state(layer: Any) -> dict[str, Any]:
    """A layer as plain data that `torch.load(weights_only=True)` reads back."""
    if isinstance(layer, BoundedLayer):
        options = {field.name: getattr(layer.policy, field.name) for field in fields(layer.policy)}
        if options.get("base_options") is not None:
            options["base_options"] = dict(options["base_options"])
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in layer.store.state().items()}
        return {"kind": "bounded", "name": layer.name, "options": options, "columns": layer.columns, "store": state}
    if type(layer) is DynamicLayer:
        return {"kind": "plain", "keys": layer.keys, "values": layer.values}
    if type(layer) is DynamicSlidingWindowLayer:
        return {
            "kind": "sliding",
            "window": layer.sliding_window,
            "columns": layer.cumulative_length,
            "keys": None if layer.keys is None else layer.keys.clone(),
            "values": None if layer.values is None else layer.values.clone(),
        }
    what = f"state of {layer.maker.name!r}" if isinstance(layer, SwappedCacheLayer) else type(layer).__name__
    raise UnsupportedError(f"a cache with a {what} cannot be saved; copy() keeps one in memory")


def _layer_from(state: dict[str, Any], index: int) -> Any:
    if state["kind"] == "bounded":
        policy = build_policy(describe(state["name"]), state["options"])
        layer = BoundedLayer(MakesBounded(state["name"], policy), index)
        layer.store.load_state(state["store"])
        layer.columns = state["columns"]
        return layer
    plain = DynamicLayer() if state["kind"] == "plain" else DynamicSlidingWindowLayer(state["window"])
    if state["keys"] is not None:
        plain.lazy_initialization(state["keys"], state["values"])
        plain.keys, plain.values = state["keys"], state["values"]
    if state["kind"] == "sliding":
        plain.cumulative_length = state["columns"]
    return plain


AttentionInterface.register(NAME, bounded_attention)  # here, so that a swapped model unpickled elsewhere finds it

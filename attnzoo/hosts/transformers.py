"""Host transformers: every model that goes through transformers' own attention interface.

An attention module of transformers picks a function by the name in its config (``_attn_implementation``) and calls it
with queries, keys, values and a mask. attnzoo adds one name, ``attnzoo``, to that interface. A swapped module is the
host's own class on the host's own state, with two things of its own: a copy of the config that says ``attnzoo``, and
the core. Models that share a config do not share a swap, and masks go on being made by the model as before, so `sdpa`
and `eager` models are taken.

A caller who asks for attention weights (``output_attentions=True``) gets them from cores that have them (`softmax`);
the model leaves layers of every other out of its ``attentions``, as with transformers' own `sdpa`.

An eviction policy takes the same way under a name of its own; what it needs of the cache is in
`attnzoo.eviction.calls`. A mixer replaces a whole attention module: a causal one of a decoder's
(`attnzoo.hosts.decoder_mixer`), any other of an image encoder's (`attnzoo.hosts.vision_mixer`) or of a detector's
(`attnzoo.hosts.detector_mixer`).
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from attnzoo.cores.masks import causal_mask
from attnzoo.errors import AttnZooError, UnsupportedError
from attnzoo.eviction import calls
from attnzoo.eviction.budgets import LayerShape
from attnzoo.eviction.layer_data import LayerData
from attnzoo.eviction.layers import MakesBounded
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.scan import BoundedAttention
from attnzoo.hosts import detector_mixer, saving, trial, versions, vision_mixer
from attnzoo.hosts.decoder_mixer import DecoderMixer
from attnzoo.hosts.hooks import holds_swapped
from attnzoo.hosts.layer_data import Probed, angles, identity_of, layer_data, probe, rotary_embedding
from attnzoo.hosts.site import (
    Core,
    HostOptions,
    RefusedSite,
    Site,
    ancestors,
    comes_from,
    looks_like_attention,
    refuse_unable,
    share_state,
)
from attnzoo.registry import AttentionInfo, build_policy, describe

NAME = "attnzoo"
BATCHING = "init_continuous_batching"  # what makes the manager of transformers' continuous batching
_MASKS = ("sdpa", "eager", None)


def find(model: nn.Module, layers: Mapping[str, Any], options: HostOptions) -> list[Site]:
    """Find the modules that call transformers' attention interface; see `attnzoo.hosts`."""
    AttentionInterface.register(NAME, attention)
    sites: list[Site] = []
    for path, layer in layers.items():
        if not comes_from(layer, "transformers"):
            continue
        if versions.calls_interface(layer):
            reason = _unsupported(layer)
            sites.append(RefusedSite(path, layer, "transformers", reason) if reason else _site(path, layer))
        elif looks_like_attention(layer):
            reason = "it does not go through transformers' attention interface"
            if "Deformable" in type(layer).__name__:
                reason = "deformable attention samples points of its own, which no core can replace"
            sites.append(RefusedSite(path, layer, "transformers", reason))
    caches: dict[int, list[Any]] = {}
    for site in sites:
        if isinstance(site, TransformersSite):
            site.owner, site.between = _owner(site.path, layers)
            site.outer = {outer: layers[outer] for outer in ancestors(site.path) if outer in layers}
            if "causal" not in site.needs:
                site.detector = detector_mixer.layer_of(site.path, layers)
                if site.detector is None:
                    site.patches = vision_mixer.patches_of(site.path, layers)
                    site.prefix = vision_mixer.prefix_of(site.module)
                else:
                    site.positions = True if options.positions is None else options.positions
            if site.owner is not None and "causal" in site.needs:
                versions.facts()  # a release that is not understood is refused as such
                if id(site.owner) not in caches:
                    caches[id(site.owner)] = DynamicCache(config=site.owner.config).layers
                site.own_cache = _own_cache(site, caches[id(site.owner)])
                if getattr(site.own_cache, "is_sliding", False):
                    window = site.own_cache.sliding_window
                    site.note = f"sliding window of {window}: its cache is bounded already"
    cached = [site for site in sites if isinstance(site, TransformersSite) and site.own_cache is not None]
    places = [(id(site.owner), site.module.layer_idx) for site in cached]
    for site, place in zip(cached, places, strict=True):
        site.shares_place = places.count(place) > 1
    callers = [site.path for site in sites if versions.calls_interface(site.module)]
    # blocks named ...Attention that hold a caller, or torch's own attention, are not layers of their own
    inner = [*callers, *(p for p, m in layers.items() if isinstance(m, nn.MultiheadAttention))]
    return [s for s in sites if s.path in callers or not any(_nested(s.path, i) for i in inner)]


def _nested(a: str, b: str) -> bool:
    return a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _unsupported(layer: Any) -> str | None:
    """Say what the module passes to the interface that no core supports, or None."""
    words = versions.words(layer)
    if "position_bias" in words:
        return "relative position bias"
    if words & {"s_aux", "sinks"} or hasattr(layer, "sinks"):
        return "learned attention sinks"
    if words & {"indices", "block_indices"} or words & {"sdpa", "eager"}:
        return "sparse attention, whose choice of keys depends on the name of the attention implementation"
    if layer.config._attn_implementation not in _MASKS:
        return (
            f"the model was loaded with attn_implementation={layer.config._attn_implementation!r}, whose masks a core "
            "cannot read; load it with 'sdpa' or 'eager', or call model.set_attn_implementation('sdpa')"
        )
    return None


def _site(path: str, layer: Any) -> Site:
    config = layer.config
    needs = {}
    causal = bool(getattr(layer, "is_causal", False))
    if causal:
        needs["causal"] = "causal attention"
    if getattr(layer, "num_key_value_groups", 1) > 1:
        needs["gqa"] = "key and value heads are shared"
    if getattr(layer, "attn_logit_softcapping", None) is not None:
        needs["softcap"] = "scores are capped (attn_logit_softcapping)"
    keys, values = getattr(layer, "qk_head_dim", None), getattr(layer, "v_head_dim", None)
    if hasattr(layer, "q_pos_sine_proj") or (None not in (keys, values) and keys != values):
        needs["widths"] = "values are of another width than keys"
    heads = getattr(config, "num_attention_heads", 0)
    return TransformersSite(path, layer, "transformers", getattr(config, "hidden_size", 0), heads, needs)


def _owner(path: str, layers: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The nearest module round `path` that makes masks and caches, and the modules between; None if there is none."""
    between: list[Any] = []
    for ancestor in ancestors(path):
        module = layers.get(ancestor)
        if module is None:
            break
        if versions.takes_cache(module):
            return module, between
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            between.append(module)
    return None, []


def _own_cache(site: TransformersSite, layers: list[Any]) -> Any:
    """The cache layer that transformers itself would give this layer; None where there is none."""
    index = getattr(site.module, "layer_idx", None)
    return layers[index] if isinstance(index, int) and 0 <= index < len(layers) else None


@dataclass
class TransformersSite(Site):
    """A module that calls transformers' attention interface."""

    owner: Any = None
    outer: dict[str, Any] = field(default_factory=dict)
    between: list[Any] = field(default_factory=list)
    own_cache: Any = None
    shares_place: bool = False
    tried: trial.Attend | None = None
    patches: vision_mixer.Patches | None = None
    detector: detector_mixer.DetectorLayer | None = None
    positions: bool = True

    @property
    def accepted_options(self) -> frozenset[str]:
        """What detectors add at each layer, a mixer can do without."""
        return frozenset() if self.detector is None else frozenset({"positions"})

    def eviction_problem(self) -> str | None:
        """Only the causal self-attention of a decoder has a cache to bound."""
        module = self.module
        if "causal" not in self.needs:
            return "it is not causal (an encoder's, or cross-attention), so it has no key/value cache to bound"
        if type(self.own_cache) is not DynamicLayer and self.own_cache is not None:
            kind = type(self.own_cache).__name__
            return f"transformers gives it another cache than a plain one of keys and values ({kind})"
        return self._decoder_problem("eviction") or self._deaf(module)

    def policy_problem(self, policy: Policy) -> str | None:
        """Say what the policy needs of the layer that it does not have, or what it has against the layer itself."""
        data = self.layer_data(policy)
        if policy.uses_output_weight and data.output is None:
            return "the policy needs the layer's output projection, and no child takes the attention's output as it is"
        if policy.uses_rotary and data.rotary is None:
            return "the policy needs a rotary embedding that depends on nothing but the position, and found none"
        try:
            policy.check_layer(data)
        except AttnZooError as error:
            return str(error)
        return None

    def layer_data(self, policy: Policy) -> LayerData:
        """What is told to `policy` of this layer; what takes a trial to find out, only if it asks."""
        asked = policy.uses_output_weight or policy.uses_rotary
        return layer_data(self.module, self.owner.config, self._probed if asked else Probed())

    @cached_property
    def _probed(self) -> Probed:
        return probe(self.module, self.owner)

    @classmethod
    def try_together(cls, sites: Sequence[Site], info: AttentionInfo) -> dict[str, str]:
        """Try cached calls of decoders swapped at `sites`, on copies without weights; see `attnzoo.hosts.trial`."""
        groups: dict[tuple[str, ...], list[TransformersSite]] = {}
        for site in sites:
            if isinstance(site, cls) and (info.kind == "eviction" or (info.kind == "mixer" and "causal" in site.needs)):
                groups.setdefault(site.callers, []).append(site)
        problems: dict[str, str] = {}
        for callers, group in groups.items():
            for caller in callers:
                try:
                    problems |= _tried(trial.Twin.of(group[0].outer[caller]), caller, group, info)
                    break
                except trial.UntriedError:
                    continue  # with the model inside it
            else:
                kinds = " and ".join(dict.fromkeys(type(group[0].outer[caller]).__name__ for caller in callers))
                warnings.warn(
                    f"{info.name!r} was not tried in {kinds} before the swap, as no copy without weights could be "
                    "built from its config and called: compare a cached call with the model as it was",
                    stacklevel=4,
                )
        return problems

    @property
    def callers(self) -> tuple[str, ...]:
        """Paths of the models round the layer that take a cache, the outermost first: that is the one called."""
        takers = [path for path, m in self.outer.items() if hasattr(m, "config") and versions.takes_cache(m)]
        return tuple(reversed(takers))

    def substitute(self, info: AttentionInfo, module: Any, owner: Any) -> nn.Module:
        """Make what a trial puts in place of `module`, this layer's twin, in a model that holds `owner`'s twin."""
        twin = dataclasses.replace(self, module=module, owner=owner)
        calls.add_hook(owner)
        if info.kind == "mixer":
            return DecoderMixer(trial.PassOn(), module)
        policy = build_policy(describe("knorm"), {"budget": 2 * sum(trial.TOKENS)})  # any: the model is on trial
        self.tried = trial.Attend()
        return twin.put_bounded(BoundedAttention("trial", policy, self.tried))

    @property
    def shape(self) -> LayerShape | None:
        """What the layer keeps of a token, as its trial showed."""
        if self.tried is None or self.tried.seen is None:
            return None
        return LayerShape(self.module.layer_idx, *self.tried.seen, self._dtype(), identity_of(self.owner.config))

    def _dtype(self) -> torch.dtype:
        """That of the keys and values: of the layer's weights, or of the model's where those are packed."""
        for module in (self.module, self.owner):
            kinds = {p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
            if kinds:
                return max(kinds, key=lambda kind: kind.itemsize)
        return torch.get_default_dtype()

    def _decoder_problem(self, what: str) -> str | None:
        """Say why this layer cannot have a cache layer of its own, or give None."""
        module = self.module
        if self.owner is None or getattr(self.owner.config, "is_encoder_decoder", False):
            return f"{what} is for decoder-only language models: this layer's model takes no key/value cache of its own"
        if getattr(self.owner.config, "use_bidirectional_attention", None) in (True, "all"):
            return f"the model's config says use_bidirectional_attention, and {what} is for causal attention"
        if getattr(self.owner.config, "is_causal", True) is False:
            return f"the model's config says is_causal=False, and {what} is for causal attention"
        if self.own_cache is None:
            return "transformers gives it another cache than a plain one of keys and values (none)"
        if self.shares_place:
            return "another layer has the same layer_idx, by which its place in the cache is found"
        if getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
            return "its keys and values are shared between layers"
        return next(filter(None, map(self._deaf, [*self.between, self.owner])), None)

    def _deaf(self, outer: Any) -> str | None:
        """Say that a module does not hand on what the hook sends down, or give None."""
        if versions.passes_down(outer):
            return None
        return f"{type(outer).__name__}.forward does not pass on further keyword arguments; they carry the padding"

    def put_bounded(self, attention: BoundedAttention) -> nn.Module:
        """Make the host's class, on the host's state, attend through a bounded cache."""
        layer = self._put(calls.NAME, attention)
        layer.__dict__["attnzoo_cache"] = MakesBounded(attention.name, attention.policy)
        layer.__dict__["attnzoo_layer"] = self.layer_data(attention.policy)
        return layer

    def call_alone(self, x: Tensor) -> Tensor:
        """Attend, with transformers' arguments."""
        given: dict[str, Any] = {}
        if "causal" in self.needs:
            embedding = rotary_embedding(self.module, self.owner)
            given = {"attention_mask": None} | ({} if embedding is None else angles(self.module, embedding, x, 0))
        out: Tensor = self.module(x, **given)[0]
        return out

    def installed(self, layer: nn.Module) -> None:
        """Have the model look at its calls as long as any of its layers is bounded, and save itself as swapped."""
        saving.attach(list(self.outer.values()))
        if isinstance(layer, vision_mixer.VisionMixer) and self.patches is not None:
            self.patches.attach(layer)
        elif isinstance(layer, detector_mixer.DetectorMixer) and self.detector is not None:
            self.detector.attach(layer)
        elif "attnzoo_cache" in vars(layer):
            calls.add_hook(self.owner)
        else:
            self.removed()
        for model in self.outer.values():
            if hasattr(model, BATCHING):
                vars(model)[BATCHING] = RefusesBatching(model)

    def removed(self) -> None:
        """Take off the models round this layer what only a swapped one needs."""
        saving.detach(list(self.outer.values()))
        for model in self.outer.values():
            if BATCHING in vars(model) and not holds_swapped(model):
                vars(model).pop(BATCHING, None)
        if self.owner is not None and next(calls.own_layers(self.owner), None) is None:
            calls.drop_hook(self.owner)
        if self.patches is not None:
            self.patches.detach()
        if self.detector is not None:
            self.detector.detach()

    def mixer_problem(self, info: AttentionInfo) -> str | None:
        """Mixers that decode stand in decoders, and any in image encoders."""
        if "causal" not in self.needs:
            if self.detector is not None:
                return self.detector.problem
            return vision_mixer.problem(self.module, self.patches)
        if not info.capabilities.causal:
            return "causality: a mixer that is not causal would let a token see those after it" + _causal_form(info)
        if not info.capabilities.decode:
            return f"{info.name!r} cannot decode token by token from a state"
        return self._decoder_problem("a causal mixer")

    def put_mixer(self, mixer: nn.Module) -> nn.Module:
        """Run `mixer` on the tokens: from the state that the cache holds, or with the grid of the image."""
        if self.detector is not None:
            return detector_mixer.DetectorMixer(mixer, self.positions)
        if "causal" not in self.needs:
            return vision_mixer.VisionMixer(mixer, vision_mixer.GridOfCall(), self.prefix)
        return DecoderMixer(mixer, self.module)

    def put_core(self, core: Core) -> nn.Module:
        """Make the host's class, on the host's state, call `core`."""
        return self._put(NAME, core)

    def _put(self, name: str, core: Any) -> nn.Module:
        layer = share_state(self.module, type(self.module))
        config = copy.copy(self.module.config)
        config._attn_implementation_internal = name
        layer.config = config
        layer.__dict__["attnzoo_core"] = core  # never a child, even if it is a module: the children are shared
        layer.attnzoo_model_config = self.module.config
        return layer


def _tried(twin: trial.Twin, caller: str, sites: list[TransformersSite], info: AttentionInfo) -> dict[str, str]:
    """Try `sites` of one model together; if that fails, find those at fault."""
    together = _error(twin, caller, sites, info)
    if together is None:
        return {}
    kinds: dict[tuple[type, type], list[TransformersSite]] = {}
    for site in sites:
        kinds.setdefault((type(site.module), type(site.own_cache)), []).append(site)
    problems: dict[str, str] = {}
    for some in kinds.values():
        error = _error(twin, caller, some[:1], info)
        if error is not None:
            problems |= {site.path: error for site in some}
    rest = [site for site in sites if site.path not in problems]
    error = _error(twin, caller, rest, info) if problems and rest else together
    return problems if error is None else problems | {site.path: error for site in rest}


def _error(twin: trial.Twin, caller: str, sites: list[TransformersSite], info: AttentionInfo) -> str | None:
    def inside(path: str) -> str:
        return path[len(caller) + 1 :] if caller else path

    def put(site: TransformersSite, twin: nn.Module, module: nn.Module) -> nn.Module:
        owner = next(path for path, m in site.outer.items() if m is site.owner)
        return site.substitute(info, module, twin.get_submodule(inside(owner)))

    return twin.error({inside(site.path): partial(put, site) for site in sites})


class RefusesBatching:
    """Stands in a swapped model for what starts continuous batching, whose workers log errors and return no text."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Start it if nothing of the swap is left in the model.

        Raises
        ------
        UnsupportedError
            If a layer of the model is swapped.
        """
        if holds_swapped(self.model):
            raise UnsupportedError(
                "continuous batching (generate_batch) brings a cache and attention functions of its own, which a "
                "swapped model cannot use; call generate, or restore_attention first"
            )
        vars(self.model).pop(BATCHING, None)
        return getattr(self.model, BATCHING)(*args, **kwargs)


def _causal_form(info: AttentionInfo) -> str:
    """Name the options under which a mixer is causal, where it has such."""
    form = getattr(info.load(), "causal_form", "")
    return f" ({form} makes {info.name!r} causal)" if form else ""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the module's core, as transformers' attention interface asks.

    `query` is ``(B, H, N, D)``, `key` and `value` are ``(B, Hkv, S, D)``; `attention_mask` is None or
    ``(B, 1 or H, N, S)``, boolean (True where seen) or additive. Returns ``(B, N, H, D)`` and the weights
    ``(B, H, N, S)``, or None in their place.

    Raises
    ------
    UnsupportedError
        For a module that was not swapped, and for arguments that no core supports.
    """
    core = getattr(module, "attnzoo_core", None)
    if core is None:
        raise UnsupportedError(
            "attn_implementation='attnzoo' is set by attnzoo.replace_attention(model, name); do not set it yourself"
        )
    implementation = module.attnzoo_model_config._attn_implementation
    if implementation not in _MASKS or (attention_mask is not None and attention_mask.dim() != 4):
        raise UnsupportedError(
            f"the model makes masks for attn_implementation={implementation!r}, which a core cannot read; "
            "call model.set_attn_implementation('sdpa')"
        )
    for name in versions.UNREAD:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{type(module).__name__} passes {name!r}, which no core supports")
    queries, keys = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scale": scaling, "dropout": dropout, "mask": attention_mask}
    if attention_mask is not None:
        options["mask"] = attention_mask[..., :keys]
    elif implementation == "sdpa" and queries > 1:
        # an sdpa model leaves out a mask that is causal and nothing else
        options["causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if options["causal"] and keys != queries:  # a static cache, still empty: what follows the queries is unused
            options["causal"] = False
            options["mask"] = causal_mask(queries, queries, query.device)
            key, value = key[:, :, :queries], value[:, :, :queries]
    if softcap is not None:
        options["softcap"] = softcap
    refuse_unable(
        module,
        mask=options["mask"] is not None,
        causal=options.get("causal", False),
        dropout=dropout > 0,
        softcap=softcap is not None,
    )
    weights = None
    if hasattr(core, "with_weights") and _wants_weights(module, kwargs):
        out, weights = core.with_weights(query, key, value, **options)
    else:
        out = core(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), weights


def _wants_weights(module: Any, kwargs: Mapping[str, Any]) -> bool:
    asked = kwargs.get("output_attentions")
    return bool(module.attnzoo_model_config.output_attentions if asked is None else asked)

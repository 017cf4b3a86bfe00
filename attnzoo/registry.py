"""The table of attentions: names, what each supports, and where its code is.

An entry is data. Its module is imported when the method is first built, so `import attnzoo` is fast. To add a method to
the package, write its file and add one line to `BUILT_IN`; from another package, call `register_attention` or
publish an entry point in the group ``attnzoo.attentions`` whose object is an `AttentionInfo`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from attnzoo.errors import AttnZooError, OptionError, UnknownNameError, UnsupportedError, short
from attnzoo.method_class import check_class

if TYPE_CHECKING:
    from attnzoo.eviction.policy import Policy

Kind = Literal["core", "mixer", "eviction"]
ENTRY_POINTS = "attnzoo.attentions"
OWN_METHOD = (
    "A method of a file of your own is known once it is registered: attnzoo.register_attention in Python, "
    "imports: [module] in a config, --import module for a command."
)


class Required:
    """The default of an option that must be given; prints as three dots."""

    def __repr__(self) -> str:
        return "..."


REQUIRED = Required()


@dataclass(frozen=True)
class Capabilities:
    """What a method supports. If a host needs more, the swap is refused and the error names what is missing.

    causal
        Token t can be kept from seeing tokens after t.
    mask
        Padding can be left out (mixers) or any attention mask be applied (cores).
    cross
        Queries may come from another sequence than keys and values.
    gqa
        Fewer key and value heads than query heads.
    widths
        Values of another width than queries and keys.
    dropout
        Attention dropout in training.
    softcap
        Scores squashed to ``softcap * tanh(scores / softcap)``.
    weights
        The attention weights can be returned.
    grid
        The method needs to know the grid of the tokens.
    any_order
        A mixer takes tokens in any order: shuffled tokens give shuffled outputs, so that some may be left out.
    decode
        A causal mixer can decode from a state: ``extend(x, state, mask) -> (out, state)``.
    inherit
        A mixer can begin as, or near, a given map over channels, ``x W^T + b``: ``inherit(weight, bias)``.
    backward
        Gradients flow.
    compile
        ``torch.compile(fullgraph=True)`` goes through without a break, where a grid is one ``(h, w)`` for all images.
    """

    causal: bool = False
    mask: bool = False
    cross: bool = False
    gqa: bool = False
    widths: bool = False
    dropout: bool = False
    softcap: bool = False
    weights: bool = False
    grid: bool = False
    any_order: bool = False
    decode: bool = False
    inherit: bool = False
    backward: bool = True
    compile: bool = True


UNSAID = Capabilities()
OF_POLICIES = Capabilities(causal=True, mask=True, gqa=True, compile=False)
"""What every eviction policy supports; what the core under it can do besides depends on the core."""


@dataclass(frozen=True)
class AttentionInfo:
    """One entry of the registry.

    Parameters
    ----------
    name
        The name that users pass to `replace_attention`.
    kind
        ``core``, ``mixer`` or ``eviction``.
    target
        The class, or its place as ``"package.module:Class"``.
    summary
        One sentence.
    paper
        Title and address of the source, as ``"PADRe, https://..."``; several with semicolons between them.
    capabilities
        What the method supports; by default gradients and ``torch.compile``, and of an eviction policy `OF_POLICIES`.
    """

    name: str
    kind: Kind
    target: str | type
    summary: str = ""
    paper: str = ""
    capabilities: Capabilities = UNSAID

    def __post_init__(self) -> None:
        if self.kind == "eviction" and self.capabilities is UNSAID:
            object.__setattr__(self, "capabilities", OF_POLICIES)

    def load(self) -> Callable[..., Any]:
        """Import the class behind this entry."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise AttnZooError(f"attention {self.name!r} could not be loaded from {self.target!r}: {error}") from error

    @property
    def options(self) -> dict[str, Any]:
        """The options and their defaults (`REQUIRED` where there is none): the keyword-only parameters of the class.

        Where a class hands ``**options`` on, the parameters of the class that it inherits from are options too.
        """
        found: dict[str, Any] = {}
        for parameter in itertools.chain(*_constructors(self.load())):
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
                found.setdefault(parameter.name, default)
        return found

    @property
    def takes_any_option(self) -> bool:
        """Whether the class takes ``**options`` and no class that it inherits from says which."""
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _constructors(self.load())[-1])

    def check_options(self, options: Iterable[str]) -> None:
        """Raise `OptionError` on the first option that this method does not have."""
        known = self.options
        for option in options:
            if option not in known and not self.takes_any_option:
                raise OptionError(
                    f"{self.name!r} has no option {option!r}{_nearest(option, known)} Its options: {_listed(known)}."
                )

    def require_options(self, options: Iterable[str]) -> None:
        """Raise `OptionError` if an option that has no default is missing."""
        known = self.options
        for option in known:
            if known[option] is REQUIRED and option not in options:
                raise OptionError(f"{self.name!r} needs {option}=. Its options: {_listed(known)}.")

    def given(self, options: Mapping[str, Any]) -> AttentionInfo:
        """Give this entry with the capabilities that it has under those of `options` that it knows.

        Where they differ, the class says so.
        """
        abilities = getattr(self.load(), "abilities", None)
        if abilities is None:
            return self
        known = {key: value for key, value in options.items() if key in self.options}
        return replace(self, capabilities=replace(self.capabilities, **abilities(**known)))

    def __str__(self) -> str:
        can = [f.name for f in fields(Capabilities) if getattr(self.capabilities, f.name)]
        options = _listed(self.options)
        head = f"{self.name} ({self.kind})" + (f": {self.summary}" if self.summary else "")
        lines = [head, f"  options: {options}"]
        if self.options and self.kind in PAGES and str(self.target).startswith("attnzoo."):
            lines.append(f"  explained in: {PAGES[self.kind]}")
        lines.append(f"  can: {', '.join(can)}")
        return "\n".join([*lines, f"  source: {self.paper}"] if self.paper else lines)


PAGES = {"mixer": "docs/padre.md", "eviction": "docs/eviction.md#policies"}  # where the options are explained
_EVERYTHING = {"causal": True, "mask": True, "cross": True, "gqa": True}


def _policy(name: str, cls: str, summary: str, paper: str = "") -> AttentionInfo:
    """One of the eviction policies."""
    return AttentionInfo(name, "eviction", f"attnzoo.eviction.{name}:{cls}", summary, paper)


BUILT_IN: tuple[AttentionInfo, ...] = (
    AttentionInfo(
        "softmax",
        "core",
        "attnzoo.cores.softmax:Softmax",
        "Unfused softmax attention, accumulated in float32: the oracle of the tests.",
        "Attention Is All You Need, https://arxiv.org/abs/1706.03762",
        Capabilities(**_EVERYTHING, widths=True, dropout=True, softcap=True, weights=True),
    ),
    AttentionInfo(
        "sdpa",
        "core",
        "attnzoo.cores.sdpa:Sdpa",
        "PyTorch's own scaled_dot_product_attention, on the backend that it picks.",
        "PyTorch, https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html",
        Capabilities(**_EVERYTHING, widths=True, dropout=True),
    ),
    AttentionInfo(
        "flash",
        "core",
        "attnzoo.cores.flash:Flash",
        "A FlashAttention kernel or an error: it never falls back to another algorithm.",
        "FlashAttention-2, https://arxiv.org/abs/2307.08691",
        Capabilities(**_EVERYTHING),
    ),
    AttentionInfo(
        "flash_scored",
        "core",
        "attnzoo.cores.flash_scored:FlashScored",
        "Like sdpa, and also returns how much attention each key got, which eviction policies need.",
        "FlashAttention-2, https://arxiv.org/abs/2307.08691",
        Capabilities(**_EVERYTHING, widths=True, dropout=True),
    ),
    AttentionInfo(
        "padre",
        "mixer",
        "attnzoo.mixers.padre:Padre",
        "Polynomial attention: elementwise products of convolved and linearly mapped tokens.",
        "PADRe, https://arxiv.org/abs/2407.11306",
        Capabilities(mask=True, grid=True, inherit=True),
    ),
    AttentionInfo(
        "conv2former",
        "mixer",
        "attnzoo.mixers.conv2former:Conv2Former",
        "The output of a large depthwise convolution multiplies the values.",
        "Conv2Former, https://arxiv.org/abs/2211.11943",
        Capabilities(mask=True, grid=True, inherit=True),
    ),
    AttentionInfo(
        "hyena",
        "mixer",
        "attnzoo.mixers.hyena:Hyena",
        "Elementwise products of projections, each convolved with a filter as long as the sequence.",
        "Hyena, https://arxiv.org/abs/2302.10866",
        Capabilities(mask=True, inherit=True),
    ),
    AttentionInfo(
        "sima",
        "mixer",
        "attnzoo.mixers.sima:Sima",
        "Linear attention whose queries and keys are l1-normalized over the tokens.",
        "SimA, https://arxiv.org/abs/2206.08898",
        Capabilities(mask=True, any_order=True, inherit=True),
    ),
    AttentionInfo(
        "linear_angular",
        "mixer",
        "attnzoo.mixers.linear_angular:LinearAngular",
        "Linear attention by the angle between query and key, plus a convolution of the values.",
        "Castling-ViT, https://arxiv.org/abs/2211.10526",
        Capabilities(mask=True, inherit=True),
    ),
    AttentionInfo(
        "power",
        "mixer",
        "attnzoo.mixers.power:Power",
        "Linear attention whose weights are an even power of the scores, exactly.",
        "Power attention, https://arxiv.org/abs/2507.04239",
        Capabilities(mask=True, inherit=True),
    ),
    AttentionInfo(
        "poly_attention",
        "mixer",
        "attnzoo.mixers.poly_attention:PolyAttention",
        "Attention from a token to a second and from there to a third: products of values, in quadratic time.",
        "Poly-attention, https://arxiv.org/abs/2602.02422",
        Capabilities(mask=True, any_order=True, inherit=True),
    ),
    AttentionInfo(
        "mamba",
        "mixer",
        "attnzoo.mixers.mamba:Mamba",
        "A selective state space model, by default in both directions.",
        "Mamba, https://arxiv.org/abs/2312.00752; Vision Mamba, https://arxiv.org/abs/2401.09417",
        Capabilities(mask=True),
    ),
    AttentionInfo(
        "conv",
        "mixer",
        "attnzoo.mixers.conv:Conv",
        "A plain depthwise convolution: a control for locality.",
        "none; the token mixing of PADRe alone",
        Capabilities(mask=True, grid=True),
    ),
    AttentionInfo(
        "mlp_mixer",
        "mixer",
        "attnzoo.mixers.mlp_mixer:MlpMixer",
        "An MLP over a fixed number of tokens: a control.",
        "MLP-Mixer, https://arxiv.org/abs/2105.01601",
        Capabilities(mask=True),
    ),
    AttentionInfo(
        "pooling",
        "mixer",
        "attnzoo.mixers.pooling:Pooling",
        "The mean of a window minus the token itself, without weights: a control.",
        "MetaFormer (PoolFormer), https://arxiv.org/abs/2111.11418",
        Capabilities(mask=True, grid=True),
    ),
    _policy(
        "streaming",
        "Streaming",
        "Keeps the first few tokens and the most recent ones.",
        "StreamingLLM, https://arxiv.org/abs/2309.17453",
    ),
    _policy(
        "h2o",
        "H2O",
        "Keeps the entries with the most accumulated attention, and recent tokens.",
        "H2O, https://arxiv.org/abs/2306.14048",
    ),
    _policy(
        "tova",
        "Tova",
        "Keeps the entries with the most attention from the last query, averaged over all heads.",
        "TOVA, https://arxiv.org/abs/2401.06104",
    ),
    _policy(
        "snapkv",
        "SnapKV",
        "Keeps the entries with the most attention from the last 32 queries, max-pooled over neighbors.",
        "SnapKV, https://arxiv.org/abs/2404.14469",
    ),
    _policy(
        "scissorhands",
        "Scissorhands",
        "Keeps the entries that most often got more than an equal share of attention.",
        "Scissorhands, https://arxiv.org/abs/2305.17118",
    ),
    _policy(
        "zipcache",
        "ZipCache",
        "Keeps the entries with the most attention from the last queries, per query that sees the entry.",
        "ZipCache, https://arxiv.org/abs/2405.14256",
    ),
    _policy(
        "keyformer",
        "Keyformer",
        "Keeps the entries with the most accumulated attention, with Gumbel noise on its logits, and recent tokens.",
        "Keyformer, https://arxiv.org/abs/2403.09054",
    ),
    _policy(
        "expected_attention",
        "ExpectedAttention",
        "Keeps the entries that queries to come will attend to most, if they are like the last ones.",
        "Expected Attention, https://arxiv.org/abs/2510.00636",
    ),
    _policy(
        "knorm",
        "Knorm",
        "Keeps the entries whose keys have the smallest norm.",
        "L2 norm, https://arxiv.org/abs/2406.11430",
    ),
    _policy(
        "keydiff",
        "KeyDiff",
        "Keeps the entries whose keys are least similar to the mean key.",
        "KeyDiff, https://arxiv.org/abs/2504.15364",
    ),
    _policy(
        "lagkv",
        "LagKV",
        "Keeps the entries whose keys and values stand out most from those of the next tokens.",
        "LagKV, https://arxiv.org/abs/2504.04704",
    ),
    _policy(
        "rkv",
        "RKV",
        "Keeps the entries that the last queries attend to and whose keys are not like later ones.",
        "R-KV, https://arxiv.org/abs/2505.24133",
    ),
    _policy(
        "lsh",
        "Lsh",
        "Keeps the entries whose keys have the hash codes nearest to that of the last query.",
        "HashEvict, https://arxiv.org/abs/2412.16187",
    ),
    _policy(
        "random",
        "Random",
        "Keeps entries at random: the control.",
        "none; the hash is SplitMix64, https://doi.org/10.1145/2660193.2660195",
    ),
    _policy(
        "vatp",
        "Vatp",
        "Multiplies the attention score of a base policy by the norm of the value.",
        "VATP, https://arxiv.org/abs/2406.12335",
    ),
    _policy(
        "auto",
        "Auto",
        "CAOTE over H2O: lost least with uniform budgets of up to 25% of the text in this project's comparison.",
        "CAOTE, https://arxiv.org/abs/2504.14051",
    ),
    _policy(
        "caote",
        "Caote",
        "Keeps the entries whose eviction would change the attention output most, by the scores of a base policy.",
        "CAOTE, https://arxiv.org/abs/2504.14051",
    ),
    _policy(
        "dropkv",
        "DropKV",
        "Adds up the squared output error that the eviction of an entry would make for each of the last queries.",
        "DropKV, https://openreview.net/forum?id=MqfNzH3TVH",
    ),
    _policy(
        "criticalkv",
        "CriticalKV",
        "Keeps the best half by the scores of a base policy, the rest by them times the size of the projected value.",
        "CriticalKV, https://arxiv.org/abs/2502.03805",
    ),
    _policy(
        "defensive",
        "Defensive",
        "Keeps the entries with the most attention from any one of the last 32 queries, average-pooled over neighbors.",
        "DefensiveKV, https://arxiv.org/abs/2510.13334",
    ),
    _policy(
        "qfilters",
        "QFilters",
        "Keeps the entries whose keys point along the direction of their head's queries, found in a text beforehand.",
        "Q-Filters, https://arxiv.org/abs/2503.02812",
    ),
    _policy(
        "divprune",
        "DivPrune",
        "Keeps the entries whose keys are farthest apart.",
        "DivPrune, https://arxiv.org/abs/2503.02175",
    ),
)

_table: dict[str, AttentionInfo] = {info.name: info for info in BUILT_IN}
_entry_points_read = False


def list_attentions(kind: Kind | None = None) -> list[str]:
    """List the names of all registered methods, or those of one kind, in the order of registration.

    Raises
    ------
    UnknownNameError
        If `kind` is not core, mixer or eviction.
    """
    if kind is not None:
        _check_kind(kind)
    _read_entry_points()
    return [name for name, info in _table.items() if kind in (None, info.kind)]


def describe(name: str) -> AttentionInfo:
    """Return the registry entry of a method: its kind, options, capabilities and paper. It prints as text.

    Raises
    ------
    UnknownNameError
        If there is no such name; the message suggests the closest ones.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"there is no attention {short(name)}: a name is a string such as 'padre'")
    if name not in _table:
        _read_entry_points()
    if name not in _table:
        raise UnknownNameError(
            f"there is no attention {name!r}{_nearest(name, _table)} Registered: {', '.join(_table)}. {OWN_METHOD}"
        )
    return _table[name]


def register_attention(
    name: str,
    kind: Kind,
    target: str | type,
    *,
    summary: str = "",
    paper: str = "",
    capabilities: Capabilities | Mapping[str, bool] | None = None,
) -> AttentionInfo:
    """Register a method of your own, so that every function of attnzoo knows its name.

    A core is a class without trainable parameters whose instances are called as
    ``core(q, k, v, mask=, causal=, scale=, dropout=, softcap=)`` on ``(B, H, N, D)``; a mixer is an `nn.Module` built
    as ``Class(dim, num_heads, **options)`` and called ``mixer(x, grid=, prefix=, mask=)`` on ``(B, N, C)``; an eviction
    policy is a subclass of `attnzoo.eviction.policy.Policy`. Options are the keyword-only parameters of the class.

    Parameters
    ----------
    name, kind, target, summary, paper
        As in `AttentionInfo`; `target` may be the class or ``"package.module:Class"``.
    capabilities
        What it supports, as a `Capabilities` or a mapping of its fields, which changes the defaults. These are
        gradients and ``torch.compile`` for cores and mixers; for eviction policies what all of them support: causal
        models, masks, grouped queries and gradients.

    Raises
    ------
    AttnZooError
        If the name is taken, the kind or a capability is unknown, or the class does not meet the contract of its kind
        (a class given as a string is checked when it is first built).
    """
    _check_kind(kind)
    _read_entry_points()
    if not isinstance(name, str) or not name.strip():
        raise AttnZooError(f"an attention's name is a string with something in it, not {short(name)}")
    if name in _table:
        raise AttnZooError(
            f"the name {name!r} is taken by {_table[name].target!r}; choose another, or "
            f"free it first with attnzoo.unregister_attention({name!r})"
        )
    if not isinstance(target, str) and not callable(target):
        raise AttnZooError(f"target of {name!r} is a class or 'package.module:Class', not {short(target)}")
    if isinstance(target, str) and not all(target.partition(":")):
        raise AttnZooError(f"target of {name!r} must read 'package.module:Class', not {target!r}")
    if not isinstance(target, (str, type)):
        raise AttnZooError(f"target of {name!r} is a function; write a class whose instances are called like it")
    if not isinstance(capabilities, Capabilities):
        if not isinstance(capabilities, (Mapping, type(None))):
            raise OptionError(
                f"capabilities of {name!r} are a Capabilities or a mapping such as {{'mask': True}}, "
                f"not {short(capabilities)}"
            )
        known = {f.name for f in fields(Capabilities)}
        for key, value in (capabilities or {}).items():
            if key not in known:
                raise OptionError(f"there is no capability {key!r}{_nearest(key, known)}")
            if not isinstance(value, bool):
                raise OptionError(f"capability {key!r} is True or False, not {short(value)}")
        capabilities = replace(OF_POLICIES if kind == "eviction" else UNSAID, **(capabilities or {}))
    info = AttentionInfo(name, kind, target, summary, paper, capabilities)
    if isinstance(target, type):
        check_class(info)
    _table[name] = info
    return info


def unregister_attention(name: str) -> None:
    """Remove a method that `register_attention` added; built-in methods cannot be removed."""
    info = describe(name)
    if info in BUILT_IN:
        raise AttnZooError(f"{name!r} is built in and cannot be taken out")
    del _table[name]


def cores_with(capabilities: Iterable[str]) -> list[str]:
    """Names of the cores that have all of these fields of `Capabilities`, in the order of registration."""
    needed = list(capabilities)
    cores = [_table[name] for name in list_attentions("core")]
    return [info.name for info in cores if all(getattr(info.capabilities, field) for field in needed)]


def build_core(info: AttentionInfo, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Make the core that `info` names; it is called ``core(q, k, v, ...)``."""
    check_class(info)
    info.check_options(options)
    core = info.load()(**options)
    if isinstance(core, nn.Module) and next(itertools.chain(core.parameters(), core.buffers()), None) is not None:
        raise AttnZooError(f"{info.name!r} is registered as a core but has weights of its own: register it as a mixer")
    return core


def build_mixer(info: AttentionInfo, dim: int, num_heads: int, options: Mapping[str, Any]) -> nn.Module:
    """Make the mixer that `info` names for tokens of width `dim`."""
    check_class(info)
    info.check_options(options)
    info.require_options(options)
    return info.load()(dim, num_heads, **options)


def build_policy(info: AttentionInfo, options: Mapping[str, Any]) -> Policy:
    """Make the eviction policy that `info` names."""
    from attnzoo.eviction.policy import Policy

    check_class(info)
    info.check_options(options)
    info.require_options(options)
    policy = info.load()(**options)
    if not isinstance(policy, Policy):
        raise AttnZooError(
            f"{info.name!r} is registered as an eviction policy but is not an attnzoo.eviction.policy.Policy"
        )
    return policy


def create_attention(name: str, dim: int, num_heads: int, **options: Any) -> nn.Module:
    """Create a stand-alone self-attention module from any core or mixer.

    Call it as ``m(x, grid=(h, w), prefix=0, mask=None)``: `x` is ``(B, prefix + h * w, C)``, `mask` is ``(B, N)``, True
    for real tokens. Methods that need no grid may be called without one. A core gets projections of its own.
    `num_heads` must divide `dim` for cores and for mixers with heads (`sima`, `linear_angular`, and `padre` with
    ``channel_mixing="grouped"``); mixers without heads ignore it.

    Raises
    ------
    UnknownNameError, OptionError
        If a name or an option does not exist, or an option has an invalid value.
    UnsupportedError
        For an eviction policy: it bounds the cache of a language model and cannot stand alone.
    """
    from attnzoo.checks import check_int

    info = describe(name)
    check_int("dim", dim, minimum=1)
    check_int("num_heads", num_heads, minimum=1)
    if info.kind == "mixer":
        return build_mixer(info, dim, num_heads, options)
    if info.kind == "core":
        from attnzoo.cores.self_attention import SelfAttention

        return SelfAttention(dim, num_heads, build_core(info, options))
    raise UnsupportedError(
        f"{name!r} is an eviction policy: it bounds the cache of a language model and cannot stand alone; "
        f"use attnzoo.replace_attention(model, {name!r}, budget=...)"
    )


def _constructors(target: Callable[..., Any]) -> list[list[inspect.Parameter]]:
    """Parameters of a class's constructor, then of those that it hands ``**options`` on to."""
    made = [target]
    if isinstance(target, type):
        bases = [base for base in target.__mro__ if base not in (nn.Module, object)]
        made = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [target]
    found = []
    for function in made:
        parameters = list(inspect.signature(function).parameters.values())
        found.append(parameters)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return found


def _check_kind(kind: str) -> None:
    if not isinstance(kind, str) or kind not in get_args(Kind):
        raise UnknownNameError(f"there is no kind {short(kind)}; the kinds are {', '.join(get_args(Kind))}")


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in options.items()) or "none"


def _nearest(word: object, known: Iterable[str]) -> str:
    words = list(known)
    close = [w for w in words if w.lower() == str(word).lower()]
    close = close or difflib.get_close_matches(str(word), words, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else "."


def _read_entry_points() -> None:
    """Add what installed packages publish; one that cannot be read is warned about and left out."""
    global _entry_points_read
    if _entry_points_read:
        return
    _entry_points_read = True
    for point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            info = point.load()
            if not isinstance(info, AttentionInfo):
                raise TypeError(f"expected an AttentionInfo, got {type(info).__name__}")
            if info.name in _table:
                raise ValueError(f"the name {info.name!r} is taken")
            _table[info.name] = info
        except Exception as error:
            warnings.warn(f"attnzoo left out the entry point {point.name!r} ({point.value}): {error}", stacklevel=3)

"""One attention layer of a host model, and the modules that stand in its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from attnzoo.checks import refuse_tracing
from attnzoo.errors import ShapeError, UnsupportedError, short
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.scan import BoundedAttention
from attnzoo.registry import AttentionInfo, build_mixer, cores_with

if TYPE_CHECKING:
    from attnzoo.eviction.budgets import LayerShape

NOBODY = "attnzoo does not know this class"
Core = Callable[..., Tensor]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class HostOptions:
    """What a user says about the host rather than about the method, where the host itself does not know.

    Attributes
    ----------
    grid
        ``(h, w)`` of the tokens after the prefix.
    prefix
        Number of tokens before the grid.
    positions
        Whether a mixer gets tokens with their position added; of detectors, and of other callers of torch's attention
        that add it to queries and keys alone.
    """

    grid: tuple[int, int] | None = None
    prefix: int | None = None
    positions: bool | None = None

    def given(self) -> set[str]:
        """Names of what was said."""
        return {f.name for f in fields(self) if getattr(self, f.name) is not None}


@dataclass
class Site:
    """An attention layer. A host fills it in and says how a core or a mixer is put in its place.

    Attributes
    ----------
    path
        Name of the layer in the model.
    module
        The host's own module.
    host
        Name of the host.
    dim, num_heads
        Width of a token and number of query heads.
    needs
        Fields of `Capabilities` that a core must have here.
    no_mixer
        Why no mixer can stand here, or None.
    prefix
        Number of prefix tokens, as far as the host knows.
    tokens
        Number of tokens of every call, prefix included; None where it differs from call to call, or is not known.
    note
        Why an eviction swap leaves this layer out (a sliding window bounds its cache already); empty if it does not.
    """

    path: str
    module: Any  # an nn.Module whose attributes are its library's business
    host: str
    dim: int = 0
    num_heads: int = 0
    needs: dict[str, str] = field(default_factory=dict)
    no_mixer: str | None = None
    prefix: int = 0
    tokens: int | None = None

    note: str = ""

    @property
    def shape(self) -> LayerShape | None:
        """What the layer keeps of a token, once an eviction policy was tried here; None if that could not be told."""
        return None

    @property
    def accepted_options(self) -> frozenset[str]:
        """Which fields of `HostOptions` a user may give here."""
        return frozenset()

    def problem(self, info: AttentionInfo, core: AttentionInfo | None = None) -> str | None:
        """Say why `info` cannot stand here, or give None. `core` is the core under an eviction policy."""
        if "forward" in vars(self.module):
            return "its forward was replaced on the object itself, so that a substitute's would be hidden"
        if info.kind == "mixer":
            return self.no_mixer or self.mixer_problem(info)
        if info.kind == "eviction":
            return self.eviction_problem() or (None if core is None else self.core_problem(core, option="core="))
        return self.core_problem(info)

    def core_problem(self, info: AttentionInfo, option: str = "") -> str | None:
        """Say why the core `info` cannot stand here, and which can, or give None.

        `option` stands before the name of a core that can: how a user asks for it.
        """
        if is_parametrized(self.module):
            return "its weights are parametrized (torch.nn.utils.parametrize), which changes the module's class"
        for capability, why in self.needs.items():
            if not getattr(info.capabilities, capability):
                return f"{why}, which {info.name!r} cannot do{_able(self.needs, option)}"
        return None

    def eviction_problem(self) -> str | None:
        """Say why no eviction policy can stand here, or give None."""
        return f"it has no key/value cache to bound: eviction is for causal models of transformers, not {self.host}"

    def policy_problem(self, policy: Policy) -> str | None:
        """Say why this policy cannot stand here though others might, or give None."""
        return None

    def mixer_problem(self, info: AttentionInfo) -> str | None:
        """Say why this mixer cannot stand here though others might, or give None."""
        return None

    def count_problem(self, tokens: Any) -> str | None:
        """Say why a mixer made for so many tokens (its option `tokens`) cannot stand here, or give None."""
        if type(tokens) is not int or self.tokens in (None, tokens):
            return None
        told = f", {self.prefix} of them before the grid" if self.prefix else ""
        return f"it has {self.tokens} tokens{told}, and the mixer would be made for {tokens}: give tokens={self.tokens}"

    @classmethod
    def try_together(cls, sites: Sequence[Site], info: AttentionInfo) -> dict[str, str]:
        """Try `info` at all of `sites` at once, where no single one has a problem; say what is wrong, by path."""
        return {}

    def put_core(self, core: Core) -> nn.Module:
        """Make the module that runs `core` on the host's own weights."""
        raise TypeError(f"{type(self).__name__} takes no core")

    def put_bounded(self, attention: BoundedAttention) -> nn.Module:
        """Make the module that attends through a bounded cache."""
        raise TypeError(f"{type(self).__name__} takes no eviction policy")

    def put_mixer(self, mixer: nn.Module) -> nn.Module:
        """Make the module that runs `mixer` in the host's place."""
        raise TypeError(f"{type(self).__name__} takes no mixer")

    def call_alone(self, x: Tensor) -> Tensor:
        """Call the host's own module with rows of one token each, ``(B, 1, C)``; give what it makes of them."""
        out: Tensor = self.module(x)
        return out

    def installed(self, layer: nn.Module) -> None:
        """Do what the host needs once `layer` stands in the model (a hook that reads the grid, say)."""

    def removed(self) -> None:
        """Undo `installed`."""

    def build_mixer(self, info: AttentionInfo, options: Mapping[str, Any]) -> nn.Module:
        """Build the mixer for this layer, on the device and in the dtype of the host's weights."""
        options = dict(options)
        if "mix_prefix" in info.options:
            options.setdefault("mix_prefix", self.prefix > 0)
        mixer = build_mixer(info, self.dim, self.num_heads, options)
        like = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        return mixer if like is None else mixer.to(device=like.device, dtype=like.dtype)


@dataclass
class RefusedSite(Site):
    """A layer that is attention, but where nothing can stand."""

    reason: str = ""
    standing: bool = False
    """Whether it is known by what it does alone: a swap of a whole model goes round it, and says so."""

    def __init__(self, path: str, module: nn.Module, host: str, reason: str, standing: bool = False) -> None:
        super().__init__(path, module, host)
        self.reason, self.standing = reason, standing

    def problem(self, info: AttentionInfo, core: AttentionInfo | None = None) -> str:
        """Say why."""
        return self.reason


class CoreLayer(nn.Module):
    """Base of modules that run a core on the parameters of a host's attention.

    It shares the host module's parameters, buffers, children, hooks and attributes: the same objects in the same
    dictionaries, so what changes one (an optimizer, a LoRA adapter, a move to another device) changes both, and the
    keys of the state dict stay as they are.
    """

    core: Core

    if TYPE_CHECKING:  # what the host's class has, this has

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def over(cls, module: nn.Module, core: Core) -> Self:
        """Make the module that stands over `module`."""
        layer = share_state(module, cls)
        layer.__dict__["core"] = core  # a core that is a module must not become a child: the children are shared
        return layer

    def extra_repr(self) -> str:
        """Name the core."""
        return f"core={self.core}"


def share_state(module: nn.Module, cls: type[M]) -> M:
    """Make a module of class `cls` on the same dictionaries as `module`."""
    layer = cls.__new__(cls)
    layer.__dict__.update(module.__dict__)
    layer.__dict__.pop("_compiled_call_impl", None)  # module.compile() would lead back to the host's own forward
    return layer


class MixerLayer(nn.Module):
    """Base of modules that run a mixer where a host's attention stood.

    The host's own module is kept outside `parameters()` and the state dict (in the layer's `Swapped` record), but
    follows moves, copies and `train()`.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def mix_tokens(self, x: Tensor, **given: Any) -> Tensor:
        """Call the mixer on tokens ``(B, N, C)``; `given` is what else the host tells it: grid, prefix, mask.

        Raises
        ------
        ShapeError
            If what it gives is not ``(B, N, C)``: a residual connection would broadcast it without a word.
        """
        refuse_tracing()
        return self.checked(x, self.mixer(x, **given))

    def checked(self, x: Tensor, out: Any) -> Tensor:
        """Give `out`, the mixer's output for tokens `x`, back if it is of their shape, else raise `ShapeError`."""
        if not isinstance(out, Tensor) or out.shape != x.shape:
            record = swapped_record(self)
            name = type(self.mixer).__name__ if record is None else record.info.name
            given = str(tuple(out.shape)) if isinstance(out, Tensor) else short(out)
            raise ShapeError(
                f"the mixer {name!r} gave {given} for tokens of shape {tuple(x.shape)}; a mixer maps (B, N, C) to a "
                "tensor of the same shape"
            )
        return out

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        original = original_of(self)
        if original is not None:
            original._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        from attnzoo.hosts import saving

        super()._save_to_state_dict(destination, prefix, keep_vars)
        saving.mark_saved()

    def train(self, mode: bool = True) -> Self:
        """Set the mode here and on the kept original."""
        super().train(mode)
        original = original_of(self)
        if original is not None:
            original.train(mode)
        return self


@dataclass(frozen=True)
class Swapped:
    """What a swap leaves on each layer it put in place, under the attribute ``attnzoo_swap``.

    Attributes
    ----------
    info, options
        The method and the options given for it, those about the host (`HostOptions`) among them.
    host, host_class
        The library and the class of the host's own module.
    original
        The host's own module; None if it was not kept.
    parameters_before, parameters_after, reused
        Numbers of parameters: of the host's own module, of this one, and those that both share.
    shape
        What the layer keeps of a token under an eviction policy, where that can be told.
    """

    info: AttentionInfo
    options: dict[str, Any]
    host: str
    host_class: str
    original: nn.Module | None
    parameters_before: int
    parameters_after: int
    reused: int
    shape: LayerShape | None = None


def swapped_record(module: nn.Module) -> Swapped | None:
    """Give what a swap left on `module`, or None if it is the host's own."""
    return vars(module).get("attnzoo_swap")


def original_of(module: nn.Module) -> nn.Module | None:
    """Give the host's own module that `module` stands for, if it was kept."""
    record = swapped_record(module)
    return None if record is None else record.original


def ancestors(path: str) -> list[str]:
    """Paths of the modules that hold `path`, nearest first, ending with the model itself."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def refuse_unable(layer: Any, **asked: bool) -> None:
    """Raise `UnsupportedError` if a call asks of a swapped layer what its attention is not capable of."""
    refuse_tracing()
    info: AttentionInfo = layer.attnzoo_swap.info
    for capability, is_asked in asked.items():
        if is_asked and not getattr(info.capabilities, capability):
            advice = _able([name for name, needed in asked.items() if needed]) if info.kind == "core" else ""
            raise UnsupportedError(f"this call needs {capability!r}, which {info.name!r} cannot do{advice}")


def _able(capabilities: Iterable[str], option: str = "") -> str:
    """Which cores have all of `capabilities`, as the end of a sentence; empty where none has."""
    names = " or ".join(f"{option}{name!r}" for name in cores_with(capabilities))
    return f"; {names} can" if names else ""


_CHANNELS = re.compile(r"(Light|Simple)?(Channel|Spatial|Coord|Strip|Split|SelectiveKernel|EfficientLocal)Attn")


def looks_like_attention(module: nn.Module) -> bool:
    """Whether the name of the class, or of one it inherits from, says attention over tokens (not over channels)."""
    names = [base.__name__ for base in type(module).__mro__]
    return any(re.search(r"attention|attn", n, re.IGNORECASE) and not _CHANNELS.fullmatch(n) for n in names)


def comes_from(module: nn.Module, package: str) -> bool:
    """Whether the class of `module`, or one it inherits from, belongs to `package`."""
    return any(base.__module__.partition(".")[0] == package for base in type(module).__mro__)

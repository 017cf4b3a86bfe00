"""A causal mixer in place of a decoder's attention, its state in the model's cache.

The mixer gives its state away and takes it back (`mixer.extend(x, state, mask) -> (out, state)`), so that whatever
happens to the cache (beams, copies, rows chosen) happens to the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnzoo.errors import UnsupportedError
from attnzoo.eviction.calls import CALL, Call
from attnzoo.eviction.layers import Maker, SwappedCacheLayer
from attnzoo.eviction.size import CacheBytes
from attnzoo.hosts.site import MixerLayer


@dataclass(frozen=True)
class MakesState:
    """Makes a `StateLayer`; `mixer` says for which."""

    mixer: str

    @property
    def name(self) -> str:
        """The mixer's class."""
        return self.mixer.partition("(")[0]

    def __call__(self, index: int) -> StateLayer:
        """Make an empty one."""
        return StateLayer(self)

    def mismatch(self, other: Maker) -> str:
        """Another mixer, or none."""
        return "" if self == other else f"{other}, and the model has {self}"

    def __str__(self) -> str:
        return self.mixer


class StateLayer(SwappedCacheLayer):
    """What a causal mixer remembers of a sequence.

    Attributes
    ----------
    states
        Tensors ``(B, ...)``; none before the first call.
    """

    keys = values = None

    def __init__(self, maker: MakesState) -> None:
        super().__init__(maker)
        self.made_by = maker
        self.states: tuple[Tensor, ...] = ()

    @property
    def is_initialized(self) -> bool:
        """Whether anything was put in."""
        return bool(self.states)

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first call."""
        return len(self.states[0]) if self.states else -1

    def bytes(self) -> CacheBytes:
        """Bytes of the state: there are no entries."""
        held = sum(state.numel() * state.element_size() for state in self.states)
        return CacheBytes(0, held, sum(state.untyped_storage().nbytes() for state in self.states))

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys and values: the layer belongs to a mixer.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise UnsupportedError(
            f"this cache holds the state of a mixer ({self.maker}) and can only be used by a model swapped in the same "
            "way; give this model its own cache"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.columns, self.torn = (), 0, False

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows."""
        self.states = tuple(change(state) for state in self.states)

    def copy(self) -> StateLayer:
        """A layer of its own with the same content."""
        other = StateLayer(self.made_by)
        other.states = tuple(state.detach().clone() for state in self.states)
        other.columns, other.torn = self.columns, self.torn
        return other


class DecoderMixer(MixerLayer):
    """A causal mixer, called as a decoder calls its attention."""

    def __init__(self, mixer: nn.Module, host: Any) -> None:
        super().__init__(mixer)
        self.layer_idx = host.layer_idx
        size = sum(parameter.numel() for parameter in mixer.parameters())
        said = f"{type(mixer).__name__}({mixer.extra_repr()}), {size:,} parameters"
        self.__dict__["attnzoo_cache"] = MakesState(said)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Mix ``(B, N, C)``; the rotary embedding and the mask of the model are not read.

        Raises
        ------
        UnsupportedError
            If the hook did not see the call.
        """
        call = kwargs.get(CALL)
        if not isinstance(call, Call):
            raise UnsupportedError(
                "this layer was called without its model: call the model that holds it, so that padding and cache are "
                "known"
            )
        if call.cache is None:
            return self.mix_tokens(hidden_states, mask=call.real), None
        layer: Any = call.cache.layers[self.layer_idx]
        mixer: Any = self.mixer
        layer.torn = True
        out, states = mixer.extend(hidden_states, layer.states or None, call.real)
        out, layer.states = self.checked(hidden_states, out), states
        layer.columns += hidden_states.shape[1]
        layer.torn = False
        return out, None

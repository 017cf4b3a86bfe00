"""Try a swap of a decoder's layers, before the model is changed, on a copy whose weights take no memory.

What a model does with its cache is not to be read from its code: some make a cache of their own, some put other keys
into it than they attend to, some make masks for their layers that a hook cannot read. So the swap is tried: a model of
the same class and config, on PyTorch's meta device, is swapped and called twice, for a prompt and for a token more.
Where a model looks at numbers on its way (and so cannot run on meta), its weights are zeros that share one number's
memory. The user's model is neither called nor copied, and no random number is drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from attnzoo.errors import AttnZooError
from attnzoo.hosts import versions

Put = Mapping[str, Callable[[nn.Module, nn.Module], nn.Module]]
"""What makes the substitute at each path, of the twin and of its layer there."""

TOKENS = (3, 1)  # of a prompt, and of the call after it
ON_CPU = 20_000_000_000  # parameters that a twin may have to be called on the CPU: some seconds


@dataclass
class Twin:
    """A model of the class and the config of another, to try calls on.

    Attributes
    ----------
    model
        The twin.
    device
        Where its calls run: meta, or the CPU.
    """

    model: Any
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """A twin of `model` that can be called with its own attention; None if there is none.

        Models whose class takes more than a config, or that are called with more than tokens, have none.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                with torch.device("meta"):
                    made = type(model)(copy.deepcopy(model.config)).eval().requires_grad_(False)
                twin = cls(made.to(torch.bfloat16), torch.device("meta"))  # in which every operator runs on meta
                if twin.error() is None:
                    return twin
                on_cpu = twin.on_cpu()
                return on_cpu if on_cpu is not None and on_cpu.error() is None else None
        except Exception:  # whatever keeps a class from being built or called so
            return None

    def error(self, put: Put | None = None) -> str | None:
        """Call the twin with substitutes at some paths, and say what goes wrong; None if nothing does."""
        error = self._error(put)
        if put and error is not None and self.device.type == "meta" and "meta" in error:  # a number was looked at
            twin = self.on_cpu()
            error = None if twin is None else twin._error(put)
            return error if twin is not None and error is not None and twin._error() is None else None
        return error

    def on_cpu(self) -> Self | None:
        """The same with weights that are zeros, all in one place of the memory; None for a model too large to call."""
        if sum(parameter.numel() for parameter in self.model.parameters()) > ON_CPU:
            return None
        zeros = copy.deepcopy(self.model)._apply(lambda x: torch.zeros((), dtype=_dtype(x.dtype)).expand(x.shape))
        return type(self)(zeros, torch.device("cpu"))

    def _error(self, put: Put | None = None) -> str | None:
        originals = {path: self.model.get_submodule(path) for path in put or {}}
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                for path, original in originals.items():
                    self.model.set_submodule(path, (put or {})[path](self.model, original))
                self._call()
        except AttnZooError as error:
            return str(error)
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            return f"a cached call fails ({type(error).__name__}: {said[0]})"
        finally:
            for path, original in originals.items():
                self.model.set_submodule(path, original)
        return None

    def _call(self) -> None:
        cache: dict[str, Any] = {}
        for tokens in TOKENS:
            ids = torch.ones(1, tokens, dtype=torch.long, device=self.device)
            output = self.model(input_ids=ids, use_cache=True, **cache)
            cache = versions.cache_arguments(self.model, versions.output_cache(output))


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Give zeros ``(B, H, N, Dv)``: a core that attends to nothing, on any device."""
    return q.new_zeros(*q.shape[:3], v.shape[3])


class PassOn(nn.Module):
    """A causal mixer that mixes nothing, to try the calls of a mixer."""

    def extend(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Give the tokens back; the state is the last of them."""
        return x, (x[:, -1:],)


def _dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype

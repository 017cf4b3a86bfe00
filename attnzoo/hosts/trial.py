"""Try a swap of a decoder's layers, before the model is changed, on a copy whose weights take no memory.

What a model does with its cache is not to be read from its code: some make a cache of their own, some put other keys
into it than they attend to, some make masks for their layers that a hook cannot read. So the swap is tried: a model of
the same class and config, on PyTorch's meta device, is swapped and called twice, for a prompt and for a token more.
Where that fails, it is tried again on the CPU, with weights that are zeros and share one number's memory: a model may
look at numbers on its way, which meta has not. A small model is tried on the CPU first, which gives the same verdict
sooner, for PyTorch computes meta's shapes in Python. The user's model is neither called nor copied, and no random
number is drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from attnzoo.errors import AttnZooError
from attnzoo.eviction import calls
from attnzoo.hosts import versions

Put = Mapping[str, Callable[[nn.Module, nn.Module], nn.Module]]
"""What makes the substitute at each path, of the twin and of its layer there."""

TOKENS = (3, 1)  # of a prompt, and of the call after it
SMALL = 10_000_000  # parameters, with which whatever a model computes on the CPU is quick


class UntriedError(Exception):
    """A trial that says nothing: the copy cannot be built, or cannot be called with its own attention either."""


class Twin:
    """A model of the class and the config of another, to try calls on.

    Attributes
    ----------
    model
        The twin.
    device
        Where its calls run: meta, or the CPU.
    """

    def __init__(self, make: Callable[[], Any], device: str, small: bool = False) -> None:
        self._make, self.device, self._small = make, torch.device(device), small

    @cached_property
    def model(self) -> Any:
        """Made when it is first called."""
        return self._make()

    @classmethod
    def of(cls, model: Any) -> Self:
        """A twin of `model`, on meta.

        Raises
        ------
        UntriedError
            If its class takes more than a config.
        """
        small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL
        twin = cls(partial(_built, type(model), model.config), "meta", small)
        _ = twin._on_cpu.model if small else twin.model  # whether it can be made
        return twin

    def error(self, put: Put) -> str | None:
        """Call the twin with substitutes at some paths, and say what goes wrong; None if nothing does.

        Raises
        ------
        UntriedError
            If it goes wrong with its own attention too.
        """
        if self._small and self._on_cpu._error(put) is None:
            return None
        error = self._error(put)
        if error is None:
            return None
        if self.device.type == "meta":
            try:
                return self._on_cpu.error(put)
            except UntriedError:  # some operators take no weights that share their memory
                if self._works:
                    return error
                raise
        if not self._works:
            raise UntriedError
        return error

    @cached_property
    def _works(self) -> bool:
        """Whether it can be called with its own attention."""
        return self._error({}) is None

    @cached_property
    def _on_cpu(self) -> Self:
        """The same with weights that are zeros, all in one place of the memory."""
        return type(self)(lambda: self._make()._apply(_zeros), "cpu")

    def _error(self, put: Put) -> str | None:
        originals = {path: self.model.get_submodule(path) for path in put}
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), _ZeroLinear(), torch.no_grad():
                for path, original in originals.items():
                    self.model.set_submodule(path, put[path](self.model, original))
                self._call()
        except AttnZooError as error:
            return str(error)
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            return f"a cached call fails ({type(error).__name__}: {said[0]})"
        finally:
            for path, original in originals.items():
                self.model.set_submodule(path, original)
            for module in self.model.modules():
                calls.drop_hook(module)
        return None

    def _call(self) -> None:
        given: dict[str, Any] = {}
        for tokens in TOKENS:
            ids = torch.ones(1, tokens, dtype=torch.long, device=self.device)
            output = self.model(input_ids=ids, use_cache=True, **given)
            given = versions.cache_arguments(self.model, versions.output_cache(output))


class _ZeroLinear(TorchFunctionMode):
    """Spare the multiplication by weights that are zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and len(args) >= 2:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], len(weight))
        return func(*args, **(kwargs or {}))


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Give zeros ``(B, H, N, Dv)``: a core that attends to nothing, on any device."""
    return q.new_zeros(*q.shape[:3], v.shape[3])


class Attend:
    """`attend`, which notes what heads it is given.

    Attributes
    ----------
    seen
        Query heads, key/value heads, width of keys and of values of the first call; None before it.
    """

    seen: tuple[int, int, int, int] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Give zeros ``(B, H, N, Dv)``."""
        self.seen = self.seen or (q.shape[1], k.shape[1], k.shape[3], v.shape[3])
        return attend(q, k, v, **options)


class PassOn(nn.Module):
    """A causal mixer that mixes nothing, to try the calls of a mixer."""

    def extend(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Give the tokens back; the state is the last of them."""
        return x, (x[:, -1:],)


def _built(kind: type[Any], config: Any) -> Any:
    """A model of a class and a config, on meta."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = kind(copy.deepcopy(config))
    except Exception as error:  # whatever a class of somebody else's raises
        raise UntriedError from error
    return made.eval().requires_grad_(False).to(torch.bfloat16)  # in it, every operator runs on meta


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32 if x.dtype == torch.bfloat16 else x.dtype).expand(x.shape)

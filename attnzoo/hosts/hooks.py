"""Hooks that a swap leaves on modules round the swapped layers.

A part of a model can be restored by itself (``restore_attention(vit.blocks)``), and nothing there leads to the modules
round it. So a hook takes itself off, at the next call, where nothing that was swapped is left to need it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from attnzoo.hosts.site import swapped_record


class Listening:
    """What a layer keeps as long as it reads what a hook writes."""


class CallHook:
    """Base of the hooks that tell layers something of the call under way."""

    def __init__(self) -> None:
        self._listening: weakref.ref[Listening] | None = None

    def listen(self) -> Listening:
        """Give what a layer keeps as long as it reads this hook."""
        listening = self._heard() or Listening()
        self._listening = weakref.ref(listening)
        return listening

    def leave_unheard(self, module: nn.Module) -> bool:
        """Take this hook off `module` if no layer reads it any more; say whether it was."""
        if torch.compiler.is_compiling() or self._heard() is not None:
            return False
        take_off(module, type(self))
        return True

    def _heard(self) -> Listening | None:
        return None if self._listening is None else self._listening()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_listening": self._heard()}  # a copy is read by the copies of the layers

    def __setstate__(self, state: dict[str, Any]) -> None:
        listening = state["_listening"]
        vars(self).update(state, _listening=None if listening is None else weakref.ref(listening))


def take_off(module: nn.Module, kind: type) -> None:
    """Take the forward pre-hooks of a kind, or that are methods of one, off a module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", hook), kind):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def holds_swapped(module: nn.Module) -> bool:
    """Whether a swapped layer stands in `module`."""
    return any(swapped_record(inner) is not None for inner in module.modules())

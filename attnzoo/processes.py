"""Commands that a launcher starts in several processes; import it before the processes meet."""

from __future__ import annotations

import gc
import os
from typing import TypeVar

import torch

from attnzoo.errors import ConfigError

if torch.distributed.is_available():
    import torch.distributed.nn  # imported later, its functions' defaults would hold the group for ever

T = TypeVar("T")


def from_main(value: T) -> T:
    """What the main process gives, in all processes; they wait for it. To be called once the processes have met."""
    shared = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared)
    return shared[0]


def refuse_launcher(instead: str = "start it without a launcher") -> None:
    """Raise `ConfigError` in a process that torchrun or Accelerate started beside others, for work that is not shared.

    `instead` is what to do.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdecimal() and int(count) > 1:
        raise ConfigError(f"a launcher started {count} processes, which would all do the same work; {instead}")


def leave() -> None:
    """Leave the other processes, where there are any, after work that went well and is out of scope.

    What still holds the group, such as a wrapped model in a cycle of references, keeps its threads alive, and one of
    them that wants to free a tensor while the interpreter ends aborts the process. So garbage is collected first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()

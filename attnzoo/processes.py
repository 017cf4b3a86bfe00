"""Commands that a launcher starts in several processes; import it before the processes meet."""

from __future__ import annotations

import gc

import torch

if torch.distributed.is_available():
    import torch.distributed.nn  # imported later, its functions' defaults would hold the group for ever


def leave() -> None:
    """Leave the other processes, where there are any, after work that went well and is out of scope.

    What still holds the group, such as a wrapped model in a cycle of references, keeps its threads alive, and one of
    them that wants to free a tensor while the interpreter ends aborts the process. So garbage is collected first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()

"""Random numbers by key: what is drawn for a step or an image hangs on seed and place alone, never on what came before.

So a training that was broken off goes on as if it had not been, whatever the number of its data workers.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A seed of 63 bits for a tuple of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def reseed(*key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, from which timm's augmentation and dropout draw."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

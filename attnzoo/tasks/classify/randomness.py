"""Random numbers by key: what is drawn for a step or an image depends on seed and place, never on what came before.

So an interrupted training resumes as if it had not been interrupted, whatever the number of its data workers.
"""

from __future__ import annotations

import random

import numpy as np
import torch

ORDER, AUGMENT, SUBSET, STEP = 1, 2, 3, 4  # keys that keep the random numbers of different purposes apart


def seed_of(*key: int) -> int:
    """A seed of 63 bits for a tuple of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def reseed(*key: int) -> int:
    """Seed the CPU's generators of Python, NumPy and PyTorch, from which timm's augmentation draws; give the seed.

    `torch.manual_seed` would seed other devices' too, and take a hundred times as long.
    """
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    return seed

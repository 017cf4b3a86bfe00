"""Hooks for mmengine's Runner."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import set_random_seed


@HOOKS.register_module()
class SeedEachEpoch(Hook):
    """Seed Python, NumPy and PyTorch again at the beginning of every epoch.

    mmengine's checkpoints hold no random state. With this, and data read in the process itself (``num_workers=0``), a
    run that was interrupted and resumed ends with exactly the weights of one that was not.
    """

    def before_train_epoch(self, runner: Any) -> None:
        """Seed by the run's seed, the epoch and the process."""
        sequence = np.random.SeedSequence([runner.seed, runner.epoch, runner.rank])
        set_random_seed(int(sequence.generate_state(1)[0]))

"""How a repair is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.checks import check_choice, check_int, check_number
from attnzoo.errors import OptionError, short

OBJECTIVES = ("layer", "model")
TRAINED = ("mixers", "all")
Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class RepairOptions:
    """How a repair is done; see `attnzoo.repair`."""

    steps: int
    objective: str = "layer"
    layers: str | Sequence[str] = "all"
    train: str = "mixers"
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    loss: Loss | None = None
    forward: Forward | None = None
    seed: int = 0
    autocast: torch.dtype | None = None
    accelerator: Any = None

    def __post_init__(self) -> None:
        check_int("seed", self.seed, minimum=0)
        check_int("steps", self.steps, minimum=1)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("train", self.train, TRAINED)
        for name in ("lr", "weight_decay", "clip", "hidden"):
            check_number(name, getattr(self, name), minimum=0)
        check_number("warmup", self.warmup, minimum=0, maximum=1)
        check_number("temperature", self.temperature, minimum=1e-3)
        if self.objective == "layer" and (self.train == "all" or self.hidden or self.loss is not None):
            raise OptionError("train, hidden and loss are for objective='model'; objective='layer' fits mixers alone")
        patterns = self.layers if isinstance(self.layers, (list, tuple)) else [self.layers]
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise OptionError(f"layers must be 'all', or a pattern or a list of patterns, not {short(self.layers)}")
        if self.autocast not in (None, torch.bfloat16):
            raise OptionError(f"autocast must be torch.bfloat16 or None, not {short(self.autocast)}")
        self._check_accelerator()

    def _check_accelerator(self) -> None:
        if self.accelerator is None:
            return
        if self.autocast is not None:
            raise OptionError("autocast and accelerator exclude one another: give mixed_precision to the Accelerator")
        if self.accelerator.scaler is not None:
            raise OptionError("an accelerator with mixed_precision='fp16' is not supported: use 'bf16'")
        if self.accelerator.gradient_accumulation_steps != 1:
            raise OptionError("an accelerator with gradient_accumulation_steps is not supported: each batch is a step")

"""attnzoo: swap the attention of a model in one line, and measure what the swap costs and saves."""

from typing import Any

from attnzoo.errors import AttnZooError
from attnzoo.eviction.size import CacheBytes, kv_bytes
from attnzoo.registry import (
    AttentionInfo,
    Capabilities,
    create_attention,
    describe,
    list_attentions,
    register_attention,
    unregister_attention,
)
from attnzoo.repairing.repair import repair
from attnzoo.repairing.report import RepairReport
from attnzoo.repairing.sensitivity import SensitivityReport, sensitivity
from attnzoo.saving import load, save
from attnzoo.swap import SwapReport, replace_attention, restore_attention, swap_report
from attnzoo.visual_tokens import prune_visual_tokens
from attnzoo.weights import load_weights

__version__ = "0.1.0"

__all__ = [
    "AttentionInfo",
    "AttnZooError",
    "CacheBytes",
    "Capabilities",
    "RepairReport",
    "SensitivityReport",
    "SwapReport",
    "create_attention",
    "describe",
    "kv_bytes",
    "list_attentions",
    "load",
    "load_cache",
    "load_weights",
    "prune_visual_tokens",
    "register_attention",
    "repair",
    "replace_attention",
    "restore_attention",
    "save",
    "sensitivity",
    "swap_report",
    "unregister_attention",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "load_cache":  # it needs transformers
        from attnzoo.eviction.cache import load_cache

        return load_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

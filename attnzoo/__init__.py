"""attnzoo: swap the attention of a real model in one line and see, honestly, what it buys."""

from attnzoo.errors import AttnZooError
from attnzoo.registry import (
    AttentionInfo,
    Capabilities,
    create_attention,
    describe,
    list_attentions,
    register_attention,
    unregister_attention,
)
from attnzoo.swap import SwapReport, replace_attention, restore_attention, swap_report

__version__ = "0.1.0"

__all__ = [
    "AttentionInfo",
    "AttnZooError",
    "Capabilities",
    "SwapReport",
    "create_attention",
    "describe",
    "list_attentions",
    "register_attention",
    "replace_attention",
    "restore_attention",
    "swap_report",
    "unregister_attention",
]

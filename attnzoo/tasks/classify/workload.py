"""What is timed of vision models: every attention of a config in every workload that it lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import PositiveInt
from torch import nn

from attnzoo.bench.attentions import AttentionConfig, row_of
from attnzoo.bench.config import RunConfig, Section, Seed
from attnzoo.bench.task import Cell
from attnzoo.tasks.classify.build import build_host
from attnzoo.tasks.classify.cost_config import BaselineConfig, CostConfig, HostConfig, Size

PART = "vision"


class Workload(Section):
    """All that the cost of one row depends on: an attention (None: the host's own) in a host, on images of one size.

    `fused` says whether its dense baseline is the host's own fused kernel.
    """

    host: HostConfig
    attention: AttentionConfig | None
    cost: CostConfig
    tokens: PositiveInt
    pixels: tuple[PositiveInt, PositiveInt]
    batch: PositiveInt
    fused: bool
    seed: Seed
    device: str

    def build(self, more: Mapping[str, Any] | None = None) -> nn.Module:
        """Build the host with its own attention, in evaluation mode; the same weights every time.

        `more` are further options of the host.
        """
        height, width = self.pixels
        size = height if height == width else self.pixels
        return build_host(self.host, size, self.seed, self.fused, more or {}).eval()


def cost_cells(
    config: RunConfig,
    costs: Sequence[CostConfig],
    host: HostConfig,
    baseline: BaselineConfig,
    attentions: Sequence[AttentionConfig],
    *,
    named: bool,
) -> list[Cell]:
    """Give a cell for each attention in each workload, the dense baseline first.

    Raises `ConfigError` if the host's patches do not divide an image.

    An attention is timed at its own `tokens` alone, where it has them. With `named`, rows say their workload in words,
    because there may be several with as many tokens.
    """
    cells = []
    for cost in costs:
        for size in cost.sizes(host.patch_size):
            timed = [one for one in attentions if one.tokens is None or size.tokens in one.tokens]
            for attention in [None, *timed] if timed or not attentions else []:
                own = None if attention is None else attention.fused
                workload = Workload(
                    host=host,
                    attention=attention,
                    cost=cost,
                    **size._asdict(),
                    fused=baseline.fused if own is None else own,
                    seed=config.seed,
                    device=config.used_device,
                )
                words = _words(cost, size) if named else ""
                cells.append(_cell(workload, row_of(attention, baseline.label, PART), config.threads, words))
    return cells


def _words(cost: CostConfig, size: Size) -> str:
    """A workload in words, but for its tokens and its phase."""
    height, width = size.pixels
    told = {
        f"batch {size.batch}": True,
        f"{height} x {width} pixels": height != width,
        cost.dtype: cost.dtype != "float32",
        "first attention layer alone": cost.of == "layer",
        "freed memory kept": cost.keep_freed_memory,
    }
    return ", ".join(word for word, said in told.items() if said)


def _cell(workload: Workload, whose: Mapping[str, Any], threads: int | None, words: str) -> Cell:
    cost, host, tokens = workload.cost, workload.host, workload.tokens
    alone = ", its first attention layer alone" if cost.of == "layer" else ""
    how = cost.model_dump(mode="json", exclude={"tokens", "image_sizes", "batch", "timeout_seconds"})
    return Cell(
        **whose,
        kind="cost",
        tokens=tokens,
        workload=words,
        phases=("training",) if cost.gradient else ("forward",),
        host=f"{host.library}:{host.name}{alone}",
        dtype=cost.dtype,
        scope=cost.of,
        depends_on={
            **workload.model_dump(mode="json", exclude={"attention", "cost"}),
            "cost": how,
            "threads": threads,
            "attention": whose["attention"],
            "options": whose["options"],
        },
        asks={"workload": workload.model_dump(mode="json")},
        stage="time",
        timeout=cost.timeout_seconds,
        threads=threads,
        weight=3 + tokens / 500 + (tokens / 1000) ** 2,
    )

"""The config of a benchmark of operations."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from attnzoo.bench.config import Dtype, RunConfig, Section
from attnzoo.checks import not_square


class PairCase(Section):
    """Two depthwise convolutions and their product, on a square grid of side `grid`; `tokens` of the batch in all."""

    op: Literal["pair"]
    grid: PositiveInt
    kernel: PositiveInt = 11
    backward: bool = False

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"pair {self.kernel}x{self.kernel}, {self.grid}x{self.grid}{_both(self.backward)}"


class ChainCase(Section):
    """Sums of products of two, with one weight per channel and a bias: PADRe's products."""

    op: Literal["chain"]
    products: PositiveInt = 1
    plain: Annotated[int, Field(ge=0)] = 0
    weighted: bool = False
    backward: bool = False

    @property
    def label(self) -> str:
        """What tables call it."""
        terms = self.plain + self.products
        return f"chain of {terms} term{'s' if terms > 1 else ''}{_both(self.backward)}"


class ModuleCase(Section):
    """One attention layer with PADRe beside timm's, with each fused backend of PyTorch or with none."""

    op: Literal["module"]
    tokens: PositiveInt
    degree: PositiveInt = 2
    beside: Literal["fused", "unfused"] = "fused"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"padre degree={self.degree}, {self.tokens:,} tokens, to {self.beside}"

    @model_validator(mode="after")
    def _square(self) -> ModuleCase:
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens {not_square(self.tokens)}, as images are here")
        return self


class ScoredCase(Section):
    """Scored attention, causal, beside attention alone: of all queries, or of one, as in decoding.

    `window` is how many of the last queries the sums are of; None for all. `kv_heads` are those of the keys, where
    several query heads share one.
    """

    op: Literal["scored"]
    keys: PositiveInt
    decode: bool = False
    window: PositiveInt | None = None
    kv_heads: PositiveInt | None = None

    @property
    def queries(self) -> int:
        """How many there are."""
        return 1 if self.decode else self.keys

    @property
    def label(self) -> str:
        """What tables call it."""
        keys = f"{self.keys:,} keys" + ("" if self.kv_heads is None else f" of {self.kv_heads} heads")
        if self.decode:
            return f"scored, one query of {keys}"
        return f"scored, {keys}, sums of {'all' if self.window is None else f'the last {self.window}'}"


Case = Annotated[PairCase | ChainCase | ModuleCase | ScoredCase, Field(discriminator="op")]


class OperationsConfig(RunConfig):
    """A whole benchmark of operations.

    `tokens` are those of a batch in all, of `width` channels and `heads` heads. Inputs go round among as many sets as
    make up `spread_bytes`, so that no call finds its own in a cache. With `compiled` torch.compile is among the
    baselines of the operations.
    """

    task: Literal["operations"] = "operations"
    dtype: Dtype = "bfloat16"
    width: PositiveInt = 384
    heads: PositiveInt = 6
    tokens: PositiveInt = 32768
    operations: Annotated[tuple[Case, ...], Field(min_length=1)]
    compiled: bool = True
    spread_bytes: PositiveInt = 2**28
    repeats: Annotated[int, Field(ge=3)] = 20
    min_seconds: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _fits(self) -> OperationsConfig:
        labels = [case.label for case in self.operations]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"operations: {twice} are there more than once")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}")
        shared = [case.kv_heads for case in self.operations if isinstance(case, ScoredCase) and case.kv_heads]
        if any(self.heads % count for count in shared):
            raise ValueError(f"kv_heads {shared} must divide heads {self.heads}")
        return self


load_config = OperationsConfig.load


def _both(backward: bool) -> str:
    return ", forward and backward" if backward else ""

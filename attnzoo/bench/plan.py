"""What a config asks for: its rows, in the order in which they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnzoo.bench.config import AttentionConfig, BenchConfig
from attnzoo.bench.record import Key, Part, Phase


@dataclass(frozen=True)
class Row:
    """A row to measure: an attention (None: the dense baseline) at a token count, or its quality (0 tokens)."""

    attention: int | None
    tokens: int
    part: Part = "vision"

    @property
    def kind(self) -> Literal["cost", "quality"]:
        """``cost`` or ``quality``."""
        return "cost" if self.tokens else "quality"

    def phases(self, config: BenchConfig) -> tuple[Phase, ...]:
        """The records that the row gives, one a phase."""
        if self.part == "language" and self.tokens:
            return ("prefill", "decode")
        return ("training",) if self.tokens and config.cost.gradient else ("forward",)

    def spec(self, config: BenchConfig) -> AttentionConfig | None:
        """The attention's part of the config."""
        if self.attention is None:
            return None
        language = config.language if self.part == "language" else None
        return (config.attentions if language is None else language.attentions)[self.attention]

    def label(self, config: BenchConfig) -> str:
        """What tables call the row."""
        spec = self.spec(config)
        return baseline_label(config, self.part) if spec is None else spec.label

    def keys(self, config: BenchConfig) -> list[Key]:
        """Of its records."""
        return [(self.part, self.kind, phase, self.label(config), self.tokens) for phase in self.phases(config)]


def baseline_label(config: BenchConfig, part: Part) -> str:
    """What tables call the dense baseline of a part."""
    return config.language.baseline if part == "language" and config.language is not None else config.baseline.label


def _is_measured(config: BenchConfig, index: int | None, tokens: int) -> bool:
    """Whether a row has a cost at a token count; the dense baseline has at all that all attentions share."""
    own = [attention.tokens for attention in config.attentions]
    if index is None:
        return any(counts is None or tokens in counts for counts in own)
    counts = own[index]
    return counts is None or tokens in counts


def plan(config: BenchConfig) -> list[Row]:
    """All rows in the order in which they are measured: quality first, for rows of cost carry it."""
    who: list[int | None] = [None, *range(len(config.attentions))]
    rows = [Row(index, 0) for index in who] if config.quality is not None else []
    costs = [Row(i, tokens) for tokens in config.cost.tokens for i in who if _is_measured(config, i, tokens)]
    if config.language is not None:
        who = [None, *range(len(config.language.attentions))]
        rows += [Row(index, 0, "language") for index in who]
        costs += [Row(index, config.language.cost.prompt_tokens, "language") for index in who]
    return rows + costs

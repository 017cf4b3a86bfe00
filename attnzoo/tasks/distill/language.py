"""A causal language model, scored by its NLL on windows that are held out, and by needles that it finds in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import ConfigError
from attnzoo.repairing.kept import modes_kept
from attnzoo.repairing.options import Loss
from attnzoo.tasks.decode.lm import load_model, load_tokenizer, nll, retrieve
from attnzoo.tasks.decode.needles import Sample, make_samples
from attnzoo.tasks.decode.text import load_text
from attnzoo.tasks.distill.config import LanguageConfig
from attnzoo.tasks.distill.quality import Metric
from attnzoo.tasks.distill.subject import Score


class Language:
    """A causal language model of transformers'."""

    metric: Metric = "NLL"
    loss: Loss | None = None

    def __init__(self, config: LanguageConfig, batch: int, device: str) -> None:
        self.config, self.batch, self.device = config, batch, device
        self.tokenizer, text = load_tokenizer(config.model), load_text(config.text)
        ids = self.tokenizer(text.text, add_special_tokens=False)["input_ids"]
        kept = config.windows * config.tokens
        if len(ids) < kept + 10 * config.tokens:
            raise ConfigError(
                f"language.text: {config.text} has {len(ids):,} tokens: too few to keep {config.windows} windows of "
                f"{config.tokens} for scoring"
            )
        self.ids = torch.tensor(ids[:-kept])
        self.windows = torch.tensor(ids[-kept:]).view(config.windows, config.tokens)
        self.prompts: list[Sample] = []
        if config.needles:
            held_out = replace(text, text=self.tokenizer.decode(ids[-kept:]))
            about: Any = {"kind": "evictable", "count": config.needles, "tokens": config.tokens, "seed": 0}
            self.prompts = make_samples(held_out, self.tokenizer, **about)

    def teacher(self) -> nn.Module:
        """The language model."""
        model: nn.Module = load_model(self.config.model, device=self.device)
        return model

    def batches(self, first: int, seed: int) -> Iterator[tuple[dict[str, Tensor], None]]:
        """Pieces of the text from random places, ``(B, N)``."""
        while True:
            draw = torch.Generator().manual_seed(1_000_003 * seed + first)
            places = torch.randint(len(self.ids) - self.config.tokens, (self.batch,), generator=draw)
            ids = self.ids[places[:, None] + torch.arange(self.config.tokens)]  # (B, N)
            yield {"input_ids": ids.to(self.device)}, None
            first += 1

    def score(self, model: nn.Module, whole: bool = True) -> Score:
        """Mean NLL of the held-out windows, in nats per token, through the model's cache.

        If `whole`, also the share of the numbers hidden in prompts that the model says when it is asked.
        """
        with modes_kept(model):
            model.eval()
            losses = [nll(model, window).nll for window in self.windows]
            prompts = self.prompts if whole else []
            hits = [hit for prompt in prompts for hit in retrieve(model, self.tokenizer, prompt).hits]
        mean = math.fsum(map(math.fsum, losses)) / sum(map(len, losses))
        return Score(mean, sum(hits) / len(hits) if hits else None)

"""Small causal language models of bytes, trained from scratch: what an attention learns, with no tokenizer between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnzoo.errors import ConfigError
from attnzoo.extras import require

VOCABULARY = 256


@dataclass(frozen=True)
class Host:
    """Sizes of a Llama: `layers` of `width` with `heads` heads and MLPs of width `hidden`."""

    width: int
    layers: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and a cosine, on batches of `batch` pieces of `tokens` bytes."""

    steps: int
    batch: int
    tokens: int
    lr: float
    warmup_steps: int
    weight_decay: float


@dataclass(frozen=True)
class Bytes:
    """A text as bytes: what is trained on, and `(windows, tokens)` of its end, which are not."""

    train: Tensor
    held_out: Tensor


def split(text: str, windows: int, tokens: int) -> Bytes:
    """Keep the last `windows` pieces of `tokens` bytes of `text` for testing.

    Raises
    ------
    ConfigError
        If little more than that would be left for training.
    """
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    kept = windows * tokens
    if len(data) - kept < 10 * tokens:
        raise ConfigError(
            f"the text has {len(data):,} bytes: too few to keep {windows} windows of {tokens} for testing"
        )
    return Bytes(data[:-kept], data[-kept:].view(windows, tokens).long())


def build(host: Host, seed: int) -> Any:
    """A Llama of bytes, freshly initialized from `seed`."""
    require("transformers", extra="llm")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=host.width,
        num_hidden_layers=host.layers,
        num_attention_heads=host.heads,
        intermediate_size=host.hidden,
        max_position_embeddings=65536,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def train(model: Any, data: Bytes, recipe: Recipe, *, seed: int, folder: Path) -> list[tuple[int, float]]:
    """Train on the CPU by transformers' Trainer, which resumes from the last checkpoint in `folder`.

    Returns
    -------
    list of (int, float)
        Steps done, and the mean loss in nats a byte since the entry before.
    """
    require("accelerate", extra="llm")
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    every = max(1, recipe.steps // 20)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="cosine",
        logging_steps=every,
        save_steps=every,
        save_total_limit=1,
        report_to=[],
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    pieces = _Pieces(data.train, recipe, seed)
    trainer = Trainer(model=model, args=arguments, train_dataset=pieces)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return [(int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]


@torch.inference_mode()
def score(model: Any, held_out: Tensor) -> list[float]:
    """Mean loss of each window, in nats a byte."""
    model.eval()
    return [
        float(model(window[None].to(model.device), labels=window[None].to(model.device)).loss) for window in held_out
    ]


class _Pieces(Dataset[dict[str, Tensor]]):
    """Pieces of the text, their places drawn from a seed: the same for every model."""

    def __init__(self, data: Tensor, recipe: Recipe, seed: int) -> None:
        self.data, self.tokens = data, recipe.tokens
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(data) - recipe.tokens, (recipe.steps * recipe.batch,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.starts[index])
        piece = self.data[start : start + self.tokens].long()
        return {"input_ids": piece, "labels": piece}

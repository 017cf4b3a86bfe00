"""The task train_bytes: small causal language models of bytes, trained from scratch with each attention and with dense.

They show what an attention learns, with no tokenizer between.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

import attnzoo
from attnzoo.bench.attentions import AttentionConfig, refuse_expect, row_of
from attnzoo.bench.config import RunConfig, Section, refuse_twins
from attnzoo.bench.highlights import of_records
from attnzoo.bench.jsonl import is_json
from attnzoo.bench.plots import curves
from attnzoo.bench.record import Count, NonNegative, Record
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.bench.words import difference
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require
from attnzoo.processes import refuse_launcher
from attnzoo.tasks.decode.cells import contents
from attnzoo.tasks.decode.quality import Perplexity
from attnzoo.tasks.decode.text import load_text

DENSE, CHECKPOINTS = "dense", "checkpoints"
STATE = "trainer_state.json"  # which the trainer writes last of a checkpoint
FILES = (STATE, "model.safetensors", "optimizer.pt", "scheduler.pt")  # without which none is gone on from


class Host(Section):
    """Sizes of a Llama of bytes."""

    width: PositiveInt = 128
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    hidden: PositiveInt = 384


class Recipe(Section):
    """AdamW with linear warm-up and a cosine, on batches of `batch` pieces of `tokens` bytes."""

    steps: PositiveInt = 300
    batch: PositiveInt = 16
    tokens: Annotated[int, Field(ge=2)] = 256
    lr: PositiveFloat = 2e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 30
    weight_decay: NonNegative = 0.05


class TrainConfig(RunConfig):
    """What is trained on what, on the CPU."""

    task: Literal["train_bytes"] = "train_bytes"
    device: Literal["cpu"] = "cpu"
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    threads: PositiveInt = 1
    host: Host = Host()
    recipe: Recipe = Recipe()
    held_out: Annotated[int, Field(ge=2, description="windows kept for testing")] = 40
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _labels_differ(self) -> TrainConfig:
        refuse_expect(self.attentions)
        refuse_twins([DENSE, *(attention.label for attention in self.attentions)])
        return self


class BitsPerByte(Perplexity):
    """Bits per byte of text that was not trained on; perplexity and NLL are those of a byte.

    `losses` are steps done, and the mean training loss in nats per byte since the entry before.
    """

    METRIC: ClassVar[str] = "perplexity per byte"

    parameters: Count
    losses: tuple[tuple[int, float], ...]

    @property
    def figure(self) -> str:
        """``2.367 bits per byte``."""
        return f"{self.nll / math.log(2):.3f} bits per byte"

    @property
    def details(self) -> dict[str, str]:
        """Columns of the table of quality; differences are paired window by window."""
        d = self.difference
        bits = d and d.model_copy(update={name: getattr(d, name) / math.log(2) for name in ("mean", "low", "high")})
        return {
            "parameters": f"{self.parameters:,}",
            "training loss, first and last": f"{self.losses[0][1]:.2f}, {self.losses[-1][1]:.2f}",
            "held out, bits per byte": self.figure.split()[0],
            "above dense (95%)": difference(bits),
        }


class TrainRecord(Record):
    """A model trained."""

    quality: BitsPerByte | None


def plan(config: TrainConfig) -> list[Cell]:
    """A training per attention, the dense model's first; in this process, where an interrupt leaves a checkpoint."""
    alike = config.model_dump(mode="json", include={"host", "recipe", "held_out", "seed"})
    return [
        Cell(
            **row_of(attention, DENSE, "bytes"),
            kind="quality",
            host="transformers:a small Llama of bytes",
            dtype="float32",
            depends_on={
                **alike,
                "text": contents(config.text),
                "attention": None if attention is None else [attention.name, attention.swap],
            },
            asks={"attention": index},
            stage="train",
            threads=config.threads,
            isolated=False,
        )
        for index, attention in enumerate((None, *config.attentions))
    ]


def check(config: TrainConfig) -> None:
    """Check that every attention can stand in the model that it is for; raises `ConfigError` with every problem."""
    refuse_launcher()
    require("transformers", "accelerate", "matplotlib", extra="llm")
    problems = []
    for index, attention in enumerate(config.attentions):
        try:
            build(config, attention)
        except AttnZooError as error:
            problems.append(f"attentions.{index}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def prepare(config: TrainConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Read the text, once for all, and see that it is long enough; with ``fresh=true`` checkpoints are begun anew."""
    if config.fresh:
        shutil.rmtree(config.folder / CHECKPOINTS, ignore_errors=True)
    text = load_text(config.text)
    split(text.text, config)
    return {"text": text.text, "sha256": text.sha256}


def measure(config: TrainConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Train one model, on from its last checkpoint where there is one, and score what was held out."""
    recipe, (seen, held_out) = config.recipe, split(given["text"], config)
    model = build(config, (None, *config.attentions)[cell.asks["attention"]])
    checkpoints = config.folder / CHECKPOINTS / f"{cell.label.replace('/', '-')}-{cell.measured}"
    losses = train(model, seen, config, checkpoints, say)
    nats = score(model, held_out)
    mean = math.fsum(nats) / len(nats)
    quality = BitsPerByte(
        perplexity=math.exp(mean),
        nll=mean,
        tokens=recipe.tokens,
        window_nll=nats,
        parameters=sum(p.numel() for p in model.parameters()),
        losses=losses,
        text_sha256=given["sha256"],
        note=f"{recipe.steps} steps from scratch of {recipe.batch} windows of {recipe.tokens} bytes of {config.text}, "
        f"{len(nats)} windows of its end held out",
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return Result(status="ok", quality=quality)


def split(text: str, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The bytes of a text to train on, and `(windows, tokens)` of its end, which are kept for testing.

    Raises `ConfigError` if little more than the windows would be left for training.
    """
    data, tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), config.recipe.tokens
    kept = config.held_out * tokens
    if len(data) - kept < 10 * tokens:
        raise ConfigError(
            f"the text has {len(data):,} bytes: too few to keep {config.held_out} windows of {tokens} for testing"
        )
    return data[:-kept], data[-kept:].view(config.held_out, tokens).long()


def build(config: TrainConfig, attention: AttentionConfig | None) -> Any:
    """A Llama of bytes, freshly initialized from the seed, with an attention in it or its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=config.host.width,
            num_hidden_layers=config.host.layers,
            num_attention_heads=config.host.heads,
            intermediate_size=config.host.hidden,
            max_position_embeddings=65536,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if attention is None:
        return model
    return attnzoo.replace_attention(model, attention.name, keep_original=False, **attention.swap)


def train(
    model: Any, data: Tensor, config: TrainConfig, folder: Path, say: OnProgress
) -> tuple[tuple[int, float], ...]:
    """Train by transformers' Trainer, on from the last whole checkpoint in `folder`; see `BitsPerByte.losses`."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, logging

    class Teller(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            say(f"step {state.global_step} of {state.max_steps}")

    def pieces(places: Sequence[Tensor]) -> dict[str, Tensor]:
        ids = data[torch.stack(list(places))[:, None] + torch.arange(recipe.tokens)].long()  # (batch, tokens)
        return {"input_ids": ids, "labels": ids}

    logging.disable_progress_bar()
    recipe = config.recipe
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
        seed=config.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    draw = torch.Generator().manual_seed(config.seed)  # so that every model sees the same pieces
    places = torch.randint(len(data) - recipe.tokens, (recipe.steps * recipe.batch,), generator=draw)
    trainer = Trainer(model=model, args=arguments, train_dataset=places, data_collator=pieces, callbacks=[Teller()])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    return tuple((int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint; those that a killed run left torn are removed, for they would count among those kept."""
    whole: list[Path] = []
    for path in folder.glob("checkpoint-*"):
        if all((path / name).is_file() for name in FILES) and is_json((path / STATE).read_bytes()):
            whole.append(path)
        else:
            shutil.rmtree(path)
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


@torch.inference_mode()
def score(model: Any, held_out: Tensor) -> tuple[float, ...]:
    """Mean loss of each window, in nats per byte."""
    model.eval()
    return tuple(round(float(model(window[None], labels=window[None]).loss), 6) for window in held_out)


def plots(records: Sequence[TrainRecord]) -> list[tuple[str, str]]:
    """The training losses."""
    lines = {record.label: record.quality.losses for record in records if record.quality is not None}
    return [("Training loss", curves(lines, "steps", "training loss, nats per byte"))]


TASK = Task(
    name="train_bytes",
    ref="attnzoo.tasks.decode.byte_lm:TASK",
    config=TrainConfig,
    plan=plan,
    measure=measure,
    prepare=prepare,
    check=check,
    record=TrainRecord,
    plots=plots,
    highlights=lambda records: of_records(records, lambda _: "decode"),
)

"""Train a small language model of bytes once per attention, and set each against the dense one: config, run, report."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

import attnzoo
from attnzoo import files
from attnzoo.bench import words
from attnzoo.bench.attentions import AttentionConfig, refuse_expect
from attnzoo.bench.config import RunConfig, Section, Seed
from attnzoo.bench.environment import environment
from attnzoo.bench.jsonl import append_line, read_lines
from attnzoo.bench.record import Count, Entry, Environment, NonNegative
from attnzoo.bench.stats import paired_difference
from attnzoo.bench.task import Task
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require
from attnzoo.tables import Table
from attnzoo.tasks.decode import byte_lm as train_bytes
from attnzoo.tasks.decode.text import load_text

DENSE = "dense"
RECORDS, PLOT = "records.jsonl", "loss.svg"
SCHEMA = 1


class HostConfig(Section):
    """Sizes of a Llama of bytes."""

    width: PositiveInt = 128
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    hidden: PositiveInt = 384


class RecipeConfig(Section):
    """AdamW with linear warm-up and a cosine."""

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
    seed: Seed = 0
    threads: PositiveInt = 1
    host: HostConfig = HostConfig()
    recipe: RecipeConfig = RecipeConfig()
    held_out: Annotated[int, Field(ge=2, description="windows kept for testing")] = 40
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _labels_differ(self) -> TrainConfig:
        refuse_expect(self.attentions)
        labels = [DENSE, *(attention.label for attention in self.attentions)]
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels must differ, and none be {DENSE!r}: {labels[1:]}")
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on."""
        return self.model_dump(mode="json", exclude={"output", "device"})

    @classmethod
    def check(cls, data: Mapping[str, Any], source: str = "config") -> Self:
        """Check plain data: every attention must stand in the model that it is for.

        Raises
        ------
        ConfigError
            With every problem, one per line.
        """
        config = super().check(data, source)
        problems = []
        for index, attention in enumerate(config.attentions):
            try:
                _model(config, attention)
            except AttnZooError as error:
                problems.append(f"attentions.{index}: {error}")
        if problems:
            raise ConfigError(f"{source}:\n" + "\n".join(f"  {problem}" for problem in problems))
        return config


load_config = TrainConfig.load


class TrainRecord(Entry):
    """One model trained: nats a byte of each held-out window, and the training loss after so many steps."""

    schema_version: Literal[1] = 1
    config_hash: str
    text_sha256: str
    label: str
    parameters: Count
    nats: tuple[float, ...]
    losses: tuple[tuple[int, float], ...]
    seconds: NonNegative
    environment: Environment


def run(config: TrainConfig) -> Path:
    """Train what is not in the records yet, the dense model first; give the records' path."""
    import torch

    require("transformers", "accelerate", "matplotlib", extra="llm")
    config.check_folder()
    torch.set_num_threads(config.threads)
    text = load_text(config.text)
    data = train_bytes.split(text.text, config.held_out, config.recipe.tokens)
    recipe = train_bytes.Recipe(**config.recipe.model_dump())
    path = config.folder / RECORDS
    with files.locked(config.folder):
        done = {record.label for record in _own(path, config, text.sha256)}
        for attention in (None, *config.attentions):
            label = DENSE if attention is None else attention.label
            if label in done:
                continue
            model, checkpoints = _model(config, attention), config.folder / "checkpoints" / label.replace("/", "-")
            start = time.perf_counter()
            losses = train_bytes.train(model, data, recipe, seed=config.seed, folder=checkpoints)
            record = TrainRecord(
                config_hash=config.hash,
                text_sha256=text.sha256,
                label=label,
                parameters=sum(p.numel() for p in model.parameters()),
                nats=tuple(round(nats, 6) for nats in train_bytes.score(model, data.held_out)),
                losses=tuple(losses),
                seconds=round(time.perf_counter() - start, 1),
                environment=environment("cpu", config.threads),
            )
            append_line(path, record)
            shutil.rmtree(checkpoints, ignore_errors=True)
    return path


def _own(path: Path, config: TrainConfig, text_sha256: str) -> list[TrainRecord]:
    records = read_lines(path, TrainRecord, SCHEMA, mend=True) if path.exists() else []
    for record in records:
        if (record.config_hash, record.text_sha256) != (config.hash, text_sha256):
            raise ConfigError(f"{path} holds results of another config or text; give another folder with output=PATH")
    return records


def _model(config: TrainConfig, attention: AttentionConfig | None) -> Any:
    model = train_bytes.build(train_bytes.Host(**config.host.model_dump()), config.seed)
    if attention is None:
        return model
    return attnzoo.replace_attention(model, attention.name, keep_original=False, **attention.swap)


def table(path: Path) -> str:
    """The results in Markdown; differences are paired window by window."""
    records = read_lines(path, TrainRecord, SCHEMA)
    dense = next(record for record in records if record.label == DENSE)
    heads = ("attention", "parameters", "training loss, first and last", "held out, bits per byte", "above dense (95%)")
    rows = Table(heads)
    for record in records:
        bits, bits_dense = ([nats / math.log(2) for nats in one.nats] for one in (record, dense))
        d = paired_difference(bits, bits_dense)
        above = "" if record is dense else words.difference(d)
        losses = f"{record.losses[0][1]:.2f}, {record.losses[-1][1]:.2f}"
        rows.add(record.label, f"{record.parameters:,}", losses, f"{sum(bits) / len(bits):.3f}", above)
    return rows.markdown()


def report(path: Path) -> str:
    """Draw the losses beside the records, and give the table."""
    from attnzoo.bench.plots import add_legend, new_figure, to_svg

    figure, axes = new_figure()
    for record in read_lines(path, TrainRecord, SCHEMA):
        axes.plot(*zip(*record.losses, strict=True), label=record.label, lw=1.8)
    axes.set_xlabel("steps")
    axes.set_ylabel("training loss, nats per byte")
    add_legend(axes)
    picture = to_svg(figure, "loss").replace("currentColor", "#777777")  # an image of its own has no page's color
    files.write(path.with_name(PLOT), picture)
    return table(path)


def train_and_report(config: TrainConfig, command: str) -> int:
    """Train what is not trained yet, and print the table."""
    print(report(run(config)))
    return 0


TASK = Task(name="train_bytes", ref="attnzoo.tasks.decode.byte_run:TASK", config=TrainConfig, run=train_and_report)

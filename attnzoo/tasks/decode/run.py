"""The runner: load the model once, put each attention in and out of it, and write each result as soon as it is there.

Under ``accelerate launch`` or ``torchrun`` the samples are split over the processes; each writes a file of its own, and
the main one puts them together.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import attnzoo
from attnzoo import files
from attnzoo.bench.environment import environment
from attnzoo.bench.jsonl import append_line
from attnzoo.errors import AttnZooError, ConfigError, RunError
from attnzoo.extras import require
from attnzoo.tasks.decode import canary, summary
from attnzoo.tasks.decode import lm as decode
from attnzoo.tasks.decode import plan as plans
from attnzoo.tasks.decode.batch_cost import measure_cost
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.plan import Row, Samples, Unit
from attnzoo.tasks.decode.record import (
    CONFIG_FILE,
    RECORDS_FILE,
    SAMPLES,
    Bytes,
    CanaryResult,
    DecodeRecord,
    SampleLine,
    read_samples,
    write_records,
)
from attnzoo.tasks.decode.text import Text, check_text_name, load_text

PATIENCE = timedelta(days=7)  # how long a process waits for the others, which may have hours of work left
DIGITS_KEPT = 6  # of an NLL


def run(config: DecodeConfig, command: str, console: Console | None = None) -> list[DecodeRecord]:
    """Run what `config` asks for and its folder does not hold yet; give the records, in the main process alone.

    Parameters
    ----------
    config
        What to run.
    command
        What a reader would type to run it again; it goes into the records.
    console
        Where progress is shown; stderr by default.

    Raises
    ------
    ConfigError
        If something that the config asks for is not here, another run is writing into the folder, or the folder holds
        samples of another config or text.
    AssetError
        If model or text cannot be fetched.
    CanaryError
        If the run does not do what any run must.
    """
    config.check_folder()
    check(config)
    world = _World(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # after the world, which chooses a number of its own
    tokenizer = decode.load_tokenizer(config.model)
    text = load_text(config.text)
    samples = plans.make_samples(config, text, tokenizer)
    with files.locked(config.folder) if world.is_main else contextlib.nullcontext():
        if world.is_main:
            _prepare(config, text)
        world.wait()
        runner = _Runner(config, world, text, samples, tokenizer, console or Console(stderr=True))
        runner.work(plans.canary_units(config), "canaries")
        canaries = canary.judge(config, read_samples(config.folder))
        world.wait()
        runner.work(plans.quality_units(config), "samples")
        if not world.is_main:
            return []
        runner.work_alone(plans.cost_units(config), "timings")
        return _records(config, command, text, canaries, world.count)


def so_far(config: DecodeConfig, command: str) -> list[DecodeRecord]:
    """Give the records of what a run, that may still be under way, has done so far; nothing is run or written.

    Raises
    ------
    AttnZooError
        If there is nothing to report yet, or a canary has failed.
    """
    lines = [line for line in read_samples(config.folder) if line.config_hash == config.hash]
    wanted = {(unit.task, unit.sample, row.label) for unit in plans.canary_units(config) for row in unit.rows}
    if not wanted <= {(line.task, line.sample, line.label) for line in lines}:
        raise AttnZooError(f"{config.folder} does not hold this config's canaries yet; let it run on")
    return _summary(config, lines, command, load_text(config.text), canary.judge(config, lines), 1)


def check(config: DecodeConfig) -> None:
    """Check, before anything is loaded, what the schema cannot: text, device, model and the lengths it can take.

    Raises
    ------
    ConfigError
        With every problem, one per line.
    """
    require("transformers", "accelerate", "matplotlib", extra="llm")
    problems: list[str] = []
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"device: {config.device!r} asked for, but PyTorch sees no CUDA device here; use device=cpu")
    for key, question in (("text", lambda: check_text_name(config.text)), ("model", lambda: _check_lengths(config))):
        try:
            question()
        except ConfigError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError("\n".join(["this config cannot be run here:", *(f"  {problem}" for problem in problems)]))


def _check_lengths(config: DecodeConfig) -> None:
    longest = decode.longest(config.model)
    asked = {"nll.tokens": config.nll.tokens}
    if config.retrieval is not None:
        asked["retrieval.tokens"] = config.retrieval.tokens
    if config.cost is not None:
        asked["cost.prompt_tokens + cost.new_tokens"] = config.cost.prompt_tokens + config.cost.new_tokens
    over = [f"{key} is {tokens:,}" for key, tokens in asked.items() if longest is not None and tokens > longest]
    if over:
        raise ConfigError(f"{config.model!r} is made for {longest:,} tokens, but {', '.join(over)}")


def _prepare(config: DecodeConfig, text: Text) -> None:
    """Make the folder fit to be written into: mended, and of this config and text."""
    folder = config.folder
    if config.fresh:
        for path in [*folder.glob(SAMPLES.format("*")), folder / RECORDS_FILE]:
            if path.exists():
                path.replace(path.with_name(f"{path.name}.old"))
    for line in read_samples(folder, mend=True):
        if line.config_hash != config.hash:
            raise ConfigError(
                f"{folder} holds samples of another config ({line.config_hash}, this one is {config.hash}). "
                "Give another folder with output=PATH, or set them aside with fresh=true."
            )
        if line.text_sha256 != text.sha256:
            raise ConfigError(
                f"{folder} holds samples of another text: {text.name} has changed since (SHA-256 "
                f"{line.text_sha256[:16]}, now {text.sha256[:16]}). Give another folder with output=PATH, or set them "
                "aside with fresh=true."
            )
    (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")


class _World:
    """The processes of this run."""

    def __init__(self, config: DecodeConfig) -> None:
        from accelerate import PartialState

        cpu = config.device == "cpu"
        self.state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.rank, self.count = self.state.process_index, self.state.num_processes
        self.is_main = self.state.is_main_process
        several_gpus = config.device == "cuda" and self.count > 1
        self.device = self.state.device if several_gpus else torch.device(config.device)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.state.wait_for_everyone()


class _Runner:
    """Runs units of work on one model."""

    def __init__(
        self, config: DecodeConfig, world: _World, text: Text, samples: Samples, tokenizer: Any, console: Console
    ) -> None:
        self.config, self.world, self.text, self.samples = config, world, text, samples
        self.tokenizer, self.console = tokenizer, console
        self.path = config.folder / SAMPLES.format(world.rank)
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The dense model, loaded when it is first needed."""
        if self._model is None:
            dtype = getattr(torch, self.config.dtype)
            settings = {"dtype": dtype, "attention": self.config.attention, "device": self.world.device}
            self._model = decode.load_model(self.config.model, **settings)
        return self._model

    def work(self, units: Sequence[Unit], title: str) -> None:
        """Do this process's share of what is left of `units`; return when all processes have done theirs."""
        left = plans.remaining(units, {line.key for line in read_samples(self.config.folder)})
        self.world.wait()  # nobody writes before everybody has read
        self._do(left[self.world.rank :: self.world.count], title, _rows(units) - _rows(left))
        self.world.wait()

    def work_alone(self, units: Sequence[Unit], title: str) -> None:
        """Do what is left of `units` in this process."""
        left = plans.remaining(units, {line.key for line in read_samples(self.config.folder)})
        self._do(left, title, _rows(units) - _rows(left))

    def _do(self, units: Sequence[Unit], title: str, kept: int) -> None:
        if kept and self.world.is_main:
            self.console.print(f"{title}: {kept} results of an earlier run are kept", highlight=False)
        if not units:
            return
        with _bar(self.console, self.world.is_main) as bars:
            share = "" if self.world.count == 1 else f" (one of {self.world.count} processes)"
            bar = bars.add_task(f"{title}{share}", total=_rows(units), stage="")
            start, done = time.monotonic(), 0
            for unit in units:
                for row in unit.rows:
                    bars.update(bar, stage=f"{unit.kind or unit.task} {unit.sample + 1}: {row.label}")
                    append_line(self.path, self._line(unit, row))
                    bars.advance(bar)
                done += len(unit.rows)
                if self.world.is_main and not self.console.is_terminal:
                    rest = (time.monotonic() - start) / done * (_rows(units) - done)
                    said = f"{title}: {done} of {_rows(units)} done, {timedelta(seconds=round(rest))} left"
                    self.console.print(said, highlight=False)

    def _line(self, unit: Unit, row: Row) -> SampleLine:
        start = time.monotonic()
        about: dict[str, Any] = {
            "config_hash": self.config.hash,
            "text_sha256": self.text.sha256,
            "task": unit.task,
            "kind": unit.kind,
            "sample": unit.sample,
            "label": row.label,
        }
        if unit.task == "cost":
            result: dict[str, Any] = {
                "cost": measure_cost(self.config, self.model, row.attention, self.samples.prompts)
            }
        else:
            with swapped(self.model, row):
                result = self._retrieve(unit) if unit.task == "retrieval" else self._score(unit, row)
        return SampleLine(**about, **result, seconds=round(time.monotonic() - start, 3))

    def _score(self, unit: Unit, row: Row) -> dict[str, Any]:
        window = self.samples.windows[unit.sample]
        scored = decode.nll(self.model, window.ids)
        if not all(map(math.isfinite, scored.nll)):
            where = next(i for i, value in enumerate(scored.nll) if not math.isfinite(value)) + 1
            raise RunError(
                f"{row.label} gives an NLL that is not finite at token {where} of window {unit.sample}: nothing can be "
                "said of it; try dtype=float32, and report it if that does not help"
            )
        nll = tuple(round(value, DIGITS_KEPT) for value in scored.nll)
        return {"nll": nll, "start": window.start, "cache": Bytes.of(scored.cache)}

    def _retrieve(self, unit: Unit) -> dict[str, Any]:
        sample = self.samples.retrieval[unit.kind][unit.sample]
        answer = decode.retrieve(self.model, self.tokenizer, sample)
        return {
            "answer": answer.text,
            "expected": sample.answers,
            "hits": answer.hits,
            "depths": sample.depths,
            "cache": Bytes.of(answer.cache),
        }


@contextlib.contextmanager
def swapped(model: Any, row: Row) -> Iterator[None]:
    """Put the row's attention into the model, and take it out again."""
    if row.attention is None:
        yield
        return
    attnzoo.replace_attention(model, row.attention.name, **row.attention.swap)
    try:
        yield
    finally:
        attnzoo.restore_attention(model)


def _records(
    config: DecodeConfig, command: str, text: Text, canaries: Sequence[CanaryResult], processes: int
) -> list[DecodeRecord]:
    records = _summary(config, read_samples(config.folder), command, text, canaries, processes)
    write_records(config.folder, records)
    return records


def _summary(
    config: DecodeConfig,
    lines: Sequence[SampleLine],
    command: str,
    text: Text,
    canaries: Sequence[CanaryResult],
    processes: int,
) -> list[DecodeRecord]:
    return summary.summarize(
        config,
        lines,
        command=command,
        text=text,
        canaries=canaries,
        processes=processes,
        where=environment(config.device, config.threads),
    )


def _rows(units: Sequence[Unit]) -> int:
    return sum(len(unit.rows) for unit in units)


@contextlib.contextmanager
def _bar(console: Console, shown: bool) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[stage]}", markup=False),
    )
    with Progress(*columns, console=console, speed_estimate_period=3600, disable=not shown) as bars:
        yield bars

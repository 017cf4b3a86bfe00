"""The runner: plan the rows, measure each in a child process, write each record as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attnzoo import assets
from attnzoo.bench.child import ChildResult, Nursery, Say
from attnzoo.bench.config import AttentionConfig, BenchConfig
from attnzoo.bench.record import CONFIG_FILE, Environment, Quality, Record, RecordStore, Training
from attnzoo.bench.summary import one_line
from attnzoo.bench.system import environment
from attnzoo.bench.worker import Job, Outcome, cost_main, quality_main
from attnzoo.errors import ConfigError
from attnzoo.tasks import classify

PRELOAD = ("attnzoo.bench.worker", "timm")
NO_QUALITY = "this config measures no quality"


@dataclass(frozen=True)
class Row:
    """A row to measure: an attention (None: the dense baseline) at a token count, or its trainings (0 tokens)."""

    attention: int | None
    tokens: int

    @property
    def kind(self) -> str:
        """``cost`` or ``quality``."""
        return "cost" if self.tokens else "quality"


def run(config: BenchConfig, command: str, console: Console | None = None) -> list[Record]:
    """Measure every row of `config` that its folder does not hold yet, and give all records.

    Parameters
    ----------
    config
        What to measure.
    command
        What a reader would type to measure it again; it goes into the records.
    console
        Where progress is shown; stderr by default.

    Raises
    ------
    ConfigError
        If something that the config asks for is not here, another run is writing into the folder, or the folder holds
        records of another config.
    AssetError
        If the data set cannot be had.
    """
    console = console or Console(stderr=True)
    check(config)
    data = assets.get(config.quality.dataset) if config.quality is not None else Path()
    with RecordStore(config.folder, config.hash, fresh=config.fresh) as store:
        (config.folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        runner = _Runner(config, store, data, command)
        rows = [row for row in plan(config) if not store.done(_key(config, row))]
        kept = len(plan(config)) - len(rows)
        if kept:
            console.print(f"{kept} rows of an earlier run are kept, {len(rows)} to measure", highlight=False)
        with _bars(console) as bars:
            runner.train([row for row in rows if row.kind == "quality"], bars)
            runner.time([row for row in rows if row.kind == "cost"], bars)
        runner.refresh_quality()
        return list(store.records.values())


def plan(config: BenchConfig) -> list[Row]:
    """All rows in the order in which they are measured: quality first, for rows of cost carry it."""
    who: list[int | None] = [None, *range(len(config.attentions))]
    quality = [Row(index, 0) for index in who] if config.quality is not None else []
    return quality + [Row(index, tokens) for tokens in config.cost.tokens for index in who]


def check(config: BenchConfig) -> None:
    """Check, before any work, what the schema cannot: the host's name, the device and the shapes of the quality model.

    Raises
    ------
    ConfigError
        With every problem, one a line.
    """
    problems: list[str] = []
    hosts = {"host.model": config.host.model}
    if config.quality is not None:
        hosts["quality.host.model"] = config.quality.host.model
        side = classify.IMAGE_SIDE[config.quality.dataset]
        if side % config.quality.host.patch_size:
            problems.append(
                f"quality.host.patch_size: {config.quality.host.patch_size} does not divide the {side} pixels of "
                f"{config.quality.dataset}"
            )
    for key, model in hosts.items():
        try:
            classify.check_model_name(model)
        except ConfigError as error:
            problems.append(f"{key}: {error}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"device: {config.device!r} asked for, but PyTorch sees no CUDA device here; use device=cpu")
    if problems:
        raise ConfigError("\n".join(["this config cannot be run here:", *(f"  {problem}" for problem in problems)]))


class _Runner:
    """Measures rows and writes their records."""

    def __init__(self, config: BenchConfig, store: RecordStore, data: Path, command: str) -> None:
        self.config, self.store, self.data, self.command = config, store, data, command
        self.cuda = config.device.startswith("cuda")
        self.nursery = Nursery(PRELOAD, cuda=self.cuda)
        self.environment = environment(config.device, config.threads)

    def train(self, rows: Sequence[Row], bars: Progress) -> None:
        """Train the attentions of `rows`, several at a time."""
        quality = self.config.quality
        if quality is None or not rows:
            return
        bar = bars.add_task("train", total=len(rows), stage="")
        trainings = environment(self.config.device, quality.threads)
        with ThreadPoolExecutor(quality.workers) as pool:
            futures: dict[Future[tuple[ChildResult, float]], Row] = {}
            for row in rows:
                say = _teller(bars, bar, self._label(row))
                futures[pool.submit(self._child, row, quality.timeout_seconds, say)] = row
            for future in as_completed(futures):
                result, seconds = future.result()
                self._keep(self._record(futures[future], result, seconds, trainings), bars.console)
                bars.advance(bar)

    def time(self, rows: Sequence[Row], bars: Progress) -> None:
        """Measure the cost of `rows`, one after another, so that none disturbs another."""
        if not rows:
            return
        bar = bars.add_task("time", total=sum(_weight(row) for row in rows), stage="")
        for row in rows:
            say = _teller(bars, bar, f"{self._label(row)} at {row.tokens:,} tokens")
            result, seconds = self._child(row, self.config.cost.timeout_seconds, say)
            self._keep(self._record(row, result, seconds, self.environment), bars.console)
            bars.advance(bar, _weight(row))

    def _keep(self, record: Record, console: Console) -> None:
        """Write a record, and say so where nobody watches the bars or something went wrong."""
        self.store.append(record)
        if not console.is_terminal or record.status != "ok":
            at = f" at {record.tokens:,} tokens" if record.tokens else ""
            why = f": {one_line(record.message)}" if record.message else ""
            line = f"{record.kind} of {record.label}{at}: {record.status} in {record.seconds:.1f} s{why}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def refresh_quality(self) -> None:
        """Bring rows up to date whose quality, or whose baseline's quality, came after them."""
        for record in list(self.store.records.values()):
            quality, note = self._quality_of(record.label)
            if (quality, note) != (record.quality, record.quality_note):
                self.store.append(record.model_copy(update={"quality": quality, "quality_note": note}))

    def _child(self, row: Row, timeout: float, say: Say) -> tuple[ChildResult, float]:
        job = Job(config=self.config, attention=row.attention, tokens=row.tokens, data=str(self.data))
        say("start")
        start = time.monotonic()
        target = cost_main if row.kind == "cost" else quality_main
        return self.nursery.run(target, job.model_dump_json(), timeout, say), time.monotonic() - start

    def _record(self, row: Row, result: ChildResult, seconds: float, where: Environment) -> Record:
        config, spec = self.config, self._spec(row)
        outcome = _outcome(result)
        label = self._label(row)
        if row.kind == "cost":
            quality, note = self._quality_of(label)
        else:
            quality = self._summarise(row, outcome.trainings)
            note = quality.note if quality is not None else f"{outcome.status}: {outcome.message}"
        host = config.host if row.kind == "cost" or config.quality is None else config.quality.host
        return Record(
            config_hash=config.hash,
            benchmark=config.name,
            command=self.command,
            kind="cost" if row.kind == "cost" else "quality",
            label=label,
            attention=None if spec is None else spec.name,
            options={} if spec is None else spec.options,
            is_baseline=spec is None,
            status=outcome.status,
            message=outcome.message,
            utc=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            environment=where,
            host=f"{host.library}:{host.model}",
            dtype=config.cost.dtype if row.kind == "cost" else "float32",
            tokens=row.tokens,
            shapes=outcome.shapes,
            gate=outcome.gate,
            baseline_gate=outcome.baseline_gate,
            backends=outcome.backends,
            cost=outcome.cost,
            quality=quality,
            quality_note=note,
        )

    def _spec(self, row: Row) -> AttentionConfig | None:
        return None if row.attention is None else self.config.attentions[row.attention]

    def _label(self, row: Row) -> str:
        return _key(self.config, row)[1]

    def _quality_of(self, label: str) -> tuple[Quality | None, str]:
        """Give the quality of an attention, with its ratio to the baseline's, and a note."""
        if self.config.quality is None:
            return None, NO_QUALITY
        found = self.store.records.get(("quality", label, 0))
        if found is None:
            return None, "not measured"
        if found.quality is None:
            return None, found.quality_note
        ratio = self._accuracy_ratio(label, found.quality.accuracy)
        return found.quality.model_copy(update={"ratio": ratio}), found.quality.note

    def _accuracy_ratio(self, label: str, accuracy: float) -> float | None:
        if label == self.config.baseline.label:
            return 1.0
        dense = self.store.records.get(("quality", self.config.baseline.label, 0))
        base = dense.quality.accuracy if dense is not None and dense.quality is not None else None
        return accuracy / base if base else None

    def _summarise(self, row: Row, trainings: Sequence[Training]) -> Quality | None:
        quality = self.config.quality
        if quality is None or not trainings:
            return None
        correct, images = sum(t.correct for t in trainings), sum(t.images for t in trainings)
        low, high = classify.wilson_interval(correct, images)
        tokens = (classify.IMAGE_SIDE[quality.dataset] // quality.host.patch_size) ** 2
        options = ", ".join(f"{key}={value}" for key, value in quality.host.options.items())
        seeds = f"{len(trainings)} seed{'s' if len(trainings) > 1 else ''}"
        note = (
            f"{quality.host.model} ({options}) from scratch on {quality.dataset}, {tokens} tokens, "
            f"{quality.recipe.epochs} epochs, {seeds}, {trainings[0].images:,} test images"
        )
        return Quality(
            accuracy=correct / images,
            low=low,
            high=high,
            images=images,
            ratio=self._accuracy_ratio(self._label(row), correct / images),
            trainings=tuple(trainings),
            note=note,
        )


def _outcome(result: ChildResult) -> Outcome:
    if result.end == "done":
        return Outcome.model_validate_json(result.answer)
    if result.end == "crashed":
        return Outcome(status="failed", message=result.message)
    return Outcome(status=result.end, message=result.message)


def _key(config: BenchConfig, row: Row) -> tuple[str, str, int]:
    label = config.baseline.label if row.attention is None else config.attentions[row.attention].label
    return row.kind, label, row.tokens


def _weight(row: Row) -> float:
    """Guess how long a row takes, in arbitrary units, for the time left: a fixed part and one of attention."""
    return 3 + row.tokens / 500 + (row.tokens / 1000) ** 2


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[stage]}", markup=False),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as bars:
        yield bars


def _teller(bars: Progress, bar: TaskID, title: str) -> Say:
    return lambda stage: bars.update(bar, stage=f"{title}: {stage}")

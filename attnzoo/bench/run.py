"""The engine: plan the cells of a task, measure each in a process of its own or here, write each record at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from queue import Empty, Queue
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from attnzoo import files
from attnzoo.bench import progress
from attnzoo.bench.attentions import own_sources
from attnzoo.bench.config import RunConfig, flat, read_yaml
from attnzoo.bench.environment import environment
from attnzoo.bench.isolate import Isolation, set_threads
from attnzoo.bench.record import CONFIG_FILE, Envelope, Environment, Key, Outcome, Phase, Quality, Row
from attnzoo.bench.store import R, RecordStore
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.bench.words import one_line
from attnzoo.bench.work import Job, work, work_here
from attnzoo.errors import ConfigError

NO_QUALITY = "this config measures no quality"
NAMED = 6  # differing keys that a message names


def run(task: Task, config: RunConfig, command: str, console: Console | None = None) -> list[Envelope]:
    """Measure every cell of `config` that its folder does not hold yet, and give all records that it asks for.

    Raises `ConfigError` if something that the config asks for is not here, another run is writing into the folder, or
    the folder holds records that cannot stand beside those of this config; `AssetError` if data, a model or a text
    cannot be fetched.

    `command` is what a reader would type to measure it again, for the records; progress is shown on `console`, by
    default stderr.
    """
    console = console or Console(stderr=True)
    config.check_folder()
    if config.used_device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {config.device!r} asked for, but PyTorch sees no CUDA device here; use device=cpu")
    task.check(config)
    cells = planned(task, config)
    measured = _measured(task, cells)
    renewed = {key for cell in cells if cell.renewed for key in cell.keys}
    changed = partial(difference, config)
    with RecordStore(
        config.folder, task.record, config.hash, measured, fresh=config.fresh, changed=changed, renewed=renewed
    ) as store:
        todo = [cell for cell in cells if not all(map(store.done, cell.keys))]
        set_threads(config.threads)
        given = task.prepare(config, todo)
        files.write(config.folder / CONFIG_FILE, config.to_yaml())
        if len(todo) < len(cells):
            kept = f"{len(cells) - len(todo)} rows of an earlier run are kept, {len(todo)} to measure"
            console.print(kept, highlight=False)
        engine = _Engine(task, config, store, given, command, cells)
        with progress.bars(console) as bars:
            stages = list(dict.fromkeys(cell.stage for cell in todo))
            if len(stages) > 1:
                engine.whole = bars.add_task("all", total=sum(cell.weight for cell in todo), stage="")
            for number, stage in enumerate(stages):
                engine.bar_parts(pending=[cell for cell in todo if cell.stage in stages[number:]])
                engine.measure([cell for cell in todo if cell.stage == stage], bars)
        engine.bar_parts()
        engine.refresh_quality()
        return [store.records[key] for key in measured if key in store.records]


def asked(task: Task, config: RunConfig, records: Sequence[R]) -> list[R]:
    """Leave out the records of rows that `config` does not ask for, or that an earlier config measured."""
    measured = _measured(task, planned(task, config))
    return [
        record
        for record in records
        if record.key in measured
        and (record.measured == measured[record.key] if record.measured else record.config_hash == config.hash)
    ]


def planned(task: Task, config: RunConfig) -> list[Cell]:
    """The cells of a config; what a row depends on holds the code of a method that the config imports, too."""
    cells = list(task.plan(config))
    for index, cell in enumerate(cells if config.imports else ()):
        if sources := own_sources(cell.attention, cell.options):
            cells[index] = cell.model_copy(update={"depends_on": {**cell.depends_on, "sources": sources}})
    return cells


def _measured(task: Task, cells: Sequence[Cell]) -> dict[Key, str]:
    """What stands for all that each row depends on, by its key."""
    found: dict[Key, str] = {}
    for cell in cells:
        for key in cell.keys:
            if key in found:
                raise ConfigError(
                    f"the task {task.name} plans two rows {cell.label!r} ({', '.join(str(one) for one in key if one)})"
                )
            found[key] = cell.measured
    return found


def difference(config: RunConfig) -> str:
    """Name the keys in which a config differs from the one whose records are in its folder."""
    path = config.folder / CONFIG_FILE
    try:
        before = flat(read_yaml(path))
    except ConfigError:
        return ""
    now = flat(config.plain())
    keys = [key for key in dict.fromkeys((*before, *now)) if key not in ("task", "name")]
    names = [key for key in keys if before.get(key) != now.get(key)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" (the last config there and this one differ in {', '.join(names[:NAMED])}{more})" if names else ""


class _Engine:
    """Measures cells and writes their records."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        store: RecordStore[Envelope],
        given: Mapping[str, Any],
        command: str,
        cells: Sequence[Cell],
    ) -> None:
        self.task, self.config, self.store, self.given, self.command = task, config, store, given, command
        self.keys = [key for cell in cells for key in cell.keys]  # of the rows that this config asks for
        self.with_quality = {cell.part for cell in cells if cell.kind == "quality"}
        self.baselines = {cell.part: cell.label for cell in cells if cell.is_baseline}
        self.hanging = {cell.part for cell in cells if cell.needs_baseline}  # on the quality of their baseline
        self.barred: dict[str, str] = {}
        self.whole: TaskID | None = None  # the bar of all stages, where there are several
        self.isolation = Isolation(task.preload(config), cuda=config.used_device.startswith("cuda"))
        self.places: dict[int | None, Environment] = {}
        self.gpus: Queue[str] = Queue()  # for the next cells, where several are measured at a time

    def measure(self, cells: Sequence[Cell], bars: Progress) -> None:
        """Measure the cells of one stage, as many at a time as they allow, and write the records of each at once."""
        for cell in cells:
            self._place(cell.threads)  # which compiles kernels for CPUs where they are not yet
        bar = bars.add_task(cells[0].stage, total=sum(cell.weight for cell in cells), stage="")
        for cell, result, seconds in self._results(cells, bars, bar):
            self._keep(cell, result, seconds, bars.console)
            bars.advance(bar, cell.weight)
            if self.whole is not None:
                bars.advance(self.whole, cell.weight)

    def _results(self, cells: Sequence[Cell], bars: Progress, bar: TaskID) -> Iterator[tuple[Cell, Result, float]]:
        if len(cells) == 1 or cells[0].workers == 1:
            for cell in cells:
                yield cell, *self._result(cell, _teller(bars, bar, cell.title))
            return
        gpus = visible_gpus(self.config.used_device)
        self.gpus = Queue()
        for worker in range(cells[0].workers if gpus else 0):
            self.gpus.put(gpus[worker % len(gpus)])
        with ThreadPoolExecutor(cells[0].workers) as pool:
            futures: dict[Future[tuple[Result, float]], Cell] = {}
            for cell in cells:
                futures[pool.submit(self._result, cell, _teller(bars, bar, cell.title))] = cell
            try:
                for future in as_completed(futures):
                    result, seconds = future.result()
                    yield futures[future], _beside_others(result), seconds
            except BaseException:  # interrupted, or a record could not be written: do not wait for what still runs
                pool.shutdown(wait=False, cancel_futures=True)
                self.isolation.kill()
                raise

    def _result(self, cell: Cell, say: OnProgress) -> tuple[Result, float]:
        if cell.needs_baseline and cell.part in self.barred:
            return Result(status="failed", message=self.barred[cell.part]), 0.0
        say("start")
        start = time.monotonic()
        if cell.isolated:
            job = Job(task=self.task.ref, config=self.config.model_dump_json(), cell=cell, given=self.given)
            with self._gpu() as environ:
                ended = self.isolation.run(work, job.model_dump_json(), cell.timeout, say, environ)
            if ended.end == "done":
                result = Result.model_validate_json(ended.answer)
            else:
                result = Result(status="failed" if ended.end == "crashed" else ended.end, message=ended.message)
        else:
            result = work_here(self.task, self.config, cell, self.given, say)
        return result, time.monotonic() - start

    @contextmanager
    def _gpu(self) -> Iterator[dict[str, str]]:
        """The environment of a cell: where several are measured at a time and there are several GPUs, it sees one."""
        try:
            gpu = self.gpus.get_nowait()
        except Empty:
            yield {}
            return
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
        finally:
            self.gpus.put(gpu)

    def bar_parts(self, pending: Sequence[Cell] = ()) -> None:
        """Where the quality of a baseline could not be measured, no row counts that means nothing without it.

        Nothing is said yet of the parts whose baseline is among the `pending` cells.
        """
        waiting = {cell.part for cell in pending if cell.kind == "quality" and cell.is_baseline and not cell.workload}
        for part in self.hanging - self.barred.keys() - waiting:
            dense = self._dense(part)
            if dense is None or (dense.status == "ok" and dense.quality is not None):
                continue
            reason = (
                f"no row of {dense.host} counts, for the quality of {dense.label} is: {dense.status}: {dense.message}"
            )
            self.barred[part] = reason
            for record in (self.store.records.get(key) for key in self.keys if key[0] == part):
                if record is not None and record.status == "ok":
                    why = {"status": "failed", "message": reason, "quality_note": reason}
                    self.store.append(record.model_copy(update={**why, "quality": None, "cost": None}))

    def _keep(self, cell: Cell, result: Result, seconds: float, console: Console) -> None:
        """Write a cell's records, and say so where nobody watches the bars or something went wrong."""
        records = self._records(cell, result, seconds)
        for record in records:
            self.store.append(record)
        result = result if records[0].status == result.status else Result(status="failed", message=records[0].message)
        if not console.is_terminal or result.status != "ok":
            why = f": {one_line(result.message)}" if result.message else ""
            line = f"{cell.kind} of {cell.title}: {result.status} in {seconds:.1f} s{why}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _records(self, cell: Cell, result: Result, seconds: float) -> list[Envelope]:
        """The records of a cell; failed where the task gave what its records cannot hold."""
        try:
            return [self._record(cell, phase, _whole(cell, result), seconds) for phase in cell.phases]
        except Exception as error:  # a mistake of the task's, in what it gave or in how it sets it against dense
            wrong = Result(status="failed", message=f"{type(error).__name__}: {error}")
            return [self._record(cell, phase, wrong, seconds) for phase in cell.phases]

    def refresh_quality(self) -> None:
        """Bring rows up to date whose quality, or whose baseline's quality, came after them."""
        for record in [self.store.records[key] for key in self.keys if key in self.store.records]:
            if record.part not in self.with_quality or record.part in self.barred:
                continue  # whoever measured it elsewhere may have written it
            workload = record.workload if record.kind == "quality" else ""
            found, note = self._quality_of(record.part, record.label, workload)
            found = found.brief if found is not None and record.kind == "cost" else found
            if (found, note) != (record.quality, record.quality_note):
                self.store.append(record.model_copy(update={"quality": found, "quality_note": note}))

    def _record(self, cell: Cell, phase: Phase, result: Result, seconds: float) -> Envelope:
        if cell.kind == "quality":
            note = f"{result.status}: {result.message}"
            quality = result.quality
        else:
            quality, note = self._quality_of(cell.part, cell.label)
            quality = None if quality is None else quality.brief
        record = self.task.record(
            **{name: getattr(cell, name) for name in Row.model_fields},
            **{name: getattr(result, name) for name in Outcome.model_fields},
            task=self.task.name,
            measured=cell.measured,
            config_hash=self.config.hash,
            benchmark=self.config.name,
            command=self.command,
            phase=phase,
            utc=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            environment=Environment(**{**dict(self._place(cell.threads)), **result.environment}),
            cost=result.costs.get(phase),
            quality=quality,
            quality_note=note,
        )
        if cell.kind == "cost" or record.quality is None:
            return record
        against = self._with_ratio(record)
        return record.model_copy(update={"quality": against, "quality_note": against.note})

    def _quality_of(self, part: str, label: str, workload: str = "") -> tuple[Quality | None, str]:
        """Give the quality of an attention, with its ratio to the baseline's, and a note."""
        if part not in self.with_quality:
            return None, NO_QUALITY
        found = self.store.records.get((part, "quality", "forward", label, 0, workload))
        if found is None:
            return None, "not measured"
        if found.quality is None:
            return None, found.quality_note
        try:
            against = self._with_ratio(found)
        except Exception as error:  # a mistake of the task's must not take the other rows with it
            bare = found.quality.model_copy(update={"ratio": None, "ratio_low": None, "ratio_high": None})
            return bare, f"{bare.note}; it cannot be set against dense: {type(error).__name__}: {error}"
        return against, against.note

    def _with_ratio(self, record: Envelope) -> Quality:
        """The quality of a record with its ratio to the dense baseline's; without one where there is none."""
        quality = record.quality
        assert quality is not None
        if record.is_baseline:
            return quality.as_dense()
        dense = self._dense(record.part, record.workload)
        if dense is None or dense.quality is None:
            return quality.model_copy(update={"ratio": None, "ratio_low": None, "ratio_high": None})
        return quality.against(dense.quality)

    def _dense(self, part: str, workload: str = "") -> Envelope | None:
        """The quality of a part's dense baseline."""
        return self.store.records.get((part, "quality", "forward", self.baselines.get(part, ""), 0, workload))

    def _place(self, threads: int | None) -> Environment:
        if threads not in self.places:
            self.places[threads] = environment(self.config.used_device, threads)
        return self.places[threads]


def _beside_others(result: Result) -> Result:
    """The result of a cell that ran beside others: memory that they took says nothing of its method."""
    if result.status != "oom":
        return result
    message = f"out of memory beside other rows; try fewer workers: {result.message}"
    return result.model_copy(update={"status": "failed", "message": message})


def visible_gpus(device: str) -> list[str]:
    """The GPUs among which cells that are measured at a time are shared out, as CUDA_VISIBLE_DEVICES names them.

    There are none where `device` names one of them, or there is one alone.
    """
    if device != "cuda" or torch.cuda.device_count() < 2:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _whole(cell: Cell, result: Result) -> Result:
    """A result that is ok has what its cell is for, and a cost its gates."""
    if result.status != "ok":
        return result
    if cell.kind == "quality" and result.quality is None:
        raise ValueError("the task gave no quality and called it ok")
    if cell.kind == "cost" and set(result.costs) != set(cell.phases):
        raise ValueError(f"the task gave costs of {sorted(result.costs)}, asked for were {sorted(cell.phases)}")
    return Result.model_validate(dict(result))


def _teller(bars: Progress, bar: TaskID, title: str) -> OnProgress:
    return lambda word: bars.update(bar, stage=f"{title}: {word}")

"""The runner: plan the rows, measure each in a child process, write each record as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from attnzoo import assets
from attnzoo.bench import progress
from attnzoo.bench.config import BenchConfig, LanguageConfig
from attnzoo.bench.environment import environment
from attnzoo.bench.isolate import ChildResult, Nursery, Say
from attnzoo.bench.jobs import Job, Outcome, attention_paths
from attnzoo.bench.kept import accuracy_of, against, perplexity_of
from attnzoo.bench.plan import Row, baseline_label, plan
from attnzoo.bench.record import (
    CONFIG_FILE,
    Environment,
    Part,
    Phase,
    Record,
    RecordStore,
)
from attnzoo.bench.summary import Qualities, one_line
from attnzoo.errors import AssetError, AttnZooError, ConfigError
from attnzoo.extras import require
from attnzoo.tasks.classify import cost as worker
from attnzoo.tasks.classify import small as classify
from attnzoo.tasks.decode import cost as llm

PRELOAD = ("attnzoo.tasks.classify.cost", "timm")
PRELOAD_LANGUAGE = ("attnzoo.tasks.decode.cost", "transformers.models.llama.modeling_llama")
NO_QUALITY = "this config measures no quality"


TARGETS: dict[tuple[str, str], Callable[[str, Say], str]] = {
    ("vision", "cost"): worker.cost_main,
    ("vision", "quality"): worker.quality_main,
    ("language", "cost"): llm.cost_main,
    ("language", "quality"): llm.quality_main,
}


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
        If the data set, the language model or its text cannot be had.
    """
    console = console or Console(stderr=True)
    config.check_folder()
    check(config)
    data = assets.get(config.quality.dataset) if config.quality is not None else Path()
    with RecordStore(config.folder, config.hash, fresh=config.fresh) as store:
        (config.folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        rows = [row for row in plan(config) if not all(map(store.done, row.keys(config)))]
        kept = len(plan(config)) - len(rows)
        if kept:
            console.print(f"{kept} rows of an earlier run are kept, {len(rows)} to measure", highlight=False)
        prose = Prose()
        if config.language is not None and any(row.part == "language" for row in rows):
            prose = read_prose(config.language, config.seed)
        runner = _Runner(config, store, data, prose, command)
        with progress.bars(console) as bars:
            runner.train([row for row in rows if row.kind == "quality" and row.part == "vision"], bars)
            runner.score([row for row in rows if row.kind == "quality" and row.part == "language"], bars)
            runner.time([row for row in rows if row.kind == "cost"], bars)
        runner.refresh_quality()
        return list(store.records.values())


@dataclass(frozen=True)
class Prose:
    """Token ids out of the language model's text: prompts to time and windows to score."""

    prompts: tuple[tuple[int, ...], ...] = ()
    windows: tuple[tuple[int, ...], ...] = ()


def read_prose(language: LanguageConfig, seed: int) -> Prose:
    """Fetch the model and the text, once for all children, and cut the text.

    Raises
    ------
    AssetError
        If one of them cannot be had.
    ConfigError
        If the text is too short, or the model is not made for as many tokens.
    """
    from attnzoo.tasks.decode import lm as decode
    from attnzoo.tasks.decode import text

    cost, quality = language.cost, language.quality
    try:
        made_for, tokenizer = decode.longest(language.model), decode.load_tokenizer(language.model)
        prose = text.load_text(language.text)
    except AssetError as error:
        raise AssetError(f"{error}\nTo measure without the language model: language=null") from error
    longest = max(cost.prompt_tokens + cost.new_tokens, quality.tokens)
    if made_for is not None and longest > made_for:
        raise ConfigError(f"language: {longest:,} tokens asked for, but {language.model} is made for {made_for:,}")
    prompts = text.windows(prose, tokenizer, count=cost.batch, tokens=cost.prompt_tokens, seed=seed)
    scored = text.windows(prose, tokenizer, count=quality.windows, tokens=quality.tokens, seed=seed)
    return Prose(tuple(window.ids for window in prompts), tuple(window.ids for window in scored))


def check(config: BenchConfig) -> None:
    """Check, before any work, what the schema cannot: the host's name, the device and the shapes of the quality model.

    Raises
    ------
    ConfigError
        With every problem, one a line.
    """
    require("timm", "matplotlib")
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
    if not problems:
        problems += _host_problems(config)
    if config.language is not None:
        from attnzoo.tasks.decode.text import check_text_name

        try:
            require("transformers", "accelerate", extra="llm")
            check_text_name(config.language.text)
        except AttnZooError as error:
            problems.append(f"language: {error}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"device: {config.device!r} asked for, but PyTorch sees no CUDA device here; use device=cpu")
    if problems:
        raise ConfigError("\n".join(["this config cannot be run here:", *(f"  {problem}" for problem in problems)]))


def _host_problems(config: BenchConfig) -> list[str]:
    """What shows only when the host is built, at its smallest."""
    try:
        model = worker.build_host(config, min(config.cost.tokens))
    except Exception as error:  # a factory of timm's may raise anything
        return [f"host: {error if isinstance(error, AttnZooError) else f'{type(error).__name__}: {error}'}"]
    if not attention_paths(model):
        return [f"host.model: {config.host.model!r} has no attention layer that attnzoo can swap"]
    return []


class _Runner:
    """Measures rows and writes their records."""

    def __init__(self, config: BenchConfig, store: RecordStore, data: Path, prose: Prose, command: str) -> None:
        self.config, self.store, self.data, self.prose, self.command = config, store, data, prose, command
        preload = PRELOAD if config.language is None else (*PRELOAD, *PRELOAD_LANGUAGE)
        self.nursery = Nursery(preload, cuda=config.device.startswith("cuda"))
        self.environment = environment(config.device, config.threads)

    def train(self, rows: Sequence[Row], bars: Progress) -> None:
        """Train the attentions of `rows`, several at a time."""
        quality = self.config.quality
        if quality is None or not rows:
            return
        bar = bars.add_task("train", total=len(rows), stage="")
        self._side_by_side(rows, quality.workers, quality.threads, quality.timeout_seconds, bars, bar)

    def score(self, rows: Sequence[Row], bars: Progress) -> None:
        """Score prose through the attentions of `rows`, several at a time."""
        language = self.config.language
        if language is None or not rows:
            return
        bar = bars.add_task("score", total=len(rows), stage="")
        quality = language.quality
        self._side_by_side(rows, quality.workers, quality.threads, quality.timeout_seconds, bars, bar)

    def _side_by_side(
        self, rows: Sequence[Row], workers: int, threads: int, timeout: float, bars: Progress, bar: TaskID
    ) -> None:
        where = environment(self.config.device, threads)
        with ThreadPoolExecutor(workers) as pool:
            futures: dict[Future[tuple[ChildResult, float]], Row] = {}
            for row in rows:
                say = _teller(bars, bar, row.label(self.config))
                futures[pool.submit(self._child, row, timeout, say)] = row
            try:
                for future in as_completed(futures):
                    result, seconds = future.result()
                    self._keep(futures[future], _outcome(result), seconds, where, bars.console)
                    bars.advance(bar)
            except BaseException:  # interrupted, or a record could not be written: do not wait for what still runs
                pool.shutdown(wait=False, cancel_futures=True)
                self.nursery.kill()
                raise

    def time(self, rows: Sequence[Row], bars: Progress) -> None:
        """Measure the cost of `rows`, one after another, so that none disturbs another."""
        if not rows:
            return
        bar = bars.add_task("time", total=sum(_weight(row) for row in rows), stage="")
        language = self.config.language
        barred = self._barred()
        for row in rows:
            timeout = self.config.cost.timeout_seconds
            if row.part == "language" and language is not None:
                timeout = language.cost.timeout_seconds
                if barred:
                    self._keep(row, Outcome(status="failed", message=barred), 0.0, self.environment, bars.console)
                    bars.advance(bar, _weight(row))
                    continue
            say = _teller(bars, bar, f"{row.label(self.config)} at {row.tokens:,} tokens")
            result, seconds = self._child(row, timeout, say)
            self._keep(row, _outcome(result), seconds, self.environment, bars.console)
            bars.advance(bar, _weight(row))

    def _barred(self) -> str:
        """Why no row of the language model counts; empty where they do. Rows that were scored then fail as well."""
        language = self.config.language
        dense = self._found("language", baseline_label(self.config, "language")) if language is not None else None
        if dense is None or (dense.status == "ok" and dense.quality is not None):
            return ""
        reason = f"no row of {dense.host} counts, for the quality of {dense.label} is: {dense.status}: {dense.message}"
        for record in list(self.store.records.values()):
            if record.part == "language" and record.kind == "quality" and record.status == "ok":
                update = {"status": "failed", "message": reason, "quality": None, "quality_note": reason}
                self.store.append(record.model_copy(update=update))
        return reason

    def _keep(self, row: Row, outcome: Outcome, seconds: float, where: Environment, console: Console) -> None:
        """Write a row's records, and say so where nobody watches the bars or something went wrong."""
        for phase in row.phases(self.config):
            self.store.append(record := self._record(row, phase, outcome, seconds, where))
        if not console.is_terminal or record.status != "ok":
            at = f" at {record.tokens:,} tokens" if record.tokens else ""
            why = f": {one_line(record.message)}" if record.message else ""
            line = f"{record.kind} of {record.label}{at}: {record.status} in {record.seconds:.1f} s{why}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def refresh_quality(self) -> None:
        """Bring rows up to date whose quality, or whose baseline's quality, came after them."""
        for record in list(self.store.records.values()):
            if record.part == "vision" and self.config.quality is None:
                continue  # whoever trained the models elsewhere may have written it
            quality, note = self._quality_of(record.part, record.label)
            if (quality, note) != (record.quality, record.quality_note):
                self.store.append(record.model_copy(update={"quality": quality, "quality_note": note}))

    def _child(self, row: Row, timeout: float, say: Say) -> tuple[ChildResult, float]:
        language = row.part == "language"
        job = Job(
            config=self.config,
            attention=row.attention,
            part=row.part,
            tokens=row.tokens,
            data="" if language else str(self.data),
            prompts=self.prose.prompts if language and row.kind == "cost" else (),
            windows=self.prose.windows if language and row.kind == "quality" else (),
        )
        say("start")
        start = time.monotonic()
        target = TARGETS[row.part, row.kind]
        return self.nursery.run(target, job.model_dump_json(), timeout, say), time.monotonic() - start

    def _record(self, row: Row, phase: Phase, outcome: Outcome, seconds: float, where: Environment) -> Record:
        config, spec, label = self.config, row.spec(self.config), row.label(self.config)
        if row.kind == "cost":
            quality, note = self._quality_of(row.part, label)
        else:
            quality, outcome = self._summarise(row, outcome)
            note = quality.note if quality is not None else f"{outcome.status}: {outcome.message}"
        return Record(
            config_hash=config.hash,
            benchmark=config.name,
            command=self.command,
            part=row.part,
            kind=row.kind,
            scope="layer" if row.kind == "cost" and row.part == "vision" and config.cost.of == "layer" else "model",
            phase=phase,
            label=label,
            attention=None if spec is None else spec.name,
            options={} if spec is None else spec.options,
            is_baseline=spec is None,
            status=outcome.status,
            message=outcome.message,
            utc=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            environment=where,
            host=_host(config, row),
            dtype=_dtype(config, row),
            tokens=row.tokens,
            shapes=outcome.shapes,
            gate=outcome.gate,
            baseline_gate=outcome.baseline_gate,
            backends=outcome.backends,
            cost=outcome.decode_cost if phase == "decode" else outcome.cost,
            quality=quality,
            quality_note=note,
        )

    def _found(self, part: Part, label: str) -> Record | None:
        return self.store.records.get((part, "quality", "forward", label, 0))

    def _quality_of(self, part: Part, label: str) -> tuple[Qualities | None, str]:
        """Give the quality of an attention, with its ratio to the baseline's, and a note."""
        if part == "vision" and self.config.quality is None:
            return None, NO_QUALITY
        found = self._found(part, label)
        if found is None:
            return None, "not measured"
        if found.quality is None:
            return None, found.quality_note
        return self._with_ratio(part, label, found.quality), found.quality.note

    def _with_ratio(self, part: Part, label: str, quality: Qualities) -> Qualities:
        base = baseline_label(self.config, part)
        if label == base:
            return quality.model_copy(update={"ratio": 1.0})
        dense = self._found(part, base)
        return against(quality, None if dense is None else dense.quality)

    def _summarise(self, row: Row, outcome: Outcome) -> tuple[Qualities | None, Outcome]:
        """Give the quality that a child found, and the outcome: failed where the canary lives."""
        config = self.config
        found: Qualities | None = None
        if config.quality is not None and outcome.trainings:
            found = accuracy_of(config.quality, outcome.trainings)
        elif config.language is not None and outcome.nll:
            scored = perplexity_of(config.language, outcome.nll, outcome.canary_nll)
            if scored.canary is not None and not scored.canary.passed:
                canary = scored.canary
                message = (
                    f"the canary ({canary.label}) is {canary.above_dense:.3f} nats a token above dense, must be at "
                    f"least {canary.at_least:g}: what was scored does not depend on the cache"
                )
                return None, outcome.model_copy(update={"status": "failed", "message": message})
            found = scored
        return (None if found is None else self._with_ratio(row.part, row.label(config), found)), outcome


def _outcome(result: ChildResult) -> Outcome:
    if result.end == "done":
        return Outcome.model_validate_json(result.answer)
    if result.end == "crashed":
        return Outcome(status="failed", message=result.message)
    return Outcome(status=result.end, message=result.message)


def _host(config: BenchConfig, row: Row) -> str:
    if row.part == "language" and config.language is not None:
        return config.language.host
    host = config.host if row.kind == "cost" or config.quality is None else config.quality.host
    name = f"{host.library}:{host.model}"
    if row.kind == "quality":
        return name
    return name + (", its first attention layer alone" if config.cost.of == "layer" else "")


def _dtype(config: BenchConfig, row: Row) -> str:
    if row.part == "language" and config.language is not None:
        return config.language.dtype
    return config.cost.dtype if row.kind == "cost" else "float32"


def _weight(row: Row) -> float:
    """Guess how long a row takes, in arbitrary units, for the time left: a fixed part and one of attention."""
    if row.part == "language":
        return 10 + row.tokens / 20
    return 3 + row.tokens / 500 + (row.tokens / 1000) ** 2


def _teller(bars: Progress, bar: TaskID, title: str) -> Say:
    return lambda stage: bars.update(bar, stage=f"{title}: {stage}")

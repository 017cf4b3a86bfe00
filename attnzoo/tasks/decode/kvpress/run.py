"""Run a comparison with kvpress, prompt by prompt; an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from attnzoo import files
from attnzoo.bench.environment import environment
from attnzoo.bench.jsonl import append_line
from attnzoo.errors import ConfigError, RunError
from attnzoo.tasks.decode import lm as decode
from attnzoo.tasks.decode.kvpress.config import Comparison, Key, Row, Setting, Side, rows_of
from attnzoo.tasks.decode.kvpress.process import WorkerProcess, worker_command
from attnzoo.tasks.decode.kvpress.prompts import Prompt, prompts_of
from attnzoo.tasks.decode.kvpress.record import (
    AnyLine,
    Line,
    ResultLine,
    RunLine,
    VersionsLine,
    first_line,
    read_records,
)
from attnzoo.tasks.decode.needles import Sample, found

RECORDS = "records.jsonl"


def run(config: Comparison, python: str, command: str, only: Sequence[str], say: Callable[[str], None]) -> Path:
    """Run what is not in the records yet; give the records' path."""
    groups = [group for group in rows_of(config) if not only or group[0].policy in only]
    prompts, text_sha256 = prompts_of(config)
    with files.locked(config.folder):
        path = config.folder / RECORDS
        lines = _prepare(path, config, text_sha256, command)
        done = {line.key for line in lines if isinstance(line, ResultLine)}
        seen = {line.side: line.versions for line in lines if isinstance(line, VersionsLine)}
        jobs = [(setting, group) for setting in config.settings for group in groups]
        for number, (setting, group) in enumerate(jobs, start=1):
            left = list(_turns(group, setting, done, len(prompts)))
            if not left:
                continue
            with ExitStack() as stack:
                workers: dict[str, WorkerProcess] = {}
                for row in {f"{row.side} {row.method}": row for _, row in left}.values():
                    worker = stack.enter_context(_start(row, config, python))
                    workers[f"{row.side} {row.method}"] = worker
                    _remember(row.side, worker.versions, seen, path)
                for sample, row in left:
                    worker = workers[f"{row.side} {row.method}"]
                    line = _result(config, row, setting, sample, prompts[sample], worker)
                    append_line(path, Line(line))
                    say(
                        f"{number} of {len(jobs)}  {setting}  {row.side} {row.method}  prompt {sample + 1}: "
                        f"{'found' if all(line.hits) else 'missed'}, TTFT {line.first_token_seconds:.2f} s"
                    )
    return path


def _turns(group: Sequence[Row], setting: Setting, done: set[Key], samples: int) -> Iterator[tuple[int, Row]]:
    """What is left, sample by sample; who comes first changes with each, so that a drift of the machine cancels."""
    for sample in range(samples):
        for row in group if sample % 2 == 0 else reversed(group):
            if row.key(setting, sample) not in done:
                yield sample, row


def _start(row: Row, config: Comparison, python: str) -> WorkerProcess:
    setup = {
        "side": row.side,
        "method": row.spec,
        "attention": row.attention,
        "model": str(decode.model_folder(config.model) or config.model),
        "dtype": config.dtype,
        "threads": config.threads,
    }
    return WorkerProcess(worker_command(row.side, python), f"{row.side} {row.method}", setup)


def _result(
    config: Comparison, row: Row, setting: Setting, sample: int, prompt: Prompt, worker: WorkerProcess
) -> ResultLine:
    context = prompt.context(setting)
    keep = max(1, int(context * config.share))
    job = {
        "ids": prompt.ids,
        "context": context,
        "keep": keep,
        "answers": prompt.answers,
        "limit": prompt.limit,
        "seed": config.seed + sample,
    }
    answer = worker.ask(job, config.timeout_seconds)
    kept: tuple[int, int] = tuple(answer["kept"])
    expected = context if row.spec is None else keep
    if any(abs(n - expected) > 1 for n in kept):  # kvpress rounds the share that goes, not the one that stays
        raise RunError(
            f"{row.side} {row.method} kept {kept[0]} to {kept[1]} entries per head of prompt {sample}, not {expected}: "
            "the two sides cannot be compared"
        )
    whole = Sample("single", sample, prompt.ids, prompt.answers, (prompt.depth,), config.seed, "")
    return ResultLine(
        side=row.side,
        policy=row.policy,
        method=row.method,
        setting=setting,
        sample=sample,
        context_tokens=context,
        kept=kept,
        answer=answer["text"],
        expected=prompt.answers,
        hits=found(whole, answer["text"]),
        depth=prompt.depth,
        first_token_seconds=round(answer["first_token_seconds"], 4),
        cache_peak_bytes=answer["cache_peak_bytes"],
        entries_peak_bytes=answer["entries_peak_bytes"],
        memory_peak_bytes=answer["memory_peak_bytes"],
    )


def _prepare(path: Path, config: Comparison, text_sha256: str, command: str) -> list[AnyLine]:
    """Give the lines that are there already, and begin the file if there are none."""
    lines = read_records(path, mend=True) if path.exists() else []
    if not lines:
        first = RunLine(
            config_hash=config.hash,
            config=config.model_copy(update={"output": None}),
            text_sha256=text_sha256,
            environment=environment("cpu", config.threads),
            command=command,
        )
        append_line(path, Line(first))
        return [first]
    begun = first_line(lines, path)
    for what, old, new in (("config", begun.config_hash, config.hash), ("text", begun.text_sha256, text_sha256)):
        if old != new:
            raise ConfigError(
                f"{path} holds results of another {what} ({old[:16]}, this one is {new[:16]}); give another folder "
                "with output=PATH, or remove that file"
            )
    return lines


def _remember(side: Side, versions: dict[str, str], seen: dict[Side, dict[str, str]], path: Path) -> None:
    """Note the versions of a side, and refuse to mix two of them."""
    if side not in seen:
        append_line(path, Line(VersionsLine(side=side, versions=versions)))
        seen[side] = versions
    elif seen[side] != versions:
        raise ConfigError(
            f"{path} was begun with {seen[side]} on the side of {side}, now there is {versions}; give another folder "
            "with output=PATH"
        )

"""Compare attnzoo with kvpress, side by side: same model, prompts and share of the cache kept, a process a row.

python eval/compare_kvpress.py configs/decode/kvpress.yaml [key=value ...]    run; a broken run goes on where it stopped
python eval/compare_kvpress.py configs/decode/kvpress.yaml --only keydiff tova    only these policies, for now
python eval/compare_kvpress.py --report RECORDS.jsonl                         the table again, without running

kvpress pins an old transformers, so it has an environment of its own: the one whose interpreter `--python` names, or
one that this script makes in attnzoo's cache folder (about 6 GB, once).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, RootModel, model_validator

from attnzoo import assets
from attnzoo.bench.config import Dtype
from attnzoo.bench.lines import FolderLock, append_line, read_lines
from attnzoo.bench.measure import quantiles
from attnzoo.bench.record import Count, Entry, Environment, NonNegative
from attnzoo.bench.strict import Section, read_yaml, validated
from attnzoo.bench.system import environment
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.registry import build_policy, describe
from attnzoo.tasks import decode
from attnzoo.tasks.classify import wilson_interval
from attnzoo.tasks.needles import Format, Sample, found, make_samples
from attnzoo.tasks.paired import paired_difference
from attnzoo.tasks.text import load_text

KVPRESS = "0.5.5"
WORKER = Path(__file__).with_name("kvpress_worker.py")
RECORDS, TABLE = "records.jsonl", "table.md"
DENSE = "dense"
LAST_WORDS = 2000
STARTING_SECONDS = 600.0
SCHEMA = 1

Side = Literal["attnzoo", "kvpress"]
Setting = Literal["question_inside", "question_after"]
TITLES: dict[Setting, str] = {
    "question_inside": "The question is the end of what is compressed",
    "question_after": "The context is compressed without the question, which comes after",
}


class Ours(Section):
    """A policy of attnzoo; its budget follows from the share kept."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """As the table names it."""
        return self.name


class Theirs(Section):
    """A press of kvpress; with `block_size`, inside its BlockPress. `attention` is what transformers computes with."""

    press: Annotated[str, Field(pattern=r"^\w+Press$")]
    options: dict[str, Any] = Field(default_factory=dict)
    block_size: PositiveInt | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"

    @property
    def label(self) -> str:
        """As the table names it."""
        return self.press if self.block_size is None else f"BlockPress({self.press}, {self.block_size})"


class Policy(Section):
    """The same idea on both sides; `note` says where the two differ."""

    policy: str
    attnzoo: Ours
    kvpress: Annotated[tuple[Theirs, ...], Field(min_length=1)]
    note: str = ""


class Comparison(Section):
    """The config. `output` says where to write and is no part of its identity."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    dtype: Dtype = "float32"
    threads: PositiveInt = 1
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    seed: Annotated[int, Field(ge=0)] = 0
    tokens: Annotated[int, Field(ge=2)] = 2000
    samples: PositiveInt = 24
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    block_size: PositiveInt = 128
    settings: Annotated[tuple[Setting, ...], Field(min_length=1)] = ("question_inside", "question_after")
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)]
    timeout_seconds: PositiveFloat = 600.0
    output: Path | None = None

    @model_validator(mode="after")
    def _rows_differ(self) -> Comparison:
        names = [DENSE, *(policy.policy for policy in self.policies)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"policies must have names of their own, but {twice} stand for more than one")
        for policy in self.policies:
            labels = [theirs.label for theirs in policy.kvpress]
            if len(set(labels)) < len(labels):
                raise ValueError(f"{policy.policy}: a press stands twice among {labels}")
        return self

    @property
    def folder(self) -> Path:
        """Where records and table go."""
        return self.output if self.output is not None else Path("runs") / self.name

    @property
    def hash(self) -> str:
        """Identity: 16 hex digits over the full content."""
        content = self.model_dump(mode="json", exclude={"output", "timeout_seconds"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class RunLine(Entry):
    """The first line of the records: what was run."""

    kind: Literal["run"] = "run"
    schema_version: Literal[1] = 1
    config_hash: str
    config: Comparison
    text_sha256: str
    environment: Environment
    command: str


class VersionsLine(Entry):
    """Versions of Python and packages in the environment of one side."""

    kind: Literal["versions"] = "versions"
    side: Side
    versions: dict[str, str]


class ResultLine(Entry):
    """One prompt through one row.

    `kept` is the least and the most entries a head that any layer holds after the context. `cache_peak_bytes` is the
    largest size of the cache, all layers together, seen after any layer's attention: everything allocated;
    `entries_peak_bytes` counts keys and values in use alone. `memory_peak_bytes` is the peak of the resident set above
    that of the loaded model; null where the system does not tell.
    """

    kind: Literal["result"] = "result"
    side: Side
    policy: str
    method: str
    setting: Setting
    sample: Count
    context_tokens: Count
    kept: tuple[Count, Count]
    answer: str
    expected: tuple[str, ...]
    hits: tuple[bool, ...]
    depth: NonNegative
    first_token_seconds: NonNegative
    cache_peak_bytes: Count
    entries_peak_bytes: Count
    memory_peak_bytes: Count | None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What it is the result of."""
        return self.setting, self.policy, f"{self.side} {self.method}", self.sample


class Line(RootModel[Annotated[RunLine | VersionsLine | ResultLine, Field(discriminator="kind")]]):
    """A line of the records."""


class Row(Entry):
    """One row of the table: a method of one side, in one setting."""

    side: Side
    policy: str
    method: str
    attention: Literal["sdpa", "eager"]
    spec: dict[str, Any] | None

    def key(self, setting: Setting, sample: int) -> tuple[str, str, str, int]:
        """As `ResultLine.key`."""
        return setting, self.policy, f"{self.side} {self.method}", sample


class Prompt(Entry):
    """A sample, and where its question begins."""

    ids: tuple[int, ...]
    question_at: Count
    answers: tuple[str, ...]
    depth: NonNegative
    limit: Count

    def context(self, setting: Setting) -> int:
        """Tokens that are compressed."""
        return self.question_at if setting == "question_after" else len(self.ids)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read and check a config.

    Raises
    ------
    ConfigError
        With every problem, one a line.
    """
    data = read_yaml(path, overrides)
    problems: list[str] = []
    for index, entry in enumerate(data.get("policies") or []):
        ours = entry.get("attnzoo") if isinstance(entry, dict) else None
        if not isinstance(ours, dict) or not isinstance(ours.get("name"), str):
            continue  # the schema says what is wrong
        try:
            build_policy(describe(ours["name"]), {**(ours.get("options") or {}), "budget": 1_000_000})
        except AttnZooError as error:
            problems.append(f"policies.{index}.attnzoo: {error}")
    return validated(Comparison, data, problems, str(path))


def rows_of(config: Comparison) -> list[list[Row]]:
    """The rows, in groups that are run side by side: dense first, then each policy."""
    dense = [_row("attnzoo", DENSE, DENSE, None), _row("kvpress", DENSE, DENSE, None)]
    groups = [dense]
    for policy in config.policies:
        ours = {"name": policy.attnzoo.name, "options": {"block_size": config.block_size, **policy.attnzoo.options}}
        group = [_row("attnzoo", policy.policy, policy.attnzoo.label, ours)]
        for theirs in policy.kvpress:
            spec = {**theirs.model_dump(mode="json", exclude={"attention"}), "share": config.share}
            group.append(_row("kvpress", policy.policy, theirs.label, spec, theirs.attention))
        groups.append(group)
    return groups


def _row(
    side: Side, policy: str, method: str, spec: dict[str, Any] | None, attention: Literal["sdpa", "eager"] = "sdpa"
) -> Row:
    return Row(side=side, policy=policy, method=method, attention=attention, spec=spec)


def prompts_of(config: Comparison) -> tuple[list[Prompt], str]:
    """Make the prompts once, for both sides; give also the SHA-256 of their text."""
    text, tokenizer = load_text(config.text), decode.load_tokenizer(config.model)
    arguments = {"kind": "single", "count": config.samples, "tokens": config.tokens, "seed": config.seed}
    samples = make_samples(text, tokenizer, **arguments)  # type: ignore[arg-type]
    prompts = []
    for sample in samples:
        room = len(tokenizer(f"{sample.answers[0]},", add_special_tokens=False).input_ids)
        prompts.append(
            Prompt(
                ids=sample.ids,
                question_at=question_start(sample, tokenizer),
                answers=sample.answers,
                depth=sample.depths[0],
                limit=room + decode.ROOM_FOR_WORDS,
            )
        )
    return prompts, text.sha256


def question_start(sample: Sample, tokenizer: Any, form: Format | None = None) -> int:
    """Number of the token at which the question begins, the empty line before it included.

    Raises
    ------
    AttnZooError
        If the prompt holds no question in the words of `form`.
    """
    opening = "\n\n" + (form or Format()).question.partition("{key}")[0].rstrip()
    for start in range(len(sample.ids) - 1, 0, -1):
        if tokenizer.decode(sample.ids[start:]).startswith(opening):
            return start
    raise AttnZooError(f"sample {sample.index} does not end with a question that begins {opening.strip()!r}")


def kvpress_python(given: str | None, say: Callable[[str], None]) -> str:
    """Give the interpreter of an environment that holds kvpress in the right version, making one where none is given.

    Raises
    ------
    ConfigError
        If the one given holds no kvpress, or another version.
    AssetError
        If one cannot be made.
    """
    if given is not None:
        version, reason = _kvpress_version(given)
        if version != KVPRESS:
            raise ConfigError(
                f"--python {given}: kvpress {KVPRESS} is needed, but "
                + (f"it holds {version}" if version else f"kvpress cannot be asked for there: {reason}")
                + f'; run there: python -m pip install "kvpress=={KVPRESS}"'
            )
        return given
    home = assets.cache_folder() / "kvpress"
    folder = home / KVPRESS
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    if _kvpress_version(python)[0] == KVPRESS:
        return python
    with FolderLock(home):
        say(f"making an environment with kvpress {KVPRESS} in {folder} (about 6 GB, several minutes, once) ...")
        steps = (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"kvpress=={KVPRESS}"],
        )
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True)
            except OSError as error:
                raise assets.AssetError(_no_environment(step, str(error))) from error
            if done.returncode:
                raise assets.AssetError(_no_environment(step, (done.stderr or done.stdout).strip()[-LAST_WORDS:]))
    version, reason = _kvpress_version(python)
    if version != KVPRESS:
        raise assets.AssetError(_no_environment(steps[-1], f"kvpress is {version or 'not there: ' + reason}"))
    return python


def _no_environment(step: Sequence[str], reason: str) -> str:
    return (
        f"no environment with kvpress {KVPRESS} could be made; `{' '.join(step)}` said:\n{reason}\n"
        "What you can do: make one by hand and name its interpreter with --python."
    )


def _kvpress_version(python: str) -> tuple[str | None, str]:
    """The version of kvpress that an interpreter sees, or None and why not."""
    code = "import importlib.metadata as m; print(m.version('kvpress'))"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["it failed"])[-1]
    return done.stdout.strip(), ""


def worker_command(side: Side, python: str) -> list[str]:
    """How a worker is started: kvpress's side sees nothing of this environment."""
    return [sys.executable, "-P", str(WORKER)] if side == "attnzoo" else [python, "-I", str(WORKER)]


class Worker:
    """A row in a process of its own, that answers one job at a time.

    Raises
    ------
    AttnZooError
        From any method, if the process dies or takes too long: with its last words.
    """

    def __init__(self, command: Sequence[str], title: str, setup: dict[str, Any]) -> None:
        self.title = title
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  until close()
        threads = str(setup["threads"])
        surroundings = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=surroundings
        )
        try:
            self.versions: dict[str, str] = self.ask(setup, STARTING_SECONDS)["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a job and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            self._process.wait()
            self._said.seek(0)
            words = self._said.read().strip()[-LAST_WORDS:] or "(nothing)"
            reason = f"took longer than {timeout:g} s" if late else f"ended with code {self._process.returncode}"
            raise AttnZooError(f"the process of {self.title} {reason}; its last words:\n{words}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()


def run(config: Comparison, python: str, command: str, only: Sequence[str], say: Callable[[str], None]) -> Path:
    """Run what is not in the records yet; give the records' path."""
    groups = [group for group in rows_of(config) if not only or group[0].policy in only]
    prompts, text_sha256 = prompts_of(config)
    with FolderLock(config.folder):
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
                workers: dict[str, Worker] = {}
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
                        f"{'found' if all(line.hits) else 'missed'}, first token {line.first_token_seconds:.2f} s"
                    )
    return path


def _turns(
    group: Sequence[Row], setting: Setting, done: set[tuple[str, str, str, int]], samples: int
) -> Iterator[tuple[int, Row]]:
    """What is left, sample by sample; who comes first changes with each, so that a drift of the machine cancels."""
    for sample in range(samples):
        for row in group if sample % 2 == 0 else reversed(group):
            if row.key(setting, sample) not in done:
                yield sample, row


def _start(row: Row, config: Comparison, python: str) -> Worker:
    setup = {
        "side": row.side,
        "method": row.spec,
        "attention": row.attention,
        "model": str(decode.model_folder(config.model) or config.model),
        "dtype": config.dtype,
        "threads": config.threads,
    }
    return Worker(worker_command(row.side, python), f"{row.side} {row.method}", setup)


def _result(config: Comparison, row: Row, setting: Setting, sample: int, prompt: Prompt, worker: Worker) -> ResultLine:
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
        raise AttnZooError(
            f"{row.side} {row.method} kept {kept[0]} to {kept[1]} entries a head of prompt {sample}, not {expected}: "
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


def _prepare(path: Path, config: Comparison, text_sha256: str, command: str) -> list[Any]:
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
    begun = _run_line(lines, path)
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


def read_records(path: Path, mend: bool = False) -> list[Any]:
    """Read the lines of a records file."""
    try:
        return [line.root for line in read_lines(path, Line, SCHEMA, mend=mend)]
    except OSError as error:
        raise ConfigError(f"the records {str(path)!r} cannot be read: {error.strerror}") from error


def _run_line(lines: Sequence[Any], path: Path) -> RunLine:
    if not lines or not isinstance(lines[0], RunLine):
        raise AttnZooError(f"{path} does not begin with what was run")
    return lines[0]


HEAD = (
    "| policy | method | kept | pass keys found | attnzoo's less this one's | first token, s: p20 / **p50** / p80 "
    "| over attnzoo's | peak cache, MB | peak memory, MB |"
)


def table(lines: Sequence[Any], path: Path) -> str:
    """The results in Markdown, whoever is ahead."""
    begun = _run_line(lines, path)
    config = begun.config
    results = {line.key: line for line in lines if isinstance(line, ResultLine)}
    parts = [_opening(begun, lines)]
    for setting in config.settings:
        rows, ahead = [], []
        for group in rows_of(config):
            ours = _results_of(group[0], setting, results, config.samples)
            for row in group:
                these = _results_of(row, setting, results, config.samples)
                if these:
                    rows.append(_table_row(row, these, ours))
                    ahead += [] if row is group[0] else _ahead(row, these, ours)
        if not rows:
            continue
        rule = "|---|---|---|---|---|---|---|---|---|"
        said = [f"- {line}" for line in ahead] or ["- nowhere"]
        parts.append(
            "\n".join([f"## {TITLES[setting]}", "", HEAD, rule, *rows, "", "Where kvpress is ahead:", "", *said])
        )
    notes = [f"- {policy.policy}: {policy.note}" for policy in config.policies if policy.note]
    parts.append("\n".join(["## How to read it", "", *READING, *notes]))
    return "\n\n".join(parts) + "\n"


READING = (
    "- Each prompt went through the rows of a policy in turn, one process a row, one at work at a time. Prompts, "
    "weights, precision, threads and the rule that ends an answer are the same.",
    "- found: with its 95% Wilson interval. attnzoo's less this one's: mean over the same prompts, with the 95% "
    "interval of a paired bootstrap; above 0 attnzoo finds more. over attnzoo's: the times, prompt by prompt, the "
    "median; above 1 kvpress is slower.",
    "- kept: entries a head after the context. attnzoo reads the context in blocks, evicting at the end of each, and "
    "evicts what is pending at the end of the context (`cache.flush()`), so that both sides keep the same share. Its "
    "budget goes on to hold at the end of every block; kvpress evicts no more, and its cache grows with question and "
    "answer.",
    "- Where the question is inside, the first token of kvpress's answer comes out of full attention over the prompt, "
    "before anything is evicted; attnzoo's comes out of the bounded cache.",
    "- peak cache: the largest size of all that the cache has allocated, seen after every layer's attention (kvpress: "
    "before its hook compresses that layer, so one layer is whole). attnzoo's has room for a block beyond the budget "
    "in every layer, positions, and what a policy keeps. Keys and values that are on their way into the cache count "
    "in neither, nor do copies that live for a moment; all of them do in peak memory.",
    "- peak memory: of the resident set, above that of the loaded model.",
    "- Options are the same on both sides where both have them; what else differs:",
)


def _opening(begun: RunLine, lines: Sequence[Any]) -> str:
    config, where = begun.config, begun.environment
    versions = [
        f"- {line.side}: " + ", ".join(f"{name} {version}" for name, version in line.versions.items())
        for line in lines
        if isinstance(line, VersionsLine)
    ]
    same = _same_answers(lines)
    threads = "1 thread" if config.threads == 1 else f"{config.threads} threads"
    about = (
        f"{config.model} in {config.dtype}, {config.samples} prompts of {config.tokens:,} tokens, each with a pass key "
        f"in prose ({config.text}, SHA-256 {begun.text_sha256[:16]}, seed {config.seed}); {config.share:.0%} of the "
        f"cache kept, blocks of {config.block_size}; {threads} on {where.device}; config {begun.config_hash}, commit "
        f"{(where.commit or 'unknown')[:12]}{' with changes' if where.dirty else ''}."
    )
    title = f"# attnzoo and kvpress {KVPRESS}, side by side"
    return "\n".join([title, "", f"`{begun.command}`", "", about, "", *versions, *([same] if same else [])])


def _same_answers(lines: Sequence[Any]) -> str:
    """Whether the dense models of both environments say the same: they must, or nothing can be compared."""
    dense: dict[tuple[str, int], list[str]] = {}
    for line in lines:
        if isinstance(line, ResultLine) and line.policy == DENSE:
            dense.setdefault((line.setting, line.sample), []).append(line.answer)
    pairs = [answers for answers in dense.values() if len(answers) == 2]
    equal = sum(a == b for a, b in pairs)
    return (
        f"- without eviction both environments gave the same answer to {equal} of {len(pairs)} prompts" if pairs else ""
    )


def _results_of(row: Row, setting: Setting, results: dict[Any, ResultLine], samples: int) -> dict[int, ResultLine]:
    found_here = ((sample, results.get(row.key(setting, sample))) for sample in range(samples))
    return {sample: line for sample, line in found_here if line is not None}


def _recall(line: ResultLine) -> float:
    return sum(line.hits) / len(line.hits)


def _pairs(ours: dict[int, ResultLine], these: dict[int, ResultLine]) -> list[tuple[ResultLine, ResultLine]]:
    return [(ours[sample], these[sample]) for sample in sorted(ours.keys() & these.keys())]


def _time_ratio(pairs: Sequence[tuple[ResultLine, ResultLine]]) -> float:
    return quantiles([b.first_token_seconds / a.first_token_seconds for a, b in pairs]).p50


def _table_row(row: Row, these: dict[int, ResultLine], ours: dict[int, ResultLine]) -> str:
    lines = list(these.values())
    hits, n = sum(all(line.hits) for line in lines), len(lines)
    low, high = wilson_interval(hits, n)
    times = quantiles([line.first_token_seconds for line in lines])
    difference = ratio = ""
    pairs = _pairs(ours, these)
    if row.side == "kvpress" and pairs:
        d = paired_difference([_recall(a) for a, _ in pairs], [_recall(b) for _, b in pairs])
        difference = f"{d.mean:+.2f} ({d.low:+.2f} to {d.high:+.2f})"
        ratio = f"{_time_ratio(pairs):.2f}"
    memory = [line.memory_peak_bytes for line in lines if line.memory_peak_bytes is not None]
    kept = sorted({n for line in lines for n in line.kept})
    cells = [
        row.policy,
        f"{row.side} `{row.method}`",
        f"{kept[0]:,}" if len(kept) == 1 else f"{kept[0]:,} to {kept[-1]:,}",
        f"{hits} of {n} ({low:.0%} to {high:.0%})",
        difference,
        f"{times.p20:.2f} / **{times.p50:.2f}** / {times.p80:.2f}",
        ratio,
        _megabytes(max(line.cache_peak_bytes for line in lines)),
        _megabytes(max(memory)) if memory else "not known",
    ]
    return f"| {' | '.join(cells)} |"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _ahead(row: Row, these: dict[int, ResultLine], ours: dict[int, ResultLine]) -> list[str]:
    """In what this row of kvpress is ahead of attnzoo's, interval or not."""
    pairs = _pairs(ours, these)
    if not pairs or row.policy == DENSE:
        return []
    found_ours, found_these = (sum(all(line.hits) for line in side) for side in zip(*pairs, strict=True))
    said = []
    if found_these > found_ours:
        d = paired_difference([_recall(a) for a, _ in pairs], [_recall(b) for _, b in pairs])
        doubt = "" if d.high < 0 else ", which may be chance"
        said.append(f"finds {found_these} pass keys, attnzoo {found_ours} of {len(pairs)}{doubt}")
    if (ratio := _time_ratio(pairs)) < 1:
        said.append(f"first token in {ratio:.2f} of attnzoo's time")
    cache = [max(line.cache_peak_bytes for line in side) for side in zip(*pairs, strict=True)]
    if cache[1] < cache[0]:
        said.append(f"peak cache {_megabytes(cache[1])} MB, attnzoo {_megabytes(cache[0])} MB")
    memory = [[line.memory_peak_bytes or 0 for line in side] for side in zip(*pairs, strict=True)]
    if 0 < max(memory[1]) < max(memory[0]):
        said.append(f"peak memory {_megabytes(max(memory[1]))} MB, attnzoo {_megabytes(max(memory[0]))} MB")
    return [f"{row.policy}, `{row.method}`: {'; '.join(said)}"] if said else []


def report(path: Path) -> str:
    """Write the table beside the records, and give it."""
    text = table(read_records(path), path)
    target = path.with_name(TABLE) if path.name == RECORDS else path.with_suffix(".md")
    part = target.with_name(f".{target.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status: 0, or 2 where something was refused or went wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config, such as configs/decode/kvpress.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--python", metavar="PATH", help=f"interpreter of an environment with kvpress {KVPRESS}")
    parser.add_argument("--only", nargs="+", default=[], metavar="POLICY", help="run only these policies")
    parser.add_argument("--report", type=Path, metavar="RECORDS", help="write the table of these records; run nothing")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.config is None) == (parsed.report is None):
        parser.error("give either a config or --report RECORDS")
    try:
        path = parsed.report
        if path is None:
            config = load_config(parsed.config, parsed.overrides)
            known = [group[0].policy for group in rows_of(config)]
            if unknown := [name for name in parsed.only if name not in known]:
                raise ConfigError(f"--only: there is no policy {', '.join(unknown)}; policies: {', '.join(known)}")
            say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
            python = kvpress_python(parsed.python, say)
            lasting = [override for override in parsed.overrides if not override.startswith("output=")]
            command = shlex.join(["python", "eval/compare_kvpress.py", str(parsed.config), *lasting])
            path = run(config, python, command, parsed.only, say)
        print(report(path), end="")
    except AttnZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

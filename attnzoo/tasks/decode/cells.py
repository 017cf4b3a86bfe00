"""What is measured of a language model, cell by cell."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.assets import sha256_of
from attnzoo.bench.attentions import AttentionConfig, row_of
from attnzoo.bench.task import Cell, OnProgress, Result
from attnzoo.errors import ConfigError
from attnzoo.extras import require
from attnzoo.processes import refuse_launcher
from attnzoo.tasks.decode import lm, needles
from attnzoo.tasks.decode import text as texts
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.cost import measure_cost
from attnzoo.tasks.decode.kept import KeptSamples
from attnzoo.tasks.decode.quality import KIND_TITLES
from attnzoo.tasks.decode.score import measure_nll, measure_retrieval

PART = "language"
PRELOAD = ("attnzoo.tasks.decode.task", "transformers.models.llama.modeling_llama")
LEFT_OUT = {"timeout_seconds", "samples", "batches", "prompt_tokens"}  # no figure depends on them, or they tell apart
SAMPLES = "samples"  # where rows that are under way keep what they have done
STEP = 25  # a single step takes as long as so many tokens of a prompt


def plan(config: DecodeConfig) -> list[Cell]:
    """Windows, then prompts of each kind, then timings of each batch size; in each the dense baseline first.

    The baseline's windows come before all else, for without its canary no row counts.
    """
    inputs = {"model": contents(config.model), "text": config.text and contents(config.text)}
    rows = (None, *range(len(config.attentions)))
    return [_cell(config, index, inputs, **asked) for asked in _asked(config) for index in rows]


def _asked(config: DecodeConfig) -> Iterator[dict[str, Any]]:
    """What is measured of every row; `work` is in tokens."""
    nll, retrieval, cost = config.nll, config.retrieval, config.cost
    if nll is not None:
        yield {"section": "nll", "work": nll.windows * nll.tokens}
    if retrieval is not None:
        for kind, count in retrieval.counts:
            depends = {"kind": kind, "samples": count}
            about = {"section": "retrieval", "workload": KIND_TITLES[kind], "depends": depends}
            yield {**about, "work": count * retrieval.tokens}
    if cost is not None:
        shared = {"read at": cost.batches[0], "threads": config.threads}
        for tokens, batch in itertools.product(cost.lengths, cost.batches):
            yield {
                "section": "cost",
                "work": 2 * cost.repeats * (tokens + STEP * cost.new_tokens),
                "workload": "" if batch == cost.batches[0] else f"batch {batch}",
                "depends": {"batch": batch, "prompt_tokens": tokens, **shared},
                "tokens": tokens,
                "phases": ("prefill", "decode") if batch == cost.batches[0] else ("decode",),
            }


def _cell(
    config: DecodeConfig,
    index: int | None,
    inputs: Mapping[str, Any],
    *,
    section: str,
    work: int,
    depends: Mapping[str, Any] | None = None,
    **about: Any,
) -> Cell:
    spec = None if index is None else config.attentions[index]
    row = row_of(spec, config.baseline, PART)
    asked: Any = getattr(config, section)
    stage = "time" if section == "cost" else "score"
    if section == "nll":
        work += config.canary.windows * asked.tokens * (1 if spec is None else 2)
        named = {"tiny": {"label"}}  # which changes nothing that is measured
        canary = config.canary.model_dump(mode="json", exclude=named) if spec is None else config.canary.windows
        depends, stage = {"canary": canary}, "canary" if spec is None else stage
    return Cell(
        **row,
        kind="cost" if section == "cost" else "quality",
        host=config.host,
        dtype=config.dtype,
        depends_on={
            section: _depended(asked, spec),
            **inputs,
            **config.model_dump(mode="json", include={"dtype", "seed", "device"}),
            "dense": config.attention,
            "attention": row["attention"],
            "options": row["options"],
            **(depends or {}),
        },
        asks={"attention": index, "section": section, **(depends or {})},
        stage=stage,
        timeout=asked.timeout_seconds,
        threads=config.threads,
        workers=config.workers if stage == "score" else 1,
        needs_baseline=config.nll is not None,
        weight=3 + work / 100,  # a token of a small model takes about 10 ms
        **about,
    )


def _depended(asked: Any, spec: AttentionConfig | None) -> dict[str, Any]:
    """What the figures of a row depend on in a section of the config; keys that came later count where they are set."""
    content: dict[str, Any] = asked.model_dump(mode="json", exclude=LEFT_OUT, exclude_none=True)
    if spec is None or not content.get("kl"):
        content.pop("kl", None)  # dense is not compared with itself
    return content


def contents(name: str) -> str | list[Any]:
    """What stands for a model or a text: its name, and besides what it holds now where that may change.

    It may for a file or folder of one's own, and for the help topics of the running Python.
    """
    if name == texts.TOPICS:
        return [name, texts.load_text(name).sha256]
    if name in texts.TEXTS:
        return name
    path = Path(name).expanduser()
    if path.is_file():
        return [name, sha256_of(path)]
    if path.is_dir():
        held = [file for file in sorted(path.iterdir()) if file.is_file()]
        return [name, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in held)]
    return name


def check(config: DecodeConfig) -> None:
    """Check, before anything is loaded, what the schema cannot: packages, text, model and the lengths it can take.

    Raises `MissingExtraError` if a package is missing; `ConfigError` with every other problem, one per line, or where a
    launcher started several processes.
    """
    refuse_launcher("start it once; workers=N measures N rows at a time")
    require("transformers", "matplotlib", extra="llm")
    with _collected("here") as under:
        with under("text"):
            if config.text is not None:
                texts.check_text_name(config.text)
        with under("model"):
            _check_lengths(config)


@contextmanager
def _collected(why: str) -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    """Collect `ConfigError`, each under a key of the config, and raise all in one."""
    problems: list[str] = []

    @contextmanager
    def under(key: str) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.append(f"  {key}: {error}")

    yield under
    if problems:
        raise ConfigError("\n".join([f"this config cannot be run {why}:", *problems]))


def _check_lengths(config: DecodeConfig) -> None:
    longest, nll, retrieval, cost = lm.longest(config.model), config.nll, config.retrieval, config.cost
    asked = {
        "nll.tokens": nll.tokens if nll is not None else 0,
        "retrieval.tokens": retrieval.tokens if retrieval is not None else 0,
        "cost.prompt_tokens + cost.new_tokens": max(cost.lengths) + cost.new_tokens if cost is not None else 0,
    }
    over = [f"{key} is {tokens:,}" for key, tokens in asked.items() if longest is not None and tokens > longest]
    if over:
        raise ConfigError(f"{config.model!r} is made for {longest:,} tokens, but {', '.join(over)}")


def prepare(config: DecodeConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Fetch model and text, once for all processes, cut windows and prompts, and hide needles.

    Raises `AssetError` if one of them cannot be fetched; `ConfigError` with every reason why the text does not do.
    """
    wanted = {cell.asks["section"] for cell in cells}
    if config.fresh:
        shutil.rmtree(config.folder / SAMPLES, ignore_errors=True)
    if not wanted:
        return {}
    lengths = sorted({cell.tokens for cell in cells if cell.asks["section"] == "cost"})
    if config.text is None:
        return {"prompts": {str(tokens): _random_prompts(config, tokens) for tokens in lengths}}
    tokenizer, prose = lm.load_tokenizer(config.model), texts.load_text(config.text)
    given: dict[str, Any] = {"text_sha256": prose.sha256}
    nll, cost, retrieval, seed = config.nll, config.cost, config.retrieval, config.seed

    def windows(count: int, tokens: int) -> list[tuple[int, ...]]:
        return [cut.ids for cut in texts.windows(prose, tokenizer, count=count, tokens=tokens, seed=seed)]

    with _collected("on this text") as under:
        with under("nll"):
            if nll is not None and "nll" in wanted:
                given["windows"] = windows(nll.windows, nll.tokens)
        with under("cost"):
            if cost is not None:
                given["prompts"] = {str(tokens): windows(cost.batches[0], tokens) for tokens in lengths}
        with under("retrieval"):
            if retrieval is not None and "retrieval" in wanted:
                asked: dict[str, Any] = {"tokens": retrieval.tokens, "seed": seed}
                for kind, count in retrieval.counts:
                    made = needles.make_samples(prose, tokenizer, kind=kind, count=count, **asked)
                    given[kind] = [asdict(sample) for sample in made]
    return given


def _random_prompts(config: DecodeConfig, tokens: int) -> list[list[int]]:
    """Prompts of random tokens, as many as are read: time and memory do not depend on what they say."""
    assert config.cost is not None
    words, draw = lm.vocabulary(config.model), random.Random(config.seed)
    return [[draw.randrange(words) for _ in range(tokens)] for _ in range(config.cost.batches[0])]


def measure(config: DecodeConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Score every window through one attention, let it answer prompts, or time prefill and decoding.

    Windows and prompts that an earlier run of the row had done before it was ended are not done again.
    """
    index, section = cell.asks["attention"], cell.asks["section"]
    spec = None if index is None else config.attentions[index]
    if section == "cost":
        return measure_cost(config, spec, given["prompts"][str(cell.tokens)], cell.asks["batch"], say)
    kept = KeptSamples(config.folder / SAMPLES / f"{cell.measured}.jsonl")
    if section == "retrieval":
        samples = [needles.Sample(**sample) for sample in given[cell.asks["kind"]]]
        result = measure_retrieval(config, spec, samples, kept, say)
    else:
        result = measure_nll(config, spec, given, kept, say)
    kept.remove()
    return result

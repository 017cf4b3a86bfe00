"""What is measured of a language model, cell by cell."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.assets import sha256_of
from attnzoo.bench.task import Cell, Result, Say
from attnzoo.errors import ConfigError
from attnzoo.extras import require
from attnzoo.tasks.decode import lm, needles
from attnzoo.tasks.decode import text as texts
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.cost import measure_cost
from attnzoo.tasks.decode.quality import KIND_TITLES
from attnzoo.tasks.decode.score import measure_nll, measure_retrieval

PART = "language"
PRELOAD = ("attnzoo.tasks.decode.task", "transformers.models.llama.modeling_llama")
LEFT_OUT = {
    "timeout_seconds",
    "samples",
    "batches",
    "prompt_tokens",
}  # a figure does not depend on them, or they are told apart
STEP = 10  # a single step takes as long as so many tokens of a prompt


def plan(config: DecodeConfig) -> list[Cell]:
    """Windows, then prompts of each kind, then timings of each batch size; in each the dense baseline first.

    The baseline's windows come before all else, for without its canary no row counts.
    """
    inputs = {"model": _contents(config.model), "text": config.text and _contents(config.text)}
    return [
        _cell(config, index, inputs, **asked)
        for asked in [*_windows(config), *_prompts(config), *_timings(config)]
        for index in (None, *range(len(config.attentions)))
    ]


def _windows(config: DecodeConfig) -> list[dict[str, Any]]:
    if config.nll is None:
        return []
    work = config.nll.windows * config.nll.tokens
    return [{"kind": "quality", "stage": "score", "section": "nll", "work": work}]


def _prompts(config: DecodeConfig) -> list[dict[str, Any]]:
    retrieval = config.retrieval
    if retrieval is None:
        return []
    shared = {"kind": "quality", "stage": "score", "section": "retrieval"}
    return [
        {
            **shared,
            "work": count * retrieval.tokens,
            "workload": KIND_TITLES[kind],
            "depends": {"kind": kind, "samples": count},
        }
        for kind, count in retrieval.counts
    ]


def _timings(config: DecodeConfig) -> list[dict[str, Any]]:
    cost = config.cost
    if cost is None:
        return []
    return [
        {
            "kind": "cost",
            "stage": "time",
            "section": "cost",
            "work": 2 * cost.repeats * (tokens + STEP * cost.new_tokens),
            "workload": f"batch {batch}" if len(cost.batches) > 1 else "",
            "depends": {"batch": batch, "read at": cost.batches[0], "threads": config.threads, "prompt_tokens": tokens},
            "tokens": tokens,
            "phases": ("prefill", "decode") if batch == cost.batches[0] else ("decode",),
        }
        for tokens in cost.lengths
        for batch in cost.batches
    ]


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
    who: dict[str, Any] = {
        "attention": None if spec is None else spec.name,
        "options": {} if spec is None else spec.swap,
    }
    asked: Any = getattr(config, section)
    if section == "nll":
        work += config.canary.windows * asked.tokens * (1 if spec is None else 2)
        named = {"tiny": {"label"}}  # which changes nothing that is measured
        canary = config.canary.model_dump(mode="json", exclude=named) if spec is None else config.canary.windows
        depends = {"canary": canary}
        about["stage"] = "canary" if spec is None else about["stage"]
    return Cell(
        part=PART,
        label=config.baseline if spec is None else spec.label,
        is_baseline=spec is None,
        host=config.host,
        dtype=config.dtype,
        **who,
        depends_on={
            section: asked.model_dump(mode="json", exclude=LEFT_OUT),
            **inputs,
            **config.model_dump(mode="json", include={"dtype", "seed", "device"}),
            "dense": config.attention,
            **who,
            **(depends or {}),
        },
        asks={"attention": index, "section": section, **(depends or {})},
        timeout=asked.timeout_seconds,
        threads=config.threads,
        workers=config.workers if about["stage"] == "score" else 1,
        needs_baseline=config.nll is not None,
        weight=3 + work / 100,  # a token of a small model takes about 10 ms
        **about,
    )


def _contents(name: str) -> str | list[Any]:
    """A name as it is; of a file or folder of one's own, what stands for what it holds now."""
    path = Path(name)
    if path.is_file():
        return [name, sha256_of(path)]
    if path.is_dir():
        held = [file for file in sorted(path.iterdir()) if file.is_file()]
        return [name, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in held)]
    return name


def check(config: DecodeConfig) -> None:
    """Check, before anything is loaded, what the schema cannot: packages, text, model and the lengths it can take.

    Raises
    ------
    MissingExtraError
        If a package is missing.
    ConfigError
        With every other problem, one per line.
    """
    require("transformers", "accelerate", "matplotlib", extra="llm")
    problems: list[str] = []
    questions: dict[str, Callable[[], object]] = {"model": lambda: _fits(config)}
    if (text := config.text) is not None:
        questions = {"text": lambda: texts.check_text_name(text), **questions}
    for key, question in questions.items():
        try:
            question()
        except ConfigError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError("\n".join(["this config cannot be run here:", *(f"  {problem}" for problem in problems)]))


def _fits(config: DecodeConfig) -> None:
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

    Raises
    ------
    AssetError
        If one of them cannot be fetched.
    ConfigError
        With every reason why the text does not do.
    """
    wanted = {cell.asks["section"] for cell in cells}
    if not wanted:
        return {}
    if config.text is None:
        return {"prompts": _random_prompts(config, cells)}
    tokenizer, prose = lm.load_tokenizer(config.model), texts.load_text(config.text)
    given: dict[str, Any] = {"text_sha256": prose.sha256}
    problems: list[str] = []

    def cut(section: str, make: Callable[..., Any], **asked: Any) -> Any:
        try:
            return make(prose, tokenizer, seed=config.seed, **asked)
        except ConfigError as error:
            problems.append(f"{section}: {error}")
            return []

    nll, cost, retrieval = config.nll, config.cost, config.retrieval
    if nll is not None and "nll" in wanted:
        found = cut("nll", texts.windows, count=nll.windows, tokens=nll.tokens)
        given["windows"] = [window.ids for window in found]
    for tokens in _lengths(cells):
        assert cost is not None
        found = cut("cost", texts.windows, count=cost.batches[0], tokens=tokens)
        given.setdefault("prompts", {})[str(tokens)] = [window.ids for window in found]
    if retrieval is not None and "retrieval" in wanted:
        for kind, count in retrieval.counts:
            found = cut("retrieval", needles.make_samples, kind=kind, count=count, tokens=retrieval.tokens)
            given[kind] = [asdict(sample) for sample in found]
    if problems:
        raise ConfigError("\n".join(["this config cannot be run on this text:", *(f"  {p}" for p in problems)]))
    return given


def _lengths(cells: Sequence[Cell]) -> list[int]:
    """Of the prompts that are timed."""
    return sorted({cell.tokens for cell in cells if cell.asks["section"] == "cost"})


def _random_prompts(config: DecodeConfig, cells: Sequence[Cell]) -> dict[str, list[list[int]]]:
    """Prompts of random tokens, by their length: time and memory do not depend on what they say."""
    assert config.cost is not None
    words, batch, draw = lm.vocabulary(config.model), config.cost.batches[0], random.Random(config.seed)
    return {str(n): [[draw.randrange(words) for _ in range(n)] for _ in range(batch)] for n in _lengths(cells)}


def measure(config: DecodeConfig, cell: Cell, given: Mapping[str, Any], say: Say) -> Result:
    """Score every window through one attention, let it answer prompts, or time prefill and decoding."""
    index, section = cell.asks["attention"], cell.asks["section"]
    spec = None if index is None else config.attentions[index]
    if section == "cost":
        return measure_cost(config, spec, given["prompts"][str(cell.tokens)], cell.asks["batch"], say)
    if section == "retrieval":
        samples = [needles.Sample(**sample) for sample in given[cell.asks["kind"]]]
        return measure_retrieval(config, spec, samples, say)
    return measure_nll(config, spec, given, say)

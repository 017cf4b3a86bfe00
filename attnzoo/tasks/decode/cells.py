"""What a suite measures of a language model, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.assets import sha256_of
from attnzoo.bench.task import Cell, Result, Say
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require
from attnzoo.tasks.decode import lm
from attnzoo.tasks.decode import text as texts
from attnzoo.tasks.decode.cost import measure_cost, measure_quality
from attnzoo.tasks.decode.cost_config import LanguageConfig

if TYPE_CHECKING:
    from attnzoo.tasks.suite import SuiteConfig

PART = "language"
PRELOAD = ("attnzoo.tasks.suite", "transformers.models.llama.modeling_llama")


def plan(config: SuiteConfig) -> list[Cell]:
    """Quality of every attention, then its cost; the dense baseline first in each."""
    language = config.language
    assert language is not None
    who: list[int | None] = [None, *range(len(language.attentions))]
    kinds = ("cost",) if language.quality is None else ("quality", "cost")
    return [_cell(config, language, index, kind) for kind in kinds for index in who]


def _cell(config: SuiteConfig, language: LanguageConfig, index: int | None, kind: Any) -> Cell:
    spec = None if index is None else language.attentions[index]
    cost, quality = language.cost, language.quality
    of_cost = kind == "cost"
    part: Any = cost if of_cost else quality
    where = {"threads": config.threads} if of_cost else {}
    return Cell(
        part=PART,
        kind=kind,
        label=language.baseline if spec is None else spec.label,
        tokens=cost.prompt_tokens if of_cost else 0,
        phases=("prefill", "decode") if of_cost else ("forward",),
        attention=None if spec is None else spec.name,
        options={} if spec is None else spec.swap,
        is_baseline=spec is None,
        host=language.host,
        dtype=language.dtype,
        depends_on={
            kind: part.model_dump(mode="json", exclude={"workers", "timeout_seconds"}),
            "model": _contents(language.model),
            "text": _contents(language.text),
            "dtype": language.dtype,
            "seed": config.seed,
            "device": config.device,
            "attention": None if spec is None else spec.name,
            "options": {} if spec is None else spec.swap,
            **where,
        },
        asks={"attention": index},
        stage="time" if of_cost else "score",
        timeout=part.timeout_seconds,
        threads=config.threads if of_cost else part.threads,
        workers=1 if of_cost else part.workers,
        needs_baseline=quality is not None,
        weight=10 + cost.prompt_tokens / 20 if of_cost else 1.0,
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


def problems(language: LanguageConfig) -> list[str]:
    """What the schema cannot find."""
    try:
        require("transformers", "accelerate", extra="llm")
        texts.check_text_name(language.text)
    except AttnZooError as error:
        return [str(error)]
    return []


def prepare(language: LanguageConfig, seed: int) -> dict[str, Any]:
    """Fetch the model and the text, once for all processes, and cut prompts to time and windows to score.

    Raises
    ------
    AssetError
        If one of them cannot be fetched.
    ConfigError
        If the text is too short, or the model is not made for as many tokens.
    """
    cost, quality = language.cost, language.quality
    made_for, tokenizer = lm.longest(language.model), lm.load_tokenizer(language.model)
    prose = texts.load_text(language.text)
    longest = max(cost.prompt_tokens + cost.new_tokens, 0 if quality is None else quality.tokens)
    if made_for is not None and longest > made_for:
        raise ConfigError(f"language: {longest:,} tokens asked for, but {language.model} is made for {made_for:,}")
    prompts = texts.windows(prose, tokenizer, count=cost.batch, tokens=cost.prompt_tokens, seed=seed)
    given = {"prompts": [window.ids for window in prompts]}
    if quality is not None:
        scored = texts.windows(prose, tokenizer, count=quality.windows, tokens=quality.tokens, seed=seed)
        given["windows"] = [window.ids for window in scored]
    return given


def measure(config: SuiteConfig, cell: Cell, given: Mapping[str, Any], say: Say) -> Result:
    """Measure prefill and decoding through one attention, or score every window through it."""
    language, index = config.language, cell.asks["attention"]
    assert language is not None
    spec = None if index is None else language.attentions[index]
    if cell.kind == "quality":
        return measure_quality(language, spec, given["windows"], config.device, say)
    return measure_cost(language, spec, given["prompts"], config.device, say)

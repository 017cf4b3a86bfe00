"""Several tasks in one table: cost and quality of a vision model's attentions and of a language model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from attnzoo import assets
from attnzoo.bench.attentions import AttentionConfig, attention_problems
from attnzoo.bench.config import RunConfig, refuse_twins, renamed
from attnzoo.bench.highlights import of_records
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.errors import AssetError, ConfigError, MissingExtraError
from attnzoo.tasks.classify import cells as vision
from attnzoo.tasks.classify import page as trained
from attnzoo.tasks.classify.cost_config import BaselineConfig, CostConfig, HostConfig, QualityConfig, vision_problems
from attnzoo.tasks.decode import cells as language
from attnzoo.tasks.decode.config import DecodeConfig, DecodeCostConfig, LanguageConfig, language_problems
from attnzoo.tasks.decode.pairs import pairs_table
from attnzoo.tasks.decode.plots import plots as language_plots
from attnzoo.tasks.records import Record

PARTS = {"vision": "classify", "language": "decode"}  # older records name no task


TOKENS = (196, 784, 3136)


class SuiteLanguageConfig(LanguageConfig):
    """A causal language model whose cache policies bound, with the keys of the task `decode`.

    `threads` are those of each process that scores, by default those of the suite.
    """

    baseline: Annotated[str, Field(min_length=1, description="the dense baseline's label")] = "dense LLM"
    cost: DecodeCostConfig | None = DecodeCostConfig()
    threads: PositiveInt | None = None


class SuiteConfig(RunConfig):
    """A whole benchmark: cost and quality of a vision model's attentions, and of a language model's, in one table."""

    task: Literal["suite"] = "suite"
    model: HostConfig = HostConfig()
    baseline: BaselineConfig = BaselineConfig()
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    cost: CostConfig = CostConfig(tokens=TOKENS)
    costs: tuple[CostConfig, ...] = Field(default=(), description="in place of `cost`, where there are several")
    quality: QualityConfig | None = None
    language: SuiteLanguageConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: Any) -> Any:
        """Fill in the token counts of costs that give no sizes."""
        data = renamed(data, host="model")
        if not isinstance(data, Mapping):
            return data
        costs = data.get("costs", ())
        sized = {"costs": [_with_sizes(cost) for cost in costs]} if isinstance(costs, (list, tuple)) else {}
        cost = {} if data.get("cost") is None else {"cost": _with_sizes(data["cost"])}
        return {**{key: value for key, value in data.items() if key != "cost"}, **sized, **cost}

    @model_validator(mode="after")
    def _labels_differ(self) -> SuiteConfig:
        if self.costs and self.cost != CostConfig(tokens=TOKENS):
            raise ValueError("give either cost, or costs with a list of them")
        refuse_twins([self.baseline.label, *(attention.label for attention in self.attentions)])
        return self

    @property
    def unsupported(self) -> set[tuple[str, str]]:
        """Part and label of the attentions that are expected to be unsupported; both parts may have the same label."""
        parts = {"vision": self.attentions, "language": () if self.language is None else self.language.attentions}
        return {
            (part, attention.label)
            for part, attentions in parts.items()
            for attention in attentions
            if attention.expect == "unsupported"
        }

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions."""
        problems = attention_problems(data.get("attentions"), "attentions", vision_problems)
        language = data.get("language")
        if isinstance(language, Mapping):
            problems += language_problems(language, "language.")
        return problems


def _with_sizes(cost: Any) -> Any:
    sized = not isinstance(cost, Mapping) or "tokens" in cost or "image_sizes" in cost
    return cost if sized else {**cost, "tokens": TOKENS}


load_config, validate_config = SuiteConfig.load, SuiteConfig.check


def plan(config: SuiteConfig) -> list[Cell]:
    """All cells: quality first, for rows of cost carry it; those of cost by token count."""
    found = vision.plan(config)
    if config.language is not None:
        own = {"threads": config.language.threads or config.threads}
        cells = language.plan(decoding(config))
        found += [cell.model_copy(update=own) if cell.kind == "quality" else cell for cell in cells]
    return sorted(found, key=lambda cell: cell.kind == "cost")


def decoding(config: SuiteConfig) -> DecodeConfig:
    """The suite's language model, as a config of the task `decode`."""
    assert config.language is not None
    shared = {key: getattr(config, key) for key in ("name", "device", "threads", "seed", "imports", "output", "fresh")}
    return DecodeConfig(**shared, **config.language.model_dump(exclude={"threads"}))


def check(config: SuiteConfig) -> None:
    """Check hosts, data and models before any work.

    Raises `ConfigError` with every problem, one per line.
    """
    problems = vision.problems(config)
    if config.language is not None:
        try:
            with _told_how_to_do_without():
                language.check(decoding(config))
        except (ConfigError, MissingExtraError) as error:
            problems.append(f"language: {error}")
    if problems:
        raise ConfigError("\n".join(["this config cannot be run here:", *(f"  {problem}" for problem in problems)]))


def prepare(config: SuiteConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Fetch what all processes share: the images, and the language model with token ids out of its text."""
    data = assets.get(config.quality.dataset) if config.quality is not None else ""
    given: dict[str, Any] = {"data": str(data)}
    if config.language is not None:
        with _told_how_to_do_without():
            given |= language.prepare(decoding(config), [cell for cell in cells if cell.part == language.PART])
    return given


@contextmanager
def _told_how_to_do_without() -> Iterator[None]:
    """Say how to measure without a language model that cannot be fetched."""
    try:
        yield
    except AssetError as error:
        raise AssetError(f"{error}\nTo measure without the language model: language=null") from error


def measure(config: SuiteConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Measure a cell by the task that its part is of."""
    if cell.part == language.PART:
        return language.measure(decoding(config), cell, given, say)
    return vision.measure(config, cell, given, say)


def plots(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The curves of training, and the plots of language models."""
    return [("Training loss", trained.loss_plot(trained.qualities_of(records))), *language_plots(records)]


TASK = Task(
    name="suite",
    ref="attnzoo.tasks.suite:TASK",
    config=SuiteConfig,
    plan=plan,
    measure=measure,
    prepare=prepare,
    check=check,
    record=Record,
    preload=lambda config: (*vision.PRELOAD, *(language.PRELOAD if config.language is not None else ())),
    expected=lambda config: config.unsupported,
    plots=plots,
    pairs=lambda records, config: pairs_table(records, config.get("language") or {}),
    highlights=lambda records: of_records(records, lambda record: PARTS.get(record.part, record.task)),
)

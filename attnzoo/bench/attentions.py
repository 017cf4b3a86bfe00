"""Attentions as configs name them, and the registry's say on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from attnzoo.bench.config import Section, drop_defaults
from attnzoo.errors import AttnZooError, UnknownNameError
from attnzoo.imports import source_of
from attnzoo.registry import describe


class AttentionConfig(Section):
    """One attention of the zoo: its registered name, its options and how tables call it.

    `where` names the layers that are swapped, as `attnzoo.replace_attention` takes it: all by default, and others keep
    the model's own attention. `fused` chooses another dense baseline for this row than the benchmark's: with the host's
    fused kernel or without. `tokens` are the token counts at which its cost is measured; all by default. `expect` says
    how it should end: a row that is unsupported makes the benchmark exit with 1, unless that is expected.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    where: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    label: Annotated[str, Field(min_length=1)] = ""
    expect: Literal["ok", "unsupported"] = "ok"
    fused: bool | None = None
    tokens: tuple[PositiveInt, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if isinstance(data, Mapping) and isinstance(data.get("name"), str) and data.get("label") is None:
            options = data.get("options") or {}
            listed = [f"{key}={value}" for key, value in options.items()] if isinstance(options, Mapping) else []
            where = data.get("where") or ()
            where = [where] if isinstance(where, str) else where
            listed += [f"in {', '.join(map(str, where))}"] if where and isinstance(where, (list, tuple)) else []
            data = {**data, "label": " ".join([data["name"], *listed])}
        return data

    @model_serializer(mode="wrap")
    def _leave_out_what_is_expected(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        drop_defaults(content, {"expect": "ok", "where": None})
        return content

    @property
    def swap(self) -> dict[str, Any]:
        """What `attnzoo.replace_attention` takes besides the model and the name."""
        return self.options if self.where is None else {**self.options, "where": self.where}


def row_of(attention: AttentionConfig | None, baseline: str, part: str) -> dict[str, Any]:
    """The fields of a `Row` that say whose it is: an attention's or, without one, the dense baseline's."""
    return {
        "part": part,
        "label": baseline if attention is None else attention.label,
        "attention": None if attention is None else attention.name,
        "options": {} if attention is None else attention.swap,
        "is_baseline": attention is None,
    }


def refuse_vision_keys(attentions: Sequence[AttentionConfig]) -> None:
    """Raise `ValueError` where an attention has keys that mean something for vision models of timm alone."""
    for index, attention in enumerate(attentions):
        for key in ("fused", "tokens"):
            if getattr(attention, key) is not None:
                raise ValueError(f"attentions.{index}.{key} is for vision models of timm alone; leave it out")


def refuse_expect(attentions: Sequence[AttentionConfig]) -> None:
    """Raise `ValueError` where an attention says `expect`, and the task refuses what is unsupported before any work."""
    for index, attention in enumerate(attentions):
        if attention.expect != "ok":
            raise ValueError(f"attentions.{index}.expect has no meaning here: what is unsupported is refused at once")


def own_sources(attention: str | None, options: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files of a method and of those that its options name, such as a `base`; not of attnzoo's own."""
    found: dict[str, str] = {}
    for name in (attention, *options.values()):
        try:
            target = describe(name).target if isinstance(name, str) else ""
        except UnknownNameError:  # an option of text
            continue
        module = target.partition(":")[0] if isinstance(target, str) else target.__module__
        if module and module.partition(".")[0] != "attnzoo":
            found[module] = source_of(module)
    return found


_Ask = Callable[[Any, Mapping[str, Any], str], list[str]]


def attention_problems(attentions: Any, where: str, ask: _Ask) -> list[str]:
    """Ask the registry for every attention named, even where the rest of the config is wrong."""
    problems: list[str] = []
    for index, entry in enumerate(attentions if isinstance(attentions, (list, tuple)) else []):
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            continue
        here = f"{where}.{index}" if where.endswith("attentions") else where
        try:
            info = describe(entry["name"])
        except AttnZooError as error:
            problems.append(f"{here}.name: {error}")
            continue
        options = entry.get("options") or {}
        problems += ask(info, options if isinstance(options, Mapping) else {}, here)
    return problems

"""The reference of all keys of a task's config, made from its schema."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from attnzoo.bench.config import sections_in
from attnzoo.tables import Column, Table

HEAD = (Column("key", code=True), Column("takes", left=True), Column("default", left=True))
PLAIN = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "Path": "path", "Any": "any"}


def reference(model: type[BaseModel]) -> str:
    """Give the reference in Markdown: a table per section of the config, each under what its schema says of it."""
    first: dict[type[BaseModel], str] = {}
    parts = []
    for path, section in _sections(model):
        place = path.removesuffix(".")
        told = f"As `{first[section]}`." if section in first else " ".join((inspect.getdoc(section) or "").split())
        first.setdefault(section, place)
        rows = [(f"{path}{name}", _takes(field), _default(field)) for name, field in section.model_fields.items()]
        parts += [*([f"### {place}"] if place else []), told, Table(HEAD, rows).markdown()]
    return "\n\n".join(parts)


def _sections(model: type[BaseModel], path: str = "") -> list[tuple[str, type[BaseModel]]]:
    """The config and all sections below it, by their dotted paths; ``.N`` stands for an index into a list."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        for below, suffix in sections_in(field.annotation):
            found += _sections(below, f"{path}{name}{suffix}.")
    return found


def _takes(field: FieldInfo) -> str:
    told = _type(field.annotation)
    limits = [
        f"{word} {getattr(one, attribute):g}"
        for one in field.metadata
        for attribute, word in LIMITS
        if getattr(one, attribute, None) is not None
    ]
    return ", ".join([told, *limits, *([field.description] if field.description else [])])


LIMITS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def _type(annotation: Any) -> str:
    """A type in plain words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return " or ".join(str(value) for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if one is type(None) else _type(one) for one in inside))
    if origin in (tuple, list):
        return f"list of {_type(inside[0])}"
    if origin is dict or annotation is dict:
        return "mapping" if not inside else f"mapping from {_type(inside[0])} to {_type(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    name = getattr(annotation, "__name__", str(annotation))
    return PLAIN.get("Any" if annotation is typing.Any else name, name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default if field.default is not PydanticUndefined else None
    if field.default_factory is not None or isinstance(value, BaseModel):
        return "its own defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return "follows from the rest"
    return f"`{list(value) if isinstance(value, tuple) else value}`"

"""The recipe of a swap: which layers hold which attention, with which options, as JSON; and the swap done by it again.

A recipe is a list with an entry for each call of `replace_attention` that is needed: ``attention``, ``kind``,
``class``, ``options`` and ``layers``, the paths of the layers. It names attentions and holds no code.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from attnzoo.errors import OptionError, SwapError, UnknownNameError, short
from attnzoo.registry import describe, list_attentions
from attnzoo.swap import replace_attention, swapped_layers

Recipe = list[dict[str, Any]]

_TUPLE = "__tuple__"  # JSON has lists alone


def recipe_of(model: nn.Module) -> Recipe:
    """Give the recipe of the swaps that a model holds; an empty list where it holds none.

    Layers whose options differ by the budget of a policy alone are one entry, with the list of their budgets.

    Raises
    ------
    OptionError
        If an option has no form in JSON.
    SwapError
        If the model is itself a swapped layer.
    """
    entries: dict[str, dict[str, Any]] = {}
    budgets: dict[int, list[Any]] = {}
    for path, layer in swapped_layers(model).items():
        record: Any = vars(layer)["attnzoo_swap"]
        if not path:
            raise SwapError("this module is itself a swapped layer; give the model that holds it")
        target = record.info.target
        entry = {
            "attention": record.info.name,
            "kind": record.info.kind,
            "class": target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}",
            "options": {name: to_json(value, record.info.name, name) for name, value in record.options.items()},
        }
        budget = entry["options"].get("budget") if record.info.kind == "eviction" else None
        alike = {**entry, "options": {**entry["options"], "budget": None}} if budget is not None else entry
        found = entries.setdefault(json.dumps(alike, sort_keys=True), {**entry, "layers": []})
        found["layers"].append(path)
        budgets.setdefault(id(found), []).append(budget)
    for entry in entries.values():
        if len(set(map(repr, budgets[id(entry)]))) > 1:  # 1 is an entry, 1.0 the whole text
            entry["options"] = {**entry["options"], "budget": budgets[id(entry)]}
    return list(entries.values())


def check_registered(recipe: Recipe) -> None:
    """Raise unless every attention of a recipe is registered here, as what it was.

    Raises
    ------
    UnknownNameError
        If one is not; the message says how to register it.
    SwapError
        If its name now stands for another kind of attention.
    """
    for entry in recipe:
        name, kind, target = entry["attention"], entry["kind"], entry["class"]
        if name not in list_attentions():
            told = target.rpartition(":")[2].rpartition(".")[2]
            raise UnknownNameError(
                f"{entry['layers'][0]} was swapped for {name!r} ({kind}; {target}), which is not registered here: "
                f"call attnzoo.register_attention({name!r}, {kind!r}, {told}), or import what does, and load again"
            )
        if describe(name).kind != kind:
            raise SwapError(f"{name!r} was registered as {kind} when the model was saved, and is {describe(name).kind}")


def swap_again(model: nn.Module, recipe: Recipe) -> None:
    """Swap the layers of an unswapped model as a recipe says. Raises as `replace_attention` does."""
    for entry in recipe:
        options = {name: from_json(value) for name, value in entry["options"].items()}
        where = [glob.escape(path) for path in entry["layers"]]
        replace_attention(model, entry["attention"], where=where, **options)


def to_json(value: Any, of: str, name: str) -> Any:
    """Give `value`, the option `name` of the attention `of`, in a form that JSON has and `from_json` reverts.

    Raises
    ------
    OptionError
        If there is none: for objects, and for mappings whose keys are not strings.
    """
    if isinstance(value, tuple):
        return {_TUPLE: [to_json(item, of, name) for item in value]}
    if isinstance(value, list):
        return [to_json(item, of, name) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and _TUPLE not in value:
        return {key: to_json(item, of, name) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise OptionError(
        f"the option {name}={short(value)} of {of!r} has no form in JSON, which the recipe of a swap is written in: "
        "swap with names, numbers, strings, lists and mappings of these (register a class of your own that builds the "
        "object from them)"
    )


def from_json(value: Any) -> Any:
    """Revert `to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_TUPLE}:
            return tuple(from_json(item) for item in value[_TUPLE])
        return {key: from_json(item) for key, item in value.items()}
    return value

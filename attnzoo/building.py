"""How a host model is built again, as JSON: what its library was given, where that can be known.

timm: the architecture, with the arguments of its factory. transformers: the class and the config. Other libraries leave
nothing on a model that says how it was made. Whether what is built is the same model is seen from its `structure`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnzoo.errors import AttnZooError, OptionError, WeightsError
from attnzoo.extras import require
from attnzoo.hosts.saving import FIELD, RECIPE
from attnzoo.hosts.site import comes_from
from attnzoo.recipe import Recipe, from_json, swap_again, to_json

_MODES = {"training", "fused_attn", "grad_checkpointing", "gradient_checkpointing", "name_or_path"}
"""Attributes that are not part of what a module computes."""


def blueprint_of(model: nn.Module) -> dict[str, Any] | None:
    """Say how `model` is built; None where its library leaves nothing to say it by."""
    try:
        if comes_from(model, "transformers"):
            return _transformers_blueprint(model)
        if comes_from(model, "timm"):
            return _timm_blueprint(model)
    except (AttributeError, KeyError, TypeError, ValueError):  # a class of somebody else's
        return None
    return None


def checked_blueprint(
    model: nn.Module, recipe: Recipe, known: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any] | None, str]:
    """How `model` is built, if what is built by it and swapped is the same model; else None, and why.

    `known` is the structure of `model`.
    """
    blueprint = blueprint_of(model)
    if blueprint is None:
        return None, "its library keeps nothing to build it by"
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            twin = _twin(blueprint)
            swap_again(twin, recipe)
    except AttnZooError as error:
        return None, str(error)
    changed = differences(known, structure(twin))
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (model, twin)]
    changed += sorted(f"the shape of {key}" for key, _ in shapes[0].items() ^ shapes[1].items())
    if changed:
        return None, f"what its library would build differs: {changed[0]}"
    return blueprint, ""


def _twin(blueprint: Mapping[str, Any]) -> nn.Module:
    """What is built by `blueprint`, without weights where the library can (timm before 1.0.31 cannot)."""
    try:
        return build(blueprint, "meta")
    except WeightsError:
        return build(blueprint)


def build(blueprint: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """Build a host model, in evaluation mode, with weights that mean nothing.

    Raises
    ------
    WeightsError
        If the library as installed cannot build it.
    MissingExtraError
        If the library is not installed.
    """
    make = {"timm": _timm, "transformers": _transformers}.get(blueprint["library"])
    if make is None:
        raise WeightsError(f"attnzoo.json names the library {blueprint['library']!r}, from which no model can be built")
    require(blueprint["library"], extra="vision" if blueprint["library"] == "timm" else "llm")
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return make(blueprint).eval()
    except Exception as error:  # whatever the library raises
        said = (str(error).strip().splitlines() or [""])[0]
        name = blueprint.get("architecture") or blueprint.get("class")
        raise WeightsError(
            f"{blueprint['library']} cannot build {name} as it was saved ({type(error).__name__}: {said})"
        ) from error


def structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Class and plain attributes (numbers, strings, None, and tuples of these) of every module, by path.

    What weights do not tell: numbers of heads, rates of dropout, epsilons.
    """
    found = {}
    for path, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in _MODES}
        plain = {name: _listed(value) for name, value in plain.items() if _is_plain(value)}
        found[path] = {"class": type(module).__qualname__, **plain}
    return found


def differences(ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say where two structures differ, in what both tell."""
    found = [f"{path or 'the model'} ({ours[path]['class']}) is missing" for path in ours if path not in theirs]
    found += [f"{path} ({theirs[path]['class']}) is new" for path in theirs if path not in ours]
    for path in ours.keys() & theirs.keys():
        mine, other = ours[path], theirs[path]
        found += [
            f"{path}.{name}".lstrip(".") + f" is {other[name]!r}, was {mine[name]!r}"
            for name in mine.keys() & other.keys()
            if mine[name] != other[name]
        ]
    return sorted(found)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or (type(value) in (bool, int, float, str) and value == value)  # not NaN


def _timm_blueprint(model: Any) -> dict[str, Any]:
    told = dict(model.pretrained_cfg)
    architecture = told.pop("architecture")
    given = dict(getattr(model, "_model_args", {}))  # before timm 1.0.31 nothing keeps what the factory was given
    accepted = inspect.signature(type(model).__init__).parameters
    arguments = given | {name: value for name, value in _sizes(model).items() if name in accepted}
    return {
        "library": "timm",
        "architecture": architecture,
        "arguments": _json_alone(arguments),
        "pretrained_cfg": _json_alone(told),
    }


def _json_alone(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what has no form in JSON: a layer's class, say."""
    found = {}
    for name, value in values.items():
        with contextlib.suppress(OptionError):
            found[name] = to_json(value, "timm", name)
    return found


def _sizes(model: Any) -> dict[str, Any]:
    """Arguments of timm's factories that a vision transformer tells as it is now."""
    patches, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", None)
    found = {name: getattr(model, name, None) for name in ("num_classes", "in_chans", "global_pool", "embed_dim")}
    found |= {name: getattr(patches, name, None) for name in ("img_size", "patch_size")}
    if blocks is not None and len(blocks):
        found |= {"depth": len(blocks), "num_heads": getattr(getattr(blocks[0], "attn", None), "num_heads", None)}
    return {name: value for name, value in found.items() if _is_plain(value) and value is not None}


def _timm(blueprint: Mapping[str, Any]) -> nn.Module:
    import timm

    architecture = blueprint["architecture"]
    if not timm.is_model(architecture):
        raise WeightsError(f"this timm ({timm.__version__}) has no {architecture}")
    told = {name: from_json(value) for name, value in blueprint["pretrained_cfg"].items()}
    arguments = {name: from_json(value) for name, value in blueprint["arguments"].items()}
    model: nn.Module = timm.create_model(
        architecture,
        pretrained=False,
        checkpoint_path="",
        pretrained_cfg={**told, "architecture": architecture},
        **arguments,
    )
    return model


def _transformers_blueprint(model: Any) -> dict[str, Any] | None:
    import transformers

    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        return None
    config = model.config
    content = json.loads(config.to_json_string())
    content.pop(RECIPE, None)
    parts = {"": config} | {part: getattr(config, part, None) for part in config.sub_configs}
    ways = {part: getattr(each, "_attn_implementation", None) for part, each in parts.items()}
    generation = getattr(model, "generation_config", None) if model.can_generate() else None
    return {
        "library": "transformers",
        "class": name,
        "attn_implementation": {part: way for part, way in ways.items() if isinstance(way, str)},
        "config": content,
        "generation_config": None if generation is None else json.loads(generation.to_json_string()),
    }


def _transformers(blueprint: Mapping[str, Any]) -> nn.Module:
    import transformers

    factory: Any = getattr(transformers, blueprint["class"], None)
    known = isinstance(factory, type) and issubclass(factory, transformers.PreTrainedModel)
    if not known:
        raise WeightsError(f"this transformers ({transformers.__version__}) has no model {blueprint['class']}")
    content = {name: value for name, value in blueprint["config"].items() if name not in (RECIPE, FIELD)}
    config = factory.config_class.from_dict(content)
    ways = blueprint.get("attn_implementation") or None
    model: nn.Module = factory._from_config(config, **({} if ways is None else {"attn_implementation": ways}))
    if blueprint.get("generation_config") is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(blueprint["generation_config"])
    return model

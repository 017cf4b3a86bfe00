"""The model of a run: built, given its weights, and swapped; or read back from a folder that training wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import files
from attnzoo.errors import AttnZooError, ConfigError, TrainingError, WeightsError
from attnzoo.extras import require
from attnzoo.tasks.classify.build import build_model, equal_parameters, logits, swapped
from attnzoo.tasks.classify.config import WEIGHTS, ClassifyConfig, ModelConfig, Run
from attnzoo.tasks.classify.loading import transforms
from attnzoo.weights import load_weights

# of a config of transformers: what the data decide, and what building a model does not need
_OF_THE_DATA = frozenset(
    ["image_size", "num_channels", "num_labels", "id2label", "label2id", "model_type", "architectures", "dtype",
     "transformers_version", "problem_type", "_name_or_path"]
)  # fmt: skip
AVERAGED, ABOUT = "averaged.safetensors", "model.json"


def build(run: Run, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model of a run, the same for the same seed: its weights, then its attention.

    Also give what is needed to build it again, which goes beside its weights as ``model.json``. Raises `ConfigError` if
    the library cannot build it, its patches do not divide the image, or the weights do not fit; an error of a swap if
    the attention cannot stand in it.
    """
    config = run.config
    more: dict[str, Any] = {}
    if config.equal_parameters and run.attention is not None:
        more = equal_parameters(lambda more: _dense(run, classes, more), run.attention, run.seed)
    model = _dense(run, classes, more)
    about = _about(run, classes, model, more)
    weights = config.model.weights
    if weights is None:
        return swapped(model, run.attention, run.seed), about
    state = _read_weights(weights)
    if config.model.new_head:
        head = _head(model)
        state = {key: value for key, value in state.items() if not key.startswith(head)}
    before = set(state) <= set(model.state_dict())  # weights of the model as it is without a swap
    if before:
        _load(model, state, config.model, classes)
    model = swapped(model, run.attention, run.seed)
    if not before:
        _load(model, state, config.model, classes)
    return model, about


def load_trained(folder: str | Path, averaged: bool = False) -> nn.Module:
    """Build the model that training wrote into `folder`, its attention swapped as it was, with the trained weights.

    Class names and what an image goes through are where each library has them: in timm's ``pretrained_cfg``, which
    ``timm.data.resolve_model_data_config`` reads, and in transformers' ``config.id2label``.

    `folder` is a run's ``final`` folder, or one of its checkpoints: it holds ``model.json`` and ``model.safetensors``.
    With `averaged` the weights are those averaged over the steps, of a ``final`` folder whose recipe had `ema_decay`.

    Raises `TrainingError` if one of the files is missing, or they do not fit together.
    """
    require("safetensors", extra="train")
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        about = files.read_json(folder / ABOUT)
        state = load_file(folder / (AVERAGED if averaged else WEIGHTS))
    except Exception as error:  # safetensors has errors of its own
        raise TrainingError(f"{folder} holds no trained model that can be read: {error}") from error
    config = ModelConfig(library=about["library"], name=about["name"], options=about["options"])
    model = _create(config, about["image_size"], about["channels"], about["classes"], 0)
    if about["attention"] is not None:
        spec = about["attention"]
        attnzoo.replace_attention(model, spec["name"], keep_original=False, **spec["options"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise TrainingError(f"{folder}: weights and {ABOUT} do not fit together: {error}") from error
    _describe(model, about)
    return model.eval()


def _describe(model: Any, about: Mapping[str, Any]) -> None:
    names = about["class_names"]
    if about["library"] == "timm":
        images = {key: tuple(v) if isinstance(v, list) else v for key, v in about["images"].items()}
        named = {} if names is None else {"label_names": names}
        own = getattr(model, "pretrained_cfg", {})  # a model that a user registered may have none
        model.pretrained_cfg = {**own, **images, **named, "num_classes": about["classes"]}
        model.default_cfg = model.pretrained_cfg
    elif names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}


def _about(run: Run, classes: int, model: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    config, attention = run.config, run.attention
    name, options = config.model.name, {**config.model.options, **more}
    if config.model.library == "transformers":  # whatever it was loaded from may not be there another time
        known = model.config.to_diff_dict()
        name, options = model.config.model_type, {key: value for key, value in known.items() if key not in _OF_THE_DATA}
    return {
        "attnzoo": attnzoo.__version__,
        "run_hash": run.hash,
        "label": run.label,
        "seed": run.seed,
        "library": config.model.library,
        "name": name,
        "options": options,
        "attention": None if attention is None else {"name": attention.name, "options": attention.swap},
        "classes": classes,
        "image_size": config.data.image_size,
        "channels": config.data.channels,
    }


def _dense(run: Run, classes: int, more: Mapping[str, Any]) -> nn.Module:
    model = run.config.model
    spec = model.model_copy(update={"options": {**model.options, **more}})
    return _create(spec, run.config.data.image_size, run.config.data.channels, classes, run.seed)


def _create(config: ModelConfig, image_size: int, channels: int, classes: int, seed: int) -> nn.Module:
    make = _create_timm if config.library == "timm" else _create_transformers
    model, patch = make(config, image_size, channels, classes, seed)
    for side, size in zip(("high", "wide"), patch, strict=True):
        if image_size % size:
            raise ConfigError(
                f"data.image_size: {image_size} pixels are not divided by patches of {size} ({side}); nearest: "
                f"{image_size // size * size or size} or {(image_size // size + 1) * size}"
            )
    return model


Created = tuple[nn.Module, tuple[int, int]]  # a model, and the height and width of its patches


def _create_timm(config: ModelConfig, size: int, channels: int, classes: int, seed: int) -> Created:
    sizes = {"image_size": size, "channels": channels, "classes": classes}
    model: Any = build_model(config.name, **sizes, options=config.options, seed=seed, pretrained=config.pretrained)
    return model, getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))


def _create_transformers(config: ModelConfig, size: int, channels: int, classes: int, seed: int) -> Created:
    require("transformers", extra="llm")
    from transformers import AutoConfig, AutoModelForImageClassification

    sizes = {"image_size": size, "num_channels": channels, "num_labels": classes, **config.options}
    make = AutoModelForImageClassification
    torch.manual_seed(seed)
    try:
        if config.pretrained:
            how: Any = {"ignore_mismatched_sizes": True, "dtype": torch.float32}  # whatever the checkpoint is in
            model = make.from_pretrained(config.name, **how, **sizes)
        else:
            model = make.from_config(AutoConfig.for_model(config.name, **sizes))
    except Exception as error:  # of the hub, too
        raise ConfigError(f"transformers cannot build {config.name!r}: {type(error).__name__}: {error}") from error
    patch = getattr(model.config, "patch_size", 1)
    return model, (patch, patch) if isinstance(patch, int) else tuple(patch)


def _read_weights(path: Path) -> dict[str, Tensor]:
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # pickle, safetensors and PyTorch have errors of their own
        raise ConfigError(f"model.weights: {str(path)!r} is not a file of weights alone: {error}") from error
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        raise ConfigError(
            f"model.weights: {str(path)!r} is not a state dict: {', '.join(map(str, strange[:5])) or 'empty'}"
        )
    return state


def _head(model: Any) -> str:
    head = model.get_classifier() if hasattr(model, "get_classifier") else model.classifier
    return next(name for name, module in model.named_modules() if module is head) + "."


def _load(model: nn.Module, state: Mapping[str, Tensor], config: ModelConfig, classes: int) -> None:
    own = model.state_dict()
    head = _head(model)
    for key, value in state.items():
        if key in own and value.shape != own[key].shape and key.startswith(head):
            raise ConfigError(
                f"model.weights: {str(config.weights)!r} is of {len(value)} classes, the data have {classes}; "
                "model.new_head=true leaves its classifier out"
            )
    kept = {key: value for key, value in own.items() if config.new_head and key.startswith(head)}
    try:
        load_weights(model, {**kept, **state})
    except WeightsError as error:
        raise ConfigError(f"model.weights: {str(config.weights)!r} does not fit: {error}") from error


def check_all(config: ClassifyConfig, classes: int) -> None:
    """Build every model of a config once, and show it an image, so that what cannot stand is told before any training.

    Raises `ConfigError` with every problem, one per line.
    """
    problems, seen = _recipe_problems(config), set()
    for run in config.runs():
        if run.label in seen:
            continue
        seen.add(run.label)
        try:
            model, _ = build(run, classes)
            with torch.inference_mode():
                logits(model.eval(), torch.zeros(1, *config.data.shape))
        except AttnZooError as error:
            problems.append(f"{run.label}: {error}")
    if problems:
        raise ConfigError("\n".join(["this config cannot be trained:", *(f"  {problem}" for problem in problems)]))


def _recipe_problems(config: ClassifyConfig) -> list[str]:
    """What timm says of the optimizer and of the augmentation."""
    from timm.optim import create_optimizer_v2

    recipe, problems = config.recipe, []
    try:
        create_optimizer_v2(nn.Linear(1, 1), opt=recipe.optimizer, lr=recipe.lr, **recipe.optimizer_options)
    except Exception as error:  # of any optimizer
        problems.append(f"recipe.optimizer: {recipe.optimizer} with {recipe.optimizer_options}: {_said(error)}")
    try:
        transforms(config.data, config.augment)
    except Exception as error:  # timm asserts
        problems.append(f"augment: timm makes no transform of it: {_said(error)}")
    return problems


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__}"

"""How a swapped model of transformers is saved.

The config that ``save_pretrained`` writes holds the recipe of the swap, by which `attnzoo.load` does it again. With
cores and policies the weights are the model's own, and ``from_pretrained`` gives the model with its own attention.

With mixers, ``save_pretrained`` would write weights under the names of the library's first release of a model, and
``from_pretrained`` would build the model with attention of its own, random, and go on with a warning. So a model with
mixers saves its weights under the names that it has, and its config says that they are no weights for
``from_pretrained``, which then stops with what to do instead.

A model that holds a swapped one, and that the swap was not given (``replace_attention(llm.model, ...)`` and then
``llm.save_pretrained``), is not known before it is saved: its mixers see to its config when they are asked for their
weights.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from attnzoo import files
from attnzoo.errors import OptionError, UnsupportedError
from attnzoo.hosts import versions
from attnzoo.hosts.hooks import holds_swapped
from attnzoo.hosts.site import MixerLayer, Swapped, swapped_record

METHOD = "save_pretrained"
FIELD = "transformers_weights"  # of a config: the file of the weights; another word than a file's name is an error
RECIPE = "attnzoo"  # of a config: the recipe of the swap


class SavePretrained:
    """``save_pretrained`` of one model; like that of its class as long as nothing in the model is swapped."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model; see transformers' ``PreTrainedModel.save_pretrained``.

        Raises
        ------
        UnsupportedError
            With ``push_to_hub=True``, which would upload the config before it says what the weights are.
        """
        save = getattr(type(self.model), METHOD)
        if not holds_swapped(self.model):
            detach([self.model])
            return save(self.model, *args, **kwargs)
        with _telling(self.model):
            if not any(mixers(self.model)):
                return save(self.model, *args, **kwargs)
            return self._with_mixers(save, *args, **kwargs)

    def _with_mixers(self, save: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(save).bind(self.model, *args, **kwargs).arguments
        named = given | given.get(versions.keywords(save) or "", {})
        if named.get("push_to_hub"):
            raise UnsupportedError(
                "a model with mixers is not uploaded while it is saved; call model.push_to_hub(repo_id) instead"
            )
        if "save_original_format" not in named:
            kwargs["save_original_format"] = False
        saved = save(self.model, *args, **kwargs)
        _mark(self.model, named["save_directory"], named.get("is_main_process", True))
        return saved


def attach(models: list[Any]) -> None:
    """Have models that hold a swapped layer save themselves as such."""
    for model in models:
        if hasattr(type(model), METHOD) and METHOD not in vars(model):
            model.__dict__[METHOD] = SavePretrained(model)


def detach(models: list[Any]) -> None:
    """Give models that hold no swapped layer their class's way of saving back."""
    for model in models:
        if isinstance(vars(model).get(METHOD), SavePretrained) and not holds_swapped(model):
            del model.__dict__[METHOD]


@contextlib.contextmanager
def _telling(model: Any) -> Iterator[None]:
    """Have the config of `model` hold the recipe of its swap while it is saved."""
    recipe = _recipe(model)
    if recipe is not None:
        setattr(model.config, RECIPE, recipe)
    try:
        yield
    finally:
        vars(model.config).pop(RECIPE, None)


def _recipe(model: nn.Module) -> Any:
    """The recipe of a model's swap; None, with a warning, where there is no form of it in JSON."""
    from attnzoo.recipe import recipe_of

    try:
        return recipe_of(model)
    except OptionError as error:
        warnings.warn(f"saved without the recipe of the swap, which attnzoo.load needs: {error}", stacklevel=2)
        return None


def mixers(model: nn.Module) -> Iterator[tuple[str, Swapped]]:
    """Paths and records of the mixers in a model."""
    for path, module in model.named_modules():
        record = swapped_record(module)
        if record is not None and isinstance(module, MixerLayer):
            yield path, record


def advice(swapped: list[tuple[str, Swapped]]) -> str:
    """Say which mixers stand where, and how such weights are loaded."""
    places: dict[str, list[str]] = {}
    for path, record in swapped:
        options = "".join(f", {name}={value!r}" for name, value in record.options.items())
        places.setdefault(f"attnzoo.replace_attention(model, {record.info.name!r}{options})", []).append(path)
    calls = "; ".join(
        f"{call} in {', '.join(paths[:2])}{f' and {len(paths) - 2} more' if len(paths) > 2 else ''}"
        for call, paths in places.items()
    )
    return (
        f"these are weights of a model whose attention was replaced ({calls}). Load it by attnzoo.load(folder); or "
        "build the model from its config, replace its attention in the same way, then attnzoo.load_weights(model, "
        "folder)"
    )


def mark_saved() -> None:
    """Mark the config of the model that ``save_pretrained`` is saving, if a call of it is under way.

    Called by a mixer that is asked for its weights. Nothing but the call itself knows of a model that a swap was not
    given, and it has written the config by then.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return
    code = inspect.unwrap(getattr(transformers.PreTrainedModel, METHOD)).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is not None:
        given = frame.f_locals
        _mark(given["self"], given["save_directory"], given["is_main_process"])


def _mark(model: Any, folder: str | os.PathLike[str], is_main_process: bool) -> None:
    """Have the config that was written for `model` say that the weights are none for ``from_pretrained``."""
    config = Path(folder) / "config.json"
    if not is_main_process or not config.is_file() or getattr(model, "_hf_peft_config_loaded", False):
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    if FIELD not in content:
        content[FIELD] = advice(list(mixers(model)))
        recipe = _recipe(model)
        content |= {} if recipe is None else {RECIPE: recipe}
        files.write(config, json.dumps(content, indent=2, sort_keys=True) + "\n")

"""How a model of transformers with mixers is saved.

``save_pretrained`` writes weights under the names of the library's first release of a model, and ``from_pretrained``
on what it wrote would build the model with attention of its own, random, and go on with a warning. So a model with
mixers saves its weights under the names that it has, and its config says that they are no weights for
``from_pretrained``, which then stops with what to do instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from attnzoo import files
from attnzoo.errors import UnsupportedError
from attnzoo.hosts.site import MixerLayer, Swapped, swapped_record

METHOD = "save_pretrained"
FIELD = "transformers_weights"  # of a config: the file of the weights; another word than a file's name is an error


class SavePretrained:
    """``save_pretrained`` of one model; like that of its class as long as the model has no mixers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """Save the model; see transformers' ``PreTrainedModel.save_pretrained``.

        Raises
        ------
        UnsupportedError
            With ``push_to_hub=True``, which would upload the config before it says what the weights are.
        """
        save = getattr(type(self.model), METHOD)
        swapped = list(mixers(self.model))
        if not swapped:
            return save(self.model, save_directory, is_main_process, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            raise UnsupportedError(
                "a model with mixers is not uploaded while it is saved; call model.push_to_hub(repo_id) instead"
            )
        if len(args) < 7:  # not given by position
            kwargs.setdefault("save_original_format", False)
        saved = save(self.model, save_directory, is_main_process, *args, **kwargs)
        config = Path(save_directory) / "config.json"
        if is_main_process and config.is_file() and not getattr(self.model, "_hf_peft_config_loaded", False):
            _mark(config, advice(swapped))
        return saved


def attach(models: list[Any]) -> None:
    """Have models that hold a mixer save themselves as such."""
    for model in models:
        if hasattr(type(model), METHOD) and METHOD not in vars(model):
            model.__dict__[METHOD] = SavePretrained(model)


def detach(models: list[Any]) -> None:
    """Give models that hold no mixer their class's way of saving back."""
    for model in models:
        if isinstance(vars(model).get(METHOD), SavePretrained) and not any(mixers(model)):
            del model.__dict__[METHOD]


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
        f"these are weights of a model whose attention was replaced ({calls}). Build the model from its config, "
        "replace its attention in the same way, then attnzoo.load_weights(model, folder)"
    )


def _mark(config: Path, said: str) -> None:
    content = json.loads(config.read_text(encoding="utf-8"))
    content[FIELD] = said
    files.write(config, json.dumps(content, indent=2, sort_keys=True) + "\n")

"""Read what `attnzoo.save` wrote, or transformers' ``save_pretrained`` of a swapped model, and check it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from attnzoo.assets import sha256_of
from attnzoo.errors import WeightsError
from attnzoo.hosts.saving import RECIPE
from attnzoo.recipe import Recipe
from attnzoo.weights import read_weights

FORMAT = 1
DESCRIPTION = "attnzoo.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """What a folder says of the model that was saved in it.

    Attributes
    ----------
    folder, name
        Where, and the class of the model.
    recipe
        Of its swaps; see `attnzoo.recipe`.
    blueprint, unknown
        How the host model is built (see `attnzoo.building`), or None and why.
    weights
        Size and hash of the weights, and which names stand for one tensor; None of what ``save_pretrained`` wrote.
    buffers
        Dtypes of the buffers of floating-point numbers that are not among the weights.
    structure
        See `attnzoo.building.structure`.
    """

    folder: Path
    name: str
    recipe: Recipe
    blueprint: dict[str, Any] | None
    unknown: str = ""
    weights: dict[str, Any] | None = None
    buffers: dict[str, str] = field(default_factory=dict)
    structure: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def shared(self) -> dict[str, str]:
        """Names by which a tensor is known besides the one that it is written under."""
        return {} if self.weights is None else self.weights["shared"]

    def state(self) -> dict[str, Tensor]:
        """Read the weights, under all their names.

        Raises
        ------
        WeightsError
            If they are not those that were saved.
        """
        if self.weights is None:
            return read_weights(self.folder)
        path, size = self.folder / WEIGHTS, self.weights["bytes"]
        if not path.is_file():
            raise WeightsError(f"{path} is missing; copy the whole folder, or save again")
        found = path.stat().st_size
        if found != size or sha256_of(path) != self.weights["sha256"]:
            told = f"it has {found:,} bytes of {size:,}" if found != size else "its SHA-256 is another"
            raise WeightsError(
                f"{path} is not what {DESCRIPTION} beside it tells of ({told}): it was altered, or a save or a copy "
                "was cut off; copy the whole folder, or save again"
            )
        state = read_weights(path)
        return state | {key: state[name] for key, name in self.shared.items()}


def read_description(folder: Path) -> Saved:
    """Read what a folder says of its model.

    Raises
    ------
    WeightsError
        If it says nothing, cannot be read, or was written by a newer attnzoo.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return _of_save_pretrained(folder)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        written, by = said["format"], said["attnzoo"]
        if type(written) is int and written > FORMAT:
            raise WeightsError(
                f"{path} was written by attnzoo {by} in format {written}, and this attnzoo reads up to {FORMAT}: "
                f"install attnzoo {by} or newer"
            )
        if written != FORMAT:
            raise ValueError(f"its format is {written!r}")
        return Saved(
            folder=folder,
            name=said["class"],
            recipe=_checked(said["swaps"]),
            blueprint=said["model"],
            unknown=said["unknown"],
            weights={key: said["weights"][key] for key in ("bytes", "sha256", "shared")},
            buffers=dict(said["buffers"]),
            structure=dict(said["structure"]),
        )
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"{path} is not what attnzoo.save writes: {what}") from error


def _of_save_pretrained(folder: Path) -> Saved:
    """The same, from what transformers' ``save_pretrained`` wrote of a swapped model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        recipe, name = _checked(config[RECIPE]), config["architectures"][0]
        path = folder / "generation_config.json"
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise WeightsError(
            f"{folder} holds no {DESCRIPTION}, which attnzoo.save writes, and no config.json of a swapped model of "
            "transformers. Weights alone are loaded by attnzoo.load_weights, into a model that is built and swapped"
        ) from error
    blueprint = {"library": "transformers", "class": name, "config": config, "generation_config": generation}
    return Saved(folder, name, recipe, blueprint)


def _checked(recipe: Any) -> Recipe:
    """Give a recipe back if it is one, else raise `TypeError` or `KeyError`."""
    for entry in recipe:
        named = all(isinstance(entry[key], str) for key in ("attention", "kind", "class"))
        if not named or not isinstance(entry["options"], dict) or not entry["layers"]:
            raise TypeError(f"{entry} is not an entry of a recipe")
    return list(recipe)

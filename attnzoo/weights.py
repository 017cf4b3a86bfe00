"""Load weights that were saved from a swapped model into a model swapped in the same way: all of them, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from attnzoo.errors import WeightsError
from attnzoo.extras import require
from attnzoo.hosts.site import comes_from
from attnzoo.swap import swapped_layers

Model = TypeVar("Model", bound=nn.Module)

_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_MIXER = ".mixer."  # where the weights of a mixer lie, under the name of its layer
_NESTED = ("state_dict", "model")  # where training libraries put the weights in a file that holds more


def load_weights(model: Model, weights: str | Path | Mapping[str, Tensor]) -> Model:
    """Load weights into a model, and say what to do where they are of a model with other attention.

    Weights of a model whose attention is a mixer are loaded in three steps: build the model, swap it with
    `replace_attention` as when they were saved, load. `load_state_dict` does the third step as well; this function
    also reads the folder that transformers' ``save_pretrained`` writes, under whichever names that release gave the
    weights, and its errors say which step is missing. The model is changed in place and returned.

    Parameters
    ----------
    model
        The model, swapped as when the weights were saved.
    weights
        A folder written by ``save_pretrained``; a file of safetensors, or of ``torch.save`` that holds a state dict
        (as mmengine's checkpoints do); or a state dict.

    Raises
    ------
    WeightsError
        The weights cannot be read, or do not fit: of other layers, names or shapes. The model is then as it was.
    """
    given = dict(weights) if isinstance(weights, Mapping) else _read(Path(weights))
    own = model.state_dict()
    state = _renamed(model, given, own)
    tied = {key for key in own.keys() - state.keys() if _is_tied(own, key, state)}
    missing = [key for key in own if key not in state and key not in tied]
    unknown = [key for key in state if key not in own]
    other = [key for key, value in state.items() if key in own and value.shape != own[key].shape]
    if missing or unknown or other:
        raise WeightsError(_advice(model, state, own, missing, unknown, other))
    model.load_state_dict(state, strict=False)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_dir():
        return _read_file(path)
    for name in _INDEX:
        if (path / name).is_file():
            try:
                files = set(json.loads((path / name).read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise WeightsError(f"{path / name} is no index of files of weights: {error}") from error
            return {key: value for file in sorted(files) for key, value in _read_file(path / file).items()}
    for name in _WHOLE:
        if (path / name).is_file():
            return _read_file(path / name)
    raise WeightsError(f"{path} holds no weights: looked for {', '.join([*_WHOLE, *_INDEX])}")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            require("safetensors", extra="llm")
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # safetensors and pickle have errors of their own
        raise WeightsError(
            f"{path} cannot be read as weights alone ({type(error).__name__}: {str(error).splitlines()[0]}); read it "
            "yourself if you trust it, and pass the state dict"
        ) from error
    for name in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{path} holds no state dict; pass the state dict itself")
    return dict(found)


def _renamed(model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights the model's own names, where transformers saved them under older ones."""
    if state.keys() <= own.keys() or not comes_from(model, "transformers"):
        return state
    from attnzoo.hosts import versions

    names = versions.saved_names(model)
    return {key if key in own else names.get(key, key): value for key, value in state.items()}


def _is_tied(own: Mapping[str, Tensor], key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the weight `key` is one that is loaded under another name."""
    place = own[key].data_ptr()
    return place != 0 and any(other in state and own[other].data_ptr() == place for other in own if other != key)


def _advice(
    model: nn.Module,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    missing: list[str],
    unknown: list[str],
    other: list[str],
) -> str:
    """Say why weights do not fit, and what to do."""
    mixers = {path for path in swapped_layers(model) if any(key.startswith(f"{path}{_MIXER}") for key in own)}
    theirs = {key.partition(_MIXER)[0] for key in unknown if _MIXER in key}
    lacking = sorted(mixers & {key.partition(_MIXER)[0] for key in missing if _MIXER in key})
    again = "build the model, call attnzoo.replace_attention as when they were saved, then load them"
    if theirs - mixers:
        places = _some(sorted(theirs - mixers))
        return f"the weights are of a model with mixers where this one has attention of its own ({places}): {again}"
    if theirs & mixers or any(_MIXER in key for key in other):
        places = _some(sorted(theirs & mixers) or [key for key in other if _MIXER in key])
        return f"the weights are of other mixers than this model has ({places}): {again}, with the same options"
    if lacking:
        return (
            f"the weights have no mixers where this model has them ({_some(lacking)}): load weights of an unswapped "
            "model before the swap"
        )
    problems = [f"missing {key}" for key in missing] + [f"unknown {key}" for key in unknown]
    problems += [f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in other]
    return f"the weights are not of this {type(model).__name__}: {_some(problems, '; ')}"


def _some(items: list[str], between: str = ", ") -> str:
    return between.join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")

"""Load weights that were saved from a swapped model into a model swapped in the same way: all of them, or none."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnzoo.errors import AttnZooError, WeightsError, short
from attnzoo.extras import require
from attnzoo.hosts.site import MixerLayer, comes_from
from attnzoo.swap import swap_report, swapped_layers

Model = TypeVar("Model", bound=nn.Module)

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"  # added to the name of the whole file where there are shards instead
_MIXER = "mixer."  # where the weights of a mixer lie, under the name of its layer
_NESTED = ("state_dict", "model")  # where training libraries put the weights in a file that holds more
_LEFT_OUT = (  # what mmengine's checkpoints hold besides the weights: its log, HistoryBuffers of NumPy arrays
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
)


def load_weights(model: Model, weights: str | Path | Mapping[str, Tensor]) -> Model:
    """Load weights into a model; if they belong to a model with other attention, the error says what to do.

    Weights of a model with mixers are loaded in three steps: build the model, swap it with `replace_attention` as when
    the weights were saved, load. `load_state_dict` works for the third step as well; this function also reads folders
    written by transformers' ``save_pretrained``, whatever names that release gave the weights, and its errors say which
    step is missing. The model is changed in place and returned.

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
        The weights cannot be read, or do not match the model (other layers, names or shapes). The model is then
        unchanged.
    """
    if not isinstance(model, nn.Module):
        raise WeightsError(f"expected a torch.nn.Module to load weights into, not {short(model)}")
    if isinstance(weights, Mapping):
        given = _state_dict(weights, "what was given as weights")
    elif isinstance(weights, (str, os.PathLike)):
        given = read_weights(Path(weights))
    else:
        raise WeightsError(f"weights must be a folder, a file or a state dict, not {short(weights)}")
    model.load_state_dict(fit(model, given), strict=False)
    return model


def fit(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights under the names that they have in `model`, which is left as it is.

    Raises
    ------
    WeightsError
        If they are of other layers, names or shapes, or differ where the model has one tensor under two names.
    """
    own = model.state_dict()
    state = _renamed(model, dict(given), own)
    tied = {key for key in own.keys() - state.keys() if _is_tied(own, key, state)}
    missing = [key for key in own if key not in state and key not in tied]
    unknown = [key for key in state if key not in own]
    other = [key for key, value in state.items() if key in own and value.shape != own[key].shape]
    if missing or unknown or other:
        raise WeightsError(_advice(model, state, own, missing, unknown, other))
    _check_shared(state, own)
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a folder that ``save_pretrained`` wrote, or a file of weights.

    Raises
    ------
    WeightsError
        If there is none, or it cannot be read.
    """
    if not path.exists():
        raise WeightsError(f"{path} cannot be read: there is no such file or folder")
    if not path.is_dir():
        return _read_file(path)
    for name in _WHOLE:
        whole, index = path / name, path / f"{name}{_INDEX}"
        if index.is_file():
            shards = _shards(index)
            gone = [shard.name for shard in shards if not shard.is_file()]
            # save_pretrained removes older shards but not their index, and leaves an older whole file beside new shards
            if not gone:
                return {key: value for shard in shards for key, value in _read_file(shard).items()}
            if not whole.is_file():
                raise WeightsError(f"{index} names files that are missing: {_some(gone)}; copy the whole folder")
        if whole.is_file():
            return _read_file(whole)
    raise WeightsError(
        f"{path} holds no weights: looked for {_some([*_WHOLE, *(f'{name}{_INDEX}' for name in _WHOLE)])}"
    )


def _shards(index: Path) -> list[Path]:
    """Give the files that an index names."""
    try:
        return [index.parent / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of weight files: {_reason(error)}") from error


class _LeftOut:
    """Stands for everything that is read and not wanted: made of anything, holding nothing."""

    def __new__(cls, *args: Any) -> _LeftOut:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            require("safetensors", extra="llm")
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([(_LeftOut, name) for name in _LEFT_OUT]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except AttnZooError:
        raise
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {_reason(error)}") from error
    except Exception as error:  # safetensors and pickle have errors of their own
        raise WeightsError(
            f"{path} cannot be read as weights alone ({_reason(error)}); read it yourself if you trust it, and pass "
            "the state dict"
        ) from error
    for name in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    return _state_dict(found, str(path))


def _state_dict(found: object, source: str) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{source} holds no state dict; pass the state dict itself")
    return dict(found)


def _reason(error: Exception) -> str:
    """The type of an error and the line of its message that says why, without the colors of a terminal."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
    why = [line for line in lines if line.startswith("WeightsUnpickler error:")]  # below how to turn the check off
    return ": ".join([type(error).__name__, *(why or lines)[:1]])


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


def _check_shared(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError` where a model has one tensor under two names that the weights have two for."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for key, value in own.items():
        if key in state and value.numel() and not value.is_meta:
            name = first.setdefault((value.data_ptr(), value.shape, value.stride()), key)
            if name != key and state[name] is not state[key] and not torch.equal(state[name], state[key]):
                raise WeightsError(
                    f"{name} and {key} are one tensor in this model and two in the weights: build the model with "
                    "untied weights, as when they were saved"
                )


def _advice(
    model: nn.Module,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    missing: list[str],
    unknown: list[str],
    other: list[str],
) -> str:
    """Say why weights do not fit, and what to do."""
    own_layers = {layer.path for layer in swap_report(model).layers}
    mixers = {path for path, layer in swapped_layers(model).items() if isinstance(layer, MixerLayer)}
    theirs = _with_mixers(own_layers, unknown)
    misshaped = _with_mixers(mixers, other)
    lacking = _with_mixers(mixers, missing)
    again = "build the model, call attnzoo.replace_attention as when they were saved, then load them"
    if set(theirs) - mixers:
        places = _some(sorted(set(theirs) - mixers))
        return f"the weights are of a model with mixers where this one has its own attention ({places}): {again}"
    if theirs or misshaped:
        places = _some(theirs or misshaped)
        return f"the weights are of other mixers than this model has ({places}): {again}, with the same options"
    if lacking:
        return (
            f"the weights have no mixers where this model has them ({_some(lacking)}): load weights of an unswapped "
            "model before the swap"
        )
    problems = [f"missing {key}" for key in missing] + [f"unknown {key}" for key in unknown]
    problems += [f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in other]
    return f"the weights are not of this {type(model).__name__}: {_some(problems, '; ')}"


def _with_mixers(layers: Iterable[str], keys: list[str]) -> list[str]:
    """Paths of the attention layers under which some of the keys are those of a mixer."""
    prefixes = {path: f"{path}.{_MIXER}" if path else _MIXER for path in layers}
    return sorted(path for path, prefix in prefixes.items() if any(key.startswith(prefix) for key in keys))


def _some(items: list[str], between: str = ", ") -> str:
    return between.join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")

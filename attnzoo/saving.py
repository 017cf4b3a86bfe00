"""Save a model with the recipe of its swap, and load it swapped: for every host.

A folder holds ``model.safetensors``, the weights, and ``attnzoo.json``: how the host model is built, where its library
leaves that to be known, which layers hold which attention, and the hash of the weights. Both are written beside and
then renamed; a save that is killed between the two renames is known by the hash.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo import building, files
from attnzoo.assets import sha256_of
from attnzoo.errors import OptionError, WeightsError, short
from attnzoo.extras import require
from attnzoo.hosts.site import MixerLayer, swapped_record
from attnzoo.recipe import check_registered, recipe_of, swap_again
from attnzoo.saved import DESCRIPTION, FORMAT, WEIGHTS, Saved, read_description
from attnzoo.swap import restore_attention, swapped_layers
from attnzoo.weights import fit

_LIBRARIES = ("torch", "timm", "transformers", "onedl-mmdetection", "mmdet")


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the weights of a model with the recipe of its swap, for `load`.

    Works for models of every host, swapped or not. Modules that a mixer replaced are not saved. An earlier save in the
    folder is replaced; other files in it (such as a tokenizer's) are kept.

    Parameters
    ----------
    model
        The model. Compiled and parallel wrappers are removed first.
    folder
        Created if it does not exist.

    Raises
    ------
    OptionError
        If an option of the swap cannot be written as JSON, such as an object.
    WeightsError
        If the folder holds weights that `save` did not write, or if the weights cannot be written: the disk is full,
        the model is on the meta device, or its state dict has values that are not tensors. An earlier save is kept.
    """
    if not isinstance(model, nn.Module):
        raise WeightsError(f"expected a torch.nn.Module to save, not {short(model)}")
    folder = Path(folder)
    model = _unwrapped(model)
    recipe = recipe_of(model)
    files.check_folder(folder, "folder")
    foreign = [] if (folder / DESCRIPTION).exists() else sorted(path.name for path in folder.glob("*.safetensors"))
    if foreign:
        raise WeightsError(f"{folder / foreign[0]} was not written by attnzoo.save; give another folder")
    require("safetensors", extra="llm")
    from safetensors.torch import save_file

    import attnzoo

    tensors, shared = _tensors(model)
    structure = building.structure(model)
    blueprint, unknown = building.checked_blueprint(model, recipe, structure)
    buffers = {key: str(b.dtype).removeprefix("torch.") for key, b in _other_buffers(model).items()}
    try:
        # both are written before either is renamed, the description first: killed between, weights that it does not
        # tell of stand beside it, or none
        with files.atomic(folder / WEIGHTS) as weights, files.atomic(folder / DESCRIPTION) as description:
            save_file(tensors, weights, metadata={"format": "pt"})
            content = {
                "format": FORMAT,
                "attnzoo": attnzoo.__version__,
                "libraries": _versions(),
                "class": f"{type(model).__module__}.{type(model).__qualname__}",
                "model": blueprint,
                "unknown": unknown,
                "swaps": recipe,
                "weights": {"bytes": weights.stat().st_size, "sha256": sha256_of(weights), "shared": shared},
                "buffers": buffers,
                "structure": structure,
            }
            description.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except Exception as error:  # safetensors has errors of its own
        raise WeightsError(f"{folder} could not be written: {error}") from error


def load(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, device: str | torch.device | None = None
) -> nn.Module:
    """Load a model saved by `save`, or a swapped one saved by transformers' ``save_pretrained``, swapped as it was.

    The model is returned in evaluation mode, with each tensor in the dtype that it was saved in. Cores and policies can
    be removed with `restore_attention`; mixers cannot, because the modules they replaced were not saved.

    Parameters
    ----------
    folder
        The folder that was given to `save` or ``save_pretrained``.
    model
        A model of the same architecture with its own attention, which is changed in place and returned. Required if the
        saved folder does not say how to build the model: always for torch and mmdet, and for timm if arguments of its
        factory are not known.
    device
        Where to put the model; by default the CPU, or where `model` is.

    Raises
    ------
    WeightsError
        If the folder was not written by these, is incomplete, altered, or from a newer attnzoo; or if `model` is
        required, swapped already, or of another architecture.
    UnknownNameError
        If an attention of the model is not registered here.
    AttnZooError
        If a layer cannot be swapped as it was. In all cases `model` is unchanged.
    """
    place = _device(device)
    saved = read_description(Path(folder))
    check_registered(saved.recipe)
    state = saved.state()
    model = _built(saved) if model is None else model
    host = _unwrapped(model)
    _check_host(host, saved, state)
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn for the weights gives way to those of the file
            swap_again(host, saved.recipe)
        state = fit(host, state)
    except Exception:
        if swapped_layers(host):
            restore_attention(host)
        raise
    _warn_of_changes(saved, host)
    _fill(host, saved, state)
    for layer in swapped_layers(host).values():
        record = swapped_record(layer)
        if record is not None and isinstance(layer, MixerLayer):
            layer.__dict__["attnzoo_swap"] = dataclasses.replace(record, original=None)
    return model.eval() if place is None else model.eval().to(place)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and torch's parallel wrappers make of it."""
    inner: Any = model
    while isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is written of a model's weights: each tensor once, and under which name the others of the same place are."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    places: dict[Any, str] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{key} is {short(value)}, and a file of weights holds tensors alone")
        if value.is_meta:
            raise WeightsError(f"{key} is on the meta device: the model has no weights to save")
        storage = value.untyped_storage().data_ptr()
        place = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in places:
            shared[key] = places[place]
            continue
        places[place] = key
        tensors[key] = value.clone(memory_format=torch.contiguous_format) if storage in storages else value.contiguous()
        storages.add(storage)
    return tensors, shared


def _other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of floating-point numbers that are not part of the state dict."""
    own = model.state_dict().keys()
    return {key: value for key, value in model.named_buffers() if key not in own and value.is_floating_point()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device(device: str | torch.device | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={short(device)} is not a device of torch, such as 'cpu' or 'cuda:0'") from error


def _built(saved: Saved) -> nn.Module:
    """Build the host model, or raise `WeightsError` with what to do."""
    try:
        if saved.blueprint is not None:
            return building.build(saved.blueprint)
        why = f"how this {saved.name} is built is not known ({saved.unknown})"
    except WeightsError as error:
        why = str(error)
    raise WeightsError(
        f"{saved.folder}: {why}; build it as when it was saved, with its own attention, and pass it: "
        "attnzoo.load(folder, model)"
    )


def _check_host(model: nn.Module, saved: Saved, state: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError` unless `model` is, as far as weights tell, what was saved, before its swap."""
    if not isinstance(model, nn.Module):
        raise WeightsError(f"expected a torch.nn.Module to load into, not {short(model)}")
    if swapped_layers(model):
        raise WeightsError("the model is swapped already: pass one with its own attention (attnzoo.restore_attention)")
    own = {key: value.shape for key, value in model.state_dict().items()}
    if any(value.is_meta for value in model.state_dict().values()):
        raise WeightsError("the model is on the meta device: build it on a device that holds its weights")
    if saved.weights is None:
        return  # names are those of another release, perhaps
    paths = {path for entry in saved.recipe if entry["kind"] == "mixer" for path in entry["layers"]}
    layers = dict(model.named_modules(remove_duplicate=False))
    mixed = {id(layers[path]) for path in paths if path in layers}
    paths |= {path for path, module in layers.items() if id(module) in mixed}

    def outside(key: str) -> bool:
        return not any(key.startswith(f"{path}.") for path in paths)

    differ = [f"it has no layer {path}" for path in sorted(paths - layers.keys())]
    differ += [f"it has no {key}" for key in state if key not in own and outside(key)]
    differ += [f"its {key} is new" for key in own if key not in state and outside(key)]
    differ += [
        f"its {key} is {tuple(own[key])}, was {tuple(value.shape)}"
        for key, value in state.items()
        if outside(key) and key in own and own[key] != value.shape
    ]
    if differ:
        raise WeightsError(
            f"this {type(model).__name__} is of another architecture than the {saved.name} that was saved: "
            f"{_some(differ)}"
        )


def _warn_of_changes(saved: Saved, model: nn.Module) -> None:
    """Say what of a model, beside its weights, is not as it was saved."""
    changed = building.differences(saved.structure, building.structure(model)) if saved.structure else []
    if changed:
        warnings.warn(
            f"the model is not quite the one saved in {saved.folder}, so its outputs may differ: {_some(changed)}",
            stacklevel=3,
        )


def _fill(model: nn.Module, saved: Saved, state: Mapping[str, Tensor]) -> None:
    """Load `state`, which fits: what was one tensor is one again, and each is in the dtype that it was saved in."""
    for key, name in saved.shared.items():
        holder, _, own = key.rpartition(".")
        parameters = model.get_submodule(holder)._parameters
        if parameters.get(own) is not None:
            parameters[own] = model.get_parameter(name)
    for key, value in model.state_dict(keep_vars=True).items():
        if key in state and value.dtype != state[key].dtype:
            value.data = value.data.to(state[key].dtype)
    model.load_state_dict(state, strict=False)
    for key, value in _other_buffers(model).items():
        if key in saved.buffers:
            value.data = value.data.to(getattr(torch, saved.buffers[key]))


def _some(items: list[str]) -> str:
    return "; ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")

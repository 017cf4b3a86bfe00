"""A direction per layer and key/value head, made from a model and a text, and the file that says which."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnzoo import files
from attnzoo.errors import AssetError, OptionError
from attnzoo.eviction.layer_data import LayerData, ModelIdentity
from attnzoo.extras import require

FORMAT = "attnzoo directions 1"
MAKE = "make them for this model: python -m attnzoo.eviction.calibrate MODEL TEXT --out FILE"
_LAYER = "layer."  # begins the name of a tensor


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions in the space of keys; equal if all that is in them is.

    Attributes
    ----------
    layers
        Index of a layer to its directions, ``(Hkv, D)`` in float32.
    model
        The model that they were made from.
    tokens, text
        How many tokens they were made from, and SHA-256 of their numbers.
    """

    layers: Mapping[int, Tensor]
    model: ModelIdentity
    tokens: int
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of all that is in them."""
        said = hashlib.sha256(repr((self.model, self.tokens, self.text, sorted(self.layers))).encode())
        for index in sorted(self.layers):
            said.update(self.layers[index].float().cpu().contiguous().numpy().tobytes())
        return said.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Directions) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Directions({len(self.layers)} layers of {self.model.name}, {self.tokens} tokens)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file, whole or not at all.

        Raises
        ------
        AssetError
            If it cannot be written.
        MissingExtraError
            Without safetensors.
        """
        require("safetensors", extra="llm")
        from safetensors.torch import save

        path = Path(path)
        told = {
            "format": FORMAT,
            "model": self.model.name,
            "config": self.model.digest,
            "tokens": str(self.tokens),
            "text": self.text,
        }
        if path.is_dir():
            raise AssetError(f"directions cannot be written to {str(path)!r}, a folder: name a file in it")
        try:
            with files.atomic(path) as part:
                part.write_bytes(save({f"{_LAYER}{i}": x.float().cpu() for i, x in self.layers.items()}, told))
        except OSError as error:
            raise AssetError(f"directions cannot be written to {str(path)!r}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Directions:
        """Read what `save` wrote.

        Raises
        ------
        AssetError
            If the file cannot be read, or holds no directions.
        MissingExtraError
            Without safetensors.
        """
        require("safetensors", extra="llm")
        from safetensors import safe_open

        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise AssetError(f"the directions {os.fspath(path)!r} cannot be read: {error.strerror}; {MAKE}") from error
        try:
            with safe_open(os.fspath(path), "pt") as file:
                told = file.metadata() or {}
                if told.get("format") != FORMAT:
                    raise ValueError(f"format {told.get('format')}, expected {FORMAT}")
                layers = {int(name.removeprefix(_LAYER)): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            if any(x.dim() != 2 or x.dtype != torch.float32 or not x.isfinite().all() for x in layers.values()):
                raise ValueError("a direction is not a list of finite numbers")
            return cls(layers, ModelIdentity(told["model"], told["config"]), int(told["tokens"]), told["text"])
        except Exception as error:  # safetensors has errors of its own
            why = f"{type(error).__name__}: {error}"
            raise AssetError(f"{os.fspath(path)!r} holds no directions, or is damaged ({why}); {MAKE}") from error

    def check_layer(self, data: LayerData) -> None:
        """Raise `OptionError` if these directions are not for a layer of this model; says what differs."""
        if data.model.digest != self.model.digest:
            raise OptionError(
                f"the directions are of another model, {self.model.name} (config {self.model.digest[:12]}), and this "
                f"is {data.model.name} (config {data.model.digest[:12]}); {MAKE}"
            )
        found = self.layers.get(data.index)
        if found is None:
            raise OptionError(f"the directions have none for layer {data.index}; {MAKE}")
        if tuple(found.shape) != (data.kv_heads, data.head_width):
            raise OptionError(
                f"the directions of layer {data.index} are {tuple(found.shape)}, and its key/value heads and their "
                f"width {(data.kv_heads, data.head_width)}; {MAKE}"
            )

"""Models by name: ``timm:vit_small_patch16_224``, ``transformers:FOLDER``, or ``package.module:function``."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from attnzoo import imports
from attnzoo.assets import model_folder, sha256_of
from attnzoo.checks import not_square
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require

FORMS = "timm:NAME, transformers:FOLDER_OR_NAME or package.module:function"


@dataclass(frozen=True)
class Call:
    """A model and the arguments that it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self) -> Any:
        """Call the model with lists and mappings of its own, for it may write into them."""
        args, named = tree_map(lambda x: x, (self.args, self.named))
        return self.model(*args, **named)

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors((self.args, self.named))

    @property
    def shape(self) -> str:
        """Shapes of all tensors among the arguments, in words."""
        return "input " + ", ".join(" x ".join(map(str, x.shape)) for x in self.inputs)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Call:
        """Bring model and arguments to a device, and what is of floating point to a dtype."""
        args, named = tree_map_only(
            Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), (self.args, self.named)
        )
        return Call(self.model.to(device, dtype), args, named)

    def twin(self) -> Call:
        """The same on a second copy of the model."""
        return replace(self, model=copy.deepcopy(self.model))


def tensors(nested: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def load_model(name: str) -> nn.Module:
    """Build a model in evaluation mode; its weights are random, but for those of a folder that has some.

    Parameters
    ----------
    name
        ``timm:NAME``; ``transformers:FOLDER`` (or the name of an asset, or of the hub); or ``package.module:function``,
        which is called without arguments and gives a model, or a tuple that begins with one. The working directory is
        searched too.

    Raises
    ------
    ConfigError
        If there is no such model.
    MissingExtraError
        If its library is not installed.
    """
    library, rest = split(name)
    build: dict[str, Callable[[str], nn.Module]] = {"timm": _timm, "transformers": _transformers}
    if library not in build:
        found = call_function(name)
        return _module(name, found[0] if isinstance(found, tuple) and found else found).eval()
    return _told(name, lambda: build[library](rest)).eval()


def load_with_example(name: str) -> Call:
    """Call a ``package.module:function`` that returns a model and an example input; the model is set to evaluate.

    The example is a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises
    ------
    ConfigError
        If there is no such function, or it gives something else.
    """
    found = call_function(name)
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise ConfigError(f"model {name!r}: the function must return (model, example input), it gave {what}")
    model, example = _module(name, found[0]).eval(), found[1]
    if not tensors(dict(example) if isinstance(example, Mapping) else example):
        raise ConfigError(f"model {name!r}: its example input is {type(example).__name__} and holds no tensor")
    if isinstance(example, Mapping):
        return Call(model, (), dict(example))
    return Call(model, tuple(example) if isinstance(example, (tuple, list)) else (example,), {})


def split(name: str) -> tuple[str, str]:
    """What stands before and after the first colon of a model's name.

    Raises
    ------
    ConfigError
        If one of the two is missing.
    """
    library, _, rest = name.partition(":")
    if not library or not rest or library.startswith("."):
        raise ConfigError(f"model {name!r}: expected {FORMS}")
    return library, rest


def call_function(name: str) -> Any:
    """Give what ``package.module:function`` returns; see `function_of`.

    Raises
    ------
    ConfigError
        If there is no such function, or it raises something.
    """
    return _told(name, function_of(name))


def function_of(name: str) -> Any:
    """Import ``package.module:function``, with what its module registers; it may lie in the working directory.

    Raises
    ------
    ConfigError
        If there is no such function, or its module raises something.
    """
    module, function = split(name)
    imports.search_here()
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"model {name!r}: {error}; expected {FORMS}") from error
    except Exception as error:  # a module may raise anything
        raise ConfigError(f"model {name!r}: {type(error).__name__}: {error}") from error


def source_of(name: str) -> str:
    """What stands for the code of a ``package.module:function``, or the config of a folder: a hash of its file."""
    library, rest = split(name)
    if library == "transformers":
        path = Path(rest) / "config.json"
        return sha256_of(path) if path.is_file() else ""
    return imports.source_of(library)


def is_causal_lm(name: str) -> bool:
    """Whether a folder of transformers, or the name of an asset or of the hub, is that of a causal language model.

    Raises
    ------
    ConfigError
        If there is none.
    """
    factory = _factory(_told(f"transformers:{name}", lambda: _config(name)))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return factory.__name__ in {"AutoModelForCausalLM", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}


def encoder_with_example(name: str, tokens: int, batch: int) -> Call:
    """Build a transformers encoder of images or text with random weights, and random inputs for it.

    Parameters
    ----------
    name
        ``transformers:FOLDER_OR_NAME``.
    tokens
        Patches of an image, a square number, or tokens of a text.
    batch
        Images or texts.

    Raises
    ------
    ConfigError
        If there is no such model, it takes neither images nor text alone, or not as many tokens.
    """
    config = _told(name, lambda: _config(split(name)[1]))
    factory = _factory(config)
    kind, patch = getattr(factory, "main_input_name", ""), getattr(config, "patch_size", None)
    if kind == "pixel_values" and isinstance(patch, int):
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise ConfigError(f"tokens: {not_square(tokens)}, as these images are")
        config.image_size = side * patch
        example = torch.randn(batch, getattr(config, "num_channels", 3), side * patch, side * patch)
    elif kind == "input_ids" and hasattr(config, "vocab_size"):
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            raise ConfigError(f"tokens: {tokens:,} asked for, but {name!r} is made for {longest:,}")
        example = torch.randint(config.vocab_size, (batch, tokens))
    else:
        raise ConfigError(f"model {name!r}: attnzoo can make no input for it; give a package.module:function instead")
    return Call(_told(name, lambda: _random(factory, config)).eval(), (), {kind: example})


def _config(name: str) -> Any:
    require("transformers", extra="llm")
    from transformers import AutoConfig

    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ConfigError(f"model 'transformers:{name}': there is no such folder")
    return AutoConfig.from_pretrained(_place(name))


def _place(name: str) -> str:
    """The folder of an asset; any other name as it is."""
    return str(model_folder(name) or name)


def _factory(config: Any) -> Any:
    """The class of models that a config of transformers names; without one, what its kind of model is made for.

    That is a causal language model, unless words are masked for it to guess, or none is made of the kind.
    """
    import transformers
    from transformers.models.auto import modeling_auto as kinds

    architecture = (getattr(config, "architectures", None) or [""])[0]
    if hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    kind = config.model_type
    masked, causal = kinds.MODEL_FOR_MASKED_LM_MAPPING_NAMES, kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in kinds.MODEL_MAPPING_NAMES and (kind in masked or kind not in causal):
        return getattr(transformers, kinds.MODEL_MAPPING_NAMES[kind])
    return transformers.AutoModelForCausalLM


def _told(name: str, build: Callable[[], Any]) -> Any:
    """What `build` gives; whatever it raises becomes an error that names the model."""
    try:
        return build()
    except AttnZooError:
        raise
    except Exception as error:  # what builds a model may raise anything
        raise ConfigError(f"model {name!r}: {type(error).__name__}: {error}") from error


def _module(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r}: the function gave {type(model).__name__}, no torch module")
    return model


def _timm(name: str) -> nn.Module:
    require("timm")
    import timm

    from attnzoo.tasks.classify.build import check_model_name

    check_model_name(name)
    model: nn.Module = timm.create_model(name)
    return model


def _transformers(name: str) -> nn.Module:
    config = _config(name)
    factory, place = _factory(config), _place(name)
    if Path(place).is_dir() and any(Path(place).glob("*.safetensors")):
        model: nn.Module = factory.from_pretrained(place)
        return model
    return _random(factory, config)


def _random(factory: Any, config: Any) -> nn.Module:
    build = factory.from_config if hasattr(factory, "from_config") else factory
    model: nn.Module = build(config)
    return model

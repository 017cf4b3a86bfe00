"""Models by name: ``timm:vit_small_patch16_224``, ``transformers:FOLDER``, or ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from torch import nn

from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.extras import require

FORMS = "timm:NAME, transformers:FOLDER_OR_NAME or package.module:function"


def load_model(name: str) -> nn.Module:
    """Build a model in evaluation mode; its weights are random, but for those of a folder that has some.

    Parameters
    ----------
    name
        ``timm:NAME``; ``transformers:FOLDER`` (or a name of the hub); or ``package.module:function``, which is called
        without arguments and gives a model, or a tuple that begins with one. The working directory is searched too.

    Raises
    ------
    ConfigError
        If there is no such model.
    MissingExtraError
        If its library is not installed.
    """
    library, colon, rest = name.partition(":")
    if not colon or not rest:
        raise ConfigError(f"model {name!r}: expected {FORMS}")
    try:
        model = {"timm": _timm, "transformers": _transformers}.get(library, lambda rest: _function(library, rest))(rest)
    except AttnZooError:
        raise
    except Exception as error:  # what builds a model may raise anything
        raise ConfigError(f"model {name!r}: {type(error).__name__}: {error}") from error
    return model.eval()


def _timm(name: str) -> nn.Module:
    require("timm")
    import timm

    from attnzoo.tasks.classify.build import check_model_name

    check_model_name(name)
    model: nn.Module = timm.create_model(name)
    return model


def _transformers(name: str) -> nn.Module:
    require("transformers", extra="llm")
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    factory = getattr(transformers, architecture, None)
    weights = Path(name).is_dir() and any(Path(name).glob("*.safetensors"))
    if factory is None:
        factory = transformers.AutoModelForCausalLM
        return factory.from_pretrained(name) if weights else factory.from_config(config)
    return factory.from_pretrained(name) if weights else factory(config)


def _function(module: str, function: str) -> nn.Module:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"model '{module}:{function}': {error}; expected {FORMS}") from error
    model = found[0] if isinstance(found, tuple) else found
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model '{module}:{function}': the function gave {type(model).__name__}, no torch module")
    return model

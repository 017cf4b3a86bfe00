"""Modules of one's own, imported for what they register; they may lie in the working directory."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from attnzoo.assets import sha256_of
from attnzoo.errors import ConfigError


def import_modules(names: Iterable[str]) -> None:
    """Import modules, so that the methods that they register have names.

    Raises
    ------
    ConfigError
        If there is no such module, or it raises something.
    """
    search_here()
    for name in names:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            stem = Path(name).stem if name.endswith(".py") else "mypol"
            raise ConfigError(f"imports: {name!r} must be the name of a module, such as {stem!r}")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # the module is there, what it imports is not
                raise ConfigError(f"imports: {name!r} cannot be imported: {error}") from error
            raise ConfigError(
                f"imports: there is no module {error.name!r} in the working directory ({os.getcwd()}), nor is one "
                "installed"
            ) from error
        except Exception as error:  # a module may raise anything
            raise ConfigError(f"imports: {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def source_of(name: str) -> str:
    """What stands for the code of a module: a hash of its file; empty where there is none."""
    search_here()
    try:
        found = importlib.util.find_spec(name)
    except Exception:  # the package around it may raise anything; whoever imports it will tell
        return ""
    return sha256_of(Path(found.origin)) if found and found.origin and Path(found.origin).is_file() else ""


def search_here() -> None:
    """Find modules in the working directory too, as ``python -m`` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())

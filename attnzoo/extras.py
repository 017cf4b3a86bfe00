"""Optional packages: one way of asking for them, and one message when they are missing."""

from __future__ import annotations

import importlib.util

from attnzoo.errors import MissingExtraError


def require(*modules: str, extra: str = "vision") -> None:
    """Raise unless every one of `modules` can be imported.

    Parameters
    ----------
    modules
        Top-level import names, such as ``"yaml"``.
    extra
        The extra of this package that brings them.

    Raises
    ------
    MissingExtraError
        Names what is missing and gives the install line.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f'{", ".join(missing)} not installed; run: pip install "attnzoo[{extra}]"')

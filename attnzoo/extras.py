"""Optional packages: one way of asking for them, and one message when they are missing."""

from __future__ import annotations

import importlib.util

from attnzoo.errors import MissingExtraError


def require(*modules: str, extra: str | None = "vision") -> None:
    """Raise unless every one of `modules` can be imported.

    Parameters
    ----------
    modules
        Top-level import names, such as ``"yaml"``.
    extra
        The extra of this package that brings them; None for packages that no extra brings, named as they are imported.

    Raises
    ------
    MissingExtraError
        Names what is missing and gives the install line.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        how = install_line(extra) if extra is not None else f"pip install {' '.join(missing)}"
        raise MissingExtraError(f"{', '.join(missing)} not installed; run: {how}")


def install_line(extra: str) -> str:
    """How to install an extra of this package, which is on no index, from the clone that it was installed from."""
    return f"pip install -e '.[{extra}]', in the clone of attnzoo"

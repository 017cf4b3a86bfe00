"""Where kvpress is installed: in an environment of its own, for it pins an old transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

from attnzoo import assets, files
from attnzoo.errors import ConfigError

KVPRESS = "0.5.5"
LAST_WORDS = 2000


def kvpress_python(given: str | None, say: Callable[[str], None]) -> str:
    """Give the interpreter of an environment that holds kvpress in the right version, making one where none is given.

    Raises
    ------
    ConfigError
        If the one given holds no kvpress, or another version.
    AssetError
        If one cannot be made.
    """
    if given is not None:
        version, reason = _kvpress_version(given)
        if version != KVPRESS:
            raise ConfigError(
                f"--python {given}: kvpress {KVPRESS} is needed, but "
                + (f"it holds {version}" if version else f"kvpress cannot be asked for there: {reason}")
                + f'; run there: python -m pip install "kvpress=={KVPRESS}"'
            )
        return given
    home = assets.cache_folder() / "kvpress"
    folder = home / KVPRESS
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    if _kvpress_version(python)[0] == KVPRESS:
        return python
    with files.locked(home):
        say(f"making an environment with kvpress {KVPRESS} in {folder} (about 6 GB, several minutes, once) ...")
        steps = (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"kvpress=={KVPRESS}"],
        )
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True)
            except OSError as error:
                raise assets.AssetError(_no_environment(step, str(error))) from error
            if done.returncode:
                raise assets.AssetError(_no_environment(step, (done.stderr or done.stdout).strip()[-LAST_WORDS:]))
    version, reason = _kvpress_version(python)
    if version != KVPRESS:
        raise assets.AssetError(_no_environment(steps[-1], f"kvpress is {version or 'not there: ' + reason}"))
    return python


def _no_environment(step: Sequence[str], reason: str) -> str:
    return (
        f"no environment with kvpress {KVPRESS} could be made; `{' '.join(step)}` said:\n{reason}\n"
        "What you can do: make one yourself and pass its interpreter with --python."
    )


def _kvpress_version(python: str) -> tuple[str | None, str]:
    """The version of kvpress that an interpreter sees, or None and why not."""
    code = "import importlib.metadata as m; print(m.version('kvpress'))"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["it failed"])[-1]
    return done.stdout.strip(), ""

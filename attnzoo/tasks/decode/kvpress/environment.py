"""Where kvpress is installed: in an environment of its own, for it pins an old transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from attnzoo import assets, files
from attnzoo.errors import ConfigError

KVPRESS = "0.5.5"
LAST_WORDS = 2000


def kvpress_python(given: str | None, make: bool = True) -> str:
    """Give the interpreter of an environment that holds kvpress in the right version, making one where none is given.

    With ``make=False`` none is made yet. Raises `ConfigError` if the one given holds no kvpress, or another version;
    `AssetError` if one cannot be made.
    """
    home = assets.cache_folder() / "kvpress"
    folder = home / KVPRESS
    python = given or str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    version, reason = _output([python, "-I", "-c", "import importlib.metadata as m; print(m.version('kvpress'))"], 60)
    if version == KVPRESS or not (given or make):
        return python
    if given:
        reason = (reason.splitlines() or ["it failed"])[-1]
        why = f"it holds {version}" if version else f"kvpress cannot be asked for there: {reason}"
        raise ConfigError(
            f"python: {given}: kvpress {KVPRESS} is needed, but {why}; run there: "
            f'python -m pip install "kvpress=={KVPRESS}"'
        )
    with files.locked(home):
        told = f"making an environment with kvpress {KVPRESS} in {folder} (about 6 GB, several minutes, once) ..."
        print(told, file=sys.stderr, flush=True)
        for step in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"kvpress=={KVPRESS}"],
            [python, "-I", "-c", f"import importlib.metadata as m; assert m.version('kvpress') == '{KVPRESS}'"],
        ):
            done, reason = _output(step, None)
            if done is None:
                raise assets.AssetError(
                    f"no environment with kvpress {KVPRESS} could be made; `{' '.join(step)}` said:\n{reason}\n"
                    "What you can do: make one yourself and pass its interpreter with --python."
                )
    return python


def _output(command: Sequence[str], timeout: float | None) -> tuple[str | None, str]:
    """What a command prints, or None and why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return None if done.returncode else done.stdout.strip(), (done.stderr or done.stdout).strip()[-LAST_WORDS:]

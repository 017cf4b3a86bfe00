"""C++ for CPUs, compiled when it is first needed and kept in attnzoo's cache folder.

A source needs no header but the standard library's and those beside it, and is called through plain C functions, so
that it is compiled in seconds and knows no version of torch. It shares the threads of torch, whose OpenMP runtime is
loaded already. Where there is no compiler, or it fails, a warning says so once and there is None: the caller has a path
in plain PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from attnzoo import files

COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-predictive-commoning",  # with it g++ carries values from tap to tap and runs out of registers
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
LIMIT_SECONDS = 120
log = logging.getLogger("attnzoo")


@cache
def library(name: str, symbols: tuple[str, ...]) -> ctypes.CDLL | None:
    """Give the library compiled from ``attnzoo/kernels/<name>.cpp``; None where it cannot be had, as a warning says.

    One in the cache that is damaged, that is cannot be loaded or lacks one of `symbols`, is compiled anew.
    """
    path = compiler()
    if path is None:
        log.warning(
            "no C++ compiler (%s): %s is computed by plain PyTorch, slower; install one, such as g++",
            ", ".join(COMPILERS),
            name,
        )
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        target = _target(source, path)
        if target.exists():
            try:
                return _loaded(target, symbols)
            except (OSError, AttributeError) as error:
                log.warning("%s is damaged (%s) and is compiled anew", target, error)
        _compile(source, path, target)
        return _loaded(target, symbols)
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or ""
        log.warning("%s could not be compiled and is computed by plain PyTorch, slower: %s\n%s", name, error, said)
        return None


def compiler() -> str | None:
    """Path of the C++ compiler that is used; None if there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _loaded(path: Path, symbols: tuple[str, ...]) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for symbol in symbols:
        getattr(found, symbol)
    return found


def _target(source: Path, compiler: str) -> Path:
    """Where in the cache the library of `source` for this processor and compiler is."""
    from attnzoo.assets import cache_folder

    key = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.hpp")):
        key.update(header.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS)
    for part in (compiler, version.stdout, *FLAGS, _processor()):
        key.update(part.encode() + b"\0")
    return cache_folder() / "kernels" / f"{source.stem}-{key.hexdigest()[:16]}.so"


def _compile(source: Path, compiler: str, target: Path) -> None:
    """Compile `source` to `target`, whole or not at all."""
    with files.atomic(target, suffix=".so") as part:
        command = [compiler, *FLAGS, str(source), "-o", str(part)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS)
        part.chmod(0o755)  # a cache may be shared


def _processor() -> str:
    """What tells one processor's instructions from another's: a home folder may be shared by both."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    said = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), *sorted(set(said))])

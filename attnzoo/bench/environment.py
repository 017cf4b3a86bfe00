"""Where a measurement is made: versions, the machine and the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from attnzoo.bench.record import Environment
from attnzoo.kernels import depthwise, native, padre

NO_COMPILER = "none: kernels for CPUs are computed by plain PyTorch, slower"
FAILED = ", failed to compile: plain PyTorch, slower"


def environment(device: str, threads: int | None) -> Environment:
    """Describe this process's surroundings for the records."""
    commit, dirty = _commit()
    return Environment(
        attnzoo=_version("attnzoo") or "not installed",
        python=platform.python_version(),
        torch=torch.__version__,
        timm=_version("timm"),
        transformers=_version("transformers"),
        system=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        threads=threads or torch.get_num_threads(),
        commit=commit,
        dirty=dirty,
        compiler="" if device.startswith("cuda") else _compiler(),
    )


def _compiler() -> str:
    """Name the compiler of the kernels for CPUs, which are compiled here if they are not yet, and whether they load."""
    path = native.compiler()
    if path is None:
        return NO_COMPILER
    return Path(path).name + ("" if depthwise.is_compiled() and padre.is_compiled() else FAILED)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    """Give the commit that holds this very file and whether tracked files differ from it; None outside of git."""
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        commit = _git(here.parent, "rev-parse", "HEAD")
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(changed)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()

"""One function in a process of its own, whose crash, hang or death by the system is an answer, not an end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

OnProgress = Callable[[str], None]  # is told in a word how far a measurement is, for the progress bar
Target = Callable[[str, OnProgress], str]

LAST_WORDS = 2000


@dataclass(frozen=True)
class ChildResult:
    """How a child ended, and what its function returned, or for a reader what happened.

    `end` is ``done``, ``timeout``, ``oom`` (killed, and the kernel counted a kill for want of memory), or ``crashed``
    (anything else).
    """

    end: Literal["done", "timeout", "oom", "crashed"]
    answer: str
    message: str


class Isolation:
    """Starts children, one at a time.

    On a CPU they are forked from a server that has imported `preload` and done nothing else, which spares each the
    seconds that imports take; `cuda` children start from nothing, since CUDA does not outlive a fork.
    """

    def __init__(self, preload: Sequence[str] = (), cuda: bool = False) -> None:
        fork = not cuda and "forkserver" in multiprocessing.get_all_start_methods()
        self._context: ForkServerContext | SpawnContext
        if fork:
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(list(preload))
        else:
            self._context = multiprocessing.get_context("spawn")
        self._running: set[BaseProcess] = set()

    def kill(self) -> None:
        """Kill every child that runs; whoever waits for one gets its end."""
        for process in list(self._running):
            process.kill()

    def run(
        self,
        target: Target,
        argument: str,
        timeout: float,
        on_word: OnProgress = lambda word: None,
        environ: Mapping[str, str] | None = None,
    ) -> ChildResult:
        """Call ``target(argument, say)`` in a child and wait for its end.

        `target` is a function of a module, so that the child can import it; each word that it gives to ``say`` reaches
        `on_word`. The child is killed after `timeout` seconds. It sets the variables `environ` before all else.
        """
        kills_before = _memory_kills()
        ours, theirs = self._context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="attnzoo-bench-") as folder:
            said = Path(folder) / "stderr"
            arguments = (target, argument, theirs, str(said), dict(environ or {}))
            process = self._context.Process(target=_main, args=arguments, daemon=True)
            try:
                process.start()
                self._running.add(process)
                theirs.close()
                result, stage = _listen(ours, process.sentinel, timeout, on_word)
            except (OSError, EOFError) as error:  # it died while it was handed its work, as where a module is broken
                result, stage = ChildResult("crashed", "", f"the process did not start: {error!r}"), "start"
            finally:
                if process.pid is not None:  # an interrupt may come while it starts
                    process.kill()
                    process.join()
                self._running.discard(process)
                ours.close()
            if result is not None:
                return result
            code = process.exitcode or 0
            words = said.read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:] if said.exists() else ""
        return _explain_death(code, stage, words, kills_before, _memory_kills())


def _listen(ours: Connection, sentinel: int, timeout: float, on_word: OnProgress) -> tuple[ChildResult | None, str]:
    """Read until the child answers, runs out of time, or dies (None); give also the last word it said."""
    deadline = time.monotonic() + timeout
    stage = "start"
    while True:
        ready = wait([ours, sentinel], timeout=max(0.0, deadline - time.monotonic()))
        if ours in ready:
            try:
                kind, text = ours.recv()
            except (EOFError, OSError):
                return None, stage
            if kind == "answer":
                return ChildResult("done", text, ""), stage
            if kind == "error":
                return ChildResult("crashed", "", text), stage
            stage = text
            on_word(text)
        elif sentinel in ready:
            return None, stage
        elif time.monotonic() >= deadline:
            return ChildResult("timeout", "", f"took longer than {timeout:g} s; last at: {stage}"), stage


def _explain_death(code: int, stage: str, words: str, kills_before: int | None, kills_after: int | None) -> ChildResult:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    message = f"the process ended with {name} at: {stage}"
    if code == -signal.SIGKILL:
        if kills_before is None or kills_after is None:
            message += "; this system does not say whether for want of memory"
        elif kills_after > kills_before:
            return ChildResult("oom", "", f"{message}; the kernel counted a kill for want of memory")
        else:
            message += "; the kernel counted no kill for want of memory"
    return ChildResult("crashed", "", f"{message}\n{words}".strip())


def _memory_kills() -> int | None:
    """Count the kills for want of memory since this machine started, where the kernel says."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def _main(target: Target, argument: str, pipe: Connection, said: str, environ: Mapping[str, str]) -> None:
    """What the child does. Its output goes to a file; it ends when the parent does."""
    os.environ.update(environ)
    try:
        words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    except FileNotFoundError:  # the folder is gone: the parent was interrupted and wants no answer
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(words, stream.fileno())
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        answer = target(argument, lambda word: pipe.send(("word", word)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()[-LAST_WORDS:]))
        return
    pipe.send(("answer", answer))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by type or by PyTorch's words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text


def set_threads(threads: int | None) -> None:
    """Set the threads of this process; None leaves PyTorch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)

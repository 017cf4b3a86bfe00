"""The worker of a row, seen from here: a process that is asked, and killed where it hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.errors import RunError
from attnzoo.tasks.decode.kvpress.config import Side

WORKER = Path(__file__).with_name("worker.py")
LAST_WORDS = 2000
STARTING_SECONDS = 600.0


def worker_command(side: Side, python: str) -> list[str]:
    """How a worker is started: kvpress's side sees nothing of this environment."""
    return [sys.executable, "-P", str(WORKER)] if side == "attnzoo" else [python, "-I", str(WORKER)]


class WorkerProcess:
    """A row in a process of its own, that answers one job at a time.

    Raises
    ------
    RunError
        From any method, if the process dies or takes too long: with its last words.
    """

    def __init__(self, command: Sequence[str], title: str, setup: dict[str, Any]) -> None:
        self.title = title
        handle, said = tempfile.mkstemp(prefix="attnzoo-worker-", suffix=".log")
        self._said = Path(said)
        threads = str(setup["threads"])
        surroundings = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=handle, text=True, env=surroundings
        )
        os.close(handle)
        try:
            self.versions: dict[str, str] = self.ask(setup, STARTING_SECONDS)["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a job and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            self._process.wait()
            words = self._said.read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:] or "(nothing)"
            reason = f"took longer than {timeout:g} s" if late else f"ended with code {self._process.returncode}"
            raise RunError(f"the process of {self.title} {reason}; its last words:\n{words}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.unlink(missing_ok=True)

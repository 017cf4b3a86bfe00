"""Scripts in processes of their own, without the seconds that each would take to import torch, timm and transformers.

A server is forked from pytest once all tests are collected, so it has imported what they import, and before the first
of them runs, so it has nothing of what they do. It forks the processes that tests ask for. What the first seconds of
a real start do is not seen this way: of each script some test starts the real thing.
"""

import importlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import torch

FORK = get_context("fork")
ROOT = Path(__file__).parents[1]


def training():
    """Import what the scripts of classification and benchmarks need, where few tests are run and none does."""
    for name in ("attnzoo.tasks.classify.run", "timm", "transformers.modeling_utils", "accelerate"):
        importlib.import_module(name)


def detection():
    """The same for the scripts of detection."""
    from tests.tasks.detect.runs import prepare

    prepare()


PREPARE = {
    "train/classify.py": training,
    "train/distill.py": training,
    "eval/classify.py": training,
    "eval/bench.py": training,
    "train/detect.py": detection,
    "eval/detect.py": detection,
}


class Server:
    """Starts processes, any number at a time."""

    def __init__(self):
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_serve, args=(theirs, self._pipe))
        self._process.start()
        theirs.close()

    def close(self):
        self._pipe.close()
        self._process.join()

    def start(self, function, *arguments, prepare):
        """Call a function of a module in a new process; give the `Child`. The server itself calls `prepare`, once."""
        return Child(self, self.ask("start", function, arguments, prepare))

    def script(self, path, *words, cwd=ROOT, before=None, **environment):
        """Start a script of this repository; `before` is called first, the environment is changed for it alone."""
        folder = tempfile.TemporaryDirectory()
        places = [Path(folder.name) / name for name in ("out", "err")]
        given = str(ROOT / path), [str(word) for word in words], str(cwd), environment, places, before
        child = self.start(_script, *given, prepare=PREPARE[path])
        child.folder, child.places = folder, places
        return child

    def scripts(self, processes, path, *words, **how):
        """Start a script in several processes that find each other as those of torchrun do."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
        return [self.script(path, *words, **how, **place, **count, **rank) for rank in ranks]

    def ask(self, *question):
        self._pipe.send(question)
        return self._pipe.recv()


class Child:
    """A process that the server forked; the part of `subprocess.Popen` that tests need."""

    def __init__(self, server, pid):
        self._server, self.pid, self.returncode = server, pid, None

    def poll(self):
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask("poll", self.pid)
        return self.returncode

    def is_alive(self):
        return self.poll() is None

    def kill(self):
        """Kill it and wait for its end."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, timeout=250):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"process {self.pid} ran for more than {timeout} s")
            time.sleep(0.01)
        return self.returncode

    def finish(self, timeout=250):
        """Wait for the end of a script; give what `subprocess.run` would."""
        status = self.wait(timeout)
        out, err = (place.read_text(encoding="utf-8") if place.exists() else "" for place in self.places)
        self.folder.cleanup()
        return subprocess.CompletedProcess([], status, out, err)


def _serve(pipe, not_ours):
    not_ours.close()  # or the end of pytest would not be seen
    children, prepared = {}, set()
    while True:
        try:
            what, *rest = pipe.recv()
        except EOFError:
            return
        if what == "start":
            function, arguments, prepare = rest
            if prepare not in prepared:
                prepare()
                prepared.add(prepare)
            process = FORK.Process(target=function, args=arguments)
            process.start()
            children[process.pid] = process
            pipe.send(process.pid)
        else:
            pipe.send(children[rest[0]].exitcode)


def _script(path, words, cwd, environment, places, before):
    """What a child does: all that tells a script of its surroundings is as if it had been started by itself."""
    for place, number, name in zip(places, (1, 2), ("stdout", "stderr"), strict=True):
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
        setattr(
            sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8", write_through=True)
        )
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment})
    torch.set_num_threads(1)
    os.chdir(cwd)
    sys.argv = [path, *words]
    if before is not None:
        before()
    runpy.run_path(path, run_name="__main__")

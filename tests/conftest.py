import gc
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels then run in NumPy

import attnzoo
from attnzoo.registry import unregister_attention
from tests.forked import Server

BENCH = Path(__file__).parent / "bench"

torch.set_num_threads(1)  # the models here are so small that threads cost more than they bring


def pytest_collection_modifyitems(items):
    """`make test` looks for tests that run alone in one folder, so that it need not collect all others again."""
    for item in items:
        if item.get_closest_marker("serial") and not item.path.is_relative_to(BENCH):
            raise pytest.UsageError(f"{item.nodeid} is marked serial: move it to tests/bench")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Keep the garbage collector from reading the million objects of imported libraries again at each collection."""
    gc.collect()
    gc.freeze()


class Zeros:
    """A core that is plainly wrong: whatever still gives the old output never called it."""

    def __call__(self, q, k, v, **options):
        return torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[-1])


@pytest.fixture
def zeros() -> Iterator[str]:
    everything = {"causal", "mask", "cross", "gqa", "widths", "dropout", "softcap"}
    attnzoo.register_attention("zeros", "core", Zeros, capabilities=dict.fromkeys(everything, True))
    yield "zeros"
    unregister_attention("zeros")


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[Server]:
    """Scripts in processes of their own; first of all fixtures, so that it holds nothing of any test."""
    server = Server()
    yield server
    server.close()


# what the tasks ask for, but for detection, whose imports take as long as those of all others
PRELOADS = (
    "attnzoo.tasks.model",
    "attnzoo.tasks.suite",
    "attnzoo.tasks.export",
    "attnzoo.tasks.classify.task",
    "attnzoo.tasks.decode.task",
    "attnzoo.tasks.decode.kvpress.task",
    "timm",
    "transformers.models.llama.modeling_llama",
    "tests.bench.toy",
)


@pytest.fixture(scope="session", autouse=True)
def every_preload() -> Iterator[None]:
    """Let the server that benchmarks fork their children from import what a later one asks for as well.

    Python has one such server in a process, with what was asked for before it started; the children of a later
    benchmark would each take seconds to import what they need, and another server as long to start.
    """
    held: set[str] = set()
    ask = forkserver.set_forkserver_preload

    def ask_for_all(modules: list[str]) -> None:
        if not held.issuperset(modules):
            forkserver._forkserver._stop()  # made for tests
            held.update(modules, PRELOADS)
            ask(sorted(held))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "set_forkserver_preload", ask_for_all)
        yield

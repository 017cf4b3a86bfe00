import json
import platform
import resource
import statistics
from pathlib import Path

import pytest
import torch

from attnzoo.bench import memory
from attnzoo.bench.isolate import Isolation
from attnzoo.bench.memory import map_buffers, peak_memory
from attnzoo.units import MIB

pytestmark = pytest.mark.serial

CPU = torch.device("cpu")


def buffer(megabytes):
    return torch.ones(megabytes * MIB // 4)


def one_buffer():
    return buffer(64).sum()


def two_buffers_in_turn():
    first = buffer(64).sum()
    return first + buffer(64).sum()


def two_buffers_at_once():
    first, second = buffer(64), buffer(64)
    return first.sum() + second.sum()


def kept_by_an_allocator():
    return sum(buffer(megabytes).sum() for megabytes in (10, 11, 12))


RUNS = {run.__name__: run for run in (one_buffer, two_buffers_in_turn, two_buffers_at_once, kept_by_an_allocator)}


def measure(name, say):
    """In a process of its own, as in the benchmark; with a higher peak before, which must be forgotten."""
    map_buffers()
    two_buffers_at_once()
    for _ in range(2):
        RUNS[name]()
    first, peak = peak_memory([two_buffers_at_once, RUNS[name]], CPU)
    assert first.allocator_bytes >= 128 * MIB
    return json.dumps([peak.activation_bytes, peak.allocator_bytes, peak.note])


@pytest.mark.parametrize(
    ("run", "megabytes"),
    [("one_buffer", 64), ("two_buffers_in_turn", 64), ("two_buffers_at_once", 128), ("kept_by_an_allocator", 12)],
)
def test_known_buffers_are_seen_as_what_they_are(run, megabytes):
    result = Isolation(["torch"]).run(measure, run, 120)
    assert result.end == "done", result.message
    resident, allocated, note = json.loads(result.answer)
    assert allocated == pytest.approx(megabytes * MIB, rel=0.001)
    if resident is None:
        assert note
    else:
        assert resident == pytest.approx(megabytes * MIB, rel=0.05)


def faults(which, say):
    """Pages that the kernel hands out for a buffer, in most calls: the heap grows a few times before it has a place."""
    map_buffers()
    getattr(memory, which)()
    given = []
    for _ in range(15):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        one_buffer()
        given.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return str(statistics.median(given))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_all_that_is_freed_is_kept_where_that_is_asked_for():
    given = {}
    for which in ("keep_buffers", "keep_all_buffers"):
        result = Isolation(["torch"]).run(faults, which, 120)
        assert result.end == "done", result.message
        given[which] = int(result.answer) * 4096
    assert given["keep_all_buffers"] < 1 * MIB
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().find("[always]") < 0:
        assert given["keep_buffers"] > 60 * MIB


def test_where_the_peak_cannot_be_reset_there_is_no_figure_but_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    (peak,) = peak_memory([one_buffer], CPU)
    assert peak.activation_bytes is None
    assert "clear_refs" in peak.note
    assert peak.allocator_bytes == pytest.approx(64 * MIB, rel=0.001)


def test_on_another_system_there_is_no_figure_but_a_reason(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    (peak,) = peak_memory([one_buffer], CPU)
    assert peak.activation_bytes is None
    assert "darwin" in peak.note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_a_known_buffer():
    (peak,) = peak_memory([lambda: torch.ones(16 * MIB, device="cuda")], torch.device("cuda"))
    assert peak.activation_bytes == 64 * MIB

import sys

import pytest
import torch

from attnzoo.bench import memory
from attnzoo.bench.memory import peak_memory

MB = 2**20
CPU = torch.device("cpu")


def buffer(megabytes):
    return torch.ones(megabytes * MB // 4)


def one_buffer():
    return buffer(64).sum()


def two_buffers_in_turn():
    first = buffer(64).sum()
    return first + buffer(64).sum()


def two_buffers_at_once():
    first, second = buffer(64), buffer(64)
    return first.sum() + second.sum()


@pytest.mark.parametrize(
    ("run", "megabytes"), [(one_buffer, 64), (two_buffers_in_turn, 64), (two_buffers_at_once, 128)]
)
def test_a_known_buffer_is_seen_as_what_it_is(run, megabytes):
    run()
    peak = peak_memory(run, CPU)
    assert peak.allocator_bytes == pytest.approx(megabytes * MB, rel=0.001)
    if sys.platform.startswith("linux") and peak.activation_bytes is not None:
        assert peak.activation_bytes == pytest.approx(megabytes * MB, rel=0.1)
    else:
        assert peak.note


def test_buffers_that_an_allocator_would_keep_are_not_counted_twice():
    def run():
        for megabytes in (10, 11, 12):
            buffer(megabytes).sum()

    for _ in range(3):
        run()
    assert peak_memory(run, CPU).activation_bytes in (None, pytest.approx(12 * MB, rel=0.1))


def test_an_earlier_higher_peak_is_forgotten():
    two_buffers_at_once()
    assert peak_memory(one_buffer, CPU).activation_bytes in (None, pytest.approx(64 * MB, rel=0.1))


def test_where_the_peak_cannot_be_reset_there_is_no_figure_but_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    peak = peak_memory(one_buffer, CPU)
    assert peak.activation_bytes is None
    assert "clear_refs" in peak.note
    assert peak.allocator_bytes == pytest.approx(64 * MB, rel=0.001)


def test_on_another_system_there_is_no_figure_but_a_reason(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    peak = peak_memory(one_buffer, CPU)
    assert peak.activation_bytes is None
    assert "darwin" in peak.note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_a_known_buffer():
    peak = peak_memory(lambda: torch.ones(16 * MB, device="cuda"), torch.device("cuda"))
    assert peak.activation_bytes == 64 * MB

import os
import subprocess
import sys

import pytest
import torch

from attnzoo.kernels import depthwise_pair, dispatch

WITHOUT = """
import sys
sys.modules["triton"] = None  # an import of it fails, as where it is not installed
import torch, attnzoo
from attnzoo.kernels.dispatch import record_paths
with record_paths() as paths:
    out = attnzoo.create_attention("padre", 8, 1, output="sum")(torch.randn(1, 12, 8), grid=(3, 4))
assert out.shape == (1, 12, 8)
assert {path for _, path in paths} == {"torch"}, paths
"""


def test_without_triton_everything_is_read_and_torch_computes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_gpu_whose_triton_fails_is_told_of_once_and_goes_without(monkeypatch, caplog):
    def broken(*grid):
        raise RuntimeError("no driver")

    real = torch.arange
    monkeypatch.setattr(dispatch, "_probe_kernel", type("Kernel", (), {"__getitem__": lambda self, grid: broken})())
    monkeypatch.setattr(torch, "arange", lambda *args, device=None, **options: real(*args, **options))
    dispatch._probe.cache_clear()
    try:
        assert [dispatch._probe(7), dispatch._probe(7)] == [False, False]
    finally:
        dispatch._probe.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "computed by PyTorch" in caplog.text


def test_a_launch_that_is_captured_does_not_run():
    x = torch.ones(1, 12, 4)
    with dispatch.capture_launches() as launches, dispatch.record_paths() as paths:
        depthwise_pair.depthwise_pair(x, torch.ones(4, 1, 3, 3), grid=(3, 4))
    assert paths["depthwise_pair", "triton"] == 1
    (launch,) = launches
    assert launch.configs() == [c for c in depthwise_pair.CONFIGS if c.kwargs["ROWS"] == 4]
    with dispatch.record_paths() as after:
        depthwise_pair.depthwise_pair(x, torch.ones(4, 1, 3, 3), grid=(3, 4))
    assert dict(after) == {("depthwise_pair", "torch"): 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bands_are_for_half_precision(dtype):
    x = torch.ones(1, 12, 4, dtype=dtype)
    with dispatch.capture_launches() as launches:
        depthwise_pair.depthwise_pair(x, torch.ones(4, 1, 3, 3, dtype=dtype), grid=(3, 4))
    banded = [config.kwargs["BANDED"] for config in launches[0].configs()]
    assert any(banded) == (dtype == torch.float16)

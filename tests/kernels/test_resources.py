"""Every configuration compiles for GPUs that are not here, spills nothing, and multiplies matrices where it says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnzoo.kernels import depthwise_pair, scored
from eval import kernels

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs/records/kernels.jsonl"


@pytest.mark.timeout(600)
def test_kernels_compile_without_a_gpu(tmp_path):
    """In a process of its own, for here kernels are for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "eval/kernels.py", "--output", tmp_path / "rows.jsonl", "--cases", "pair 11x11"]
    command += ["pair of length 11", "weighted sum of 3, many images", "second pass, causal", "one query"]
    command += ["second pass, last 128, head 128"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_whole([json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()])


OPTIONAL = """
import torch
from attnzoo.kernels.depthwise_pair import depthwise_pair
from attnzoo.kernels.dispatch import capture_launches
from attnzoo.kernels.resources import compile_for
x, w, bias = torch.ones(2, 12, 16), torch.ones(16, 1, 3, 3), torch.ones(2, 16)
mask = torch.ones(2, 12, dtype=torch.bool)
leaf = x.clone().requires_grad_()
with capture_launches() as launches:
    depthwise_pair(x, w, grid=(3, 4))
    depthwise_pair(x, w, None, x, grid=(3, 4), mask=mask)
    depthwise_pair(leaf, w, bias, x, w, bias, grid=(3, 4), mask=mask, add=x)
    depthwise_pair(x, w.requires_grad_(), grid=(3, 4), mask=mask).sum().backward()
for launch in launches:
    compile_for(launch, launch.configs()[0], 90)
print(len(launches))
"""


@pytest.mark.timeout(300)
def test_kernels_compile_with_and_without_what_is_optional():
    """Triton compiles another kernel for each argument that is None."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", OPTIONAL], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["5"]


def test_the_committed_table_is_whole():
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    assert_whole(rows)
    assert {row["case"] for row in rows} == set(kernels.CASES)


def assert_whole(rows):
    """Each configuration that may be chosen, for both generations, without a problem."""
    assert kernels.problems(rows) == []
    wanted = {
        "depthwise_pair.forward_kernel": depthwise_pair.CONFIGS,
        "depthwise_pair.weight_kernel": depthwise_pair.WEIGHT_CONFIGS,
        "scored.sums_kernel": scored.CONFIGS,
    }
    for capability in (80, 90):
        own = [row for row in rows if row["capability"] == capability]
        for kernel, configs in wanted.items():
            seen = [row["configuration"] for row in own if row["kernel"] == kernel]
            assert all(kernels.described(config) in seen for config in configs)
        single = (
            "hadamard.forward_kernel",
            "hadamard.backward_kernel",
            "scored.decode_kernel",
            "scored.combine_kernel",
        )
        assert {row["kernel"] for row in own} == {*wanted, *single}


def test_a_spill_and_a_missing_matrix_product_are_problems():
    fine = {
        "kernel": "depthwise_pair.forward_kernel",
        "dtype": "bfloat16",
        "capability": 80,
        "shared_bytes": 166912,
        "spilled_bytes": 0,
        "matrix_products": 0,
        "configuration": {"BANDED": 0},
    }
    assert kernels.problems([fine]) == []
    assert "shared memory" in kernels.problems([{**fine, "shared_bytes": 166913}])[0]
    assert "tensor-core" in kernels.problems([{**fine, "kernel": "scored.decode_kernel"}])[0]
    assert kernels.problems([{**fine, "kernel": "scored.decode_kernel", "dtype": "float32"}]) == []
    assert "spills" in kernels.problems([{**fine, "spilled_bytes": 8}])[0]
    assert "tensor-core" in kernels.problems([{**fine, "configuration": {"BANDED": 1}}])[0]


def test_under_the_interpreter_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().out

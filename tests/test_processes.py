"""Leaving a group of processes."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import gc, pathlib, torch
from attnzoo import processes

def threads():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("pt_gloo") for name in names)

def train():
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    model.itself = [model]
    assert threads()

import sys
gc.disable()
train()
processes.leave()
print(threads(), torch.distributed.is_initialized())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "0 False\n", done.stderr

"""Kernels are tested on the GPU where there is one, and by Triton's interpreter on the CPU elsewhere."""

import pytest
import torch
from triton.runtime import interpreter

from attnzoo.kernels import depthwise_pair, dispatch, hadamard, scored

OPS = (depthwise_pair, hadamard, scored)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PatchedOnce:
    """Triton's interpreter puts NumPy under its language at every call of a device function, one layer on the other.

    Here it does so once for each module, which takes minutes off these tests.
    """

    def __init__(self):
        self.patch, self.patched = interpreter._patch_lang, set()

    def __call__(self, function):
        module = id(function.__globals__)
        if module in self.patched:
            return None  # of calls within a kernel nobody restores anything
        self.patched.add(module)
        scope = self.patch(function)
        restore = scope.restore

        def restore_and_forget():
            restore()
            self.patched.discard(module)

        scope.restore = restore_and_forget
        return scope


@pytest.fixture(scope="session", autouse=DEVICE == "cpu")
def patched_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", PatchedOnce())
        yield


@pytest.fixture
def kernels(monkeypatch):
    """Have the ops take their kernels, with NaN in memory that is not written yet, and record the paths they take."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    if DEVICE == "cpu":
        for module in (dispatch, *OPS):
            monkeypatch.setattr(module, "triton_works", lambda device: True)
    with dispatch.record_paths() as paths:
        yield paths
    torch.use_deterministic_algorithms(False)

"""Peak memory of one call: what the process really held, and what PyTorch's allocator gave out."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the peak resident set ("high water mark") to the present value


@dataclass(frozen=True)
class Peak:
    """Bytes above what was held before the call; None, with the reason in `note`, where it cannot be known."""

    activation_bytes: int | None
    allocator_bytes: int | None
    method: str
    note: str = ""


def peak_memory(run: Callable[[], object], device: torch.device) -> Peak:
    """Measure one call of `run`, which should have been called before, so that nothing is built for the first time.

    The call is made twice on the CPU, once for each figure.
    """
    if device.type == "cuda":
        return _cuda_peak(run, device)
    activation, note = _resident_peak(run)
    allocator = _allocator_peak(run)
    if allocator is None:
        note = "; ".join(filter(None, [note, "this PyTorch's profiler gave no memory events"]))
    return Peak(activation, allocator, "resident set (VmHWM after a reset, less VmRSS before)", note)


def _cuda_peak(run: Callable[[], object], device: torch.device) -> Peak:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Peak(peak, peak, "torch.cuda.max_memory_allocated, less memory_allocated before")


def _resident_peak(run: Callable[[], object]) -> tuple[int | None, str]:
    """Give the rise of the resident set during `run`, or None and why not."""
    if not sys.platform.startswith("linux"):
        run()
        return None, f"no resettable peak of the resident set on {sys.platform}"
    gc.collect()
    _return_free_memory()
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError as error:
        run()
        return None, f"{CLEAR_REFS} cannot be written ({error.strerror}), so the peak cannot be reset"
    before = _status_bytes("VmRSS")
    run()
    return max(_status_bytes("VmHWM") - before, 0), ""


def _return_free_memory() -> None:
    """Ask glibc to hand free heap pages back, lest they hide a new allocation; other C libraries have no such call."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {field}")
    return int(found.group(1)) * 1024


def _allocator_peak(run: Callable[[], object]) -> int | None:
    """Give the exact peak of bytes that PyTorch's CPU allocator gave out during `run`, from the profiler's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    results = getattr(profiled.profiler, "kineto_results", None)
    if results is None:
        return None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak if events else None

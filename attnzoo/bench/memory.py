"""Peak memory of one call: what the process really held, and what PyTorch's allocator gave out."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from attnzoo.bench.measure import Run
from attnzoo.units import MIB

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the peak resident set ("high water mark") to the present value

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # mallopt(3)
OWN_MAPPING_BYTES = 128 * 1024  # glibc's threshold at start
LARGEST_THRESHOLD_BYTES = 32 * MIB  # what glibc's own adjustment goes up to on 64-bit systems
MOST_MAPPINGS = 65536  # glibc's own
NEVER = -1
RESIDENT = "resident set: VmHWM after a reset, less VmRSS before"


@dataclass(frozen=True)
class Peak:
    """Bytes above what was held before the call; None, with the reason in `note`, where it cannot be known."""

    activation_bytes: int | None
    allocator_bytes: int | None
    method: str
    note: str = ""


def map_buffers() -> None:
    """From now on, have glibc give every larger buffer a mapping of its own and take it back when it is freed.

    To be called before the first large buffer. Otherwise freed buffers linger in the heap, more or fewer of them by
    what ran before, and one forward is seen to need 10 to 60 per cent more than it holds. This is a switch of
    the whole process, meant for a child that only measures. Other C libraries have none and are left alone.
    """
    _mallopt({M_MMAP_MAX: MOST_MAPPINGS, M_MMAP_THRESHOLD: OWN_MAPPING_BYTES, M_TRIM_THRESHOLD: OWN_MAPPING_BYTES})


def keep_buffers() -> None:
    """Undo `map_buffers` before timing: glibc keeps as much as its own adjustment would make it keep in the end."""
    _mallopt({M_MMAP_THRESHOLD: LARGEST_THRESHOLD_BYTES, M_TRIM_THRESHOLD: 2 * LARGEST_THRESHOLD_BYTES})


def keep_all_buffers() -> None:
    """Undo `map_buffers` before timing, and have glibc keep all that is freed, as caching allocators do.

    glibc maps a buffer of over 32 MiB again at each call, and the kernel clears it page by page; jemalloc, tcmalloc
    and CUDA's allocator in PyTorch do not.
    """
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER})


def _mallopt(settings: Mapping[int, int]) -> None:
    if (libc := _glibc()) is not None:
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)


def peak_memory(runs: Sequence[Run], device: torch.device, *, warm: bool = False, exact: bool = True) -> list[Peak]:
    """Measure one call of each of `runs`, after one of each that is not measured: a first call builds for later ones.

    On the CPU each is called three times; all resident sets come before the first look at the allocator, since that
    leaves holes in the heap.

    `warm` says whether each was called before, so that the first call of all can be spared. With `exact` the allocator
    is looked at even where the resident set could be measured, which takes another call.
    """
    for run in () if warm else runs:
        run()
    if device.type == "cuda":
        return [_cuda_peak(run, device) for run in runs]
    gc.collect()
    gc.freeze()  # or the search for garbage before each run would go through all that was imported
    try:
        resident = [_resident_peak(run) for run in runs]
    finally:
        gc.unfreeze()
    peaks = []
    for run, (activation, note) in zip(runs, resident, strict=True):
        if activation is not None and not exact:
            peaks.append(Peak(activation, None, RESIDENT, "the allocator's peak was left out"))
            continue
        allocator = _allocator_peak(run)
        if allocator is None:
            note = "; ".join(filter(None, [note, "this PyTorch's profiler gave no memory events"]))
        peaks.append(Peak(activation, allocator, RESIDENT, note))
    return peaks


def _cuda_peak(run: Run, device: torch.device) -> Peak:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Peak(peak, peak, "torch.cuda.max_memory_allocated, less memory_allocated before")


def _resident_peak(run: Run) -> tuple[int | None, str]:
    """Give the rise of the resident set during `run`, or None and why not."""
    if not sys.platform.startswith("linux"):
        run()
        return None, f"no resettable peak of the resident set on {sys.platform}"
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError as error:
        run()
        return None, f"{CLEAR_REFS} cannot be written ({error.strerror}), so the peak cannot be reset"
    before = _status_bytes("VmRSS")
    run()
    return max(_status_bytes("VmHWM") - before, 0), ""


def _glibc() -> ctypes.CDLL | None:
    """Give the GNU C library; None where this Python runs on another."""
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {field}")
    return int(found.group(1)) * 1024


def _allocator_peak(run: Run) -> int | None:
    """Give the exact peak of bytes that PyTorch's CPU allocator gave out during `run`, from the profiler's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
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

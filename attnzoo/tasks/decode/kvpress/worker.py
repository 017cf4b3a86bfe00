"""One row of the comparison with kvpress, in a process of its own; `process` starts it and talks to it.

It reads JSON lines: a setup (which side, which method, which weights), then one job a line (token ids, where the
context ends, how many entries to keep), and answers each with a line. Both sides run this very file, each in its own
environment: the same loading, the same greedy decoding, the same clock, and the cache and memory seen at the same
places. What differs stands in `AttnZoo` and `KVPress`. Nothing of attnzoo is imported on kvpress's side.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PACKAGES = ("torch", "transformers", "attnzoo", "kvpress")
WARM_UP_TOKENS = 64


class AttnZoo:
    """Swap the attention for the whole answer; evict to the budget at the end of the context, as kvpress does."""

    def __init__(self, model: Any, method: dict[str, Any] | None) -> None:
        import attnzoo

        self.zoo, self.model, self.method = attnzoo, model, method

    @contextlib.contextmanager
    def whole_answer(self, keep: int) -> Iterator[None]:
        """Bound the cache to `keep` entries per head."""
        if self.method is None:
            yield
            return
        self.zoo.replace_attention(self.model, self.method["name"], **{"budget": keep, **self.method["options"]})
        try:
            yield
        finally:
            self.zoo.restore_attention(self.model)

    def context_only(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: the swap is there already."""
        return contextlib.nullcontext()

    def settle(self, cache: Any) -> None:
        """Evict what is pending, so that both sides keep the same share."""
        if self.method is not None:
            cache.flush()

    def bytes(self, cache: Any) -> tuple[int, int]:
        """Bytes allocated, and those of keys and values alone."""
        size = self.zoo.kv_bytes(cache)
        return size.allocated, size.entries


class KVPress:
    """Press while the context is read, as kvpress's own pipeline does."""

    def __init__(self, model: Any, method: dict[str, Any] | None) -> None:
        self.model, self.press = model, None
        if method is not None:
            kvpress = importlib.import_module("kvpress")
            ratio = 1 - method["share"]
            self.press = getattr(kvpress, method["press"])(compression_ratio=ratio, **method["options"])
            if method["block_size"] is not None:
                self.press = kvpress.BlockPress(press=self.press, block_size=method["block_size"])

    def whole_answer(self, keep: int) -> contextlib.AbstractContextManager[None]:
        """Nothing: kvpress compresses once."""
        return contextlib.nullcontext()

    def context_only(self) -> contextlib.AbstractContextManager[None]:
        """Compress each layer after its forward."""
        return contextlib.nullcontext() if self.press is None else self.press(self.model)

    def settle(self, cache: Any) -> None:
        """Nothing is pending."""

    def bytes(self, cache: Any) -> tuple[int, int]:
        """Bytes allocated, and those of keys and values alone."""
        held, storages = 0, {}
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                if isinstance(tensor, torch.Tensor):
                    held += tensor.numel() * tensor.element_size()
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values()), held


SIDES: dict[str, type[AttnZoo] | type[KVPress]] = {"attnzoo": AttnZoo, "kvpress": KVPress}


class Worker:
    """A model with one method on it, which answers jobs."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        options = {"dtype": getattr(torch, setup["dtype"]), "attn_implementation": setup["attention"]}
        self.model = AutoModelForCausalLM.from_pretrained(setup["model"], **options).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(setup["model"])
        ends = self.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        with torch.inference_mode():  # the weights are in memory from here on
            self.model(torch.arange(WARM_UP_TOKENS)[None] % self.model.config.vocab_size, use_cache=False)
        self.side = SIDES[setup["side"]](self.model, setup["method"])
        _trim()
        self.resident = _status("VmRSS")

    @torch.inference_mode()
    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Read the context, then the question if it comes after, and answer greedily."""
        ids = torch.tensor([job["ids"]])
        end = job["context"]
        torch.manual_seed(job["seed"])
        _trim()
        can_reset = _reset_peak()
        cache = DynamicCache()
        peak = [0, 0]
        with self.side.whole_answer(job["keep"]), self._watched(cache, peak):
            start = time.perf_counter()
            with self.side.context_only():
                if end < ids.shape[1]:
                    self.model.base_model(input_ids=ids[:, :end], past_key_values=cache, use_cache=True)
                else:
                    logits = self._step(ids, cache, 0)
            self.side.settle(cache)
            kept = [layer.keys.shape[2] for layer in cache.layers]
            if end < ids.shape[1]:
                logits = self._step(ids[:, end:], cache, end)
            token = int(logits.argmax())
            first = time.perf_counter() - start
            said = self._go_on(token, cache, ids.shape[1], job)
        top = _status("VmHWM") if can_reset else None
        return {
            "said": said,
            "text": self.tokenizer.decode(said),
            "first_token_seconds": first,
            "kept": [min(kept), max(kept)],
            "cache_peak_bytes": peak[0],
            "entries_peak_bytes": peak[1],
            "memory_peak_bytes": None if top is None or self.resident is None else max(top - self.resident, 0),
        }

    def _step(self, ids: torch.Tensor, cache: Any, position: int) -> torch.Tensor:
        """Logits after the last of `ids`. Positions are those in the text, whatever the cache has dropped."""
        positions = torch.arange(position, position + ids.shape[1])[None]
        out = self.model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]

    def _go_on(self, token: int, cache: Any, position: int, job: dict[str, Any]) -> list[int]:
        """Decode until an end token, the end of a line, all numbers asked for, or the limit."""
        said: list[int] = []
        while token not in self.ends:
            said.append(token)
            text = self.tokenizer.decode(said)
            numbers = set(re.findall(r"\d+", text))
            complete = not text[-1:].isdigit() and numbers.issuperset(job["answers"])  # a digit could follow a digit
            if complete or len(said) >= job["limit"] or "\n" in text.lstrip():
                break
            token = int(self._step(torch.tensor([[token]]), cache, position).argmax())
            position += 1
        return said

    @contextlib.contextmanager
    def _watched(self, cache: Any, peak: list[int]) -> Iterator[None]:
        """Look at the whole cache after every layer's attention, before any hook of kvpress has made it smaller."""

        def look(*_: Any) -> None:
            peak[:] = map(max, peak, self.side.bytes(cache))

        hooks = [layer.self_attn.register_forward_hook(look) for layer in self.model.base_model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _trim() -> None:
    """Give back what was freed, so that a peak counts only what is in use."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak becomes the present value
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return None if found is None else int(found.group(1)) * 1024


def main() -> None:
    """Answer until the jobs end. Whatever a library prints goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as out:
        os.dup2(2, 1)
        worker = Worker(json.loads(sys.stdin.readline()))
        print(json.dumps({"versions": versions()}), file=out)
        for line in sys.stdin:
            print(json.dumps(worker.answer(json.loads(line))), file=out)


if __name__ == "__main__":
    main()

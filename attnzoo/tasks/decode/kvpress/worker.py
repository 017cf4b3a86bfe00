"""One row of the comparison with kvpress, in a process of its own, which `task` starts.

It reads a job as JSON (which side, which method, which weights, which prompts), and writes lines of JSON: words on how
far it is, and last the answer. Both sides run this very file, each in its own environment: the same loading, the same
greedy decoding, the same gate and clock, and cache and memory seen at the same places. What differs stands in
`AttnZoo` and `KVPress`. Nothing of attnzoo is imported on kvpress's side.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PACKAGES = ("torch", "transformers", "attnzoo", "kvpress")
GATE_CONTEXT, GATE_QUESTION = 48, 8  # tokens
ORACLE = "transformers' own attention without a cache, same weights and tokens, nothing evicted"
Prompt = dict[str, Any]


class AttnZoo:
    """Swap the attention for the whole answer; evict to the budget at the end of the context, as kvpress does."""

    def __init__(self, model: Any, method: dict[str, Any] | None, imports: Sequence[str]) -> None:
        import attnzoo
        from attnzoo.imports import import_modules

        import_modules(imports)
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

    def context(self, read: Callable[[], Any], cache: Any, everything: bool) -> Any:
        """Read the context, then evict what is pending, so that both sides keep the same share."""
        logits = read()
        if self.method is not None:
            cache.flush()
        return logits

    def bytes(self, cache: Any) -> tuple[int, int]:
        """Bytes allocated, and those of keys and values alone."""
        size = self.zoo.kv_bytes(cache)
        return size.allocated, size.entries


class KVPress:
    """Press while the context is read, as kvpress's own pipeline does."""

    def __init__(self, model: Any, method: dict[str, Any] | None, imports: Sequence[str]) -> None:
        self.model, self.method = model, method

    def whole_answer(self, keep: int) -> contextlib.AbstractContextManager[None]:
        """Nothing: kvpress compresses once."""
        return contextlib.nullcontext()

    def context(self, read: Callable[[], Any], cache: Any, everything: bool) -> Any:
        """Read the context while each layer is compressed after its forward; with `everything`, by nothing."""
        if self.method is None:
            return read()
        kvpress = importlib.import_module("kvpress")

        ratio = 0.0 if everything else 1 - self.method["share"]
        name, base = self.method["press"], self.method.get("base")
        press = getattr(kvpress, base or name)(compression_ratio=ratio, **self.method["options"])
        if base is not None:
            press = getattr(kvpress, name)(press=press)
        if self.method["block_size"] is not None:
            press = kvpress.BlockPress(press=press, block_size=self.method["block_size"])
        with press(self.model):
            return read()

    def bytes(self, cache: Any) -> tuple[int, int]:
        """Bytes allocated, and those of keys and values alone."""
        held = [x for layer in cache.layers for x in (layer.keys, layer.values) if isinstance(x, torch.Tensor)]
        return sum(x.untyped_storage().nbytes() for x in held), sum(x.numel() * x.element_size() for x in held)


class Worker:
    """A model with one method on it and, where costs are asked for, the same model without."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        side: Any = {"attnzoo": AttnZoo, "kvpress": KVPress}[job["side"]]
        self.row: Any = side(_load(job, job["attention"]), job["spec"], job["imports"])
        self.dense: Any = side(_load(job, "sdpa"), None, ()) if job["kind"] == "cost" else None
        self.tokenizer = AutoTokenizer.from_pretrained(job["model"])
        ends = self.row.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}

    def answer(self, prompt: Prompt) -> dict[str, Any]:
        """Read the context, then the question if it comes after, and answer greedily."""
        cache, peak, said = DynamicCache(), [0, 0], []

        def look(*_: Any) -> None:
            peak[:] = map(max, peak, self.row.bytes(cache))

        with self.row.whole_answer(prompt["keep"]), _hooked(self.row.model, look):
            kept, logits = self.read(self.row, prompt, cache)
            while (token := int(logits.argmax())) not in self.ends:
                said.append(token)
                text = self.tokenizer.decode(said)
                numbers = set(re.findall(r"\d+", text))
                complete = not text[-1:].isdigit() and numbers.issuperset(prompt["answers"])  # a digit could follow
                if complete or len(said) >= prompt["limit"] or "\n" in text.lstrip():
                    break
                logits = _step(self.row.model, [token], cache, len(prompt["ids"]) + len(said) - 1)
        text = self.tokenizer.decode(said)
        return {"answer": text, "kept": kept, "cache_peak_bytes": peak[0], "entries_peak_bytes": peak[1]}

    def first_token(self, side: Any, prompt: Prompt) -> dict[str, Any]:
        """Time a first token; memory is the peak of the resident set above what it was before."""
        cache = DynamicCache()
        _trim()
        before = _status("VmRSS", reset=True)
        with side.whole_answer(prompt["keep"]):
            start = time.perf_counter()
            kept, _ = self.read(side, prompt, cache)
            seconds, top = time.perf_counter() - start, _status("VmHWM")
        memory = None if top is None or before is None else max(top - before, 0)
        return {"seconds": seconds, "memory": memory, "kept": kept, "cache": side.bytes(cache)}

    def gate(self, prompt: Prompt, tolerance: float) -> dict[str, Any]:
        """Compare every layer's attention, and the last logits, with the dense model's, where nothing is evicted."""
        ids = prompt["ids"][: GATE_CONTEXT + GATE_QUESTION]
        prompt = {**prompt, "ids": ids, "context": GATE_CONTEXT, "keep": prompt["keep"] + len(ids)}
        with _noted(self.dense.model) as oracle:
            last = self.dense.model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        with self.row.whole_answer(prompt["keep"]), _noted(self.row.model) as got:
            _, logits = self.read(self.row, prompt, DynamicCache(), everything=True)
        found = [
            _compared(f"layers.{index}.self_attn", torch.cat(a, dim=1), torch.cat(b, dim=1))
            for index, (a, b) in enumerate(zip(got.values(), oracle.values(), strict=True))
        ]
        part, gate = max([*found, _compared("model output", logits[None], last)], key=lambda one: one[0])
        return {**gate, "oracle": ORACLE, "passed": part <= tolerance, "tolerance": tolerance}

    def read(self, side: Any, prompt: Prompt, cache: Any, everything: bool = False) -> tuple[list[int], torch.Tensor]:
        """Entries per head that layers hold after the context, the least and the most, and the first token's logits."""
        ids, end = prompt["ids"], prompt["context"]
        torch.manual_seed(prompt["seed"])
        logits = side.context(lambda: _step(side.model, ids[:end], cache, 0), cache, everything)
        kept = [layer.keys.shape[2] for layer in cache.layers]
        if end < len(ids):
            logits = _step(side.model, ids[end:], cache, end)
        return [min(kept), max(kept)], logits


def _load(job: dict[str, Any], attention: str) -> Any:
    """Load a model, and run it once, so that its weights are in memory."""
    options = {"dtype": getattr(torch, job["dtype"]), "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(job["model"], **options).eval()
    model(torch.tensor([job["prompts"][0]["ids"][:GATE_CONTEXT]]), use_cache=False)
    return model


def _step(model: Any, ids: list[int], cache: Any, position: int) -> torch.Tensor:
    """Logits after the last of `ids`. Positions are those in the text, whatever the cache has dropped."""
    places = {"position_ids": torch.arange(position, position + len(ids))[None], "past_key_values": cache}
    return model(input_ids=torch.tensor([ids]), **places, use_cache=True, logits_to_keep=1).logits[0, -1]


@contextlib.contextmanager
def _hooked(model: Any, hook: Any) -> Iterator[None]:
    """Call a hook after every layer's attention, before any hook of kvpress has made its cache smaller."""
    hooks = [layer.self_attn.register_forward_hook(hook) for layer in model.base_model.layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextlib.contextmanager
def _noted(model: Any) -> Iterator[dict[Any, list[torch.Tensor]]]:
    """What every layer's attention gave, call by call."""
    found: dict[Any, list[torch.Tensor]] = {}
    with _hooked(model, lambda layer, _, output: found.setdefault(layer, []).append(output[0])):
        yield found


def _compared(at: str, got: torch.Tensor, oracle: torch.Tensor) -> tuple[float, dict[str, Any]]:
    """The largest error as a part of the oracle's largest magnitude, infinite if it is not finite; and both."""
    error, scale = ((x.double()).abs().max().item() for x in (got.double() - oracle.double(), oracle))
    whole = scale > 0 and math.isfinite(error) and math.isfinite(scale)
    figures = {"max_abs_error": error if whole else None, "scale": scale if whole else None}
    return error / scale if whole else math.inf, {"at": at, **figures}


def cost(worker: Worker, job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Gate; then, only if it passed, first tokens of the row and of the dense model in turn, after one of each."""
    prompts = job["prompts"]
    say("gate")
    gate = worker.gate(prompts[0], job["tolerance"])
    found: dict[str, list[Any]] = {"row": [], "dense": []}
    for number, prompt in enumerate([prompts[0], *prompts] if gate["passed"] else ()):
        say(f"time {number} of {len(prompts)}")
        for side in ("row", "dense") if number % 2 else ("dense", "row"):
            found[side].append(worker.first_token(getattr(worker, side), prompt))
    model = worker.dense.model
    return {
        "gate": gate,
        "row": found["row"][1:],
        "dense": found["dense"][1:],
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention_parameters": sum(p.numel() for x in model.base_model.layers for p in x.self_attn.parameters()),
        "shapes": [model.config.hidden_size, model.config.num_attention_heads, len(model.base_model.layers)],
    }


def _trim() -> None:
    """Give back what was freed, so that a peak counts only what is in use."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str, reset: bool = False) -> int | None:
    """Bytes that the system counts, if it does; with `reset` the peak becomes the present value first: proc(5)."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.findall(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)[0]) * 1024
    return None


def _follow(parent: int) -> None:
    """End when whoever asked has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@torch.inference_mode()
def do(job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Answer all prompts, or time a row beside the dense model; and say with which versions."""
    say("load")
    worker = Worker(job)
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    answer: dict[str, Any] = {"versions": {"python": platform.python_version()}}
    answer["versions"] |= {name: found[name] for name in PACKAGES if name in found}
    if job["kind"] == "cost":
        return answer | cost(worker, job, say)
    answer["prompts"] = []
    for number, prompt in enumerate(job["prompts"], start=1):
        say(f"prompt {number} of {len(job['prompts'])}")
        answer["prompts"].append(worker.answer(prompt))
    return answer


def main() -> None:
    """Do a job. Whatever a library prints goes to stderr."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as out:
        os.dup2(2, 1)
        answer = do(json.load(sys.stdin), lambda word: print(json.dumps({"word": word}), file=out))
        print(json.dumps(answer), file=out)


if __name__ == "__main__":
    main()

"""The comparison with kvpress as a task: a cell per row, setting and figure, each run where its library is."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attnzoo import assets
from attnzoo.bench import gate as gates
from attnzoo.bench.cost import ratios_of
from attnzoo.bench.highlights import of_records
from attnzoo.bench.measure import quantiles
from attnzoo.bench.memory import RESIDENT
from attnzoo.bench.record import Cost, Gate, Memory, Shapes, Side
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.processes import refuse_launcher
from attnzoo.tasks.decode import lm
from attnzoo.tasks.decode.cells import contents
from attnzoo.tasks.decode.kvpress.config import Comparison, Row, Setting
from attnzoo.tasks.decode.kvpress.environment import KVPRESS, LAST_WORDS, kvpress_python
from attnzoo.tasks.decode.kvpress.quality import Answered, PassKeys, Record, sections
from attnzoo.tasks.decode.needles import Sample, found, make_samples
from attnzoo.tasks.decode.text import load_text

WORKER = Path(__file__).with_name("worker.py")
STARTING_SECONDS = 600.0


def plan(config: Comparison) -> list[Cell]:
    """Pass keys found by every row, then what it costs; attnzoo's dense model is the baseline."""
    kinds = ("quality", "cost") if config.timed else ("quality",)
    return [_cell(config, row, setting, kind) for kind in kinds for setting in config.settings for row in config.rows]


def _cell(config: Comparison, row: Row, setting: Setting, kind: Any) -> Cell:
    quality, place = kind == "quality", setting.replace("_", " ")
    prompts = config.samples if quality else 2 * config.timed + 2
    keys = {"dtype", "seed", "tokens", "samples", "share", *(() if quality else ("timed", "threads"))}
    ours = row.spec if row.side == "attnzoo" else None
    return Cell(
        part=place,
        kind=kind,
        label=row.label,
        tokens=0 if quality else config.tokens,
        workload="" if quality else place,
        phases=("forward",) if quality else ("prefill",),
        attention=None if ours is None else ours["name"],
        options=(row.spec or {}) if ours is None else ours["options"],
        is_baseline=row.spec is None and row.side == "attnzoo",
        host=f"transformers:{config.model}",
        dtype=config.dtype,
        depends_on={
            "row": row.model_dump(mode="json", exclude={"note"}),
            "kvpress": KVPRESS,
            "setting": setting,
            "model": contents(config.model),
            "text": contents(config.text),
            **config.model_dump(mode="json", include=keys),
        },
        asks={"row": row.model_dump(mode="json"), "setting": setting},
        stage="answer" if quality else "time",
        timeout=STARTING_SECONDS + prompts * config.timeout_seconds,
        threads=config.threads,
        weight=prompts,
    )


def check(config: Comparison) -> None:
    """Check that kvpress is where the config says."""
    refuse_launcher()
    kvpress_python(config.python, make=False)


def prepare(config: Comparison, cells: Sequence[Cell]) -> dict[str, Any]:
    """Find kvpress, and make the prompts once for both sides."""
    if not cells:
        return {}
    text, tokenizer = load_text(config.text), lm.load_tokenizer(config.model)
    count, tokens, seed = config.samples, config.tokens, config.seed
    samples = make_samples(text, tokenizer, kind="single", count=count, tokens=tokens, seed=seed)
    needed = any(cell.asks["row"]["side"] == "kvpress" for cell in cells)
    return {
        "python": kvpress_python(config.python) if needed else "",
        "model": str(assets.model_folder(config.model) or config.model),
        "prompts": [asdict(sample) for sample in samples],
        "limit": lm.ROOM_FOR_WORDS + len(tokenizer(f"{samples[0].answers[0]},", add_special_tokens=False).input_ids),
    }


def measure(config: Comparison, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Have a worker answer all prompts, or time some of them; a row that does not keep its share has failed."""
    row, quality = Row.model_validate(cell.asks["row"]), cell.kind == "quality"
    samples = [Sample(**made) for made in given["prompts"][: None if quality else config.timed]]
    contexts = [x.question_at if cell.asks["setting"] == "question_after" else len(x.ids) for x in samples]
    keeps = [max(1, int(context * config.share)) for context in contexts]
    job = {
        **row.model_dump(mode="json"),
        "kind": cell.kind,
        "imports": config.imports,
        "model": given["model"],
        "dtype": config.dtype,
        "threads": config.threads,
        "tolerance": gates.TOLERANCE[getattr(torch, config.dtype)],
        "prompts": [
            {**asdict(x), "context": context, "keep": keep, "limit": given["limit"], "seed": config.seed + x.index}
            for x, context, keep in zip(samples, contexts, keeps, strict=True)
        ],
    }
    answer = ask([given["python"], "-I"] if row.side == "kvpress" else [sys.executable, "-P"], job, say)
    if "died" in answer:
        return Result(status="failed", message=answer["died"])
    gate = None if quality else Gate.model_validate(answer["gate"])
    versions, theirs = answer["versions"], row.side == "kvpress"
    place = {name: versions[name] for name in ("python", "torch", "transformers") if theirs and name in versions}
    failed = partial(Result, status="failed", gate=gate, environment=place)
    if gate is not None and not gate.passed:
        return failed(message=gates.gate_message("gate", gate))
    told = answer["prompts" if quality else "row"]
    for index, (expected, one) in enumerate(zip(contexts if row.spec is None else keeps, told, strict=True)):
        if any(abs(kept - expected) > 1 for kept in one["kept"]):  # kvpress rounds the share that goes
            kept = f"{one['kept'][0]} to {one['kept'][1]} entries per head of prompt {index}, not {expected}"
            return failed(message=f"it kept {kept}: the two sides cannot be compared")
    if gate is not None:
        return Result(status="ok", gate=gate, environment=place, **_cost(config, answer))
    answered = [
        Answered(
            **one, context_tokens=context, expected=x.answers, hits=found(x.answers, one["answer"]), depth=x.depths[0]
        )
        for one, context, x in zip(told, contexts, samples, strict=True)
    ]
    keys = PassKeys(
        row=row,
        prompts=tuple(answered),
        versions=versions,
        text_sha256=samples[0].text_sha256,
        note=f"{config.samples} prompts of {config.tokens:,} tokens with a pass key in prose ({config.text}), "
        f"{cell.part}; {config.share:.0%} of the cache kept, "
        + (
            f"blocks of {config.block_size}" if config.schedule == "block" else "one eviction at the end of the context"
        ),
    )
    return Result(status="ok", environment=place, quality=keys)


def _cost(config: Comparison, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and costs of a result."""
    dim, heads, depth = answer["shapes"]
    own, dense = (_side(config, answer, answer[side]) for side in ("row", "dense"))
    pairs = zip(answer["row"], answer["dense"], strict=True)
    ratios = ratios_of(own, dense, quantiles([dense["seconds"] / own["seconds"] for own, dense in pairs]))
    return {
        "shapes": Shapes(batch=1, tokens=config.tokens, prefix=0, dim=dim, heads=heads, depth=depth),
        "costs": {"prefill": Cost(candidate=own, baseline=dense, ratios=ratios, uncounted_ops=())},
    }


def _side(config: Comparison, answer: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> Side:
    latency = quantiles([call["seconds"] for call in calls], 1e3)
    allocated, held = (max(call["cache"][index] for call in calls) for index in (0, 1))
    peaks = [call["memory"] for call in calls if call["memory"] is not None]
    return Side(
        latency_ms=latency,
        throughput=config.tokens / (latency.p50 / 1e3),
        flops=None,
        flops_note="not counted",
        parameters=answer["parameters"],
        attention_parameters=answer["attention_parameters"],
        memory=Memory(
            parameter_bytes=answer["parameters"] * getattr(torch, config.dtype).itemsize,
            activation_peak_bytes=max(peaks, default=None),
            allocator_peak_bytes=None,
            cache_held_bytes=held,
            cache_allocated_bytes=allocated,
            method=RESIDENT if peaks else "none",
        ),
    )


def ask(python: Sequence[str], job: Mapping[str, Any], say: OnProgress) -> dict[str, Any]:
    """Give a worker its job and wait for the answer; it ends when this process does."""
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+", errors="replace") as said:
        json.dump(job, asked)
        asked.seek(0)
        answer: dict[str, Any] = {}
        with subprocess.Popen(
            [*python, str(WORKER)], stdin=asked, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process:
            for line in process.stdout or ():
                answer = json.loads(line)
                say(answer.get("word", "done"))
        if process.returncode or "versions" not in answer:
            said.seek(0)
            words = said.read().strip()[-LAST_WORDS:] or "(nothing)"
            return {"died": f"the worker ended with code {process.returncode}; its last words:\n{words}"}
    return answer


TASK = Task(
    name="kvpress",
    ref="attnzoo.tasks.decode.kvpress.task:TASK",
    config=Comparison,
    plan=plan,
    measure=measure,
    prepare=prepare,
    check=check,
    record=Record,
    preload=lambda config: ("attnzoo.tasks.decode.kvpress.task",),
    sections=sections,
    highlights=lambda records: of_records(records, lambda _: "decode"),
    others="eviction policies beside those of kvpress, prompt by prompt",
)

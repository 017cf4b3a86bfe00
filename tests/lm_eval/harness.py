"""The harness on a tiny model, without its own hundreds of tasks."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed; it comes with attnzoo[dev]")

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from attnzoo.lm_eval import register
from tests.tasks.decode import llm


def evaluate(model, arguments, tasks, include, batch_size=3, limit=None):
    """Samples of each task in order, and its results; `include` is the folder of the tasks, or several."""
    register()
    found = simple_evaluate(
        model,
        arguments,
        tasks=tasks,
        task_manager=TaskManager(include_path=include, include_defaults=False),
        batch_size=batch_size,
        limit=limit,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    for samples in found["samples"].values():
        samples.sort(key=lambda sample: sample["doc_id"])
    return found


def says(model, prompt, tokens):
    """What a model says to one prompt, alone."""
    tokenizer = llm.tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=256)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

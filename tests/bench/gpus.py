"""A task whose processes tell which GPUs they see."""

import os
from dataclasses import replace

from attnzoo.bench.task import Result
from tests.bench import toy


def measure(config, cell, given, say):
    """Give the variable as the message."""
    return Result(status="failed", message=os.environ.get("CUDA_VISIBLE_DEVICES", "all"))


def plan(config):
    """Two cells, at a time where there are two sizes."""
    cells = [cell for cell in toy.plan(config) if cell.kind == "quality"]
    return [cell.model_copy(update={"workers": len(config.sizes)}) for cell in cells]


TASK = replace(toy.TASK, ref="tests.bench.gpus:TASK", measure=measure, plan=plan)

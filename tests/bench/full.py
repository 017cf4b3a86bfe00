"""A task that finds no memory."""

from dataclasses import replace

from tests.bench import gpus, toy


def measure(config, cell, given, say):
    """Ask for too much."""
    raise MemoryError("full")


TASK = replace(toy.TASK, ref="tests.bench.full:TASK", measure=measure, plan=gpus.plan)

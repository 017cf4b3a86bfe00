"""Canaries: what must hold of any run, checked on some of its own windows before the rest is run."""

from __future__ import annotations

import math
from collections.abc import Iterable

from attnzoo.errors import RunError
from attnzoo.tasks.decode.config import DENSE, DecodeConfig
from attnzoo.tasks.decode.plan import canary_rows
from attnzoo.tasks.decode.record import CanaryResult, SampleLine

# Largest difference of one token's NLL from dense, in nats, that rounding explains.
ROUNDING = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


class CanaryError(RunError):
    """A run that does not do what any run must: its figures mean nothing."""

    resumes = False  # the canaries that are kept would fail again


def judge(config: DecodeConfig, lines: Iterable[SampleLine]) -> list[CanaryResult]:
    """Judge the canaries.

    Raises
    ------
    CanaryError
        With the name and figures of each that failed.
    """
    found = {(line.label, line.sample): line.nll for line in lines if line.task == "canary"}
    tiny, *full = canary_rows(config)[1:]
    windows = range(config.canary.windows)
    dense = [token for index in windows for token in found[DENSE, index]]
    small = [token for index in windows for token in found[tiny.label, index]]
    worse = (math.fsum(small) - math.fsum(dense)) / len(dense)
    results = [_result(f"{tiny.label}: NLL above dense", worse, config.canary.worse_by, at_least=True)]
    for row in full:
        tokens = [token for index in windows for token in found[row.label, index]]
        most = max(abs(a - b) for a, b in zip(tokens, dense, strict=True))
        name = f"{row.label}: largest difference from dense at one token"
        results.append(_result(name, most, ROUNDING[config.dtype], at_least=False))
    failed = [result for result in results if not result.passed]
    if failed:
        told = [
            f"  {r.name} is {r.figure:.2g}, must be {'at least' if r.at_least else 'at most'} {r.limit:g}"
            for r in failed
        ]
        told.append("fix the problem, then start over with fresh=true")
        raise CanaryError("\n".join(["canaries failed, so this run has no result:", *told]))
    return results


def _result(name: str, figure: float, limit: float, *, at_least: bool) -> CanaryResult:
    passed = figure >= limit if at_least else figure <= limit
    return CanaryResult(name=name, figure=figure, limit=limit, at_least=at_least, passed=passed)

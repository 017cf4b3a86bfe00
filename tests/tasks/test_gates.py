"""No task can write a cost that had no gate, or one that did not pass, in the process that timed it."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from attnzoo.bench.task import Result
from attnzoo.tasks import TASKS, find

RECORDS = Path(__file__).parents[2] / "docs/records"


MS = {"p20": 1.0, "p50": 1.0, "p80": 1.0, "n": 5}
EXPORTED = {
    **dict.fromkeys(("latency_ms", "baseline_ms", "speedup"), MS),
    **dict.fromkeys(("file_bytes", "baseline_file_bytes", "images"), 8),
    "error": 0.1,
    "agreement": 1.0,
}


def row_with_a_cost(name: str) -> dict:
    """A committed row that has a cost and a gate, as one of a task."""
    path = RECORDS / ("gpu_kernels.jsonl" if name == "operations" else "quickstart.jsonl")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    row = {**next(row for row in rows if row["cost"] and row["gate"]), "task": name, "quality": None}
    return {**row, "cost": EXPORTED} if name == "export" else row


@pytest.mark.parametrize("name", TASKS)
def test_a_record_of_any_task_needs_a_gate_that_passed(name):
    task, row = find(name), row_with_a_cost(name)
    kept = task.record.model_validate_json(json.dumps(row))
    assert kept.cost is not None
    failed = {**row["gate"], "passed": False}
    for changes in ({"gate": None}, {"gate": failed}, {"baseline_gate": failed}):
        with pytest.raises(ValidationError, match="a cost needs a gate that passed"):
            task.record.model_validate_json(json.dumps({**row, **changes}))
        if "baseline_gate" not in changes or name != "operations":
            costs = {kept.phase: kept.cost}
            gates = {"gate": row["gate"], "baseline_gate": None, **changes}
            with pytest.raises(ValidationError, match="a cost needs a gate that passed"):
                Result.model_validate({"status": "ok", "costs": costs, **gates})

"""The engine and a task that it knows nothing of: what a new task gets for two files and a line."""

import ast
import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import attnzoo
from attnzoo import tasks
from attnzoo.bench.record import Gate
from attnzoo.bench.task import Result
from attnzoo.errors import ConfigError
from eval import bench
from tests.bench.data import cost, record_data

ROOT = Path(attnzoo.__file__).parent


def written(tmp_path, **changes):
    path = tmp_path / "toy.yaml"
    data = {"task": "tests.bench.toy:TASK", "name": "toy", "output": str(tmp_path / "out"), **changes}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _children_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT.parent))


def test_a_new_task_gets_records_a_table_plots_a_page_resume_and_exit_status(tmp_path, capsys):
    path, records = written(tmp_path), tmp_path / "out" / "records.jsonl"
    assert bench.main([path]) == 0
    told = capsys.readouterr()
    assert "float32" in told.out
    assert "forward, 64 tokens" in told.out
    found = tasks.read_records(records)
    assert [(r.kind, r.label, r.tokens, r.status) for r in found] == [
        ("quality", "float64", 0, "ok"),
        ("quality", "float32", 0, "ok"),
        *(("cost", label, size, "ok") for size in (16, 64) for label in ("float64", "float32")),
    ]
    assert all(r.gate.passed for r in found if r.kind == "cost")
    assert {r.quality.ratio for r in found if r.label == "float64"} == {1.0}
    assert {round(r.quality.ratio, 2) for r in found if r.label == "float32"} == {0.44}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "digits" in page
    before = records.read_bytes()
    assert bench.main([path]) == 0
    assert "6 rows of an earlier run are kept, 0 to measure" in capsys.readouterr().err
    assert records.read_bytes() == before
    assert bench.main(["--report", str(records)]) == 0


def test_a_run_is_added_to_and_what_cannot_stay_is_named(tmp_path, capsys):
    path, records = written(tmp_path, sizes=[16], isolated=False), tmp_path / "out" / "records.jsonl"
    assert bench.main([path]) == 0
    before = tasks.read_records(records)
    capsys.readouterr()
    assert bench.main([path, "sizes=[16, 32]", "--so-far"]) == 0
    assert "forward, 16 tokens" in capsys.readouterr().out
    assert tasks.read_records(records) == before
    assert bench.main([path, "sizes=[16, 32]"]) == 0, "another size keeps the rows that are still valid"
    assert "4 rows of an earlier run are kept, 2 to measure" in capsys.readouterr().err
    after = tasks.read_records(records)
    assert after[: len(before)] == before
    assert bench.main([path, "wrong=true"]) == 2, "other rows of the same names are refused"
    told = capsys.readouterr().err
    assert "the configs differ in sizes, wrong" in told
    assert "fresh=true" in told
    assert tasks.read_records(records) == after
    assert bench.main([path, "wrong=true", "fresh=true"]) == 1
    assert "cost of float32 at 16 tokens: failed: gate did not pass" in capsys.readouterr().err
    assert {r.cost for r in tasks.read_records(records)} == {None}


def test_what_has_not_begun_is_told(tmp_path, capsys):
    assert bench.main([written(tmp_path), "--so-far"]) == 2
    assert "there are no records in" in capsys.readouterr().err


def test_a_task_that_is_not_there_is_told(tmp_path, capsys):
    assert bench.main([written(tmp_path, task="siute")]) == 2
    assert "did you mean 'suite'" in capsys.readouterr().err
    for name in ("no.such.module:TASK", "tests.bench.toy:NOTHING", "tests.bench.toy:plan"):
        with pytest.raises(ConfigError, match="task"):
            tasks.find(name)


def test_no_cost_without_a_gate_that_passed():
    gate = Gate.model_validate(record_data()["gate"])
    failed = gate.model_copy(update={"passed": False})
    figures = {"forward": cost()}
    assert Result(status="ok", gate=gate, baseline_gate=gate, costs=figures).costs
    for gates in ({}, {"baseline_gate": gate}, {"gate": failed}, {"gate": gate, "baseline_gate": failed}):
        with pytest.raises(ValidationError, match="a cost"):
            Result(status="ok", costs=figures, **gates)
    assert json.loads(Result(status="failed", gate=failed).model_dump_json())["costs"] == {}


def imports(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_engine_imports_no_task():
    found = {path.name: [n for n in imports(path) if n.startswith("attnzoo.tasks")] for path in ROOT.glob("bench/*.py")}
    assert len(found) > 15
    assert {name: names for name, names in found.items() if names} == {}


def test_mmdet_is_known_in_one_task_and_one_host_alone():
    known = {ROOT / "hosts/mmdet.py", *ROOT.glob("tasks/detect/*.py")}
    others = set(ROOT.rglob("*.py")) - known
    assert len(known) > 10
    assert len(others) > 100
    of_mmdet = ("mmdet", "mmcv", "mmengine")
    found = {str(path): [n for n in imports(path) if n.partition(".")[0] in of_mmdet] for path in others}
    assert {name: names for name, names in found.items() if names} == {}

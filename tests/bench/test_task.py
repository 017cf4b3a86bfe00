"""The engine and a task that it knows nothing of: what a new task gets for two files and a line."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from rich.console import Console

import attnzoo
from attnzoo import tasks
from attnzoo.bench.highlights import QUALITY, of_records
from attnzoo.bench.page import page_of
from attnzoo.bench.record import Gate
from attnzoo.bench.run import run, visible_gpus
from attnzoo.bench.task import Result
from attnzoo.errors import AssetError, ConfigError, DataError, OptionError, UnsupportedError
from eval import bench
from tests.bench import full, gpus, toy
from tests.bench.data import cost, record_data

ROOT = Path(attnzoo.__file__).parent


def written(tmp_path, **changes):
    path = tmp_path / "toy.yaml"
    data = {"task": "tests.bench.toy:TASK", "name": "toy", "output": str(tmp_path / "out"), **changes}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


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
    assert "the last config there and this one differ in sizes, wrong" in told
    assert "fresh=true" in told
    assert tasks.read_records(records) == after
    assert bench.main([path, "wrong=true", "fresh=true"]) == 1
    assert "cost of float32 at 16 tokens: failed: gate did not pass" in capsys.readouterr().err
    assert {r.cost for r in tasks.read_records(records)} == {None}


def test_so_far_shows_no_row_of_another_config(tmp_path, capsys):
    path, page = written(tmp_path, sizes=[16], isolated=False), tmp_path / "out" / "report.html"
    assert bench.main([path]) == 0
    before = page.read_bytes()
    capsys.readouterr()
    assert bench.main([path, "wrong=true", "--so-far"]) == 0
    told = capsys.readouterr().out
    assert "2 rows of the folder are left out" in told
    assert "forward, 16 tokens" not in told
    assert page.read_bytes() != before
    records = tmp_path / "out" / "records.jsonl"
    records.write_text("".join(line for line in records.open() if '"cost"' in line.split('"label"')[0]))
    assert bench.main([path, "wrong=true", "--so-far"]) == 2
    assert "this config asks for (the last config there and this one differ in wrong); give the key=value of" in (
        capsys.readouterr().err
    )


def test_a_row_that_failed_does_not_keep_a_mended_config_out(tmp_path, capsys):
    path, records = written(tmp_path, sizes=[16], isolated=False, wrong=True), tmp_path / "out" / "records.jsonl"
    assert bench.main([path]) == 1
    assert bench.main([path, "wrong=false"]) == 0
    assert "2 rows of an earlier run are kept, 2 to measure" in capsys.readouterr().err
    assert {record.status for record in tasks.read_records(records)} == {"ok"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnsupportedError, "unsupported"),
        (OptionError, "unsupported"),
        (AssetError, "failed"),
        (DataError, "failed"),
        (ConfigError, "failed"),
    ],
)
def test_only_a_refused_swap_is_unsupported(tmp_path, error, status):
    """A file that is torn, or a hub that does not answer, may do so the next time."""

    def measure(config, cell, given, say):
        raise error("for a reason")

    config = toy.Config.load(written(tmp_path, sizes=[16], isolated=False))
    found = run(replace(toy.TASK, measure=measure), config, "", Console(stderr=True, quiet=True))
    assert {record.status for record in found} == {status}


def test_a_mistake_in_setting_a_row_against_dense_does_not_end_a_run(tmp_path, monkeypatch):
    """Also where dense came later than the row, and in the rows of cost that carry the quality."""
    config = toy.Config.load(written(tmp_path, sizes=[16], isolated=False))
    console = Console(stderr=True, quiet=True)
    late = [True]

    def measure(config, cell, given, say):
        if late[0] and cell.is_baseline and cell.kind == "quality":
            return Result(status="timeout", message="too slow")
        return toy.measure(config, cell, given, say)

    run(replace(toy.TASK, measure=measure), config, "", console)
    late[0] = False

    def against(self, dense):
        raise TypeError("a mistake")

    monkeypatch.setattr(toy.Digits, "against", against)
    found = run(replace(toy.TASK, measure=measure), config, "", console)
    assert len(found) == 4
    (dense,) = (record for record in found if record.label == "float64" and record.kind == "quality")
    assert (dense.status, dense.message) == ("failed", "TypeError: a mistake")
    own = [record for record in found if record.label == "float32"]
    assert {(record.status, record.quality.ratio) for record in own} == {("ok", None)}


def test_a_row_that_cannot_be_set_against_dense_says_why(tmp_path, monkeypatch):
    """Dense stands; the row keeps its figure, without a ratio."""
    config = toy.Config.load(written(tmp_path, sizes=[16], isolated=False))
    console = Console(stderr=True, quiet=True)
    late, original = [True], toy.Digits.against

    def measure(config, cell, given, say):
        if late[0] and cell.is_baseline and cell.kind == "quality":
            return Result(status="timeout", message="too slow")
        return toy.measure(config, cell, given, say)

    def against(self, dense):
        if self.digits != dense.digits:
            raise TypeError("a mistake")
        return original(self, dense)

    monkeypatch.setattr(toy.Digits, "against", against)
    run(replace(toy.TASK, measure=measure), config, "", console)
    late[0] = False
    found = run(replace(toy.TASK, measure=measure), config, "", console)
    assert {record.status for record in found} == {"ok"}
    own = [record for record in found if record.label == "float32"]
    assert all("cannot be set against dense: TypeError: a mistake" in record.quality_note for record in own)
    assert {record.quality.ratio for record in own} == {None}


def test_what_has_not_begun_is_told(tmp_path, capsys):
    assert bench.main([written(tmp_path), "--so-far"]) == 2
    assert "there are no records in" in capsys.readouterr().err


def test_a_task_that_is_not_there_is_told(tmp_path, capsys):
    assert bench.main([written(tmp_path, task="siute")]) == 2
    assert "did you mean 'suite'" in capsys.readouterr().err
    for name in ("no.such.module:TASK", "tests.bench.toy:NOTHING", "tests.bench.toy:plan", ":TASK", ".x:TASK"):
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


def engine(tmp_path, task=toy.TASK, **changes):
    """Run a task here; its records, by kind, label and tokens."""
    config = toy.Config(name="toy", output=tmp_path, **{"sizes": (16,), "isolated": False, **changes})
    return {(r.kind, r.label, r.tokens): r for r in run(task, config, "again")}


def having(**changes):
    """The toy with another `measure` or `plan`."""
    return replace(toy.TASK, **changes)


def test_a_result_says_where_it_was_measured_if_not_here(tmp_path):
    def elsewhere(config, cell, given, say):
        place = {"torch": "1.0", **({"tourch": "1"} if "32" in cell.label else {})}
        return toy.measure(config, cell, given, say).model_copy(update={"environment": place})

    found = engine(tmp_path, having(measure=elsewhere))
    told, wrong = (found["cost", label, 16] for label in ("float64", "float32"))
    assert (told.status, told.environment.torch) == ("ok", "1.0")
    assert told.environment.threads == wrong.environment.threads
    assert (wrong.status, wrong.environment.torch) == ("failed", torch.__version__)
    assert "tourch" in wrong.message


def changed(**changes):
    """The toy's plan with other fields in its cells of cost."""
    return lambda config: [c.model_copy(update=changes) if c.kind == "cost" else c for c in toy.plan(config)]


def test_the_ratio_is_to_the_baseline_of_this_config(tmp_path):
    def renamed(config):
        return [c.model_copy(update={"label": c.label + "!", "depends_on": {"new": c.label}}) for c in toy.plan(config)]

    def halved(config, cell, given, say):
        result = toy.measure(config, cell, given, say)
        return (
            result
            if result.quality is None or "64" not in cell.label
            else Result(status="ok", quality=result.quality.model_copy(update={"digits": result.quality.digits / 2}))
        )

    first = engine(tmp_path)
    second = engine(tmp_path, having(plan=renamed, measure=halved))
    assert second["quality", "float32!", 0].quality.ratio == pytest.approx(
        2 * first["quality", "float32", 0].quality.ratio
    )
    assert set(second) == {(kind, label + "!", tokens) for kind, label, tokens in first}, (
        "rows not asked for are left out"
    )


def test_a_baseline_without_quality_bars_what_was_kept_too(tmp_path):
    def broken(config, cell, given, say):
        if cell.kind == "quality" and cell.is_baseline:
            return Result(status="failed", message="the canary lives")
        return toy.measure(config, cell, given, say)

    def costs(config):
        return [c for c in changed(needs_baseline=True)(config) if c.kind == "cost"]

    assert {r.status for r in engine(tmp_path, having(plan=costs)).values()} == {"ok"}
    barred = engine(tmp_path, having(plan=changed(needs_baseline=True), measure=broken))
    assert {r.status for r in barred.values()} == {"failed"}
    assert {(r.cost, r.quality) for r in barred.values()} == {(None, None)}
    lines = (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 2 + 3, "costs, qualities, and those of them that no longer count, each once"
    mended = engine(tmp_path, having(plan=changed(needs_baseline=True)))
    assert {r.status for r in mended.values()} == {"ok"}, "failed rows are tried again"


def no_gate(result):
    return result.model_copy(update={"gate": None})


def no_cost(result):
    return Result(status="ok")


def other_phase(result):
    return Result(status="ok", gate=result.gate, costs={"training": result.costs["forward"]})


def other_shape(result):
    return Result(status="ok", gate=result.gate, costs={"forward": {"candidate": 1}})


def raising(result):
    raise KeyError("a mistake of the task's")


@pytest.mark.parametrize("spoil", [no_gate, no_cost, other_phase, other_shape, raising])
def test_a_mistake_of_the_task_is_a_failed_row_and_never_an_ok_one(tmp_path, spoil):
    def measure(config, cell, given, say):
        result = toy.measure(config, cell, given, say)
        return spoil(result) if (cell.kind, cell.label) == ("cost", "float32") else result

    found = engine(tmp_path, having(measure=measure))
    row = found.pop(("cost", "float32", 16))
    assert (row.status, row.cost) == ("failed", None)
    assert row.message
    assert {r.status for r in found.values()} == {"ok"}


def test_what_changed_besides_the_config_is_not_kept(tmp_path):
    """A record's key is what was measured: a text of the same name may hold something else now."""
    engine(tmp_path)
    with pytest.raises(ConfigError, match=r"float64 was measured when a file that it names held something else.*fresh"):
        engine(tmp_path, having(plan=changed(depends_on={"text": "another"})))
    engine(tmp_path, having(plan=changed(depends_on={"text": "another"})), fresh=True)


def test_two_rows_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="plans two rows 'float64'"):
        engine(tmp_path, having(plan=lambda config: [*toy.plan(config), toy.plan(config)[0]]))


def test_a_task_beside_the_config_is_found_and_must_call_itself_so(tmp_path, monkeypatch, capsys):
    source = Path(toy.__file__).read_text(encoding="utf-8").replace("tests.bench.toy", "beside_the_config")
    (tmp_path / "beside_the_config.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert bench.main([written(tmp_path, task="beside_the_config:TASK", sizes=[16], isolated=False)]) == 0
    assert "float32" in capsys.readouterr().out
    (tmp_path / "misnamed.py").write_text("from tests.bench.toy import TASK\n", encoding="utf-8")
    assert bench.main([written(tmp_path, task="misnamed:TASK")]) == 2
    assert "calls itself 'tests.bench.toy:TASK'" in capsys.readouterr().err


def test_threads_are_set_before_anything_is_measured(tmp_path):
    seen = []
    task = having(prepare=lambda config, cells: seen.append(torch.get_num_threads()) or {})
    before = torch.get_num_threads()
    try:
        engine(tmp_path, task, threads=before + 1)
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]


def test_what_has_columns_of_its_own_is_refused_a_readme_before_any_work(tmp_path, capsys):
    data = {"task": "operations", "name": "x", "operations": [{"op": "chain"}], "output": str(tmp_path / "out")}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert bench.main([str(tmp_path / "x.yaml"), "--readme", "README.md"]) == 2
    assert "operations has its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    del data["task"]
    (tmp_path / "y.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert bench.main([str(tmp_path / "y.yaml")]) == 2
    assert "add the line task: operations" in capsys.readouterr().err


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


def with_workloads(**changes):
    """The toy's plan, its quality measured twice: under no workload, the baseline's in a stage before, and another."""

    def plan(config):
        cells = []
        for cell in toy.plan(config):
            stage = "first" if cell.kind == "quality" and cell.is_baseline else "then"
            cells.append(cell.model_copy(update={"stage": stage, **changes}))
            if cell.kind == "quality":
                cells.append(cell.model_copy(update={"stage": "then", "workload": "halved", **changes}))
        return cells

    return plan


def test_the_quality_of_several_workloads_is_set_against_dense_each_in_its_own(tmp_path):
    def measure(config, cell, given, say):
        result = toy.measure(config, cell, given, say)
        if cell.workload != "halved" or not cell.is_baseline:
            return result
        return Result(
            status="ok", quality=result.quality.model_copy(update={"digits": result.quality.digits / 2, "note": "half"})
        )

    task = having(plan=with_workloads(), measure=measure)
    config = toy.Config(name="toy", output=tmp_path, sizes=(16,), isolated=False)
    records = run(task, config, "again")
    assert len(records) == 2 + 2 + 2
    found = {(r.kind, r.label, r.workload): r.quality.ratio for r in records}
    assert found["quality", "float32", "halved"] == pytest.approx(2 * found["quality", "float32", ""])
    assert found["quality", "float64", "halved"] == 1
    assert found["cost", "float32", ""] == found["quality", "float32", ""]
    page = page_of(task, records)
    assert page.count("<th>digits</th>") == 2, "side by side in one table"
    assert "by its eps. halved: half." in page
    named = [r.model_copy(update={"attention": None if r.is_baseline else "padre"}) for r in records]
    (half,) = (one for one in of_records(named, lambda record: "toy") if one.workload.startswith("halved: "))
    assert half.figures[QUALITY].value == found["quality", "float32", "halved"]


def test_nothing_is_measured_that_means_nothing_without_the_baseline(tmp_path):
    measured = []

    def broken(config, cell, given, say):
        measured.append((cell.kind, cell.label, cell.workload))
        return Result(status="failed", message="the canary lives")

    found = engine(tmp_path, having(plan=with_workloads(needs_baseline=True), measure=broken))
    assert measured == [("quality", "float64", "")]
    assert {r.status for r in found.values()} == {"failed"}
    assert all("the canary lives" in r.message for r in found.values())


def test_cells_that_are_measured_at_a_time_see_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("attnzoo.bench.run.visible_gpus", lambda device: ["3", "GPU-5"])
    found = engine(tmp_path / "two", gpus.TASK, isolated=True, sizes=(16, 64))
    assert {r.message for r in found.values()} == {"3", "GPU-5"}
    found = engine(tmp_path / "one", gpus.TASK, isolated=True)
    assert {r.message for r in found.values()} == {"all"}, "one after another all see what this process sees"


def test_memory_that_other_rows_took_is_no_result(tmp_path):
    """A row that had no memory beside others is measured again by a resumed run; one that had it to itself is not."""
    found = engine(tmp_path / "two", full.TASK, isolated=True, sizes=(16, 64))
    assert {record.status for record in found.values()} == {"failed"}
    assert all("try fewer workers: full" in record.message for record in found.values())
    alone = engine(tmp_path / "one", full.TASK, isolated=True)
    assert {record.status for record in alone.values()} == {"oom"}


def test_the_gpus_that_are_shared_out_are_those_that_this_process_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert visible_gpus("cuda") == ["4", "7"]
    assert visible_gpus("cuda:1") == visible_gpus("cpu") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus("cuda") == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert visible_gpus("cuda") == []

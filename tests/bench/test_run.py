"""End to end, on a host of one layer and 16 tokens."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import attnzoo
from attnzoo.bench.record import RECORDS_FILE
from attnzoo.bench.run import run
from attnzoo.bench.work import Job, work
from attnzoo.errors import ConfigError
from attnzoo.registry import unregister_attention
from attnzoo.tasks import read_records
from attnzoo.tasks.suite import TASK, measure, plan, validate_config
from tests.bench.data import cost_in

SCRIPT = Path(__file__).parents[2] / "eval" / "bench.py"
HOST = {"patch_size": 4, "options": {"depth": 1, "embed_dim": 16, "num_heads": 2}}
PADRE = {"name": "padre", "options": {"degree": 2, "kernel_size": 3}}
COMMAND = "python eval/bench.py tiny.yaml"


def tiny(folder, **changes):
    data = {
        "name": "tiny",
        "threads": 1,
        "model": HOST,
        "attentions": ["flash", PADRE],
        "cost": {"tokens": [16], "repeats": 3, "min_seconds": 0},
        "output": str(folder),
    }
    return {**data, **changes}


def outcome_of(name, **changes):
    config = validate_config(tiny("unused", attentions=[name] if isinstance(name, (str, dict)) else name, **changes))
    return measure(config, plan(config)[1], {}, lambda stage: None)


@pytest.fixture
def own_attention():
    """Register an attention for one test."""
    names = []

    def register(kind, cls):
        attnzoo.register_attention("its_own", kind, cls, capabilities={"grid": kind == "mixer"})
        names.append("its_own")
        return "its_own"

    yield register
    for name in names:
        unregister_attention(name)


def test_a_whole_run_with_quality_and_its_reports(tmp_path, forked):
    quality = {"recipe": {"epochs": 2, "warmup_epochs": 1, "batch": 128}, "train_images": 256}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(tmp_path / "out", quality=quality)))
    command = [sys.executable, str(SCRIPT), "tiny.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "16 tokens" in done.stdout
    records = read_records(tmp_path / "out" / RECORDS_FILE)
    assert [(r.kind, r.label) for r in records if r.kind == "cost"] == [
        ("cost", "dense"),
        ("cost", "flash"),
        ("cost", "padre degree=2 kernel_size=3"),
    ]
    assert {r.status for r in records} == {"ok"}
    for record in records:
        assert record.command == "python eval/bench.py tiny.yaml"
        assert record.quality.ratio is not None
        if record.kind == "cost":
            assert record.gate.passed
            assert record.baseline_gate.passed
            assert record.cost.candidate.latency_ms.n >= 3
            assert record.cost.candidate.flops > 0
            assert record.shapes.model_dump() == {
                "batch": 1,
                "tokens": 16,
                "prefix": 1,
                "dim": 16,
                "heads": 2,
                "depth": 1,
            }
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3  # of one size there is no line to draw
    again = forked.script("eval/bench.py", "tiny.yaml", cwd=tmp_path).finish()
    assert again.returncode == 0, again.stderr
    assert "6 rows of an earlier run are kept, 0 to measure" in again.stderr
    assert read_records(tmp_path / "out" / RECORDS_FILE) == records


def test_a_run_killed_in_the_middle_goes_on_without_measuring_twice(tmp_path, forked):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(tmp_path / "out")))
    path = tmp_path / "out" / RECORDS_FILE
    runner = forked.script("eval/bench.py", tmp_path / "tiny.yaml", "cost.min_seconds=2")
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    runner.kill()
    kept = read_records(path)
    assert 1 <= len(kept) < 3
    with path.open("ab") as handle:
        handle.write(b'{"schema_version": 1, "torn')
    config = validate_config(tiny(tmp_path / "out", cost={"tokens": [16], "repeats": 3, "min_seconds": 2}))
    with pytest.warns(UserWarning, match="torn last line"):
        records = run(TASK, config, COMMAND)
    assert len(records) == 3
    assert records[: len(kept)] == kept, "rows that were done are the very same"


def measures(process):
    """Whether a child lives and is no tracker of resources; children of a running process come and go."""
    import psutil

    try:
        return "tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_the_children_of_a_killed_run_end_too(tmp_path, forked):
    import psutil

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(tmp_path / "out")))
    runner = forked.script("eval/bench.py", tmp_path / "tiny.yaml", "cost.min_seconds=30")
    deadline = time.monotonic() + 120
    family = []
    while len(family) < 2 and time.monotonic() < deadline:  # the server that forks, and the child that measures
        time.sleep(0.2)
        family = [child for child in psutil.Process(runner.pid).children(recursive=True) if measures(child)]
    assert len(family) >= 2
    runner.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


@pytest.mark.compat
def test_rows_that_cannot_be_measured_have_a_status_and_the_run_goes_on(tmp_path):
    config = validate_config(
        tiny(
            tmp_path,
            attentions=["sdpa"],
            cost={"tokens": [16, 64], "batch": {16: 10**9, 64: 1}, "repeats": 3, "min_seconds": 0},
        )
    )
    by_key = {(r.label, r.tokens): r for r in run(TASK, config, COMMAND)}
    assert by_key["sdpa", 16].status == "oom"
    assert by_key["sdpa", 16].cost is None
    assert "allocate" in by_key["sdpa", 16].message
    assert by_key["sdpa", 64].status == "ok"


def test_a_row_that_takes_too_long_is_a_timeout_and_is_tried_again(tmp_path):
    config = validate_config(
        tiny(tmp_path, attentions=["sdpa"], cost={"tokens": [16], "min_seconds": 60, "timeout_seconds": 2})
    )
    assert {r.status for r in run(TASK, config, COMMAND)} == {"timeout"}
    assert len((tmp_path / RECORDS_FILE).read_text().splitlines()) == 2
    run(TASK, config, COMMAND)
    assert len((tmp_path / RECORDS_FILE).read_text().splitlines()) == 4


def test_a_core_that_is_wrong_is_not_timed(own_attention):
    class Zeros:
        def __call__(self, q, k, v, **options):
            return torch.zeros_like(q)

    outcome = outcome_of(own_attention("core", Zeros))
    assert outcome.status == "failed"
    assert not outcome.costs
    assert not outcome.gate.passed
    assert outcome.gate.max_abs_error > 0
    assert outcome.baseline_gate.passed
    assert "nothing was timed" in outcome.message


def test_a_mixer_that_is_not_its_paper_is_not_timed(own_attention):
    class Wrong(nn.Module):
        def __init__(self, dim, num_heads):
            super().__init__()

        def forward(self, x, grid=None, prefix=0, mask=None):
            return x

        def reference(self, x, grid=None, prefix=0, mask=None):
            return 2 * x

    outcome = outcome_of(own_attention("mixer", Wrong))
    assert (outcome.status, outcome.costs) == ("failed", {})


def test_flash_must_have_run_a_flash_operator(monkeypatch):
    from attnzoo.tasks.classify import cost as worker

    monkeypatch.setattr(worker, "MUST_RUN", {"sdpa": "no_such_operator"})
    outcome = outcome_of("sdpa")
    assert outcome.status == "failed"
    assert "no operator with 'no_such_operator'" in outcome.gate.detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softmax", "sdpa", "flash", PADRE], ids=str)
def test_every_kind_of_gate_passes_in_every_dtype(name, dtype):
    outcome = outcome_of(name, cost={"tokens": [16], "repeats": 3, "min_seconds": 0, "dtype": dtype, "batch": 2})
    assert outcome.status == "ok", outcome.message
    assert outcome.gate.passed
    assert cost_in(outcome).ratios.speedup.n == cost_in(outcome).candidate.latency_ms.n


def test_a_model_that_cannot_be_built_is_a_failed_row_with_a_reason():
    config = validate_config(tiny("unused", model={"model": "resnet18", "patch_size": 4}))
    cell = plan(config)[1]
    job = Job(task=TASK.ref, config=config.model_dump_json(), cell=cell, given={})
    answer = json.loads(work(job.model_dump_json(), lambda stage: None))
    assert answer["status"] == "failed"
    assert answer["message"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"name": "vit_tinny_patch16_224"}}, r"model\.name: .*did you mean .*vit_tiny_patch16_224"),
        ({"model": {"name": "vit_tiny_patch16_224", "options": {"depht": 2}}}, r"model: .*depht"),
        ({"model": {"name": "resnet18", "patch_size": 4}}, r"model: .*resnet18"),
        ({"quality": {"model": {"patch_size": 3}}}, r"quality\.model\.patch_size: 3 does not divide the 8 pixels"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "device: 'cuda' asked for")]),
    ],
)
def test_what_is_not_here_is_told_before_any_work(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        run(TASK, validate_config(tiny(tmp_path, **changes)), COMMAND)


def test_a_host_without_attention_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("attnzoo.tasks.classify.cells.attention_paths", lambda model: [])
    with pytest.raises(ConfigError, match="has no attention layer that attnzoo can swap"):
        run(TASK, validate_config(tiny(tmp_path)), COMMAND)


def test_the_plan_measures_quality_first_and_the_baseline_first_of_all(tmp_path):
    rows = plan(validate_config(tiny(tmp_path, quality={})))
    labels = ("dense", "flash", "padre degree=2 kernel_size=3")
    assert [row.label for row in rows] == 2 * [*labels]
    assert [row.kind for row in rows] == 3 * ["quality"] + 3 * ["cost"]


def test_the_command_line_refuses_with_the_reason_and_no_traceback(tmp_path, forked):
    (tmp_path / "bad.yaml").write_text("name: x\nattentions: [sofmax]\n")
    done = forked.script("eval/bench.py", tmp_path / "bad.yaml").finish()
    assert done.returncode == 2
    assert "'softmax'" in done.stderr
    assert "Traceback" not in done.stderr

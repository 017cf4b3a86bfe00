"""The benchmark of single operations, small and on the CPU; and the config that is meant for a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnzoo.bench.page import page_of
from attnzoo.bench.run import run as engine
from attnzoo.errors import ConfigError
from attnzoo.tasks import read_records
from attnzoo.tasks.operations import cases, run
from attnzoo.tasks.operations.config import OperationsConfig, load_config
from attnzoo.tasks.operations.report import results_table, speed_plot, verdict
from attnzoo.tasks.operations.task import TASK
from eval import bench

GPU = Path(__file__).parents[3] / "configs/bench/gpu_kernels.yaml"
SMALL = {
    "task": "operations",
    "name": "small",
    "threads": 1,
    "dtype": "float32",
    "width": 8,
    "heads": 2,
    "tokens": 32,
    "operations": [
        {"op": "pair", "grid": 4, "kernel": 3},
        {"op": "pair", "grid": 4, "kernel": 3, "backward": True},
        {"op": "chain"},
        {"op": "chain", "plain": 1, "weighted": True, "backward": True},
        {"op": "module", "tokens": 16},
        {"op": "module", "tokens": 16, "beside": "unfused"},
        {"op": "scored", "keys": 16},
        {"op": "scored", "keys": 16, "window": 3},
        {"op": "scored", "keys": 16, "decode": True, "kv_heads": 1},
    ],
    "compiled": False,
    "spread_bytes": 5000,
    "repeats": 3,
    "min_seconds": 0,
}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setattr(run, "COPIED_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(run, "MULTIPLIED", {"cpu": 64})


def written(tmp_path, **changes):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SMALL, "output": str(tmp_path / "out"), **changes}))
    return path


def test_a_run_from_config_to_page(tmp_path, capsys):
    path = written(tmp_path)
    assert bench.main([str(path)]) == 0
    records = read_records(tmp_path / "out/records.jsonl")
    assert [r.status for r in records] == ["ok"] * 9, [r.message for r in records]
    for record in records:
        assert record.gate.passed
        assert record.cost.sets > 1
        assert record.cost.latency_ms.n >= 3
        assert record.cost.fastest in {rival.name for rival in record.cost.rivals if rival.latency_ms}
        both = record.options.get("backward", False)
        assert (record.cost.share_of_bandwidth is None) == both
    assert records[0].backends == ("depthwise_pair: torch",)
    assert records[6].backends == ("scored_attention: chunks",)
    assert {r.name: bool(r.latency_ms) for r in records[4].cost.rivals} == {
        "timm, flash": True,
        "timm, cudnn": False,
        "timm, efficient": False,
    }
    assert "p20" not in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text()
    assert all(record.label in page for record in records)
    assert "<svg" in page
    before = (tmp_path / "out/records.jsonl").read_bytes()
    assert bench.main([str(path)]) == 0  # all is kept
    assert bench.main(["--report", str(tmp_path / "out/records.jsonl")]) == 0
    assert (tmp_path / "out/records.jsonl").read_bytes() == before
    assert results_table(records).markdown().count("\n") == 10
    assert bench.main([str(path), "repeats=4"]) == 2  # records of another config
    assert "fresh=true" in capsys.readouterr().err
    assert bench.main(["--report", str(tmp_path / "out/records.jsonl"), "--readme", "README.md"]) == 2


@pytest.mark.parametrize("kept", [slice(None), slice(3)])
def test_the_page_says_how_many_are_faster_than_their_fastest_rival(kept):
    records = read_records(GPU.parents[2] / "docs/records/gpu_kernels.jsonl")[kept]
    spreads = [record.cost.speedup for record in records if record.cost.speedup is not None]
    faster, slower = sum(one.p20 > 1.01 for one in spreads), sum(one.p80 < 0.99 for one in spreads)
    counted = f"{faster or 'none'} faster, {slower or 'none'} slower."
    assert f"Of {len(spreads)} operations beside their fastest rival, {counted}" in page_of(TASK, records)
    assert verdict([record.model_copy(update={"cost": None}) for record in records]) == ""
    seldom = spreads[0].model_copy(update={"n": 4})
    cost = records[0].cost.model_copy(update={"speedup": seldom})
    assert verdict([records[0].model_copy(update={"cost": cost})]) == (
        "Of 1 operations beside their fastest rival, none faster, none slower, 1 timed too few times to tell."
    )


def test_counts_of_bytes_and_operations():
    config = OperationsConfig.model_validate(SMALL)
    pair, chain, scored = (cases.work(config, config.operations[i]) for i in (0, 2, 6))
    tokens = 2 * 16 * 8  # two images of 16 tokens of width 8
    assert pair.bytes == 4 * (3 * tokens + 2 * (8 * 9 + 8))
    assert pair.flops == tokens * (2 * 9 * 2 + 1)
    assert chain.bytes == 4 * 3 * 32 * 8
    assert chain.flops == 32 * 8
    assert scored.bytes == 4 * 4 * tokens + 2 * 4 * 2 * 2 * 16
    assert scored.flops == (4 + 2) * (16 * 17 // 2) * tokens // 16  # scores and outputs, and the scores again


def test_a_wrong_operation_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "depthwise_pair", lambda x, *rest, grid: x)
    assert bench.main([str(written(tmp_path, operations=SMALL["operations"][:1]))]) == 1
    (record,) = read_records(tmp_path / "out/records.jsonl")
    assert record.status == "failed"
    assert not record.gate.passed
    assert record.cost is None
    page = (tmp_path / "out/report.html").read_text()
    assert "<svg" not in page
    assert "did not pass" in page


def test_an_output_that_is_wrong_only_where_values_are_small_does_not_pass():
    """Averages over thousands of keys are a hundredth of the first ones."""
    config = OperationsConfig.model_validate({**SMALL, "heads": 1, "operations": [{"op": "scored", "keys": 4096}]})
    task = cases.work(config, config.operations[0])
    inputs = [torch.randn(shape) for shape, _ in task.shapes]
    assert run._gate(task, inputs)[0].passed

    def cut(q, k, v):
        out, sums, last = task.run(q, k, v)
        out[:, :, 3600:] = 0
        return out, sums, last

    gate, _ = run._gate(replace(task, run=cut), [x.bfloat16() for x in inputs])
    assert not gate.passed
    assert "last eighth" in gate.at


def test_a_case_that_breaks_does_not_end_the_run(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("no such instruction")

    monkeypatch.setattr(cases, "hadamard_chain", broken)
    bench.main([str(written(tmp_path, operations=SMALL["operations"][1:4]))])
    records = read_records(tmp_path / "out/records.jsonl")
    assert [r.status for r in records] == ["ok", "failed", "failed"]
    assert records[1].message == "AssertionError: no such instruction"


def test_compiled_rivals_are_compiled_for_the_shapes_they_are_timed_on(tmp_path, monkeypatch):
    made = []

    def compiler(graph, inputs):
        made.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=compiler, **options))
    pairs = [{"op": "pair", "grid": grid, "kernel": 3} for grid in (2, 3, 4, 5)]
    bench.main([str(written(tmp_path, operations=pairs, compiled=True))])
    records = read_records(tmp_path / "out/records.jsonl")
    assert all(len([rival for rival in record.cost.rivals if rival.latency_ms]) == 4 for record in records)
    assert len(made) == 8
    assert all(isinstance(n, int) for shapes in made for shape in shapes for n in shape)


def test_what_runs_out_of_memory_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run, "_times", full)
    bench.main([str(written(tmp_path, operations=SMALL["operations"][:1]))])
    (record,) = read_records(tmp_path / "out/records.jsonl")
    assert (record.status, record.cost) == ("oom", None)
    assert speed_plot([record]) == ""


def test_the_config_for_a_gpu():
    config = load_config(GPU)
    assert config.device == "cuda"
    assert {case.op for case in config.operations} == {"pair", "chain", "module", "scored"}
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            engine(TASK, config, "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operations": []}, "operations"),
        ({"operations": [{"op": "pear", "grid": 4}]}, "operations"),
        ({"operations": [{"op": "chain"}, {"op": "chain"}]}, "more than once"),
        ({"operations": [{"op": "module", "tokens": 15}]}, "not a square"),
        ({"heads": 3}, "do not divide"),
        ({"repeats": 1}, "repeats"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, changes, said):
    assert bench.main([str(written(tmp_path, **changes))]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

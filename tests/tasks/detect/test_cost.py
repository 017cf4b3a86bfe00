"""Cost by stage: what is timed adds up, what fails its oracle is not timed, and the report shows it."""

import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from attnzoo import tasks
from attnzoo.bench.readme import markdown_table
from attnzoo.tasks import read_records
from attnzoo.tasks.detect import config as configs
from attnzoo.tasks.detect import cost, run, stages
from eval.bench import main as bench
from eval.detect import main as evaluate
from tests.tasks.detect.models import mmdet_detector, samples
from tests.tasks.detect.runs import make_config, make_data
from train.detect import main as train

PADRE = {"name": "padre", "degree": 2, "kernel_size": 3, "where": "encoder.*"}
SMALL = {"sizes": [(64, 64), (64, 128)], "repeats": 3, "warmup": 1}
HOST = "mmdet:DABDETR with ResNet-18"


class Sleeps(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        time.sleep(self.seconds)
        return x


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.encoder, self.decoder = Sleeps(0.03), Sleeps(0.01), Sleeps(0.02)
        self.bbox_head = Sleeps(0.01)

    def forward(self, x):
        return self.bbox_head.forward(self.decoder(self.encoder(self.encoder(self.backbone(x)))))  # as mmdet calls it


def test_stages_are_timed_apart_and_calls_of_one_stage_add_up():
    model = Slow()
    modules = stages.modules_of(model, [])
    calls = {lambda: model(torch.zeros(1, 2)): modules}
    (found,) = stages.in_turn(calls, torch.device("cpu"), warmup=0, repeats=1)
    found = {stage: seconds for stage, (seconds,) in found.items()}
    assert found["backbone"] >= 0.03
    assert found["encoder"] >= 0.02
    assert found["decoder"] >= 0.03  # with the head, which mmdet calls round its hooks
    assert found[stages.WHOLE] >= found["backbone"] + found["encoder"] + found["decoder"]
    assert not any("forward" in vars(m) for m in model.modules())


def needs(detector, attention, call):
    calls = stages.calls_of(stages.modules_of(detector, attention), call)
    return stages.needs([calls], torch.device("cpu"))[0]


def test_needs_of_a_stage_are_those_of_its_own_call():
    detector = mmdet_detector("DETR")
    attention = [f"encoder.layers.{i}.self_attn.attn" for i in (0, 1)]
    x, pixels, told = torch.randn(1, 16, 4, 5), torch.randn(1, 3, 64, 80), samples([(64, 80)], 64, 80)

    def call():
        return detector.forward_transformer((x,), told)

    with torch.inference_mode():
        found = needs(detector, attention, call)
    tokens, width = 20, 16
    projections, products = 4 * 2 * tokens * width**2, 2 * 2 * tokens**2 * width
    assert found[stages.ATTENTION][0].flops == 2 * (projections + products)
    mlps = 2 * 2 * 2 * tokens * width * 32
    assert found["encoder"][0].flops == found[stages.ATTENTION][0].flops + mlps
    with torch.inference_mode():
        whole = needs(detector, attention, lambda: detector(pixels, told, mode="tensor"))
    assert whole["decoder"][0].flops > found["decoder"][0].flops  # the head is called by a detector alone


def test_memory_is_measured_before_what_would_spoil_it(monkeypatch):
    """Counting FLOPs leaves holes in the heap: with it in between, one backbone was seen to need half as much again."""
    order = []
    monkeypatch.setattr(stages, "peak_memory", lambda calls, device: order.append(len(calls)) or ["peak"] * len(calls))
    monkeypatch.setattr(stages, "trace", lambda call: order.append("trace"))
    calls = {"backbone": print, "encoder": print}
    assert stages.needs([calls, calls], torch.device("cpu"))[1]["encoder"] == (None, "peak")
    assert order == [4, *["trace"] * 4]


@pytest.fixture
def squares(tmp_path):
    """A config of a small detector that asks for this cost, with test images or without."""
    data = make_data(tmp_path / "data", images=4)

    def make(attention=None, name="squares", **changed):
        path = tmp_path / f"{name}.py"
        make_config(path, data, attention, epochs=2, data_root=None, work_dir=f"{tmp_path}/{name}/seed0", cost=changed)
        return str(path)

    return make


def loaded(*paths):
    return tasks.load(Path(paths[0]), paths[1:])


def test_every_size_is_gated_and_measured(squares, tmp_path, capsys):
    paths = (squares(**SMALL),)
    assert bench([*paths, f"output={tmp_path}/out"]) == 0
    records = read_records(tmp_path / "out/records.jsonl")
    sizes = [(16, "64 x 64 pixels"), (32, "64 x 128 pixels")]
    assert [(r.tokens, r.workload, r.label) for r in records] == [(*size, "dense") for size in sizes]
    for record in records:
        assert (record.task, record.status, record.gate.passed, record.host) == ("detect", "ok", True, HOST)
        side = record.cost.candidate
        assert [stage.name for stage in side.stages] == ["backbone", "encoder", "decoder", "encoder's attention"]
        whole, attention = side.stage("encoder"), side.stage("encoder's attention")
        assert attention.flops < whole.flops < side.flops
        assert attention.latency_ms.p50 < whole.latency_ms.p50 < side.latency_ms.p50
        assert side.attention_parameters == attention.parameters
        assert side.latency_ms.n == 3
    told = capsys.readouterr()
    assert "forward, 32 tokens, 64 x 128 pixels" in told.out
    assert "cost of dense at 32 tokens, 64 x 128 pixels: ok" in told.err
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<h2>Stages</h2>" in page
    assert "Amdahl&#x27;s bound, were its attention" in page, "of several sizes"
    assert re.search("# model ?= ?dict", page), "mmengine's config in full"
    content = {"task": "detect", "name": "of-yaml", "configs": list(paths), "output": f"{tmp_path}/out"}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert bench([*paths, f"output={tmp_path}/out", "--so-far"]) == 0
    assert "forward, 32 tokens, 64 x 128 pixels" in capsys.readouterr().out
    assert bench([f"{tmp_path}/both.yaml"]) == 0
    assert "2 rows of an earlier run are kept, 0 to measure" in capsys.readouterr().err
    for wrong, said in (("seed=1", "randomness.seed"), ("device=cuda", "device: mmengine works on cpu here")):
        assert bench([f"{tmp_path}/both.yaml", wrong]) == 2
        assert said in capsys.readouterr().err


def test_what_is_wrong_is_not_timed(squares, zeros):
    _, config = loaded(squares(**{**SMALL, "attentions": [{"name": "sdpa"}, {"name": zeros}]}))
    asked = cost.read(config.detectors[0])
    for variant in config.variants[1:]:
        found = cost.measure(config.detectors[0], asked, variant, (64, 64), "cpu", lambda word: None)
        assert (found.status, bool(found.costs)) == (("ok", True) if variant.label == "sdpa" else ("failed", False))
    assert "gate did not pass" in found.message


def test_a_swap_that_cannot_be_made_is_said_before_any_work(squares, tmp_path, capsys):
    def refused(*attentions, cost=SMALL):
        path = squares(**cost, attentions=attentions)
        assert evaluate([path, "--output", f"{tmp_path}/out"]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert re.search("(?s)everywhere: .*cross-attention", refused({"name": "padre", "label": "everywhere"}))
    assert "two attentions are called 'padre'" in refused(
        {**PADRE, "label": "padre"}, {**PADRE, "degree": 3, "label": "padre"}
    )
    assert re.search(r"(?s)sizes.*repeat", refused(cost={"sizes": [], "repeat": 3}))
    assert "cost.attentions.0={'degree': 2} must be the name of a registered attention" in refused({"degree": 2})


def test_the_report_has_quality_cost_stages_curves_and_boxes(tmp_path, capsys):
    data = make_data(tmp_path / "data", images=4)
    one_size = {**SMALL, "sizes": SMALL["sizes"][:1]}
    paths = []
    for name, attention in (("own", None), ("padre", PADRE)):
        work = str(tmp_path / "runs" / name / "seed0")
        paths.append(str(make_config(tmp_path / f"{name}.py", data, attention, epochs=2, cost=one_size, work_dir=work)))
        assert train([paths[-1]]) == 0
    assert evaluate(paths) == 0
    folder = tmp_path / "runs" / "own" / "eval"
    assert "page:" in capsys.readouterr().out
    before = read_records(folder / "records.jsonl")
    more = configs.load_config(paths[1], ["randomness.seed=1", f"work_dir={tmp_path}/runs/padre/seed1"])
    run.train(more)
    assert evaluate(paths) == 0  # again: what is not as it was is tested once more
    assert "3 rows of an earlier run are kept, 1 to measure" in capsys.readouterr().err
    records = read_records(folder / "records.jsonl")
    assert [r.utc for r in records if r.kind == "cost"] == [r.utc for r in before if r.kind == "cost"]
    dense, padre = (r for r in records if r.kind == "cost")
    assert (dense.is_baseline, dense.attention, padre.attention) == (True, None, "padre")
    assert (dense.gate.passed, padre.gate.passed, padre.baseline_gate.passed) == (True, True, True)
    assert dense.cost.ratios.flops == 1 > padre.cost.ratios.flops
    assert padre.cost.candidate.stage("decoder").flops == dense.cost.candidate.stage("decoder").flops
    by_label = {r.label: r for r in records if r.kind == "quality"}
    own, padre = by_label["dense"].quality, by_label["padre degree=2 kernel_size=3"].quality
    assert [one.seed for one in padre.trainings] == [0, 1]
    assert own.trainings[0].epochs == (2,)
    assert next(r for r in records if r.kind == "cost" and r.attention).quality == padre.brief
    assert (padre.ratio, padre.difference) == (None, padre.ap - own.ap), "after two epochs dense finds nothing"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "at most" in page
    for part in ("Drawn boxes", "AP50 after each epoch", "AP50", "encoder&#x27;s attention", "best of 4 images"):
        assert part in page, part
    assert len(re.findall(r"data:image/jpeg;base64", page)) == 8
    for table in (page, markdown_table(records)):
        assert "AP %" in table
        assert "forward, 16 tokens" in table
        assert f"{100 * (padre.ap - own.ap):+.1f} points" in table


def test_a_size_that_cannot_be_measured_does_not_take_the_others_with_it(squares, tmp_path, capsys):
    path = squares(sizes=[(64, 64), (10**6, 10**6)], repeats=1, batch=1)
    assert evaluate([path, "--output", f"{tmp_path}/out"]) == 1
    records = read_records(tmp_path / "out/records.jsonl")
    assert [(record.workload, record.status) for record in records] == [
        ("64 x 64 pixels", "ok"),
        ("1000000 x 1000000 pixels", "oom"),
    ]
    assert "cost of dense, 1000000 x 1000000 pixels: oom" in capsys.readouterr().err
    none = mmdet_detector("DETR").to("meta")
    assert [cost.count_tokens(none, size) for size in ((64, 96), (4, 0))] == [24, 0]


def test_sizes_of_as_many_tokens_stand_beside_one_another(squares):
    task, config = loaded(squares(sizes=[(64, 128), (128, 64)]))
    assert [(cell.tokens, cell.workload) for cell in task.plan(config)] == [
        (32, "64 x 128 pixels"),
        (32, "128 x 64 pixels"),
    ]


def test_a_batch_beyond_all_memory_is_a_row_of_each_attention(squares, tmp_path):
    path = squares(sizes=[(64, 128)], batch=2**32, attentions=[PADRE])
    assert evaluate([path, "--output", f"{tmp_path}/out"]) == 1
    records = read_records(tmp_path / "out/records.jsonl")
    assert [(r.tokens, r.attention, r.status) for r in records] == [(32, None, "oom"), (32, "padre", "oom")]


def test_a_size_that_takes_too_long_is_in_the_table_and_in_the_exit_status(squares, tmp_path, capsys):
    path = squares(**{**SMALL, "sizes": [(64, 64)], "timeout_seconds": 0.001})
    assert evaluate([path, "--output", str(tmp_path / "eval")]) == 1
    said = capsys.readouterr()
    assert "cost of dense at 16 tokens, 64 x 64 pixels: timeout" in said.err
    assert "took longer than 0.001 s" in said.err
    assert "forward, 16 tokens" in said.out
    assert "timeout" in (tmp_path / "eval/report.html").read_text(encoding="utf-8")
    (record,) = read_records(tmp_path / "eval/records.jsonl")
    assert record.status == "timeout"


def test_the_softmax_core_is_not_asked_for_weights_that_mmcv_throws_away(monkeypatch):
    """Or written-out softmax would be slower than it is where a library writes it out."""
    detector = cost.swapped(mmdet_detector("DETR"), cost.Variant("softmax", {"name": "softmax"}), 0)
    core = detector.encoder.layers[0].self_attn.attn.core
    monkeypatch.setattr(type(core), "with_weights", None)
    x = torch.randn(1, 16, 4, 5)
    with torch.no_grad():
        detector.forward_transformer((x,), samples([(64, 80)], 64, 80))

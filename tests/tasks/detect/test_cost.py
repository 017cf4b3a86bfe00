"""Cost by stage: what is timed adds up, what fails its oracle is not timed, and the report shows it."""

import json
import re
import time

import pytest
import torch
from torch import nn

from attnzoo.bench.page import html_page
from attnzoo.bench.readme import markdown_table
from attnzoo.errors import ConfigError
from attnzoo.tasks import read_records
from attnzoo.tasks.detect import config as configs
from attnzoo.tasks.detect import cost, run, stages
from eval.detect import main as evaluate
from tests.tasks.detect.models import mmdet_detector, samples
from tests.tasks.detect.runs import make_config, make_data
from train.detect import main as train

PADRE = {"name": "padre", "degree": 2, "kernel_size": 3, "where": "encoder.*"}
SMALL = {"sizes": [(64, 64), (64, 128)], "repeats": 3, "warmup": 1}
FACTS = {"config_hash": "0" * 16, "benchmark": "x", "command": "y"}


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
    found = stages.clock(model, modules, lambda: model(torch.zeros(1, 2)))
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
def config(tmp_path):
    path = make_config(tmp_path / "squares.py", make_data(tmp_path / "data", images=4), epochs=2, cost=SMALL)
    return configs.load_config(path)


def test_every_variant_is_gated_and_measured_beside_the_dense_one(config):
    asked = cost.read(config).model_copy(update={"attentions": ({"name": "sdpa"}, {**PADRE, "degree": 3})})
    found = cost.variants(asked, [cost.Variant("dense"), cost.Variant("padre", PADRE)])
    assert [one.label for one in found] == ["dense", "padre", "sdpa", "padre degree=3 kernel_size=3"]
    said, parts = [], []
    records = cost.measure(config, asked, found, FACTS, said.append, parts.append)
    assert [(r.tokens, r.label) for r in records] == [(n, v.label) for n in (16, 32) for v in found]
    for record in records:
        assert (record.status, record.gate.passed) == ("ok", True)
        side = record.cost.candidate
        assert [stage.name for stage in side.stages] == ["backbone", "encoder", "decoder", "encoder's attention"]
        whole, attention = side.stage("encoder"), side.stage("encoder's attention")
        assert attention.flops < whole.flops < side.flops
        assert attention.latency_ms.p50 < whole.latency_ms.p50 < side.latency_ms.p50
        assert side.attention_parameters == attention.parameters
    dense, padre = records[:2]
    assert dense.is_baseline
    assert dense.cost.ratios.flops == 1
    assert padre.cost.candidate.stage("decoder").flops == dense.cost.candidate.stage("decoder").flops
    assert any("64 x 128 pixels: time" in word for word in said)
    assert parts == [pytest.approx(1 / 3), 1]


def test_what_is_wrong_is_not_timed(config, zeros):
    asked = cost.read(config)
    found = [cost.Variant("dense"), cost.Variant("zeros", {"name": zeros})]
    records = cost._measure(config, asked, found, FACTS, lambda word: None)
    assert [(r.label, r.status, r.cost is None) for r in records[:2]] == [
        ("dense", "ok", False),
        ("zeros", "failed", True),
    ]
    assert "gate did not pass" in records[1].message


def test_a_swap_that_cannot_be_made_is_said_before_any_work(config):
    asked = cost.read(config)
    with pytest.raises(ConfigError, match=r"(?s)everywhere: .*cross-attention"):
        cost.measure(
            config, asked, [cost.Variant("dense"), cost.Variant("everywhere", {"name": "padre"})], FACTS, print, print
        )
    with pytest.raises(ConfigError, match="has no name"):
        cost.variants(asked.model_copy(update={"attentions": ({"degree": 2},)}), [])
    with pytest.raises(ConfigError, match="two attentions are called 'padre'"):
        cost.variants(asked, [cost.Variant("padre", PADRE), cost.Variant("padre", {**PADRE, "degree": 3})])
    same = asked.model_copy(update={"sizes": ((64, 128), (128, 64)), "repeats": 1})
    with pytest.raises(ConfigError, match="as many tokens as another size"):
        cost.measure(config, same, [cost.Variant("dense")], FACTS, print, print)
    config.cost = {"sizes": [], "repeat": 3}
    with pytest.raises(ConfigError, match=r"(?s)sizes.*repeat"):
        cost.read(config)


def test_the_report_has_quality_cost_stages_curves_and_boxes(tmp_path, capsys):
    data = make_data(tmp_path / "data", images=4)
    one_size = {**SMALL, "sizes": SMALL["sizes"][:1]}
    paths = []
    for name, attention in (("own", None), ("padre", PADRE)):
        work = str(tmp_path / "runs" / name / "seed0")
        paths.append(str(make_config(tmp_path / f"{name}.py", data, attention, epochs=2, cost=one_size, work_dir=work)))
        assert train([paths[-1]]) == 0
    more = configs.load_config(paths[1], ["randomness.seed=1", f"work_dir={tmp_path}/runs/padre/seed1"])
    run.train(more)
    assert evaluate(paths) == 0
    folder = tmp_path / "runs" / "own" / "eval"
    assert "page:" in capsys.readouterr().out
    records = read_records(folder / "records.jsonl")
    by_label = {r.label: r for r in records if r.kind == "quality"}
    assert [one.seed for one in by_label["padre degree=2 kernel_size=3"].quality.trainings] == [0, 1]
    assert by_label["dense"].quality.trainings[0].epochs == (2,)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>Stages</h2>" in page
    assert "at most" in html_page(records)
    for part in ("Drawn boxes", "Learning", "AP50", "encoder&#x27;s attention", "best of 4 images"):
        assert part in page, part
    assert len(re.findall(r"data:image/jpeg;base64", page)) == 8
    table = markdown_table(records)
    assert "AP %" in table
    assert "forward, 16 tokens" in table
    before = (folder / "records.jsonl").read_text(encoding="utf-8")
    assert evaluate(paths) == 0  # again: tests are kept, records take the place of the earlier ones
    after = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(after) == len(before.splitlines())


def test_a_size_that_cannot_be_measured_does_not_take_the_others_with_it(config):
    asked = cost.read(config).model_copy(update={"sizes": ((64, 64), (4, 0)), "repeats": 1})
    records = cost.measure(config, asked, [cost.Variant("dense")], FACTS, print, print)
    assert [(record.tokens, record.status) for record in records] == [(16, "ok"), (0, "failed")]
    assert records[1].message.startswith("4 x 0 pixels: Traceback")
    assert records[1].host.endswith(", 4 x 0 pixels")


def test_a_batch_beyond_all_memory_is_a_row_of_each_attention(config):
    asked = cost.read(config).model_copy(update={"batch": 2**32, "sizes": ((64, 128),)})
    found = [cost.Variant("dense"), cost.Variant("padre", PADRE)]
    records = cost.measure(config, asked, found, FACTS, print, print)
    assert [(r.tokens, r.label, r.status) for r in records] == [(32, v.label, "oom") for v in found]
    assert "64 x 128 pixels: " in records[-1].message


def test_a_size_that_takes_too_long_is_in_the_table_and_in_the_exit_status(tmp_path, capsys):
    timed = {**SMALL, "sizes": [(64, 64)], "timeout_seconds": 0.001}
    path = make_config(tmp_path / "slow.py", make_data(tmp_path / "data", images=1), cost=timed, data_root=None)
    assert evaluate([str(path), "--output", str(tmp_path / "eval")]) == 1
    said = capsys.readouterr()
    assert "cost of dense at 16 tokens: timeout: 64 x 64 pixels: took longer than 0.001 s" in said.err
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

"""The task export: exported, compared, quantized and timed in ONNX Runtime."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from attnzoo import tasks
from attnzoo.bench.page import page_of
from attnzoo.bench.run import run
from attnzoo.errors import ConfigError
from attnzoo.tasks import export, read_records
from attnzoo.tasks.classify.build import build_host
from eval.bench import main

ROOT = Path(__file__).parents[2]

CONFIG = {
    "task": "export",
    "name": "export",
    "model": {"name": "vit_tiny_patch16_224", "classes": 7, "options": {"depth": 1, "embed_dim": 24, "num_heads": 2}},
    "attentions": [{"name": "padre", "options": {"degree": 2, "kernel_size": 3}, "label": "padre"}],
    "tokens": [9],
    "calibration_images": 3,
    "repeats": 5,
    "min_seconds": 0.0,
    "threads": 1,
}


def test_every_attention_has_a_row_in_every_precision(tmp_path):
    """In this process, where a user has one for each row."""
    config = export.ExportConfig.check({**CONFIG, "output": str(tmp_path / "out")})
    here = [cell.model_copy(update={"isolated": False}) for cell in export.plan(config)]
    console = Console(stderr=True, quiet=True)
    found = {r.label: r for r in run(replace(export.TASK, plan=lambda config: here), config, "", console)}
    precisions = ("float32", "int8", "int8 per tensor")
    assert list(found) == [f"{name} {precision}" for name in ("dense", "padre") for precision in precisions]
    assert all(record.status == "ok" and record.gate.passed for record in found.values())
    assert [label for label, record in found.items() if record.is_baseline] == ["dense float32"]
    for label, record in found.items():
        cost = record.cost
        if record.dtype == "float32":
            assert cost.error == 0
            assert cost.agreement == 1
        else:
            assert 0 < cost.error < 1
            assert cost.file_bytes < found[f"{label.split()[0]} float32"].cost.file_bytes
        assert math.isfinite(cost.speedup.p50)
    page = page_of(export.TASK, list(found.values()), config.to_yaml())
    assert "padre int8 per tensor" in page
    assert "same answer" in page


def test_the_script_runs_a_row_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "export.yaml"
    alone = {"attentions": [], "precisions": ["float32"], "output": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**CONFIG, **alone}), encoding="utf-8")
    assert main([str(path)]) == 0, capsys.readouterr().err
    (record,) = tasks.read_records(tmp_path / "out/records.jsonl")
    assert (record.label, record.status) == ("dense float32", "ok")


def test_quantization_is_that_of_rounding_to_256_steps(tmp_path):
    """Of one linear map, whose error a reader can compute."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16, 5))
    model[1].weight.data[0] *= 50  # a channel that takes the whole range of a scale per tensor
    images = [torch.randn(1, 3, 4, 4) for _ in range(16)]
    path = export.export(model.eval(), (3, 4, 4), tmp_path / "linear.onnx")
    wanted = torch.cat([export.Session(path, 1)(x) for x in images])
    with torch.no_grad():
        torch.testing.assert_close(wanted, torch.cat([model(x) for x in images]))
    errors = {}
    for per_channel in (True, False):
        target = export.quantize(path, tmp_path / f"int8-{per_channel}.onnx", images, per_channel)
        found = torch.cat([export.Session(target, 1)(x) for x in images])
        errors[per_channel] = ((found - wanted)[:, 1:].norm() / wanted[:, 1:].norm()).item()
    assert errors[True] < errors[False], "small channels have scales of their own"


def test_a_model_that_onnx_runtime_computes_otherwise_is_not_timed(monkeypatch, tmp_path):
    real = export.export

    def wrong(model, shape, path):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
            made = real(model, shape, path)
            for parameter in model.parameters():
                parameter.sub_(0.2)
        return made

    monkeypatch.setattr(export, "export", wrong)
    config = export.ExportConfig.check(CONFIG)
    result = export.measure(config, export.plan(config)[0], {}, lambda text: None)
    assert result.status == "failed"
    assert "gate" in result.message
    assert not result.costs
    assert build_host(config.model, 48, 0, True, {}) is not None


def test_what_cannot_be_exported_is_refused_early():
    for words, changes in {
        "not a square|no square": {"tokens": [12]},
        "did you mean 'padre'": {"attentions": ["padree"]},
        "int4": {"precisions": ["int4"]},
        "evicts a language model's cache": {"attentions": ["h2o"]},
    }.items():
        with pytest.raises(ConfigError, match=words):
            export.ExportConfig.check({**CONFIG, **changes})
    with pytest.raises(ConfigError, match=r"model\.name: timm has no model"):
        export.check(export.ExportConfig.check({**CONFIG, "model": {"name": "vit_tinny"}}))


def test_the_table_of_the_docs_is_that_of_the_record():
    """And so is what is said of it: the larger the degree, the further int8 moves the outputs."""
    records = read_records(ROOT / "docs/records/export.jsonl")
    assert {record.tokens for record in records} == {196, 784, 3136}
    assert {record.status for record in records} == {"ok"}
    page = (ROOT / "docs/repair.md").read_text(encoding="utf-8")
    shown = page.split("<!-- export:begin -->")[1].split("<!-- export:end -->")[0].strip()
    assert shown == export.columns([record for record in records if record.tokens == 784]).markdown()
    errors = {
        name: [100 * r.cost.error for r in records if r.label.startswith(name) and r.dtype != "float32"]
        for name in ("dense", *(f"padre degree={degree}" for degree in (1, 2, 3)))
    }
    told = re.findall(r"by (\d+) to (\d+)% with", page.replace("\n", " "))
    assert [(f"{min(each):.0f}", f"{max(each):.0f}") for each in errors.values()] == told

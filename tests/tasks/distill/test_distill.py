"""The task distill: trials that are planned, repaired, resumed, recorded and shown."""

import contextlib
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

import attnzoo
from attnzoo import tasks
from attnzoo.bench.summary import summarize, verdict
from attnzoo.errors import ConfigError
from attnzoo.repairing.repair import Repair
from attnzoo.tasks.classify.model import build
from attnzoo.tasks.decode import lm
from attnzoo.tasks.distill import language
from attnzoo.tasks.distill.classifier import BATCH, CALIBRATION_IMAGES, Classifier, Exported
from attnzoo.tasks.distill.config import SCRATCH, DistillConfig, Layers, VisionConfig
from attnzoo.tasks.distill.quality import Point, RepairedQuality, Trial
from attnzoo.tasks.distill.subject import Score, subject_of
from attnzoo.tasks.distill.trial import STATE, choose_layers
from tests.repairing.models import CAUSAL
from tests.tasks.classify.conftest import write_images
from tests.tasks.decode import llm
from train.distill import main

ROOT = Path(__file__).parents[3]
TOKENS = 384  # of a prompt: what is asked around a needle takes most of it
OPTIONS = {"patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}
STAGES = [
    {"objective": "layer", "samples": 64, "lr": 0.003},
    {"objective": "model", "samples": 32, "train": "all", "hidden": 0.1},
]


@pytest.fixture
def vision(tmp_path):
    """A config of a classifier, whose weights mean nothing, of tiny images."""
    write_images(tmp_path / "images/train", 16)
    write_images(tmp_path / "images/val", 10, seed=1)
    model = {"name": "vit_tiny_patch16_224", "options": OPTIONS, "weights": str(tmp_path / "trained.safetensors")}
    data = {"root": str(tmp_path / "images"), "image_size": 8, "workers": 0}
    save_file({"nothing": torch.zeros(1)}, tmp_path / "trained.safetensors")
    made = build(VisionConfig.model_validate({"model": model, "data": data}).run(3, trained=False), 3)[0]
    save_file(made.state_dict(), tmp_path / "trained.safetensors")
    return {
        "task": "distill",
        "name": "tiny",
        "output": str(tmp_path / "out"),
        "vision": {"model": model, "data": data},
        "attentions": [
            {"name": "padre", "options": {"degree": 2, "kernel_size": 3}, "label": "padre"},
            {"name": "padre", "options": {"degree": 2, "kernel_size": 3}, "init": "inherit", "label": "inherited"},
            "pooling",
        ],
        "layers": [{"share": 0.5, "order": "last"}, {"share": 1.0}],
        "stages": STAGES,
        "batch": 16,
        "points": 2,
        "scratch": {},
        "threads": 1,
    }


def written(config, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(tmp_path / "config.yaml")


def by_label(tmp_path):
    return {record.label: record for record in tasks.read_records(tmp_path / "out/records.jsonl")}


def test_teacher_swap_stages_and_control_are_recorded_and_shown(vision, tmp_path, capsys):
    assert main([written(vision, tmp_path)]) == 0, capsys.readouterr().err
    found = by_label(tmp_path)
    repaired_rows = [f"{name} {share}" for name in ("padre", "inherited", "pooling") for share in ("50% last", "100%")]
    # how a repair begins makes no difference from scratch
    scratch = [f"{name} {share} {SCRATCH}" for name in ("padre", "pooling") for share in ("50% last", "100%")]
    assert set(found) == {"teacher", *repaired_rows, *scratch}
    assert {record.status for record in found.values()} == {"ok"}
    assert found["teacher"].quality.ratio == 1.0
    for label in repaired_rows:
        (trial,) = found[label].quality.trials
        assert trial.layers == (("blocks.1.attn",) if "50%" in label else ("blocks.0.attn", "blocks.1.attn"))
        stages = [(point.stage, point.samples) for point in trial.points]
        parts = [32, 64, 80, 96] if "pooling" not in label else [16, 32]  # of which there is nothing to fit by layer
        assert stages[0][0] == "at the start"
        assert [samples for _, samples in stages if samples] == parts
        if label.startswith("padre"):
            assert trial.errors[1] < trial.errors[0], "the layers' stage fits them"
    for label in scratch:
        assert found[label].quality.trials[0].points[-1].samples == (32 if "pooling" in label else 96)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Share of the gap to the teacher" in page
    assert "gap closed" in page
    records = list(found.values())
    told = verdict(summarize(records))
    assert f"of {len(repaired_rows)} measured, none with an interval" in told, "from scratch is a control, no result"
    assert {one.label for one in tasks.find("distill").highlights(records)} == set(repaired_rows)
    before = (tmp_path / "out/records.jsonl").read_bytes()
    assert main([written(vision, tmp_path)]) == 0
    assert (tmp_path / "out/records.jsonl").read_bytes() == before


@pytest.mark.parametrize("label", ["padre 100%", f"padre 100% {SCRATCH}"])
def test_killed_and_resumed_equals_unbroken(label, vision, tmp_path, monkeypatch):
    """Broken off wherever a score was written; points, but for the seconds, and weights are the same."""
    third = {"objective": "model", "samples": 32}  # whose teacher is still that before the second
    vision |= {"attentions": vision["attentions"][:1], "layers": [{"share": 1.0}], "stages": [*STAGES, third]}
    task = tasks.find("distill")

    def once(output, kill=None):
        config = DistillConfig.check({**vision, "output": str(output)})
        (cell,) = (cell for cell in task.plan(config) if cell.label == label)
        told = []

        def say(text):
            told.append(text)
            if kill is not None and len(told) == kill:
                raise KeyboardInterrupt

        result = task.measure(config, cell, {}, say)
        (state,) = (output / "trials").glob(f"*/{STATE}")
        return result.quality.trials[0], torch.load(state, weights_only=True)["model"]

    trial, weights = once(tmp_path / "whole")
    for kill in (1, 4, 5, 6, 8):
        folder = tmp_path / f"broken{kill}"
        with contextlib.suppress(KeyboardInterrupt):
            once(folder, kill)
        again, found = once(folder)
        mine, wanted = ([(p.stage, p.samples, p.score) for p in one.points] for one in (again, trial))
        assert mine == wanted
        assert again.errors == trial.errors
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_layers_are_chosen_by_sensitivity_once_per_attention_and_seed(vision, tmp_path, monkeypatch):
    vision |= {
        "attentions": [vision["attentions"][0], "pooling"],
        "layers": [{"share": 0.5}, {"share": 0.5, "order": "random"}, {"share": 0.5, "order": "first"}],
        "sensitivity_steps": 2,
        "seeds": [0, 1],
        "scratch": None,
    }
    assert main([written(vision, tmp_path)]) == 0
    found = by_label(tmp_path)
    assert list(found)[:4] == ["teacher", "padre 50%", "padre 50% random", "padre 50% first"]
    files = sorted((tmp_path / "out/sensitivity").glob("*.json"))
    assert len(files) == 4
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for content in contents:
        costs = [layer["cost"] for layer in content["layers"]]
        assert costs == sorted(costs)
    cheapest = {one["seed"]: one["layers"][0]["path"] for one in contents if one["attention"] == "padre"}
    assert {t.seed: t.layers[0] for t in found["padre 50%"].quality.trials} == cheapest
    assert found["padre 50%"].quality.trials[0].points[1].samples == 4 * 16 + 32, "what the choice saw counts"
    assert {t.layers for t in found["padre 50% first"].quality.trials} == {("blocks.0.attn",)}
    assert "±" in found["padre 50%"].quality.figure


def test_a_language_model_is_repaired_on_a_text(tmp_path, monkeypatch):
    llm.save(tmp_path / "llm")
    (tmp_path / "text.txt").write_text(llm.prose(), encoding="utf-8")
    config = {
        "task": "distill",
        "name": "language",
        "output": str(tmp_path / "out"),
        "language": {
            "model": str(tmp_path / "llm"),
            "text": str(tmp_path / "text.txt"),
            "tokens": TOKENS,
            "windows": 4,
            "needles": 2,
        },
        "attentions": [
            {"name": "padre", "options": CAUSAL["padre"], "init": "inherit", "label": "mixer"},
            {"name": "streaming", "options": {"budget": 16, "block_size": 4}, "label": "window"},
        ],
        "layers": [{"share": 0.5}],
        "sensitivity_steps": 2,
        "stages": [{"objective": "layer", "samples": 64}, {"objective": "model", "samples": 64, "train": "all"}],
        "batch": 8,
        "points": 1,
        "threads": 1,
    }
    assert main([written(config, tmp_path)]) == 0
    teacher, row, window = tasks.read_records(tmp_path / "out/records.jsonl")
    assert row.quality.metric == "NLL"
    points = row.quality.trials[0].points
    assert row.quality.score < points[0].score, "nats are won back"
    assert teacher.quality.ratio == 1
    assert all(found is not None for found in (teacher.quality.trials[0].points[0].found, *(p.found for p in points)))
    assert {"needles found at the start", "needles found"} <= set(row.quality.details)
    (only,) = window.quality.trials[0].points
    assert only.score != teacher.quality.score, "a window of 16 of so many tokens loses something"
    assert window.quality.trials[0].layers == row.quality.trials[0].layers, "a control stands where the mixer does"
    assert window.quality.is_control
    assert [one.label for one in tasks.find("distill").highlights([teacher, row, window])] == [row.label]
    other = {"name": "padre", "options": {**CAUSAL["padre"], "degree": 1}, "label": "other"}
    first = DistillConfig.check({**config, "attentions": [other, *config["attentions"]]})
    again = {cell.label: cell.measured for cell in tasks.find("distill").plan(first)}
    assert again[window.label] != window.measured, "it stands in the layers of another mixer"
    assert again[row.label] == row.measured
    own = {**config["attentions"][0], "stages": [{**config["stages"][0], "lr": 0.01}, config["stages"][1]]}
    faster = DistillConfig.check({**config, "attentions": [own, config["attentions"][1]]})
    assert {cell.label: cell.measured for cell in tasks.find("distill").plan(faster)}[window.label] != window.measured
    monkeypatch.setattr(language, "retrieve", lambda *args: lm.Answer("", (True, False), None))
    subject = subject_of(DistillConfig.check(config))
    assert subject.score(subject.teacher()).found == 0.5
    assert subject.score(subject.teacher(), whole=False).found is None
    long = DistillConfig.check({**config, "language": {**config["language"], "windows": 4000}})
    with pytest.raises(ConfigError, match="too few to keep 4000 windows"):
        tasks.find("distill").check(long)


def test_a_seed_more_leaves_the_trials_of_the_others_as_they_are(vision, tmp_path, monkeypatch):
    mixer = {**vision["attentions"][0], "layers": [{"share": 1.0}]}
    short = {"stages": STAGES[:1], "scratch": None, "points": 1}
    assert main([written({**vision, **short, "attentions": [{**mixer, "seeds": [0]}]}, tmp_path)]) == 0
    before = by_label(tmp_path)
    assert list(before) == ["teacher", "padre 100%"], "an attention's own layers stand in place of the config's"
    seeds, run = [], Repair.run
    monkeypatch.setattr(
        Repair, "run", lambda self, *args, **kwargs: seeds.append(self.options.seed) or run(self, *args, **kwargs)
    )
    config = {**vision, **short, "attentions": [{**mixer, "seeds": [0, 1]}], "fresh": False}
    assert main([written(config, tmp_path)]) == 0
    assert seeds == [1]
    after = by_label(tmp_path)["padre 100%"].quality.trials
    assert [trial.seed for trial in after] == [0, 1]
    assert after[0] == before["padre 100%"].quality.trials[0]


def test_an_attention_has_stages_of_its_own(vision, tmp_path):
    mixer = vision["attentions"][0]
    own = {**mixer, "label": "longer", "stages": [{**STAGES[0], "lr": 2e-3}, {**STAGES[1], "samples": 96}]}
    short = {"layers": [{"share": 0.5}], "points": 1}
    assert main([written({**vision, **short, "attentions": [mixer, own]}, tmp_path)]) == 0
    found = by_label(tmp_path)
    assert found["longer 50%"].quality.trials[0].points[-1].samples == (
        found["padre 50%"].quality.trials[0].points[-1].samples + 96 - STAGES[1]["samples"]
    )
    assert "model on 96 images" in found["longer 50%"].quality.note
    assert "longer 50% from scratch" in found, "which is trained on as many images as the repair"
    assert len(list((tmp_path / "out/sensitivity").glob("*.json"))) == 2, "at the rate of each one's first stage"


def test_rates_of_a_repair_make_no_other_network_from_scratch(vision):
    mixer = {**vision["attentions"][0], "layers": [{"share": 1.0}]}
    other = {**mixer, "label": "faster", "stages": [STAGES[0], {**STAGES[1], "lr": 0.01}]}
    longer = {**mixer, "label": "longer", "stages": [STAGES[0], {**STAGES[1], "samples": 96}]}
    config = DistillConfig.check({**vision, "attentions": [mixer, other, longer]})
    labels = [cell.label for cell in tasks.find("distill").plan(config) if SCRATCH in cell.label]
    assert labels == [f"padre 100% {SCRATCH}", f"longer 100% {SCRATCH}"]


def test_a_repaired_model_is_saved_where_that_is_asked_for(vision, tmp_path):
    short = {"attentions": vision["attentions"][:1], "layers": [{"share": 1.0}], "points": 1, "scratch": None}
    config = {**vision, **short, "save_models": True}
    assert main([written(config, tmp_path)]) == 0
    (folder,) = (tmp_path / "out/trials").glob("*/model")
    subject = subject_of(DistillConfig.check(config))
    assert subject.score(attnzoo.load(folder)).score == by_label(tmp_path)["padre 100%"].quality.score


def test_a_config_of_another_task_is_refused(capsys):
    assert main([str(ROOT / "configs/classify/digits.yaml")]) == 2
    assert "is of the task 'classify', and train/distill.py is for 'distill' alone" in capsys.readouterr().err


def test_nine_steps_from_scratch_are_trained(vision, tmp_path):
    nine = [{**STAGES[0], "samples": 80}, {**STAGES[1], "samples": 64}]
    short = {"attentions": vision["attentions"][:1], "layers": [{"share": 1.0}], "stages": nine, "points": 1}
    assert main([written({**vision, **short}, tmp_path)]) == 0
    assert by_label(tmp_path)[f"padre 100% {SCRATCH}"].status == "ok"


def test_images_in_another_folder_are_others(vision, tmp_path):
    write_images(tmp_path / "more/train", 17)
    write_images(tmp_path / "more/val", 10, seed=1)
    elsewhere = {**vision["vision"], "data": {**vision["vision"]["data"], "root": str(tmp_path / "more")}}
    found = []
    for one in (vision, {**vision, "vision": elsewhere}):
        config = DistillConfig.check(one)
        found.append({cell.measured for cell in tasks.find("distill").plan(config)})
    assert not found[0] & found[1]


def test_a_repaired_model_is_scored_in_int8(vision, tmp_path):
    """In float32 ONNX Runtime answers as PyTorch does; int8 rounds."""
    short = {"attentions": vision["attentions"][:1], "layers": [{"share": 1.0}], "stages": STAGES[:1], "scratch": None}
    config = {**vision, **short, "precisions": ["float32", "int8"]}
    assert main([written(config, tmp_path)]) == 0
    for record in by_label(tmp_path).values():
        (trial,) = record.quality.trials
        assert trial.quantized["float32"] == trial.final
        assert {"float32, first seed", "int8, first seed"} <= set(record.quality.details)


def test_int8_gives_nearly_the_same_logits():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=3, **OPTIONS).eval()
    images, found = torch.randn(CALIBRATION_IMAGES, 3, 8, 8), []

    def keep(exported):
        found.append(exported(images[:5]))
        return Score(0.0)

    subject = SimpleNamespace(as_tested=lambda count: images[:count], score=keep, device="cpu")
    Classifier.quantized(subject, model, ["float32", "int8"], 1)
    with torch.no_grad():
        wanted = model(images[:5])
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)
    off = ((found[1] - wanted).norm() / wanted.norm()).item()
    assert 1e-4 < off < 0.3, off


def test_an_exported_model_takes_any_number_of_images():
    asked = []

    def session(x):
        asked.append(x)
        return x.sum((1, 2, 3))[:, None]

    images = torch.randn(BATCH + 3, 2, 4, 4)
    torch.testing.assert_close(Exported(session)(images), images.sum((1, 2, 3))[:, None])
    assert [len(x) for x in asked] == [BATCH, BATCH]


def test_rows_in_processes_of_their_own_are_those_of_one_process(vision, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    short = {"attentions": vision["attentions"][:1], "stages": STAGES[:1], "scratch": None, "points": 1}
    assert main([written({**vision, **short}, tmp_path)]) == 0
    here = by_label(tmp_path)
    assert main([written({**vision, **short, "workers": 2, "output": str(tmp_path / "apart")}, tmp_path)]) == 0
    apart = {record.label: record for record in tasks.read_records(tmp_path / "apart/records.jsonl")}
    for label, record in here.items():
        assert record.measured == apart[label].measured
        for one, other in zip(record.quality.trials, apart[label].quality.trials, strict=True):
            assert one.errors == other.errors
            assert [point.score for point in one.points] == [point.score for point in other.points]


def test_rows_that_are_measured_at_a_time_choose_layers_once(vision, monkeypatch):
    config, calls, chosen = DistillConfig.check({**vision, "sensitivity_steps": 1}), [], []
    real = attnzoo.sensitivity

    def slow(*args, **kwargs):
        calls.append(args)
        time.sleep(0.5)
        return real(*args, **kwargs)

    monkeypatch.setattr(attnzoo, "sensitivity", slow)

    def choose():
        chosen.append(choose_layers(config, subject_of(config), config.attentions[0], Layers(share=0.5), 0))

    threads = [threading.Thread(target=choose) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert chosen[0] == chosen[1]


def test_what_a_config_cannot_say_is_refused_before_any_work(vision, tmp_path, capsys):
    wrong = {
        "give one of vision, language and features": {"vision": None},
        "gives? weights or pretrained": {"vision": {**vision["vision"], "model": {"name": "vit_tiny_patch16_224"}}},
        "is no mixer": {"attentions": ["sdpa"]},
        "'padre' has no option 'sides'": {"attentions": [{"name": "padre", "options": {"sides": 2}}]},
        "8 are fewer than a batch of 16": {"stages": [{"objective": "layer", "samples": 8}]},
        "are for objective: model": {"stages": [{"objective": "layer", "samples": 32, "train": "all"}]},
        "attentions.0.stages.0.samples: 8": {
            "attentions": [{"name": "padre", "stages": [{"objective": "layer", "samples": 8}]}]
        },
        "`layers` says which": {"attentions": [{"name": "padre", "where": "blocks.0"}]},
        "labels": {"layers": [{"share": 0.5}, {"share": 0.5}]},
        "greater than 0": {"layers": [{"share": 0.0}]},
        "a seed stands twice": {"seeds": [1, 1]},
        "seed: 3 would change nothing; give seeds": {"seed": 3},
        "precisions: one stands twice": {"precisions": ["int8", "int8"]},
        "scratch.shares: .0.6. must be among": {"scratch": {"shares": [0.6]}},
        "reads its images itself; give 0": {
            "workers": 2,
            "vision": {**vision["vision"], "data": {**vision["vision"]["data"], "workers": 1}},
        },
        "an image model has no cache|evicts a language model": {"attentions": ["padre", "streaming"]},
        "threads: say how many each": {"workers": 2, "threads": None},
        "vision.augment: mixup, cutmix and repeats": {"vision": {**vision["vision"], "augment": {"repeats": 3}}},
        "image classifiers alone are exported": {
            "precisions": ["int8"],
            "vision": None,
            "language": {},
            "scratch": None,
        },
    }
    for words, changes in wrong.items():
        with pytest.raises(ConfigError, match=words):
            DistillConfig.check({**vision, **changes})
    causal = {"name": "padre", "options": {"token_mixing": "dense", "tokens": 99}}
    assert main([written({**vision, "attentions": [causal]}, tmp_path)]) == 2
    assert "give tokens=17" in capsys.readouterr().err
    assert not (tmp_path / "out/records.jsonl").exists()


def test_shares_of_the_gap_and_ratios():
    points = [Point(stage="at the start", samples=0, seconds=0, score=0.2)]
    points += [Point(stage="stage 1: layer", samples=10, seconds=1, score=score) for score in (0.4, 0.6)]
    dense = RepairedQuality(
        metric="top-1", trials=(Trial(seed=0, points=(points[0].model_copy(update={"score": 0.8}),)),)
    )
    row = RepairedQuality(metric="top-1", trials=(Trial(seed=0, points=tuple(points)),)).against(dense)
    assert row.ratio == pytest.approx(0.75)
    assert row.curves == [{0.0: 0.0, 10.0: pytest.approx(200 / 3)}]
    assert row.details["gap closed"] == "67%"
    assert row.details["stage 1: layer"] == "60.0"
    nll = row.model_copy(update={"metric": "NLL"}).against(dense.model_copy(update={"metric": "NLL"}))
    assert nll.ratio == pytest.approx(2.718281828**0.2)


def test_what_figures_depend_on_tells_trials_apart(vision):
    """Where a run writes is not among it."""
    task = tasks.find("distill")
    cells = [
        next(cell for cell in task.plan(DistillConfig.check({**vision, **changes})) if cell.label == "padre 100%")
        for changes in ({}, {"batch": 8}, {"stages": STAGES[:1]}, {"output": "elsewhere"})
    ]
    assert len({cell.measured for cell in cells}) == 3
    assert cells[0].measured == cells[3].measured

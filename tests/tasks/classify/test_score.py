"""Evaluation: calibration, mistakes, and records that the benchmark's own reports take."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from attnzoo.errors import ConfigError
from attnzoo.tasks import read_records
from attnzoo.tasks.classify.config import validate_config
from attnzoo.tasks.classify.evaluate import BINS, Answers
from attnzoo.tasks.classify.quality import Training
from attnzoo.tasks.classify.report import markdown_table, step_costs
from attnzoo.tasks.classify.run import table, train_all
from attnzoo.tasks.classify.score import benchmark_of, quality_of, score_all
from attnzoo.tasks.records import Record
from tests.bench.data import cost, record_data
from train.classify import main as train

from .conftest import ROOT, tiny, write_images

COST = {"batch": 2, "image_sizes": [8], "repeats": 3, "min_seconds": 0}


def script():
    spec = importlib.util.spec_from_file_location("eval_classify", ROOT / "eval/classify.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(confidence, right):
    count = len(confidence)
    index = np.arange(count)
    answer = np.where(right, index % 3, (index + 1) % 3)
    return Answers(index, index % 3, answer, np.array(confidence), np.ones(count), np.array(right), np.array([]))


def test_the_calibration_error_is_that_of_the_definition():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.3, 1, 500)
    right = random.uniform(size=500) < confidence**2
    expected = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence > low) & (confidence <= low + 1 / BINS)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert answers(confidence, right).calibration_error() == pytest.approx(expected, abs=1e-12)
    assert answers([1.0, 1.0], [True, True]).calibration_error() == 0
    assert answers([0.9] * 10, [True] * 5 + [False] * 5).calibration_error() == pytest.approx(0.4)


def test_the_worst_mistakes_come_first():
    found = answers([0.5, 0.9, 0.7, 0.99], [False, False, True, False])
    assert found.most_confidently_wrong(2).tolist() == [3, 1]
    assert found.counted()["top1"] == 1


def test_trained_models_are_evaluated_recorded_and_shown(images, tmp_path, capsys):
    config = tiny(images, tmp_path / "runs", seeds=[0, 1], recipe__epochs=2, costs=[COST, {**COST, "gradient": True}])
    config["attentions"][0]["seeds"] = [0]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main = script().main
    assert main([str(path)]) == 2
    assert "not trained yet: dense-seed0, dense-seed1, padre-seed0. Train first" in capsys.readouterr().err
    results = train_all(validate_config(config))
    assert main([str(path)]) == 0
    folder = tmp_path / "runs/eval"
    for name, phase in (("forward-batch2", "forward"), ("training-batch2", "training")):
        records = read_records(folder / name / "records.jsonl")
        assert [(r.kind, r.label, r.status) for r in records] == [
            *[("cost", "dense", "ok"), ("cost", "padre", "ok"), ("quality", "dense", "ok"), ("quality", "padre", "ok")],
        ]
        assert {r.phase for r in records if r.kind == "cost"} == {phase}
        dense, padre = (r.quality for r in records if r.kind == "cost")
        assert [t.correct for t in dense.trainings] == [r["test"]["top1"] for r in results[:2]]
        assert (dense.images, padre.images, dense.ratio) == (60, 30, 1.0)
        assert padre.ratio == pytest.approx(padre.accuracy / dense.accuracy)
        assert padre.calibration_error == pytest.approx(results[2]["test"]["calibration_error"], abs=1e-6)
        assert "calibration error" in (folder / name / "report.html").read_text()
    page = (folder / "report.html").read_text()
    wrong = sum(r["test"]["images"] - r["test"]["top1"] for r in (results[0], results[2]))
    assert page.count("data:image/png;base64") == min(wrong, 48)
    assert page.count("<svg") == 3
    assert [t.epoch_correct[-1] for t in dense.trainings] == [t.correct for t in dense.trainings]
    assert "±" in page
    assert all(f'href="{name}/report.html"' in page for name in ("forward-batch2", "training-batch2"))
    before = (folder / "forward-batch2/records.jsonl").read_bytes()
    capsys.readouterr()
    assert main([str(path)]) == 0, "what was evaluated is kept"
    assert (folder / "forward-batch2/records.jsonl").read_bytes() == before
    assert "padre-seed0: top-1" not in capsys.readouterr().err


def test_an_evaluation_is_that_of_the_training_and_of_these_weights(images, tmp_path):
    config = tiny(images, tmp_path / "runs", only=["dense"], recipe__epochs=2, augment__interpolation="bilinear")
    config["data"] = {**config["data"], "crop_pct": 0.8}  # so that images are resized
    (result,) = train_all(validate_config(config))
    (scored,), _ = score_all(validate_config(config), 7, Console(quiet=True))
    for key in ("images", "top1", "top5", "unreadable"):
        assert scored.counted[key] == result["test"][key]
    assert scored.counted["loss"] == pytest.approx(result["test"]["loss"], abs=1e-5)
    assert quality_of([scored], None).accuracy == result["test"]["top1"] / 30
    with pytest.raises(ConfigError, match=r"is of another config \(recipe\.lr 0\.003, now 1\.0\)"):
        score_all(validate_config({**config, "recipe": {**config["recipe"], "lr": 1.0}}), 7, Console(quiet=True))
    weights = tmp_path / "runs/dense-seed0/final/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"cannot be used: model\.safetensors has .* resume=never"):
        score_all(validate_config(config), 7, Console(quiet=True))


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder of images and a run that was trained with them, for tests that work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder / "images/train", 32)
    write_images(folder / "images/val", 10, seed=1)
    train_all(validate_config(once_config(folder)), Console(quiet=True))
    return folder


def once_config(folder, **changes):
    return tiny(folder / "images", folder / "runs", **{"only": ["dense"], "recipe__epochs": 2, **changes})


def test_the_command_refuses_other_classes_with_a_sentence(once, tmp_path, capsys):
    shutil.copytree(once, tmp_path / "copy")
    for split in ("train", "val"):
        (tmp_path / "copy/images" / split / "left").rename(tmp_path / "copy/images" / split / "right")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(once_config(tmp_path / "copy")))
    assert script().main([str(path)]) == 2
    assert "trained with other data or weights (missing classes left, new classes right)" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["train", "eval"])
def test_an_output_that_is_a_file_is_a_sentence(once, tmp_path, capsys, task):
    shutil.copytree(once, tmp_path / "copy")
    config = once_config(tmp_path / "copy")
    blocked = tmp_path / "copy/runs/eval" if task == "eval" else tmp_path / "copy/file"
    blocked.write_text("")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config if task == "eval" else {**config, "output": str(blocked)}))
    assert (script().main if task == "eval" else train)([str(path)]) == 2
    told = capsys.readouterr().err
    assert f"{blocked} is a file; give" in told
    assert "Traceback" not in told
    assert "top-1" not in told  # refused before any work


def test_classes_in_another_order_are_refused(once, tmp_path):
    """Numbers of classes come from a class map here, whose file is not part of a run's identity."""
    shutil.copytree(once / "images", tmp_path / "images")
    class_map = tmp_path / "classes.txt"
    class_map.write_text("bright\ndark\nleft\n")
    config = validate_config(once_config(tmp_path, data__options={"class_map": str(class_map)}))
    train_all(config, Console(quiet=True))
    score_all(config, 7, Console(quiet=True))
    class_map.write_text("dark\nbright\nleft\n")
    with pytest.raises(ConfigError, match="the same classes in another order: class 0 was bright, now dark"):
        score_all(config, 7, Console(quiet=True))


def test_all_runs_are_checked_before_one_is_evaluated(once, tmp_path):
    shutil.copytree(once, tmp_path / "copy")
    folder = tmp_path / "copy"
    shutil.copytree(folder / "runs/dense-seed0", folder / "runs/dense-seed1")
    with pytest.raises(ConfigError, match="dense-seed1/final is of another config"):
        score_all(validate_config(once_config(folder, seeds=[0, 1])), 7, Console(quiet=True))
    assert not (folder / "runs/eval").exists()
    (folder / "runs/dense-seed0/run.json").unlink()
    with pytest.raises(ConfigError, match=r"run\.json, which says what data the run was trained with, cannot be read"):
        score_all(validate_config(once_config(folder)), 7, Console(quiet=True))


def test_a_device_that_is_not_there_is_refused_in_evaluation_too(once, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device here"):
        score_all(validate_config(once_config(once, device="cuda")), 7, Console(quiet=True))


def test_the_cost_is_of_the_models_that_were_trained(images):
    config = tiny(images, "runs", equal_parameters=True, costs=[{**COST, "image_sizes": [8, 16]}])
    config["attentions"].append({"name": "mlp_mixer", "options": {"tokens": 17}, "label": "mlp_mixer"})
    config = validate_config(config)
    measured = benchmark_of(config, config.costs[0], 3)
    assert (measured.cost.tokens, measured.cost.batch) == ((16, 64), {16: 2, 64: 2})
    assert (measured.host.patch_size, measured.host.channels, measured.host.classes) == (2, 3, 3)
    assert measured.cost.equal_parameters
    assert [a.tokens for a in measured.attentions] == [None, (16,)]
    odd = validate_config(tiny(images, "runs", costs=[{**COST, "image_sizes": [9]}]))
    with pytest.raises(ConfigError, match=r"images of \[9\] pixels are not divided by patches of 2"):
        benchmark_of(odd, odd.costs[0], 3)


def test_the_command_line_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        script().main(["config.yaml", "--batch", "0"])
    assert "--batch must be at least 1" in capsys.readouterr().err
    assert script().main(["nowhere.yaml"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def trained(seed, correct, parameters):
    return Training(
        seed=seed, correct=correct, images=200, final_loss=1, seconds=1, epoch_losses=(2, 1), parameters=parameters
    )


def test_the_table_is_that_of_the_records():
    def quality(*correct, parameters, ratio=None):
        right, images = sum(correct), 200 * len(correct)
        return {
            "accuracy": right / images,
            "low": right / images - 0.1,
            "high": right / images + 0.05,
            "images": images,
            "ratio": ratio,
            "trainings": [trained(s, c, parameters).model_dump() for s, c in enumerate(correct)],
            "note": "",
            "top5": 0.9876,
            "calibration_error": 0.0125,
        }

    several, one = quality(100, 110, 120, parameters=1000), quality(150, parameters=1001, ratio=1.3)
    shared = {"kind": "quality", "tokens": 0}
    records = [
        Record.model_validate(record_data(**shared, quality=several)),
        Record.model_validate(record_data(**shared, label="padre", is_baseline=False, quality=one)),
    ]
    assert markdown_table(records).splitlines() == [
        "| attention | top-1 % | each seed | top-5 % | calibration error | parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| `dense` | 55.00 ± 5.00 | 50.00, 55.00, 60.00 | 98.76 | 0.013 | 1,000 |",
        "| `padre` | 75.00 (65.00-80.00) | 75.00 | 98.76 | 0.013 | 1,001 |",
    ]
    for tokens, speedup in ((64, 2.0), (16, 0.5)):
        changes = {"phase": "training", "tokens": tokens, "cost": cost(speedup)}
        records.append(Record.model_validate(record_data(**changes, label="padre", is_baseline=False)))
    assert set(step_costs(records)) == {"padre"}
    dense, padre = markdown_table(records).splitlines()[2:]
    assert dense.endswith("| 1,000 | - | - | - |")
    assert padre.endswith("| 1,001 | 20.0 ms | 0.50x (0.49-0.51) | 1.00x |")


@pytest.mark.parametrize(("classes", "told"), [(2, "-"), (5, "-"), (6, "90.00%"), (None, "90.00%")])
def test_top_5_of_five_classes_or_fewer_says_nothing(classes, told):
    """`None`: a result of an earlier version, which does not say how many there are."""
    result = {
        "label": "dense",
        "seed": 0,
        "test": {"top1": 5, "top5": 9, "images": 10, "loss": 1.0},
        "parameters": 7,
        "peak_memory_bytes": 8,
    }
    shown = table([{**result, "classes": classes}])
    (cell,) = shown.columns[[column.header for column in shown.columns].index("top-5")].cells
    assert cell == told

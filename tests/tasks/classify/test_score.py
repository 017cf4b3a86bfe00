"""Evaluation: calibration, mistakes, and records that the benchmark's own reports take."""

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
from attnzoo.tasks.classify.run import table, train_all
from attnzoo.tasks.classify.task import plan
from attnzoo.tasks.classify.workload import Workload
from attnzoo.tasks.records import Record
from eval import bench
from eval.classify import main
from tests.bench.data import cost, record_data
from train.classify import main as train

from .conftest import evaluated, tiny, write_images, written
from .tables import results_table

COST = {"batch": 2, "image_sizes": [8], "repeats": 3, "min_seconds": 0}


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
    path = written({"task": "classify", **config}, tmp_path)
    assert main([str(path)]) == 2
    assert "not trained yet: dense-seed0, dense-seed1, padre-seed0. Train first" in capsys.readouterr().err
    results = train_all(validate_config(config))
    assert main([str(path)]) == 0
    assert "padre" in capsys.readouterr().out
    folder = tmp_path / "runs"
    records = read_records(folder / "records.jsonl")
    assert [(r.kind, r.label, r.phase, r.workload, r.status) for r in records] == [
        *(("quality", label, "forward", "", "ok") for label in ("dense", "padre")),
        *(("cost", label, phase, "batch 2", "ok") for phase in ("forward", "training") for label in ("dense", "padre")),
    ]
    assert {record.task for record in records} == {"classify"}
    assert records[0].command == f"python eval/classify.py {path}"
    dense, padre = (record.quality for record in records[:2])
    assert [record.quality for record in records[2:]] == 2 * [dense.brief, padre.brief]
    assert [t.correct for t in dense.trainings] == [r["test"]["top1"] for r in results[:2]]
    assert (dense.images, padre.images, dense.ratio) == (60, 30, 1.0)
    assert padre.ratio == pytest.approx(padre.accuracy / dense.accuracy)
    assert padre.calibration_error == pytest.approx(results[2]["test"]["calibration_error"], abs=1e-6)
    assert [t.epoch_correct[-1] for t in dense.trainings] == [t.correct for t in dense.trainings]
    wrong = [r["test"]["images"] - r["test"]["top1"] for r in (results[0], results[2])]
    assert [len(quality.trainings[0].mistakes) for quality in (dense, padre)] == [min(24, count) for count in wrong]
    assert not dense.trainings[1].mistakes
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == sum(min(24, count) for count in wrong)
    assert page.count("Most confidently got wrong") == 1
    for said in ("calibration error", "±", "Test accuracy after each epoch", "Training loss", "forward and backward"):
        assert said in page
    before = (folder / "records.jsonl").read_bytes()
    assert main([str(path)]) == 0, "what was evaluated is kept"
    assert "6 rows of an earlier run are kept, 0 to measure" in capsys.readouterr().err
    assert bench.main([str(path)]) == bench.main([str(path), "--so-far"]) == 0
    assert (folder / "records.jsonl").read_bytes() == before


def test_an_evaluation_is_that_of_the_training_and_of_these_weights(images, tmp_path):
    config = tiny(images, tmp_path / "runs", only=["dense"], recipe__epochs=2, augment__interpolation="bilinear")
    config["data"] = {**config["data"], "crop_pct": 0.8}  # so that images are resized
    config["test_batch"] = 7
    (result,) = train_all(validate_config(config))
    found = evaluated(validate_config(config))["dense"].quality
    assert (found.images, found.trainings[0].correct) == (result["test"]["images"], result["test"]["top1"])
    assert found.calibration_error == pytest.approx(result["test"]["calibration_error"], abs=1e-6)
    with pytest.raises(ConfigError, match=r"is of another config \(recipe\.lr 0\.003, now 1\.0\)"):
        evaluated(validate_config({**config, "recipe": {**config["recipe"], "lr": 1.0}}))
    weights = tmp_path / "runs/dense-seed0/final/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"cannot be used: model\.safetensors has .* resume=never"):
        evaluated(validate_config(config))


def test_what_was_trained_anew_is_not_taken_for_what_was_evaluated(images, tmp_path, capsys):
    config = tiny(images, tmp_path / "runs", recipe__epochs=2)
    train_all(validate_config(config))
    before = evaluated(validate_config(config))
    again = {**config, "only": ["padre"], "recipe": {**config["recipe"], "lr": 0.1}, "resume": "never"}
    train_all(validate_config(again))
    path = written({**again, "resume": "auto"}, tmp_path)
    assert main([str(path)]) == 0
    assert "quality of padre: ok" in capsys.readouterr().err
    after = {record.label: record for record in read_records(tmp_path / "runs/records.jsonl")}
    assert after["dense"] == before["dense"]
    assert after["padre"].quality.trainings[0].final_loss != before["padre"].quality.trainings[0].final_loss


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
    assert main([str(path)]) == 2
    assert "is of other data or weights (missing classes left, new classes right)" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["train", "eval"])
def test_an_output_that_is_a_file_is_a_sentence(once, tmp_path, capsys, task):
    shutil.copytree(once, tmp_path / "copy")
    config = once_config(tmp_path / "copy")
    blocked = tmp_path / "copy/file"
    blocked.write_text("")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "output": str(blocked)}))
    assert (main if task == "eval" else train)([str(path)]) == 2
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
    evaluated(config)
    class_map.write_text("dark\nbright\nleft\n")
    with pytest.raises(ConfigError, match="the same classes in another order: class 0 was bright, now dark"):
        evaluated(config)


def test_all_runs_are_checked_before_one_is_evaluated(once, tmp_path):
    shutil.copytree(once, tmp_path / "copy")
    folder = tmp_path / "copy"
    shutil.copytree(folder / "runs/dense-seed0", folder / "runs/dense-seed1")
    with pytest.raises(ConfigError, match="dense-seed1/final is of another config"):
        evaluated(validate_config(once_config(folder, seeds=[0, 1])))
    assert not (folder / "runs/records.jsonl").exists()
    (folder / "runs/dense-seed0/run.json").unlink()
    with pytest.raises(ConfigError, match=r"run\.json, which says what data the run was trained with, cannot be read"):
        evaluated(validate_config(once_config(folder)))


def test_a_device_that_is_not_there_is_refused_in_evaluation_too(once, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device here"):
        evaluated(validate_config(once_config(once, device="cuda")))


def test_the_cost_is_of_the_models_that_were_trained(images):
    config = tiny(images, "runs", equal_parameters=True, costs=[{**COST, "image_sizes": [8, 16, [8, 16]]}])
    config["attentions"].append({"name": "mlp_mixer", "options": {"tokens": 17}, "label": "mlp_mixer"})
    cells = [cell for cell in plan(validate_config(config)) if cell.kind == "cost"]
    assert [(cell.label, cell.tokens, cell.workload) for cell in cells] == [
        *((label, 16, "batch 2") for label in ("dense", "padre", "mlp_mixer")),
        *((label, 64, "batch 2") for label in ("dense", "padre")),
        *((label, 32, "batch 2, 8 x 16 pixels") for label in ("dense", "padre")),
    ]
    work = Workload.model_validate(cells[0].asks["workload"])
    assert (work.host.patch_size, work.host.channels, work.batch, work.pixels) == (2, 3, 2, (8, 8))
    assert work.cost.equal_parameters
    odd = validate_config(tiny(images, "runs", costs=[{**COST, "image_sizes": [9]}]))
    with pytest.raises(ConfigError, match=r"costs: images of \[9\] pixels are not divided by patches of 2"):
        plan(odd)


def test_costs_are_of_the_datas_image_size_unless_they_say_another(images):
    config = tiny(images, "runs", costs=[{"batch": 2}, {"batch": 3, "tokens": [4], "dtype": "bfloat16"}])
    cells = [cell for cell in plan(validate_config(config)) if cell.kind == "cost"]
    assert [(cell.tokens, cell.workload) for cell in cells] == [
        *2 * [(16, "batch 2")],
        *2 * [(4, "batch 3, bfloat16")],
    ]


def test_the_command_line_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        main(["config.yaml", "--batch", "0"])
    assert "--batch must be at least 1" in capsys.readouterr().err
    assert main(["nowhere.yaml"]) == 2
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
    assert results_table(records).markdown().splitlines() == [
        "| attention | top-1 % | each seed | top-5 % | calibration error | parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| `dense` | 55.00 ± 5.00 | 50.00, 55.00, 60.00 | 98.76 | 0.013 | 1,000 |",
        "| `padre` | 75.00 (65.00-80.00) | 75.00 | 98.76 | 0.013 | 1,001 |",
    ]
    for tokens, speedup in ((64, 2.0), (16, 0.5)):
        changes = {"phase": "training", "tokens": tokens, "cost": cost(speedup)}
        records.append(Record.model_validate(record_data(**changes, label="padre", is_baseline=False)))
    dense, padre = results_table(records).markdown().splitlines()[2:]
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
    (row,) = table([{**result, "classes": classes}]).rows
    assert row.cells[3].text == told

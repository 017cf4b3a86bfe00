"""Several processes, by gloo, against one: once started by torchrun, else forked."""

import json
from functools import partial

import pytest

from attnzoo.tasks import read_records
from attnzoo.tasks.classify.config import validate_config
from attnzoo.tasks.classify.run import train_all

from .conftest import evaluated, finish, fork, launch, tiny, write_images, written


def run(config, folder, processes, start):
    folder.mkdir()
    status, out, said = start({**config, "output": str(folder / "runs")}, folder, processes=processes)
    assert status == 0, said
    assert out.count("top-1 (95%)") == 1, "one process prints the table"
    assert (folder / "runs/dense-seed0/final").is_dir(), "all runs are trained"
    rows = [json.loads(line) for line in (folder / "runs/padre-seed0/log.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "runs/padre-seed0/final/result.json").read_text())


def test_two_processes_train_as_one_does_and_count_every_image_once(tmp_path, forked):
    """Losses to 1e-5: what differs is the order of sums. Two does not divide 31 test images, nor 20 the 96 to train."""
    write_images(tmp_path / "images/train", 32)
    write_images(tmp_path / "images/val", 10, seed=1)
    write_images(tmp_path / "more", 1, classes=("left",), seed=2)
    (tmp_path / "more/left/000.png").rename(tmp_path / "images/val/left/999.png")
    config = tiny(tmp_path / "images", "unused", recipe__batch=20)
    config["model"]["options"]["drop_path_rate"] = 0.0  # its random numbers are each process's own
    here = partial(fork, forked)
    one, result = run(config, tmp_path / "one", 1, here)
    two, result_of_two = run(config, tmp_path / "two", 2, lambda *given, **how: finish(launch(*given, **how)))
    parts = {**config, "recipe": {**config["recipe"], "accumulate": 2}}
    cut, result_of_parts = run(parts, tmp_path / "parts", 1, here)
    assert (result["processes"], result_of_two["processes"]) == (1, 2)
    for found, found_result in ((two, result_of_two), (cut, result_of_parts)):
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in one], abs=1e-5)
        assert found_result["test"]["images"] == result["test"]["images"] == 31
        assert found_result["test"]["loss"] == pytest.approx(result["test"]["loss"], abs=1e-4)
        assert (found_result["test"]["top1"], found_result["steps"]) == (result["test"]["top1"], 12)


def test_a_batch_that_processes_cannot_share_is_refused(images, tmp_path, forked):
    config = tiny(images, tmp_path / "runs", recipe__batch=25)
    status, _, said = fork(forked, config, tmp_path, processes=2)
    assert status != 0
    assert "recipe.batch: 25 images cannot be cut into 2 processes and 1 parts each" in said


def test_processes_share_what_they_could_not_read_and_take_models_with_parameters_not_used(tmp_path, forked):
    write_images(tmp_path / "images/train", 72)
    write_images(tmp_path / "images/val", 10, seed=1)
    broken = [tmp_path / f"images/train/dark/{number:03d}.png" for number in (2, 3)]
    for path in broken:
        path.write_bytes(b"")
    config = tiny(tmp_path / "images", tmp_path / "runs", only=["sdpa"], attentions=["sdpa"], recipe__epochs=2)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 2}
    config["model"] = {"library": "transformers", "name": "dinov2", "options": sizes}  # its mask token is not used
    status, _, said = fork(forked, config, tmp_path, processes=2)
    assert status == 0, said
    result = json.loads((tmp_path / "runs/sdpa-seed0/final/result.json").read_text())
    assert result["unreadable"] == ["dark/002.png", "dark/003.png"]


def test_two_processes_evaluate_as_one_does_and_one_of_them_reports(tmp_path, forked):
    write_images(tmp_path / "images/train", 32)
    write_images(tmp_path / "images/val", 7, seed=1)  # 21 images, which two do not divide
    config = tiny(tmp_path / "images", tmp_path / "runs", recipe__epochs=2, attentions=["sdpa"])
    train_all(validate_config(config))
    path = written(config, tmp_path)
    both = forked.scripts(2, "eval/classify.py", path, "--batch", "4", cwd=tmp_path)
    ended = [process.finish() for process in both]
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert [one.stdout.count("page: ") for one in ended] == [1, 0]
    records = read_records(tmp_path / "runs/records.jsonl")
    assert [(r.kind, r.label, r.status) for r in records] == [("quality", "dense", "ok"), ("quality", "sdpa", "ok")]
    alone = evaluated(validate_config({**config, "fresh": True}))
    for record in records:
        found, wanted = record.quality, alone[record.label].quality
        assert (found.images, found.trainings[0].correct) == (21, wanted.trainings[0].correct)
        assert found.calibration_error == pytest.approx(wanted.calibration_error, abs=1e-5)
        assert [m.name for m in found.trainings[0].mistakes] == [m.name for m in wanted.trainings[0].mistakes]

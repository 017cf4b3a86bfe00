"""Evaluation checks the data as training does, and pixels are standardized from 0 to 1."""

import shutil
from pathlib import Path

import pytest

from attnzoo import tasks
from attnzoo.errors import ConfigError
from attnzoo.tasks.classify.config import validate_config
from attnzoo.tasks.classify.run import differences, train_all

from .conftest import evaluated, tiny, write_images

ROOT = Path(__file__).parents[3]


def rename(images, old, new):
    for split in ("train", "val"):
        (images / split / old).rename(images / split / new)


def add(images, name):
    for split in ("train", "val"):
        write_images(images / split, 10, (name,))


def drop(images, name):
    for split in ("train", "val"):
        shutil.rmtree(images / split / name)


CHANGES = {
    "renamed": (lambda images: rename(images, "dark", "darker"), "missing classes dark, new classes darker"),
    "new": (lambda images: add(images, "right"), "new classes right"),
    "missing": (lambda images: drop(images, "left"), "missing classes left"),
    "fewer images": (lambda images: next((images / "val/left").iterdir()).unlink(), "30 test images, now 29"),
}


def test_evaluation_holds_the_datas_classes_against_the_runs(images, tmp_path):
    config = validate_config(tiny(images, tmp_path / "runs", recipe__epochs=2, only=["dense"]))
    train_all(config)
    assert evaluated(config)["dense"].status == "ok"
    kept = tmp_path / "kept"
    shutil.copytree(images, kept)
    for change, told in CHANGES.values():
        change(images)
        for check in (evaluated, train_all):
            with pytest.raises(ConfigError, match=told):
                check(config)
        shutil.rmtree(images)
        shutil.copytree(kept, images)


def test_the_order_of_classes_counts():
    before = {"classes": ["a", "b"], "images": [1, 1], "weights": None}
    assert differences(before, before) == []
    told = differences(before, {**before, "classes": ["b", "a"]})
    assert told == ["the same classes in another order: class 0 was a, now b"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data__mean": [123.675, 116.28, 103.53], "data__std": [58.395, 57.12, 57.375]},
            r"over 255 that is mean \[0\.485, 0\.456",
        ),
        ({"data__mean": [0.5, 0.5, 127.0]}, "pixels run from 0 to 1, not to 255"),
        ({"data__std": [58.4, 57.1, 57.4]}, "pixels run from 0 to 1, not to 255"),
        ({"data__mean": [-0.5, 0.5, 0.5]}, "no mean is negative"),
        ({"data__std": [0.0, 0.2, 0.2]}, "std"),
        ({"data__std": [-0.2, 0.2, 0.2]}, "std"),
        ({"data__mean": [0.5]}, "1 values for 3 channels"),
    ],
)
def test_mean_and_std_are_of_pixels_from_0_to_1(images, changes, said):
    with pytest.raises(ConfigError, match=said):
        validate_config(tiny(images, "unused", **changes))


@pytest.mark.parametrize("std", ["0.0", "-1.0", ".nan", ".inf"])
def test_the_quickstarts_images_need_a_deviation_too(std):
    with pytest.raises(ConfigError, match=r"quality\.input_std"):
        tasks.load(ROOT / "configs/bench/quickstart.yaml", [f"quality.input_std={std}"])

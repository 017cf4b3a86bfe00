"""The config: what it refuses, and what is part of a run's identity."""

import importlib.util

import pytest
import yaml

from attnzoo.errors import ConfigError, MissingExtraError
from attnzoo.tasks.classify.config import load_config, validate_config
from attnzoo.tasks.classify.run import train_all

from .conftest import ROOT, tiny


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 3}, "epochs: unknown key"),
        ({"recipe__epoch": 3}, "recipe.epoch: unknown key; did you mean 'epochs'"),
        ({"recipe__epochs": 0}, "recipe.epochs: 0 is not allowed"),
        ({"recipe__warmup_epochs": 3}, "warmup_epochs 3.0 must be fewer than epochs 3"),
        ({"recipe__accumulate": 5}, "accumulate 5 does not divide batch 24"),
        ({"data": {}}, "give an asset, a root"),
        ({"data": {"asset": "digits", "root": "x"}}, "asset excludes name, root and options"),
        ({"data__mean": [0.5]}, "mean: 1 values for 3 channels"),
        ({"data__std": [0.5] * 4}, "std: 4 values for 3 channels"),
        ({"data__std": [58.395, 57.12, 57.375]}, r"run from 0 to 1, not to 255; .* std \[0.229, 0.224, 0.225\]"),
        ({"data__channels": 1, "data__mean": [128], "data__std": [40]}, "run from 0 to 1, not to 255"),
        ({"data__std": [0.2, 0, 0.2]}, "data.std.1: 0 is not allowed"),
        ({"data__std": [0.2, -0.2, 0.2]}, "data.std.1: -0.2 is not allowed"),
        ({"data__std": [float("inf")] * 3}, "data.std.0: inf is not allowed"),
        ({"data__mean": [float("nan")] * 3}, "data.mean.0: nan is not allowed"),
        ({"data__image_size": 0}, "data.image_size: 0 is not allowed"),
        ({"data__crop_pct": 87.5}, "data.crop_pct: 87.5 is not allowed"),
        ({"data__channels": 4}, "data.channels: 4 is not allowed"),
        ({"data__name": "flowers"}, "name 'flowers' is none that timm takes"),
        ({"augment__interpolation": "cubic"}, "augment.interpolation: 'cubic' is not allowed"),
        ({"augment__scale": [1.0, 0.5]}, r"scale: \[1.0, 0.5\] must be \[least, most\]"),
        ({"augment__ratio": [1.3, 0.7]}, r"ratio: \[1.3, 0.7\] must be \[least, most\]"),
        ({"augment__scale": [8, 100]}, "parts of the image's area, at most 1"),
        ({"model__options": {"img_size": 8}}, "options.img_size cannot be set here"),
        ({"model__weights": "nowhere.pth"}, "there is no file 'nowhere.pth'"),
        ({"model__weights": "/"}, "there is no file '/' .a folder; give the file"),
        ({"model__pretrained": True, "model__weights": "x"}, "weights and pretrained exclude one another"),
        ({"model__pretrained": True, "equal_parameters": True}, "equal_parameters changes the width of the MLPs"),
        ({"augment__mixup": 0.2, "recipe__batch": 25}, "pair images"),
        ({"attentions": ["pader"]}, "attentions.0.name: .*padre"),
        ({"attentions": ["padre", "padre"]}, "labels must differ"),
        ({"attentions": [{"name": "padre", "label": "Dense!"}]}, "would share a folder"),
        ({"attentions": [{"name": "keydiff"}]}, "evicts a language model's cache"),
        ({"attentions": [{"name": "padre", "options": {"degre": 3}}]}, "attentions.0.options.degre"),
        ({"attentions": [{"name": "padre", "fused": True}]}, "attentions.0.fused"),
        ({"only": ["conv"]}, "only: \\['conv'\\] are not among the labels"),
        ({"keep_checkpoints": 1}, "keep_checkpoints: 1 is not allowed"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_bad_configs_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        validate_config(tiny("images", "runs", **changes))


def test_one_epoch_alone_has_no_warm_up_unless_it_is_asked_for():
    config = tiny("images", "runs")
    for recipe, warm in ({"epochs": 1}, 0), ({"epochs": 2}, 1), ({"epochs": 1, "warmup_epochs": 0.5}, 0.5):
        assert validate_config({**config, "recipe": recipe}).recipe.warmup_epochs == warm


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as refusal:
        validate_config(tiny("images", "runs", recipe__lr=-1, attentions=["pader"], sed=1))
    assert all(word in str(refusal.value) for word in ("3 errors", "recipe.lr", "attentions.0.name", "sed"))


def test_a_runs_identity_is_what_its_weights_hang_on():
    runs = validate_config(tiny("images", "runs")).runs()
    assert [run.name for run in runs] == ["dense-seed0", "padre-seed0"]
    dense = runs[0].hash
    same = {"attentions": [], "output": "elsewhere", "threads": 2, "data__workers": 7, "trackers": ["tensorboard"]}
    for key, value in same.items():
        assert validate_config(changed(key, value)).runs()[0].hash == dense, key
    for key, value in {"recipe__lr": 1e-4, "seeds": [1], "precision": "bf16", "augment": None}.items():
        assert validate_config(changed(key, value)).runs()[0].hash != dense, key


def test_a_runs_identity_holds_the_layers_that_are_swapped():
    """Under one label, too, by which its folder is called."""

    def swapped(**where):
        padre = {"name": "padre", "options": {"degree": 2}, "label": "padre", **where}
        return validate_config(tiny("images", "runs", attentions=[padre])).runs()[1]

    everywhere, *others = (swapped(), swapped(where="blocks.0"), swapped(where=["blocks.0", "blocks.1"]))
    assert {run.folder for run in others} == {everywhere.folder}
    assert len({everywhere.hash, *(run.hash for run in others)}) == 3
    assert everywhere.identity["attention"] == ["padre", {"degree": 2}], "runs of before are known again"
    assert swapped(where="blocks.0").hash == others[0].hash


def changed(key, value):
    config = tiny("images", "runs", **({} if key == "output" else {key: value}))
    return {**config, "output": value} if key == "output" else config


def test_attentions_have_seeds_of_their_own():
    config = validate_config(tiny("i", "r", seeds=[0, 1], attentions=[{"name": "padre", "seeds": [5]}, "conv"]))
    assert [run.name for run in config.runs()] == [
        *("dense-seed0", "dense-seed1", "padre-seed5", "conv-seed0", "conv-seed1"),
    ]


def test_the_whole_config_is_written_and_read_again(tmp_path):
    config = validate_config(tiny("images", "runs"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml", ["output=runs"]) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs/classify").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_configs_are_valid(path):
    config = load_config(path)
    assert f"train/classify.py configs/classify/{path.name}" in path.read_text()
    assert config.runs()
    assert yaml.safe_load(config.to_yaml())["name"] == config.name


@pytest.mark.parametrize(
    ("tracker", "line"), [("wandb", "run: pip install wandb$"), ("tensorboard", r"run: pip install -e '\.\[train\]'")]
)
def test_a_tracker_that_is_not_installed_comes_with_a_line_that_brings_it(tmp_path, monkeypatch, tracker, line):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else find(name))
    config = validate_config({"name": "tiny", "data": {"asset": "digits"}, "trackers": [tracker]})
    with pytest.raises(MissingExtraError, match=f"^{tracker} not installed; {line}"):
        train_all(config)

"""Trainings that are broken off: killed, on a full disk, with altered checkpoints, by a NaN."""

import json
import math
import random
import re
import resource
import shutil
import time
import warnings
from contextlib import ExitStack

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from attnzoo.errors import ConfigError, TrainingError
from attnzoo.files import locked
from attnzoo.tasks.classify import checkpoint, nonfinite, run
from attnzoo.tasks.classify.config import validate_config
from attnzoo.tasks.classify.run import train_all
from tests.forked import training
from train.classify import main as train

from .conftest import fork, tiny

KILLS = 8
EPOCHS = 10  # of 12 steps each, by batches of 8


def weights(folder, name="padre-seed0"):
    state = load_file(folder / name / "final/model.safetensors")
    averaged = load_file(folder / name / "final/averaged.safetensors")
    return {**state, **{f"averaged.{key}": value for key, value in averaged.items()}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train_here(config):
    torch.set_num_threads(1)
    train_all(validate_config(config))


def test_killed_at_random_moments_it_ends_with_the_same_weights(images, tmp_path, forked):
    """Each start is killed at a random moment: while it starts, in a step, between steps; a fourth as it writes."""
    changes = {"only": ["padre"], "checkpoint_steps": 1, "recipe__epochs": EPOCHS, "recipe__batch": 8}
    (tmp_path / "whole").mkdir()
    whole = tiny(images, tmp_path / "whole/runs", **{**changes, "data__workers": 2})
    status, _, said = fork(forked, whole, tmp_path / "whole")
    assert status == 0, said
    config = tiny(images, tmp_path / "broken", **changes)
    dice, at, in_writing = random.Random(0), [], 0
    parent = tmp_path / "broken/padre-seed0/checkpoints"
    while len(at) < KILLS:
        before = steps_done(parent)
        process = forked.start(train_here, config, prepare=training)
        starting = dice.random() < 0.2
        while not starting and process.is_alive() and steps_done(parent) == before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.5 if starting else 0.2))
        while len(at) % 4 == 3 and process.is_alive() and not in_part(parent):
            time.sleep(0.0005)
        assert process.is_alive(), "it ended before it could be killed"
        process.kill()
        at.append(steps_done(parent))
        in_writing += in_part(parent)
    assert len(set(at)) > KILLS // 2, f"the kills came too early to show anything: {at}"
    assert in_writing > 0, "no kill came while a checkpoint was being written"
    train_all(validate_config(config))
    assert same(weights(tmp_path / "whole/runs"), weights(tmp_path / "broken"))
    whole, broken = (logged(tmp_path / name) for name in ("whole/runs", "broken"))
    assert [row["epoch"] for row in whole] == list(range(1, EPOCHS + 1))
    assert broken == whole


def logged(folder):
    rows = [json.loads(line) for line in (folder / "padre-seed0/log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def steps_done(parent):
    found = checkpoint.all_checkpoints(parent) if parent.is_dir() else []
    return checkpoint.step_of(found[-1]) if found else 0


def in_part(parent):
    return any(parent.glob(f"{checkpoint.PART}{checkpoint.PREFIX}*"))


def broken_off(forked, images, tmp_path, **changes):
    """Train for some steps, and be killed; give the config and the checkpoints that are left."""
    config = tiny(images, tmp_path / "runs", only=["padre"], checkpoint_steps=1, keep_checkpoints=4, **changes)
    parent = tmp_path / "runs/padre-seed0/checkpoints"
    process = forked.start(train_here, config, prepare=training)
    while process.is_alive() and steps_done(parent) < 6:
        time.sleep(0.005)
    process.kill()
    return config, checkpoint.all_checkpoints(parent)


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model.safetensors has"


def altered(folder):
    path = folder / "optimizer.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "optimizer.bin was altered"


def without_a_file(folder):
    (folder / "progress.json").unlink()
    return "progress.json is missing"


def without_its_list(folder):
    (folder / checkpoint.MANIFEST).write_text("{")
    return "its manifest.json cannot be read"


def with_an_empty_list(folder):
    (folder / checkpoint.MANIFEST).write_text('{"files": {}}')
    return "its manifest.json lists nothing"


def test_a_checkpoint_that_is_being_removed_is_none(images, tmp_path, forked, monkeypatch):
    """A kill amid the removal must leave no folder that looks like a harmed checkpoint."""
    config, checkpoints = broken_off(forked, images, tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *given, **how: None)
    checkpoint.prune(checkpoints[0].parent, 1)
    assert checkpoint.all_checkpoints(checkpoints[0].parent) == checkpoints[-1:]
    monkeypatch.undo()
    train_all(validate_config(config))
    assert not list(checkpoints[0].parent.glob(f"{checkpoint.PART}*"))


@pytest.mark.parametrize("harm", [cut_short, altered, without_a_file, without_its_list, with_an_empty_list])
def test_a_harmed_checkpoint_is_refused_by_name_and_the_one_before_it_used(images, tmp_path, forked, harm):
    config, checkpoints = broken_off(forked, images, tmp_path)
    reason = harm(checkpoints[-1])
    with pytest.warns(UserWarning, match=re.escape(f"checkpoint {checkpoints[-1]} is refused: {reason}")):
        assert checkpoint.newest_good(checkpoints[-1].parent) == checkpoints[-2]
    with pytest.warns(UserWarning, match="is refused"):
        train_all(validate_config(config))
    (tmp_path / "whole").mkdir()
    whole = tiny(images, tmp_path / "whole", only=["padre"])
    train_all(validate_config(whole))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "runs"))


def test_refused_checkpoints_do_not_stand_in_the_way_of_new_ones(images, tmp_path, forked):
    config, checkpoints = broken_off(forked, images, tmp_path)
    for folder in checkpoints[1:]:
        altered(folder)
    with pytest.warns(UserWarning, match=f"is refused: .*; {checkpoints[0].name} is used"):
        train_all(validate_config(config))
    names = [path.name for path in checkpoints[0].parent.iterdir()]
    assert {f"refused-{folder.name}" for folder in checkpoints[1:]} <= set(names)
    assert sorted(set(names) - {f"refused-{folder.name}" for folder in checkpoints[1:]})[-1] == "step-00000012"


@pytest.mark.parametrize("harm", [altered, without_its_list])
def test_a_run_none_of_whose_checkpoints_is_whole_is_refused(images, tmp_path, forked, harm):
    config, checkpoints = broken_off(forked, images, tmp_path)
    reasons = [harm(folder) for folder in checkpoints]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none says that an earlier one is used
        with pytest.raises(ConfigError, match=r"no usable checkpoint .*; start over with resume=never") as raised:
            train_all(validate_config(config))
    for folder, reason in zip(checkpoints, reasons, strict=True):
        assert f"{folder.name}: {reason}" in str(raised.value)
        assert folder.is_dir()
    (result,) = train_all(validate_config({**config, "resume": "never"}))
    assert result["steps"] == 12


@pytest.mark.parametrize("left", [True, False])
def test_a_harmed_result_is_told_and_not_trained_anew_without_a_word(images, tmp_path, left):
    config = tiny(images, tmp_path / "runs", only=["dense"], recipe__epochs=2)
    train_all(validate_config(config))
    run = tmp_path / "runs/dense-seed0"
    (run / "final/result.json").write_text("{}")
    if left:
        with pytest.warns(UserWarning, match=r"final is refused: result.json has 2 .* again from .*step-"):
            train_all(validate_config(config))
        return
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="there is no checkpoint; start over with resume=never"):
        train_all(validate_config(config))


def test_a_checkpoint_holds_no_code(images, tmp_path, forked):
    """Whoever alters a file can alter the list of hashes: no file of a checkpoint may be run."""
    config, checkpoints = broken_off(forked, images, tmp_path)
    for name in ("optimizer.bin", "random_states_0.pkl"):
        content = torch.load(checkpoints[-1] / name, weights_only=False)
        torch.save({**content, "harm": Harm(str(tmp_path / name))}, checkpoints[-1] / name)
    (checkpoints[-1] / checkpoint.MANIFEST).unlink()
    checkpoint._seal(checkpoints[-1])
    with pytest.raises(Exception, match=r"[Ww]eights"):
        train_all(validate_config(config))
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pkl"))
    assert not list(checkpoints[-1].glob("custom_*"))


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_full_disk_is_a_clear_error_and_leaves_earlier_checkpoints(images, tmp_path, forked):
    """Files of more than 4 KiB cannot be written: a full disk as any system and any user has it."""
    config, checkpoints = broken_off(forked, images, tmp_path)
    before = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in checkpoints]
    status, _, said = fork(forked, config, tmp_path, before=limit_files)
    assert status == 1
    assert "run the same command again, without resume=never, to resume from the last checkpoint" in said
    assert re.search(r"error: \S+/step-\d+ could not be written: .+ \([\d,.]+ MB were free there\)\. Earlier", said)
    assert f"Earlier checkpoints are as they were: {checkpoints[-1]}" in said
    assert checkpoint.all_checkpoints(checkpoints[0].parent) == checkpoints
    assert not list(checkpoints[0].parent.glob(f"{checkpoint.PART}*"))
    assert before == [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in checkpoints]
    train_all(validate_config(config))


def test_nothing_stands_in_the_place_of_a_folder_that_could_not_be_written(tmp_path):
    def write_half():
        with checkpoint.writing(tmp_path / "step-1", "Nothing else was touched") as part:
            (part / "a").write_text("half")
            raise OSError("no room")

    with pytest.raises(TrainingError, match=r"step-1 could not be written: no room \(.+\). Nothing else"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_nan_stops_with_step_and_layer(images, tmp_path):
    config = tiny(images, tmp_path / "runs", recipe__lr=1e30, recipe__warmup_lr=1e30, recipe__ema_decay=None)
    where = r"dense-seed0: the loss became nan at step 2 \(epoch 1\): blocks.0.attn.qkv \(Linear\) made values that are"
    with pytest.raises(TrainingError, match=where):
        train_all(validate_config(config))


def test_the_first_layer_that_is_not_finite_is_named():
    class Breaks(nn.Module):
        def forward(self, x):
            return x / 0

    model = nn.Sequential(nn.Linear(2, 2), Breaks(), nn.ReLU())
    x = torch.ones(1, 2)
    assert nonfinite.first_layer(model, lambda: model(x)) == "1 (Breaks) made values that are not finite"
    assert nonfinite.first_layer(model, lambda: model(x * math.nan)).startswith("0 (Linear) was given values")
    with torch.no_grad():
        model[0].bias[0] = math.inf
    assert nonfinite.first_layer(model, lambda: model(x)) == "0 (Linear) has parameters that are not finite (bias)"
    model[0].weight.grad = torch.full((2, 2), math.nan)
    assert nonfinite.gradients(model) == "the gradient of 0.weight"


def test_a_run_that_is_done_is_kept_and_one_of_another_config_refused(images, tmp_path):
    config = tiny(images, tmp_path / "runs", only=["dense"])
    first = train_all(validate_config(config))
    at = (tmp_path / "runs/dense-seed0/final/model.safetensors").stat().st_mtime_ns
    assert train_all(validate_config({**config, "keep_checkpoints": 3})) == first
    assert (tmp_path / "runs/dense-seed0/final/model.safetensors").stat().st_mtime_ns == at
    other = tiny(images, tmp_path / "runs", only=["dense"], recipe__lr=0.001)
    with pytest.raises(ConfigError, match=r"holds a run of another config \(recipe\.lr 0\.003, now 0\.001\)"):
        train_all(validate_config(other))
    train_all(validate_config({**other, "resume": "never"}))
    assert (tmp_path / "runs/dense-seed0.old-1/final/model.safetensors").stat().st_mtime_ns == at


def test_a_run_that_another_process_has_is_left_to_it(images, tmp_path):
    config = validate_config(tiny(images, tmp_path / "runs"))
    with locked(tmp_path / "runs/dense-seed0"):
        assert [result["label"] for result in train_all(config)] == ["padre"]
    assert [result["label"] for result in train_all(config)] == ["dense", "padre"]


def test_runs_left_to_another_process_are_named_and_in_the_exit_status(images, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny(images, tmp_path / "runs", recipe__epochs=2)))
    with locked(tmp_path / "runs/padre-seed0"):
        assert train([str(path)]) == 1
        assert "for other processes are training them: padre-seed0. When" in capsys.readouterr().err
        with locked(tmp_path / "runs/dense-seed0"):
            assert train([str(path)]) == 1
            assert "training them: dense-seed0, padre-seed0." in capsys.readouterr().err
    assert train([str(path)]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_another_process_finished_meanwhile_is_found_at_the_end(images, tmp_path, monkeypatch, resume):
    config = validate_config(tiny(images, tmp_path / "runs", recipe__epochs=2))
    dense = train_all(config.model_copy(update={"only": ("dense",)}))[0]
    lock = ExitStack()
    lock.enter_context(locked(tmp_path / "runs/dense-seed0"))
    monkeypatch.setattr(run, "_train", lambda *given, real=run._train: (real(*given), lock.close()))
    found = train_all(config.model_copy(update={"resume": resume}))
    assert [result["label"] for result in found] == ["dense", "padre"]
    assert found[0] == dense, "what another process trained is not trained again"
    assert not list((tmp_path / "runs").glob("dense-seed0.old*"))


def test_a_run_that_another_process_broke_off_meanwhile_is_taken_on(images, tmp_path, monkeypatch):
    config = validate_config(tiny(images, tmp_path / "runs", recipe__epochs=2))
    lock = ExitStack()
    lock.enter_context(locked(tmp_path / "runs/dense-seed0"))
    monkeypatch.setattr(run, "_train", lambda *given, real=run._train: (real(*given), lock.close()))
    assert [result["label"] for result in train_all(config)] == ["dense", "padre"]

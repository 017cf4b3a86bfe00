"""Trainings that are broken off: killed, on a full disk, with altered checkpoints, by a NaN."""

import json
import multiprocessing
import random
import time

import pytest
import torch
from safetensors.torch import load_file

from attnzoo.errors import ConfigError, TrainingError
from attnzoo.training import checkpoint
from attnzoo.training.config import validate_config
from attnzoo.training.run import train_all

from .conftest import finish, launch, tiny

KILLS = 20


def weights(folder, name="padre-seed0"):
    state = load_file(folder / name / "final/model.safetensors")
    averaged = load_file(folder / name / "final/averaged.safetensors")
    return {**state, **{f"averaged.{key}": value for key, value in averaged.items()}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train_here(config):
    """Train in a child of a server that has imported everything: a fresh process without the seconds of its imports."""
    torch.set_num_threads(1)
    train_all(validate_config(config))


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["attnzoo.training.run", "attnzoo.training.loop", "timm", "accelerate", __name__])


def test_killed_at_random_moments_it_ends_with_the_same_weights(images, tmp_path):
    """Each start is killed at a random moment: while it starts, in a step, between steps or while it writes."""
    changes = {"only": ["padre"], "checkpoint_steps": 1, "recipe__epochs": 12, "data__workers": 0}
    (tmp_path / "whole").mkdir()
    status, _, said = finish(
        launch(tiny(images, tmp_path / "whole/runs", **{**changes, "data__workers": 2}), tmp_path / "whole")
    )
    assert status == 0, said
    config = tiny(images, tmp_path / "broken", **changes)
    dice, at, in_writing = random.Random(0), [], 0
    parent = tmp_path / "broken/padre-seed0/checkpoints"
    while len(at) < KILLS:
        before = steps_done(parent)
        process = SERVER.Process(target=train_here, args=(config,))
        process.start()
        while dice.random() > 0.002 and process.is_alive() and steps_done(parent) == before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.2))
        assert process.is_alive(), "it ended before it could be killed"
        process.kill()
        process.join()
        at.append(steps_done(parent))
        in_writing += any(parent.glob(f"{checkpoint.PART}*"))
    assert len(set(at)) > KILLS // 2, f"the kills came too early to show anything: {at}"
    assert in_writing > 0, "no kill came while a checkpoint was being written"
    train_all(validate_config(config))
    assert same(weights(tmp_path / "whole/runs"), weights(tmp_path / "broken"))
    whole, broken = (logged(tmp_path / name) for name in ("whole/runs", "broken"))
    assert [row["epoch"] for row in whole] == list(range(1, 13))
    assert broken == whole


def logged(folder):
    rows = [json.loads(line) for line in (folder / "padre-seed0/log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def steps_done(parent):
    found = checkpoint.all_checkpoints(parent) if parent.is_dir() else []
    return checkpoint.step_of(found[-1]) if found else 0

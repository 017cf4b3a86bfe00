"""A tiny data set of real files, and a tiny config to train on it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from attnzoo.bench.run import run
from attnzoo.tasks.classify.task import TASK

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "train/classify.py"


def write_images(folder, per_class, classes=("bright", "dark", "left"), side=8, seed=0):
    """Noise of three kinds that a small model tells apart."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = random.normal({"bright": 180, "dark": 80, "left": 130}.get(name, 130), 30, (side, side, 3))
            if name == "left":
                pixels[:, : side // 2] += 60
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / name / f"{number:03d}.png")


@pytest.fixture
def images(tmp_path):
    """A folder of 96 images to train with and 30 to test."""
    write_images(tmp_path / "images/train", 32)
    write_images(tmp_path / "images/val", 10, seed=1)
    return tmp_path / "images"


def tiny(images, output, **changes):
    """A config that trains for 12 steps in about a second."""
    config = {
        "name": "tiny",
        "model": {
            "name": "vit_tiny_patch16_224",
            "options": {"patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2, "drop_path_rate": 0.1},
        },
        "data": {"root": str(images), "image_size": 8, "workers": 0},
        "augment": {"scale": [0.5, 1.0], "color_jitter": 0.2, "re_prob": 0.2},
        "recipe": {"epochs": 3, "batch": 24, "lr": 0.003, "warmup_epochs": 1, "label_smoothing": 0.1, "ema_decay": 0.9},
        "attentions": [{"name": "padre", "options": {"degree": 2, "kernel_size": 3}, "label": "padre"}],
        "seeds": [0],
        "device": "cpu",
        "threads": 1,
        "trackers": [],
        "output": str(output),
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        here = config
        for key in path:
            here = here[key]
        here[last] = value
    return config


def written(config, folder):
    """Write a config into a folder; give its path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def evaluated(config):
    """Evaluate what was trained; give the records of quality by their labels."""
    records = run(TASK, config, "python eval/classify.py config.yaml", Console(quiet=True))
    return {record.label: record for record in records if record.kind == "quality"}


def fork(forked, config, folder, *, processes=1, **how):
    """Run ``train/classify.py`` on a config in so many forked processes; give the worst status, output and errors."""
    path = written(config, folder)
    if processes == 1:
        ended = [forked.script("train/classify.py", path, cwd=folder, **how).finish()]
    else:
        ended = [child.finish() for child in forked.scripts(processes, "train/classify.py", path, cwd=folder, **how)]
    status = next((one.returncode for one in ended if one.returncode != 0), 0)
    return status, "".join(one.stdout for one in ended), "".join(one.stderr for one in ended)


def launch(config, folder, *, processes=1, **how):
    """Start ``train/classify.py`` on a config as users do, in so many processes; give the Popen."""
    path = written(config, folder)
    command = [sys.executable, str(SCRIPT), str(path)]
    if processes > 1:
        run = "torch.distributed.run"
        command = [sys.executable, "-m", run, "--standalone", f"--nproc_per_node={processes}", str(SCRIPT), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, **how
    )


def finish(process):
    """Wait for the end; give status, output and errors."""
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err

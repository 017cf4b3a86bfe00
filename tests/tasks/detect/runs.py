"""Small data and small configs, so that a training takes seconds."""

import json
import pprint

import numpy as np
from PIL import Image

from attnzoo.tasks.detect import mmcv_ext
from tests.tasks.detect.models import mmdet_config

SIDE = 64


def make_data(folder, images=8, seed=0, lower=48):
    """Bright squares on noise, one or two per image, as COCO has it: the same images to train and to test with.

    Every third image is of another height, so that batches are padded.
    """
    random = np.random.default_rng(seed)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        height = SIDE if number % 3 else lower
        pixels = random.integers(0, 60, (height, SIDE, 3), dtype=np.uint8)
        for _ in range(1 + number % 2):
            side = int(random.integers(14, 30))
            x, y = int(random.integers(0, SIDE - side)), int(random.integers(0, height - side))
            pixels[y : y + side, x : x + side] = 220
            box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0, "category_id": 1}
            content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": number, **box})
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": height})
    (folder / "boxes.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def make_config(path, data, attention=None, epochs=4, flips=0.5, **more):
    """Write a config of the small DAB-DETR on that data."""
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances")
    read = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    read.append({"type": "Resize", "scale": (SIDE, SIDE), "keep_ratio": True})
    dataset = {
        "type": "CocoDataset",
        "data_root": f"{data}/",
        "ann_file": "boxes.json",
        "data_prefix": {"img": "images/"},
        "metainfo": {"classes": ("square",)},
    }
    loader = {"batch_size": 2, "num_workers": 0}
    test = {
        **loader,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {**dataset, "test_mode": True, "pipeline": [*read, {"type": "PackDetInputs", "meta_keys": keys}]},
    }
    flip = {"type": "RandomFlip", "prob": flips}
    model = mmdet_config("DABDETR")
    model["bbox_head"] |= {"num_classes": 1, "sync_cls_avg_factor": True}
    if attention is not None:
        model["attention"] = attention
    content = {
        "default_scope": "mmdet",
        "custom_imports": {"imports": ["attnzoo.tasks.detect.model"]},
        "data_root": f"{data}/",
        "model": model,
        "train_dataloader": {
            **loader,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "dataset": {**dataset, "pipeline": [*read, flip, {"type": "PackDetInputs"}]},
        },
        "val_dataloader": test,
        "test_dataloader": test,
        "val_evaluator": {"type": "CocoMetric", "metric": "bbox"},
        "test_evaluator": {"type": "CocoMetric", "metric": "bbox"},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 2e-3}},
        "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": epochs, "val_interval": 2},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 2}},
        "custom_hooks": [{"type": "SeedEachEpoch"}],
        "randomness": {"seed": 0},
        "log_level": "WARNING",
        **more,
    }
    lines = (f"{key} = {pprint.pformat(value, width=110, sort_dicts=False)}" for key, value in content.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_it_is(text, **style):
    """In the place of yapf's `FormatCode`."""
    return text, True


def prepare():
    """Import what the scripts of detection need, and have configs saved as in `configs_as_they_are`."""
    from yapf.yapflib import yapf_api

    for name in ("mmengine.runner", "mmdet.apis", "attnzoo.tasks.detect.model"):
        mmcv_ext.load(name)
    yapf_api.FormatCode = as_it_is

"""Where images come from, in what order, how they are shared between processes, and what becomes of broken ones."""

import itertools
import shutil
import warnings

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from attnzoo.errors import ConfigError, TrainingError
from attnzoo.tasks.classify.config import DataConfig, validate_config
from attnzoo.tasks.classify.loading import (
    Batches,
    Draw,
    StreamImages,
    TestImages,
    TestStream,
    TrainImages,
    Unreadable,
    check_classes,
    share_of,
    transforms,
)
from attnzoo.tasks.classify.run import train_all
from attnzoo.tasks.classify.sources import NO_CLASS, Stream, open_splits

from .conftest import tiny, write_images


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(8, 60),
    batch=st.sampled_from([4, 8]),
    world=st.sampled_from([1, 2, 4]),
    repeats=st.integers(1, 3),
    first=st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_a_batch_is_the_same_whatever_the_processes_and_the_first_step(images, batch, world, repeats, first, seed):
    epochs = 3
    whole = list(Batches(images, batch, epochs, seed, repeats))
    first = min(first, len(whole))
    shares = [list(Batches(images, batch, epochs, seed, repeats, first, rank, world)) for rank in range(world)]
    assert [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == [
        sorted(b) for b in whole[first:]
    ]
    assert all(len(part) == batch // world for share in shares for part in share)
    assert len(whole) == images // batch * epochs
    for draws in Batches(images, images, epochs, seed, repeats):  # an epoch each
        assert len(draws) == len(set(draws)) == images
        assert len({draw.image for draw in draws}) == -(-images // repeats)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(d.image for d in draws) for seed in range(3) for draws in Batches(50, 50, 3, seed)]
    assert len(orders) == 9
    assert len(set(orders)) == 9


@settings(max_examples=40, deadline=None)
@given(images=st.integers(1, 40), world=st.integers(1, 5), batch=st.integers(1, 7))
def test_every_test_image_is_counted_once(images, world, batch):
    source = Numbers(images)
    loaders = [share_of(TestImages(source, torch.as_tensor, (1,)), batch, 0, rank, world) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    counted = [int(i) for loader in loaders for _, y, index in loader for i in index[y != NO_CLASS]]
    assert sorted(counted) == list(range(images))


class Numbers:
    """Images that are their index."""

    classes = None

    def __init__(self, images, broken=()):
        self.images, self.broken = images, set(broken)

    def __len__(self):
        return self.images

    def read(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return np.array([index], dtype=np.float32), index % 3

    def name(self, index):
        return f"{index}.png"


def test_the_next_image_stands_in_for_one_that_cannot_be_read():
    images = TrainImages(Numbers(5, broken=[3, 4]), torch.as_tensor, seed=0)
    assert [(float(x), y, bad) for x, y, bad in map(images.__getitem__, (Draw(0, 2), Draw(0, 3), Draw(1, 4)))] == [
        (2.0, 2, -1),
        (0.0, 0, 3),
        (0.0, 0, 4),
    ]
    with pytest.raises(TrainingError, match=r"2\.png and those after it cannot be read"):
        TrainImages(Numbers(3, broken=[0, 1, 2]), torch.as_tensor, seed=0)[Draw(0, 2)]


def test_unreadable_images_are_counted_once_and_stop_at_more_than_one_in_a_hundred():
    found = Unreadable(Numbers(200), 200)
    with pytest.warns(UserWarning, match="image 7.png cannot be read"):
        found.note([-1, 7, 7])
    found.note([7, -1])
    with pytest.warns(UserWarning, match="image 8.png"):
        found.note([8])
    again = Unreadable(Numbers(200), 200)
    again.found = set(found.found)
    with pytest.warns(UserWarning, match="9.png"), pytest.raises(TrainingError, match=r"3 of 200 .* 7\.png, 8\.png, 9"):
        again.note([9])


def test_corrupt_files_are_skipped_counted_and_listed(tmp_path):
    write_images(tmp_path / "images/train", 72)  # nine whole batches
    write_images(tmp_path / "images/val", 34, seed=1)
    train, test = tmp_path / "images/train/dark/003.png", tmp_path / "images/val/left/001.png"
    for path in (train, test):
        path.write_bytes(path.read_bytes()[:40])
    config = tiny(tmp_path / "images", tmp_path / "runs", only=["dense"], recipe__epochs=2)
    with pytest.warns(UserWarning, match="003.png cannot be read"):
        (result,) = train_all(validate_config(config))
    assert result["unreadable"] == ["dark/003.png"]
    assert (result["test"]["images"], result["test"]["unreadable"]) == (101, 1)
    for path in sorted((tmp_path / "images/train").rglob("*.png"))[1:6:2]:  # none of those that are read before work
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(TrainingError, match="of 216 training images cannot be read, more than 1%"),
    ):
        train_all(validate_config({**config, "output": str(tmp_path / "others")}))


def test_test_images_that_cannot_be_read_are_not_many(tmp_path):
    write_images(tmp_path / "images/train", 32)
    write_images(tmp_path / "images/val", 34, seed=1)
    paths = sorted((tmp_path / "images/val").rglob("*.png"))
    for at in (50, 101):  # the two of 102 that are not read before work
        paths[at].write_bytes(b"")
    config = tiny(tmp_path / "images", tmp_path / "runs", only=["dense"], recipe__epochs=2)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(TrainingError, match="2 of 102 test images cannot be read, more than 1%"),
    ):
        train_all(validate_config(config))


@pytest.mark.parametrize(("split", "images_of"), [("train", 96), ("validation", 30)])
def test_what_the_first_look_cannot_read_is_told_and_refused_by_name_before_work(
    images, tmp_path, capsys, split, images_of
):
    folder = images / ("val" if split == "validation" else split)
    first, second = (folder / "dark" / f"00{number}.png" for number in (0, 1))
    config = tiny(images, tmp_path / "runs", only=["dense"], recipe__epochs=2)
    first.write_bytes(first.read_bytes()[:40])
    found = open_splits(validate_config(config).data)
    (line,) = found.left_out
    assert line.startswith(f"{split}: cannot be read and is left out: dark/000.png: ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = train_all(validate_config(config))  # one is tolerated, however few there are
    assert "dark/000.png" in capsys.readouterr().err
    assert (result["unreadable"], result["test"]["unreadable"]) == (
        (["dark/000.png"], 0) if split == "train" else ([], 1)
    )
    second.write_bytes(b"")
    told = f"of {images_of} images of '{split}', 2 cannot be read, more than 1%. .*: dark/000.png: .*; dark/001.png: "
    with pytest.raises(ConfigError, match=told):
        train_all(validate_config({**config, "output": str(tmp_path / "others")}))
    assert not (tmp_path / "others").exists()


def test_augmentation_hangs_on_the_image_and_the_epoch_alone(images):
    config = validate_config(tiny(images, "unused"))
    splits = open_splits(config.data)
    train, _ = transforms(config.data, config.augment)

    def look(draws, seed=0):
        loaded = TrainImages(splits.train, train, seed)
        return torch.stack([loaded[draw][0] for draw in draws])

    draws = [Draw(0, 1), Draw(0, 2), Draw(1, 1), Draw(0, 1, 1)]
    seen = look(draws)
    assert torch.equal(seen, look(draws[::-1]).flip(0))
    assert len({tuple(image.flatten().tolist()) for image in (*seen, *look(draws[:1], seed=1))}) == 5


def data(**keys):
    return DataConfig(**{"image_size": 8, **keys})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"root": "nowhere"}, "data.root: there is no folder 'nowhere'"),
        ({"root": "images", "test": "held_out"}, "has no folder 'held_out'; it has \\['train', 'val'\\]"),
        ({"root": "images", "classes": 4}, "data.classes: 4 asked for, but the data have 3"),
        ({"root": "images", "train_images": 97}, "data.train_images: 97 asked for, but there are 96"),
        ({"root": "odd"}, "the classes of 'train' and 'validation' differ: dark, left, other"),
        ({"root": "empty"}, "Found 0 images"),
        ({"name": "torch/cifar11", "root": "images"}, "Unknown torchvision dataset cifar11"),
        ({"name": "torch/cifar10", "root": "images"}, "Dataset not found"),
    ],
)
def test_data_that_are_not_there_are_a_clear_error(images, tmp_path, monkeypatch, keys, said):
    write_images(tmp_path / "odd/train", 2)
    write_images(tmp_path / "odd/val", 2, classes=("bright", "other"))
    for split in ("train", "val"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        open_splits(data(**keys))


def test_a_hugging_face_data_set_is_read(images, tmp_path):
    splits = open_splits(data(name=f"hfds/{images}", root=tmp_path / "cache"))
    assert (splits.train_images, splits.classes, len(splits.test)) == (96, 3, 30)
    image, target = splits.train.read(0)
    assert (image.size, image.mode, target) == ((8, 8), "RGB", 0)


def test_a_stream_is_trained_on_and_goes_on(images, tmp_path):
    config = tiny(images, tmp_path / "runs", only=["dense"], checkpoint_steps=3, keep_checkpoints=9)
    config["data"] = {
        **config["data"],
        **{"name": f"hfids/{images}", "root": str(tmp_path / "cache"), "classes": 3},
        **{"options": {"num_samples": 96}, "test_options": {"num_samples": 30}},
    }
    (whole,) = train_all(validate_config(config))
    assert (whole["steps"], whole["test"]["images"]) == (12, 30)
    folder = tmp_path / "runs/dense-seed0"
    first = load_file(folder / "final/model.safetensors")
    for name in ("final", *(f"checkpoints/step-{step:08d}" for step in (4, 6, 8, 9, 12))):
        shutil.rmtree(folder / name)  # so that it goes on from step 3, within an epoch
    train_all(validate_config(config))
    again = load_file(folder / "final/model.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)
    with pytest.raises(ConfigError, match="2 processes would not count a stream's images once each"):
        open_splits(validate_config(config).data, processes=2)


GOOD = Image.new("RGB", (8, 8), (10, 20, 30))
WIDE = Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32))
BAD = {
    "no label": ((GOOD, None), "it has no class (its label is None)"),
    "label -1": ((GOOD, -1), "it has no class (its label is -1)"),
    "32-bit pixels": ((WIDE, 1), "its pixels are 32-bit integers"),
    "pixels beyond 1": ((Image.fromarray(np.full((8, 8), 3, dtype=np.float32)), 1), "floating-point numbers"),
}


def as_tensor(image):
    return torch.as_tensor(np.asarray(image))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_a_stream_has_and_cannot_be_used_is_stood_in_for_and_told(bad, at):
    images = [(GOOD, 0), (Image.new("RGB", (8, 8)), 2)]
    images.insert(at, BAD[bad][0])
    train = list(StreamImages(Stream(images, "RGB"), as_tensor, seed=0, rank=0))
    assert [target for _, target, _, _ in train] == [[0, 0, 2], [0, 2, 2], [0, 2, 2]][at]
    assert [place for _, _, place, _ in train if place >= 0] == [at]
    test = list(TestStream(Stream(images, "RGB"), as_tensor, (8, 8, 3)))
    assert [number for _, _, number, _ in test] == [0, 1, 2]
    assert [number for _, target, number, _ in test if target == NO_CLASS] == [at]
    for part in (train, test):
        assert [BAD[bad][1] in reason for _, _, _, reason in part].count(True) == 1


def test_a_stream_without_an_image_that_can_be_used_is_not_read_to_its_end():
    for images in ([(GOOD, None)] * 3, itertools.repeat((GOOD, -1))):
        with pytest.raises(TrainingError, match=r"(3|100) images of the stream, .*: it has no class"):
            list(StreamImages(Stream(images, "RGB"), as_tensor, seed=0, rank=0))


def test_a_stream_with_a_label_that_is_not_there_is_trained_on_and_tested(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "data").mkdir()
    for split, label in (("train", -1), ("validation", None)):
        labels = [0, 1] * 60
        labels[7] = label
        rows = {"image": [GOOD, Image.new("RGB", (8, 8))] * 60, "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"data/{split}.parquet")
    config = tiny(tmp_path, tmp_path / "runs", only=["dense"], recipe__epochs=2)
    config["data"] = {
        **config["data"],
        **{"name": f"hfids/{tmp_path / 'data'}", "root": str(tmp_path / "cache"), "classes": 2},
        "options": {"num_samples": 120},
    }
    with (
        pytest.warns(UserWarning, match=r"training image \d+ cannot be read: it has no class \(its label is -1\)"),
        pytest.warns(UserWarning, match=r"test image 7 cannot be read: it has no class \(its label is None\)"),
    ):
        (result,) = train_all(validate_config(config))
    assert len(result["unreadable"]) == 1
    assert (result["steps"], result["test"]["images"], result["test"]["unreadable"]) == (10, 119, 1)


@pytest.mark.parametrize("target", [-1, 3])
def test_a_class_that_is_not_there_is_refused(target):
    check_classes(torch.tensor([0, 2]), 3)
    with pytest.raises(TrainingError, match=f"an image has class {target}, but there are 3 classes, 0 to 2"):
        check_classes(torch.tensor([0, target, 2]), 3)


def test_digits_are_grey_images_of_ten_classes():
    splits = open_splits(data(asset="digits", channels=1))
    assert (splits.train_images, len(splits.test), splits.classes) == (1200, 597, 10)
    image, _ = splits.test.read(0)
    assert isinstance(image, Image.Image)
    assert (image.size, image.mode) == ((8, 8), "L")

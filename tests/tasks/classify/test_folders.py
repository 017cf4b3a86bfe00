"""Folders of images: what is a class, what is read, and what is left out and told."""

import os

import datasets
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from attnzoo.errors import ConfigError
from attnzoo.tasks.classify.config import DataConfig, validate_config
from attnzoo.tasks.classify.run import train_all
from attnzoo.tasks.classify.sources import open_splits

from .conftest import evaluated, tiny

SPLITS = ("train", "val")


def put(root, *paths):
    """Write an image at each path below both splits."""
    for split in SPLITS:
        for path in paths:
            file = root / split / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 99, "uint8")).save(file)


def opened(root, **keys):
    return open_splits(DataConfig(root=root, image_size=8, **keys))


def read(splits):
    """Names and classes of what is read, the same in both splits."""
    both = []
    for source in (splits.train, splits.test):
        both.append([(source.name(at), splits.names[source.read(at)[1]]) for at in range(len(source))])
    assert both[0] == both[1]
    return both[0]


@pytest.mark.parametrize("name", ["", "folder", "torch/image_folder"])
@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (["cat/indoor/1.png", "cat/2.png", "dog/indoor/1.png", "dog/outdoor/1.png"], "cat cat dog dog"),
        (["cat/images/1.png", "dog/images/1.png"], "cat dog"),
        (["a/deep/down/here/1.png", "b/1.png", "b/b/1.png"], "a b b"),
    ],
)
def test_the_class_is_the_first_folder_under_the_split(tmp_path, paths, classes, name):
    put(tmp_path, *paths)
    found = opened(tmp_path, name=name)
    assert dict(read(found)) == dict(zip(paths, classes.split(), strict=True))
    assert found.names == tuple(sorted(set(classes.split())))
    assert found.left_out == ()


def test_classes_are_in_the_order_of_timms_folders(tmp_path):
    put(tmp_path, *(f"{name}/1.png" for name in ("n10", "n2", "Zebra", "apple", "Apple")))
    assert opened(tmp_path).names == ("Apple", "apple", "n2", "n10", "Zebra")


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tif", "TIFF", "gif", "ppm", "jfif", "jp2", "ico", "tga", "JPG"])
def test_every_format_that_pil_decodes_is_read(tmp_path, suffix):
    put(tmp_path, "cat/1.png", f"dog/1.{suffix}")
    found = opened(tmp_path)
    assert found.names == ("cat", "dog")
    assert dict(read(found)) == {"cat/1.png": "cat", f"dog/1.{suffix}": "dog"}


def test_what_is_left_out_is_counted_and_told(tmp_path):
    put(tmp_path, "cat/1.png", "dog/1.png", "stray.png", ".ipynb_checkpoints/a.png", ".ipynb_checkpoints/b.png")
    put(tmp_path, "__MACOSX/cat/1.png", "cat/.ipynb_checkpoints/1.png", "dog/._1.png")
    for name in ("notes.txt", "1.json", "2.json", "3.json", "no_ending"):
        (tmp_path / "train/cat" / name).touch()
    found = opened(tmp_path)
    assert found.names == ("cat", "dog")
    assert read(found) == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    train, test = found.left_out
    assert train.startswith("train: left out ")
    assert "5 hidden or left behind by a tool (.ipynb_checkpoints, __MACOSX, cat/.ipynb_checkpoints, ...)" in train
    assert "1 beside the class folders, so of no class (stray.png)" in train
    assert "5 without the ending of an image format that PIL reads (cat/1.json, cat/2.json, cat/3.json, ...)" in train
    assert test.startswith("validation: left out ")
    assert "json" not in test


def test_training_and_evaluation_both_tell_what_is_left_out(tmp_path, capsys):
    for number in range(24):
        put(tmp_path / "images", f"cat/{number}.png", f"dog/inner/{number}.bmp")
    put(tmp_path / "images", "stray.png")
    config = validate_config(tiny(tmp_path / "images", tmp_path / "runs", only=["dense"]))
    trained = Console(record=True, width=300)
    (result,) = train_all(config, trained)
    evaluated(config)
    for told in (trained.export_text(), capsys.readouterr().err.replace("\n", " ")):
        assert "train: left out 1 beside the class folders" in told
        assert "validation: left out 1 beside the class folders" in told
    assert [line.split(":")[0] for line in result["left_out"]] == ["train", "validation"]
    assert result["test"]["images"] == 48


def test_loops_of_links_are_not_followed_twice(tmp_path):
    put(tmp_path, *(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(4)))
    for split in SPLITS:
        (tmp_path / split / "cat/loop").symlink_to("..", target_is_directory=True)
        (tmp_path / split / "cat/self").symlink_to("self")
        (tmp_path / split / "dog/up").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / split / "again").symlink_to(tmp_path / split, target_is_directory=True)
    found = opened(tmp_path)
    assert len(read(found)) == 8
    assert "3 linked to a folder that is read anyway (again, cat/loop, dog/up)" in found.left_out[0]


def test_links_to_images_elsewhere_are_followed_once(tmp_path):
    put(tmp_path / "pool", "cat/1.png", "cat/more/2.png", "dog/1.png")
    (tmp_path / "pool/train/cat/more/back").symlink_to(tmp_path / "pool/train/cat", target_is_directory=True)
    for split in SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "cat").symlink_to(tmp_path / "pool/train/cat", target_is_directory=True)
        (tmp_path / split / "dog").mkdir()
        (tmp_path / split / "dog/file.png").symlink_to(tmp_path / "pool/train/dog/1.png")
        (tmp_path / split / "dog/twice").symlink_to(tmp_path / "pool/train/dog", target_is_directory=True)
    found = opened(tmp_path)
    assert [name for name, _ in read(found)] == ["cat/1.png", "cat/more/2.png", "dog/file.png", "dog/twice/1.png"]
    assert "1 linked to a folder that is read anyway (cat/more/back)" in found.left_out[0]
    (tmp_path / "train/third").symlink_to(tmp_path / "pool/train/cat", target_is_directory=True)
    with pytest.raises(ConfigError, match=r"third' leads to .*pool/train/cat', whose images are of another class"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("cat", "dog", "shared"),
    [
        ("cat/more", "dog/more", "pool"),
        ("cat", "dog/deep/more", "pool"),
        ("cat/more", "dog", "pool"),
        ("cat/more", "dog/more", "pool/inner"),
    ],
)
def test_links_of_two_classes_to_one_folder_are_an_error(tmp_path, cat, dog, shared):
    """Its images would be of the first class alone."""
    put(tmp_path / "own", *(f"{link.split('/')[0]}/own.png" for link in (cat, dog) if "/" in link))
    put(tmp_path, "pool/1.png", "pool/inner/2.png")
    for split in SPLITS:
        for link, place in ((cat, shared), (dog, "pool")):
            target = tmp_path / "own" / split / link
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(tmp_path / split / place, target_is_directory=True)
    said = rf"{dog}\S*' leads to .*/{shared}', whose images are of another class .*'cat'"
    with pytest.raises(ConfigError, match=said):
        opened(tmp_path / "own")


def test_links_of_one_class_to_one_folder_are_followed_once(tmp_path):
    put(tmp_path / "own", "cat/own.png", "dog/own.png")
    put(tmp_path, "pool/1.png")
    for split in SPLITS:
        for link in ("cat/a", "cat/b"):
            (tmp_path / "own" / split / link).symlink_to(tmp_path / split / "pool", target_is_directory=True)
    found = opened(tmp_path / "own")
    assert [name for name, _ in read(found)] == ["cat/a/1.png", "cat/own.png", "dog/own.png"]
    assert "1 linked to a folder that is read anyway (cat/b)" in found.left_out[0]


@pytest.mark.parametrize("paths", [["cat/1.png"], ["cat/images/1.png", ".hidden/1.png"], ["cat/1.png", "2.png"]])
def test_fewer_than_two_classes_are_an_error(tmp_path, paths):
    put(tmp_path, *paths)
    with pytest.raises(ConfigError, match=r"there is one class alone \(cat\)"):
        opened(tmp_path)


def hugging_face(folder, labels, names):
    """A data set of theirs, in Parquet."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [Image.new("RGB", (8, 8))] * len(labels), "label": labels}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return f"hfds/{folder}"


def test_fewer_than_two_classes_of_another_reader_are_an_error_too(tmp_path):
    name = hugging_face(tmp_path / "one", [0, 0], ["cat"])
    with pytest.raises(ConfigError, match=r"there is one class alone \(cat\)"):
        opened(tmp_path / "cache", name=name)


def test_labels_that_are_not_there_are_an_error_before_any_work(tmp_path):
    name = hugging_face(tmp_path / "two", [0, 1, -1], ["cat", "dog"])
    with pytest.raises(ConfigError, match=r"3 images of 'train', 1 cannot be used\. .*it has no class"):
        opened(tmp_path / "cache", name=name)
    with pytest.raises(ConfigError, match=r"'train', .* cannot be read: KeyError: 'kind'"):
        opened(tmp_path / "cache", name=name, classes=2, options={"target_key": "kind"})


def test_a_class_that_would_vanish_is_an_error(tmp_path):
    put(tmp_path, "cat/1.png", "dog/1.png")
    for split in SPLITS:
        (tmp_path / split / "fox").mkdir()
    with pytest.raises(ConfigError, match=r"train/fox' holds no image that can be read \(0 other files"):
        opened(tmp_path)
    (tmp_path / "train/fox/1.heic").touch()
    with pytest.raises(ConfigError, match=r"train/fox' holds no image that can be read \(1 other files"):
        opened(tmp_path)
    (tmp_path / "train/fox/1.heic").unlink()
    (tmp_path / "train/fox").rmdir()
    (tmp_path / "train/fox").symlink_to("gone")
    with pytest.raises(ConfigError, match=r"train/fox' is a broken link"):
        opened(tmp_path)


def test_a_class_map_numbers_the_first_folders(tmp_path):
    put(tmp_path, "cat/in/1.png", "dog/1.png", "fox/1.png")
    found = opened(tmp_path, options={"class_map": {"dog": 0, "cat": 1}})
    assert found.names == ("dog", "cat")
    assert read(found) == [("cat/in/1.png", "cat"), ("dog/1.png", "dog")]
    assert "1 of classes that class_map does not name (fox)" in found.left_out[0]
    with pytest.raises(ConfigError, match=r"it must number its 2 classes from 0 to 1"):
        opened(tmp_path, options={"class_map": {"dog": 0, "cat": 5}})
    with pytest.raises(ConfigError, match=r"class_map: 'none\.txt' cannot be read"):
        opened(tmp_path, options={"class_map": "none.txt"})
    with pytest.raises(ConfigError, match=r"data\.options: load_bytes: for a folder of images"):
        opened(tmp_path, options={"load_bytes": True})


def test_an_archive_is_not_taken_for_both_splits(tmp_path):
    (tmp_path / "images.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"images\.tar'; it is a file: unpack it"):
        opened(tmp_path / "images.tar")


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    put(tmp_path, "cat/1.png", "dog/1.png")
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if os.fspath(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"train/dog' cannot be read: Permission denied"):
        opened(tmp_path)

"""Images of any of PIL's modes are trained on and tested with their range kept, or refused by name."""

import warnings

import numpy as np
import pytest
from PIL import Image

from attnzoo.errors import ConfigError, TrainingError
from attnzoo.tasks.classify.config import DataConfig, validate_config
from attnzoo.tasks.classify.run import train_all
from attnzoo.tasks.classify.sources import open_splits

from .conftest import evaluated, tiny, write_images

RAMP = np.linspace(0, 1, 64).reshape(8, 8)  # black to white
SIXTEEN = np.rint(RAMP * 65535).astype("uint16")


def splits(tmp_path, save, channels=3, suffix="png", images=2):
    """Open data of two classes, every image written by `save`."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(images):
                save(tmp_path / split / name / f"{number}.{suffix}")
    return open_splits(DataConfig(root=tmp_path, image_size=8, channels=channels))


def wide_pgm(path):
    path.write_bytes(b"P5 8 8 65535\n" + SIXTEEN.astype(">u2").tobytes())


def twelve_bit_tiff(path):
    """Pixels of 12 bits, packed; PIL reads such files and writes none."""
    values = np.rint(RAMP * 4095).astype(int).reshape(8, 8)
    bits = "".join(f"{value:012b}" for value in values.ravel())
    pixels = int(bits, 2).to_bytes(len(bits) // 8, "big")
    fields = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(pixels))]
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\x04\0" + b"\1\0\0\0" + value.to_bytes(4, "little") for tag, value in fields
    )
    directory = len(fields).to_bytes(2, "little") + entries + bytes(4)
    path.write_bytes(b"II*\0" + (8 + len(pixels)).to_bytes(4, "little") + pixels + directory)


DEEP = {
    "16-bit PNG": ("png", lambda path: Image.fromarray(SIXTEEN).save(path)),
    "16-bit TIFF": ("tif", lambda path: Image.fromarray(SIXTEEN).save(path)),
    "16-bit TIFF, big-endian": ("tiff", lambda path: Image.fromarray(SIXTEEN.astype(">u2")).save(path)),
    "16-bit PGM": ("pgm", wide_pgm),
    "12-bit TIFF": ("tif", twelve_bit_tiff),
    "float TIFF": ("tif", lambda path: Image.fromarray(RAMP.astype("float32")).save(path)),
    "float PFM": ("pfm", lambda path: Image.fromarray(RAMP.astype("float32")).save(path)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", DEEP)
def test_gray_images_of_more_than_8_bits_keep_their_range(tmp_path, kind, channels):
    suffix, save = DEEP[kind]
    found = splits(tmp_path, save, channels, suffix)
    for source in (found.train, found.test):
        image, _ = source.read(0)
        assert image.mode == ("L" if channels == 1 else "RGB")
        pixels = np.asarray(image).reshape(8, 8, -1)
        assert np.abs(pixels - 255 * RAMP[..., None]).max() <= 0.51


def integers(path):
    Image.fromarray((RAMP * 70000).astype("int32")).save(path)


def celsius(path):
    Image.fromarray((RAMP * 60 - 20).astype("float32")).save(path)


def holes(path):
    Image.fromarray(np.where(RAMP > 0.5, np.nan, RAMP).astype("float32")).save(path)


@pytest.mark.parametrize("save", [integers, celsius, holes])
def test_pixels_of_an_unknown_range_are_refused_by_name_before_any_work(tmp_path, save):
    with pytest.raises(ConfigError, match=r"4 images of 'train', 4 cannot be used\. cat/0\.tif: its pixels are"):
        splits(tmp_path, save, suffix="tif")


def test_the_test_images_are_looked_at_before_training_too(tmp_path):
    write_images(tmp_path / "train", 4, classes=("cat", "dog"))
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        integers(tmp_path / "val" / name / "0.tif")
    with pytest.raises(ConfigError, match=r"'validation', 2 cannot be used\. cat/0\.tif: .* 32-bit integers"):
        open_splits(DataConfig(root=tmp_path, image_size=8))


COLOR = np.stack([np.rint(255 * RAMP), np.full((8, 8), 30), np.full((8, 8), 200)], axis=-1).astype("uint8")
GRAY = np.rint(255 * RAMP).astype("uint8")
ALPHA = np.where(RAMP > 0.5, 255, 0).astype("uint8")


def palette(path):
    """Of as many colors as pixels, half of them transparent."""
    image = Image.fromarray(np.arange(64, dtype="uint8").reshape(8, 8)).convert("P")
    image.putpalette(COLOR.reshape(-1, 3).tobytes())
    image.save(path, transparency=ALPHA.tobytes())


def cmyk(path):
    Image.merge("CMYK", [Image.fromarray(255 - COLOR[..., at]) for at in range(3)] + [Image.new("L", (8, 8))]).save(
        path
    )


SHALLOW = {
    "1": ("png", lambda path: Image.fromarray(RAMP > 0.5).save(path), np.where(RAMP > 0.5, 255, 0)),
    "L": ("bmp", lambda path: Image.fromarray(GRAY).save(path), GRAY),
    "LA": ("png", lambda path: Image.fromarray(np.stack([GRAY, ALPHA], -1)).save(path), GRAY),
    "P": ("png", palette, COLOR),
    "RGBA": ("tif", lambda path: Image.fromarray(np.dstack([COLOR, ALPHA])).save(path), COLOR),
    "CMYK": ("tif", cmyk, COLOR),
}


@pytest.mark.parametrize("mode", SHALLOW)
def test_images_of_8_bits_and_less_are_as_they_look_without_their_alpha(tmp_path, mode):
    suffix, save, wanted = SHALLOW[mode]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = splits(tmp_path, save, 3, suffix, images=1)
        with Image.open(tmp_path / f"train/cat/0.{suffix}") as image:
            assert image.mode == mode
        pixels = np.asarray(found.train.read(0)[0])
    assert np.array_equal(pixels, wanted if wanted.ndim == 3 else np.repeat(wanted[..., None], 3, axis=-1))


def test_a_model_learns_from_16_bit_images_and_is_tested_with_the_same_pixels(tmp_path):
    """Clipped, these two classes are white alike."""
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 10)):
        for name, middle in (("bright", 50000), ("dark", 8000)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.normal(middle, 2000, (8, 8)).astype("uint16")
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    config = validate_config(tiny(tmp_path / "images", tmp_path / "runs", only=["dense"], augment=None))
    (result,) = train_all(config)
    assert result["test"]["top1"] == result["test"]["images"] == 20
    assert evaluated(config)["dense"].quality.accuracy == 1


def test_one_refused_image_among_many_is_counted_as_unreadable_with_its_reason(tmp_path):
    write_images(tmp_path / "images/train", 80)
    write_images(tmp_path / "images/val", 34, seed=1)
    integers(tmp_path / "images/train/dark/odd.tif")
    config = tiny(tmp_path / "images", tmp_path / "runs", only=["dense"], recipe__epochs=2, recipe__batch=48)
    with pytest.warns(UserWarning, match=r"image dark/odd\.tif cannot be read: its pixels are 32-bit integers"):
        (result,) = train_all(validate_config(config))
    assert result["unreadable"] == ["dark/odd.tif"]


def test_labels_beyond_the_classes_are_an_error_and_no_traceback(tmp_path):
    """A stream does not say what classes it has: `classes` is taken at its word until an image contradicts it."""
    write_images(tmp_path / "images/train", 16)
    write_images(tmp_path / "images/val", 4, seed=1)
    config = tiny(tmp_path / "images", tmp_path / "runs", only=["dense"])
    config["data"] = {
        **config["data"],
        **{"name": f"hfids/{tmp_path / 'images'}", "root": str(tmp_path / "cache"), "classes": 2},
        **{"options": {"num_samples": 48}, "test_options": {"num_samples": 12}},
    }
    with pytest.raises(TrainingError, match="an image has class 2, but there are 2 classes"):
        train_all(validate_config(config))


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_of_a_stream_that_cannot_be_used_break_off_the_training(split, tmp_path):
    """By then hours may have passed: it is no refusal of a config."""
    write_images(tmp_path / "images/train", 16)
    write_images(tmp_path / "images/val", 16, seed=1)
    folder = next(path for path in (tmp_path / "images" / split).iterdir() if path.is_dir())
    for number in range(6):
        Image.fromarray(np.full((16, 16), 70_000, dtype=np.int32)).save(folder / f"odd{number}.tif")
    config = tiny(tmp_path / "images", tmp_path / "runs", only=["dense"])
    config["data"] = {
        **config["data"],
        **{"name": f"hfids/{tmp_path / 'images'}", "root": str(tmp_path / "cache"), "classes": 3},
        **{"options": {"num_samples": 54}, "test_options": {"num_samples": 54}},
    }
    with pytest.raises(TrainingError, match=r"[2-6] of 54 .* images cannot be read, .* its pixels are 32-bit integers"):
        train_all(validate_config(config))


def test_a_stream_of_16_bit_images_keeps_their_range(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.fromarray(SIXTEEN).save(tmp_path / "images" / split / name / "0.png")
    data = {"name": f"hfids/{tmp_path / 'images'}", "root": tmp_path / "cache", "classes": 2, "image_size": 8}
    found = open_splits(DataConfig(**data, options={"num_samples": 2}, test_options={"num_samples": 2}))
    for image, _, _ in found.test:
        assert np.abs(np.asarray(image) - 255 * RAMP[..., None]).max() <= 0.51

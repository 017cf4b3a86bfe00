"""Made images whose class is a product of cells: what they are, and what learns them."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnzoo
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.config import read_yaml
from attnzoo.bench.page import page_of
from attnzoo.errors import ConfigError, UnsupportedError
from attnzoo.tasks.classify import interactions, products
from attnzoo.tasks.classify.build import equal_parameters, logits
from attnzoo.tasks.classify.config import DataConfig, validate_config
from attnzoo.tasks.classify.run import train_all
from attnzoo.tasks.classify.sources import open_splits
from attnzoo.tasks.classify.task import TASK

from .conftest import ROOT, evaluated

CONFIG = ROOT / "configs/classify/interactions.yaml"


def data(side=12, **options):
    return DataConfig(name="attnzoo/interactions", options=options, image_size=side, channels=1)


@given(order=st.integers(2, 4), distance=st.integers(1, 3), blocks=st.integers(1, 2), training=st.booleans())
def test_the_class_is_the_product_of_every_group(order, distance, blocks, training):
    side, images = 2 * order * distance * blocks, 64
    pixels, classes = interactions.draw(side, order, distance, images, training)
    assert pixels.shape == (images, side, side)
    assert set(np.unique(pixels)) <= {0, 255}
    cells, signs = np.where(pixels > 0, 1, -1), 2 * classes - 1
    for first, apart, sign in ((0, distance, 1), (1, 2 * distance, -1)):
        starts = [c for c in range(side) if c % (order * apart) < apart]
        for row in range(first, side, 2):
            groups = np.stack([cells[:, row][:, [c + k * apart for c in starts]] for k in range(order)])
            assert (groups.prod(axis=0) == (sign * signs)[:, None]).all()
    again, same = interactions.draw(side, order, distance, images, training)
    assert (again == pixels).all()
    assert (same == classes).all()
    other, _ = interactions.draw(side, order, distance, images, not training)
    assert not (other == pixels).all()


@pytest.mark.parametrize(("order", "distance"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_products_of_fewer_cells_have_the_same_mean_in_both_classes(order, distance):
    images = 20000
    pixels, classes = interactions.draw(12, order, distance, images, True)
    cells = np.where(pixels > 0, 1.0, -1.0)
    error = 5 / (images / 2) ** 0.5  # five times that of a mean of so many signs
    for chosen in (cells[classes == 0], cells[classes == 1]):
        assert np.abs(chosen.mean(axis=0)).max() < error
        if order == 3:
            for apart in range(1, 2 * distance + 1):
                assert np.abs((chosen[..., :-apart] * chosen[..., apart:]).mean(axis=0)).max() < error
    sums = [cells[classes == kind].sum(axis=(1, 2)) / 12 for kind in (0, 1)]  # of 144 fair coins, in deviations
    for power, variance in ((1, 1), (2, 2), (3, 15), (4, 96)):  # of that power of a normal variable
        one, other = ((each**power).mean() for each in sums)
        assert one == pytest.approx(other, abs=error * (2 * variance) ** 0.5)


def test_splits_are_read_as_others_are():
    splits = open_splits(data(order=2, distance=1, images=64))
    assert splits.names == interactions.CLASSES
    assert (splits.train_images, len(splits.test)) == (64, interactions.TEST_IMAGES)
    image, kind = splits.train.read(3)
    assert (image.size, image.mode) == ((12, 12), "L")
    assert kind in (0, 1)
    cut = data(images=64).model_copy(update={"train_images": 16})
    assert open_splits(cut).train_images == 16


@pytest.mark.parametrize(
    ("side", "options", "message"),
    [
        (12, {"order": 2, "distance": 2}, "12 is not a multiple of 2 x order 2 x distance 2 = 8"),
        (12, {"order": 1}, "order: a whole number of at least 2, not 1"),
        (12, {"distance": 0}, "distance: a whole number of at least 1, not 0"),
        (12, {"images": 2.5}, "images: a whole number of at least 1, not 2.5"),
        (12, {"degree": 2}, "degree: attnzoo/interactions takes only order, distance, images"),
    ],
)
def test_what_cannot_be_made_is_refused(side, options, message):
    with pytest.raises(ConfigError, match=message):
        open_splits(data(side, **options))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_networks_logits_are_polynomials_of_the_mixers_degree(degree):
    torch.manual_seed(0)
    model = timm.create_model("vit_products", img_size=6, in_chans=1, num_classes=2)
    attnzoo.replace_attention(model, "padre", degree=degree, kernel_size=3, keep_original=False)
    model = model.double().eval()
    image, way = torch.randn(2, 1, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():  # a polynomial along a line: differences of order degree + 1 vanish, those of degree do not
        values = torch.stack([logits(model, image + step * way)[0, 0] for step in range(degree + 2)])
    highest, above = torch.diff(values, degree), torch.diff(values, degree + 1)
    assert above.abs().max() < 1e-9 * values.abs().max()
    assert highest.abs().max() > 1e-4 * values.abs().max()


def test_what_the_network_does_not_have_is_refused():
    with pytest.raises(ValueError, match="no pretrained weights"):
        products.vit_products(pretrained=True)
    with pytest.raises(ValueError, match="so no mlp_ratio"):
        products.vit_products(mlp_ratio=2)
    spec = AttentionConfig(name="padre", options={"kernel_size": 3})
    with pytest.raises(UnsupportedError, match="no MLPs whose width"):
        equal_parameters(lambda more: products.vit_products(img_size=6, in_chans=1, num_classes=2), spec, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "images"}, "root: not for attnzoo/interactions"),
        ({"test": "val", "crop_pct": 0.9}, "test, crop_pct: not for attnzoo/interactions"),
        ({"test_options": {"order": 3}}, "test_options: not for attnzoo/interactions"),
    ],
)
def test_keys_of_images_that_are_read_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(name="attnzoo/interactions", **changes)


def test_augmentation_is_refused():
    with pytest.raises(ConfigError, match="augment would change the cells"):
        validate_config({**read_yaml(CONFIG), "augment": {}})


def test_a_product_of_two_is_soon_learned_by_degree_two_and_not_by_one(tmp_path):
    config = read_yaml(CONFIG)
    config["data"]["options"]["images"] = 1500
    config["recipe"] = {"epochs": 2, "batch": 32, "lr": 8e-3, "weight_decay": 0.0, "clip_grad_norm": 1.0}
    wanted = {"padre degree=1": (0.25, 0.75), "padre degree=2": (0.99, 1.0)}
    more = {"seeds": [0], "only": list(wanted), "trackers": [], "output": str(tmp_path)}
    loaded = validate_config({**config, **more})
    train_all(loaded)
    with pytest.raises(ConfigError, match="not trained yet: softmax-seed0"):
        evaluated(validate_config({**config, **more, "only": [*wanted, "softmax"]}))
    for label, record in evaluated(loaded).items():
        low, high = wanted[label]
        assert low <= record.quality.accuracy <= high
    page = page_of(TASK, evaluated(loaded).values())
    assert "attnzoo/interactions at 12 pixels" in page

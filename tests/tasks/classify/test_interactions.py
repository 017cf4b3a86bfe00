"""Made images whose class is a product of cells: what they are, and that a mixer of that degree learns them alone."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnzoo
from attnzoo.bench.config import read_yaml
from attnzoo.errors import ConfigError
from attnzoo.tasks.classify import interactions, products
from attnzoo.tasks.classify.build import logits
from attnzoo.tasks.classify.config import DataConfig, validate_config
from attnzoo.tasks.classify.run import train_all
from attnzoo.tasks.classify.sources import open_splits

from .conftest import ROOT

CONFIG = ROOT / "configs/classify/interactions.yaml"


def data(side=12, **options):
    return DataConfig(name="attnzoo/interactions", options=options, image_size=side, channels=1)


@given(order=st.integers(2, 4), distance=st.integers(1, 3), blocks=st.integers(1, 2), training=st.booleans())
def test_the_class_is_the_product_of_every_group_and_of_nothing_smaller(order, distance, blocks, training):
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
def test_sums_and_smaller_products_are_those_of_fair_coins_in_both_classes(order, distance):
    pixels, classes = interactions.draw(12, order, distance, 20000, True)
    cells = np.where(pixels > 0, 1.0, -1.0)
    for chosen in (cells[classes == 0], cells[classes == 1]):
        total = chosen.sum(axis=(1, 2))
        assert abs(total.mean()) < 0.6  # of 10,000, whose sums deviate by 12 or 15: five times its error
        assert np.abs(chosen.mean(axis=0)).max() < 0.06
        if order == 3:
            assert np.abs((chosen[..., :-distance] * chosen[..., distance:]).mean(axis=0)).max() < 0.06
    deviations = [cells[classes == kind].sum(axis=(1, 2)).std() for kind in (0, 1)]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.04)


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
        (12, {"order": 2, "distance": 2}, "12 cells are no multiple of 2 x order 2 x distance 2 = 8"),
        (12, {"order": 1}, "order: a whole number of at least 2, not 1"),
        (12, {"distance": 0}, "distance: a whole number of at least 1, not 0"),
        (12, {"images": 2.5}, "images: a whole number of at least 1, not 2.5"),
        (12, {"degree": 2}, "degree: attnzoo/interactions takes order, distance, images alone"),
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


def test_there_are_no_pretrained_weights():
    with pytest.raises(ValueError, match="no pretrained weights"):
        products.vit_products(pretrained=True)


def test_a_product_of_two_is_learned_by_degree_two_and_not_by_one(tmp_path):
    config = read_yaml(CONFIG)
    config["data"]["options"]["images"] = 1500
    config["recipe"] = {"epochs": 2, "batch": 32, "lr": 8e-3, "weight_decay": 0.0, "clip_grad_norm": 1.0}
    wanted = {"padre degree=1": (0.4, 0.6), "padre degree=2": (0.99, 1.0)}
    more = {"seeds": [0], "only": list(wanted), "trackers": [], "output": str(tmp_path)}
    loaded = validate_config({**config, **more})
    train_all(loaded)
    for run in loaded.runs():
        low, high = wanted[run.label]
        test = run.result["test"]
        assert low <= test["top1"] / test["images"] <= high

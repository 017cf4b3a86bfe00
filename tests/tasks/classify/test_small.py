import pytest
import torch
from sklearn.datasets import load_digits

import attnzoo
from attnzoo import assets
from attnzoo.errors import ConfigError
from attnzoo.tasks.classify import small as classify
from attnzoo.tasks.classify.build import build_model
from attnzoo.tasks.classify.cost_config import RecipeConfig
from attnzoo.tasks.classify.small import answers, load_images, train

VIT = {"image_size": 8, "patch_size": 2, "channels": 1, "classes": 10}
OPTIONS = {"embed_dim": 32, "depth": 1, "num_heads": 2, "weight_init": "jax"}
PLAIN = RecipeConfig(epochs=2, batch=256, lr=1e-3, warmup_epochs=1, weight_decay=0, label_smoothing=0)
RECIPE = RecipeConfig(epochs=3, batch=32, lr=5e-3, warmup_epochs=1)


@pytest.fixture(autouse=True)
def one_thread():
    """On shared cores two threads of a small product mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield load_images("digits", assets.get("digits"))
    patch.undo()


def vit(seed=0):
    return build_model("vit_tiny_patch16_224", **VIT, options=OPTIONS, seed=seed)


def test_digits_are_scikit_learns_split_without_overlap(digits):
    assert (len(digits.train_x), len(digits.test_x), digits.classes, digits.test_x.shape[-1]) == (1200, 597, 10, 8)
    assert digits.train_x.mean().abs() < 1e-4
    assert digits.train_x.std() == pytest.approx(1, abs=1e-3)
    ours = torch.cat([digits.train_x, digits.test_x]).flatten(1)
    theirs = torch.from_numpy(load_digits().data).float()
    assert torch.allclose(
        ((ours - ours.min()) / (ours.max() - ours.min()) * 16).sum(0), theirs.sum(0), rtol=1e-3, atol=1e-2
    )
    labels = torch.cat([digits.train_y, digits.test_y])
    assert torch.equal(labels.bincount(), torch.from_numpy(load_digits().target).bincount())
    assert digits.test_y.bincount().min() >= 55, "every class is held out in proportion"


def test_the_deviation_and_the_number_of_training_images_can_be_chosen(digits):
    few = load_images("digits", assets.get("digits"), train_images=100, std=0.05)
    assert len(few.train_x) == 100
    assert few.train_x.std() == pytest.approx(0.05, rel=1e-3)
    assert torch.equal(few.test_y, digits.test_y)
    with pytest.raises(ConfigError, match="1200"):
        load_images("digits", assets.get("digits"), train_images=1201)


def test_unknown_data_and_models_are_refused_with_what_is_known(tmp_path):
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224"):
        build_model("vit_tinny_patch16_224", **VIT, options={}, seed=0)
    with pytest.raises(ConfigError, match="no_such_option"):
        build_model("vit_tiny_patch16_224", **VIT, options={"no_such_option": 1}, seed=0)


def test_training_learns_and_repeats_itself(digits):
    results = []
    for _ in range(2):
        model = vit()
        trained = train(model, digits, RECIPE, seed=0)
        results.append((trained.epoch_losses, answers(model, digits).counted()["top1"]))
    assert results[0] == results[1]
    losses, correct = results[0]
    assert losses[-1] < losses[0]
    assert correct > 0.2 * 597


def test_a_core_learns_as_the_dense_model_to_rounding(digits):
    dense, swapped = vit(), attnzoo.replace_attention(vit(), "softmax")
    first, second = (train(model, digits, RECIPE, seed=0).epoch_losses for model in (dense, swapped))
    assert first == pytest.approx(second, rel=1e-3)


def test_the_order_of_the_images_is_the_seeds_alone(digits, monkeypatch):
    seen = []

    class Spy(torch.nn.Linear):
        def forward(self, x):
            seen.append(x.sum().item())
            return super().forward(x.flatten(1))

    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        train(Spy(64, 10), digits, PLAIN, seed=3)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]


def test_side_lengths_are_those_of_the_data(digits):
    assert classify.IMAGE_SIDE["digits"] == digits.train_x.shape[-1]

"""The models of runs: their weights, their swap, their parameters; and reading them back."""

import copy
import json
import shutil

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import attnzoo
from attnzoo.errors import ConfigError, TrainingError
from attnzoo.swap import swapped_layers
from attnzoo.tasks.classify.build import logits
from attnzoo.tasks.classify.config import validate_config
from attnzoo.tasks.classify.model import build, check_all, load_trained
from attnzoo.tasks.classify.run import train_all

from .conftest import tiny


def models(config, classes=3):
    return {run.label: build(run, classes)[0].eval() for run in validate_config(config).runs()}


def same_outputs(a, b):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.equal(logits(a.eval(), x), logits(b.eval(), x))


def test_a_trained_model_is_read_back_with_its_swap(images, tmp_path):
    config = tiny(images, tmp_path / "runs", only=["padre"], recipe__epochs=2, equal_parameters=True)
    train_all(validate_config(config))
    folder = tmp_path / "runs/padre-seed0"
    found = load_trained(folder / "final")
    (checkpoint,) = folder.glob("checkpoints/step-*8")
    assert same_outputs(found, load_trained(checkpoint))
    (layer,) = swapped_layers(found).values()
    assert layer.get_submodule("mixer").degree == 2
    fresh = models(config)["padre"]
    assert not same_outputs(found, fresh)
    fresh.load_state_dict(found.state_dict())
    assert same_outputs(found, fresh)
    about = json.loads((folder / "final/model.json").read_text())
    (folder / "final/model.json").write_text(json.dumps({**about, "attention": None}))
    with pytest.raises(TrainingError, match=r"weights and model\.json do not fit together"):
        load_trained(folder / "final")
    (folder / "final/model.safetensors").write_bytes(b"x")
    with pytest.raises(TrainingError, match="holds no trained model that can be read"):
        load_trained(folder / "final")


def test_a_trained_model_knows_what_an_image_goes_through_and_what_its_classes_are_called(images, tmp_path):
    config = tiny(images, tmp_path / "runs", only=["padre"], recipe__epochs=2, augment__interpolation="bilinear")
    config["data"] = {**config["data"], "crop_pct": 0.75, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (result,) = train_all(validate_config(config))
    model = load_trained(tmp_path / "runs/padre-seed0/final")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    names, right = model.pretrained_cfg["label_names"], 0
    assert names == ["bright", "dark", "left"]
    for path in (images / "val").glob("*/*.png"):
        with torch.inference_mode():
            answer = model(transform(Image.open(path))[None]).argmax()
        right += names[answer] == path.parent.name
    assert right == result["test"]["top1"]


def test_a_run_that_averages_has_both_weights(images, tmp_path):
    train_all(validate_config(tiny(images, tmp_path / "runs", only=["dense"])))
    final = tmp_path / "runs/dense-seed0/final"
    assert not same_outputs(load_trained(final), load_trained(final, averaged=True))
    train_all(validate_config(tiny(images, tmp_path / "plain", only=["dense"], recipe__ema_decay=None)))
    with pytest.raises(TrainingError, match="averaged"):
        load_trained(tmp_path / "plain/dense-seed0/final", averaged=True)


def test_equal_parameters_are_equal_to_three_in_a_hundred(images):
    found = models(
        tiny(
            images,
            "unused",
            equal_parameters=True,
            model__options={
                "patch_size": 2,
                "embed_dim": 48,
                "depth": 1,
                "num_heads": 2,
            },
        )
    )
    counts = {label: sum(p.numel() for p in model.parameters()) for label, model in found.items()}
    assert abs(counts["padre"] / counts["dense"] - 1) < 0.03


def test_transformers_models_are_trained_too(images, tmp_path):
    options = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 2,
    }
    config = tiny(images, tmp_path / "runs", attentions=["sdpa"], recipe__epochs=2)
    config["model"] = {"library": "transformers", "name": "vit", "options": options}
    dense, swapped = train_all(validate_config(config))
    losses = [[row["loss"] for row in result["log"]] for result in (dense, swapped)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    found = load_trained(tmp_path / "runs/sdpa-seed0/final")
    assert swapped_layers(found)
    assert found.config.id2label == {0: "bright", 1: "dark", 2: "left"}


@pytest.mark.parametrize("swapped", [False, True])
def test_training_begins_from_given_weights_of_a_dense_or_a_swapped_model(images, tmp_path, swapped):
    config = tiny(images, "unused", only=["padre"])
    found = models(config)["padre"]
    given = models(tiny(images, "unused", only=["padre" if swapped else "dense"], seeds=[7]))
    (given,) = given.values()
    save_file(given.state_dict(), tmp_path / "given.safetensors")
    config["model"]["weights"] = str(tmp_path / "given.safetensors")
    began = models(config)["padre"].state_dict()
    for key, value in given.state_dict().items():
        assert key not in began or torch.equal(began[key], value)
    assert torch.equal(began["patch_embed.proj.weight"], given.state_dict()["patch_embed.proj.weight"])
    assert not torch.equal(began["patch_embed.proj.weight"], found.state_dict()["patch_embed.proj.weight"])


def test_weights_that_do_not_fit_are_a_clear_error(images, tmp_path):
    config = tiny(images, "unused", only=["dense"])
    state = models(config)["dense"].state_dict()
    path = tmp_path / "given.safetensors"
    config["model"]["weights"] = str(path)

    def refused(state, said, **more):
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        with pytest.raises(ConfigError, match=said):
            models({**config, "model": {**config["model"], **more}})

    other = models(tiny(images, "unused", only=["dense"]), classes=10)["dense"].state_dict()
    refused(other, r"is of 10 classes, the data have 3; model.new_head=true leaves its classifier out")
    save_file(other, path)
    models({**config, "model": {**config["model"], "new_head": True}})
    refused({k: v for k, v in state.items() if k != "norm.bias"}, r"does not fit: .*missing norm\.bias")
    refused({**state, "more": torch.ones(1)}, "does not fit: .*unknown more")
    refused({**state, "norm.bias": torch.ones(5)}, r"does not fit: .*norm\.bias: \(5,\) for \(12,\)")


@pytest.mark.parametrize("new_head", [False, True])
def test_weights_of_a_swapped_run_are_told_from_others_in_the_dense_row(images, tmp_path, new_head):
    (given,) = models(tiny(images, "unused", only=["padre"])).values()
    save_file(given.state_dict(), tmp_path / "given.safetensors")
    config = tiny(images, "unused", only=["dense"], model__weights=str(tmp_path / "given.safetensors"))
    config["model"]["new_head"] = new_head
    with pytest.raises(ConfigError, match=r"does not fit: the weights are of a model with mixers where this one has"):
        models(config)


def test_files_that_could_run_code_are_refused(images, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    torch.save({"model": Harm()}, tmp_path / "harm.pth")
    config = tiny(images, "unused", only=["dense"], model__weights=str(tmp_path / "harm.pth"))
    with pytest.raises(ConfigError, match="is not a file of weights alone"):
        models(config)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__image_size": 9}, "9 pixels are not divided by patches of 2 .*; nearest: 8 or 10"),
        ({"model__name": "vit_tiny_patch16_225"}, "did you mean"),
        ({"model__options": {"embed_dimm": 12}}, "timm cannot build 'vit_tiny_patch16_224': TypeError"),
        ({"attentions": [{"name": "padre"}, {"name": "mlp_mixer", "options": {"tokens": 9}}]}, "mlp_mixer tokens=9: "),
    ],
)
def test_models_that_cannot_stand_are_told_before_anything_is_trained(images, tmp_path, changes, said):
    config = tiny(images, tmp_path / "runs", **changes)
    with pytest.raises(ConfigError, match=said):
        train_all(validate_config(config))
    assert not (tmp_path / "runs").exists()


def test_two_builds_are_the_same_and_leave_the_config_alone(images):
    config = tiny(images, "unused")
    before = copy.deepcopy(config)
    first, second = models(config), models(config)
    assert all(same_outputs(first[label], second[label]) for label in first)
    assert config == before
    check_all(validate_config(config), 3)
    assert isinstance(first["padre"], torch.nn.Module)
    assert attnzoo.swap_report(first["padre"]).swapped


def test_a_pretrained_transformers_model_is_read_back_without_what_it_was_loaded_from(images, tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    given = transformers.AutoConfig.for_model("vit", **sizes, image_size=8, patch_size=2, num_labels=7)
    made = transformers.AutoModelForImageClassification.from_config(given)
    made.bfloat16().save_pretrained(tmp_path / "given")  # it is trained in float32 all the same
    config = tiny(images, tmp_path / "runs", attentions=["padre"], only=["padre"], recipe__epochs=2)
    config["model"] = {"library": "transformers", "name": str(tmp_path / "given"), "pretrained": True}
    train_all(validate_config(config))
    shutil.rmtree(tmp_path / "given")
    model = load_trained(tmp_path / "runs/padre-seed0/final")
    assert model.config.num_labels == 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert swapped_layers(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe__optimizer": "adamww"}, "recipe.optimizer: adamww"),
        ({"recipe__optimizer_options": {"betaz": 1}}, "recipe.optimizer: adamw with .*betaz"),
        ({"augment__auto_augment": "randm9"}, "augment: timm makes no transform of it"),
        ({"precision": "fp16"}, "fp16 is not for CPUs"),
    ],
)
def test_recipes_that_timm_does_not_take_are_told_before_anything_is_trained(images, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        train_all(validate_config(tiny(images, tmp_path / "runs", **changes)))
    assert not (tmp_path / "runs").exists()


def test_other_data_under_the_same_config_are_refused(images, tmp_path):
    config = tiny(images, tmp_path / "runs", only=["dense"], recipe__epochs=2)
    train_all(validate_config(config))
    next((images / "train/dark").iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"holds a run of other data or weights \(96 training images, now 95\)"):
        train_all(validate_config(config))


def test_a_run_that_stopped_before_its_first_checkpoint_is_none(images, tmp_path, monkeypatch):
    """Such as one that was told to mend an image."""
    monkeypatch.setattr("attnzoo.tasks.classify.sources.LOOKED_AT", 1)  # or it would be told before
    for number in (0, 1):
        (images / f"train/dark/00{number}.png").write_bytes(b"no image")
    config = validate_config(tiny(images, tmp_path / "runs", only=["dense"], recipe__epochs=2))
    with (
        pytest.warns(UserWarning, match="training image dark/00[01].png cannot be read"),
        pytest.raises(TrainingError, match="2 of 96 training images cannot be read, more than 1%"),
    ):
        train_all(config)
    for number in (0, 1):
        (images / f"train/dark/00{number}.png").unlink()
    (result,) = train_all(config)
    assert result["epochs"] == 2

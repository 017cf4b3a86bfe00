"""Weights of swapped models: saved, and loaded in another process, for every kind of host."""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import attnzoo
from attnzoo.errors import MissingExtraError, UnsupportedError, WeightsError
from tests import zoo
from tests.tasks.detect import models as detectors
from tests.zoo import _VISION, LANGUAGE, TIMM, TORCH, VISION, Host, images, seeded

SMALL = {"degree": 2, "kernel_size": 3}
CAUSAL = {**SMALL, "token_mixing": "causal_conv1d"}


@dataclass(frozen=True)
class Case:
    """A swapped model, how it is saved, and what it answers."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False

    def swapped(self) -> nn.Module:
        return attnzoo.replace_attention(self.build(), self.name, **self.options)

    def save(self, model: nn.Module, path: Path) -> None:
        if self.pretrained:
            model.save_pretrained(path)
        else:
            torch.save(model.state_dict(), path)


def _case(host: Host, name: str, pretrained: bool = False, **options: Any) -> Case:
    return Case(lambda: host.build().eval(), lambda m: host.call(m, host.inputs()), name, options, pretrained)


def _classifier(kind: str) -> Callable[[], nn.Module]:
    config = getattr(transformers, f"{kind}Config")
    return lambda: getattr(transformers, f"{kind}ForImageClassification")(config(**_VISION, num_labels=3)).eval()


def _detect(model: nn.Module) -> Tensor:
    features = torch.randn(1, detectors.WIDTH, 3, 4, generator=torch.Generator().manual_seed(1))
    return detectors.mmdet_call(model, features, [(3, 4)])[0]


def _scores(model: nn.Module) -> Tensor:
    return model(pixel_values=images()).logits


CASES = {
    "timm, mixer": _case(TIMM[0], "padre", **SMALL),
    "timm, core": _case(TIMM[0], "flash"),
    "torch, mixer": _case(TORCH[1], "padre", grid=(4, 4), **SMALL),
    "torchvision, core": _case(TORCH[0], "softmax"),
    "mmdet": Case(
        lambda: detectors.mmdet_detector("DETR"), _detect, "padre", {"where": "encoder.layers.*.self_attn", **SMALL}
    ),
    "vision, mixer": Case(_classifier("ViT"), _scores, "padre", SMALL, pretrained=True),
    "vision, another": _case(VISION[3], "padre", pretrained=True, **SMALL),
    "vision, gridless": Case(_classifier("DeiT"), _scores, "sima", {}, pretrained=True),
    "vision, core": _case(VISION[0], "flash", pretrained=True),
    "decoder, core": _case(LANGUAGE[0], "sdpa", pretrained=True),
    "decoder, policy": _case(LANGUAGE[0], "keydiff", budget=6, block_size=2, pretrained=True),
    "decoder, causal mixer": _case(LANGUAGE[0], "padre", pretrained=True, **CAUSAL),
    "decoder, tied weights": _case(LANGUAGE[4], "padre", pretrained=True, **CAUSAL),
}


def load_all(folder: str) -> None:
    """What the other process does: build, swap, load, call."""
    answers = {}
    for i, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(1000 + i)  # other weights than those to load
        model = attnzoo.load_weights(case.swapped(), Path(folder, str(i)))
        with torch.no_grad():
            answers[name] = case.call(model)
    torch.save(answers, Path(folder, "answers.pt"))


@pytest.mark.compat
def test_weights_of_every_host_are_loaded_in_another_process(tmp_path):
    expected = {}
    for i, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(i)
        model = seeded(case.swapped)
        with torch.no_grad():
            expected[name] = case.call(model)
        case.save(model, tmp_path / str(i))
    code = f"from tests.test_weights import load_all; load_all({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = torch.load(tmp_path / "answers.pt")
    apart = {name: (answers[name] - expected[name]).abs().max().item() for name in CASES}
    assert max(apart.values()) <= 1e-6, apart


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_the_documented_recipe_with_a_folder_of_save_pretrained(kind, tmp_path):
    """The keys in the file are the model's own, so that `load_state_dict` takes them."""
    build = _classifier(kind)
    model = attnzoo.replace_attention(seeded(build), "padre", **SMALL)
    model.save_pretrained(tmp_path)
    fresh = attnzoo.replace_attention(build(), "padre", **SMALL)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(_scores(fresh), _scores(model))


@pytest.mark.compat
@pytest.mark.parametrize(
    ("build", "options"), [(_classifier("ViT"), SMALL), (LANGUAGE[0].build, CAUSAL)], ids=["vision", "decoder"]
)
def test_from_pretrained_stops_with_what_to_do(build, options, tmp_path):
    model = attnzoo.replace_attention(seeded(build), "padre", **options)
    model.save_pretrained(tmp_path)
    for loader in (type(model), transformers.AutoModel):
        with pytest.raises(ValueError, match=r"replace_attention\(model, 'padre', degree=2.*then attnzoo.load_weights"):
            loader.from_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    fresh = attnzoo.replace_attention(type(model)._from_config(config), "padre", **options)
    attnzoo.load_weights(fresh, tmp_path)
    fresh.save_pretrained(tmp_path / "again")
    assert not attnzoo.load_weights(model, tmp_path / "again").training


def test_a_restored_model_saves_as_before(tmp_path):
    model = seeded(_classifier("ViT"))
    expected = _scores(model)
    attnzoo.replace_attention(model, "padre", **SMALL)
    attnzoo.restore_attention(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "restored")
    assert torch.equal(_scores(type(model).from_pretrained(tmp_path / "restored").eval()), expected)
    attnzoo.replace_attention(model, "padre", **SMALL)
    attnzoo.replace_attention(model, "softmax")
    model.save_pretrained(tmp_path / "core")
    torch.testing.assert_close(_scores(type(model).from_pretrained(tmp_path / "core").eval()), expected)


def test_a_model_of_the_same_config_saves_as_itself(tmp_path):
    config = transformers.ViTConfig(**_VISION)
    swapped, plain = transformers.ViTModel(config), transformers.ViTModel(config)
    attnzoo.replace_attention(swapped, "padre", **SMALL)
    swapped.save_pretrained(tmp_path / "swapped")
    plain.save_pretrained(tmp_path / "plain")
    assert type(plain).from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_under_the_names_of_the_first_release(sharded, tmp_path):
    """What an earlier attnzoo wrote, or a model whose inner part was swapped, has these."""
    model = seeded(_classifier("ViT"))
    attnzoo.replace_attention(model.vit, "padre", **SMALL)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").is_file() is not sharded
    fresh = attnzoo.replace_attention(_classifier("ViT")(), "padre", **SMALL)
    assert torch.equal(_scores(attnzoo.load_weights(fresh, tmp_path)), _scores(model))


@pytest.mark.compat
@pytest.mark.parametrize(
    ("build", "part", "options"),
    [
        (LANGUAGE[0].build, "model", CAUSAL),
        (LANGUAGE[0].build, "model.layers", {}),
        (_classifier("ViT"), "vit", SMALL),
        (_classifier("ViT"), "", SMALL),
    ],
    ids=["decoder", "core", "vision", "whole"],
)
def test_from_pretrained_stops_after_a_swap_through_an_inner_module(build, part, options, tmp_path):
    model = seeded(build)
    keys = set(model.state_dict())
    name = "padre" if options else "softmax"
    attnzoo.replace_attention(model.get_submodule(part), name, **options)
    type(model).save_pretrained(model, tmp_path)  # whatever stands on the object
    if name == "softmax":  # a core, on the host's own weights
        assert set(model.state_dict()) == keys
        type(model).from_pretrained(tmp_path)
        return
    with pytest.raises(ValueError, match=r"replace_attention\(model, 'padre', degree=2.*then attnzoo.load_weights"):
        type(model).from_pretrained(tmp_path)
    fresh = build()
    attnzoo.replace_attention(fresh.get_submodule(part), name, **options)
    attnzoo.load_weights(fresh, tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_a_timm_model_inside_transformers_is_saved_as_swapped(tmp_path):
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"depth": 1})
    model = transformers.TimmWrapperModel(config)
    attnzoo.replace_attention(model, "padre", **SMALL)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"then attnzoo\.load_weights"):
        type(model).from_pretrained(tmp_path)


def test_a_copy_saves_itself(tmp_path):
    model = attnzoo.replace_attention(seeded(_classifier("ViT")), "padre", **SMALL)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.classifier.bias.fill_(3.0)
    twin.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["classifier.bias"], torch.full((3,), 3.0))
    with pytest.raises(UnsupportedError, match=r"push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(UnsupportedError, match=r"push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path, True, None, True)


@pytest.mark.parametrize("host", [TIMM[0], TORCH[1], VISION[0]], ids=str)
def test_swapped_weights_and_an_unswapped_model_say_what_to_do(host, tmp_path):
    options = {**SMALL, **({"grid": (4, 4)} if host is TORCH[1] else {})}
    model, plain = attnzoo.replace_attention(seeded(host.build), "padre", **options), host.build()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    torch.save({"state_dict": model.state_dict()}, tmp_path / "swapped.pt")
    with pytest.raises(WeightsError, match=r"mixers where this one has its own attention.*replace_attention"):
        attnzoo.load_weights(plain, tmp_path / "swapped.pt")
    with pytest.raises(WeightsError, match="unswapped model before the swap"):
        attnzoo.load_weights(model, before)
    other = attnzoo.replace_attention(host.build(), "padre", **{**options, "degree": 3})
    with pytest.raises(WeightsError, match=r"other mixers.*same options"):
        attnzoo.load_weights(other, model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_what_are_no_weights_is_named(tmp_path):
    model = zoo.vit()
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    for path, said in [("text.pt", "cannot be read"), ("list.pt", "holds no state dict"), ("", "holds no weights")]:
        with pytest.raises(WeightsError, match=said):
            attnzoo.load_weights(model, tmp_path / path)
    with pytest.raises(WeightsError, match="cannot be read"):
        attnzoo.load_weights(model, tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="not of this VisionTransformer: missing"):
        attnzoo.load_weights(model, {"a": torch.zeros(1)})


@pytest.mark.parametrize("sizes", [("20KB", "1GB"), ("1GB", "20KB")], ids=["shards first", "whole file first"])
def test_a_folder_saved_twice_gives_what_was_saved_last(sizes, tmp_path):
    """`save_pretrained` leaves the index of older shards, or the older whole file."""
    model = attnzoo.replace_attention(seeded(_classifier("ViT")), "padre", **SMALL)
    model.save_pretrained(tmp_path, max_shard_size=sizes[0])
    with torch.no_grad():
        model.classifier.bias.fill_(3.0)
    model.save_pretrained(tmp_path, max_shard_size=sizes[1])
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"model.safetensors", "model.safetensors.index.json"}
    fresh = attnzoo.replace_attention(_classifier("ViT")(), "padre", **SMALL)
    assert torch.equal(attnzoo.load_weights(fresh, tmp_path).classifier.bias, torch.full((3,), 3.0))


def test_missing_shards_and_a_broken_index_are_named(tmp_path):
    model = seeded(_classifier("ViT"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(WeightsError, match=rf"index\.json names files that are missing: {gone.name}; copy the whole"):
        attnzoo.load_weights(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="is not an index of weight files"):
        attnzoo.load_weights(model, tmp_path)


def test_a_checkpoint_of_mmengine_with_its_log(tmp_path):
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Tiny(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, inputs: Tensor, mode: str) -> dict[str, Tensor]:
            return {"loss": self.layer(inputs).square().mean()}

    runner = Runner(
        Tiny(),
        str(tmp_path),
        train_dataloader=DataLoader([{"inputs": torch.ones(2)}] * 2),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        experiment_name=tmp_path.name,
    )
    runner.train()
    fresh = attnzoo.load_weights(Tiny(), tmp_path / "epoch_1.pth")
    assert torch.equal(fresh.layer.weight, runner.model.layer.weight)


def test_other_objects_in_a_checkpoint_are_refused_in_plain_text(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "options": argparse.Namespace(lr=1)}, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match=r"GLOBAL argparse\.Namespace was not an allowed.*if you trust it") as told:
        attnzoo.load_weights(zoo.vit(), tmp_path / "more.pt")
    assert str(told.value).isprintable()


def _mamba(width: int) -> nn.Module:
    sizes = {"vocab_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=width, **sizes))


class Mixing(nn.Module):
    """A block whose own part is called ``mixer``, beside an attention layer."""

    def __init__(self, width: int, named: str = "mixer") -> None:
        super().__init__()
        self.block = nn.ModuleDict({named: nn.Linear(width, width)})
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)


@pytest.mark.parametrize("build", [_mamba, Mixing], ids=["mamba", "a module of the user's"])
def test_mixers_of_the_models_own_are_not_those_of_a_swap(build):
    with pytest.raises(WeightsError, match=r"are not of this \w+: .*mixer.*\) for \(") as told:
        attnzoo.load_weights(build(16), build(8).state_dict())
    assert "replace_attention" not in str(told.value)


def test_unknown_mixers_where_the_model_has_no_attention():
    with pytest.raises(WeightsError, match=r"are not of this Mixing: missing block\.other"):
        attnzoo.load_weights(Mixing(4, "other"), Mixing(4).state_dict())


def test_what_cannot_be_read_says_why(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    (tmp_path / "empty.pt").touch()  # torch's error has no message
    cases = {"none.pt": "cannot be read: there is no such file", "empty.pt": r"cannot be read .*\(EOFError\)"}
    for name, said in cases.items():
        with pytest.raises(WeightsError, match=said) as told:
            attnzoo.load_weights(model, tmp_path / name)
        assert ("trust" in str(told.value)) is (name == "empty.pt")
    for weights in (None, 3, {"state_dict": {}}):
        with pytest.raises(WeightsError, match=r"weights must be a folder, a file or a state dict, not|no state dict"):
            attnzoo.load_weights(model, weights)
    with pytest.raises(WeightsError, match=r"expected a torch\.nn\.Module to load weights into, not None"):
        attnzoo.load_weights(None, {})
    (tmp_path / "a.safetensors").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"safetensors not installed; run: pip install -e '\.\[llm\]'"):
        attnzoo.load_weights(model, tmp_path / "a.safetensors")

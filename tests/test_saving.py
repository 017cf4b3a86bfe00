"""Models saved with the recipe of their swap, and loaded swapped: for every host and kind of attention."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import attnzoo
from attnzoo import files
from attnzoo.errors import ConfigError, OptionError, SwapError, UnknownNameError, WeightsError
from attnzoo.registry import unregister_attention
from tests import zoo
from tests.tasks.detect import models as detectors
from tests.test_weights import CAUSAL, SMALL, _detect
from tests.zoo import LANGUAGE, TIMM, TORCH, VISION, Host, seeded

ENCODER = {"where": "encoder.layers.*.self_attn", **SMALL}


@dataclass(frozen=True)
class Case:
    """A model, its swaps in turn, what it answers, and whether its library can build it again."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    swaps: list[tuple[str, dict[str, Any]]]
    built: bool = True
    change: Callable[[nn.Module], Any] = field(default=lambda model: model)

    def swapped(self) -> nn.Module:
        model = seeded(self.build)
        for name, options in self.swaps:
            attnzoo.replace_attention(model, name, **options)
        with torch.no_grad():
            for p in model.parameters():  # mixers' too
                p.add_(0.02 * torch.randn_like(p))
        self.change(model)
        return model.eval()


def case(host: Host, *swaps: tuple[str, dict[str, Any]], built: bool = True, change: Any = None) -> Case:
    def call(model: nn.Module) -> Tensor:
        return host.call(model, zoo.cast(host.inputs(), next(model.parameters()).dtype))

    return Case(host.build, call, list(swaps), built, change or (lambda model: model))


CASES = {
    "timm, mixer": case(TIMM[0], ("padre", SMALL)),
    "timm, several": case(TIMM[2], ("sima", {"where": "blocks.0.*"}), ("flash", {"where": "blocks.1.*"})),
    "timm, unswapped": case(TIMM[1]),
    "timm, half precision": case(TIMM[0], ("hyena", {}), change=lambda m: m.to(torch.bfloat16)),
    "timm, rotary": case(TIMM[4], ("softmax", {}), change=lambda m: m.double()),
    "torch, grid": case(TORCH[1], ("padre", {"grid": (4, 4), **SMALL}), built=False),
    "torchvision": case(TORCH[0], ("linear_angular", {}), built=False),
    "mmdet": Case(lambda: detectors.mmdet_detector("DETR"), _detect, [("padre", ENCODER)], built=False),
    "vision, mixer": case(VISION[0], ("conv2former", {})),
    "vision, core": case(VISION[4], ("softmax", {})),
    "decoder, core": case(LANGUAGE[1], ("sdpa", {"where": "*.0.*"})),
    "decoder, policy": case(LANGUAGE[0], ("keydiff", {"budget": 6, "block_size": 2, "anchor": "raw"})),
    "decoder, random": case(LANGUAGE[3], ("random", {"budget": 6, "block_size": 2, "seed": 3})),
    "decoder, wrapper": case(
        LANGUAGE[0],
        (
            "caote",
            {"budget": 6, "block_size": 2, "base": "snapkv", "base_options": {"window": 4}, "core": "flash_scored"},
        ),
    ),
    "decoder, tied": case(LANGUAGE[4], ("padre", CAUSAL), change=lambda m: m.to(torch.bfloat16)),
}


@pytest.mark.compat
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_answers_bit_for_bit(name, tmp_path):
    one = CASES[name]
    model = one.swapped()
    with torch.no_grad():
        expected = one.call(model)
    state = torch.get_rng_state()
    attnzoo.save(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    if one.built and not name.startswith("timm"):  # before 1.0.31 it may forget arguments
        assert json.loads((tmp_path / "attnzoo.json").read_text())["model"] is not None
    if json.loads((tmp_path / "attnzoo.json").read_text())["model"] is None:
        with pytest.raises(WeightsError, match=r"is not known .*attnzoo\.load\(folder, model\)"):
            attnzoo.load(tmp_path)
        own = one.build()
        loaded = attnzoo.load(tmp_path, own)
        assert loaded is own
    else:
        loaded = attnzoo.load(tmp_path)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(one.call(loaded), expected)
    assert [(r.path, r.attention, r.options) for r in attnzoo.swap_report(loaded).layers] == [
        (r.path, r.attention, r.options) for r in attnzoo.swap_report(model).layers
    ]
    assert {key: value.dtype for key, value in loaded.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    names = [
        [[n for n, p in m.named_parameters(remove_duplicate=False) if p is q] for q in m.parameters()]
        for m in (model, loaded)
    ]
    assert names[0] == names[1]


def test_another_process_loads_it(tmp_path):
    one = CASES["timm, several"]
    model = one.swapped()
    attnzoo.save(model, tmp_path / "model")
    with torch.no_grad():
        torch.save(one.call(model), tmp_path / "expected.pt")
    torch.save(TIMM[2].inputs(), tmp_path / "inputs.pt")
    code = (
        "import sys, torch, attnzoo\n"
        "torch.set_num_threads(1)\n"
        "model, inputs, expected = attnzoo.load('model'), torch.load('inputs.pt'), torch.load('expected.pt')\n"
        "assert torch.equal(model(inputs), expected) and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_can_be_restored_after_a_load(tmp_path):
    """What runs on the model's own weights; of a mixer the original was not saved, and must not come back random."""
    host = TIMM[0]
    model = seeded(host.build)
    expected = host.call(model, host.inputs())
    attnzoo.replace_attention(model, "softmax")
    attnzoo.save(model, tmp_path / "core")
    torch.testing.assert_close(
        host.call(attnzoo.restore_attention(attnzoo.load(tmp_path / "core")), host.inputs()), expected
    )
    attnzoo.replace_attention(model, "padre", **SMALL, where="blocks.0")
    attnzoo.save(model, tmp_path / "mixer")
    for own in (None, host.build()):
        with pytest.raises(SwapError, match=r"keep_original=False.*blocks\.0"):
            attnzoo.restore_attention(attnzoo.load(tmp_path / "mixer", own))


@pytest.mark.compat
@pytest.mark.parametrize("forgets", [False, True])
def test_a_timm_model_whose_arguments_cannot_be_known_is_passed(forgets, tmp_path):
    """timm before 1.0.31 keeps no arguments: what was built by others than those that a model tells is noticed."""
    model = zoo.vit(qkv_bias=False, class_token=False, global_pool="avg")
    if forgets:
        vars(model).pop("_model_args", None)
    attnzoo.replace_attention(model, "padre", where="blocks.0", **SMALL)
    attnzoo.save(model, tmp_path)
    if "_model_args" not in vars(model):
        with pytest.raises(WeightsError, match=r"is not known \(what its library would build differs: "):
            attnzoo.load(tmp_path)
    loaded = attnzoo.load(tmp_path, zoo.vit(qkv_bias=False, class_token=False, global_pool="avg"))
    assert torch.equal(loaded(zoo.images()), model(zoo.images()))


def test_a_changed_head_and_preprocessing_are_kept(tmp_path):
    model = zoo.vit(pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)})
    model.reset_classifier(7)
    attnzoo.save(model.eval(), tmp_path)
    loaded = attnzoo.load(tmp_path)
    assert loaded(zoo.images()).shape == (2, 7)
    assert timm.data.resolve_model_data_config(loaded) == timm.data.resolve_model_data_config(model)


def test_a_changed_part_of_a_model_of_transformers_is_noticed(tmp_path):
    model = seeded(LANGUAGE[0].build)
    model.lm_head = nn.Sequential(nn.Linear(48, 101))
    model.generation_config.max_length = 77
    attnzoo.save(model, tmp_path / "changed")
    with pytest.raises(WeightsError, match=r"would build differs: lm_head\.0 \(Linear\) is missing"):
        attnzoo.load(tmp_path / "changed")
    with pytest.raises(WeightsError, match=r"LlamaForCausalLM is of another architecture.*has no lm_head\.0\.weight"):
        attnzoo.load(tmp_path / "changed", LANGUAGE[0].build())
    model.lm_head = nn.Linear(48, 101, bias=False)
    attnzoo.save(model, tmp_path / "again")
    assert attnzoo.load(tmp_path / "again").generation_config.max_length == 77


def test_other_architectures_are_named_and_left_alone(tmp_path):
    attnzoo.save(attnzoo.replace_attention(seeded(TORCH[1].build), "padre", grid=(4, 4), **SMALL), tmp_path)
    other = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 64, dropout=0.0, batch_first=True), 3)
    before = zoo.fingerprint(other)
    with pytest.raises(WeightsError, match=r"its layers\.2\.self_attn\.in_proj_weight is new.*and \d+ more"):
        attnzoo.load(tmp_path, other)
    with pytest.raises(WeightsError, match=r"Linear is of another architecture.*it has no layer layers\.0\.self_attn"):
        attnzoo.load(tmp_path, nn.Linear(2, 2))
    assert zoo.fingerprint(other) == before
    with pytest.raises(WeightsError, match="swapped already"):
        attnzoo.load(tmp_path, attnzoo.replace_attention(TORCH[1].build(), "softmax"))
    with torch.device("meta"), pytest.raises(WeightsError, match="meta device"):
        attnzoo.load(tmp_path, TORCH[1].build())
    with pytest.raises(WeightsError, match=r"expected a torch\.nn\.Module to load into, not 'vit'"):
        attnzoo.load(tmp_path, "vit")


def test_a_model_that_weights_cannot_tell_from_the_one_saved_is_warned_of(tmp_path):
    attnzoo.save(attnzoo.replace_attention(seeded(TORCH[1].build), "softmax"), tmp_path)
    other = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 6, 96, dropout=0.0, batch_first=True), 2)
    with pytest.warns(UserWarning, match=r"outputs may differ: .*layers\.0\.self_attn\.num_heads is 6, was 4"):
        attnzoo.load(tmp_path, other)


def test_a_model_that_cannot_be_swapped_as_it_was_is_left_alone(tmp_path):
    model = seeded(TORCH[1].build)
    attnzoo.replace_attention(model, "softmax", where="layers.0")
    attnzoo.replace_attention(model, "padre", where="layers.1", grid=(4, 4), **SMALL)
    attnzoo.save(model, tmp_path)
    other = TORCH[1].build()
    other.layers[1].self_attn.forward = other.layers[1].self_attn.forward
    before = zoo.fingerprint(other)
    with pytest.raises(attnzoo.AttnZooError, match="its forward was replaced"):
        attnzoo.load(tmp_path, other)
    assert zoo.fingerprint(other) == before


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.attention = nn.Linear(8, 8), nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8)
        if tied:
            self.b.weight = self.a.weight
        self.register_buffer("whole", torch.arange(6.0).view(2, 3))
        self.register_buffer("part", self.whole[:, 1:])


def test_shared_tensors_are_written_once_and_are_shared_again(tmp_path):
    attnzoo.save(attnzoo.replace_attention(Tied(True), "softmax"), tmp_path / "tied")
    weights = load_file(tmp_path / "tied/model.safetensors")
    assert ("a.weight" in weights, "b.weight" in weights, weights["part"].shape) == (True, False, (2, 2))
    loaded = attnzoo.load(tmp_path / "tied", Tied(False))
    assert loaded.b.weight is loaded.a.weight
    attnzoo.save(Tied(False), tmp_path / "untied")
    for load in (attnzoo.load, lambda path, model: attnzoo.load_weights(model, path)):
        with pytest.raises(WeightsError, match=r"a\.weight and b\.weight are one tensor in this model and two in the"):
            load(tmp_path / "untied", Tied(True))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "parallel"])
def test_wrapped_models_are_saved_as_what_they_hold(wrap, tmp_path):
    model = attnzoo.replace_attention(zoo.vit(), "padre", **SMALL)
    attnzoo.save(wrap(model), tmp_path)
    loaded = attnzoo.load(tmp_path, device="cpu")
    assert torch.equal(loaded(zoo.images()), model(zoo.images()))
    wrapped = wrap(zoo.vit())
    assert attnzoo.load(tmp_path, wrapped) is wrapped


def test_an_attention_of_ones_own(tmp_path):
    class Mine(nn.Module):
        def __init__(self, dim: int, num_heads: int, *, sides: tuple[int, int] = (1, 1), gain: Any = 1.0) -> None:
            super().__init__()
            self.sides, self.gain = {sides: 1}, gain  # hashed: a list would not do

        def forward(self, x: Tensor, grid: Any = None, prefix: int = 0, mask: Any = None) -> Tensor:
            return x * self.gain

    attnzoo.register_attention("mine", "mixer", Mine)
    try:
        model = attnzoo.replace_attention(zoo.vit(), "mine", sides=(2, 3))
        attnzoo.save(model, tmp_path)
        assert torch.equal(attnzoo.load(tmp_path)(zoo.images()), model(zoo.images()))
        for gain in (torch.ones(1), {1: 2}, Path("gain")):
            model = attnzoo.replace_attention(zoo.vit(), "mine", where="blocks.1", gain=gain)
            with pytest.raises(OptionError, match=r"the option gain=.* of 'mine' has no form in JSON"):
                attnzoo.save(model, tmp_path / "never")
        assert not (tmp_path / "never").exists()
    finally:
        unregister_attention("mine")
    with pytest.raises(
        UnknownNameError, match=r"blocks\.0\.attn .*attnzoo\.register_attention\('mine', 'mixer', Mine\)"
    ):
        attnzoo.load(tmp_path)
    attnzoo.register_attention("mine", "core", attnzoo.cores.softmax.Softmax)
    try:
        with pytest.raises(SwapError, match="'mine' was registered as mixer when the model was saved, and is core"):
            attnzoo.load(tmp_path)
    finally:
        unregister_attention("mine")


def test_a_folder_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    first, second = (attnzoo.replace_attention(seeded(zoo.vit), "padre", degree=degree) for degree in (1, 2))
    attnzoo.save(first, folder)
    (folder / "tokenizer.json").write_text("{}")

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"part")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(WeightsError, match="could not be written: No space left on device"):
            attnzoo.save(second, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["attnzoo.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(attnzoo.load(folder)(zoo.images()), first(zoo.images()))

    replace = files.os.replace
    with monkeypatch.context() as patch:  # killed between the two renames

        def killed(source: Any, target: Any) -> None:
            if Path(target).name == "model.safetensors":
                raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(files.os, "replace", killed)
        for place in (folder, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                attnzoo.save(second, place)
    with pytest.raises(WeightsError, match="a save or a copy was cut off"):
        attnzoo.load(folder)
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing; copy the whole folder, or save again"):
        attnzoo.load(tmp_path / "new")
    for place in (folder, tmp_path / "new"):
        attnzoo.save(second, place)
        assert torch.equal(attnzoo.load(place)(zoo.images()), second(zoo.images()))


def test_other_weights_are_not_overwritten(tmp_path):
    LANGUAGE[0].build().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=r"model\.safetensors was not written by attnzoo\.save; give another folder"):
        attnzoo.save(zoo.vit(), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match=r"config\.json is a file; give a folder"):
        attnzoo.save(zoo.vit(), tmp_path / "config.json")


def test_what_is_no_model_to_save_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"expected a torch\.nn\.Module to save, not 3"):
        attnzoo.save(3, tmp_path)
    with torch.device("meta"):
        nothing = nn.Linear(2, 2)
    with pytest.raises(WeightsError, match="weight is on the meta device"):
        attnzoo.save(nothing, tmp_path)
    with pytest.raises(SwapError, match="itself a swapped layer"):
        attnzoo.save(attnzoo.replace_attention(zoo.vit(), "softmax").blocks[0].attn, tmp_path)
    assert not any(tmp_path.iterdir())


def alter(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "attnzoo.json").read_text())
    (folder / "attnzoo.json").write_text(json.dumps({**content, **changes}))


def test_what_cannot_be_loaded_says_why(tmp_path):
    attnzoo.save(zoo.vit(), tmp_path)
    weights, description = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "attnzoo.json").read_text()

    def refused(match: str) -> None:
        with pytest.raises(WeightsError, match=match):
            attnzoo.load(tmp_path)

    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    refused(r"it has [\d,]+ bytes of [\d,]+\): it was altered, or a save or a copy was cut off; copy")
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("its SHA-256 is another")
    (tmp_path / "model.safetensors").unlink()
    refused(r"model\.safetensors is missing; copy the whole folder")
    (tmp_path / "model.safetensors").write_bytes(weights)
    alter(tmp_path, format=2, attnzoo="9.0")
    refused(r"written by attnzoo 9\.0 in format 2, and this attnzoo reads up to 1: install attnzoo 9\.0 or newer")
    for broken, why in [("{", "Expecting"), ("[]", "is not what"), ('{"format": 1}', "it lacks 'attnzoo'")]:
        (tmp_path / "attnzoo.json").write_text(broken)
        refused(f"is not what attnzoo.save writes: .*{why}" if why != "is not what" else why)
    (tmp_path / "attnzoo.json").write_text(description)
    alter(tmp_path, model={**json.loads(description)["model"], "architecture": "vit_of_tomorrow"})
    refused(r"timm cannot build vit_of_tomorrow.*attnzoo\.load\(folder, model\)")
    alter(tmp_path, model={"library": "os", "class": "system"})
    refused("names the library 'os', from which no model can be built")
    alter(tmp_path, model={"library": "transformers", "class": "pipeline", "config": {}})
    refused("transformers cannot build pipeline")
    (tmp_path / "attnzoo.json").unlink()
    refused("holds no attnzoo.json, which attnzoo.save writes, and no config.json of a swapped model")
    with pytest.raises(OptionError, match="device='gpu' is not a device of torch"):
        attnzoo.load(tmp_path, device="gpu")


@pytest.mark.compat
@pytest.mark.parametrize(
    ("host", "name", "options"),
    [
        (VISION[0], "padre", SMALL),
        (LANGUAGE[0], "padre", CAUSAL),
        (LANGUAGE[4], "keydiff", {"budget": 6, "block_size": 2}),
        (VISION[1], "softmax", {}),
    ],
    ids=str,
)
def test_what_save_pretrained_wrote_is_loaded_swapped(host, name, options, tmp_path):
    """Its config has the recipe; nothing of it stays on the model, nor after it is restored."""
    model = attnzoo.replace_attention(seeded(host.build), name, **options)
    model.save_pretrained(tmp_path / "swapped")
    (entry,) = json.loads((tmp_path / "swapped/config.json").read_text())["attnzoo"]
    assert (entry["attention"], len(entry["layers"])) == (name, 2)
    loaded = attnzoo.load(tmp_path / "swapped")
    with torch.no_grad():
        assert torch.equal(host.call(loaded, host.inputs()), host.call(model, host.inputs()))
        if name == "padre":
            with pytest.raises(ValueError, match=r"Load it by attnzoo\.load\(folder\)"):
                type(model).from_pretrained(tmp_path / "swapped")
            assert attnzoo.load(tmp_path / "swapped", host.build()).training is False
            return
        dense = type(model).from_pretrained(tmp_path / "swapped")  # of the same weights
        expected = host.call(attnzoo.restore_attention(model), host.inputs())
        assert torch.equal(host.call(dense, host.inputs()), expected)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "restored")
    assert "attnzoo" not in json.loads((tmp_path / "restored/config.json").read_text())
    attnzoo.restore_attention(loaded).save_pretrained(tmp_path / "restored again")
    assert "attnzoo" not in json.loads((tmp_path / "restored again/config.json").read_text())


def test_save_pretrained_of_an_option_without_json_warns(tmp_path):
    class Mine:
        def __init__(self, *, kind: Any = None) -> None: ...

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            return q

    attnzoo.register_attention("mine", "core", Mine, capabilities={"causal": True, "gqa": True, "mask": True})
    try:
        model = attnzoo.replace_attention(LANGUAGE[0].build(), "mine", kind=object())
        with pytest.warns(UserWarning, match=r"saved without the recipe of the swap.*kind="):
            model.save_pretrained(tmp_path)
    finally:
        unregister_attention("mine")
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), type(model))


def test_save_pretrained_says_what_was_said_about_the_host(tmp_path):
    model = detectors.transformers_detector("Detr")
    attnzoo.replace_attention(model, "padre", where="*encoder.layers.*.self_attn", positions=False, **SMALL)
    model.save_pretrained(tmp_path)
    loaded = attnzoo.load(tmp_path)
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)

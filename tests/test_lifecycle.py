"""A swapped model goes through what models go through."""

import copy
import io
import json
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.errors import UnsupportedError
from attnzoo.swap import swapped_layers
from tests.zoo import HOSTS, LANGUAGE, TIMM, TORCH, VISION, Host, cast, seeded

MIXED = [(TIMM[0], {}), (TIMM[1], {}), (TORCH[0], {}), (TORCH[1], {"grid": (4, 4)})]
SWAPS = [(h, "flash", {}) for h in HOSTS] + [(h, "softmax", {}) for h in (TIMM[0], TORCH[1], VISION[0], LANGUAGE[0])]
SWAPS += [(h, "padre", {"degree": 2, "kernel_size": 3, **o}) for h, o in MIXED]
each_swap = pytest.mark.parametrize(
    ("host", "name", "options"), SWAPS, ids=lambda v: "" if isinstance(v, dict) else str(v)
)


def swapped(host: Host, name: str, options: dict) -> nn.Module:
    torch.manual_seed(7)
    return attnzoo.replace_attention(seeded(host.build), name, **options)


@each_swap
def test_deepcopy_is_whole_and_apart(host, name, options):
    model = swapped(host, name, options)
    out = host.call(model, host.inputs())
    twin = copy.deepcopy(model)
    assert torch.equal(host.call(twin, host.inputs()), out)
    assert len(swapped_layers(twin)) == len(swapped_layers(model))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(host.call(model, host.inputs()), out)
    attnzoo.restore_attention(twin)
    assert swapped_layers(model)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}


@each_swap
def test_state_dict_round_trip_as_weights_only(host, name, options):
    model = swapped(host, name, options)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = attnzoo.replace_attention(host.build().eval(), name, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(host.call(other, host.inputs()), host.call(model, host.inputs()))


@each_swap
def test_other_dtypes_and_autocast(host, name, options):
    model = swapped(host, name, options)
    out = host.call(model, host.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = host.call(model, host.inputs()).float()
    assert 0 < (mixed - out).abs().max() < 0.15 * out.abs().max()
    half = host.call(model.bfloat16(), cast(host.inputs(), torch.bfloat16)).float()
    assert 0 < (half - out).abs().max() < 0.15 * out.abs().max()
    model.double().float()
    attnzoo.restore_attention(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@each_swap
def test_compiles_without_a_break(host, name, options):
    model = swapped(host, name, options)
    torch._dynamo.reset()
    # what operators of our own must keep to besides is tested mixer by mixer, in tests/mixers/test_contract.py
    out = host.call(torch.compile(model, fullgraph=True, backend="eager"), host.inputs())
    torch.testing.assert_close(out, host.call(model, host.inputs()), atol=1e-5, rtol=1e-4)


def test_inductor_compiles_a_mixer():
    host = TIMM[0]
    model = swapped(host, "padre", {"kernel_size": 3})
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(host.inputs())
        torch.testing.assert_close(out, model(host.inputs()), atol=1e-5, rtol=1e-4)


CHECKPOINTED = [s for s in SWAPS if s[0] not in TORCH]


@pytest.mark.parametrize(("host", "name", "options"), CHECKPOINTED, ids=lambda v: "" if isinstance(v, dict) else str(v))
def test_gradient_checkpointing_gives_the_same_gradients(host, name, options):
    model = swapped(host, name, options).train()

    def run():
        model.zero_grad()
        host.call(model, host.inputs()).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run()
    calls = []
    layer = next(iter(swapped_layers(model).values()))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    if host in TIMM:
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run()
    handle.remove()
    assert len(calls) == 2  # forward, and again in the backward pass
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4)


@pytest.mark.compat
@pytest.mark.parametrize("host", [*VISION, *LANGUAGE], ids=str)
def test_save_pretrained_round_trip(host: Host, tmp_path):
    """A swapped model saves as the plain model it is but for the recipe of its swap, and loads without attnzoo."""
    model = swapped(host, "softmax", {})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("attnzoo")
    assert "attnzoo" not in json.dumps(config)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(host.call(loaded, host.inputs()), host.call(model, host.inputs()), atol=1e-5, rtol=1e-4)


PEFT = [(LANGUAGE[0], "flash", ["q_proj", "v_proj"], {}), (VISION[0], "softmax", ["q_proj", "o_proj"], {})]
PEFT += [(TIMM[0], "softmax", ["qkv"], {}), (TIMM[0], "padre", ["y_channels"], {"kernel_size": 3})]


@pytest.mark.parametrize(("host", "name", "targets", "options"), PEFT)
def test_lora_adapters(host, name, targets, options, tmp_path):
    """Adapters go on a swapped model, learn, are saved, loaded and merged; a core's stay after restore."""
    model = swapped(host, name, options)
    before = host.call(model, host.inputs()).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    out = host.call(adapted, host.inputs())
    assert (out - before).abs().max() > 1e-4
    out.square().mean().backward()
    learned = [p for n, p in adapted.named_parameters() if "lora" in n]
    assert learned
    assert all(p.grad is not None for p in learned)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(swapped(host, name, options), tmp_path).eval()
    torch.testing.assert_close(host.call(again, host.inputs()), host.call(adapted.eval(), host.inputs()))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(host.call(merged, host.inputs()), out, atol=1e-5, rtol=1e-4)
    if name != "padre":
        attnzoo.restore_attention(merged)
        torch.testing.assert_close(host.call(merged, host.inputs()), out, atol=1e-5, rtol=1e-4)


def test_swapping_a_compiled_model_counts(zeros):
    """What was compiled before the swap is compiled anew: no stale graph."""
    host = TIMM[0]
    model = seeded(host.build)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(host.inputs())
        attnzoo.replace_attention(model, zeros)
        assert (compiled(host.inputs()) - before).abs().max() > 1e-3
        attnzoo.restore_attention(model)
        torch.testing.assert_close(compiled(host.inputs()), before)


def test_a_layer_compiled_in_place_is_not_bypassed(zeros):
    host = TIMM[0]
    model = seeded(host.build)
    before = model(host.inputs()).detach()
    for block in model.blocks:
        block.attn.compile(backend="eager")
    attnzoo.replace_attention(model, zeros)
    assert (model(host.inputs()) - before).abs().max() > 1e-3


def test_pickling_a_whole_swapped_model():
    host = TIMM[0]
    for name in ("softmax", "padre"):
        model = swapped(host, name, {})
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(host.call(loaded, host.inputs()), host.call(model, host.inputs()))
        attnzoo.restore_attention(loaded)


def _left_behind(model: nn.Module) -> list[str]:
    """What of a swap is left on a model: hooks, and what stands on the objects."""
    left = []
    for path, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found = [getattr(hook, "__self__", hook) for hook in hooks] + list(vars(module).values())
        left += [f"{path}: {type(one).__name__}" for one in found if type(one).__module__.startswith("attnzoo.")]
        left += [f"{path}: {name}" for name in vars(module) if "attnzoo" in name]
    return left


PARTS = {
    "timm": (TIMM[0], "blocks", "padre", {"degree": 2, "kernel_size": 3}),
    "torch": (TORCH[1], "layers", "sdpa", {}),
    "torch, mixer": (TORCH[1], "layers", "padre", {"grid": (4, 4), "degree": 2, "kernel_size": 3}),
    "vision": (VISION[0], "layers", "padre", {"degree": 2, "kernel_size": 3}),
    "policy": (LANGUAGE[0], "model.layers", "keydiff", {"budget": 8}),
    "causal mixer": (LANGUAGE[0], "model.layers", "padre", {"token_mixing": "causal_conv1d", "kernel_size": 4}),
}


@pytest.mark.compat
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@pytest.mark.parametrize("case", PARTS)
def test_a_part_restored_by_itself_leaves_nothing_behind(case, copied):
    host, part, name, options = PARTS[case]
    model, inputs = seeded(host.build).eval(), host.inputs()
    expected, nested = host.call(model, inputs), getattr(model, "use_nested_tensor", None)
    attnzoo.replace_attention(model, name, **options)
    swapped = host.call(model, inputs)
    source = model
    if copied:
        model = pickle.loads(pickle.dumps(copy.deepcopy(source)))
        torch.testing.assert_close(host.call(model, inputs), swapped)
        assert _left_behind(model)
    attnzoo.restore_attention(model.get_submodule(part))
    torch.testing.assert_close(host.call(model, inputs), expected, rtol=0, atol=0)
    allowed = ("SavePretrained", "RefusesBatching")  # step aside when they are called
    assert [one for one in _left_behind(model) if not one.endswith(allowed)] == []
    assert getattr(model, "use_nested_tensor", None) == nested
    if copied:
        torch.testing.assert_close(host.call(source, inputs), swapped)
        assert attnzoo.swap_report(source).swapped


@pytest.mark.parametrize("part", ["model", "model.layers"])
def test_what_stands_in_for_methods_of_a_model_steps_aside_once_a_part_is_restored(part, tmp_path, monkeypatch):
    model = seeded(LANGUAGE[0].build)
    started: list[object] = []
    monkeypatch.setattr(type(model), "init_continuous_batching", lambda self, *args: started.append(self))
    attnzoo.replace_attention(model, "padre", token_mixing="causal_conv1d", kernel_size=4)
    with pytest.raises(UnsupportedError, match="continuous batching"):
        model.init_continuous_batching()
    attnzoo.restore_attention(model.get_submodule(part))
    model.init_continuous_batching()
    assert started == [model]
    model.save_pretrained(tmp_path)
    type(model).from_pretrained(tmp_path)
    model.model(**LANGUAGE[0].inputs())
    assert [one for one in _left_behind(model) if not one.startswith("model")] == []


def test_layers_that_stay_swapped_go_on_when_others_are_restored():
    host = TIMM[0]
    model, inputs = seeded(host.build).eval(), host.inputs()
    attnzoo.replace_attention(model, "padre", degree=2, kernel_size=3)
    attnzoo.restore_attention(model.blocks[0])
    model(torch.randn(1, 3, 64, 64))
    assert len(attnzoo.swap_report(model).swapped) == 1
    part = copy.deepcopy(model.blocks)
    assert host.call(model, inputs).isfinite().all()
    assert any("GridOfCall" in one for one in _left_behind(model))
    attnzoo.restore_attention(part)
    assert attnzoo.swap_report(model).swapped

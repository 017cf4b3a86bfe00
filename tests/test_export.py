"""A swapped model is a model like any other: for timm's feature extraction, torch.export, ONNX and ONNX Runtime."""

import warnings

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torchvision.models import feature_extraction

from attnzoo import list_attentions, replace_attention
from attnzoo.errors import UnsupportedError
from tests.zoo import LANGUAGE, TIMM, TORCH, VISION

MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
ATTENTIONS = [(name, {"tokens": 17} if name == "mlp_mixer" else {}) for name in list_attentions("mixer")]
ATTENTIONS += [(name, {}) for name in list_attentions("core")]
ATTENTIONS += [
    ("padre", {"token_mixing": "conv1d"}),
    ("padre", {"token_mixing": "dense", "tokens": 17}),
    ("padre", {"channel_mixing": "grouped", "output": "sum"}),
    ("mamba", {"bidirectional": False}),
]
IDS = [" ".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in ATTENTIONS]
TRACED, OTHER = 2, 5  # images: of the trace, and of another call


def swapped(name, options, **more):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**MODEL, **more})
    return replace_attention(model, name, **options).eval()


def images(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(("name", "options"), ATTENTIONS, ids=IDS)
def test_it_is_exported_for_any_batch_and_runs_in_onnx_runtime(name, options, tmp_path):
    model, batch = swapped(name, options, depth=1), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        expected = model(images(OTHER))
        program = torch.export.export(model, (images(TRACED),), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(images(OTHER)), expected, atol=1e-5, rtol=1e-5)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not [target for target in targets if "attnzoo" in target], "the program runs where attnzoo is not"
        torch.onnx.export(program, (images(TRACED),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images(OTHER).numpy()})
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert np.abs(expected.numpy()).max() > 0.1


@pytest.mark.parametrize(("name", "options"), ATTENTIONS, ids=IDS)
def test_timm_takes_features_out_of_it(name, options):
    model = swapped(name, options)
    with torch.no_grad():
        last, layers = model.forward_intermediates(images(2))
        torch.testing.assert_close(last, model.forward_features(images(2)))
        assert [tuple(features.shape) for features in layers] == [(2, 24, 4, 4)] * 2
        extractor = swapped(name, options, features_only=True, out_indices=(0, 1))
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        assert not extractor.load_state_dict(state, strict=False).missing_keys  # it has no head
        for ours, features in zip(layers, extractor(images(2)), strict=True):
            torch.testing.assert_close(features, ours)


@pytest.mark.parametrize(("name", "options"), ATTENTIONS, ids=IDS)
def test_timm_traces_it_by_fx(name, options):
    model = swapped(name, options)
    traced = timm.models.create_feature_extractor(model, {"blocks.0": "features"})
    leaves = {"leaf_modules": timm.models.get_notrace_modules()}
    by_torchvision = feature_extraction.create_feature_extractor(model, {"blocks.0": "features"}, tracer_kwargs=leaves)
    with torch.no_grad():
        (features,) = model.forward_intermediates(images(2), indices=[0], intermediates_only=True, output_fmt="NLC")
        torch.testing.assert_close(traced(images(2))["features"][:, 1:], features)
        torch.testing.assert_close(by_torchvision(images(2))["features"][:, 1:], features)
        assert traced(images(3))["features"].shape == (3, 17, 24)


SMALL = {"degree": 2, "kernel_size": 3}
TRACED_HOSTS = [
    (TIMM[0], "padre", SMALL),
    (TIMM[0], "softmax", {}),
    (TIMM[5], "softmax", {"where": "attn_pool"}),
    (TORCH[0], "sdpa", {}),
    (TORCH[1], "padre", {"grid": (4, 4), **SMALL}),
    (VISION[0], "sima", {}),
    (VISION[1], "flash", {}),
    (LANGUAGE[0], "sdpa", {}),
    (LANGUAGE[0], "keydiff", {"budget": 4}),
    (LANGUAGE[0], "padre", {"token_mixing": "causal_conv1d", **SMALL}),
]


@pytest.mark.parametrize(("host", "name", "options"), TRACED_HOSTS, ids=str)
def test_the_tracer_is_refused_with_what_to_use(host, name, options, tmp_path):
    """It would bake the sizes of one call in, or stop with an error of its own that names neither cause nor way out."""
    model = replace_attention(host.build().eval(), name, **options)
    given = host.inputs()
    args = given[:1] if isinstance(given, tuple) else (given["input_ids"] if host.causal else given,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError, match=r"torch\.jit\.trace.*Use torch\.export\.export"):
            torch.jit.trace(model, args, strict=False)
        with pytest.raises(UnsupportedError, match=r"dynamo=False\).*dynamo=True"):
            torch.onnx.export(model, args, tmp_path / "model.onnx", dynamo=False)

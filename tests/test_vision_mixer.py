"""Mixers in the image encoders of transformers."""

import copy
import inspect

import pytest
import torch
import transformers

from attnzoo import list_attentions, replace_attention, restore_attention, swap_report
from attnzoo.errors import AttnZooError, ShapeError, UnsupportedError
from attnzoo.hosts.vision_mixer import PREFIX
from attnzoo.swap import swapped_layers

pytestmark = pytest.mark.compat

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 4}
OWN = {"dinov2_with_registers": {"num_register_tokens": 3}, "siglip_vision_model": {"vision_use_head": False}}


def encoder(kind, **more):
    """A tiny encoder with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **IMAGE, **OWN.get(kind, {}), **more})
    return transformers.AutoModel.from_config(config).double().eval()


def pixels(height=16, width=16, batch=2):
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(model, x, **options):
    with torch.no_grad():
        return model(x, **options).last_hidden_state


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("name", list_attentions("mixer"))
def test_any_mixer_stands_in_any_encoder_and_gives_way_again(kind, name):
    model = encoder(kind)
    before, prefix = tokens(model, pixels()), PREFIX[kind](model.config)
    options = {"tokens": 16 + prefix} if name == "mlp_mixer" else {}
    replace_attention(model, name, **options)
    assert len(swap_report(model).swapped) == 2
    after = tokens(model, pixels())
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
    layer = next(iter(swapped_layers(model).values()))
    assert layer.prefix == prefix
    assert layer.grid.size == (4, 4)
    assert torch.equal(tokens(copy.deepcopy(model), pixels()), after)
    restore_attention(model)
    assert torch.equal(tokens(model, pixels()), before)
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())


@pytest.mark.parametrize("kind", PREFIX)
def test_patches_are_mixed_with_their_neighbors_on_the_grid(kind):
    """A 3 x 3 convolution in one layer: what a patch changes lies round it, in images that are not square, too."""
    model = replace_attention(encoder(kind, num_hidden_layers=1), "conv", kernel_size=3)
    options = {} if kind == "ijepa" else {"interpolate_pos_encoding": True}
    if kind.startswith("dinov2"):
        options = {}  # it always does
    prefix = PREFIX[kind](model.config)
    height, width = (4, 4) if kind == "ijepa" else (3, 5)
    x = pixels(4 * height, 4 * width, batch=1)
    changed = x.clone()
    changed[..., 4:8, 8:12] += 1  # the patch in row 1, column 2
    difference = (tokens(model, x, **options) - tokens(model, changed, **options)).abs().amax(-1)[0, prefix:]
    rows, columns = torch.nonzero(difference.view(height, width) > 1e-12).T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 2, 1, 3)


def test_it_trains_and_swaps_in_part():
    model = replace_attention(encoder("vit").train(), "padre", where="*0*")
    model(pixels()).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for layer in swapped_layers(model).values() for p in layer.parameters())
    replace_attention(model, "sdpa", where="*1*")
    assert tokens(model, pixels(8, 8), interpolate_pos_encoding=True).shape == (2, 5, 24), "the hook is still there"
    assert {layer.attention for layer in swap_report(model).swapped} == {"padre", "sdpa"}


def test_what_a_mixer_cannot_do_is_refused():
    model = replace_attention(encoder("vit"), "padre")
    with pytest.raises(UnsupportedError, match="attention_mask"):
        model.layers[0].attention(torch.zeros(1, 17, 24), torch.zeros(1, 1, 17, 17))
    tokens(model, pixels())
    with pytest.raises(ShapeError, match="6 tokens are not 1 prefix tokens and the 4 x 4 patches"):
        model.layers[0].attention(torch.zeros(1, 6, 24))


@pytest.mark.parametrize("kind", PREFIX)
def test_it_is_exported_for_any_batch_but_not_with_a_mask(kind):
    """While a model is exported, transformers makes a mask of ones of its own."""
    model = replace_attention(encoder(kind), "padre").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (pixels(),), dynamic_shapes={"pixel_values": {0: batch}}, strict=False)
    torch.testing.assert_close(program.module()(pixels(batch=5)).last_hidden_state, tokens(model, pixels(batch=5)))
    if "attention_mask" in inspect.signature(model.forward).parameters:
        mask = torch.ones(2, 16 + PREFIX[kind](model.config), dtype=torch.long)
        mask[0, 3] = 0
        with pytest.raises(UnsupportedError, match="attention_mask"):
            torch.export.export(model, (pixels(),), {"attention_mask": mask}, strict=False)
        with pytest.raises(UnsupportedError, match="attention_mask"):
            model(pixels(), attention_mask=mask)


@pytest.mark.parametrize("kind", ["vit_mae", "yolos", "bert", "clip_text_model"])
def test_other_models_are_refused_and_left_as_they_are(kind):
    torch.manual_seed(0)
    more = IMAGE if kind == "vit_mae" else {"image_size": [16, 16], "patch_size": 4} if kind == "yolos" else {}
    config = transformers.AutoConfig.for_model(kind, **SIZES, **more)
    model = transformers.AutoModel.from_config(config)
    with pytest.raises(AttnZooError, match=f"type '{kind}'|causality"):
        replace_attention(model, "padre")
    assert not swap_report(model).swapped

"""Swaps in detectors: identity of cores, refusals by name, padding, position, the grid of each call, and back."""

import copy
import io
import re

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import list_attentions
from attnzoo.errors import OptionError, ShapeError, UnsupportedError
from attnzoo.hosts.feature_map import FeatureMapMixer
from tests.tasks.detect import models

pytestmark = pytest.mark.compat

KINDS = ["DETR", "ConditionalDETR", "DABDETR"]
THEIRS = ["Detr", "ConditionalDetr", "RTDetr"]
ENCODER = "*encoder.*"  # the same for all
MIXERS = {
    name: options
    for name, options in {
        "padre": {"degree": 2, "kernel_size": 3},
        "conv": {"kernel_size": 3},
        "conv2former": {"kernel_size": 3},
        "hyena": {},
        "linear_angular": {},
        "mamba": {"state_size": 2},
        "pooling": {},
        "sima": {},
    }.items()
    if name in list_attentions("mixer")
}


def features(*sizes, height, width, kind=""):
    """A batch of feature maps, each real in its own upper left corner, and something else than zeros beside."""
    torch.manual_seed(1)
    return torch.randn(len(sizes), models.WIDTHS.get(kind, models.WIDTH), height, width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", ["softmax", "sdpa"])
def test_a_core_changes_nothing_in_padded_batches(kind, core):
    detector = models.mmdet_detector(kind)
    x = features((4, 5), (3, 2), height=4, width=5, kind=kind)
    before = models.mmdet_call(detector, x, [(4, 5), (3, 2)])
    keys = list(detector.state_dict())
    attnzoo.replace_attention(detector, core)
    assert len(attnzoo.swap_report(detector).swapped) == 6
    assert list(detector.state_dict()) == keys
    after = models.mmdet_call(detector, x, [(4, 5), (3, 2)])
    real = torch.zeros(2, 4, 5, dtype=torch.bool)
    real[0], real[1, :3, :2] = True, True
    torch.testing.assert_close(after[0][real.flatten(1)], before[0][real.flatten(1)], rtol=0, atol=2e-5)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["encoder.*", "decoder.*self_attn*", "decoder.*cross_attn*"])
def test_a_core_really_stands_there(kind, where, zeros):
    detector = models.mmdet_detector(kind)
    x = features((4, 5), height=4, width=5, kind=kind)
    before = models.mmdet_call(detector, x, [(4, 5)])
    attnzoo.replace_attention(detector, zeros, where=where)
    after = models.mmdet_call(detector, x, [(4, 5)])
    assert (after[1][-1] - before[1][-1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_detector_with_its_own_attention(kind):
    detector = models.mmdet_detector(kind)
    other = attnzoo.replace_attention(copy.deepcopy(detector), "softmax")
    x = features((4, 5), (2, 4), height=4, width=5, kind=kind)
    grads = []
    for one in (detector, other):
        told = models.samples([(64, 80), (32, 64)], 64, 80)
        one.forward_transformer((x,), told)["hidden_states"].square().sum().backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXERS)
def test_a_padded_image_gives_what_it_gives_alone(kind, name):
    detector = models.mmdet_detector(kind)
    attnzoo.replace_attention(detector, name, where=ENCODER, **MIXERS[name])
    sizes = [(4, 5), (3, 2), (1, 5), (2, 4)]
    x = features(*sizes, height=4, width=6, kind=kind)
    memory, states = models.mmdet_call(detector, x, sizes)
    for row, (h, w) in enumerate(sizes):
        alone, its_states = models.mmdet_call(detector, x[row : row + 1, :, :h, :w].contiguous(), [(h, w)])
        mine = memory[row].unflatten(0, (4, 6))[:h, :w].flatten(0, 1)
        torch.testing.assert_close(mine, alone[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(states[:, row], its_states[:, 0], rtol=0, atol=1e-4)


def test_the_grid_is_that_of_each_call():
    detector = models.mmdet_detector("DETR")
    attnzoo.replace_attention(detector, "padre", where=ENCODER, kernel_size=3)
    wide = models.mmdet_call(detector, features((2, 6), height=2, width=6), [(2, 6)])[0]
    tall = models.mmdet_call(detector, features((2, 6), height=2, width=6).transpose(2, 3).contiguous(), [(6, 2)])[0]
    again = models.mmdet_call(detector, features((2, 6), height=2, width=6), [(2, 6)])[0]
    assert torch.equal(wide, again)
    assert not torch.allclose(wide, tall.unflatten(1, (6, 2)).transpose(1, 2).flatten(1, 2))


def test_the_mixer_gets_position_unless_it_is_told_not_to():
    detector = models.mmdet_detector("DETR")
    seen = {}
    for positions in (True, False):
        swapped = attnzoo.replace_attention(copy.deepcopy(detector), "conv", where=ENCODER, positions=positions)
        layer = swapped.encoder.layers[0].self_attn.attn
        layer.mixer.register_forward_pre_hook(lambda m, inputs, at=positions: seen.update({at: inputs[0]}))
        x = features((3, 4), height=3, width=4)
        models.mmdet_call(swapped, x, [(3, 4)])
    tokens = x.flatten(2).transpose(1, 2)
    position = detector.positional_encoding(None, input=x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[False], tokens)
    torch.testing.assert_close(seen[True], tokens + position)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_elsewhere_is_refused_by_name_and_nothing_is_swapped(kind):
    detector = models.mmdet_detector(kind)
    with pytest.raises(UnsupportedError, match=r"(?s)object queries.*cross-attention.*encoder\.layers"):
        attnzoo.replace_attention(detector, "padre")
    with pytest.raises(UnsupportedError, match="cross-attention, and a mixer has one input"):
        attnzoo.replace_attention(detector, "sima", where="decoder.*cross_attn*")
    assert not attnzoo.swap_report(detector).swapped


@pytest.mark.parametrize("kind", ["ConditionalDETR", "DABDETR", "ConditionalDetr"])
def test_a_core_that_needs_keys_as_wide_as_values_is_refused_where_they_are_not(kind):
    detector = models.mmdet_detector(kind) if kind in KINDS else models.transformers_detector(kind)
    with pytest.raises(UnsupportedError, match=r"wide|width(?s:.*)which 'flash' cannot do"):
        attnzoo.replace_attention(detector, "flash")
    assert not attnzoo.swap_report(detector).swapped
    attnzoo.replace_attention(detector, "flash", where=ENCODER)


def test_the_layers_offered_instead_of_deformable_ones_can_be_swapped():
    detector = models.transformers_detector("RTDetr")
    with pytest.raises(UnsupportedError, match="deformable attention samples points") as refused:
        attnzoo.replace_attention(detector, "sdpa")
    where = re.search(r"where='(.+?)'", str(refused.value))[1]
    attnzoo.replace_attention(detector, "sdpa", where=where)
    assert attnzoo.swap_report(detector).swapped


def test_eviction_and_useless_options_are_refused():
    detector = models.mmdet_detector("DETR")
    with pytest.raises(UnsupportedError, match="no key/value cache"):
        attnzoo.replace_attention(detector, "keydiff", budget=8)
    with pytest.raises(OptionError, match="knows its own grid"):
        attnzoo.replace_attention(detector, "padre", where=ENCODER, grid=(3, 4))
    with pytest.raises(OptionError, match="True or False"):
        attnzoo.replace_attention(detector, "padre", where=ENCODER, positions=1)
    with pytest.raises(OptionError, match="positions is not an option here"):
        attnzoo.replace_attention(torch.nn.TransformerEncoderLayer(16, 2), "sima", positions=False)


def test_what_came_back_is_what_was_there():
    detector = models.mmdet_detector("DABDETR")
    x = features((3, 4), (2, 2), height=3, width=4)
    before = models.mmdet_call(detector, x, [(3, 4), (2, 2)])
    attnzoo.replace_attention(detector, "padre", where=ENCODER)
    attnzoo.replace_attention(detector, "softmax")
    assert not any(isinstance(m, FeatureMapMixer) for m in detector.modules())
    assert not detector.positional_encoding._forward_pre_hooks
    attnzoo.replace_attention(detector, "padre", where="encoder.layers.0.*")
    attnzoo.restore_attention(detector)
    assert not detector.positional_encoding._forward_pre_hooks
    torch.testing.assert_close(models.mmdet_call(detector, x, [(3, 4), (2, 2)])[1], before[1], rtol=0, atol=0)


@pytest.mark.parametrize("keep_original", [True, False])
def test_a_copy_is_told_its_own_grid(keep_original):
    detector = models.mmdet_detector("DETR")
    attnzoo.replace_attention(detector, "padre", where=ENCODER, keep_original=keep_original)
    assert [layer.path for layer in attnzoo.swap_report(detector).swapped] == [
        "encoder.layers.0.self_attn.attn",
        "encoder.layers.1.self_attn.attn",
    ]
    assert len(attnzoo.swap_report(detector).layers) == 6
    other = copy.deepcopy(detector)
    buffer = io.BytesIO()
    torch.save(detector, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    x = features((2, 5), height=2, width=5)
    first = models.mmdet_call(detector, x, [(2, 5)])[0]
    models.mmdet_call(detector, features((4, 4), height=4, width=4), [(4, 4)])
    assert torch.equal(models.mmdet_call(other, x, [(2, 5)])[0], first)
    assert torch.equal(models.mmdet_call(saved, x, [(2, 5)])[0], first)


def test_the_encoder_alone_has_no_grid():
    detector = models.mmdet_detector("DETR")
    with pytest.raises(UnsupportedError, match="positional_encoding"):
        attnzoo.replace_attention(detector.encoder, "padre")
    attnzoo.replace_attention(detector, "padre", where=ENCODER)
    tokens = torch.randn(1, 12, models.WIDTH)
    with pytest.raises(ShapeError, match="call the whole detector"):
        detector.encoder(query=tokens, query_pos=tokens, key_padding_mask=None)


def images(*sizes, height=96, width=128):
    torch.manual_seed(2)
    pixels = torch.zeros(len(sizes), 3, height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for row, (h, w) in enumerate(sizes):
        pixels[row, :, :h, :w] = torch.randn(3, h, w)
        mask[row, :h, :w] = 1
    return pixels, mask


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", ["softmax", "sdpa"])
def test_a_core_changes_nothing_in_detectors_of_transformers(kind, name):
    detector = models.transformers_detector(kind)
    pixels, mask = images((96, 128), (64, 96))
    given = {} if kind == "RTDetr" else {"pixel_mask": mask}
    with torch.no_grad():
        before = detector(pixels, **given)
        attnzoo.replace_attention(detector, name, where=ENCODER)
        after = detector(pixels, **given)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", THEIRS)
def test_a_mixer_stands_in_the_encoder_of_detectors_of_transformers(kind):
    detector = models.transformers_detector(kind)
    pixels, mask = images((96, 128), (64, 96))
    given = {} if kind == "RTDetr" else {"pixel_mask": mask}
    with torch.no_grad():
        before = detector(pixels, **given).logits
        attnzoo.replace_attention(detector, "padre", where=ENCODER, kernel_size=3)
        swapped = attnzoo.swap_report(detector).swapped
        assert swapped
        assert all("encoder" in layer.path for layer in swapped)
        after = detector(pixels, **given).logits
        assert (after - before).abs().max() > 1e-6
        smaller = detector(pixels[..., :64, :96]).logits
        assert smaller.shape == before.shape
        attnzoo.restore_attention(detector)
        assert torch.equal(detector(pixels, **given).logits, before)


@pytest.mark.parametrize("kind", ["Detr", "ConditionalDetr"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_reaches_the_mixer_in_transformers(kind, implementation):
    """The encoder over a padded feature map, against each image's own part of it."""
    detector = models.transformers_detector(kind)
    detector.model.encoder.set_attn_implementation(implementation)
    attnzoo.replace_attention(detector, "padre", where=ENCODER, kernel_size=3)
    sizes = [(3, 4), (2, 3)]
    x = features(*sizes, height=3, width=4, kind=kind)

    def encode(tokens, mask):
        batch, _, h, w = tokens.shape
        position = detector.model.position_embedding(shape=tokens.shape, device="cpu", dtype=torch.float32, mask=mask)
        assert position.shape[0] == batch
        with torch.no_grad():
            return detector.model.encoder(
                inputs_embeds=tokens.flatten(2).transpose(1, 2),
                attention_mask=mask.flatten(1),
                spatial_position_embeddings=position.flatten(2).transpose(1, 2),
            ).last_hidden_state.unflatten(1, (h, w))

    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    for row, (h, w) in enumerate(sizes):
        mask[row, :h, :w] = True
    padded = encode(x, mask)
    for row, (h, w) in enumerate(sizes):
        alone = encode(x[row : row + 1, :, :h, :w], torch.ones(1, h, w, dtype=torch.bool))
        torch.testing.assert_close(padded[row, :h, :w], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["Detr", "ConditionalDetr"])
def test_a_mixer_elsewhere_is_refused_in_transformers(kind):
    detector = models.transformers_detector(kind)
    with pytest.raises(UnsupportedError, match=r"(?s)object queries|cross-attention"):
        attnzoo.replace_attention(detector, "padre")
    with pytest.raises(UnsupportedError, match="cross-attention"):
        attnzoo.replace_attention(detector, "padre", where="*decoder*encoder_attn*")
    assert not attnzoo.swap_report(detector).swapped


def test_the_windows_of_a_swin_backbone_are_told_of():
    from mmdet.models.backbones.swin import SwinTransformer

    backbone = SwinTransformer(pretrain_img_size=32, embed_dims=8, num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1))
    model = nn.ModuleDict({"backbone": backbone, "encoder": nn.TransformerEncoderLayer(8, 2, 16)})
    with pytest.warns(UserWarning, match=r"leaves some attention unchanged: 4 of WindowMSA \(mmdet\)"):
        attnzoo.replace_attention(model, "sdpa")
    report = attnzoo.swap_report(model)
    assert len(report.swapped) == 1
    assert [layer.host_class for layer in report.standing] == ["WindowMSA"] * 4

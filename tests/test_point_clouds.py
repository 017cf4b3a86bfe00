"""Set attention over sparse voxels, as DSVT has it, and mixers in its place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnzoo
from attnzoo.errors import OptionError, UnsupportedError
from configs.bench.voxels import SetBlocks, example, sets_of

CONV1D = {"degree": 2, "token_mixing": "conv1d", "kernel_size": 5}


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(1, 30),
    share=st.floats(0.05, 1.0),
    window=st.integers(1, 9),
    size=st.integers(1, 12),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_every_voxel_is_once_in_a_set_of_its_window_in_order(side, share, window, size, axis, seed):
    cells = torch.randperm(side**2, generator=torch.Generator().manual_seed(seed))[: max(1, int(share * side**2))]
    places = torch.stack([cells // side, cells % side], 1)
    sets, repeats = sets_of(places, axis, window, size)
    assert sets.shape == repeats.shape == (len(sets), size)
    assert sorted(sets[~repeats].tolist()) == list(range(len(places)))
    windows = places[sets] // window  # (S, size, 2)
    assert (windows == windows[:, :1]).all()
    along = places[sets][..., axis]
    assert (along[:, 1:] >= along[:, :-1]).all()
    counts = (places // window).unique(dim=0, return_counts=True)[1]
    assert len(sets) == sum(-(-int(count) // size) for count in counts)


def blocks():
    torch.manual_seed(0)
    _, (x, places) = example(300)
    return SetBlocks(width=16, heads=2, blocks=1).eval(), x[:, :16], places


@torch.no_grad()
@pytest.mark.parametrize("name", ["softmax", "sdpa", "flash"])
def test_a_core_changes_nothing(name):
    model, x, places = blocks()
    expected = model(x, places)
    attnzoo.replace_attention(model, name)
    torch.testing.assert_close(model(x, places), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("name", ["padre", "sima"])
def test_a_mixer_mixes_the_voxels_of_a_set_and_no_repeats(name, positions):
    """As if each set were given alone, without its repeats; with position added or without."""
    model, x, places = blocks()
    attnzoo.replace_attention(model, name, positions=positions, **(CONV1D if name == "padre" else {}))
    layer = model.layers[0].attention
    sets, repeats = sets_of(places, 0)
    assert repeats.any()
    value = x[sets]
    key = value + torch.randn(300, 16)[sets]
    out, weights = layer(key, key.clone(), value, key_padding_mask=repeats)
    assert weights is None
    given_to = key if positions else value
    for got, tokens, hidden in zip(out, given_to, repeats, strict=True):
        torch.testing.assert_close(got[~hidden], layer.mixer(tokens[None, ~hidden])[0], atol=1e-5, rtol=1e-4)
    assert model(x, places).shape == x.shape


def test_three_tensors_are_one_sequence_where_the_user_says_so():
    model, x, places = blocks()
    attnzoo.replace_attention(model, "padre", **CONV1D)
    with pytest.raises(UnsupportedError, match=r"positions=True.*positions=False"):
        model(x, places)
    attnzoo.replace_attention(model, "padre", positions=True, **CONV1D)
    assert attnzoo.swap_report(model).layers[0].options["positions"] is True
    layer = model.layers[0].attention
    tokens = torch.randn(2, 5, 16)
    with pytest.raises(UnsupportedError, match="differ in shape"):
        layer(tokens, tokens[:, :3], tokens[:, :3])
    with pytest.raises(OptionError, match="positions must be True or False"):
        attnzoo.replace_attention(model, "padre", positions=1, **CONV1D)


def test_callers_that_give_one_tensor_need_no_positions():
    with pytest.raises(OptionError, match="positions is not an option here"):
        attnzoo.replace_attention(nn.TransformerEncoderLayer(16, 2), "sima", positions=False)


def test_gradients_reach_features_and_position():
    model, x, places = blocks()
    attnzoo.replace_attention(model, "padre", positions=True, **CONV1D)
    model.train()(x.requires_grad_(), places).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_swap_is_saved_with_what_was_said_of_positions(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = SetBlocks(width=16, heads=2, blocks=1)

        def forward(self, x, places):
            return self.blocks(x, places)

    _, x, places = blocks()
    model = Named().eval()
    attnzoo.replace_attention(model, "padre", positions=False, **CONV1D)
    attnzoo.save(model, tmp_path / "saved")
    again = attnzoo.load(tmp_path / "saved", Named()).eval()
    torch.testing.assert_close(again(x, places), model(x, places))

import itertools

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.bench.trace import trace
from attnzoo.errors import OptionError, ShapeError, UnsupportedError
from attnzoo.mixers.channel_mixing import make_channel_mixing
from attnzoo.mixers.padre import Padre
from tests.mixers.zoo import ARGS, CASES, Case, finite_difference_degree, tokens


def padre(degree: int, dim: int = 5, kernel_size: int = 3, **options) -> Padre:
    """A PADRe whose every parameter is random: biases and prefix weights too."""
    torch.manual_seed(degree)
    mixer = Padre(dim, degree=degree, kernel_size=kernel_size, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.5)
    return mixer


PARTS = [
    {},
    {"channel_mixing": "grouped"},
    {"channel_mixing": "identity"},
    {"token_mixing": "conv1d"},
    {"token_mixing": "identity"},
    {"z_mixing": "identity"},
    {"output": "sum"},
]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_is_a_polynomial_of_exactly_its_degree(degree, prefix):
    """Along a line x + t u the d-th finite difference is the same everywhere and not 0, and the next one is 0."""
    mixer = padre(degree)
    x, u = torch.randn(2, 2, prefix + 12, 5, dtype=torch.float64)
    values = torch.stack([mixer(x + t * u, grid=(3, 4), prefix=prefix) for t in range(degree + 3)])
    nth = values.diff(n=degree, dim=0)
    size = values.abs().max()
    assert (nth.diff(dim=0).abs().max() / size) < 1e-12
    assert (nth.abs().flatten(2).amax(2).min() / size) > 1e-6  # in every image
    if prefix:
        assert (nth[:, :, :prefix].abs().amax(-1).min() / size) > 1e-9  # and in every prefix token
        assert (nth[:, :, prefix:].abs().amax(-1).min() / size) > 1e-9  # and in every patch


@settings(max_examples=40, deadline=None)
@given(
    degree=st.integers(1, 4),
    kernel=st.sampled_from([1, 3, 5, 11]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    prefix=st.integers(0, 3),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_written_out_equation(degree, kernel, height, width, prefix, masked, seed):
    mixer = padre(degree, kernel_size=kernel)
    torch.manual_seed(seed)
    x = torch.randn(2, prefix + height * width, 5, dtype=torch.float64)
    mask = torch.rand(x.shape[:2]) > 0.3 if masked else None
    args = {"grid": (height, width), "prefix": prefix, "mask": mask}
    torch.testing.assert_close(mixer(x, **args), mixer.reference(x, **args), atol=1e-11, rtol=1e-9)


def test_gradients_equal_those_of_the_written_out_equation():
    mixer = padre(3)
    x = torch.randn(2, 2 + 12, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 14) > 0.2
    inputs = [x, *mixer.parameters()]
    weight = torch.randn(2, 14, 5, dtype=torch.float64)
    fast, slow = (
        torch.autograd.grad((f(x, grid=(3, 4), prefix=2, mask=mask) * weight).sum(), inputs)
        for f in (mixer, mixer.reference)
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_float32_is_near_float64(degree):
    mixer = Padre(16, degree=degree, kernel_size=5)
    x = torch.randn(2, 1 + 63, 16)
    fast = mixer(x, grid=(7, 9), prefix=1)
    torch.testing.assert_close(
        fast.double(), mixer.double().reference(x.double(), grid=(7, 9), prefix=1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_batch_of_different_grids_equals_its_images(prefix):
    """Both ways to batch images of different grids: a grid an image, and one canvas with a mask."""
    mixer = padre(3)
    grids = [(4, 6), (7, 3), (1, 1), (5, 5)]
    images = [torch.randn(1, prefix + h * w, 5, dtype=torch.float64) for h, w in grids]
    alone = [mixer(x, grid=g, prefix=prefix) for x, g in zip(images, grids, strict=True)]

    longest = max(h * w for h, w in grids) + 2
    packed = torch.full((4, prefix + longest, 5), float("nan"), dtype=torch.float64)
    for row, x in zip(packed, images, strict=True):
        row[: x.shape[1]] = x[0]
    out = mixer(packed, grid=torch.tensor(grids), prefix=prefix)
    for row, x in zip(out, alone, strict=True):
        torch.testing.assert_close(row[: x.shape[1]], x[0], atol=1e-10, rtol=1e-9)
        assert not row[x.shape[1] :].any()

    canvas = torch.full((4, 7, 6, 5), float("nan"), dtype=torch.float64)
    real = torch.zeros(4, 7, 6, dtype=torch.bool)
    for i, (h, w) in enumerate(grids):
        canvas[i, :h, :w], real[i, :h, :w] = images[i][0, prefix:].view(h, w, 5), True
    heads = torch.stack([x[0, :prefix] for x in images])
    tokens = torch.cat([heads, canvas.flatten(1, 2)], dim=1)
    mask = torch.cat([torch.ones(4, prefix, dtype=torch.bool), real.flatten(1)], dim=1)
    out = mixer(tokens, grid=(7, 6), prefix=prefix, mask=mask)
    for i, (h, w) in enumerate(grids):
        torch.testing.assert_close(out[i, :prefix], alone[i][0, :prefix], atol=1e-10, rtol=1e-9)
        patches = out[i, prefix:].view(7, 6, 5)[:h, :w].reshape(h * w, 5)
        torch.testing.assert_close(patches, alone[i][0, prefix:], atol=1e-10, rtol=1e-9)


def test_padding_of_nan_touches_neither_outputs_nor_gradients():
    mixer = padre(3)
    x = torch.randn(2, 1 + 12, 5, dtype=torch.float64)
    mask = torch.rand(2, 13) > 0.4
    mask[:, 0] = True
    dirty = torch.where(mask.unsqueeze(-1), x, float("nan"))
    clean = torch.where(mask.unsqueeze(-1), x, 0.0)
    results = []
    for given_x in (dirty, clean):
        out = mixer(given_x, grid=(3, 4), prefix=1, mask=mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(mixer.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("degree", [1, 3])
def test_prefix_and_patches_reach_each_other_in_one_layer(degree):
    """Every patch changes the class token and a register, and each of these every patch."""
    mixer = padre(degree, kernel_size=3)
    x = torch.randn(1, 2 + 49, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: mixer(t, grid=(7, 7), prefix=2).sum(-1), x)[0, :, 0]
    reach = jacobian.abs().amax(-1) > 1e-12  # (to, from)
    assert reach[:2].all()
    assert reach[:, :2].all()
    far = reach[2:, 2:]  # patches see each other through the kernel, or through the prefix for degree 2 and up
    assert far.all() == (degree > 1)


def test_takes_any_grid_at_any_time():
    mixer = padre(2, kernel_size=11)
    for h, w in itertools.product((1, 2, 9), (1, 5)):
        assert mixer(torch.randn(1, h * w, 5, dtype=torch.float64), grid=(h, w)).shape == (1, h * w, 5)


def test_non_contiguous_input_gives_the_same():
    mixer = padre(3)
    x = torch.randn(5, 12, 2, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(mixer(x, grid=(3, 4)), mixer(x.contiguous(), grid=(3, 4)))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_starts_in_range_and_keeps_patches_apart(degree, prefix):
    """At the start prefix and patches neither blow up nor vanish, and a class token does not drown the patches."""
    torch.manual_seed(0)
    out = Padre(96, degree=degree)(torch.randn(4, prefix + 196, 96), grid=(14, 14), prefix=prefix)
    patches = out[:, prefix:]
    assert 0.1 < patches.square().mean().sqrt() < 2
    unit = torch.nn.functional.normalize(patches, dim=-1)
    assert (unit @ unit.mT).mean() < 0.2
    if prefix:
        assert 0.5 < out[:, :prefix].square().mean().sqrt() < 2


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("options", PARTS, ids=str)
def test_near_the_identity_each_product_changes_little(options, prefix):
    """Z_d begins as Z_1, its first factor, times a little more or less than 1 each time."""
    torch.manual_seed(0)
    mixer = Padre(64, num_heads=2, degree=3, start="identity", mix_prefix=prefix > 0, **options)
    first = Padre(64, num_heads=2, degree=1, mix_prefix=prefix > 0, **options)
    state = mixer.state_dict()
    with torch.no_grad():
        for name, weight in first.named_parameters():  # the maps of all factors are one matrix, the first one's first
            if name == "term_weights":
                weight.fill_(1.0)
            else:
                weight.copy_(state[name].reshape(3, *weight.shape)[0] if name.startswith("y_channels") else state[name])
        x = torch.randn(2, prefix + 64, 64)
        out, alone = mixer(x, grid=(8, 8), prefix=prefix), first(x, grid=(8, 8), prefix=prefix)
    assert 0.02 < ((out - alone).norm() / alone.norm()) < 0.8
    assert torch.cosine_similarity(out.flatten(), alone.flatten(), dim=0) > 0.8


def test_near_the_identity_there_must_be_a_bias():
    with pytest.raises(OptionError, match="cannot both be 'identity'"):
        Padre(8, start="identity", token_mixing="identity", channel_mixing="identity")


def test_a_gain_is_a_factor_per_channel():
    torch.manual_seed(0)
    mixer, x = Padre(8, degree=2, kernel_size=3, gain=0.02, mix_prefix=False), torch.randn(1, 20, 8)
    small = mixer(x, grid=(4, 5))
    with torch.no_grad():
        mixer.gain.fill_(1.0)
        torch.testing.assert_close(small, 0.02 * mixer(x, grid=(4, 5)))
        mixer.gain[3] = 0
        assert not mixer(x, grid=(4, 5))[..., 3].any()


@pytest.mark.parametrize("output", ["last", "sum"])
def test_a_normalized_output_cannot_grow(output):
    torch.manual_seed(0)
    about = {"degree": 2, "kernel_size": 3, "out_norm": True, "output": output}
    mixer, x = Padre(8, gain=0.5, **about), torch.randn(2, 21, 8)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, 13:] = False
    place = {"grid": (4, 5), "prefix": 1}
    out = mixer(x, **place)
    half = torch.full((2, 21), 0.5)
    torch.testing.assert_close(out.square().mean(-1).sqrt(), half, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, **place), out, msg="in one call")
        mixer.y_channels.weight.mul_(30)
    torch.testing.assert_close(
        mixer(x, **place).square().mean(-1).sqrt(), torch.full((2, 21), 0.5), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(mixer(x, **place), mixer.reference(x, **place), atol=1e-4, rtol=1e-4)
    padded = mixer(x, **place, mask=mask)
    torch.testing.assert_close(padded, mixer.reference(x, **place, mask=mask), atol=1e-4, rtol=1e-4)
    assert not padded[~mask].any()
    assert "out_norm=True" in repr(mixer)
    with pytest.raises(OptionError, match="out_norm=True is not"):
        mixer.inherit(torch.eye(8), torch.zeros(8))
    assert not Padre.abilities(out_norm=True)["inherit"]


def test_a_normalized_output_decodes_as_the_full_forward():
    torch.manual_seed(0)
    mixer = Padre(8, degree=2, kernel_size=3, token_mixing="causal_conv1d", out_norm=True, gain=0.02)
    x = torch.randn(2, 9, 8)
    whole, state, parts = mixer(x), None, []
    for token in x.split(1, dim=1):
        out, state = mixer.extend(token, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_half_precision_holds_many_tokens_with_an_offset():
    """A sum over 12,544 tokens that have something in common is beyond float16: the mean must not be."""
    torch.manual_seed(0)
    mixer = Padre(16, degree=3, kernel_size=3)
    x = torch.randn(1, 1 + 112 * 112, 16) + 8
    exact = mixer(x, grid=(112, 112), prefix=1)
    half = mixer.half()(x.half(), grid=(112, 112), prefix=1).float()
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


def test_without_gradients_a_step_is_one_product_of_convolutions():
    """Where padding keeps the layer from being one call."""
    mixer, x = Padre(8, degree=3, kernel_size=3), torch.randn(2, 21, 8)
    place = {"grid": (4, 5), "prefix": 1, "mask": torch.ones(2, 21, dtype=torch.bool)}
    with torch.no_grad():
        seen = trace(lambda: mixer(x, **place))
    assert any("depthwise2d_product" in op for op in seen.backends)
    torch.testing.assert_close(mixer(x, **place), mixer.reference(x, **place))


def test_degree_one_is_one_convolution():
    mixer = Padre(8, degree=1, kernel_size=3, mix_prefix=False)
    x = torch.randn(1, 20, 8)
    image = rearrange(mixer.y_channels(x), "b (h w) c -> b c h w", h=4)
    plain = torch.nn.functional.conv2d(image, mixer.y_tokens[0].weight, mixer.y_tokens[0].bias, padding=1, groups=8)
    torch.testing.assert_close(mixer(x, grid=(4, 5)), rearrange(plain, "b c h w -> b (h w) c"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"degree": 0}, "degree must be a whole number of at least 1, not 0"),
        ({"degree": "three"}, "not 'three'"),
        ({"degree": True}, "not True"),
        ({"degree": 2.0}, "not 2.0"),
        ({"kernel_size": 4}, "odd"),
        ({"kernel_size": -1}, "at least 1"),
        ({"mix_prefix": 1}, "True or False"),
        ({"start": "near"}, "start must be one of"),
        ({"products": 0}, "products must be True or False, not 0"),
        ({"z_mixing": "dense"}, "z_mixing must be one of"),
        ({"out_proj": 1}, "True or False"),
        ({"gain": float("nan")}, "gain must be a number"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        Padre(8, **options)


@pytest.mark.parametrize(
    ("shape", "args", "said"),
    [
        ((1, 12, 7), {"grid": (3, 4)}, r"\(B, N, 8\), got \(1, 12, 7\)"),
        ((1, 12, 8), {}, "needs grid"),
        ((1, 12, 8), {"grid": (3, 5)}, "12 tokens are not 0 prefix tokens and a grid of 3 x 5 = 15"),
        ((1, 12, 8), {"grid": (3, 4), "prefix": 1}, "12 tokens are not 1 prefix"),
        ((1, 12, 8), {"grid": (0, 4)}, "at least 1"),
        ((1, 12, 8), {"grid": 12}, "whole numbers"),
        ((1, 12, 8), {"grid": "34"}, "whole numbers"),
        ((1, 12, 8), {"grid": (3.0, 4.0)}, "whole numbers"),
        ((1, 12, 8), {"grid": (3, 4), "prefix": 13}, "from 0 to the 12"),
        ((2, 12, 8), {"grid": torch.tensor([[3, 4]])}, r"shape \(2, 2\)"),
        ((1, 12, 8), {"grid": torch.tensor([[3, 5]])}, "at most 12"),
        ((1, 12, 8), {"grid": (3, 4), "mask": torch.ones(1, 11, dtype=torch.bool)}, r"\(1, 12\).*\(1, 11\)"),
        ((1, 12, 8), {"grid": (3, 4), "mask": torch.ones(1, 12)}, "boolean"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape, args, said):
    with pytest.raises(ShapeError, match=said):
        Padre(8, degree=2, kernel_size=3)(torch.zeros(shape), **args)


def test_without_prefix_weights_prefix_tokens_are_refused():
    with pytest.raises(ShapeError, match="mix_prefix=False"):
        Padre(8, mix_prefix=False)(torch.zeros(1, 13, 8), grid=(3, 4), prefix=1)


PADRES = [case for case in CASES if case.name == "padre"]


@pytest.mark.parametrize("case", PADRES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_every_configuration_equals_the_written_out_equation(case, masked):
    mixer, x = case.build(), tokens()
    mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    inputs = [x.requires_grad_(), *mixer.parameters()]
    results = []
    for function in (mixer, mixer.reference):
        out = function(x, **ARGS, mask=mask)
        gradients = torch.autograd.grad(out.pow(2).sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append((out, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("case", PADRES, ids=str)
def test_every_configuration_is_a_polynomial_of_exactly_its_degree(case, degree):
    mixer = Case("padre", {**case.options, "degree": degree}).build()
    assert finite_difference_degree(lambda x: mixer(x, **ARGS), tokens(), degree + 1) == (
        degree if mixer.products else 1
    )


def test_the_control_has_as_many_weights_and_no_products():
    whole, control = (Padre(8, degree=3, products=products) for products in (True, False))
    assert whole.state_dict().keys() == control.state_dict().keys()
    assert "products=False" in repr(control)
    assert "products" not in repr(whole)
    with pytest.raises(OptionError, match="only in a product"):
        Padre(8, start="identity", products=False)
    with pytest.raises(OptionError, match="only in a product"):
        control.inherit(torch.eye(8), torch.zeros(8))
    assert not Padre.abilities(products=False)["inherit"]


@pytest.mark.parametrize("degree", [1, 3])
def test_without_maps_between_factors_there_are_as_many_as_the_degree(degree):
    mixer = Padre(8, degree=degree, z_mixing="identity", mix_prefix=False)
    assert sum(p.numel() for p in mixer.parameters()) == degree * (64 + 8 + 121 * 8 + 8)


@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("output", ["last", "sum", "element_sum"])
def test_the_paper_s_modules_by_their_operation_counts(degree, output):
    """Parameters: (2d - 1) (C^2 + k^2 C) and the biases, for images; k in place of k^2 for sequences."""
    own = {"tokens": 49} if output == "element_sum" else {}
    weights = {"last": 0, "sum": (degree + 1) * 8, "element_sum": (degree + 1) * 49 * 8}[output]
    for mixing, taps in (("conv2d", 121), ("conv1d", 11)):
        mixer = Padre(8, degree=degree, token_mixing=mixing, output=output, mix_prefix=False, **own)
        maps = 2 * degree - 1
        assert sum(p.numel() for p in mixer.parameters()) == maps * (64 + 8 + taps * 8 + 8) + weights


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from(["last", "sum"]),
    st.integers(0, 99),
)
def test_going_on_from_a_state_equals_the_whole(cuts, degree, kernel, output, seed):
    mixer = padre(degree, kernel_size=kernel, token_mixing="causal_conv1d", output=output)
    torch.manual_seed(seed)
    x = torch.randn(2, sum(cuts), 5, dtype=torch.float64)
    parts, state = [], None
    for part in x.split(cuts, dim=1):
        out, state = mixer.extend(part, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x), atol=1e-10, rtol=1e-9)


def test_a_state_that_is_not_its_own_is_refused():
    mixer = padre(2, token_mixing="causal_conv1d")
    x = torch.zeros(1, 3, 5, dtype=torch.float64)
    _, state = mixer.extend(x)
    for wrong in (state[:1], [*state, state[0]], [part.repeat(2, 1, 1) for part in state], [p[:, 1:] for p in state]):
        with pytest.raises(ShapeError, match="the state must be"):
            mixer.extend(x, wrong)


def test_each_dense_map_over_tokens_is_its_own():
    """A_2 changes what Z_2 is made of, and leaves Z_1 as it was."""
    mixer = padre(2, token_mixing="dense", tokens=7, output="sum")
    assert [tuple(mixing.weight.shape) for mixing in mixer.y_tokens] == [(7, 7), (7, 7)]
    x = torch.randn(1, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        mixer.term_weights[1] = 0  # Z_1 alone
        before = mixer(x)
        mixer.y_tokens[1].weight += 1
        assert torch.equal(mixer(x), before)
        mixer.y_tokens[0].weight += 1
        assert not torch.allclose(mixer(x), before)


@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_channel_mixing_is_the_matrix_it_says(kind):
    """Each output channel reads the inputs of its own group, with the weights that stand in its row."""
    torch.manual_seed(0)
    mixing = make_channel_mixing(kind, 6, 2, 3)
    with torch.no_grad():
        mixing.bias.normal_()
    x = torch.randn(1, 4, 6)
    out = mixing(x)
    for copy, channel in itertools.product(range(2), range(6)):
        if kind == "dense":
            expected = x[0] @ mixing.weight[copy * 6 + channel]
        else:
            group, row = divmod(channel, 2)
            expected = x[0, :, 2 * group : 2 * group + 2] @ mixing.weight[copy, group, row]
        torch.testing.assert_close(out[0, :, copy * 6 + channel], expected + mixing.bias[copy * 6 + channel])


def test_only_a_causal_one_goes_on_from_a_state():
    x = torch.zeros(1, 3, 5, dtype=torch.float64)
    for options in (
        {},
        {"token_mixing": "conv1d"},
        {"token_mixing": "causal_conv1d", "output": "element_sum", "tokens": 3},
    ):
        with pytest.raises(UnsupportedError, match="can decode from a state"):
            padre(2, **options).extend(x)


@pytest.mark.parametrize("output", ["last", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_twelve_layers_start_in_range(degree, dtype, output):
    """Residual layers, each behind a norm: nothing blows up or vanishes, forward or backward."""
    torch.manual_seed(0)
    x = torch.randn(2, 196, 64)
    stream = x.to(dtype).requires_grad_()
    y = stream
    for _ in range(12):
        layer = Padre(64, degree=degree, output=output, mix_prefix=False).to(dtype)
        out = layer(torch.nn.functional.layer_norm(y, (64,)), grid=(14, 14))
        assert 0.2 < out.float().square().mean().sqrt() < 2
        assert out.float().abs().max() < 100
        y = y + out
    (gradient,) = torch.autograd.grad(y.float().square().mean(), stream)
    assert gradient.isfinite().all()
    assert gradient.float().square().mean().sqrt() * x.numel() > 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token_mixing": "conv3d"}, "token_mixing must be one of 'conv2d', 'conv1d'"),
        ({"token_mixing": "dense"}, "say tokens="),
        ({"output": "element_sum"}, "say tokens="),
        ({"channel_mixing": "grouped"}, "3 groups"),
        ({"output": "all"}, "output must be one of"),
        ({"tokens": 0}, "at least 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        Padre(8, 3, **options)

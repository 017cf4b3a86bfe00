"""Each relative of PADRe against its authors' definition, written out here, and against PADRe's equation."""

import math

import pytest
import torch
from timm.models.metaformer import Pooling as TimmPooling
from torch.nn import functional as F

from attnzoo import create_attention
from attnzoo.mixers import hyena, linear_angular, mamba, sima
from attnzoo.mixers.canvas import Canvas
from attnzoo.mixers.heads import split_heads
from tests.mixers.zoo import finite_difference_degree

N, DIM, HEADS = 12, 6, 2
GRID = (3, 4)


def build(name, **options):
    torch.manual_seed(0)
    mixer = create_attention(name, DIM, HEADS, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def x_of(batch=2):
    return torch.randn(batch, N, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(mixer, oracle, x=None, **args):
    """Outputs and gradients, of the input and of every parameter that the oracle reads."""
    x = (x_of() if x is None else x).requires_grad_()
    inputs = [x, *mixer.parameters()]
    results = []
    for function in (lambda t: mixer(t, **args), oracle):
        out = function(x)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append((out, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def padre_equation(x, a, b, c, d):
    """Z_d of Y_i = A_i X B_i, Z_1 = Y_1, Z_{i+1} = (C_i Z_i D_i) * Y_{i+1}; each map a function."""
    y = [over_tokens(over_channels(x)) for over_tokens, over_channels in zip(a, b, strict=True)]
    z = y[0]
    for over_tokens, over_channels, factor in zip(c, d, y[1:], strict=True):
        z = over_tokens(over_channels(z)) * factor
    return z


def same(x):
    return x


# Conv2Former


def conv2former_authors(m, x, activation):
    """ConvMod of the authors: images (B, C, H, W), 1 x 1 convolutions."""
    image = x.mT.unflatten(2, GRID)
    w, bias = m.channels.weight[..., None, None], m.channels.bias
    a = F.conv2d(
        activation(F.conv2d(image, w[:DIM], bias[:DIM])), m.tokens.weight, m.tokens.bias, padding=5, groups=DIM
    )
    out = F.conv2d(a * F.conv2d(image, w[DIM:], bias[DIM:]), m.proj.weight[..., None, None], m.proj.bias)
    return out.flatten(2).mT


@pytest.mark.parametrize(("name", "activation"), [("gelu", F.gelu), ("identity", same)])
def test_conv2former_is_its_authors(name, activation):
    m = build("conv2former", activation=name, mix_prefix=False)
    assert_same(m, lambda x: conv2former_authors(m, x, activation), grid=GRID)


def test_conv2former_without_gelu_is_padre_of_degree_2():
    m = build("conv2former", activation="identity", mix_prefix=False)

    def convolve(x):
        return F.conv2d(x.mT.unflatten(2, GRID), m.tokens.weight, m.tokens.bias, padding=5, groups=DIM).flatten(2).mT

    def oracle(x):
        b = [lambda t: F.linear(t, m.channels.weight[:DIM], m.channels.bias[:DIM])]
        b.append(lambda t: F.linear(t, m.channels.weight[DIM:], m.channels.bias[DIM:]))
        return m.proj(padre_equation(x, [convolve, same], b, [same], [same]))

    assert_same(m, oracle, grid=GRID)
    assert finite_difference_degree(lambda x: m(x, grid=GRID), x_of(), 3) == 2
    with_gelu = build("conv2former", mix_prefix=False)
    assert finite_difference_degree(lambda x: with_gelu(x, grid=GRID), x_of(), 8) is None


# Hyena


def hyena_taps(m, tokens):
    """The filters (order - 1, C, tokens), as the authors make them: sines of an MLP of the time, decaying."""
    f = m.filters
    assert f.length == 40
    t = torch.linspace(0, 1, 40, dtype=torch.float64)[:tokens, None]
    w = 2 * math.pi * torch.linspace(0, 39, 40, dtype=torch.float64)[:tokens, None] / 40
    bands = torch.linspace(1e-4, f.bands - 1, f.bands, dtype=torch.float64)[None]
    z = torch.exp(-1j * bands * w)
    h = torch.cat([t, z.real, z.imag], dim=-1)
    for layer in f.layers:
        h = torch.sin(f.frequency * layer(h))
    channels = len(f.bias)
    deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, channels).double().abs()
    return (f.last(h)[:, :channels] * torch.exp(-t * deltas)).T.unflatten(0, (m.order - 1, DIM))


def causal_toeplitz(taps):
    """(C, N, N) out of taps (C, N)."""
    n = taps.shape[1]
    i = torch.arange(n)
    lag = i[:, None] - i
    return torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0.0)


def hyena_equation(m, x):
    """The operator as an instance of PADRe: B = W, A = the short filter, C_1 = I and C_2 .. C_M = long convolutions."""
    taps, skip = hyena_taps(m, N), m.filters.bias.unflatten(0, (m.order - 1, DIM))
    kernel = m.short_filter.weight[:, 0]

    def stream(k):  # of the projections x_0 .. x_{M-1}, v
        part = slice(k * DIM, (k + 1) * DIM)

        def short(t):
            late = F.pad(t, (0, 0, 2, 0))
            shifted = torch.stack([late[:, j : j + N] for j in range(3)], dim=-1)
            return (shifted * kernel[part]).sum(-1) + m.short_filter.bias[part]

        return short, lambda t: F.linear(t, m.in_proj.weight[part], m.in_proj.bias[part])

    def long(o):
        matrix = causal_toeplitz(taps[o]) + skip[o][:, None, None] * torch.eye(N)
        return lambda z: torch.einsum("cnm,bmc->bnc", matrix, z)

    order = [m.order, *range(m.order - 1, 0, -1), 0]
    a, b = zip(*(stream(k) for k in order), strict=True)
    c = [same, *(long(o) for o in range(m.order - 1))]
    return m.out_proj(padre_equation(x, a, b, c, [same] * m.order))


@pytest.mark.parametrize("features", [3, 7])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_hyena_is_its_authors_and_padre_of_degree_one_more(order, features):
    m = build("hyena", order=order, features=features, length=40, bidirectional=False)
    assert_same(m, lambda x: hyena_equation(m, x))
    assert finite_difference_degree(m, x_of(), order + 2) == order + 1


@pytest.mark.parametrize("order", [2, 3])
def test_hyena_in_both_directions_has_its_degree_and_its_filters(order):
    m = build("hyena", order=order)
    assert finite_difference_degree(m, x_of(), order + 2) == order + 1
    x, taps = torch.randn(2, 5, 9).double(), torch.randn(2, 5, 9).double()
    lag = torch.arange(9)[:, None] - torch.arange(9)
    matrix = torch.where(lag >= 0, taps[0][:, lag.clamp(min=0)], taps[1][:, (-lag).clamp(min=0)])
    torch.testing.assert_close(hyena.long_convolution(x, taps), torch.einsum("cnm,bcm->bcn", matrix, x))


# SimA and linear angular attention


def heads_of(m, x):
    """Queries, keys and values as loops have them: [head][row] of (N, D)."""
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return [[part.chunk(HEADS, dim=-1)[h] for part in (q, k, v)] for h in range(HEADS)]


def sima_authors(m, x):
    out = []
    for q, k, v in heads_of(m, x):
        q, k = (t / t.abs().sum(dim=1, keepdim=True) for t in (q, k))
        out.append(torch.einsum("bnd,bmd,bme->bne", q, k, v))
    return m.proj(torch.cat(out, dim=-1))


@pytest.mark.parametrize("tokens", [2, N])  # either order of the products
def test_sima_is_its_authors(tokens):
    m = build("sima")
    assert_same(m, lambda x: sima_authors(m, x), x_of()[:, :tokens])


def angular_authors(m, x, training):
    out = []
    for h, (q, k, v) in enumerate(heads_of(m, x)):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        y = v / 2 + torch.einsum("bnd,bmd,bme->bne", q, k, v) / math.pi
        if training:
            y = y + torch.where(weights > 0.02, weights, 0.0) @ v
        taps = m.dconv.weight[h, 0, :, 0]
        late = F.pad(v, (0, 0, 4, 4))
        convolved = sum(tap * late[:, j : j + x.shape[1]] for j, tap in enumerate(taps))
        out.append(y / y.norm(dim=-1, keepdim=True) + convolved)
    return m.proj(torch.cat(out, dim=-1))


@pytest.mark.parametrize("training", [False, True])
def test_linear_angular_is_its_authors(training):
    m = build("linear_angular", auxiliary=True).train(training)
    assert_same(m, lambda x: angular_authors(m, x, training))
    with torch.no_grad():
        x = 2 * x_of()  # so that some weights are below the threshold
        weights = linear_angular.above_threshold(*split_heads(m.qkv(x), HEADS, None)[:2], None)
        assert 0.1 < (weights == 0).double().mean() < 0.9
        torch.testing.assert_close(m(x), angular_authors(m, x, training))


@pytest.mark.parametrize(("name", "product"), [("sima", sima.product), ("linear_angular", linear_angular.angular)])
def test_without_normalization_they_are_cubic_exactly(name, product):
    m = build(name)

    def without(x):
        return product(*split_heads(m.qkv(x), HEADS, None))

    assert finite_difference_degree(without, x_of(), 4) == 3
    assert finite_difference_degree(m, x_of(), 8) is None


# Mamba


def mamba_authors(m, x, activation=F.silu):
    """The selective state space, channel by channel, token by token, in one direction or two."""
    u, z = (x @ m.in_proj.weight.T).chunk(2, dim=-1)
    total = 0
    for s, part in enumerate(m.directions):
        stream = u.flip(1) if s else u
        kernel = part.conv1d.weight[:, 0]
        late = F.pad(stream, (0, 0, kernel.shape[1] - 1, 0))
        v = sum(kernel[:, j] * late[:, j : j + x.shape[1]] for j in range(kernel.shape[1])) + part.conv1d.bias
        v = activation(v)
        low, b, c = (v @ part.x_proj.weight.T).split([part.rank, part.state_size, part.state_size], dim=-1)
        dt = F.softplus(low @ part.dt_proj.weight.T + part.dt_proj.bias)
        h, ys = torch.zeros(len(x), v.shape[2], part.state_size, dtype=x.dtype), []
        for t in range(x.shape[1]):
            decay = torch.exp(-dt[:, t, :, None] * part.A_log.exp())
            h = decay * h + (dt[:, t] * v[:, t])[..., None] * b[:, t, None]
            ys.append(torch.einsum("bcs,bs->bc", h, c[:, t]) + part.D * v[:, t])
        y = torch.stack(ys, dim=1)
        total = total + (y.flip(1) if s else y)
    return (total * activation(z)) @ m.out_proj.weight.T


@pytest.mark.parametrize("bidirectional", [False, True])
def test_mamba_is_its_authors(bidirectional):
    m = build("mamba", bidirectional=bidirectional, state_size=3)
    assert_same(m, lambda x: mamba_authors(m, x))


def test_mamba_with_constant_steps_and_no_silu_is_a_polynomial(monkeypatch):
    m = build("mamba", state_size=3)
    assert finite_difference_degree(m, x_of(), 8) is None
    for part in m.directions:
        torch.nn.init.zeros_(part.dt_proj.weight)
    assert finite_difference_degree(m, x_of(), 8) is None
    monkeypatch.setattr(mamba.F, "silu", same)
    assert finite_difference_degree(lambda x: m.directions[0](m.in_proj(x).chunk(2, dim=-1)[0]), x_of(), 5) == 3
    assert finite_difference_degree(m, x_of(), 5) == 4


def test_the_fast_kernel_of_mamba_is_called_as_its_authors_call_it():
    """The package is not here: its signature is, as of mamba_ssm 2.2, with the meaning of its own reference."""
    called = {}

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        called.update(u=u.shape, B=B.shape, wide={A.dtype, D.dtype, delta_bias.dtype})
        assert all(t.is_contiguous() for t in (u, delta, B, C))
        assert z is None
        dt = F.softplus(delta + delta_bias[:, None])
        assert delta_softplus
        h, ys = 0, []
        for t in range(u.shape[2]):
            h = torch.exp(dt[:, :, t, None] * A) * h + (dt * u)[:, :, t, None] * B[:, None, :, t]
            ys.append((h * C[:, None, :, t]).sum(-1))
        return torch.stack(ys, -1) + D[:, None] * u

    m = build("mamba", state_size=3).float()
    x = x_of().float()
    expected = m(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba, "_kernel", lambda: selective_scan_fn)
        patch.setattr(mamba, "_on_cuda", lambda u: True)
        torch.testing.assert_close(m(x), expected)
        patch.setattr(mamba, "_kernel", lambda: pytest.fail("the authors' kernel takes no float64"))
        m.double()(x.double())
    assert called == {"u": (2, 2 * DIM, N), "B": (2, 3, N), "wide": {torch.float32}}


# the controls


def test_conv_is_one_convolution():
    m = build("conv", mix_prefix=False)

    def oracle(x):
        return F.conv2d(x.mT.unflatten(2, GRID), m.tokens.weight, m.tokens.bias, padding=5, groups=DIM).flatten(2).mT

    assert_same(m, oracle, grid=GRID)
    assert finite_difference_degree(lambda x: m(x, grid=GRID), x_of(), 3) == 1


@pytest.mark.parametrize("pool_size", [1, 3, 5])
def test_pooling_is_timms(pool_size):
    m, timms = build("pooling", pool_size=pool_size), TimmPooling(pool_size)
    assert_same(m, lambda x: timms(x.mT.unflatten(2, GRID)).flatten(2).mT, grid=GRID)
    assert not list(m.parameters())
    x = x_of()
    with_prefix = m(x, grid=(2, 5), prefix=2)
    torch.testing.assert_close(with_prefix[:, :2], x.mean(1, keepdim=True) - x[:, :2])


def test_mlp_mixer_is_its_equation():
    m = build("mlp_mixer", tokens=N, hidden=5)

    def oracle(x):
        hidden = F.gelu(torch.einsum("hn,bnc->bhc", m.fc1.weight, x) + m.fc1.bias[:, None])
        return torch.einsum("nh,bhc->bnc", m.fc2.weight, hidden) + m.fc2.bias[:, None]

    assert_same(m, oracle)
    assert build("mlp_mixer", tokens=N).fc1.out_features == DIM // 2


def test_a_line_is_put_back_in_its_order():
    x, mask = x_of(3), torch.rand(3, N) > 0.5
    line = Canvas.line(x, None, 0, mask)
    head, laid = line.lay(x)
    for row, real, back in zip(x, mask, laid, strict=True):
        torch.testing.assert_close(back[: real.sum()], row[real])
    torch.testing.assert_close(line.take(head, laid), torch.where(mask.unsqueeze(-1), x, 0.0))

"""Power attention against its authors' equation, at once, in chunks and from a state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import attnzoo
from attnzoo import create_attention
from attnzoo.errors import OptionError, ShapeError, UnsupportedError
from attnzoo.mixers import power
from attnzoo.mixers.heads import split_heads
from tests.eviction.models import CACHE, cache_of, language_model, token_ids
from tests.mixers.test_relatives import DIM, HEADS, N, assert_same, build, x_of
from tests.mixers.zoo import finite_difference_degree


def authors(m, x, bidirectional, gated):
    """Token by token, as the reference of the authors' package: powers of scores, discounts of cumulative gates."""
    q, k, v = x @ m.qkv.weight.T + m.qkv.bias, None, None
    q, k, v = q.unflatten(-1, (3, HEADS, DIM // HEADS)).unbind(2)  # (B, N, H, D) each
    kept = F.logsigmoid(x @ m.gate.weight.T + m.gate.bias).cumsum(1) if gated else x.new_zeros(*x.shape[:2], HEADS)
    rows = []
    for i in range(x.shape[1]):
        above, below = 0, 0
        for j in range(x.shape[1] if bidirectional else i + 1):
            weight = torch.exp(kept[:, i] - kept[:, j]) * (q[:, i] * k[:, j]).sum(-1) ** m.power  # (B, H)
            above, below = above + weight[..., None] * v[:, j], below + weight
        rows.append((above / below[..., None]).flatten(1))
    return torch.stack(rows, 1) @ m.proj.weight.T + m.proj.bias


WAYS = [
    {},
    {"power": 4},  # more features than tokens: scores, and no features
    {"bidirectional": False},
    {"bidirectional": False, "gate": True},
    {"bidirectional": False, "gate": True, "power": 4},
]


@pytest.mark.parametrize("chunk", [128, 5])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_it_is_its_authors(options, chunk, monkeypatch):
    monkeypatch.setattr(power, "CHUNK", chunk)
    m = build("power", **options)
    assert_same(m, lambda x: authors(m, x, m.bidirectional, options.get("gate", False)))


@pytest.mark.parametrize("exponent", [2, 4, 6])
def test_products_of_features_are_powers_of_scores(exponent):
    m = build("power", power=exponent)
    q, k, _ = split_heads(m.qkv(x_of()), HEADS, None)
    assert m.features(q).shape == (2, HEADS, N, {2: 6, 4: 15, 6: 28}[exponent])
    torch.testing.assert_close(m.features(q) @ m.features(k).mT, (q @ k.mT) ** exponent)


def test_wide_heads_are_computed_by_scores_and_have_no_state():
    m = create_attention("power", 64, 1, power=4)
    assert not m.sets.numel()
    x = torch.randn(1, 9, 64)
    q, k, v = split_heads(m.qkv(x), 1, None)
    weights = (q @ k.mT) ** 4
    torch.testing.assert_close(m(x), m.proj((weights @ v / weights.sum(-1, keepdim=True))[:, 0]))
    with pytest.raises(OptionError, match="766,480 features, too many for a state"):
        create_attention("power", 64, 1, power=4, bidirectional=False)


def test_its_sums_are_polynomials():
    m = build("power")

    def sums(x):
        return m.features(m._heads(x, None)[0]) @ (m.features(m._heads(x, None)[1]).mT @ m._heads(x, None)[2])

    assert finite_difference_degree(lambda x: sums(x)[..., :-1], x_of(), 6) == 5
    assert finite_difference_degree(lambda x: sums(x)[..., -1:], x_of(), 6) == 4
    assert finite_difference_degree(m, x_of(), 8) is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 3, 128]),
    st.integers(0, 99),
)
def test_going_on_from_a_state_equals_the_whole(cuts, gate, exponent, chunk, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(power, "CHUNK", chunk)
        m = build("power", bidirectional=False, gate=gate, power=exponent)
        x = torch.randn(2, sum(cuts), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        parts, state = [], None
        for part in x.split(cuts, dim=1):
            out, state = m.extend(part, state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=1), m(x), atol=1e-10, rtol=1e-9)


def test_padding_leaves_no_trace_in_the_state():
    m = build("power", bidirectional=False, gate=True)
    x, more = x_of(), x_of(2).flip(1)
    real = torch.tensor([[False, True, True, False] + [True] * 8, [True] * 12])
    out, state = m.extend(torch.where(real[..., None], x, float("nan")), None, real)
    after, _ = m.extend(more, state)
    for row in range(2):
        alone, own = m.extend(x[row, real[row]][None])
        torch.testing.assert_close(out[row, real[row]], alone[0])
        torch.testing.assert_close(after[row], m.extend(more[row : row + 1], own)[0][0])
    assert not out[~real].any()


def test_tokens_whose_scores_are_all_zero_get_zero():
    m = build("power")
    with torch.no_grad():
        m.qkv.weight[:DIM], m.qkv.bias[:DIM] = 0, 0
    x = x_of().requires_grad_()
    out = m(x)
    torch.testing.assert_close(out, m.proj.bias.expand_as(out))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_half_precision_has_room_for_powers():
    m, x = create_attention("power", DIM, HEADS, power=4).half(), 30 * x_of().half()
    assert m(x).isfinite().all()
    wide = create_attention("power", DIM, HEADS, power=4).double()
    wide.load_state_dict(m.state_dict())
    assert (m(x) - wide(x.double())).abs().max() < 0.05 * m(x).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_sums_and_state_are_in_float32(dtype):
    """Where they were in half precision a long text would swallow what each token adds, and powers would overflow."""
    m = create_attention("power", DIM, HEADS, bidirectional=False)
    x = 20 * torch.randn(1, 600, DIM, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        whole, (out, state) = m(x), m.extend(x[:, :500])
        steps = [out]
        for token in x[:, 500:].split(1, dim=1):
            out, state = m.extend(token, state)
            steps.append(out)
    assert state[0].dtype == torch.float32
    assert whole.isfinite().all()
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=0.02 * float(whole.abs().max()), rtol=0)


def test_one_exported_graph_takes_any_number_of_tokens():
    m = create_attention("power", DIM, HEADS).eval()
    tokens = torch.export.Dim("tokens", min=2, max=512)
    exported = torch.export.export(m, (torch.randn(2, N, DIM),), dynamic_shapes={"x": {1: tokens}}).module()
    for count in (3, 40):
        x = torch.randn(2, count, DIM)
        torch.testing.assert_close(exported(x), m(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", [False, True])
def test_it_decodes_in_a_language_model(gate):
    torch.manual_seed(0)
    model, ids = language_model(), token_ids(2, 30)
    attnzoo.replace_attention(model, "power", bidirectional=False, gate=gate)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :13])
        cache, rest = cache_of(first), [first.logits]
        for token in ids[:, 13:].split(1, dim=1):
            out = model(token, **{CACHE: cache})
            cache = cache_of(out)
            rest.append(out.logits)
    torch.testing.assert_close(torch.cat(rest, dim=1), full, atol=1e-9, rtol=1e-9)


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match="power must be even, not 3"):
        create_attention("power", DIM, HEADS, power=3)
    with pytest.raises(OptionError, match="needs bidirectional=False"):
        create_attention("power", DIM, HEADS, gate=True)
    with pytest.raises(UnsupportedError, match="can decode from a state"):
        build("power").extend(x_of())
    m = build("power", bidirectional=False)
    _, state = m.extend(x_of())
    for wrong in ([*state, *state], [state[0][:1]], [state[0][..., 1:]]):
        with pytest.raises(ShapeError, match="the state must be"):
            m.extend(x_of(), wrong)

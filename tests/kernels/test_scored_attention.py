import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnzoo.errors import OptionError, ShapeError
from attnzoo.kernels import dispatch, scored_attention
from attnzoo.kernels import scored as module
from tests.kernels.compare import TOLERANCE, surrounded
from tests.kernels.conftest import DEVICE

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter multiplies the bits of bfloat16 matrices as integers
OF_PRODUCTS = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
SLOW = {"max_examples": 40, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def qkv(batch, heads, kv_heads, queries, keys, width, v_width=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, v_width or width))
    return [torch.randn(batch, *shape, generator=g, dtype=torch.float64) for shape in shapes]


def one_row(q, k, v, window, causal, scale, softcap):
    """One image without padding, written out: output, sums, last row."""
    groups = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[-2:]
    if causal:
        scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries), float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    asked = queries if window is None else min(window, queries)
    last = weights[:, -1] if queries else weights.new_zeros(len(q), keys)
    return weights @ v, weights[:, queries - asked :].sum(1), last


def written_out(q, k, v, *, window=None, causal=False, lengths=None, scale=None, softcap=None):
    """Image by image, what is no padding."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    sums, last = (q.new_zeros(*q.shape[:2], k.shape[2]) for _ in range(2))
    for b in range(len(q)):
        n, s = (q.shape[2], k.shape[2]) if lengths is None else (int(x[b]) for x in lengths)
        found = one_row(q[b, :, :n], k[b, :, :s], v[b, :, :s], window, causal, scale, softcap)
        out[b, :, :n], sums[b, :, :s], last[b, :, :s] = found
    return out, sums, last


def assert_same(got, want, dtype, window):
    """`want` is in float64. Sums are of up to `window` weights, each rounded."""
    for name, a, b in zip(module.Scored._fields, got, want, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all(), name
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert a.dtype == (dtype if name == "output" else wide)
        allowed = TOLERANCE[dtype] * max(b.abs().max().item() if b.numel() else 0, 1)
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=allowed, msg=lambda m, name=name: f"{name}: {m}")


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "queries": st.integers(0, 150),
        "keys": st.integers(0, 150),
        "width": st.integers(1, 20),
        "v_width": st.integers(1, 20),
    }
)


@settings(**SLOW | {"max_examples": 150})
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    window=st.none() | st.integers(0, 160),
    causal=st.booleans(),
    ragged=st.booleans(),
    softcap=st.none() | st.just(3.0),
    scale=st.none() | st.just(0.3),
    seed=st.integers(0, 99),
)
def test_by_chunks_it_is_the_definition(shape, dtype, window, causal, ragged, softcap, scale, seed):
    options = {"window": window, "causal": causal, "softcap": softcap, "scale": scale}
    heads = shape["kv_heads"] * shape["groups"]
    kinds = ("kv_heads", "queries", "keys", "width", "v_width")
    given_ = qkv(shape["batch"], heads, *(shape[kind] for kind in kinds), seed)
    inputs = [surrounded(x.to(dtype), "cpu") for x in given_]
    if ragged:
        g = torch.Generator().manual_seed(seed)
        lengths = [torch.randint(0, shape[kind] + 1, (shape["batch"],), generator=g) for kind in ("queries", "keys")]
        options["lengths"] = tuple(lengths)
        for x, n in zip(inputs, (lengths[0], lengths[1], lengths[1]), strict=True):
            for b in range(len(x)):
                x[b, :, n[b] :] = float("nan")  # what nobody may read
    want = written_out(*(x.double().nan_to_num() for x in inputs), **options)
    assert_same(scored_attention(*inputs, **options), want, dtype, window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4), (4, 3), (70, 75)])
def test_gradients(causal, softcap, ragged, sizes):
    """Analytic against the written-out form's; and for few tokens against differences, first and second ones."""
    inputs = [x.requires_grad_() for x in qkv(2, 4, 2, *sizes, 3)]
    lengths = (torch.tensor([sizes[0], sizes[0] - 2]), torch.tensor([sizes[1] - 3, sizes[1]])) if ragged else None
    options = {"causal": causal, "softcap": softcap, "lengths": lengths, "window": 2}
    out, want = scored_attention(*inputs, **options).output, written_out(*inputs, **options)[0]
    grad = torch.randn(out.shape, dtype=out.dtype)
    pairs = (torch.autograd.grad(x, inputs, grad) for x in (out, want))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if max(sizes) < 10:

        def run(*x):
            return scored_attention(*x, **options).output

        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)


def test_sums_carry_no_gradient():
    inputs = [x.requires_grad_() for x in qkv(1, 2, 2, 5, 5, 4)]
    found = scored_attention(*inputs, causal=True)
    assert found.output.requires_grad
    assert not found.sums.requires_grad
    assert not found.last.requires_grad


def test_memory_is_linear_in_the_length():
    """The largest tensor of all steps: of the size of the inputs, and a few rows of weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                self.most = max(self.most, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    for window, v_width in ((None, 16), (64, 16), (64, 8)):
        found = []
        for tokens in (1024, 2048):
            q, k, v = (x.float() for x in qkv(1, 4, 2, tokens, tokens, 16, v_width))
            with Largest() as seen:
                asked = tokens if window is None else window
                module._by_chunks(q, k, v, None, None, asked, True, 0.25, None)
                module._backward_by_chunks(torch.ones(1, 4, tokens, v_width), q, k, v, None, None, True, 0.25, None)
            found.append(seen.most)
        assert found[0] == 4 * module.CHUNK * 1024
        assert found[1] == 2 * found[0]


# ---------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture
def flash(monkeypatch, kernels):
    """On the CPU the definition stands in for the GPU's FlashAttention, which no interpreter runs."""

    def stand_in(q, k, v, dropout, causal, debug, scale):
        for x in (q, k, v):  # what the GPU's reads 16 bytes at a time
            assert x.shape[3] % 8 == 0
            assert x.stride(3) == 1
            assert [stride % 8 for stride in x.stride()[:3]] == [0, 0, 0]
            assert x.data_ptr() % 16 == 0
        q, k, v = (x.double() for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * scale
        if causal:
            scores = scores.masked_fill(
                ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2]), float("-inf")
            )
        return (scores.softmax(-1) @ v).half(), scores.logsumexp(-1).float()

    if DEVICE == "cpu":
        monkeypatch.setattr(module, "_FLASH", stand_in)
    return kernels


@settings(**SLOW)
@given(
    dtype=st.sampled_from(OF_PRODUCTS),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    queries=st.integers(2, 150),
    more=st.integers(-50, 100),
    width=st.integers(1, 40),
    window=st.none() | st.integers(0, 140),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_second_pass(flash, dtype, batch, kv_heads, groups, queries, more, width, window, causal, seed):
    keys = max(queries + more, queries if causal else 1)
    inputs = [x.to(dtype) for x in qkv(batch, kv_heads * groups, kv_heads, queries, keys, width, None, seed)]
    want = written_out(*(x.double() for x in inputs), window=window, causal=causal)
    before = flash["scored_attention", "flash"]
    got = scored_attention(*(surrounded(x, DEVICE) for x in inputs), window=window, causal=causal)
    assert flash["scored_attention", "flash"] == before + 1
    assert_same(got, want, dtype, window)


def by_heads(x):
    """As models hand it over: heads beside one another."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def behind_one(x):
    """Whole, but for its address: one value stands before it."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("layout", [lambda x: surrounded(x, x.device), by_heads, behind_one])
@pytest.mark.parametrize("width", [1, 8, 12, 64])
@pytest.mark.parametrize("dtype", OF_PRODUCTS)
def test_the_second_pass_in_any_layout(flash, layout, width, dtype):
    """FlashAttention reads 16 bytes at a time, wherever rows begin."""
    inputs = [x.to(dtype) for x in qkv(1, 2, 1, 5, 7, width)]
    want = written_out(*(x.double() for x in inputs), causal=True)
    assert_same(scored_attention(*(layout(x.to(DEVICE)) for x in inputs), causal=True), want, dtype, None)
    assert flash["scored_attention", "flash"] == 1


@settings(**SLOW)
@given(
    dtype=st.sampled_from([torch.float32, *OF_PRODUCTS]),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 5),
    keys=st.integers(1, 700),
    width=st.integers(1, 40),
    v_width=st.integers(1, 40),
    window=st.none() | st.integers(0, 2),
    ragged=st.booleans(),
    softcap=st.none() | st.just(2.0),
    seed=st.integers(0, 99),
)
def test_one_query(kernels, dtype, batch, kv_heads, groups, keys, width, v_width, window, ragged, softcap, seed):
    inputs = [x.to(dtype) for x in qkv(batch, kv_heads * groups, kv_heads, 1, keys, width, v_width, seed)]
    options = {"window": window, "softcap": softcap, "causal": True}
    if ragged:
        g = torch.Generator().manual_seed(seed)
        lengths = [torch.randint(0, 2, (batch,), generator=g), torch.randint(0, keys + 1, (batch,), generator=g)]
        options["lengths"] = tuple(n.to(DEVICE) for n in lengths)
        for x, b in itertools.product(inputs[1:], range(batch)):
            x[b, :, lengths[1][b] :] = float("nan")
    want = written_out(*(x.double().nan_to_num() for x in inputs), **options)
    before = kernels["scored_attention", "decode"]
    got = scored_attention(*(surrounded(x, DEVICE) for x in inputs), **options)
    assert kernels["scored_attention", "decode"] == before + 1
    assert_same(got, want, dtype, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 0}, {"softcap": 2.0, "causal": True}])
def test_one_query_without_the_custom_op(dtype, options):
    """On CPUs, without gradients: the same bits as the custom op gives."""
    q, k, v = (x.to(dtype) for x in qkv(2, 6, 2, 1, 70, 16, 8, 3))
    with dispatch.record_paths() as paths:
        got = scored_attention(q, k, v, **options)
        want = scored_attention(q.clone().requires_grad_(), k, v, **options)
    assert dict(paths) == {("scored_attention", "one query"): 1, ("scored_attention", "chunks"): 1}
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_shares_of_the_keys(kernels, monkeypatch):
    """Many programs for few keys, one for many: the same."""
    inputs = [x.float() for x in qkv(1, 2, 1, 1, 1000, 8)]
    want = written_out(*(x.double() for x in inputs))
    for programs in (1, 3, 1000):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        assert_same(scored_attention(*(x.to(DEVICE) for x in inputs)), want, torch.float32, 1)


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "flash"),
        ({"queries": 1}, "decode"),
        ({"dtype": torch.float32}, "chunks"),
        ({"dtype": torch.float32, "queries": 1}, "decode"),
        ({"dtype": torch.float64, "queries": 1}, "chunks"),
        ({"lengths": True}, "chunks"),
        ({"softcap": 1.0}, "chunks"),
        ({"v_width": 8}, "chunks"),
        ({"width": 264}, "chunks"),
        ({"queries": 50}, "chunks"),  # causal: the first ones see no key
        ({"batch": 0}, "chunks"),
    ],
)
def test_which_way_is_taken(flash, changes, way):
    shape = {"batch": 1, "queries": 20, "keys": 30, "width": 16, "v_width": None, "dtype": torch.float16} | changes
    tensors = qkv(shape["batch"], 2, 1, shape["queries"], shape["keys"], shape["width"], shape["v_width"])
    lengths = (torch.tensor([20]), torch.tensor([30])) if shape.get("lengths") else None
    inputs = [x.to(DEVICE, shape["dtype"]) for x in tensors]
    scored_attention(*inputs, causal=True, softcap=shape.get("softcap"), lengths=lengths)
    assert dict(flash) == {("scored_attention", way): 1}


# ----------------------------------------------------------------------------------------------------- the operator


def test_the_operator_keeps_torchs_rules():
    q, k, v = (x.float() for x in qkv(2, 4, 2, 5, 9, 8))
    op = torch.ops.attnzoo.scored_attention.default
    lengths = torch.tensor([5, 2]), torch.tensor([4, 9])
    for rest in ((None, None, 3, True, 0.3, None), (*lengths, 3, True, 0.3, 2.0)):
        torch.library.opcheck(op, (q, k, v, *rest))
        # with gradients too, but for the check that asks one of every output: of sums and the last row there is none
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, (*leaves, *rest), test_utils=utils)
    backward = torch.ops.attnzoo.scored_attention_backward.default
    torch.library.opcheck(backward, (torch.ones(2, 4, 5, 8), q, k, v, None, None, True, 0.3, None))
    # as models hand them over: heads beside one another
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.library.opcheck(op, (q, k, v, None, None, 3, True, 0.3, None))
    torch.library.opcheck(backward, (q.clone(), q, k, v, None, None, True, 0.3, None))


def test_it_compiles_without_a_break():
    q, k, v = (x.float().requires_grad_() for x in qkv(2, 4, 2, 70, 90, 8))

    def run(q, k, v):
        return scored_attention(q, k, v, causal=True, window=8)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), run(q, k, v), strict=True):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(f(q, k, v).output.square().sum(), (q, k, v)) for f in (compiled, run))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    q, k, v = (x.float() for x in qkv(1, 2, 1, 5, 5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = scored_attention(q, k, v)
    want = written_out(*(x.bfloat16().double() for x in (q, k, v)))
    assert_same(found, want, torch.bfloat16, None)


def test_gradients_are_summed_in_float32_under_autocast():
    leaves = [x.float().requires_grad_() for x in qkv(1, 2, 1, 70, 70, 8)]
    out = scored_attention(*leaves, causal=True).output
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_flops_are_those_of_attention():
    from attnzoo.bench.trace import trace

    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 5, 9, 8, 6))
    forward = 2 * 2 * 4 * 5 * 9 * (8 + 6)
    assert trace(lambda: scored_attention(q.detach(), k, v)).flops == forward
    back = trace(lambda: scored_attention(q, k, v).output.sum().backward()).flops
    assert back == forward + 2 * 2 * 4 * 5 * 9 * (3 * 8 + 2 * 6)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(2, 4, 2, 5, 9, 8)
    for change, error, said in (
        ({"window": -1}, OptionError, "window"),
        ({"window": 1.5}, OptionError, "window"),
        ({"lengths": (torch.tensor([5]), torch.tensor([9]))}, ShapeError, r"lengths are two of shape \(2,\)"),
    ):
        with pytest.raises(error, match=said):
            scored_attention(q, k, v, **change)
    with pytest.raises(ShapeError, match="do not divide"):
        scored_attention(q[:, :3], k, v)


def test_on_the_cpu_nothing_is_launched():
    with dispatch.record_paths() as paths:
        scored_attention(*qkv(1, 1, 1, 2, 3, 4))
    assert dict(paths) == {("scored_attention", "chunks"): 1}

import dataclasses
import sys
import threading
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo.bench.trace import trace
from attnzoo.cores.flash import Flash
from attnzoo.cores.softmax import Softmax
from attnzoo.errors import MissingExtraError, OptionError, ShapeError, UnsupportedError
from attnzoo.registry import build_core, describe

CORES = attnzoo.list_attentions("core")


def oracle(q, k, v, mask, causal, scale):
    """Attention by loops over batch, head and query, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for n in range(q.shape[2]):
                scores = k[b, h // group] @ q[b, h, n] * scale
                seen = torch.ones(k.shape[2], dtype=torch.bool)
                if mask is not None and mask.dtype == torch.bool:
                    seen &= mask.expand(*q.shape[:3], k.shape[2])[b, h, n]
                elif mask is not None:
                    scores = scores + mask.double().expand(*q.shape[:3], k.shape[2])[b, h, n]
                if causal:
                    seen &= torch.arange(k.shape[2]) <= n + k.shape[2] - q.shape[2]
                if seen.any():
                    out[b, h, n] = scores[seen].softmax(0) @ v[b, h // group][seen]
    return out


@st.composite
def problems(draw):
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch, queries, dim = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 8, 16]))
    keys = queries + draw(st.integers(0, 5))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    q = torch.randn(batch, kv_heads * groups, queries, dim)
    k, v = torch.randn(2, batch, kv_heads, keys, dim)
    shape = (batch, draw(st.sampled_from([1, kv_heads * groups])), draw(st.sampled_from([1, queries])), keys)
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    mask = {"none": None, "bool": torch.rand(shape) > 0.4, "float": torch.randn(shape)}[kind]
    return q, k, v, mask, draw(st.booleans()), draw(st.sampled_from([None, 0.3]))


@pytest.mark.parametrize("name", CORES)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_equals_the_oracle(name, problem):
    q, k, v, mask, causal, scale = problem
    out = build_core(describe(name), {})(q, k, v, mask=mask, causal=causal, scale=scale)
    expected = oracle(q, k, v, mask, causal, q.shape[-1] ** -0.5 if scale is None else scale)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CORES)
def test_gradients_equal_those_of_the_oracle(name):
    torch.manual_seed(0)
    mask = (torch.rand(2, 1, 5, 7) > 0.3) | torch.eye(5, 7, dtype=torch.bool)
    inputs = [torch.randn(2, h, n, 4, dtype=torch.float64, requires_grad=True) for h, n in ((4, 5), (2, 7), (2, 7))]
    weight = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    found = torch.autograd.grad((build_core(describe(name), {})(*inputs, mask=mask) * weight).sum(), inputs)

    q, k, v = inputs
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    plain = (q @ k.mT / 2).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    for a, b in zip(found, torch.autograd.grad((plain * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_may_see_nothing_gets_zeros_and_finite_gradients(name, dtype):
    q, k, v = (torch.randn(1, 2, 4, 8).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1, :] = False
    out = build_core(describe(name), {})(q, k, v, mask=mask)
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    out.float().sum().backward()
    for t in (q, k, v):
        assert torch.isfinite(t.grad).all()


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(name, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 33, 16)
    out = build_core(describe(name), {})(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), Softmax()(q, k, v), atol=3 * torch.finfo(dtype).eps, rtol=0.02)


def test_softmax_accumulates_in_float32_under_autocast():
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Softmax()(q, k, v)
    assert torch.equal(inside, Softmax()(q, k, v))


def test_softmax_gives_weights():
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    out, weights = Softmax().with_weights(q, k, v, causal=True)
    assert weights.shape == (1, 2, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))
    torch.testing.assert_close(weights @ v, out)
    assert not weights.triu(1).any()


def test_softcap_bounds_the_scores():
    q, k, v = (50 * t for t in torch.randn(3, 1, 1, 5, 8))
    _, weights = Softmax().with_weights(q, k, v, softcap=1.0)
    assert (weights.amax(-1) / weights.amin(-1)).max() <= 2.72**2  # capped scores lie in -1 .. 1
    with pytest.raises(UnsupportedError, match="softcap"):
        build_core(describe("sdpa"), {})(q, k, v, softcap=1.0)


def test_dropout_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 200, 4), torch.ones(1, 1, 200, 4)
    for name in ("softmax", "sdpa"):
        out = build_core(describe(name), {})(q, k, v, dropout=0.5)
        assert out.std() > 0.01
        assert abs(out.mean() - 1) < 0.05


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": torch.ones(9, 9, dtype=torch.bool)}])
def test_flash_runs_a_flash_kernel_and_no_other(options):
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    with Ops() as ops:
        Flash()(q, k, v, **options)
    assert any("_scaled_dot_product_flash_attention" in name for name in ops.names)
    assert not any("softmax" in name or "bmm" in name for name in ops.names)


def test_flash_touches_no_switch_of_the_process():
    """Other threads, and other calls, choose their backends as if flash had never run."""
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    switches = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.math_sdp_enabled
    before = [switch() for switch in switches]
    failures = []

    def ordinary():
        for _ in range(300):
            try:  # a mask that torch's flash kernel does not take
                torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(2, 9, 9))
            except RuntimeError as error:
                failures.append(error)

    threads = [threading.Thread(target=ordinary), *(threading.Thread(target=lambda: many(Flash())) for _ in range(3))]

    def many(core):
        for _ in range(300):
            core(q, k, v)

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [switch() for switch in switches] == before


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6), (1, 2, 6, 6), (3, 1, 1, 6)])
def test_masks_of_every_shape(name, shape):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 6, 8)
    mask = torch.rand(shape) > 0.3
    out = build_core(describe(name), {})(q, k, v, mask=mask)
    expected = oracle(q, k, v, mask.expand(3, 2, 6, 6), False, 8**-0.5)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


def test_flash_refuses_what_it_cannot_do():
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        Flash()(q, k, v, mask=torch.zeros(9, 9, requires_grad=True))
    with pytest.raises(UnsupportedError, match="dropout"):
        Flash()(q, k, v, dropout=0.1)
    with pytest.raises(UnsupportedError, match="soft cap"):
        Flash()(q, k, v, softcap=1.0)
    with pytest.raises(UnsupportedError, match="width 4 with keys of width 8"):
        Flash()(q, k, v[..., :4])
    with pytest.raises(OptionError, match="backend"):
        Flash(backend="cudnn")


@pytest.mark.parametrize("backend", ["flash_attn", "fa3", "fa4"])
def test_flash_says_how_to_install_a_package(backend, monkeypatch):
    for package in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="install"):
        Flash(backend=backend)


def test_flash_hands_a_package_its_own_layout(monkeypatch):
    """The authors' packages take (B, N, H, D); on the CPU they are refused before they are called."""
    calls = {}

    def flash_attn_func(q, k, v, **options):
        calls.update(shape=q.shape, options=options)
        return q, torch.zeros(1)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    core = Flash(backend="flash_attn")
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(UnsupportedError, match="tensors on cpu"):
        core(q, q, q)
    meta = types.SimpleNamespace(is_cuda=True, transpose=q.transpose)
    out = core._package(meta, meta, meta, None, True, 0.5, None)
    assert calls == {"shape": (1, 9, 2, 8), "options": {"softmax_scale": 0.5, "causal": True}}
    assert torch.equal(out, q)


@pytest.mark.parametrize("name", CORES)
def test_shapes_that_do_not_fit_are_named(name):
    core = build_core(describe(name), {})
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ShapeError, match=r"\(1, 4, 5, 8\).*\(1, 4, 5, 7\)"):
        core(q, q[..., :7], q)
    with pytest.raises(ShapeError, match="3 key/value heads do not divide 4"):
        core(q, q[:, :3], q[:, :3])
    with pytest.raises(ShapeError, match="B, H, N, D"):
        core(q[0], q[0], q[0])


@pytest.mark.parametrize("name", CORES)
def test_capabilities_are_true(name):
    """What an entry says a core can do, it does; what it says it cannot, it refuses."""
    can, core = describe(name).capabilities, build_core(describe(name), {})
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    tries = {
        "causal": lambda: core(q, k, v, causal=True),
        "mask": lambda: core(q, k, v, mask=torch.ones(6, 6, dtype=torch.bool)),
        "cross": lambda: core(q[:, :, :3], k, v),
        "gqa": lambda: core(q, k[:, :1], v[:, :1]),
        "widths": lambda: core(q, k, v[..., :4]),
        "dropout": lambda: core(q, k, v, dropout=0.1),
        "softcap": lambda: core(q, k, v, softcap=2.0),
    }
    for capability, attempt in tries.items():
        if getattr(can, capability):
            attempt()
        else:
            with pytest.raises(UnsupportedError):
                attempt()
    assert can.weights == hasattr(core, "with_weights")
    assert not can.grid
    compiled = torch.compile(lambda: core(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
    assert can.compile
    torch.testing.assert_close(compiled(), core(q, k, v, causal=True))
    assert set(dataclasses.asdict(can)) >= set(tries)


@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(3, 8, 2), (5, 6, 1), (2, 9, 4)])
def test_sdpa_leaves_a_later_block_to_flash_attention_without_a_mask(monkeypatch, queries, keys, kv_heads):
    q = torch.randn(2, 4, queries, 8)
    k, v = torch.randn(2, 2, kv_heads, keys, 8)
    expected = oracle(q, k, v, None, True, 8**-0.5)
    made = []
    monkeypatch.setattr("attnzoo.cores.sdpa.with_causal", lambda *args: made.append(args))
    monkeypatch.setattr("attnzoo.cores.sdpa._flash_runs", lambda *args: True)  # as on a GPU
    core = build_core(describe("sdpa"), {})
    torch.testing.assert_close(core(q, k, v, causal=True).double(), expected, atol=1e-5, rtol=1e-5)
    traced = trace(lambda: core(q, k, v, causal=True))  # as before it is timed
    assert traced.flops == 2 * q.numel() * keys * 2
    assert not made

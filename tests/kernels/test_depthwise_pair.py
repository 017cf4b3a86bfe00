import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.kernels import depthwise_pair as ops
from attnzoo.kernels.dispatch import record_paths
from tests.kernels.compare import assert_as_the_reference
from tests.kernels.conftest import DEVICE

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
HALF = (torch.float16, torch.bfloat16)


def problem(kind, grid, channels, size, *, batch=2, factors=2, an_image=False, masked=False, add=False, seed=0):
    """Leaves (x_a, weight_a, bias_a, x_b, weight_b, bias_b, add) and options."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tokens = grid[0] * grid[1]
    taps = (channels, 1, size, size) if kind == "2d" else (channels, 1, size)
    mask = torch.rand(batch, tokens, generator=g) > 0.3 if masked else None
    leaves = [
        make(batch, tokens, channels),
        make(*taps) / size,
        make(*((batch,) if an_image else ()), channels),
        make(batch, tokens, channels) if factors else None,
        make(*taps) / size if factors == 2 else None,
        make(channels) if factors == 2 else None,
        make(batch, tokens, channels) if add else None,
    ]
    return leaves, {"grid": grid, "causal": kind == "causal", "mask": mask}


def as_function(op, options):
    def run(*leaves):
        where = {**options, "mask": None if options["mask"] is None else options["mask"].to(leaves[0].device)}
        return op(*leaves[:6], add=leaves[6], **where)

    return run


def written_out(x_a, weight_a, bias_a, x_b, weight_b, bias_b, *, grid, causal, mask, add):
    """The equation: a sum over taps of shifted images."""

    def convolve(x, weight, bias):
        kernel = weight if weight.dim() == 4 else weight.unsqueeze(2)
        rows, columns = kernel.shape[2:]
        top, left = rows // 2, columns - 1 if causal else columns // 2
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        image = torch.where(real.unsqueeze(-1), x, 0).unflatten(1, grid)
        image = torch.nn.functional.pad(image, (0, 0, left, columns - 1 - left, top, rows - 1 - top))
        out = torch.zeros_like(x).unflatten(1, grid)
        for i in range(rows):
            for j in range(columns):
                out = out + kernel[:, 0, i, j] * image[:, i : i + grid[0], j : j + grid[1]]
        return out.flatten(1, 2) + bias.reshape(-1, 1, bias.shape[-1])

    out = convolve(x_a, weight_a, bias_a)
    if x_b is not None:
        out = out * (x_b if weight_b is None else convolve(x_b, weight_b, bias_b))
    out = out if add is None else out + add
    return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0.0)


def check(kernels, dtype, *args, **options):
    leaves, where = problem(*args, **options)
    assert_as_the_reference(
        as_function(ops.depthwise_pair, where), as_function(written_out, where), leaves, dtype, DEVICE
    )
    assert kernels["depthwise_pair", "triton"] > 0
    assert kernels["depthwise_pair_backward", "triton"] > 0


KINDS = [("2d", (5, 4), 3), ("2d", (2, 18), 5), ("1d", (1, 19), 5), ("1d", (2, 9), 7), ("causal", (2, 11), 4)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(("kind", "grid", "size"), KINDS)
@pytest.mark.parametrize("factors", [0, 1, 2])
def test_reference_is_the_equation_and_its_gradient(kind, grid, size, factors):
    leaves, where = problem(kind, grid, 3, size, factors=factors, masked=True, add=True, an_image=True)
    run = as_function(ops.reference, where)
    torch.testing.assert_close(run(*leaves), as_function(written_out, where)(*leaves))
    small, where = problem(kind, (1, 3) if kind != "2d" else (2, 3), 2, size, batch=1, factors=factors, add=True)
    present = [i for i, t in enumerate(small) if t is not None]

    def of_present(*given):
        leaves = [given[present.index(i)] if i in present else None for i in range(7)]
        return as_function(ops.reference, where)(*leaves)

    assert torch.autograd.gradcheck(of_present, [small[i].requires_grad_() for i in present])


IN_FLOAT32 = [(*kind, factors, torch.float32) for kind in KINDS for factors in (0, 1, 2)]


@pytest.mark.parametrize(
    ("kind", "grid", "size", "factors", "dtype"),
    [*IN_FLOAT32, *((*kind, 2, dtype) for kind in (KINDS[0], KINDS[-1]) for dtype in DTYPES if dtype != torch.float32)],
)
def test_the_kernel_equals_the_equation(kernels, dtype, kind, grid, size, factors):
    check(kernels, dtype, kind, grid, 5, size, factors=factors, masked=True, add=True, an_image=True)


@pytest.mark.parametrize("config", range(len(ops.CONFIGS)))
def test_every_configuration_of_the_convolution(kernels, monkeypatch, config):
    """In float16: Triton's interpreter multiplies no matrices of bfloat16."""
    config = ops.CONFIGS[config]
    monkeypatch.setattr(ops._forward_kernel, "configs", [config])
    kind = "2d" if config.kwargs["BANDED"] or config.kwargs["ROWS"] > 1 else "1d"
    check(kernels, torch.float16, kind, (5, 18) if kind == "2d" else (1, 150), 9, 3, batch=1, masked=True)


@pytest.mark.parametrize("config", range(len(ops.WEIGHT_CONFIGS)))
def test_every_configuration_of_the_weights_gradient(kernels, monkeypatch, config):
    monkeypatch.setattr(ops._weight_kernel, "configs", [ops.WEIGHT_CONFIGS[config]])
    check(kernels, torch.float32, "2d", (3, 40), 9, 5, batch=1, masked=True)


@settings(max_examples=20, **SLOW)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    kind=st.sampled_from(["2d", "1d", "causal"]),
    batch=st.integers(1, 2),
    height=st.integers(1, 5),
    width=st.integers(1, 18),
    channels=st.integers(1, 70),
    half=st.integers(0, 1),
    factors=st.integers(0, 2),
    an_image=st.booleans(),
    masked=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(kernels, dtype, kind, batch, height, width, channels, half, factors, an_image, masked, add, seed):
    grid = (height if kind == "2d" else 1, width)
    options = {"batch": batch, "factors": factors, "an_image": an_image, "masked": masked, "add": add, "seed": seed}
    check(kernels, dtype, kind, grid, channels, 2 * half + 1 + (kind == "causal"), **options)


@pytest.mark.parametrize("kind", ["2d", "1d"])
def test_a_kernel_larger_than_the_grid(kernels, kind):
    check(kernels, torch.float32, kind, (2, 3) if kind == "2d" else (1, 6), 3, 31, batch=1, factors=0)


def test_what_stands_at_padding_is_never_read(kernels):
    leaves, where = problem("2d", (4, 6), 3, 3, masked=True)
    clean = as_function(ops.depthwise_pair, where)(*(None if t is None else t.to(DEVICE) for t in leaves))
    for x in (leaves[0], leaves[3]):
        x[~where["mask"]] = float("nan")
    given = [None if t is None else t.to(DEVICE).requires_grad_() for t in leaves]
    out = as_function(ops.depthwise_pair, where)(*given)
    assert torch.equal(out, clean)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in given if t is not None)


def test_without_a_working_triton_torch_computes_it():
    leaves, where = problem("2d", (3, 4), 3, 3)
    with record_paths() as paths:
        as_function(ops.depthwise_pair, where)(*leaves)
    assert dict(paths) == {("depthwise_pair", "torch"): 1}
    with pytest.raises(UnsupportedError, match="call depthwise_pair"):
        torch.ops.attnzoo.depthwise_pair(leaves[0], torch.ones(3, 3, 3), *[None] * 6, 3, 4, False, False)


@pytest.mark.parametrize(("factors", "save"), [(0, True), (1, True), (2, True), (2, False)])
def test_the_operator_keeps_torchs_rules(kernels, factors, save):
    leaves = problem("2d", (3, 4), 5, 3, factors=factors, add=True)[0]
    leaves = [None if t is None else t.float().to(DEVICE) for t in leaves]
    leaves = [t if t is None or not save else t.requires_grad_() for t in leaves]
    x_a, w_a, b_a, x_b, w_b, b_b, add = leaves
    taps = [None if w is None else ops._taps(w) for w in (w_a, w_b)]
    args = (x_a, taps[0], b_a, x_b, taps[1], b_b, None, add, 3, 4, False, save)
    torch.library.opcheck(torch.ops.attnzoo.depthwise_pair.default, args)


@pytest.mark.parametrize("factors", [0, 1, 2])
def test_second_gradients(kernels, factors):
    leaves, where = problem("2d", (2, 3), 2, 3, batch=1, factors=factors)
    present = [i for i, t in enumerate(leaves) if t is not None]

    def of_present(*given):
        whole = [given[present.index(i)] if i in present else None for i in range(7)]
        return as_function(ops.depthwise_pair, where)(*whole)

    assert torch.autograd.gradgradcheck(
        of_present, [leaves[i].to(DEVICE).requires_grad_() for i in present], fast_mode=True
    )


def test_only_gradients_that_are_wanted_are_computed(kernels):
    leaves, where = problem("2d", (3, 5), 4, 3)
    whole = [t.clone().requires_grad_() for t in leaves[:6]]
    as_function(written_out, where)(*whole, None).square().sum().backward()
    for wanted in range(6):
        given = [t.clone().to(DEVICE).requires_grad_(i == wanted) for i, t in enumerate(leaves[:6])]
        as_function(ops.depthwise_pair, where)(*given, None).square().sum().backward()
        assert [t.grad is not None for t in given] == [i == wanted for i in range(6)]
        torch.testing.assert_close(given[wanted].grad.cpu(), whole[wanted].grad)


def test_it_compiles_without_a_break(kernels):
    leaves, where = problem("2d", (3, 5), 4, 3)
    leaves = [t.float().to(DEVICE) for t in leaves[:6]]
    run = as_function(ops.depthwise_pair, where)
    compiled = torch.compile(lambda *leaves: run(*leaves, None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), run(*leaves, None))


def test_inputs_that_are_not_side_by_side(kernels):
    leaves, where = problem("2d", (3, 5), 4, 3)
    leaves = [t.float().to(DEVICE) for t in leaves[:6]]
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t for t in leaves]
    run = as_function(ops.depthwise_pair, where)
    assert torch.equal(run(*turned, None), run(*leaves, None))


@pytest.mark.parametrize("shape", [(0, (3, 4)), (2, (1, 0))])
def test_nothing_in_nothing_out(kernels, shape):
    leaves, where = problem("1d", shape[1], 3, 3, batch=shape[0])
    given = [None if t is None else t.to(DEVICE).requires_grad_() for t in leaves]
    out = as_function(ops.depthwise_pair, where)(*given)
    assert out.shape == leaves[0].shape
    out.sum().backward()
    assert given[1].grad.abs().sum() == 0


def test_what_does_not_fit_is_refused():
    leaves, where = problem("2d", (3, 4), 5, 3)
    x, w, b = leaves[:3]
    for args, options, said in (
        ((x, w), {"grid": (3, 5)}, r"\(B, 15, C\), not \(2, 12, 5\)"),
        ((x, w[:4]), {}, "weights of 5 channels"),
        ((x, w[..., :2, :2]), {}, "K odd unless causal"),
        ((x, w), {"causal": True}, "along a row"),
        ((x, w, b, None, w), {}, "weight_b needs x_b"),
        ((x, w, b, x, None, b), {}, "bias_b needs weight_b"),
        ((x, w, b[:3]), {}, "bias_a must be"),
        ((x, w, b, x[:1], w), {}, "x_b must be"),
        ((x, w, b, x, w[..., 1:2, 1:2]), {}, "weight_b must be"),
        ((x, w), {"mask": torch.ones(2, 11, dtype=torch.bool)}, "mask must be"),
        ((x, w), {"add": x[:, :4]}, "add must be"),
    ):
        with pytest.raises(ShapeError, match=said):
            ops.depthwise_pair(*args, **{"grid": where["grid"], **options})


def test_flops_are_counted(kernels):
    from attnzoo.bench.trace import trace

    leaves, where = problem("2d", (3, 5), 4, 3)
    given = [t.float().to(DEVICE) for t in leaves[:6]]
    run = as_function(ops.depthwise_pair, where)
    seen = trace(lambda: run(*given, None))
    one = 2 * leaves[0].numel() * 9
    assert seen.flops == 2 * one
    both = trace(lambda: run(*(t.requires_grad_() for t in given), None).sum().backward())
    assert both.flops == 6 * one

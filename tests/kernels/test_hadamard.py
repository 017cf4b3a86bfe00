import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.kernels import hadamard
from tests.kernels.compare import assert_as_the_reference
from tests.kernels.conftest import DEVICE

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SLOW = {"max_examples": 25, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def problem(plain, products, batch, tokens, channels, weights, bias, seed=0):
    """Leaves: plain terms, factors u, factors y, weights, bias. `weights` and `bias`: None, "channel" or "token"."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    each = {"channel": (channels,), "token": (tokens, channels)}
    terms = [make(batch, tokens, channels) for _ in range(plain + 2 * products)]
    return [
        *terms,
        None if weights is None else make(plain + products, *each[weights]),
        None if bias is None else make(*each[bias]),
    ]


def as_function(op, plain, products):
    def run(*leaves):
        *terms, weights, bias = leaves
        pairs = zip(terms[plain : plain + products], terms[plain + products :], strict=True)
        return op(terms[:plain], list(pairs), weights, bias)

    return run


def written_out(plain, products, weights, bias):
    """The equation, term by term."""
    terms = [*plain, *(u * y for u, y in products)]
    total = torch.zeros_like(terms[0]) if bias is None else bias.expand_as(terms[0])
    for t, term in enumerate(terms):
        total = total + (term if weights is None else weights[t] * term)
    return total


def check(kernels, dtype, plain, products, shape, weights, bias, seed=0):
    leaves = problem(plain, products, *shape, weights, bias, seed)
    op, oracle = (as_function(f, plain, products) for f in (hadamard.hadamard_chain, written_out))
    assert_as_the_reference(op, oracle, leaves, dtype, DEVICE)
    assert kernels["hadamard_chain", "triton"] > 0
    assert kernels["hadamard_chain_backward", "triton"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", [None, "channel", "token"])
def test_the_kernel_equals_the_equation(kernels, dtype, each):
    check(kernels, dtype, 1, 2, (2, 13, 37), each, each)


@settings(**SLOW)
@given(
    dtype=st.sampled_from(DTYPES),
    plain=st.integers(0, 2),
    products=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 300)),
    weights=st.sampled_from([None, "channel", "token"]),
    bias=st.sampled_from([None, "channel", "token"]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_number_of_terms(kernels, dtype, plain, products, shape, weights, bias, seed):
    check(kernels, dtype, plain, products, shape, weights, bias, seed)


@pytest.mark.parametrize(
    ("programs", "steps", "shape", "weights"),
    [(7, 5, (2, 37, 300), "channel"), (1, 8, (2, 37, 300), "channel"), (7, 3, (1, 50, 300), None)],
)
def test_programs_that_sum_over_several_tiles(kernels, monkeypatch, programs, steps, shape, weights):
    """In a large input a program goes down several tiles, so that there are fewer partial sums; here in a small one."""
    monkeypatch.setattr(hadamard, "PROGRAMS", programs)
    assert hadamard._steps(torch.Size(shape)) == steps
    check(kernels, torch.float32, 1, 2, shape, weights, "channel")


def test_partial_sums_are_few_however_large_the_input():
    for shape in ((1, 32768, 384), (64, 3136, 384), (8, 50176, 768)):
        shape = torch.Size(shape)
        (one,), (several,) = hadamard._grid(shape), hadamard._grid(shape, hadamard._steps(shape))
        assert several >= hadamard.PROGRAMS
        assert several * min(one // hadamard.PROGRAMS, hadamard.MOST_STEPS) <= 1.1 * one


def test_reference_is_the_equation_and_its_gradient():
    leaves = problem(2, 1, 2, 3, 4, "channel", "token")
    run = as_function(hadamard.hadamard_chain, 2, 1)
    torch.testing.assert_close(run(*leaves), as_function(written_out, 2, 1)(*leaves))
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves])


def test_without_a_working_triton_torch_computes_it():
    from attnzoo.kernels.dispatch import record_paths

    with record_paths() as paths:
        hadamard.hadamard_chain([torch.ones(1, 2, 3)])
    assert dict(paths) == {("hadamard_chain", "torch"): 1}
    with pytest.raises(UnsupportedError, match="call hadamard_chain"):
        torch.ops.attnzoo.hadamard_chain([torch.ones(1, 2, 3)], [], [], None, None)


def test_the_operator_keeps_torchs_rules(kernels):
    leaves = [t.float().to(DEVICE).requires_grad_() for t in problem(1, 1, 2, 3, 4, "channel", "channel")]
    x, u, y, weights, bias = leaves
    torch.library.opcheck(torch.ops.attnzoo.hadamard_chain.default, ([x], [u], [y], weights, bias))
    torch.library.opcheck(torch.ops.attnzoo.hadamard_chain.default, ([], [u], [y], None, None))


def test_second_gradients(kernels):
    leaves = [t.to(DEVICE).requires_grad_() for t in problem(1, 1, 1, 2, 3, "channel", "channel")]
    assert torch.autograd.gradgradcheck(as_function(hadamard.hadamard_chain, 1, 1), leaves)


def test_it_compiles_without_a_break(kernels):
    leaves = [t.float().to(DEVICE) for t in problem(1, 2, 2, 5, 8, "channel", None)[:-1]]
    run = as_function(hadamard.hadamard_chain, 1, 2)
    compiled = torch.compile(lambda *leaves: run(*leaves, None), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), run(*leaves, None))


def test_empty_batches(kernels):
    leaves = [t.to(DEVICE).requires_grad_() for t in problem(1, 1, 0, 3, 4, "channel", "channel")]
    out = as_function(hadamard.hadamard_chain, 1, 1)(*leaves)
    assert out.shape == (0, 3, 4)
    out.sum().backward()
    assert leaves[3].grad.abs().sum() == 0


def test_what_does_not_fit_is_refused():
    x = torch.ones(1, 2, 3)
    for args, said in (
        (((), ()), "at least one term"),
        (([x], [(x, x[:, :1])]), "terms must all be"),
        (([x], (), torch.ones(2, 3)), "weights"),
        (([x], (), None, torch.ones(2)), "bias"),
    ):
        with pytest.raises(ShapeError, match=said):
            hadamard.hadamard_chain(*args)


def test_flops_are_counted(kernels):
    from attnzoo.bench.trace import trace

    x, u, y, weights, bias = (t.to(DEVICE) for t in problem(1, 1, 2, 3, 4, "channel", "channel"))
    seen = trace(lambda: hadamard.hadamard_chain([x], [(u, y)], weights, bias))
    assert seen.flops == (1 + 2 + 1 + 1) * x.numel()

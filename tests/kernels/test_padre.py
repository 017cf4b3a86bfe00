import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from attnzoo import create_attention
from attnzoo.bench.trace import trace
from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.kernels import native
from attnzoo.kernels import padre as fused


def problem(batch=2, prefix=0, grid=(4, 5), channels=8, seed=0, **options):
    """A mixer, all of its parameters moved from where they start, and its input."""
    torch.manual_seed(seed)
    mixer = create_attention("padre", channels, 1, mix_prefix=bool(prefix), **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer, torch.randn(batch, prefix + grid[0] * grid[1], channels), {"grid": grid, "prefix": prefix}


def weights_of(mixer, x, grid, prefix):
    return mixer._fused_weights(mixer._mixing.layout(x, grid, prefix, None))


def operators(mixer, x, **place):
    with torch.no_grad():
        return set(trace(lambda: mixer(x, **place)).ops)


def test_the_compiled_path_is_the_one_tested():
    assert fused.is_compiled(), "a C++ compiler is needed for these tests"
    mixer, x, place = problem(degree=2)
    assert operators(mixer, x, **place) == {"attnzoo.padre"}


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 3),
    prefix=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.integers(1, 70),
    degree=st.integers(1, 4),
    kernel_size=st.sampled_from([1, 3, 5, 7, 11, 13]),
    z_mixing=st.sampled_from(["full", "identity"]),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_equals_float64(batch, prefix, grid, channels, degree, kernel_size, z_mixing, threads, seed):
    options = {"degree": degree, "kernel_size": kernel_size, "z_mixing": z_mixing}
    mixer, x, place = problem(batch, prefix, grid, channels, seed, **options)
    exact = copy.deepcopy(mixer).double()(x.double(), **place)
    fast = by_threads(threads, mixer, x, **place)
    assert fast.dtype == torch.float32
    assert (fast.double() - exact).abs().max() <= 4e-6 * degree * exact.abs().max()


def by_threads(count, mixer, x, grid, prefix):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.no_grad():
            weights = weights_of(mixer, x, grid, prefix)
            assert fused.fits(x, weights)
            out = fused.padre(x, weights, *grid)
            assert torch.equal(out, mixer(x, grid=grid, prefix=prefix)), "a layer without output map is this alone"
    finally:
        torch.set_num_threads(before)
    return out


@pytest.mark.parametrize("threads", [2, 5, 16])
def test_strips_of_rows_give_what_one_gives(threads):
    mixer, x, place = problem(1, 1, (90, 3), 8, degree=3)
    assert torch.equal(by_threads(threads, mixer, x, **place), by_threads(1, mixer, x, **place))


@pytest.mark.parametrize("prefix", [0, 1])
def test_no_image_gives_nothing(prefix):
    mixer, x, place = problem(2, prefix, degree=2)
    assert by_threads(2, mixer, x[:0], **place).shape == x[:0].shape


@pytest.mark.parametrize("grid", [(14, 14), (28, 28), (7, 7), (56, 56), (16, 24)])
def test_equals_the_equation_on_common_grids(grid):
    mixer, x, place = problem(1, 1, grid, 48, degree=2, kernel_size=11)
    exact = copy.deepcopy(mixer).double()(x.double(), **place)
    with torch.no_grad():
        assert (mixer(x, **place).double() - exact).abs().max() <= 4e-6 * exact.abs().max()


def test_every_output_is_written_and_no_other_read():
    mixer, x, place = problem(2, 2, (9, 13), 20, degree=3)
    with torch.no_grad():
        expected = mixer(x, **place)
        torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
        try:
            assert torch.empty(3).isnan().all()
            found = mixer(x, **place)
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)


def test_tokens_may_lie_anywhere():
    mixer, x, place = problem(2, 1, (4, 5), 8, degree=2)
    wide = torch.randn(3, 2 * x.shape[1], 3 * 8)
    part = wide[1:, ::2, 8:16].copy_(x)
    turned = x.mT.contiguous().mT
    with torch.no_grad():
        for same in (part, turned):
            torch.testing.assert_close(mixer(same, **place), mixer(x, **place), atol=0, rtol=0)


def test_the_operator_keeps_torchs_rules():
    mixer, x, place = problem(1, 1, degree=2, kernel_size=3)
    with torch.no_grad():
        weights = weights_of(mixer, x, **place)
        torch.library.opcheck(torch.ops.attnzoo.padre.default, (x, *weights, *place["grid"]))


def test_gradients_are_recorded_as_ever():
    mixer, x, place = problem(degree=3, z_mixing="identity")
    out = mixer(x, **place)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, **place), out)
    mixer.requires_grad_(False)
    assert "attnzoo.padre" in trace(lambda: mixer(x, **place)).ops, "nothing asks for a gradient"
    for one in (x, mixer.y_tokens[1].bias):
        one.requires_grad_()
        assert mixer(x, **place).requires_grad
        with pytest.raises(UnsupportedError, match="no gradient"):
            fused.padre(x, weights_of(mixer, x, **place), *place["grid"])
        one.requires_grad_(False)


@pytest.mark.parametrize(
    "options",
    [
        {"output": "sum"},
        {"products": False},
        {"token_mixing": "conv1d"},
        {"channel_mixing": "grouped"},
        {"token_mixing": "dense", "tokens": 20},
    ],
)
def test_other_options_go_their_own_way(options):
    mixer, x, place = problem(**options)
    assert "attnzoo.padre" not in operators(mixer, x, **place)


def test_padding_goes_its_own_way():
    mixer, x, place = problem(degree=2, kernel_size=3)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 15:] = False
    assert "attnzoo.padre" not in operators(mixer, x, mask=mask, **place)
    grids = torch.tensor([[4, 5], [3, 5]])
    assert "attnzoo.padre" not in operators(mixer, x, grid=grids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_their_own_way(dtype):
    mixer, x, place = problem(degree=2)
    assert "attnzoo.padre" not in operators(mixer.to(dtype), x.to(dtype), **place)
    mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert "attnzoo.padre" not in operators(mixer, x, **place)


def test_what_is_hooked_in_or_put_in_place_of_a_map_is_called():
    mixer, x, place = problem(degree=2)
    seen = []
    hook = mixer.y_channels.register_forward_hook(lambda *a: seen.append("hook"))
    assert "attnzoo.padre" not in operators(mixer, x, **place)
    assert seen
    hook.remove()
    assert "attnzoo.padre" in operators(mixer, x, **place)

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    own = mixer.z_channels[0]
    for other in (Adapter(8, 8), torch.nn.Linear(8, 8, bias=False)):
        mixer.z_channels[0] = other
        assert "attnzoo.padre" not in operators(mixer, x, **place)
    mixer.z_channels[0] = own
    own.forward = lambda x: torch.nn.Linear.forward(own, x)
    assert "attnzoo.padre" not in operators(mixer, x, **place)
    del own.forward
    assert "attnzoo.padre" in operators(mixer, x, **place)


class Tagged(torch.Tensor):
    """A subclass, as quantized weights are."""


def test_subclasses_of_tensors_see_torchs_operators():
    mixer, x, place = problem(degree=2)
    expected = mixer(x, **place)
    assert "attnzoo.padre" not in operators(mixer, x.as_subclass(Tagged), **place)
    weight = mixer.y_channels.weight.detach().as_subclass(Tagged)
    mixer.y_channels.weight = torch.nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, **place).as_subclass(torch.Tensor), expected)
    assert not fused.fits(x, weights_of(mixer, x, **place))


def test_torch_func_and_forward_mode_see_torchs_operators():
    mixer, x, place = problem(1, degree=2)
    mixer.requires_grad_(False)
    with torch.no_grad():
        batched = torch.func.vmap(lambda one: mixer(one[None], **place)[0])(x.repeat(2, 1, 1))
        torch.testing.assert_close(batched, mixer(x, **place).expand(2, -1, -1))
        _, tangent = torch.func.jvp(lambda t: mixer(t, **place), (x,), (torch.ones_like(x),))
    assert tangent.abs().sum() > 0


def test_compiles_without_a_break_and_exports_for_every_machine():
    mixer, x, place = problem(degree=2)
    with torch.no_grad():
        compiled = torch.compile(lambda x: mixer(x, **place), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), mixer(x, **place))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = mixer

        def forward(self, x):
            return self.mixer(x, **place)

    with torch.no_grad():
        program = torch.export.export(Model(), (x,))
    assert not any("attnzoo" in str(node.target) for node in program.graph.nodes)


def test_a_graph_of_symbolic_sizes_takes_any_grid():
    mixer, _, _ = problem(1, 1, degree=2, kernel_size=3)
    torch._dynamo.reset()

    def run(image):
        tokens = torch.cat([image[:, :1, 0], image.flatten(1, 2)], 1)
        return mixer(tokens, grid=(image.shape[1], image.shape[2]), prefix=1)

    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=frames, dynamic=True)
    with torch.no_grad():
        for height, width in ((4, 5), (7, 6), (9, 11)):
            image = torch.randn(2, height, width, 8)
            torch.testing.assert_close(compiled(image), run(image))
    assert frames.frame_count == 1


@pytest.mark.parametrize("z_mixing", ["full", "identity"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_flops_are_those_of_its_parts(z_mixing, prefix):
    mixer, x, place = problem(2, prefix, (6, 5), 8, degree=3, z_mixing=z_mixing)
    with torch.no_grad():
        whole = trace(lambda: mixer(x, **place))
    parts = trace(lambda: mixer(x, **place))  # with gradients: one operator after the other
    assert "attnzoo.padre" in whole.ops
    assert "attnzoo.padre" not in parts.ops
    assert whole.flops == parts.flops
    assert whole.uncounted == ()


def test_what_does_not_fit_is_refused_before_memory_is_touched():
    mixer, x, place = problem(1, 0, (4, 5), 8, degree=2)
    height, width = place["grid"]
    with torch.no_grad():
        weights = weights_of(mixer, x, **place)
        wrong = [
            (x[:, :19], weights, r"\(B, P \+ 20, C\), not \(1, 19, 8\)"),
            (x[..., :7], weights, "do not fit together"),
            (torch.cat([x, x[:, :1]], 1), weights, "do not fit together"),  # a prefix without its weights
            (x, weights._replace(b=weights.b[:8]), "do not fit together"),
            (x, weights._replace(a=[*weights.a[:1], weights.a[1][..., :10, :10]]), "do not fit together"),
            (x, weights._replace(c_bias=[]), "do not fit together"),
            (x, weights._replace(a=[], a_bias=[]), "do not fit together"),
            (x, weights._replace(d=[], d_bias=[]), "do not fit together"),
        ]
        for given_, some, said in wrong:
            with pytest.raises(ShapeError, match=said):
                fused.padre(given_, some, height, width)
        with pytest.raises(UnsupportedError, match="float64"):
            fused.padre(x.double(), weights, height, width)


def test_without_a_compiler_torch_computes_it(monkeypatch):
    native.library.cache_clear()
    mixer, x, place = problem(degree=2)
    with torch.no_grad():
        expected = mixer(x, **place)
        monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
        native.library.cache_clear()
        try:
            assert "attnzoo.padre" not in operators(mixer, x, **place)
            torch.testing.assert_close(mixer(x, **place), expected)
        finally:
            monkeypatch.undo()
            native.library.cache_clear()

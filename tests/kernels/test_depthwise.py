import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.bench.environment import environment
from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.kernels import depthwise, native

COMPILERS = ("g++", "c++", "clang++")


@pytest.fixture
def fresh():
    """Libraries are asked for anew, before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def problem(batch, height, width, channels, size, seed=0, dtype=torch.float32, an_image=False):
    g = torch.Generator().manual_seed(seed)
    bias = (batch, channels) if an_image else (channels,)
    shapes = ((batch, height * width, channels), (channels, 1, size, size), bias)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)


def by_loops(x, weight, bias, height, width):
    """The equation, one tap after the other."""
    size, half = weight.shape[-1], weight.shape[-1] // 2
    image = x.unflatten(1, (height, width))
    out = bias.reshape(-1, 1, 1, bias.shape[-1]).expand_as(image).clone()
    for i in range(size):
        for j in range(size):
            for y in range(height):
                for column in range(width):
                    if 0 <= y + i - half < height and 0 <= column + j - half < width:
                        out[:, y, column] += weight[:, 0, i, j] * image[:, y + i - half, column + j - half]
    return out.flatten(1, 2)


def gradients(function, inputs, height, width):
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(*inputs, height, width)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), inputs)


def test_the_compiled_path_is_the_one_tested():
    assert depthwise.is_compiled(), "a C++ compiler is needed for these tests"


@pytest.mark.parametrize("an_image", [False, True])
def test_reference_is_the_equation(an_image):
    inputs = problem(2, 3, 4, 5, 5, dtype=torch.float64, an_image=an_image)
    torch.testing.assert_close(depthwise.reference(*inputs, 3, 4), by_loops(*inputs, 3, 4), atol=1e-12, rtol=1e-12)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.integers(1, 40),
    size=st.sampled_from([1, 3, 5, 7, 11, 13, 27]),
    seed=st.integers(0, 1000),
    an_image=st.booleans(),
)
def test_equals_the_reference_in_float64(batch, height, width, channels, size, seed, an_image):
    inputs = problem(batch, height, width, channels, size, seed, an_image=an_image)
    fast = gradients(depthwise.depthwise2d, inputs, height, width)
    slow = gradients(depthwise.reference, [t.double() for t in inputs], height, width)
    for a, b in zip(fast, slow, strict=True):
        # a tap's gradient is a sum over all tokens, whose terms may cancel
        assert (a.double() - b).abs().max() <= 2e-6 * b.abs().max() + 1e-6 * max(size, (batch * height * width) ** 0.5)


@pytest.mark.parametrize("side", [14, 28, 56, 112])
def test_grids_of_vision_transformers(side):
    inputs = problem(1, side, side, 33, 11)
    fast, slow = (
        gradients(f, i, side, side)
        for f, i in ((depthwise.depthwise2d, inputs), (depthwise.reference, [t.double() for t in inputs]))
    )
    for a, b in zip(fast, slow, strict=True):
        assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max()


def test_a_slice_of_more_channels_and_a_stride_of_tokens():
    x, weight, bias = problem(2, 6, 5, 40, 3)
    part = x[:, :, 7:27]
    w, b = weight[7:27], bias[7:27]
    torch.testing.assert_close(depthwise.depthwise2d(part, w, b, 6, 5), depthwise.reference(part, w, b, 6, 5))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)  # tokens side by side
    torch.testing.assert_close(
        depthwise.depthwise2d(turned, weight, bias, 6, 5), depthwise.reference(x, weight, bias, 6, 5)
    )


def test_empty_buffers_are_never_read():
    """A batch whose neighbors in memory are NaN."""
    x, weight, bias = problem(1, 9, 9, 17, 7)
    big = torch.full((3, 81, 60), float("nan"))
    big[1, :, 20:37] = x[0]
    found = gradients(depthwise.depthwise2d, (big[1:2, :, 20:37], weight, bias), 9, 9)
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0], depthwise.reference(x, weight, bias, 9, 9))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    inputs = problem(2, 20, 20, 40, 11)
    one = gradients(depthwise.depthwise2d, inputs, 20, 20)
    try:
        torch.set_num_threads(threads)
        several = gradients(depthwise.depthwise2d, inputs, 20, 20)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one[:3], several[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("an_image", [False, True])
def test_second_gradients(an_image):
    inputs = [t.requires_grad_() for t in problem(2, 3, 3, 2, 3, an_image=an_image)]
    double = [t.detach().double().requires_grad_() for t in inputs]

    def second(function, given):
        out = function(*given, 3, 3)
        (first,) = torch.autograd.grad(out.pow(3).sum(), given[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), given)

    for a, b in zip(second(depthwise.depthwise2d, inputs), second(depthwise.reference, double), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("an_image", [False, True])
def test_the_operator_keeps_torchs_rules(an_image):
    inputs = [t.requires_grad_() for t in problem(2, 4, 3, 5, 3, an_image=an_image)]
    torch.library.opcheck(torch.ops.attnzoo.depthwise2d.default, (*inputs, 4, 3))


def test_what_does_not_fit_is_refused_before_memory_is_touched():
    x, weight, bias = problem(2, 3, 4, 5, 3)
    wrong = [
        ((x, weight, bias, 30, 40), r"\(B, 1200, C\), not \(2, 12, 5\)"),
        ((x, weight, bias.expand(3, -1), 3, 4), "bias of 2 images and 5 channels"),
        ((x, weight[:4], bias, 3, 4), r"weights of 5 channels.*\(4, 1, 3, 3\)"),
        ((x, weight[..., :2, :2], bias, 3, 4), "K odd"),
        ((x, weight, bias[:3], 3, 4), "bias of 2 images and 5 channels"),
    ]
    for args, said in wrong:
        for function in (depthwise.depthwise2d, torch.ops.attnzoo.depthwise2d):
            with pytest.raises(ShapeError, match=said):
                function(*args)
    with pytest.raises(ShapeError, match="factors must have one shape"):
        depthwise.depthwise2d_product(x, weight, bias, x[:1], weight, bias, 3, 4)
    with pytest.raises(UnsupportedError, match="float64"):
        torch.ops.attnzoo.depthwise2d(x.double(), weight, bias, 3, 4)
    with pytest.raises(UnsupportedError, match="float64"):
        torch.ops.attnzoo.depthwise2d_backward(x, x, weight.double(), 3, 4, [True] * 3, False)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 17),
    st.integers(1, 17),
    st.integers(1, 20),
    st.sampled_from([1, 3, 7]),
    st.booleans(),
)
def test_a_product_of_two_equals_two_and_their_product(batch, height, width, channels, size, an_image):
    a = problem(batch, height, width, channels, size)
    b = problem(batch, height, width, channels, size, seed=1, an_image=an_image)
    expected = depthwise.reference(*(t.double() for t in a), height, width) * depthwise.reference(
        *(t.double() for t in b), height, width
    )
    with torch.no_grad():
        got = depthwise.depthwise2d_product(*a, *b, height, width)
    assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-5
    a[0].requires_grad_()
    torch.testing.assert_close(depthwise.depthwise2d_product(*a, *b, height, width), got, atol=1e-4, rtol=1e-4)


def test_a_product_runs_as_one_operator_where_nothing_is_recorded():
    from attnzoo.bench.trace import trace

    a, b = problem(2, 4, 3, 5, 3), problem(2, 4, 3, 5, 3, seed=1)
    with torch.no_grad():
        seen = trace(lambda: depthwise.depthwise2d_product(*a, *b, 4, 3))
    assert any("depthwise2d_product" in op for op in seen.backends)
    assert seen.flops == 2 * 2 * a[0].numel() * 9
    torch.library.opcheck(torch.ops.attnzoo.depthwise2d_product.default, (*a, *b, 4, 3))


def test_only_gradients_that_are_wanted_are_computed():
    x, weight, bias = problem(1, 4, 4, 8, 3)
    for wanted in ([True, False, False], [False, True, False], [False, False, True], [True, False, True]):
        inputs = [t.clone().requires_grad_(asked) for t, asked in zip((x, weight, bias), wanted, strict=True)]
        whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
        depthwise.depthwise2d(*inputs, 4, 4).square().sum().backward()
        depthwise.reference(*whole, 4, 4).square().sum().backward()
        for got, expected, asked in zip(inputs, whole, wanted, strict=True):
            assert (got.grad is not None) == asked
            if asked:
                torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-4)


def test_an_exported_program_is_for_every_machine():
    weight, bias = problem(1, 4, 4, 8, 3)[1:]

    class Model(torch.nn.Module):
        def forward(self, x):
            return depthwise.depthwise2d(x, weight, bias, 4, 4)

    program = torch.export.export(Model(), (torch.randn(1, 16, 8),))
    assert not any("attnzoo" in str(node.target) for node in program.graph.nodes)


def test_compiles_without_a_break():
    inputs = problem(2, 4, 3, 5, 3)
    compiled = torch.compile(depthwise.depthwise2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, 4, 3), depthwise.reference(*inputs, 4, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    """The dtypes are torch's, of the result and of gradients; the C++ is what runs."""
    from attnzoo.bench.trace import trace

    given_ = problem(2, 4, 5, 8, 3)
    halves = [t.to(dtype) for t in given_]
    leaves = [(t if autocast else t.to(dtype)).requires_grad_() for t in given_]
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = depthwise.depthwise2d(*leaves, 4, 5)
        by_torch = depthwise.reference(*leaves, 4, 5)
        seen = trace(lambda: depthwise.depthwise2d_product(*(t.detach() for t in (*leaves, *leaves)), 4, 5))
    assert out.dtype == by_torch.dtype == dtype
    exact = depthwise.reference(*(t.double() for t in halves), 4, 5)
    assert (out - exact).abs().max() <= 0.01 * exact.abs().max()
    found = torch.autograd.grad(out.square().sum(), leaves)
    assert [g.dtype for g in found] == [t.dtype for t in leaves]
    if depthwise.is_compiled():
        assert "attnzoo.depthwise2d_product" in seen.ops


def test_dtypes_that_differ_are_torchs_to_refuse():
    x, weight, bias = problem(1, 4, 4, 8, 3)
    with pytest.raises(RuntimeError):
        depthwise.depthwise2d(x, weight.bfloat16(), bias, 4, 4)


def test_flops_are_counted():
    from attnzoo.bench.trace import trace

    x, weight, bias = problem(2, 4, 3, 5, 3)
    seen = trace(lambda: depthwise.depthwise2d(x, weight, bias, 4, 3))
    assert seen.flops == 2 * x.numel() * 9
    assert seen.uncounted == ()
    assert any("depthwise2d" in op for op in seen.backends)


def test_without_a_compiler_torch_computes_it(fresh, monkeypatch, caplog):
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    inputs = problem(1, 4, 4, 8, 3)
    assert not depthwise.is_compiled()
    assert not depthwise.is_compiled()
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert "no C++ compiler (no-such-compiler)" in caplog.text
    assert environment("cpu", 1).compiler == "none: kernels for CPUs are computed by plain PyTorch, slower"
    torch.testing.assert_close(depthwise.depthwise2d(*inputs, 4, 4), depthwise.reference(*inputs, 4, 4))


def test_a_compiler_that_fails_is_told_and_leaves_nothing_behind(fresh, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    assert not depthwise.is_compiled()
    assert "could not be compiled" in caplog.text
    assert "no-such-flag" in caplog.text
    assert environment("cpu", 1).compiler in {f"{name}, failed to compile: plain PyTorch, slower" for name in COMPILERS}
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"\x7fELF and no more"])
def test_a_damaged_library_is_compiled_anew(damage, fresh, monkeypatch, caplog, tmp_path_factory):
    # kept to the end of the session: a new file may get the inode of a loaded library that was removed, and pass for it
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DAGAIN"))  # a name that this process has not loaded
    source = native.Path(depthwise.__file__).with_name("depthwise.cpp")
    target = native._target(source, native.shutil.which("g++"))
    target.parent.mkdir()
    target.write_bytes(damage)
    assert depthwise.is_compiled()
    assert "is compiled anew" in caplog.text
    assert target.stat().st_size > 1000
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_library_without_its_functions_is_told(fresh, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path))
    assert native.library("depthwise", ("no_such_function",)) is None
    assert "no_such_function" in caplog.text


def test_records_name_the_compiler_of_a_kernel_that_loads(fresh, monkeypatch, tmp_path):
    assert environment("cpu", 1).compiler in COMPILERS
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "file"))  # nothing can be kept there
    (tmp_path / "file").touch()
    native.library.cache_clear()
    assert environment("cpu", 1).compiler.endswith(", failed to compile: plain PyTorch, slower")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert environment("cuda", 1).compiler == "", "kernels in C++ are for CPUs"


def test_compiled_once_for_one_processor(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path))
    assert depthwise.is_compiled()
    (first,) = (tmp_path / "kernels").iterdir()
    native.library.cache_clear()
    calls, run = [], subprocess.run
    monkeypatch.setattr(native.subprocess, "run", lambda command, **kw: (calls.append(command), run(command, **kw))[1])
    assert depthwise.is_compiled()
    assert [command[1:] for command in calls] == [["--version"]]
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native.library.cache_clear()
    assert depthwise.is_compiled()
    assert len(list((tmp_path / "kernels").iterdir())) == 2
    assert first.exists()

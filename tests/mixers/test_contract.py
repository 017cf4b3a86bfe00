"""The contracts of mixers, over every registered one."""

import copy

import pytest
import torch

import attnzoo
from attnzoo import create_attention, describe, list_attentions
from attnzoo.errors import OptionError, ShapeError
from attnzoo.registry import REQUIRED
from tests.mixers.zoo import ARGS, CASES, DIM, HEADS, HEIGHT, PREFIX, TOKENS, WIDTH, tokens
from tests.zoo import images

FREE = [case for case in CASES if not case.fixed]
every = pytest.mark.parametrize("case", CASES, ids=str)
every_free = pytest.mark.parametrize("case", FREE, ids=str)


def test_the_cases_are_all_mixers():
    assert {case.name for case in CASES} == set(list_attentions("mixer"))


@every
def test_rows_do_not_depend_on_each_other(case):
    mixer, x = case.build(), tokens(3)
    together = mixer(x, **ARGS)
    assert together.shape == x.shape
    for row, out in zip(x, together, strict=True):
        torch.testing.assert_close(mixer(row[None], **ARGS)[0], out, atol=1e-12, rtol=1e-12)
    changed = x.clone()
    changed[1] += 1
    torch.testing.assert_close(mixer(changed, **ARGS)[::2], together[::2], atol=1e-12, rtol=1e-12)


@every
def test_padding_of_nan_touches_neither_outputs_nor_gradients(case):
    mixer, x = case.build(), tokens()
    mask = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[:, 0] = True
    results = []
    for nothing in (float("nan"), 0.0, 7.0):
        given = torch.where(mask.unsqueeze(-1), x, nothing).requires_grad_()
        out = mixer(given, **ARGS, mask=mask)
        assert not out[~mask].any()
        inputs = [given, *mixer.parameters()]
        gradients = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
        assert not gradients[0][~mask].any()
        results.append((out, *(g for g in gradients if g is not None)))
    for one in results[1:]:
        for a, b in zip(results[0], one, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@every
def test_all_true_is_no_mask(case):
    mixer, x = case.build(), tokens()
    everything = torch.ones(2, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(mixer(x, **ARGS, mask=everything), mixer(x, **ARGS), atol=1e-12, rtol=1e-12)


@every_free
def test_a_batch_of_different_grids_equals_its_images(case):
    """Both ways to batch images of different grids: a grid an image, and one canvas with a mask."""
    mixer = case.build()
    grids = [(4, 6), (7, 3), (1, 1), (5, 5)]
    pictures = [torch.randn(1, PREFIX + h * w, DIM, dtype=torch.float64) for h, w in grids]
    alone = [mixer(x, grid=g, prefix=PREFIX) for x, g in zip(pictures, grids, strict=True)]

    packed = torch.full((4, PREFIX + 27, DIM), float("nan"), dtype=torch.float64)
    for row, x in zip(packed, pictures, strict=True):
        row[: x.shape[1]] = x[0]
    out = mixer(packed, grid=torch.tensor(grids), prefix=PREFIX)
    for row, x in zip(out, alone, strict=True):
        torch.testing.assert_close(row[: x.shape[1]], x[0], atol=1e-10, rtol=1e-9)
        assert not row[x.shape[1] :].any()

    canvas = torch.full((4, 7, 6, DIM), float("nan"), dtype=torch.float64)
    real = torch.zeros(4, 7, 6, dtype=torch.bool)
    for i, (h, w) in enumerate(grids):
        canvas[i, :h, :w], real[i, :h, :w] = pictures[i][0, PREFIX:].view(h, w, DIM), True
    x = torch.cat([torch.cat([p[:, :PREFIX] for p in pictures]), canvas.flatten(1, 2)], dim=1)
    mask = torch.cat([torch.ones(4, PREFIX, dtype=torch.bool), real.flatten(1)], dim=1)
    out = mixer(x, grid=(7, 6), prefix=PREFIX, mask=mask)
    for i, (h, w) in enumerate(grids):
        torch.testing.assert_close(out[i, :PREFIX], alone[i][0, :PREFIX], atol=1e-10, rtol=1e-9)
        patches = out[i, PREFIX:].view(7, 6, DIM)[:h, :w].reshape(h * w, DIM)
        torch.testing.assert_close(patches, alone[i][0, PREFIX:], atol=1e-10, rtol=1e-9)


@every_free
def test_takes_any_grid_at_any_time(case):
    mixer = case.build()
    for h, w in ((1, 1), (2, 5), (9, 1)):
        x = torch.randn(1, h * w, DIM, dtype=torch.float64)
        out = mixer(x, grid=(h, w))
        assert out.shape == x.shape
        assert out.isfinite().all()


@pytest.mark.parametrize("case", [case for case in CASES if case.fixed], ids=str)
def test_what_is_fixed_says_so(case):
    with pytest.raises(ShapeError, match=rf"{TOKENS} tokens, prefix included"):
        case.build()(torch.zeros(1, TOKENS + WIDTH, DIM, dtype=torch.float64), grid=(HEIGHT + 1, WIDTH), prefix=PREFIX)
    with pytest.raises(ShapeError, match="a grid an image"):
        case.build()(tokens(), grid=torch.tensor([[HEIGHT, WIDTH]] * 2), prefix=PREFIX)


@every
def test_causality_is_as_the_table_says(case):
    """Of a causal mixer no token sees a later one; of another, the first token sees some."""
    mixer = case.build()
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, **ARGS).sum(-1), tokens(1))[0, :, 0]
    reach = jacobian.abs().amax(-1) > 1e-14  # (to, from)
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    alone = case.options.get("token_mixing") == "identity"
    assert not (reach & later).any() or not case.able.causal
    assert (reach & later).any() or case.able.causal or alone
    if not case.able.causal and not alone:
        assert reach[0].all() or case.options.get("token_mixing") in ("conv1d",)
    assert reach.diagonal().all() or case.name == "pooling"


@every
def test_order_is_as_the_table_says(case):
    """Shuffled tokens give shuffled outputs, of a mixer for any order and of no other."""
    mixer, x = case.build(), tokens(1)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    alike = torch.allclose(mixer(x[:, order], **ARGS), mixer(x, **ARGS)[:, order])
    assert alike == case.able.any_order


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_near_float64(case, dtype):
    exact = case.build()
    mixer = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(mixer).double()  # the same rounded weights
    x = tokens().to(dtype)
    out = mixer(x, **ARGS)
    assert out.dtype == dtype
    expected = exact(x.double(), **ARGS)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    assert (out.double() - expected).abs().max() < tolerance * expected.abs().max()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_harmless_in_every_dtype(case, dtype):
    """A row that is all padding but for one token, in half precision too."""
    mixer, x = case.build(dtype), tokens().to(dtype).requires_grad_()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 1:] = False
    out = mixer(torch.where(mask.unsqueeze(-1), x, float("nan")), **ARGS, mask=mask)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.float().mean(), [x, *mixer.parameters()], allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)


@every
def test_transforms_of_functions_see_through_it(case):
    """Forward-mode derivatives, and gradients by torch.func, in float32: where a compiled kernel may be in the way."""
    mixer, x = case.build(torch.float32), tokens(dtype=torch.float32)
    double, tangent = copy.deepcopy(mixer).double(), torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    _, got = torch.func.jvp(lambda x: mixer(x, **ARGS), (x,), (tangent,))
    _, expected = torch.func.jvp(lambda x: double(x, **ARGS), (x.double(),), (tangent.double(),))
    assert (got.double() - expected).abs().max() < 1e-4 * expected.abs().max()

    def loss(leaves):
        parameters = {name: leaf for name, leaf in leaves.items() if name != "x"}
        return torch.func.functional_call(mixer, parameters, (leaves["x"],), ARGS).square().sum()

    leaves = {"x": x.requires_grad_(), **dict(mixer.named_parameters())}
    by_func = torch.func.grad(loss)({name: leaf.detach() for name, leaf in leaves.items()})
    by_backward = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for got, expected in zip(by_func.values(), by_backward, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", [case for case in CASES if set(case.options) <= {"tokens"}], ids=str)
def test_compiles_in_float64(case):
    mixer, x = case.build(), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **ARGS), mixer(x, **ARGS), atol=1e-12, rtol=1e-12)


@every
def test_compiles_without_a_break_with_its_gradients(case):
    """In float32, in which operators of our own run."""
    assert case.able.compile
    mixer, x = case.build(torch.float32), tokens(dtype=torch.float32).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    inputs, results = [x, *mixer.parameters()], []
    for function in (compiled, mixer):
        out = function(x, **ARGS)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()))


@pytest.mark.parametrize("case", [case for case in CASES if list(case.build().parameters())], ids=str)
def test_every_parameter_gets_a_gradient_and_is_in_the_state_dict(case):
    mixer, x = case.build(), tokens()
    mixer(x, **ARGS).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert set(mixer.state_dict()) == {name for name, _ in mixer.named_parameters()}
    torch.manual_seed(5)
    other = create_attention(case.name, DIM, HEADS, **case.options).double()
    other.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(other(x, **ARGS), mixer(x, **ARGS), atol=0, rtol=0)


@every
def test_order_in_memory_training_and_repetition_change_nothing(case):
    mixer, x = case.build(), tokens()
    out = mixer(x, **ARGS)
    torch.testing.assert_close(mixer(x.permute(2, 0, 1).contiguous().permute(1, 2, 0), **ARGS), out)
    torch.testing.assert_close(mixer.eval()(x, **ARGS), out, atol=0, rtol=0)
    torch.testing.assert_close(copy.deepcopy(mixer)(x, **ARGS), out, atol=0, rtol=0)


@pytest.mark.parametrize("name", list_attentions("mixer"))
def test_stands_in_a_model_by_its_name_alone(name):
    import timm

    needs = describe(name).options.get("tokens") is REQUIRED
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=7, img_size=64).eval()
    before = model(images())
    attnzoo.replace_attention(model, name, **({"tokens": 17} if needs else {}))
    after = model(images())
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-4
    after.square().sum().backward()
    attnzoo.restore_attention(model)
    torch.testing.assert_close(model(images()), before, atol=0, rtol=0)


@pytest.mark.parametrize("name", list_attentions("mixer"))
def test_bad_options_are_named(name):
    options = dict.fromkeys(describe(name).options, "nonsense")
    for option, value in options.items():
        needed = {"tokens": TOKENS} if "tokens" in options else {}
        with pytest.raises(OptionError, match="nonsense"):
            create_attention(name, DIM, HEADS, **{**needed, option: value})
    if describe(name).options.get("tokens") is REQUIRED:
        with pytest.raises(OptionError, match=f"'{name}' needs tokens="):
            create_attention(name, DIM, HEADS)

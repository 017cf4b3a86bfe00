"""Repair: mixers fitted to the attention that they replaced."""

import copy
import os
import signal
import socket

import pytest
import torch
import transformers
from torch import nn

import attnzoo
from attnzoo.errors import AttnZooError, OptionError, SwapError, TrainingError, UnsupportedError
from attnzoo.repairing.options import RepairOptions
from attnzoo.repairing.repair import Repair
from attnzoo.repairing.report import RepairReport
from attnzoo.repairing.teacher import as_teacher, own_values
from attnzoo.swap import swapped_layers
from tests.repairing.models import CAUSAL, KINDS, detr, detr_images, encoder, hf_vit, llama, padded, swap_options, vit
from tests.zoo import HOSTS, images, seeded, tokens

pytestmark = pytest.mark.compat

MIXERS = attnzoo.list_attentions(kind="mixer")
REFUSED = {"timm:eva02_tiny_patch14_224"}  # rotary embedding
SHORT = {"degree": 2, "kernel_size": 3}


def swapped(**options):
    return attnzoo.replace_attention(vit(), "padre", **{**SHORT, **options})


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batches(count, rows=4):
    dice = torch.Generator().manual_seed(5)
    return [torch.randn(rows, 3, 64, 64, generator=dice) for _ in range(count)]


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_the_teacher_is_the_original_and_restoring_gives_it_back(host):
    original, options = seeded(host.build), CAUSAL["padre"] if host.causal else {}
    model = copy.deepcopy(original)
    if host.name == "torch:encoder":
        options = {"grid": (4, 4)}
    if host.name in REFUSED:
        with pytest.raises(UnsupportedError, match="rotary"):
            attnzoo.replace_attention(model, "padre", **options)
        return
    paths = [layer.path for layer in attnzoo.swap_report(model).layers]
    able = [path for path in paths if "head" not in path and "attn_pool" not in path]
    attnzoo.replace_attention(model, "padre", where=able, **options)
    inputs, before = host.inputs(), weights(original)
    with torch.no_grad(), as_teacher(model, swapped_layers(model)):
        # torch's encoder, unswapped, takes a fast path that rounds otherwise
        near = 1e-5 if host.name == "torch:encoder" else 0
        torch.testing.assert_close(host.call(model, inputs), host.call(original, inputs), rtol=0, atol=near)
    report = attnzoo.repair(model, [inputs], steps=6, lr=2e-3, forward=host.call)
    assert [layer.path for layer in report.layers] == able
    assert all(layer.after < layer.before for layer in report.layers), str(report)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert same(weights(attnzoo.restore_attention(model)), before)


@pytest.mark.parametrize("host", KINDS, ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_the_fitted_error_falls_for_every_mixer_in_every_kind_of_host(name, host):
    model, options = host.build(), swap_options(host, name)
    if options is None:
        with pytest.raises(AttnZooError, match=r"causal|cannot decode"):
            attnzoo.replace_attention(model, name)
        return
    attnzoo.replace_attention(model, name, **options)
    if name == "pooling":
        with pytest.raises(SwapError, match="pooling has no parameters"):
            attnzoo.repair(model, [host.inputs()], steps=1)
        return
    report = attnzoo.repair(model, [host.inputs()], steps=5, lr=2e-3)
    assert report.loss_after < report.loss_before, str(report)
    assert len(report.layers) == 2


@pytest.mark.parametrize("host", KINDS, ids=str)
def test_the_whole_network_is_fitted_to_its_original(host):
    model = host.build()
    attnzoo.replace_attention(model, "padre", init="inherit", **swap_options(host, "padre"))
    before = weights(model)
    how = {"steps": 6, "objective": "model", "hidden": 0.1, "temperature": 2.0}
    report = attnzoo.repair(model, [host.inputs()], lr=1e-3, **how)
    assert report.loss_after < report.loss_before
    after = weights(model)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed
    assert all(".mixer." in name for name in changed)
    fit = Repair(model, RepairOptions(**how, train="all", lr=1e-4))
    with torch.no_grad(), as_teacher(model, fit.swapped):
        wanted = host.call(model, host.inputs())
    again = fit.run([host.inputs()])
    assert again.loss_after < again.loss_before
    with torch.no_grad(), as_teacher(model, fit.swapped), own_values(fit.teacher):
        torch.testing.assert_close(host.call(model, host.inputs()), wanted, rtol=0, atol=0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, after[name])}
    assert any(".mixer." not in name for name in changed)
    third = Repair(copy.deepcopy(model), RepairOptions(**how))
    with torch.no_grad(), as_teacher(third.model, third.swapped), own_values(third.teacher):
        torch.testing.assert_close(host.call(third.model, host.inputs()), wanted, rtol=0, atol=0)
    assert same(weights(attnzoo.restore_attention(model)), weights(host.build()))


def test_padding_does_not_count():
    """What stands there changes neither the error nor a step."""
    found = []
    for filling in (0.0, 1e3):
        model = attnzoo.replace_attention(encoder(), "padre", grid=(4, 4), **SHORT)
        batch = padded()
        batch["src"][batch["src_key_padding_mask"]] = filling
        torch.manual_seed(1)
        for layer in swapped_layers(model).values():
            for parameter in layer.mixer.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        report = attnzoo.repair(model, [batch], steps=3)
        found.append([report.loss_before, report.loss_after])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_padding_of_a_language_model_does_not_count_in_its_divergence():
    model = attnzoo.replace_attention(llama(), "padre", init="inherit", **CAUSAL["padre"])
    batch, losses = tokens(), []
    for name in batch:
        batch[name] = batch[name].flip(1)  # padded on the right, where nothing else hides it
    for filling in (0, 50):
        batch["input_ids"][batch["attention_mask"] == 0] = filling
        losses.append(attnzoo.repair(model, [batch], steps=1, lr=0.0, objective="model").loss_before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_value_that_is_not_finite_stops_it_with_layer_and_step_and_the_weights_as_before():
    model, good = swapped(), batches(3)
    attnzoo.repair(model, good, steps=2)
    before = weights(model)
    with torch.no_grad():
        attnzoo.swap.original_of(model.blocks[1].attn).proj.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1: layer blocks\.1\.attn is not finite"):
        attnzoo.repair(model, good, steps=2)
    assert same(weights(model), before)
    with torch.no_grad():
        attnzoo.swap.original_of(model.blocks[1].attn).proj.bias[0] = 0
    with pytest.raises(TrainingError, match=r"step 3: .* is not finite; the weights are those of before"):
        attnzoo.repair(model, [*good[:2], good[2] * float("inf")], steps=3, objective="model")


def test_an_interrupt_ends_it_between_two_steps(monkeypatch):
    model, told = swapped(), []
    step = torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    try:
        report = attnzoo.repair(model, batches(2), steps=9, progress=lambda *given: told.append(given))
    finally:
        signal.signal(signal.SIGINT, before)
    assert report.ended == "interrupted after 3 of 9 steps"
    assert report.steps == 3
    monkeypatch.undo()
    whole = swapped()
    fit = Repair(whole, RepairOptions(steps=9))
    fit.run(batches(2), until=3)
    assert same(weights(model), weights(whole))


@pytest.mark.parametrize("how", [{}, {"objective": "model", "train": "all", "lr": 1e-4, "hidden": 0.1}], ids=str)
def test_killed_and_resumed_is_as_unbroken(how, tmp_path):
    options = RepairOptions(steps=7, **how)
    whole = swapped()
    unbroken = Repair(whole, options).run(batches(3))
    model = swapped()
    first = Repair(model, options)
    first.run(batches(3), until=4)
    torch.save({"repair": first.state_dict(), "model": model.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = swapped()
    other.load_state_dict(state["model"])
    second = Repair(other, options)
    second.load_state_dict(state["repair"])
    report = second.run(batches(3))
    assert same(weights(other), weights(whole))
    assert (report.layers, report.steps, report.samples) == (unbroken.layers, 7, 28)
    assert (report.loss_before, report.loss_after) == (unbroken.loss_before, unbroken.loss_after)


def test_half_precision_is_trained_through_float32():
    for how in ({"autocast": torch.bfloat16}, {}):
        model = swapped()
        model = model if how else model.bfloat16()
        data = batches(2) if how else [batch.bfloat16() for batch in batches(2)]
        report = attnzoo.repair(model, data, steps=20, lr=1e-3, **how)
        assert report.loss_after < 0.7 * report.loss_before
        assert {p.dtype for p in model.parameters()} == {torch.float32 if how else torch.bfloat16}


def test_a_batch_that_the_model_does_not_take_is_told_with_what_to_give():
    model, (images,) = swapped(), batches(1)
    labels = torch.zeros(4, dtype=torch.long)
    for batch, said in (
        ((images, labels), r"2 values: a tensor \(4, 3, 64, 64\), a tensor \(4,\)"),
        ((images, torch.zeros(4)), r"2 values: .*: IndexError: [^.]*\. A batch holds"),
        ({"pixels": images}, "a mapping of pixels"),
    ):
        with pytest.raises(OptionError, match=rf"cannot be called with the first batch, {said}.*model\(batch\[0\]\)"):
            attnzoo.repair(model, [batch], steps=1)
    report = attnzoo.repair(model, [(images, labels)], steps=1, forward=lambda m, batch: m(batch[0]))
    assert report.steps == 1

    def wrong(mine, theirs):
        return mine.logits - theirs.logits

    with pytest.raises(AttributeError, match="logits"):  # a mistake in what is the caller's own, and not of the batch
        attnzoo.repair(model, [images], steps=1, objective="model", loss=wrong)


def test_a_loss_that_rose_is_told():
    assert "it rose: take more steps, or a lower lr" in str(RepairReport("layer", (), 0.1, 0.2, 3, 12, 1.0))
    assert "rose" not in str(RepairReport("layer", (), 0.2, 0.1, 3, 12, 1.0))
    assert "not what is minimized" in str(RepairReport("model", (), 0.2, 0.1, 3, 12, 1.0))
    assert "not what is" not in str(RepairReport("model", (), 0.2, 0.1, 3, 12, 1.0, hidden=0.5))


def test_the_loss_that_is_reported_in_half_precision_is_that_of_the_trained_weights():
    """Autocast keeps what it cast of a weight: of the teacher's, whose place it is in for one call, it must not."""
    model = swapped()
    options = RepairOptions(steps=8, objective="model", train="all", lr=1e-2, autocast=torch.bfloat16)
    fit = Repair(model, options)
    report = fit.run(batches(1))
    fit._set_modes(training=False)
    with torch.no_grad():
        wanted = float(fit._model_loss(batches(1)[0], training=False))
    assert report.loss_after == pytest.approx(wanted, rel=1e-3)


def test_weights_that_modules_share_are_kept_once():
    model = attnzoo.replace_attention(llama(), "padre", **CAUSAL["padre"])
    model.lm_head.weight = model.model.embed_tokens.weight
    fit = Repair(model, RepairOptions(steps=1, objective="model", train="all"))
    kept = [fit.teacher[name][1] for name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert kept[0].data_ptr() == kept[1].data_ptr()


@pytest.mark.parametrize("library", ["timm", "transformers", "detector"])
def test_gradient_checkpointing_changes_nothing(library):
    """Not even dropout, which transformers has in training mode."""
    found = []
    for checkpointed in (False, True):
        model = {"timm": vit, "transformers": hf_vit, "detector": detr}[library]()
        where = "model.encoder.*" if library == "detector" else None
        attnzoo.replace_attention(model, "padre", init="inherit", where=where, **SHORT)
        if checkpointed:
            model.set_grad_checkpointing() if library == "timm" else model.gradient_checkpointing_enable()
        calls, layer = [], model.get_submodule(next(iter(swapped_layers(model))))
        layer.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        data = [detr_images()] * 2 if library == "detector" else batches(2)
        attnzoo.repair(model, data, steps=2, objective="model", hidden=0.1)
        if library == "detector":
            assert model.model.encoder.layers[0].dropout == 0.1
        found.append((weights(model), len(calls)))
    assert found[1][1] == found[0][1] + 2, "every step's backward pass calls the layer again"
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value)


def share(rank, port, folder, objective):
    """What one of two processes does."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in {**world, "MASTER_PORT": port}.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(rank)
    model = swapped() if rank == 0 else attnzoo.replace_attention(vit(), "padre", **SHORT)
    with torch.no_grad():
        for layer in swapped_layers(model).values():
            layer.mixer.y_channels.weight.add_(rank)  # the main process's weights are taken
    mine = [batch[2 * rank : 2 * rank + 2] for batch in batches(3)]
    more = mine if rank == 0 else [*mine, *mine]  # it ends where the other does
    report = attnzoo.repair(model, iter(more), steps=6, accelerator=accelerator, objective=objective)
    if rank == 0:
        torch.save({"model": model.state_dict(), "samples": report.samples}, folder / "two.pt")
    wrapped = nn.parallel.DistributedDataParallel(swapped())
    with pytest.raises(UnsupportedError, match="wrapped in DistributedDataParallel"):
        attnzoo.repair(wrapped, mine, steps=1, accelerator=accelerator)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("objective", ["layer", "model"])
def test_two_processes_give_what_one_gives(objective, tmp_path, forked):
    """To 1e-4 of the weights: what differs is the order of sums."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [forked.start(share, rank, port, tmp_path, objective, prepare=prepare) for rank in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    model = swapped()
    with pytest.warns(UserWarning, match="ended after 3 of 6"):
        report = attnzoo.repair(model, iter(batches(3)), steps=6, objective=objective)
    assert two["samples"] == report.samples == 12
    for name, value in model.state_dict().items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-4)


def prepare():
    """Nothing to import for the processes."""


def test_bad_input_is_refused_before_any_work():
    model = swapped()
    before = weights(model)
    data = batches(1)
    for wrong, words in [
        ({"steps": 0}, "steps"),
        ({"objective": "both"}, "objective"),
        ({"train": "some"}, "train"),
        ({"lr": -1.0}, "lr"),
        ({"train": "all"}, "objective='model'"),
        ({"layers": "blocks.7"}, "matches none of the swapped layers: blocks.0.attn"),
    ]:
        with pytest.raises(OptionError, match=words):
            attnzoo.repair(model, data, **{"steps": 1, **wrong})
    with pytest.raises(OptionError, match="yielded nothing"):
        attnzoo.repair(model, [], steps=1)
    with pytest.raises(TypeError, match="learning_rate"):
        attnzoo.repair(model, data, steps=1, learning_rate=1)
    assert same(weights(model), before)
    with pytest.raises(SwapError, match="nothing to fit"):
        attnzoo.repair(vit(), data, steps=1)
    with pytest.raises(SwapError, match="keep_original=False"):
        attnzoo.repair(swapped(keep_original=False), data, steps=1)
    with pytest.warns(UserWarning, match="ended after 1 of 3 steps"):
        report = attnzoo.repair(model, iter(data), steps=3)
    assert "ended after 1 of 3 steps" in str(report)


def test_layers_that_were_not_asked_for_stay_and_the_report_tells_all():
    model = swapped()
    before = weights(model)
    report = attnzoo.repair(model, batches(2), steps=2, layers="blocks.1")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("blocks.1.attn.mixer") for name in changed)
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert "`blocks.1.attn` | padre" in lines[2]
    assert "in 2 steps, 8 samples" in lines[3]


def test_outputs_that_have_no_logits_need_a_loss():
    model = transformers.ViTModel(hf_vit().config).eval()
    attnzoo.replace_attention(model, "padre", **SHORT)
    with pytest.raises(AttnZooError, match="has no logits; give loss="):
        attnzoo.repair(model, [images()], steps=1, objective="model")

    def apart(mine, theirs):
        return (mine.last_hidden_state - theirs.last_hidden_state).square().mean()

    report = attnzoo.repair(model, [images()], steps=4, objective="model", loss=apart)
    assert report.loss_after < report.loss_before
    headless = attnzoo.replace_attention(vit(num_classes=0), "padre", **SHORT)
    with pytest.raises(UnsupportedError, match=r"num_classes=0\): give loss="):
        attnzoo.repair(headless, batches(1), steps=1, objective="model")
    head = nn.Linear(48, 5)
    report = attnzoo.repair(headless, batches(1), steps=1, objective="model", forward=lambda m, batch: head(m(batch)))
    assert report.steps == 1


def test_gradients_may_be_off_where_it_is_called():
    with torch.no_grad():
        for objective in ("layer", "model"):
            report = attnzoo.repair(swapped(), batches(1), steps=4, objective=objective)
            assert report.loss_after < report.loss_before


class Normed(nn.Module):
    """A network with running statistics before its attention, and dropout after."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.vit = nn.BatchNorm2d(3), nn.Dropout(0.2), vit()

    def forward(self, x):
        return self.vit(self.drop(self.norm(x)))


def test_all_is_put_back_whatever_a_repair_trained():
    """Counters of batches, weights that two layers share, and what is inside another module."""
    model = Normed()
    before = weights(model)
    attnzoo.replace_attention(model, "padre", **SHORT)
    attnzoo.repair(model, batches(2), steps=2, objective="model", train="all")
    assert model.norm.num_batches_tracked == 2
    assert same(weights(attnzoo.restore_attention(model)), before)
    model = vit()
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    before = weights(model)
    attnzoo.replace_attention(model, "padre", where="blocks.0", **SHORT)
    attnzoo.repair(nn.Sequential(model), batches(1), steps=2, objective="model", train="all")
    assert not torch.equal(model.blocks[1].attn.qkv.weight, before["blocks.1.attn.qkv.weight"])
    assert same(weights(attnzoo.restore_attention(model)), before)


def test_the_teacher_stays_the_same_over_repairs_and_further_swaps():
    original, model, (batch,) = vit(), vit(), batches(1)
    attnzoo.replace_attention(model, "padre", where="blocks.0", **SHORT)
    attnzoo.repair(model, [batch], steps=3, objective="model", train="all")
    attnzoo.replace_attention(model, "padre", where="blocks.1", **SHORT)
    losses = []
    report = attnzoo.repair(model, [batch], steps=1, lr=0.0, progress=lambda step, loss: losses.append(loss))
    assert losses == [pytest.approx(report.loss_before, rel=1e-5)], "layers are fitted on the teacher's inputs"
    fit = Repair(model, RepairOptions(steps=1))
    with torch.no_grad(), as_teacher(model, fit.swapped), own_values(fit.teacher):
        assert torch.equal(model(batch), original(batch))
    state = fit.state_dict()
    fresh = attnzoo.replace_attention(vit(), "padre", **SHORT)
    fresh.load_state_dict(model.state_dict())
    again = Repair(fresh, RepairOptions(steps=1))
    again.load_state_dict(state)
    with torch.no_grad(), as_teacher(fresh, again.swapped), own_values(again.teacher):
        assert torch.equal(fresh(batch), original(batch))


def test_a_step_that_breaks_off_leaves_buffers_as_before():
    model = attnzoo.replace_attention(Normed(), "padre", **SHORT)
    before = weights(model)
    with pytest.raises(TrainingError, match="step 1"):
        attnzoo.repair(model, [batches(1)[0] * float("inf")], steps=1, objective="model", train="all")
    assert same(weights(model), before)


def test_dropout_is_the_same_in_a_resumed_run_and_no_global_random_number_is_drawn():
    options, found = RepairOptions(steps=4, objective="model", train="all", seed=3), []
    for cut in (None, 2):
        model = attnzoo.replace_attention(Normed(), "padre", **SHORT)
        fit = Repair(model, options)
        before = torch.get_rng_state()
        if cut is not None:
            fit.run(batches(2), until=cut)
            torch.manual_seed(99)
            before = torch.get_rng_state()
        fit.run(batches(2))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(weights(model))
    assert same(*found)


def test_a_language_model_inside_another_module_makes_no_cache():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, **given):
            return self.inner(**given)

    model = attnzoo.replace_attention(Outer(), "padre", init="inherit", **CAUSAL["padre"])
    report = attnzoo.repair(model, [tokens()], steps=4)
    assert report.loss_after < report.loss_before
    assert model.inner.config.use_cache


def test_padding_does_not_count_in_the_layers_part_of_the_networks_loss():
    losses = []
    for filling in (0.0, 1.0):
        model = attnzoo.replace_attention(encoder(), "padre", init="inherit", grid=(4, 4), **SHORT)
        batch = padded()
        batch["src"][batch["src_key_padding_mask"]] = filling
        report = attnzoo.repair(model, [batch], steps=1, lr=0.0, objective="model", hidden=1.0)
        losses.append(report.loss_before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_was_frozen_stays_and_so_do_gradients_forwards_and_other_layers():
    model = swapped()
    model.pos_embed.requires_grad_(False)
    model.cls_token.grad = torch.ones_like(model.cls_token)
    layer = model.blocks[1].attn
    calls, plain = [], layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1]
    own, before = layer.forward, weights(model)
    attnzoo.repair(model, batches(1), steps=2, objective="model", train="all", layers="blocks.1")
    after = weights(model)
    assert torch.equal(after["pos_embed"], before["pos_embed"])
    assert not any(torch.equal(after[name], before[name]) for name in ("cls_token", "head.weight"))
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("blocks.0.attn.mixer"))
    assert torch.equal(model.cls_token.grad, torch.ones_like(model.cls_token))
    assert layer.forward is own
    assert calls


def test_an_original_that_gives_nothing_does_not_stop_it():
    model = vit()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
        model.blocks[0].attn.proj.bias.zero_()
    report = attnzoo.repair(attnzoo.replace_attention(model, "padre", **SHORT), batches(1), steps=4)
    assert report.layers[0].after < report.layers[0].before


def test_a_layer_that_is_called_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, x):
            return self.inner(x) + self.inner(2 * x)

    losses, model = [], attnzoo.replace_attention(Twice(), "padre", **SHORT)
    report = attnzoo.repair(model, batches(1), steps=1, lr=0.0, progress=lambda step, loss: losses.append(loss))
    assert losses == [pytest.approx(report.loss_before, rel=1e-5)]


def test_the_learning_rate_rises_falls_and_begins_full_without_warm_up():
    rates = {warmup: [] for warmup in (0.0, 0.5)}
    for warmup, found in rates.items():
        fit = Repair(swapped(), RepairOptions(steps=8, warmup=warmup, lr=1.0))
        fit.run(batches(1), lambda step, loss, fit=fit, found=found: found.append(fit.schedule.get_last_lr()[0]))
        assert found[-1] < 0.1
    assert RepairOptions(steps=8, warmup=0.0).warmup == 0
    assert Repair(swapped(), RepairOptions(steps=8, warmup=0.0, lr=1.0)).schedule.get_last_lr() == [1.0]
    assert rates[0.5][:3] == pytest.approx([0.4, 0.6, 0.8])


def test_what_cannot_be_trained_is_refused():
    from accelerate import Accelerator

    for wrong, words in [
        ({"layers": []}, "layers must be"),
        ({"layers": 3}, "layers must be"),
        ({"autocast": "bf16"}, "autocast must be"),
        ({"autocast": torch.float16}, "autocast must be"),
        ({"accelerator": Accelerator(cpu=True), "autocast": torch.bfloat16}, "exclude one another"),
        ({"accelerator": Accelerator(cpu=True, gradient_accumulation_steps=4)}, "gradient_accumulation_steps"),
    ]:
        with pytest.raises(OptionError, match=words):
            attnzoo.repair(swapped(), batches(1), steps=1, **wrong)
    with pytest.raises(OptionError, match="and is one Tensor: give a list"):
        attnzoo.repair(swapped(), batches(1)[0], steps=1)
    with pytest.raises(UnsupportedError, match="float16 lose small gradients"):
        attnzoo.repair(swapped().half(), batches(1), steps=1)


def test_an_accelerator_in_one_process_changes_nothing():
    from accelerate import Accelerator

    found = []
    for accelerator in (None, Accelerator(cpu=True)):
        model = swapped()
        attnzoo.repair(model, batches(2), steps=3, accelerator=accelerator)
        found.append(weights(model))
    assert same(*found)

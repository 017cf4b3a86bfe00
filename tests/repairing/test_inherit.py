"""Mixers that begin as the map of attention's values."""

import pytest
import torch

import attnzoo
from attnzoo.errors import OptionError, UnsupportedError
from attnzoo.swap import swapped_layers
from tests.repairing.models import encoder, vit
from tests.repairing.test_repair import REFUSED
from tests.zoo import HOSTS, seeded

pytestmark = pytest.mark.compat

ABLE = ("causal", "mask", "gqa", "cross", "softcap", "widths")
EXACT = [
    ("padre", {"degree": d, "token_mixing": t, "output": o})
    for d in (1, 3)
    for t in ("conv2d", "conv1d", "causal_conv1d", "dense", "identity")
    for o in ("last", "sum", "element_sum")
]
EXACT += [("conv2former", {}), ("hyena", {}), ("hyena", {"bidirectional": False, "order": 3})]


class Values:
    """A core that gives every token its own value."""

    def __call__(self, q, k, v, mask=None, causal=False, scale=None, dropout=0.0, softcap=None):
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def mean_of_reached(x, name, options):
    """Each token as the mean over what padre's token mixing of size 11 reaches; of other mixers the token itself."""
    kind = options.get("token_mixing", "identity") if name == "padre" else "identity"
    head, patches = x[:, :2], x[:, 2:]
    everything = x.mean(1, keepdim=True)
    if kind == "identity":
        return x
    if kind == "dense":
        return everything.expand_as(x)
    if kind == "causal_conv1d":
        return torch.stack([x[:, max(0, i - 10) : i + 1].sum(1) / 11 for i in range(x.shape[1])], 1)
    taps = 121 if kind == "conv2d" else 11  # all of 3 x 3 patches are reached, and zeros beyond
    reached = (patches.sum(1, keepdim=True) + head.mean(1, keepdim=True)) / taps
    if kind == "conv1d":
        lines = [patches[:, max(0, i - 5) : i + 6].sum(1) for i in range(9)]
        reached = (torch.stack(lines, 1) + head.mean(1, keepdim=True)) / taps
    return torch.cat([everything.expand_as(head), reached.expand_as(patches)], 1)


@pytest.mark.parametrize(("name", "options"), EXACT, ids=str)
def test_a_mixer_begins_as_the_map_that_it_inherits_and_can_leave_it(name, options):
    torch.manual_seed(0)
    prefix = 0 if name == "hyena" else 2
    if options.get("token_mixing") == "dense" or options.get("output") == "element_sum":
        options = {**options, "tokens": 9 + prefix}
    mixer = attnzoo.create_attention(name, 12, 1, **options).double()
    weight, bias = torch.randn(12, 12).double(), torch.randn(12).double()
    mixer.inherit(weight, bias)
    x = torch.randn(2, 9 + prefix, 12).double()
    where = {} if name == "hyena" else {"grid": (3, 3), "prefix": prefix}
    wanted = mean_of_reached(x, name, options) @ weight.mT + bias
    torch.testing.assert_close(mixer(x, **where), wanted)
    mask = torch.ones(2, 9 + prefix, dtype=torch.bool)
    mask[1, -2:] = False
    if options.get("token_mixing", "identity") == "identity":  # elsewhere what padding hides is missing in the means
        torch.testing.assert_close(mixer(x, **where, mask=mask)[mask], wanted[mask])
    target, losses = torch.roll(x, 1, 1) * x, []
    optimizer = torch.optim.Adam(mixer.parameters(), lr=1e-2)
    for _ in range(10):
        losses.append((mixer(x, **where) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sima", "linear_angular"])
def test_attention_without_softmax_takes_the_values_alone(name):
    mixer = attnzoo.create_attention(name, 12, 3)
    weight, bias = torch.randn(12, 12), torch.randn(12)
    queries = mixer.qkv.weight[:24].clone()
    mixer.inherit(weight, bias)
    assert torch.equal(mixer.qkv.weight[24:], weight)
    assert torch.equal(mixer.qkv.bias[24:], bias)
    assert torch.equal(mixer.qkv.weight[:24], queries)
    assert torch.equal(mixer.proj(torch.eye(12)), torch.eye(12))


@pytest.mark.parametrize("host", [host for host in HOSTS if host.name not in REFUSED], ids=str)
def test_a_swapped_layer_begins_as_its_hosts_own_projections_of_values(host):
    """The oracle is the host's own layer with a core that attends to nothing but the token itself.

    The mixer reaches the token alone: by a kernel of one tap or, where it needs none, without one.
    """
    attnzoo.register_attention("values-alone", "core", Values, capabilities=dict.fromkeys(ABLE, True))
    found = []
    try:
        for name in ("padre", "values-alone"):
            model = seeded(host.build)
            path = attnzoo.swap_report(model).layers[0].path
            causal = {"token_mixing": "causal_conv1d", "kernel_size": 1}
            mixing = causal if host.causal else {"token_mixing": "identity"}
            options = {"init": "inherit", "degree": 2, **mixing} if name == "padre" else {}
            attnzoo.replace_attention(model, name, where=path, **options)
            with torch.no_grad():
                found.append(host.call(model, host.inputs()))
    finally:
        attnzoo.unregister_attention("values-alone")
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_cannot_inherit_says_so_and_leaves_the_model_alone():
    model = vit()
    for name in ("conv", "sdpa"):
        with pytest.raises(OptionError, match=r"init='inherit' is for mixers .*padre"):
            attnzoo.replace_attention(model, name, init="inherit")
    with pytest.raises(OptionError, match="init must be one of"):
        attnzoo.replace_attention(model, "padre", init="zero")
    with pytest.raises(OptionError, match="as it is asked for cannot"):
        attnzoo.replace_attention(model, "padre", init="inherit", channel_mixing="grouped")
    assert not swapped_layers(model)


def test_a_layer_that_is_not_affine_in_a_token_is_refused():
    model = vit()

    class Gated(type(model.blocks[1].attn.proj)):
        def forward(self, x):
            return super().forward(x) * x.sigmoid()

    model.blocks[1].attn.proj.__class__ = Gated
    with pytest.raises(UnsupportedError, match=r"blocks\.1\.attn: init='inherit' needs a layer that is affine"):
        attnzoo.replace_attention(model, "padre", init="inherit")
    assert not swapped_layers(model)
    assert not model.training
    model = encoder().train()
    attnzoo.replace_attention(model, "padre", init="inherit", grid=(4, 4))
    assert model.training

import dataclasses
import subprocess
import sys
from functools import partial
from importlib import metadata

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import registry
from attnzoo.errors import AttnZooError, OptionError, ShapeError, UnknownNameError, UnsupportedError
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.streaming import Streaming

NAMES = attnzoo.list_attentions()
# what stands alone, with any number of tokens; tests/mixers/test_contract.py has the others
MODULES = [
    name
    for name in attnzoo.list_attentions("core") + attnzoo.list_attentions("mixer")
    if attnzoo.describe(name).options.get("tokens") is not registry.REQUIRED
]


def test_kinds():
    assert {"softmax", "sdpa", "flash"} <= set(attnzoo.list_attentions("core"))
    assert "padre" in attnzoo.list_attentions("mixer")
    assert {"keydiff", "vatp", "caote"} <= set(attnzoo.list_attentions("eviction"))
    with pytest.raises(UnknownNameError, match="core, mixer, eviction"):
        attnzoo.list_attentions("cores")


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_describes_itself(name):
    info = attnzoo.describe(name)
    assert info.name == name
    assert info.summary
    assert info.paper
    assert all(f"{option}=" in str(info) for option in info.options)


@pytest.mark.parametrize("wrong", ["pader", "Padre", "sofmax", "flahs"])
def test_an_unknown_name_gives_the_nearest(wrong):
    nearest = {"pader": "padre", "Padre": "padre", "sofmax": "softmax", "flahs": "flash"}[wrong]
    with pytest.raises(UnknownNameError, match=f"did you mean '{nearest}'"):
        attnzoo.describe(wrong)


def test_an_unknown_option_gives_those_that_exist():
    with pytest.raises(OptionError, match=r"did you mean 'degree'\?.*degree=3, kernel_size=11"):
        attnzoo.create_attention("padre", 8, 1, degre=3)
    with pytest.raises(OptionError, match="Its options: none"):
        attnzoo.create_attention("sdpa", 8, 1, degree=3)


@pytest.mark.parametrize("name", MODULES)
def test_stand_alone(name):
    """Every core and mixer as a module: shapes, gradients, padding that changes nothing, compile."""
    module = attnzoo.create_attention(name, 16, 4)
    x = torch.randn(2, 2 + 12, 16, requires_grad=True)
    out = module(x, grid=(3, 4), prefix=2)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in module.parameters())

    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, 9:] = False
    dirty = torch.where(mask.unsqueeze(-1), x, float("nan"))
    padded = module(dirty, grid=(3, 4), prefix=2, mask=mask)
    assert torch.isfinite(padded).all()
    assert not padded[1, 9:].any()
    torch.testing.assert_close(padded[0], out[0])

    torch._dynamo.reset()
    compiled = torch.compile(lambda t: module(t, grid=(3, 4), prefix=2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), out)


@pytest.mark.parametrize("name", MODULES)
def test_stand_alone_with_a_grid_an_image(name):
    module = attnzoo.create_attention(name, 16, 4)
    grids = torch.tensor([[3, 4], [2, 5]])
    x = torch.randn(2, 1 + 12, 16)
    out = module(x, grid=grids, prefix=1)
    for i, (h, w) in enumerate(grids.tolist()):
        alone = module(x[i : i + 1, : 1 + h * w], grid=(h, w), prefix=1)
        torch.testing.assert_close(out[i : i + 1, : 1 + h * w], alone, atol=1e-5, rtol=1e-4)


def test_methods_that_need_no_grid_take_none():
    attnzoo.create_attention("sdpa", 16, 4)(torch.randn(1, 5, 16))
    with pytest.raises(ShapeError, match="needs grid"):
        attnzoo.create_attention("padre", 16, 4)(torch.randn(1, 5, 16))
    with pytest.raises(ShapeError, match="5 tokens are not"):
        attnzoo.create_attention("sdpa", 16, 4)(torch.randn(1, 5, 16), grid=(2, 2))


@pytest.mark.parametrize(("dim", "heads"), [(0, 1), (8, 0), (8, 3), ("8", 1), (8, 2.0)])
def test_bad_widths_are_refused(dim, heads):
    with pytest.raises(OptionError, match=r"whole number|does not divide"):
        attnzoo.create_attention("sdpa", dim, heads)


class Mean(nn.Module):
    """A user's mixer: every token gets the mean."""

    def __init__(self, dim: int, num_heads: int, *, gain: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), gain))

    def forward(self, x, grid=None, prefix=0, mask=None):
        return self.gain * x.mean(1, keepdim=True).expand_as(x)


def test_a_users_own_method():
    attnzoo.register_attention("mean", "mixer", Mean, summary="the mean")
    try:
        assert "mean" in attnzoo.list_attentions("mixer")
        assert attnzoo.describe("mean").options == {"gain": 1.0}
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
        attnzoo.replace_attention(model, "mean", gain=2.0)
        assert model[0].self_attn.mixer.gain[0] == 2
        assert model(torch.randn(1, 5, 16)).shape == (1, 5, 16)
        with pytest.raises(OptionError, match=r"gain=1\.0"):
            attnzoo.create_attention("mean", 16, 2, gian=2.0)
    finally:
        registry.unregister_attention("mean")


def test_registering_badly():
    with pytest.raises(attnzoo.AttnZooError, match="taken"):
        attnzoo.register_attention("padre", "mixer", Mean)
    with pytest.raises(UnknownNameError, match="no kind"):
        attnzoo.register_attention("mine", "mix", Mean)
    with pytest.raises(OptionError, match="did you mean 'causal'"):
        attnzoo.register_attention("mine", "mixer", Mean, capabilities={"casual": True})
    with pytest.raises(attnzoo.AttnZooError, match=r"package\.module:Class"):
        attnzoo.register_attention("mine", "mixer", "package.module")
    with pytest.raises(attnzoo.AttnZooError, match="is a function"):
        attnzoo.register_attention("mine", "core", lambda q, k, v: v)
    with pytest.raises(UnknownNameError, match="no attention"):
        attnzoo.describe(["padre"])
    with pytest.raises(attnzoo.AttnZooError, match="something in it"):
        attnzoo.register_attention(" ", "mixer", Mean)
    with pytest.raises(attnzoo.AttnZooError, match="built in"):
        registry.unregister_attention("padre")


class NoHeads(Mean):
    def __init__(self, dim):
        super().__init__(dim, 1)


class NoGrid(Mean):
    def forward(self, x):
        return x


class NoState(Mean):
    """Says that it decodes, and cannot."""


class NoInit(nn.Module):
    def forward(self, x, grid=None, prefix=0, mask=None):
        return x


class NoScore(Policy):
    pass


class NoDataclass(Policy):
    """Its option is none: fields of a class that is not a dataclass are nothing but a note."""

    stride: int = 4

    def score(self, view):
        return view.positions % self.stride


class LoosePolicy(Policy):
    """Its constructor takes its options by position."""

    def __init__(self, budget, power=1.0):
        super().__init__(budget=budget)

    def score(self, view):
        return view.positions


@dataclasses.dataclass(frozen=True)
class LooseDataclass(Policy):
    stride: int = 4

    def score(self, view):
        return view.positions % self.stride


class LooseMixer(Mean):
    def __init__(self, dim, num_heads, gain=1.0):
        super().__init__(dim, num_heads)


class LooseCore:
    def __init__(self, bias=-5.0):
        pass


class NoModule:
    def __init__(self, dim, num_heads):
        pass


UNFIT = {
    "NoHeads": ("mixer", NoHeads, {}, r"cannot be built as NoHeads\(dim, num_heads"),
    "NoInit": ("mixer", NoInit, {}, r"cannot be built as NoInit\(dim, num_heads"),
    "NoGrid": ("mixer", NoGrid, {}, r"NoGrid.forward cannot be called as mixer\(x, grid=, prefix=, mask=\)"),
    "NoState": ("mixer", NoState, {"decode": True}, r"NoState.extend cannot be called as mixer.extend\("),
    "NoModule": ("mixer", NoModule, {}, r"NoModule is not a torch\.nn\.Module"),
    "Mean": ("eviction", Mean, {}, r"Mean must inherit from it"),
    "NoScore": ("eviction", NoScore, {}, r"NoScore does not define score"),
    "LoosePolicy": (
        "eviction",
        LoosePolicy,
        {},
        r"budget, power of LoosePolicy can be given by position.*put \* before",
    ),
    "LooseDataclass": (
        "eviction",
        LooseDataclass,
        {},
        r"stride of .* by position.*put @dataclass\(frozen=True, kw_only",
    ),
    "LooseMixer": ("mixer", LooseMixer, {}, r"gain of LooseMixer can be given by position"),
    "LooseCore": ("core", LooseCore, {}, r"bias of LooseCore can be given by position"),
    "NoDataclass": ("eviction", NoDataclass, {}, r"stride of NoDataclass is no option: put @dataclass\(frozen=True"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_class_that_is_not_what_its_kind_asks_for_is_refused(name):
    """A class at its registration, one that is named by a string where it is first built."""
    kind, cls, capabilities, says = UNFIT[name]
    with pytest.raises(attnzoo.AttnZooError, match=f"'unfit' is registered as .* but .*{says}"):
        attnzoo.register_attention("unfit", kind, cls, capabilities=capabilities)
    assert "unfit" not in attnzoo.list_attentions()
    attnzoo.register_attention("unfit", kind, f"{__name__}:{name}", capabilities=capabilities)
    builds = {"core": registry.build_core, "eviction": registry.build_policy}
    build = builds.get(kind) or partial(registry.build_mixer, dim=8, num_heads=2)
    try:
        with pytest.raises(attnzoo.AttnZooError, match=f"'unfit' is registered as .* but .*{says}"):
            build(attnzoo.describe("unfit"), options={})
    finally:
        registry.unregister_attention("unfit")


@pytest.mark.parametrize("capabilities", [["mask"], "mask", {"mask": "yes"}, 3])
def test_capabilities_are_a_mapping_of_true_and_false(capabilities):
    with pytest.raises(OptionError, match=r"a mapping such as \{'mask': True\}|is True or False, not 'yes'"):
        attnzoo.register_attention("mine", "mixer", Mean, capabilities=capabilities)


SAID = {
    "core": "can: backward, compile",
    "mixer": "can: backward, compile",
    "eviction": "can: causal, mask, gqa, backward",
}


@pytest.mark.parametrize(("kind", "like"), [("core", None), ("mixer", None), ("eviction", "keydiff")])
def test_a_method_can_by_default_what_its_kind_can(kind, like):
    target = {"core": "m:Core", "mixer": "m:Mixer", "eviction": "m:Policy"}[kind]
    published = attnzoo.AttentionInfo("mine", kind, target)  # as an entry point gives it
    assert published.capabilities == (attnzoo.describe(like).capabilities if like else attnzoo.Capabilities())
    for given, changed in (
        (None, {}),
        ({}, {}),
        ({"compile": True, "mask": True}, {"compile": True, "mask": True}),
        (attnzoo.Capabilities(softcap=True), None),
    ):
        info = attnzoo.register_attention("mine", kind, target, capabilities=given)
        registry.unregister_attention("mine")
        expected = given if changed is None else dataclasses.replace(published.capabilities, **changed)
        assert info.capabilities == expected


@pytest.mark.parametrize("kind", SAID)
def test_describe_says_what_a_method_of_ones_own_can(kind):
    target = {"core": "attnzoo.cores.sdpa:Sdpa", "mixer": Mean, "eviction": Streaming}[kind]
    attnzoo.register_attention("mine", kind, target)
    try:
        assert SAID[kind] in str(attnzoo.describe("mine")).splitlines()[2]
    finally:
        registry.unregister_attention("mine")


def test_a_broken_target_says_where():
    attnzoo.register_attention("broken", "mixer", "attnzoo.nowhere:Class")
    try:
        with pytest.raises(attnzoo.AttnZooError, match=r"attnzoo\.nowhere:Class"):
            attnzoo.create_attention("broken", 8, 1)
    finally:
        registry.unregister_attention("broken")


def test_eviction_policies_have_their_place():
    with pytest.raises(UnsupportedError, match="cannot stand alone"):
        attnzoo.create_attention("keydiff", 8, 1, budget=4)
    with pytest.raises(attnzoo.AttnZooError, match=r"is not an attnzoo\.eviction\.policy\.Policy"):
        attnzoo.register_attention("drop_all", "eviction", nn.Identity)
    attnzoo.register_attention("drop_all", "eviction", "torch.nn:Identity")
    try:
        with pytest.raises(attnzoo.AttnZooError, match=r"is not an attnzoo\.eviction\.policy\.Policy"):
            attnzoo.replace_attention(nn.TransformerEncoderLayer(16, 2), "drop_all")
    finally:
        registry.unregister_attention("drop_all")


PUBLISHED = attnzoo.AttentionInfo("published", "mixer", Mean, summary="from another package")


def test_entry_points(monkeypatch):
    """A package's method is known by its name; one that cannot be read is warned about and harms no other."""
    points = [
        metadata.EntryPoint("published", "tests.test_registry:PUBLISHED", registry.ENTRY_POINTS),
        metadata.EntryPoint("broken", "tests.test_registry:NOWHERE", registry.ENTRY_POINTS),
        metadata.EntryPoint("wrong", "tests.test_registry:Mean", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(registry, "_entry_points_read", False)
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    with pytest.warns(UserWarning, match="left out the entry point"):
        assert attnzoo.describe("published").summary == "from another package"
    assert {"broken", "wrong"}.isdisjoint(attnzoo.list_attentions())


def test_import_is_light():
    """`import attnzoo` needs torch alone, and less than two seconds beyond torch's own import."""
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import attnzoo
took = time.perf_counter() - start
attnzoo.list_attentions()
heavy = {"timm", "transformers", "triton", "einops", "mmdet", "pydantic", "yaml", "rich"}
heavy -= {m.partition(".")[0] for m in before}
loaded = heavy & {m.partition(".")[0] for m in sys.modules}
assert not loaded, loaded
assert took < 2, took
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- classes that hand their options on, and arguments of other types


class Handed(Mean):
    """A mixer that says nothing of its options."""

    def __init__(self, dim, num_heads, *, offset: float = 0.0, **options):
        super().__init__(dim, num_heads, **options)
        self.offset = offset


class Anything(nn.Module):
    """A mixer that takes whatever it is given."""

    def __init__(self, dim, num_heads, **options):
        super().__init__()
        self.options = options

    def forward(self, x, grid=None, prefix=0, mask=None):
        return x


class HandedPolicy(Streaming):
    """A policy that says nothing of its options."""

    def __init__(self, **options):
        super().__init__(**options)


class HandedCore:
    """A core that takes whatever it is given."""

    def __init__(self, **options):
        self.options = options

    def __call__(self, q, k, v, **options):
        return q


@pytest.fixture
def handed():
    entries = {"handed": ("mixer", Handed), "anything": ("mixer", Anything)}
    entries |= {"handed_policy": ("eviction", HandedPolicy), "handed_core": ("core", HandedCore)}
    for name, (kind, cls) in entries.items():
        attnzoo.register_attention(name, kind, cls)
    yield
    for name in entries:
        registry.unregister_attention(name)


def test_options_that_a_class_hands_on_are_options(handed):
    assert attnzoo.describe("handed").options == {"offset": 0.0, "gain": 1.0}
    assert attnzoo.create_attention("handed", 8, 2, gain=2.0, offset=1.0).gain[0] == 2
    with pytest.raises(OptionError, match="'handed' has no option 'gian'; did you mean 'gain'"):
        attnzoo.create_attention("handed", 8, 2, gian=2.0)
    assert attnzoo.create_attention("anything", 8, 2, whatever=3).options == {"whatever": 3}
    policy = registry.build_policy(attnzoo.describe("handed_policy"), {"budget": 64})
    assert policy.budget == 64
    with pytest.raises(OptionError, match="'handed_policy' needs budget="):
        registry.build_policy(attnzoo.describe("handed_policy"), {})
    assert registry.build_core(attnzoo.describe("handed_core"), {"whatever": 3}).options == {"whatever": 3}


def test_a_policy_that_hands_its_options_on_bounds_a_cache(handed):
    from tests.eviction.models import cache_of, language_model, token_ids

    model = attnzoo.replace_attention(language_model(), "handed_policy", budget=16, block_size=8)
    with torch.no_grad():
        assert cache_of(model(token_ids(1, 40))).layers[0].keys.shape[2] == 16


LONG = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: attnzoo.replace_attention("padre", LONG),
            r"in the wrong order: it is replace_attention\(model, 'padre'\)",
        ),
        (lambda: attnzoo.replace_attention(LONG, LONG), "no attention a Sequential: a name is a string"),
        (lambda: attnzoo.replace_attention(LONG, None), "no attention None: a name is a string"),
        (lambda: attnzoo.replace_attention(3, "padre"), "expected a torch.nn.Module, got int"),
        (lambda: attnzoo.restore_attention("padre"), "expected a torch.nn.Module, got str"),
        (lambda: attnzoo.swap_report("padre"), "expected a torch.nn.Module, got str"),
        (lambda: attnzoo.describe(LONG), "no attention a Sequential"),
        (lambda: attnzoo.create_attention(16, 4, "padre"), "no attention 16: a name is a string"),
        (
            lambda: attnzoo.create_attention("padre", LONG, 4),
            "dim must be a whole number of at least 1, not a Sequential",
        ),
        (lambda: attnzoo.create_attention("padre", 16, 4, degree=torch.ones(9, 9)), "not a Tensor"),
        (lambda: attnzoo.register_attention(Mean, "mixer", "mean"), "a string with something in it, not "),
        (lambda: attnzoo.register_attention("mean", LONG, Mean), "there is no kind a Sequential"),
        (lambda: attnzoo.list_attentions(LONG), "there is no kind a Sequential"),
    ],
)
def test_arguments_of_another_type_are_named_and_not_printed(call, says):
    with pytest.raises(AttnZooError, match=says) as caught:
        call()
    assert len(str(caught.value)) < 200

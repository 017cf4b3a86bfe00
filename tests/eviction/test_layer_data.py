"""What a policy is told of the layer that it stands in: facts, the rotary embedding, the output projection."""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn

import attnzoo
from attnzoo.errors import OptionError, UnsupportedError
from attnzoo.eviction.policy import Policy
from attnzoo.hosts.layer_data import identity_of
from tests.eviction.models import CACHE, CONFIGS, TEXT, cache_of, language_model, token_ids

pytestmark = pytest.mark.compat


class Watching(Policy):
    """Keeps the last entries, and what it was told."""

    told: ClassVar[list] = []

    @property
    def uses_output_weight(self):
        return True

    @property
    def uses_rotary(self):
        return True

    def score(self, view):
        self.told.append((view.data, view.output_weight()))
        return view.positions


class Unrotated(Watching):
    @property
    def uses_rotary(self):
        return False


@contextmanager
def registered(cls=Watching):
    cls.told.clear()
    attnzoo.register_attention("watching", "eviction", cls)
    try:
        yield cls.told
    finally:
        attnzoo.unregister_attention("watching")
        cls.told.clear()


def told_by(model, told, tokens=8):
    """What the policies in both layers of `model` are told in one call."""
    told.clear()
    with torch.no_grad():
        model(token_ids(1, tokens))
    return list(told)


def watched(model):
    return attnzoo.replace_attention(model, "watching", budget=4, block_size=8)


def test_facts_and_weights():
    with registered() as told:
        model = language_model("qwen3")
        layers = [layer.self_attn for layer in model.model.layers]
        for index, (data, weight) in enumerate(told_by(watched(model), told)):
            assert (data.index, data.query_heads, data.kv_heads, data.head_width) == (index, 4, 2, 12)
            assert data.model == identity_of(model.config)
            assert data.output == "o_proj"
            x = torch.randn(3, 4 * 12, dtype=torch.float64)
            expected = layers[index].o_proj(x)
            torch.testing.assert_close(torch.einsum("nhd,hdc->nc", x.unflatten(1, (4, 12)), weight), expected)


@pytest.mark.parametrize("host", ["gpt-neox", "gpt2", "opt"])
def test_weights_of_layers_that_are_called_otherwise(host):
    """GPT-2's projection is no linear layer of torch's, and all three have a bias."""
    others = {"gpt2": (transformers.GPT2Config, {}), "opt": (transformers.OPTConfig, {"ffn_dim": 48})}
    with registered(Unrotated) as told:
        model = (
            language_model(host)
            if host in CONFIGS
            else transformers.AutoModelForCausalLM.from_config(others[host][0](**{**TEXT, **others[host][1]})).double()
        )
        name = {"gpt-neox": "dense", "gpt2": "c_proj", "opt": "out_proj"}[host]
        own = [
            getattr(module, name) for module in model.modules() if hasattr(module, name) and hasattr(module, "scaling")
        ]
        for (data, weight), module in zip(told_by(watched(model.eval()), told), own, strict=True):
            assert data.output == name
            x = torch.randn(3, 32, dtype=torch.float64)
            torch.testing.assert_close(x @ weight.flatten(0, 1), module(x) - module(torch.zeros_like(x)))


class Adapted(nn.Module):
    """A linear layer with an adapter of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False))
        self.to(base.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_weights_follow_the_model():
    with registered() as told:
        model = watched(language_model())
        first = model.model.layers[0].self_attn

        twin = copy.deepcopy(model)
        revived = pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            first.o_proj.weight.mul_(2)
        weight = told_by(model, told)[0][1]
        for other in (twin, revived):
            torch.testing.assert_close(2 * told_by(other, told)[0][1], weight)
        model.float()
        assert told_by(model, told)[0][1].dtype == torch.float32
        first.o_proj = Adapted(first.o_proj)
        whole = first.o_proj.base.weight + first.o_proj.up.weight @ first.o_proj.down.weight
        torch.testing.assert_close(told_by(model, told)[0][1].flatten(0, 1).T, whole.detach())


def test_a_cache_tells_of_the_model_that_was_called_last(tmp_path):
    """Copies go on with the model; a cache from a file has none until the first call with it."""
    with registered() as told:
        model = watched(language_model())
        with torch.no_grad():
            cache = cache_of(model(token_ids(1, 6)))
        cache.save(tmp_path / "cache.pt")
        weight = model.model.layers[0].self_attn.o_proj.weight
        for other in (cache.copy(), copy.deepcopy(cache)):
            told.clear()
            other.flush()
            assert torch.equal(told[0][1].flatten(0, 1).T, weight)
            assert told[0][1].data_ptr() == weight.data_ptr()  # the model's own, not a copy
        for other in (attnzoo.load_cache(tmp_path / "cache.pt"), pickle.loads(pickle.dumps(cache))):
            with pytest.raises(UnsupportedError, match="call the model with the cache first"):
                copy.deepcopy(other).flush()
            with torch.no_grad():
                model(token_ids(1, 1), **{CACHE: other})
            told.clear()
            other.flush()
            assert torch.equal(told[0][1].flatten(0, 1).T, weight)


def test_a_cache_does_not_keep_its_model_alive():
    with registered():
        model = watched(language_model())
        with torch.no_grad():
            cache = cache_of(model(token_ids(1, 6)))
        gone = weakref.ref(model.model.layers[0].self_attn)
        del model
        gc.collect()
        assert gone() is None
        with pytest.raises(UnsupportedError, match="call the model with the cache first"):
            cache.flush()


def test_saved_and_loaded_models_tell_the_same(tmp_path):
    with registered() as told:
        model = watched(language_model())
        attnzoo.save(model, tmp_path / "model")
        loaded = attnzoo.load(tmp_path / "model")
        for (data, weight), (other, again) in zip(told_by(model, told), told_by(loaded, told), strict=True):
            assert data == other
            assert torch.equal(weight, again)


SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 2.0},
}
ROTARY = [
    *((name, {}) for name in ("llama", "qwen3", "phi3", "gpt-neox")),
    *(
        ("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **how}})
        for kind, how in SCALED.items()
    ),
    ("cohere", {}),
    ("gemma3", {}),
    ("smollm3", {}),
]


@pytest.mark.parametrize(("host", "options"), ROTARY, ids=str)
def test_rotary_embeddings(monkeypatch, host, options):
    """One token at many positions: keys of the first layer are those at position 0, rotated."""
    for name, config, own in (
        ("cohere", transformers.CohereConfig, {"num_key_value_heads": 2}),
        ("gemma3", transformers.Gemma3TextConfig, {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4096}),
        ("smollm3", transformers.SmolLM3Config, {"num_key_value_heads": 2, "no_rope_layers": [0, 1]}),
    ):
        monkeypatch.setitem(CONFIGS, name, (config, own))
    if host == "gemma3":
        options = {"layer_types": ["full_attention", "full_attention"]}
    model = language_model(host, **options)
    positions = torch.tensor([[0, 1, 2, 50, 333, 1000]])
    with torch.no_grad():
        layer = cache_of(model(torch.full((1, 6), 7), position_ids=positions)).layers[0]
    keys = layer.keys
    with registered() as told:
        rotary = told_by(watched(model), told)[0][0].rotary
    plain = rotary.undo(keys[:, :, :1], torch.zeros(1))
    torch.testing.assert_close(rotary.rotate(plain, positions[:, None]), keys, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotary.undo(keys, positions[:, None]), plain.expand_as(keys), rtol=1e-6, atol=1e-6)
    assert (rotary.frequencies == ()) == (host == "smollm3")  # whose first layer has none


def test_what_a_host_cannot_tell_is_refused_before_the_swap():
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    with registered():
        model = language_model(**dynamic)
        with pytest.raises(UnsupportedError, match="a rotary embedding that depends on nothing but the position"):
            watched(model)
        assert not attnzoo.swap_report(model).swapped
        model = language_model()
        for layer in model.model.layers:
            layer.self_attn.__class__ = type("Gated", (type(layer.self_attn),), {"forward": gated})
        with pytest.raises(UnsupportedError, match="no child takes the attention's output as it is"):
            watched(model)
        assert not attnzoo.swap_report(model).swapped


def gated(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
    from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, apply_rotary_pos_emb

    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (
        project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
    out = out.reshape(*hidden_states.shape[:-1], -1)
    return self.o_proj(out * 0.5), weights


@pytest.mark.parametrize("error", [OptionError, UnsupportedError])
def test_a_policy_may_refuse_a_layer(error):
    class Picky(Policy):
        def check_layer(self, data):
            if data.index == 1:
                raise error(f"not {data.kv_heads} heads")

        def score(self, view):
            return view.positions

    with registered(Watching):
        attnzoo.register_attention("picky", "eviction", Picky)
        try:
            model = language_model()
            with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn: LlamaAttention: not 2 heads"):
                attnzoo.replace_attention(model, "picky", budget=4)
            assert not attnzoo.swap_report(model).swapped
            attnzoo.replace_attention(model, "picky", budget=4, where="*.0.self_attn")
        finally:
            attnzoo.unregister_attention("picky")


def test_identity_is_of_the_shape_alone():
    config = language_model().config
    same, other = copy.deepcopy(config), copy.deepcopy(config)
    same._name_or_path, same.use_cache = "elsewhere/model", False
    other.num_key_value_heads = 4
    assert identity_of(config).digest == identity_of(same).digest != identity_of(other).digest
    assert identity_of(same).name == "elsewhere/model"

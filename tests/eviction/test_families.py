"""Families of models whose caches differ: what is refused is refused at the swap, and what is offered works."""

import functools
import re
from typing import Any

import pytest
import torch
import transformers

import attnzoo
from attnzoo.errors import UnsupportedError
from attnzoo.hosts import trial, versions
from tests.eviction.models import TEXT, token_ids
from tests.zoo import fingerprint

DENSE = {"budget": 64, "block_size": 4}  # more than the tokens here: the dense model's outputs
CAUSAL = {"degree": 2, "kernel_size": 3, "token_mixing": "causal_conv1d"}
HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
SHARED = {
    "num_hidden_layers": 6,
    "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full", "sliding", "sliding", "full")],
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "vocab_size_per_layer_input": TEXT["vocab_size"],
    "hidden_size_per_layer_input": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "NemotronH": {
        **HEADS,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mlp", "attention"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
    },
    "Gemma3nText": {**HEADS, **SHARED, "activation_sparsity_pattern": [0.0] * 6, "altup_num_inputs": 2},
    "Gemma4Text": {**HEADS, **SHARED, "global_head_dim": 8},
    "MiniMax": {
        **HEADS,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 8,
    },
    "DeepseekV2": {**LATENT, **EXPERTS, "v_head_dim": 8, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "DeepseekV3": {**LATENT, **EXPERTS, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "MiniCPM3": {**LATENT, "v_head_dim": 16},
    "JetMoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DiffLlama": {"num_key_value_heads": 2},
    "FalconH1": {
        **HEADS,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
    "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama": {"num_key_value_heads": 2},
}


def family(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**TEXT, **FAMILIES[name]})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def vision_language(name: str) -> Any:
    sizes = {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    text = {**TEXT, **HEADS}
    if name == "Llava":
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
            )
        ).eval()
    text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    more: dict[str, Any] = {"mm_tokens_per_image": 4}
    if name == "Gemma4":
        text |= {"global_head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8}
        text |= {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        text |= {"vocab_size_per_layer_input": TEXT["vocab_size"]}
        vision |= {"head_dim": 8, "num_key_value_heads": 4}
        more = {"audio_config": None}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **more)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@torch.no_grad()
def answers(model: Any) -> torch.Tensor:
    """Logits of a prompt of 5 and of two tokens more, with the cache."""
    ids = token_ids(1, 7)
    first = model(input_ids=ids[:, :5], use_cache=True)
    more = model(input_ids=ids[:, 5:], **versions.cache_arguments(model, versions.output_cache(first)))
    return torch.cat([first.logits, more.logits], 1)


def offered(error: pytest.ExceptionInfo[UnsupportedError]) -> str | None:
    found = re.search(r"for example where='([^']*)'\.$", str(error.value))
    return found and found.group(1)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "where"), [("NemotronH", None), ("Gemma3nText", "*.layers.0"), ("Gemma4Text", "*.layers.0")]
)
def test_layers_of_no_cache_stand_beside_bounded_ones(name, where):
    model = family(name)
    expected = answers(model)
    attnzoo.replace_attention(model, "keydiff", where=where, **DENSE)
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.compat
@pytest.mark.parametrize("name", ["Gemma3nText", "Gemma4Text"])
def test_the_layers_that_a_refusal_offers_can_be_swapped(name):
    model = family(name)
    expected = answers(model)
    with pytest.raises(UnsupportedError, match="shared between layers") as refused:
        attnzoo.replace_attention(model, "streaming", **DENSE)
    where = offered(refused)
    assert where is not None
    attnzoo.replace_attention(model, "streaming", where=where, **DENSE)
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["keydiff", "h2o"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MiniMax", "MiniMax uses cache of its own"),
        ("DeepseekV2", "other keys and values"),
        ("DeepseekV3", "other keys and values"),
        ("MiniCPM3", "other keys and values"),
        ("JetMoe", "other keys and values"),
        ("DiffLlama", "other keys and values"),
    ],
)
def test_what_a_call_would_refuse_is_refused_at_the_swap(name, reason, policy):
    model = family(name)
    before, random = fingerprint(model), torch.get_rng_state()
    with pytest.raises(UnsupportedError, match=reason) as refused:
        attnzoo.replace_attention(model, policy, **DENSE)
    assert offered(refused) is None
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["MiniMax", "FalconH1"])
def test_causal_mixers_are_tried_too(name):
    with pytest.raises(UnsupportedError, match=r"a cached call fails|it does not go through"):
        attnzoo.replace_attention(family(name), "padre", where="*.self_attn", **CAUSAL)


@pytest.mark.parametrize("name", ["DeepseekV3", "DiffLlama"])
def test_a_causal_mixer_stands_where_no_policy_can(name):
    model = attnzoo.replace_attention(family(name), "padre", **CAUSAL)
    with torch.no_grad():
        whole = model(token_ids(1, 7)).logits
    torch.testing.assert_close(answers(model), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "where"), [("Gemma3", "model.language_model"), ("Gemma4", "model.language_model.layers.0")]
)
@pytest.mark.parametrize(("method", "options"), [("keydiff", DENSE), ("padre", CAUSAL)])
def test_vision_language_models_that_make_masks_themselves_are_refused_at_the_swap(name, where, method, options):
    model = vision_language(name)
    with pytest.raises(UnsupportedError, match=r"masks that were made outside of the language model.*ForCausalLM"):
        attnzoo.replace_attention(model, method, where=where, **options)


@pytest.mark.compat
def test_other_vision_language_models_are_not():
    model = vision_language("Llava")
    expected = answers(model)
    attnzoo.replace_attention(model, "keydiff", where="model.language_model", **DENSE)
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_trial_neither_calls_the_model_nor_draws_random_numbers(dtype):
    model = family("Mixtral").to(dtype).train()
    calls: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    random = torch.get_rng_state()
    attnzoo.replace_attention(model, "keydiff", **DENSE)
    assert not calls
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())


def test_a_model_without_memory_can_be_swapped():
    config = transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=2, num_attention_heads=32)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    attnzoo.replace_attention(model, "keydiff", **DENSE)
    assert len(attnzoo.swap_report(model).swapped) == 2


def test_a_class_that_takes_more_than_a_config_is_not_tried():
    class Own(transformers.LlamaForCausalLM):
        def __init__(self, config, more):
            super().__init__(config)
            self.more = more

    model = Own(transformers.LlamaConfig(**{**TEXT, **FAMILIES["Llama"]}), 1).eval()
    with pytest.raises(trial.UntriedError):
        trial.Twin.of(model)
    expected = answers(model)
    attnzoo.replace_attention(model, "keydiff", **DENSE)  # the model inside it was tried
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("keydiff", DENSE), ("padre", CAUSAL)])
def test_a_swap_that_cannot_be_tried_says_so_once(name, options):
    class Own(transformers.LlamaModel):
        def __init__(self, config, more):
            super().__init__(config)

    model = Own(transformers.LlamaConfig(**{**TEXT, **FAMILIES["Llama"]}), 1).eval()
    with pytest.warns(UserWarning, match=f"'{name}' was not tried in Own before the swap") as caught:
        attnzoo.replace_attention(model, name, **options)
    assert [warning.filename for warning in caught] == [__file__]


LLAMA = transformers.LlamaForCausalLM.forward


class Fused(transformers.LlamaForCausalLM):
    """A model of an operator that meta has not, and whose error does not say so."""

    @functools.wraps(LLAMA)
    def forward(self, *args, **kwargs):
        if self.lm_head.weight.is_meta:
            raise NotImplementedError("no kernel for this device")
        return super().forward(*args, **kwargs)


class Looks(transformers.LlamaForCausalLM):
    """A model that looks at a number of what its layers gave, and only with attnzoo's cache in them fails on meta."""

    @functools.wraps(LLAMA)
    def forward(self, *args, **kwargs):
        bounded = any("attnzoo_cache" in vars(module) for module in self.modules())
        if bounded and self.lm_head.weight.is_meta:
            raise RuntimeError("expected a number")
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Fused, Looks])
def test_what_fails_on_meta_alone_is_tried_on_the_cpu(kind):
    model = kind(transformers.LlamaConfig(**{**TEXT, **FAMILIES["Llama"]})).eval()
    expected = answers(model)
    attnzoo.replace_attention(model, "keydiff", **DENSE)
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=1e-4)


def test_what_fails_on_the_cpu_too_is_refused():
    class Broken(Looks):
        @functools.wraps(LLAMA)
        def forward(self, *args, **kwargs):
            if any("attnzoo_cache" in vars(module) for module in self.modules()):
                raise RuntimeError("this cache has no meta data")
            return super().forward(*args, **kwargs)

    model = Broken(transformers.LlamaConfig(**{**TEXT, **FAMILIES["Llama"]})).eval()
    with pytest.raises(UnsupportedError, match="this cache has no meta data"):
        attnzoo.replace_attention(model, "keydiff", **DENSE)


def test_a_forward_hands_a_cache_on_under_whichever_name_it_takes_the_rest():
    class Wrapper(torch.nn.Module):
        def forward(self, input_ids=None, **more): ...

    class Positional(torch.nn.Module):
        def forward(self, kwargs=None, *rest): ...

    assert versions.cache_arguments(Wrapper(), 1) == {versions.facts().cache_argument: 1}
    with pytest.raises(UnsupportedError, match="Positional takes no key/value cache"):
        versions.cache_arguments(Positional(), 1)

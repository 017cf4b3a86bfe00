"""Expected attention under rotary embeddings of all kinds, and where there is none to be had."""

import pytest
import torch
import transformers

import attnzoo
from attnzoo.errors import UnsupportedError
from attnzoo.eviction.expected_attention import ExpectedAttention
from attnzoo.eviction.layer_data import LayerData, ModelIdentity, Rotary
from attnzoo.eviction.policy import CacheView
from tests.eviction.models import TEXT, bounded, cache_of, token_ids

FREQUENCIES = (1.0, 0.3, 0.02, 0.001)
ROTARIES = {
    "plain": Rotary(FREQUENCIES),
    "scaled": Rotary(FREQUENCIES, scaling=1.3),
    "interleaved": Rotary(FREQUENCIES, interleaved=True),
    "partial": Rotary(FREQUENCIES[:2], scaling=0.8),
    "none": Rotary(()),
}


@pytest.mark.parametrize("kind", ROTARIES)
def test_the_statistics_are_those_before_rotary_embedding(kind):
    """Rows that have seen 30 and 4 tokens: the window of the second is not full."""
    rotary, window, future = ROTARIES[kind], 6, 5
    generator = torch.Generator().manual_seed(1)
    plain, keys, values = (
        torch.randn(2, heads, count, 8, generator=generator, dtype=torch.float64)
        for heads, count in ((4, window), (2, 10), (2, 10))
    )
    counts = torch.tensor([30, 4])
    asked = counts[:, None] - window + torch.arange(window)  # (B, w)
    view = CacheView(
        keys=keys,
        values=values,
        positions=torch.arange(10).expand(2, 2, 10),
        counts=counts,
        queries=rotary.rotate(plain, asked[:, None]),
        query_positions=asked.clamp(min=-1),
        data=LayerData(0, 4, 2, 8, ModelIdentity("", ""), rotary=rotary),
    )
    found = ExpectedAttention(budget=5, window=window, future=future).score(view)
    for row in range(2):
        queries = plain[row, :, asked[row] >= 0]  # (H, w, D)
        positions = counts[row] + torch.arange(future)
        turned = rotary.rotate(queries[:, :, None], positions).mean(2)  # the mean over positions to come
        logits = turned @ keys[row].repeat_interleave(2, 0).mT * 8**-0.5  # (H, w, S)
        expected = (logits.mean(1) + logits.var(1, correction=0) / 2).softmax(-1).unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(found[row], expected * values[row].norm(dim=-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["expected_attention", "vatp"])
def test_a_model_without_rotary_embedding_is_refused_before_the_swap(name):
    config = transformers.OPTConfig(**TEXT, ffn_dim=48)
    model = transformers.AutoModelForCausalLM.from_config(config)
    options = {"base": "expected_attention"} if name == "vatp" else {}
    with pytest.raises(UnsupportedError, match="needs a rotary embedding"):
        attnzoo.replace_attention(model, name, budget=8, **options)
    assert not attnzoo.swap_report(model).swapped


def test_a_cache_from_a_file_must_meet_its_model_first(tmp_path):
    with torch.no_grad():
        cache = cache_of(bounded("expected_attention", budget=8, block_size=16)(token_ids(1, 14)))
    cache.save(tmp_path / "cache.pt")
    with pytest.raises(UnsupportedError, match="call the model with the cache first"):
        attnzoo.load_cache(tmp_path / "cache.pt").flush()
    cache.copy().flush()

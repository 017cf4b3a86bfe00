"""Copies of a bounded cache, files of it, and its bytes."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import attnzoo
from attnzoo.errors import AssetError, OptionError
from tests.eviction.models import (
    CACHE,
    POLICIES,
    bounded,
    cache_of,
    language_model,
    token_ids,
)

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("name", POLICIES)
def test_copy_save_and_load(name, tmp_path):
    """A prompt's cache can be used again, from memory and from a file, and deep copies are whole."""
    model = bounded(name, budget=16, block_size=8)
    ids = token_ids(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        prompt = cache_of(model(ids[:, :37], attention_mask=mask[:, :37]))
        prompt.save(tmp_path / "prompt.pt")
        others = [prompt.copy(), copy.deepcopy(prompt), attnzoo.load_cache(tmp_path / "prompt.pt")]
        before = prompt.layers[0].keys.clone()
        expected = model(ids[:, 37:], attention_mask=mask, **{CACHE: prompt}).logits
        assert not torch.equal(before, prompt.layers[0].keys)
        for other in others:
            assert torch.equal(other.layers[0].keys, before)
            assert torch.equal(model(ids[:, 37:], attention_mask=mask, **{CACHE: other}).logits, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.pt"]


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with torch.no_grad():
        cache = cache_of(bounded("keydiff", budget=8)(token_ids(1, 9)))
    (tmp_path / "file").write_text("text")
    for path, says in ((tmp_path, "a folder: name a file in it"), (tmp_path / "file" / "cache.pt", "exists|directory")):
        with pytest.raises(AssetError, match=f"cannot be written to '.*{says}") as caught:
            cache.save(path)
        assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_bad_file_is_refused(tmp_path):
    (tmp_path / "bad").write_bytes(b"no cache")
    with pytest.raises(AssetError, match="not a cache saved by attnzoo, or is damaged"):
        attnzoo.load_cache(tmp_path / "bad")
    with pytest.raises(AssetError, match="cannot be read"):
        attnzoo.load_cache(tmp_path / "none")
    with torch.no_grad():
        cache = cache_of(bounded("keydiff", budget=8)(token_ids(1, 20)))
    cache.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-900])
    with pytest.raises(AssetError, match="damaged"):
        attnzoo.load_cache(tmp_path / "cut")


ENCODER_DECODERS = {
    "T5": {"num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
    "Bart": {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    },
}


def test_bytes():
    """Keys and values, then positions and what policies keep; dense caches are counted as well."""
    ids = token_ids(2, 100)
    width = 2 * 2 * 8 * 8  # heads x keys and values x width x bytes of float64
    with torch.no_grad():
        dense = attnzoo.kv_bytes(cache_of(language_model()(ids)))
        assert dense == attnzoo.CacheBytes(2 * 2 * 100 * width, 2 * 2 * 100 * width, 2 * 2 * 100 * width)
        for name, extra, fixed in (
            ("keydiff", 2 * 4, 0),
            ("h2o", 2 * 4 + 4 * 8, 0),
            ("tova", 2 * 4, 4 * 8 * 8 + 4),
            ("snapkv", 2 * 4, 32 * (4 * 8 * 8 + 4)),
        ):
            cache = cache_of(bounded(name, budget=16, block_size=8)(ids))
            size = attnzoo.kv_bytes(cache)
            assert size.entries == 2 * 2 * 20 * width
            assert size.held == 2 * 2 * (20 * (width + extra) + fixed)
            assert size.allocated == 2 * 2 * (24 * (width + extra) + fixed)
    assert attnzoo.kv_bytes(DynamicCache()) == attnzoo.kv_bytes(None) == attnzoo.CacheBytes(0, 0, 0)
    with torch.no_grad(), pytest.raises(OptionError, match=f"give it the output's {CACHE}"):
        attnzoo.kv_bytes(language_model()(ids))
    with pytest.raises(OptionError, match="not str"):
        attnzoo.kv_bytes("cache")


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_bytes_of_an_encoder_decoder(kind):
    config = getattr(transformers, f"{kind}Config")(d_model=16, vocab_size=20, **ENCODER_DECODERS[kind])
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        cache = cache_of(model.eval()(input_ids=token_ids(1, 7) % 20, decoder_input_ids=token_ids(1, 3) % 20))
    entry = 2 * 16 * 4  # keys and values x width x bytes of float32
    assert attnzoo.kv_bytes(cache) == attnzoo.CacheBytes(10 * entry, 10 * entry, 10 * entry)


@pytest.mark.parametrize("build", [language_model, lambda: language_model().model, lambda: nn.ModuleList([])])
def test_bytes_of_what_is_no_cache(build):
    with pytest.raises(OptionError, match="takes a cache of transformers, not"):
        attnzoo.kv_bytes(build())

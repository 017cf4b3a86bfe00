"""Q-Filters: their directions, the file of these, and what is refused."""

import copy
import hashlib
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import attnzoo
from attnzoo.errors import AssetError, OptionError, UnsupportedError
from attnzoo.eviction.calibrate import calibrate, main
from attnzoo.eviction.directions import Directions
from attnzoo.eviction.qfilters import QFilters
from attnzoo.hosts.layer_data import identity_of
from attnzoo.registry import build_policy, describe
from tests.eviction.models import CACHE, VOCABULARY, cache_of, directions_of, language_model, token_ids
from tests.zoo import fingerprint


def queries_of(model, ids):
    """Queries after rotary embedding of every Llama layer of a dense model, ``(H, N, D)`` each."""
    seen = []

    def note(module, args, kwargs):
        hidden = kwargs["hidden_states"]
        queries = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        seen.append(apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])[0][0])

    hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("window", [40, 16, 1000])
def test_directions_are_top_singular_vectors(window):
    model, ids = language_model(), token_ids(1, 70)[0]
    parts = [queries_of(model, part) for part in ids.split(window)]
    before = fingerprint(model)
    found = calibrate(model, ids, window=window)
    assert fingerprint(model) == before
    assert not attnzoo.swap_report(model).swapped
    assert (found.tokens, found.model) == (70, identity_of(model.config))
    assert found.text == hashlib.sha256(" ".join(map(str, ids.tolist())).encode()).hexdigest()
    assert sorted(found.layers) == [0, 1]
    for index, directions in found.layers.items():
        queries = torch.cat([part[index] for part in parts], 1)  # (4, 70, 8)
        for kv_head in range(2):
            expected = torch.zeros(8, dtype=torch.float64)
            for head in (2 * kv_head, 2 * kv_head + 1):
                top = torch.linalg.svd(queries[head]).Vh[0]
                expected += top * (queries[head] @ top).mean().sign() / 2
            torch.testing.assert_close(directions[kv_head].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_model_in_training_stays_as_it_was():
    model = language_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    first = calibrate(model, token_ids(1, 20)[0])
    assert [module.training for module in model.modules()] == modes
    assert calibrate(model.eval(), token_ids(1, 20)[0]) == first


@pytest.mark.parametrize("host", ["gpt-neox", "gemma", "qwen3"])
def test_other_hosts_have_directions(host, tmp_path):
    model, ids = language_model(host), token_ids(2, 40)
    directions = calibrate(model, ids[0])
    directions.save(tmp_path / "filters")
    attnzoo.replace_attention(model, "qfilters", budget=8, block_size=8, filters=tmp_path / "filters")
    with torch.no_grad():
        assert all(layer.keys.shape[2] == 8 for layer in cache_of(model(ids)).layers)


def test_a_file_holds_all_of_it(tmp_path):
    directions = calibrate(language_model(), token_ids(1, 30)[0])
    directions.save(tmp_path / "filters.safetensors")
    again = Directions.load(tmp_path / "filters.safetensors")
    assert again == directions
    assert hash(again) == hash(directions)
    assert again.model == directions.model
    other = copy.deepcopy(directions)
    other.layers[1][0, 0] += 1e-3
    assert other != directions
    assert os.listdir(tmp_path) == ["filters.safetensors"]
    with pytest.raises(AssetError, match="a folder"):
        directions.save(tmp_path)
    with pytest.raises(AssetError, match="cannot be written"):
        directions.save(tmp_path / "filters.safetensors" / "inside")


def refused(model, message, **options):
    with pytest.raises((OptionError, AssetError, UnsupportedError), match=message):
        attnzoo.replace_attention(model, "qfilters", budget=8, **options)
    assert not attnzoo.swap_report(model).swapped


def test_what_is_refused_before_the_swap(tmp_path):
    model = language_model()
    refused(model, "needs filters=")
    refused(model, "filters must be a file or Directions, not 3; make them", filters=3)
    refused(model, "cannot be read: No such file.*calibrate", filters=str(tmp_path / "none"))
    refused(model, "cannot be read: Is a directory", filters=tmp_path)
    (tmp_path / "bad").write_bytes(b"no tensors")
    refused(model, "holds no directions, or is damaged", filters=tmp_path / "bad")
    model.save_pretrained(tmp_path / "model")
    refused(model, "format pt, expected attnzoo directions", filters=tmp_path / "model/model.safetensors")
    good = calibrate(model, token_ids(1, 30)[0])
    broken = Directions({0: torch.full((2, 8), torch.nan)}, good.model, 1, "")
    broken.save(tmp_path / "nan")
    refused(model, "not a list of finite numbers", filters=tmp_path / "nan")
    refused(model, r"layers\.1\..*none for layer 1", filters=Directions({0: good.layers[0]}, good.model, 1, ""))
    wide = Directions({0: good.layers[0], 1: torch.ones(2, 9)}, good.model, 1, "")
    refused(model, r"layer 1 are \(2, 9\), and its key/value heads and their width \(2, 8\)", filters=wide)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 64}, {"num_key_value_heads": 4}])
def test_directions_of_another_model_are_refused(change):
    filters = calibrate(language_model(), token_ids(1, 30)[0])
    refused(
        language_model(**change),
        "the directions are of another model, llama .*make them for this model",
        filters=filters,
    )
    refused(language_model("qwen2"), "and this is qwen2", filters=filters)


@pytest.mark.parametrize("budget", [16, 0.4])
def test_saved_models_and_caches_find_the_file(tmp_path, monkeypatch, budget):
    """By the path that was given, also after the working directory changed; without it they say what is missing."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model, ids = language_model(), token_ids(2, 40)
    calibrate(model, ids[0]).save("filters")
    attnzoo.replace_attention(model, "qfilters", budget=budget, block_size=8, filters="filters")
    attnzoo.save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with torch.no_grad():
        out = model(ids)
        expected = model(ids[:, :1], **{CACHE: cache_of(out).copy()}).logits
    cache_of(out).save(tmp_path / "cache")
    with torch.no_grad():
        assert torch.equal(model(ids[:, :1], **{CACHE: attnzoo.load_cache(tmp_path / "cache")}).logits, expected)
    monkeypatch.chdir(tmp_path)
    loaded = attnzoo.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, out.logits)
    os.remove(tmp_path / "filters")
    with pytest.raises(AssetError, match=r"the cache .* cannot be used here: the directions .* cannot be read"):
        attnzoo.load_cache(tmp_path / "cache")
    with pytest.raises(AssetError, match=r"the directions .* cannot be read"):
        attnzoo.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, out.logits)  # what was swapped goes on


def test_a_cache_of_directions_without_a_file_is_not_saved(tmp_path):
    model, ids = language_model(), token_ids(1, 20)
    attnzoo.replace_attention(model, "qfilters", budget=8, filters=calibrate(model, ids[0]))
    with torch.no_grad():
        cache = cache_of(model(ids))
    with pytest.raises(
        UnsupportedError, match=r"'qfilters' with filters=.* cannot be saved: swap with the path of a file"
    ):
        cache.save(tmp_path / "cache")
    assert not os.listdir(tmp_path)


def test_policies_are_equal_by_their_file(tmp_path):
    path = directions_of("llama")
    one, two = (build_policy(describe("qfilters"), {"budget": 8, "filters": path}) for _ in range(2))
    assert one == two
    assert one.at(100) is one
    share = QFilters(budget=0.5, filters=path)
    assert share.at(100).budget == 50
    assert share.at(100).directions is share.directions


def test_what_calibration_refuses():
    model = language_model()
    with pytest.raises(OptionError, match="two tokens"):
        calibrate(model, [1])
    with pytest.raises(OptionError, match="window"):
        calibrate(model, [1, 2, 3], window=1)
    with pytest.raises(UnsupportedError, match="restore_attention"):
        calibrate(attnzoo.replace_attention(model, "softmax"), [1, 2, 3])
    with pytest.raises(UnsupportedError):
        calibrate(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=24)), [1, 2, 3])
    with pytest.raises(attnzoo.AttnZooError):
        calibrate(nn.Linear(2, 2), [1, 2, 3])


def test_the_command(tmp_path, capsys):
    model = language_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    ids = token_ids(1, 60)[0]
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in ids.tolist()), encoding="utf-8")
    arguments = [str(tmp_path / "model"), str(tmp_path / "text"), "--out", str(tmp_path / "filters")]
    assert main([*arguments, "--tokens", "50", "--window", "20"]) == 0
    assert "2 layers of" in capsys.readouterr().out
    found, expected = Directions.load(tmp_path / "filters"), calibrate(model, ids[:50], window=20)
    assert (found.tokens, found.text, found.model.digest) == (50, expected.text, expected.model.digest)
    assert found.model.name == str(tmp_path / "model")
    for index in (0, 1):
        torch.testing.assert_close(found.layers[index], expected.layers[index])
    (tmp_path / "empty").write_text("", encoding="utf-8")
    (tmp_path / "bare").mkdir()
    model.config.save_pretrained(tmp_path / "bare")  # without weights: random ones would have no directions
    for wrong, message in (
        ([str(tmp_path / "none"), *arguments[1:]], "cannot load"),
        ([str(tmp_path / "bare"), *arguments[1:]], "cannot load"),
        ([arguments[0], str(tmp_path / "missing"), *arguments[2:]], "no text and no file .*missing"),
        ([arguments[0], str(tmp_path / "empty"), *arguments[2:]], "two tokens of text at least, not 0"),
        ([*arguments, "--tokens", "1"], "tokens must be"),
        ([*arguments[:3], str(tmp_path)], "a folder"),
    ):
        assert main(wrong) == 2, wrong
        said = capsys.readouterr().err
        assert re.search(message, said), said
        assert "Traceback" not in said


def test_the_committed_file_is_of_smollm2():
    """Of each layer and head, unit vectors averaged over 3 query heads, made without a path of the machine in it."""
    directions = Directions.load(
        Path(__file__).parents[2] / "configs/decode/directions/smollm2_135m_instruct.safetensors"
    )
    assert directions.model.name == "smollm2_135m_instruct"
    assert sorted(directions.layers) == list(range(30))
    for found in directions.layers.values():
        assert found.shape == (3, 64)
        assert (found.norm(dim=-1) <= 1 + 1e-6).all()
    assert directions.tokens == 16_384

"""The language model's rows, on a random Llama of one layer with words for tokens."""

import random

import pytest
import torch
import yaml

from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.page import page_of
from attnzoo.bench.readme import markdown_table
from attnzoo.bench.record import Gate
from attnzoo.bench.run import run
from attnzoo.errors import AssetError, ConfigError
from attnzoo.registry import register_attention, unregister_attention
from attnzoo.tasks.classify.quality import Accuracy
from attnzoo.tasks.decode import cells as language
from attnzoo.tasks.decode import cost as llm
from attnzoo.tasks.decode import lm
from attnzoo.tasks.decode.cells import prepare
from attnzoo.tasks.decode.quality import Perplexity
from attnzoo.tasks.suite import TASK, decoding, plan, validate_config
from tests.bench.data import quality, record_data

WORDS = 60
HOST = {"patch_size": 4, "options": {"depth": 1, "embed_dim": 16, "num_heads": 2}}
KEYDIFF = {"name": "keydiff", "options": {"budget": 24, "block_size": 8}, "label": "keydiff"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, and a text, as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    words = [f"w{index}" for index in range(WORDS)]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*words, "?"])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    draw = random.Random(0)
    (path / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(600)), encoding="utf-8")
    return path


def tiny(folder, **changes):
    language = {
        "model": str(folder),
        "text": str(folder / "text.txt"),
        "attentions": ["sdpa", KEYDIFF],
        "cost": {"prompt_tokens": 64, "new_tokens": 8},
        "nll": {"windows": 5, "tokens": 64},
        "canary": {"worse_by": -10.0},
        **changes,
    }
    vision = {"model": HOST, "attentions": ["sdpa"], "cost": {"tokens": [16], "repeats": 3, "min_seconds": 0}}
    return {"name": "tiny", "threads": 1, **vision, "language": language}


def cost_of(folder, attention, **changes):
    config = decoding(validate_config(tiny(folder, **changes)))
    prompts = prepare(config, language.plan(config))["prompts"]["64"]
    return llm.measure_cost(config, config.attentions[attention], prompts, 1, lambda stage: None)


def problems_of(data):
    with pytest.raises(ConfigError) as caught:
        validate_config(data)
    return str(caught.value)


def test_a_whole_run_puts_both_parts_into_one_record_one_table_and_one_page(folder, tmp_path):
    config = validate_config({**tiny(folder), "output": str(tmp_path)})
    records = run(TASK, config, "python eval/bench.py tiny.yaml")
    assert {(r.label, r.status, r.message) for r in records} == {
        (label, "ok", "") for label in ("dense", "sdpa", "dense LLM", "keydiff")
    }
    costs = {(r.part, r.phase, r.label): r for r in records if r.kind == "cost"}
    assert len(costs) == 2 + 2 * 3
    for phase in ("prefill", "decode"):
        row = costs["language", phase, "keydiff"]
        assert row.host == f"transformers:{folder}"
        assert row.gate.passed
        assert row.baseline_gate.passed
        assert row.gate.cache_limit == 24 + 8 - 1
        assert 24 <= row.gate.cache_most <= row.gate.cache_limit
        assert row.cost.ratios.cache_held < 0.6
        assert row.cost.ratios.speedup.n == 3
        assert row.quality.ratio_low <= row.quality.ratio <= row.quality.ratio_high
        assert costs["language", phase, "sdpa"].cost.ratios.cache_held == 1
        assert costs["language", phase, "sdpa"].quality.difference.mean == pytest.approx(0, abs=1e-4)
        assert costs["language", phase, "dense LLM"].quality.ratio == 1
        assert costs["language", phase, "dense LLM"].quality.canary.passed
    assert costs["language", "prefill", "keydiff"].cost.candidate.flops > 0
    assert costs["vision", "forward", "dense"].cost.ratios.cache_held is None
    assert run(TASK, config, "again") == records
    page = page_of(TASK, records, config.to_yaml())
    assert page.count("<table>") == 3, "one of cost, one of perplexities, one of gates"
    assert "Canary: streaming" in page
    vision, language = (table.splitlines() for table in markdown_table(records).split("\n\n**"))
    assert len(vision) == 2 + 2 + 2
    assert len(language) == 2 + 2 + 3
    assert "speed-up, prefill, 64 tokens | speed-up, decode, after 64 tokens" in language[2]
    assert {line.count("|") for line in language[2:]} == {8}


def test_a_canary_that_lives_fails_every_row_of_the_language_model_and_no_other(folder, tmp_path):
    data = tiny(folder, canary={"worse_by": 10.0})
    records = run(TASK, validate_config({**data, "output": str(tmp_path)}), "command")
    for record in records:
        assert record.status == ("ok" if record.part == "vision" else "failed")
        assert record.part == "vision" or "canary" in record.message
        assert record.part == "vision" or (record.cost is None and record.quality is None)
    assert len(records) == 2 + 3 + 6
    page_of(TASK, records)


class Wrong:
    """A core that gives zeros."""

    def __call__(self, q, k, v, **options):
        return torch.zeros_like(q)


def test_a_core_that_is_wrong_is_not_timed(folder):
    register_attention("wrong", "core", Wrong, capabilities=dict.fromkeys(("causal", "mask", "gqa", "cross"), True))
    try:
        outcome = cost_of(folder, 0, attentions=["wrong"])
    finally:
        unregister_attention("wrong")
    assert (outcome.status, outcome.costs) == ("failed", {})
    assert not outcome.gate.passed
    assert outcome.baseline_gate.passed


def test_a_cache_that_holds_more_than_it_may_fails_the_gate(folder):
    model = lm.load_model(str(folder))
    wide = llm.swapped_twin(model, AttentionConfig(name="streaming", options={"budget": 24, "block_size": 8}))
    said = llm.policy_of(AttentionConfig(name="streaming", options={"budget": 16, "block_size": 8}))
    run = llm.Decoder(wide, torch.zeros(1, 40, dtype=torch.long), said)
    with torch.inference_mode():
        run.read()
        run.look()
        run.step()
        run.look()
    gate = run.bounded(Gate.model_validate(record_data()["gate"]))
    assert not gate.passed
    assert (gate.cache_limit, gate.cache_most) == (23, 25)
    assert gate.detail == "a layer held 24 entries after 40 tokens, 16 are allowed"


def test_cost_without_quality(folder, tmp_path):
    """Of a model of random weights a canary proves nothing, and what it costs can be measured all the same."""
    data = {**tiny(folder, nll=None, attentions=[KEYDIFF]), "output": str(tmp_path)}
    records = [r for r in run(TASK, validate_config(data), "command") if r.part == "language"]
    assert {(r.kind, r.phase, r.label, r.status) for r in records} == {
        ("cost", phase, label, "ok") for phase in ("prefill", "decode") for label in ("dense LLM", "keydiff")
    }
    assert {(r.quality, r.quality_note) for r in records} == {(None, "this config measures no quality")}


def test_a_policy_in_some_layers(folder):
    result = cost_of(folder, 0, attentions=[{**KEYDIFF, "where": "model.layers.1"}])
    assert (result.status, result.message) == ("ok", "")
    assert result.gate.cache_most <= result.gate.cache_limit
    everywhere = cost_of(folder, 1).costs["decode"].ratios.cache_held
    assert everywhere < result.costs["decode"].ratios.cache_held < 1


@pytest.mark.compat
def test_the_gate_gives_a_small_budget_room_for_its_prompt(folder):
    outcome = cost_of(folder, 1)
    assert "budget 52 of 52 tokens" in outcome.gate.oracle
    assert outcome.gate.max_abs_error <= outcome.gate.tolerance * outcome.gate.scale


def test_the_config_is_checked_before_anything_runs(folder):
    for attention, says in (
        ("padre", "is a mixer; a language model is measured with cores and policies only"),
        ("keydif", "did you mean 'keydiff'"),
        ({"name": "keydiff"}, "needs budget="),
        ({"name": "keydiff", "options": {"budget": 0}}, "language.attentions.0.options: "),
        ({"name": "keydiff", "options": {"budget": 9, "block_size": 5}}, "5 does not divide cost.new_tokens"),
    ):
        assert says in problems_of(tiny(folder, attentions=[attention]))
    assert "language.canary.tiny" in problems_of(tiny(folder, canary={"tiny": {"name": "h20"}}))
    assert "quality is now nll" in problems_of(tiny(folder, quality={"windows": 3}))
    assert "cost.batch is now cost.batches" in problems_of(tiny(folder, cost={"batch": 2}))
    assert "['sdpa']" in problems_of(tiny(folder, attentions=["sdpa", "sdpa"]))
    assert "language.attentions" in problems_of({**tiny(folder), "attentions": [KEYDIFF]})


def test_a_config_without_a_language_model_is_what_it_was(folder):
    data = tiny(folder)
    whole = validate_config(data)
    vision = validate_config({**data, "language": None})
    assert vision.hash == validate_config({key: value for key, value in data.items() if key != "language"}).hash
    assert vision.hash != whole.hash
    assert {row.part for row in plan(vision)} == {"vision"}
    assert whole.hash != validate_config(tiny(folder, attentions=["sdpa"])).hash
    assert yaml.safe_load(whole.to_yaml())["language"]["nll"]["windows"] == 5


def test_what_cannot_be_had_is_told_before_anything_starts(folder, monkeypatch, tmp_path):
    from attnzoo.tasks.decode import lm as decode

    def offline(name):
        raise AssetError(f"{name} cannot be fetched")

    config = validate_config({**tiny(folder), "output": str(tmp_path)})
    monkeypatch.setattr(decode, "load_tokenizer", offline)
    with pytest.raises(AssetError, match="language=null"):
        run(TASK, config, "command")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is made for 128"):
        run(TASK, validate_config(tiny(folder, cost={"prompt_tokens": 256, "new_tokens": 8})), "command")


def test_quality_kept_is_dense_perplexity_over_this_one_and_accuracy_over_dense():
    def scored(*windows):
        return Perplexity(perplexity=1, nll=1, tokens=9, window_nll=windows, ratio=None, note="")

    few = scored(2.0, 3.0, 4.0).against(scored(1.9, 2.9, 3.9))
    assert (few.ratio, few.ratio_low, few.ratio_high) == (pytest.approx(2.718281828**-0.1), None, None)
    found = scored(2.0, 3.0, 4.0, 5.0, 6.0).against(scored(1.9, 2.9, 3.9, 4.9, 5.9))
    assert found.ratio == pytest.approx(2.718281828**-0.1)
    assert found.ratio_low == pytest.approx(found.ratio)
    assert found.difference.mean == pytest.approx(0.1)
    assert scored(1.0, 2.0).ratio is None
    better = Accuracy(**quality(0.9)).against(Accuracy(**quality(0.6)))
    assert better.ratio == pytest.approx(1.5)
    assert 1 < better.ratio_low < 1.5 < better.ratio_high


def test_what_a_row_keeps_while_it_is_under_way_is_in_the_suites_own_folder(folder, tmp_path):
    config = decoding(validate_config({**tiny(folder), "output": str(tmp_path), "fresh": True}))
    assert (config.folder, config.fresh) == (tmp_path, True)

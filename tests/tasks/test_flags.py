"""Configs made from flags, and the language models that they measure."""

import pytest
import transformers
import yaml

from attnzoo import tasks
from attnzoo.__main__ import main, parser
from attnzoo.bench.record import RECORDS_FILE
from attnzoo.errors import ConfigError
from attnzoo.registry import unregister_attention
from attnzoo.tasks.decode import cells
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.flags import attention, config_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal language model of random weights: its config alone, without weights and without a tokenizer."""
    path = tmp_path_factory.mktemp("llm")
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
    config.max_position_embeddings = 256
    config.save_pretrained(path)
    return path


def flags(*words):
    return config_of(parser().parse_args(["measure", *map(str, words)]))


def test_the_model_decides_what_the_flags_mean(folder):
    vision = flags("timm:vit_tiny_patch16_224", "--tokens", "4,16", "--patch-size", "8")
    assert (vision["task"], vision["model"]["patch_size"], vision["cost"]["tokens"]) == ("suite", 8, [4, 16])
    language = flags(f"transformers:{folder}", "--tokens", "64,128", "--batch", "2")
    assert (language["task"], language["cost"]["prompt_tokens"], language["cost"]["batches"]) == (
        "decode",
        [64, 128],
        [2],
    )
    assert (language["nll"], language["text"]) == (None, None)
    own = flags("tests.tasks.test_model:vit", "--attention", "padre:degree=2,dense")
    assert (own["task"], own["attentions"]) == ("model", [{"name": "padre", "options": {"degree": 2}}])
    assert "tokens" not in own["cost"]


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (transformers.ViTConfig(**{**SMALL, "vocab_size": None}), "model"),
        (transformers.BertConfig(**SMALL), "model"),
        (transformers.LlamaConfig(**SMALL), "decode"),
    ],
)
def test_a_config_that_names_no_class_of_models_is_known_by_its_kind(config, task, tmp_path):
    config.architectures = None
    config.save_pretrained(tmp_path)
    assert flags(f"transformers:{tmp_path}", "--tokens", "64")["task"] == task


def test_a_method_that_the_models_module_registers_can_be_measured(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(
        "import attnzoo\n"
        "attnzoo.register_attention('own_mean', 'mixer', 'attnzoo.mixers.pooling:Pooling')\n"
        "from tests.tasks.test_model import vit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        content = flags("own_module:vit", "--attention", "own_mean", "--fresh")
        config = tasks.find("model").config.check(content)
        assert ([row.name for row in config.attentions], config.fresh) == (["own_mean"], True)
    finally:
        unregister_attention("own_mean")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("sdpa", "sdpa"),
        ("padre:degree=2:output=sum", {"name": "padre", "options": {"degree": 2, "output": "sum"}}),
        ("mamba:bidirectional=false", {"name": "mamba", "options": {"bidirectional": False}}),
        ("padre:degree=1:grid=(8, 8)", {"name": "padre", "options": {"degree": 1, "grid": [8, 8]}}),
        ("padre:grid=[4,2]:prefix=1", {"name": "padre", "options": {"grid": [4, 2], "prefix": 1}}),
        (
            "caote:base_options={normalize: false, x: 'a:b,c'}:budget=8",
            {"name": "caote", "options": {"base_options": {"normalize": False, "x": "a:b,c"}, "budget": 8}},
        ),
    ],
)
def test_options_follow_a_name(text, read):
    assert attention(text) == read


def test_commas_in_brackets_and_quotes_do_not_separate_attentions():
    text = "padre:grid=(8,8),sdpa,caote:base_options={a: 1, b: [2, 3]}:base='a,b',h2o"
    named = parser().parse_args(["measure", "timm:x", "--attention", text]).attention
    assert named == ["padre:grid=(8,8)", "sdpa", "caote:base_options={a: 1, b: [2, 3]}:base='a,b'", "h2o"]


@pytest.mark.parametrize(
    ("words", "instead"),
    [(("--patch-size", 4), "$"), (("--min-seconds", 0), ": a language model is timed by --repeats alone$")],
)
def test_a_flag_without_a_meaning_is_refused(folder, words, instead):
    with pytest.raises(ConfigError, match=f"{words[0]}: no meaning for transformers:{folder}{instead}"):
        flags(f"transformers:{folder}", *words)
    for flag, why in (
        ("--tokens", "the example input that it returns says how"),
        ("--new-tokens", "it is called once"),
    ):
        with pytest.raises(ConfigError, match=rf"{flag}: no meaning for .*: {why}"):
            flags("tests.tasks.test_model:vit", flag, 16)


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("timm:vit_tiny_patch16_224", ("--batch", 0), ["cost.batch.196: 0 is not allowed"]),
        ("timm:vit_tiny_patch16_224", ("--tokens", "0,196"), ["cost.tokens.0: 0 is not allowed"]),
        ("timm:vit_tiny_patch16_224", ("--patch-size", 0), ["model.patch_size: 0 is not allowed"]),
        ("transformers", ("--tokens", 0), ["cost.prompt_tokens.0: 0 is not allowed"]),
        ("transformers", ("--batch", -1), ["cost.batches.0: -1 is not allowed"]),
        ("transformers", ("--new-tokens", 0), ["cost.new_tokens: 0 is not allowed"]),
        (
            "timm:vit_tiny_patch16_224",
            ("--device", "gpu"),
            ["device: 'gpu' is not allowed; must be cpu, cuda, or cuda:N"],
        ),
        ("tests.tasks.test_model:vit", ("--attention", "keydiff:budget=8"), ["attentions.0.name: 'keydiff' evicts"]),
    ],
)
def test_a_value_out_of_range_is_refused_once_and_by_its_name(folder, capsys, model, words, said):
    name = f"transformers:{folder}" if model == "transformers" else model
    tokens = ["--tokens", "196"] if words[0] == "--batch" and model.startswith("timm") else []
    attention = [] if words[0] == "--attention" else ["--attention", "sdpa"]
    assert main(["measure", name, *tokens, *attention, *map(str, words)]) == 2
    _, *lines = capsys.readouterr().err.splitlines()
    assert [line[: len(start) + 2] for line, start in zip(lines, said, strict=True)] == [f"  {start}" for start in said]


def test_numbers_that_are_none_are_refused_in_words(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["measure", "timm:x", "--tokens", "abc"])
    assert "argument --tokens: 'abc' must be whole numbers with commas between them" in capsys.readouterr().err


def test_a_language_model_is_measured_by_its_config_alone(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = ["--attention", "keydiff:budget=16:block_size=8", "--tokens", "64", "--new-tokens", "8", "--repeats", "5"]
    assert main(["measure", f"transformers:{folder}", *wanted, "--threads", "1", "--output", "run"]) == 0
    said = capsys.readouterr().out
    assert yaml.safe_load(said[: said.index("output:")])["task"] == "decode"
    records = tasks.read_records(tmp_path / "run" / RECORDS_FILE)
    assert [(r.label.split()[0], r.phase) for r in records] == [
        (label, phase) for label in ("dense", "keydiff") for phase in ("prefill", "decode")
    ]
    assert all(r.status == "ok" and r.gate.passed and r.quality is None for r in records)
    assert all(r.cost.ratios.speedup.bounds for r in records)
    assert [r.cost.ratios.cache_held < 0.6 for r in records] == [False, False, True, True]
    assert all(0 < r.cost.attention_share < 1 for r in records[:2])
    prefill, decode = said.split("prefill, 64 tokens:")[1].split("decode, after 64 tokens:")
    for told in (prefill, decode):
        assert "The attention layers, projections included, take" in told


def language(folder, **changes):
    cost = {"prompt_tokens": [64, 128], "new_tokens": 8}
    plain = {"task": "decode", "name": "x", "model": str(folder), "text": None, "nll": None, "cost": cost, "threads": 1}
    return DecodeConfig.check(
        {**plain, "attentions": [{"name": "tova", "options": {"budget": 16, "block_size": 8}}], **changes}
    )


def test_several_prompt_lengths_are_rows_of_one_run(folder):
    """Prompts are random tokens; what was measured at one length does not depend on the others."""
    config = language(folder)
    cells.check(config)
    plan = cells.plan(config)
    assert [(cell.label.split()[0], cell.tokens) for cell in plan] == [
        (n, t) for t in (64, 128) for n in ("dense", "tova")
    ]
    given = cells.prepare(config, plan)
    assert {tokens: [len(ids) for ids in prompts] for tokens, prompts in given["prompts"].items()} == {
        "64": [64],
        "128": [128],
    }
    assert given == cells.prepare(config, plan), "the same every time"
    result = cells.measure(config, plan[3], given, lambda word: None)
    assert (result.status, result.shapes.tokens, set(result.costs)) == ("ok", 128, {"prefill", "decode"})
    one = language(folder, cost={"prompt_tokens": 128, "new_tokens": 8})
    assert [cell.measured for cell in cells.plan(one)] == [cell.measured for cell in plan[2:]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nll": {"windows": 5, "tokens": 64}}, "text must be given for nll"),
        ({"cost": {"prompt_tokens": [64, 64], "new_tokens": 8}}, "has a length twice"),
        ({"cost": {"prompt_tokens": [], "new_tokens": 8}}, "prompt_tokens"),
        ({"cost": {"prompt_tokens": [64, 256], "new_tokens": 8}}, "made for 256 tokens"),
    ],
)
def test_lengths_and_texts_that_do_not_fit_are_refused(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        cells.check(language(folder, **changes))

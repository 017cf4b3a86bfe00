"""The command line: list, describe, layers, measure."""

import re
import subprocess
import sys

import pytest
import yaml
from torch import nn

from attnzoo import replace_attention
from attnzoo.__main__ import main
from attnzoo.bench.record import RECORDS_FILE
from attnzoo.errors import ConfigError, UnsupportedError
from attnzoo.models import is_causal_lm, load_model
from attnzoo.tasks import read_records
from tests.eviction.models import language_model


def test_layers_says_what_stands_where_and_why_what_cannot(capsys):
    assert main(["layers", "timm:vit_tiny_patch16_224"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "blocks.11.attn Attention (its own)" in said
    assert "12 attention layers found, 0 swapped" in said
    assert "in 12 of 12 layers, 3,663,360 new parameters" in said
    assert said.count("it has no key/value cache to bound") == 1, "a row per kind and reason"
    assert "keydiff" in said
    assert "needs filters=" not in said, "that no policy can stand here comes first"
    assert "Nothing was swapped" not in said


def test_layers_of_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from tests.eviction.models import language_model\n"
        "def decoder():\n    return language_model(), None\n"
        "def number():\n    return 3\n"
        "def broken():\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["layers", "mine:decoder"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in 2 of 2 layers, 0 new parameters" in said
    assert "model.layers.0.self_attn" in said
    assert said.count("no:") == 4, "a row of padre, of power, of all other mixers, of the policy that needs a file"
    assert "makes 'power' causal)" in " ".join(said.replace("│", " ").split())
    assert "needs tokens=" not in said, "that a mixer sees later tokens comes first"
    assert "needs filters=" in said
    for name, words in (("number", "gave int"), ("broken", "ZeroDivisionError"), ("nothing", "no attribute 'nothing'")):
        assert main(["layers", f"mine:{name}"]) == 2
        assert words in capsys.readouterr().err
    sys.modules.pop("mine")


def test_models_by_name(tmp_path):
    model = language_model()
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(f"transformers:{tmp_path / 'model'}")
    assert type(loaded) is type(model)
    assert all((a == b).all() for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert isinstance(load_model("timm:vit_tiny_patch16_224"), nn.Module)
    for name in ("vit", "timm:", "timm:vit_tinyy_patch16_224", "no_such_module:f", f"transformers:{tmp_path}"):
        with pytest.raises(ConfigError, match="model"):
            load_model(name)


class Mixes(nn.Module):
    """An attention layer of a class that no library has, known by what it does alone."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, self.value(x))


class UnknownAttention(Mixes):
    """The same, known by its name."""


def unknown():
    return UnknownAttention()


def unknown_inside():
    return nn.Sequential(UnknownAttention(), UnknownAttention())


def by_what_it_does():
    return Mixes()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("unknown", "UnknownAttention: attnzoo does not know this class"),
        ("unknown_inside", "0: UnknownAttention: attnzoo does not know this class (and 1 more)"),
        ("by_what_it_does", "Mixes: it computes attention, but attnzoo does not know this class"),
    ],
)
def test_a_layer_of_a_class_of_ones_own_is_told_that_and_not_to_be_wrapped(capsys, model, told):
    assert main(["layers", f"tests.test_main:{model}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert told in said
    assert "Sequential(layer)" not in said
    assert said.count("attnzoo does not know this class") == 3, "once of each kind"
    with pytest.raises(UnsupportedError, match=re.escape(told)):
        replace_attention(load_model(f"tests.test_main:{model}"), "sdpa")


@pytest.mark.parametrize("with_weights", [True, False])
def test_the_name_of_an_asset_is_a_model_of_transformers(tmp_path, monkeypatch, capsys, with_weights):
    asset, model = tmp_path / "asset", language_model().float()
    model.save_pretrained(asset)
    if not with_weights:
        (asset / "model.safetensors").unlink()
    monkeypatch.setattr("attnzoo.assets.get", {"smollm2_135m_instruct_safetensors": asset}.__getitem__)
    loaded = load_model("transformers:smollm2_135m_instruct")
    same = [bool((a == b).all()) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)]
    assert all(same) == with_weights
    assert main(["layers", "transformers:smollm2_135m_instruct"]) == 0
    assert "model.layers.1.self_attn" in capsys.readouterr().out
    assert is_causal_lm("smollm2_135m_instruct")


def test_measure_is_a_benchmark_made_from_flags(tmp_path, capsys):
    flags = ["--attention", "padre,sdpa", "--tokens", "4,16", "--repeats", "3", "--min-seconds", "0", "--threads", "1"]
    command = ["measure", "timm:vit_tiny_patch16_224", *flags, "--output", str(tmp_path / "run")]
    assert main(command) == 0
    said = capsys.readouterr().out
    config = yaml.safe_load(said[: said.index("output:")])
    assert (config["attentions"], config["cost"]["tokens"]) == (["padre", "sdpa"], [4, 16])
    assert "no swap can gain more than" in said
    records = read_records(tmp_path / "run" / RECORDS_FILE)
    assert [(r.label, r.tokens) for r in records] == [(n, t) for t in (4, 16) for n in ("dense", "padre", "sdpa")]
    assert all(r.gate.passed and 0 < r.cost.attention_share < 1 for r in records)
    assert "no swap can gain more than" in (tmp_path / "run" / "report.html").read_text()
    assert main(command) == 0
    assert read_records(tmp_path / "run" / RECORDS_FILE) == records, "what was measured is kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["transformers:./nothing"], "there is no such folder"),
        (["tests.tasks.test_model:vit", "--tokens", "4"], "no meaning for tests.tasks.test_model:vit"),
        (["tests.tasks.test_model:vit", "--patch-size", "4"], "--patch-size: no meaning"),
        (["tests.tasks.test_model:alone"], "must return (model, example input)"),
        (
            ["timm:vit_tiny_patch16_224", "--attention", "padre:2"],
            "options read name=value, as padre:degree=3",
        ),
        (["timm:vit_tiny_patch16_224", "--attention", "sdpa,mypol:Mean"], "'mypol:Mean': options read name=value"),
        (["timm:vit_tiny_patch16_224", "--attention", "keydiff:budget=64"], "measure transformers:NAME"),
        (["tests.tasks.test_model:encoder", "--attention", "h2o:budget=64"], "measure transformers:NAME"),
        (["tests.tasks.test_model:encoder", "--attention", "padre:grid=(8)"], "grid must be (h, w)"),
        (["tests.tasks.test_model:encoder", "--attention", "hyena:grid=(3,5)"], "'hyena' has no option 'grid'"),
        (["timm:vit_tiny_patch16_224", "--attention", "padre:grid=(3,5)"], "'padre' has no option 'grid'"),
        (["timm:vit_tiny_patch16_224", "--tokens", "200"], "200 is not a square (the nearest are 196 and 225)"),
        (["timm:vit_tiny_patch16_224", "--attention", "padr"], "padre"),
        (["timm:vit_tiny_patch16_224", "--tokens", "5"], "is not a square"),
        (["timm:vit_tiny_patch16_224", "--dtype", "float33"], "float33"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["measure", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["list"], ["describe", "padre"]])
def test_a_reader_that_has_ended_is_no_traceback(arguments):
    command = [sys.executable, "-m", "attnzoo", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1

"""Any model as a task: what a function returns, or an encoder of transformers."""

import inspect
import sys

import pytest
import timm
import torch
import transformers
import yaml
from torch import nn

from attnzoo import register_attention, tasks, unregister_attention
from attnzoo.__main__ import main
from attnzoo.bench.record import RECORDS_FILE
from attnzoo.errors import ConfigError
from attnzoo.tasks.model import TASK, ModelConfig, check, measure, plan
from eval import bench

HERE = "tests.tasks.test_model"
ENCODED = "input 2 x 15 x 32"
QUICK = {"repeats": 3, "min_seconds": 0, "warmup": 1}


def vit():
    """Images that are not square."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), embed_dim=48, num_heads=3, depth=2)
    return model, torch.randn(2, 3, 32, 64)


def encoder():
    """Named arguments, and a library that goes round its attention layers where it can."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1), {
        "src": torch.randn(2, 15, 32)
    }


class Pair(nn.Module):
    """Two inputs, one of them whole numbers, and two outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.words, self.attention = nn.Embedding(9, 32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, ids, x):
        mixed, _ = self.attention(x, self.words(ids), self.words(ids), need_weights=False)
        return {"count": ids.sum(), "mixed": mixed, "more": mixed.mean(1)}


def pair():
    return Pair(), (torch.randint(9, (2, 5)), torch.randn(2, 7, 32))


class Writes(nn.Module):
    """A list of inputs, into which it writes, as RT-DETR's encoder does."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, maps):
        x = maps[0]
        maps[0] = x + self.attention(x, x, x, need_weights=False)[0]
        return maps[0]


def writes():
    return Writes(), {"maps": [torch.randn(2, 7, 32)]}


def alone():
    return vit()[0]


def three():
    return (*vit(), 3)


def number():
    return 3, torch.randn(2)


def no_tensor():
    return vit()[0], "images"


def no_attention():
    return nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)


def wrong_size():
    return vit()[0], torch.randn(2, 3, 31, 64)


def no_output():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()[0]

        def forward(self, x):
            return self.inner(x).argmax(-1)

    return Sum(), vit()[1]


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config_of(model, *attentions, **cost):
    model = model if ":" in model else f"{HERE}:{model}"
    content = {"task": "model", "name": "x", "model": model, "attentions": attentions, "cost": {**QUICK, **cost}}
    return ModelConfig.check(content)


def results_of(config):
    return [measure(config, cell, {}, lambda word: None) for cell in plan(config)]


@pytest.mark.parametrize(
    ("model", "attentions", "shape"),
    [
        ("vit", ["sdpa", {"name": "padre", "options": {"degree": 2}}], "input 2 x 3 x 32 x 64"),
        ("encoder", ["softmax", "hyena"], ENCODED),
        ("encoder", ["softmax", {"name": "padre", "options": {"degree": 1, "grid": [3, 4], "prefix": 3}}], ENCODED),
        ("pair", ["softmax"], "input 2 x 5, 2 x 7 x 32"),
        ("writes", ["softmax"], "input 2 x 7 x 32"),
    ],
)
def test_what_a_function_returns_is_measured(model, attentions, shape):
    config = config_of(model, *attentions)
    check(config)
    assert {cell.workload for cell in plan(config)} == {shape}
    results = results_of(config)
    assert len(results) == 1 + len(attentions)
    for result in results:
        assert (result.status, result.gate.passed, result.baseline_gate.passed) == ("ok", True, True)
        cost = result.costs["forward"]
        assert cost.candidate.memory.activation_peak_bytes or cost.candidate.memory.allocator_peak_bytes
        assert 0 < cost.attention_share < 1
        assert cost.candidate.throughput == pytest.approx(2e3 / cost.candidate.latency_ms.p50)
    assert results[0].gate.oracle == "itself in float64"
    assert results[1].gate.oracle == "the model's own attention, same weights and input"
    if model == "encoder":
        side = results[1].costs["forward"]
        assert side.candidate.flops == side.baseline.flops, "which torch's fast path would hide"
    if len(results) == 3:
        assert "in float64" in results[2].gate.oracle
        assert "3x5 grid" in results[2].gate.oracle, "of the mixers alone"


class Zeros:
    """A core that is wrong."""

    def __call__(self, q, k, v, *, mask=None, causal=False, scale=None, dropout=0.0, softcap=None):
        return torch.zeros_like(q)


class Drifting(nn.Module):
    """A mixer that is wrong in float32 alone."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.map = nn.Linear(dim, dim)

    def forward(self, x, grid=None, prefix=0, mask=None):
        return self.map(x) + (0.5 if x.dtype == torch.float32 else 0)


@pytest.mark.parametrize(("kind", "target"), [("core", Zeros), ("mixer", Drifting)])
@pytest.mark.parametrize("model", ["vit", "encoder"])
def test_what_is_wrong_is_not_timed(kind, target, model):
    register_attention("wrong", kind, target)
    try:
        (_, result) = results_of(config_of(model, "wrong"))
    finally:
        unregister_attention("wrong")
    assert (result.status, result.gate.passed, result.costs) == ("failed", False, {})
    assert "did not pass, so nothing was timed" in result.message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("alone", r"must return \(model, example input\), it gave VisionTransformer"),
        ("three", "it gave a tuple of 3"),
        ("number", "gave int, no torch module"),
        ("no_tensor", "its example input is str and holds no tensor"),
        ("no_attention", "has no attention layer that attnzoo can swap"),
        ("wrong_size", r"cannot be called on its example \(input 2 x 3 x 31 x 64\): AssertionError"),
        ("no_output", "returns no tensor of floating point"),
        ("nothing", "has no attribute 'nothing'"),
        ("tests.no_module:f", "No module named 'tests.no_module'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_row(model, words):
    with pytest.raises(ConfigError, match=words):
        check(config_of(model, "sdpa"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attentions": ["padr"]}, "did you mean 'padre'"),
        ({"attentions": ["keydiff"]}, "evicts a language model's cache"),
        ({"attentions": [{"name": "sdpa", "fused": True}]}, "vision models of timm"),
        ({"attentions": [{"name": "sdpa", "expect": "unsupported"}]}, "expect has no meaning"),
        ({"cost": {"tokens": [4]}}, "the example input decides"),
        ({"model": "transformers:x"}, "cost.tokens must be given"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.check({"task": "model", "name": "x", "model": f"{HERE}:vit", "attentions": ["sdpa"], **changes})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small encoders of images and of text."""
    path = tmp_path_factory.mktemp("encoders")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    transformers.ViTForImageClassification(transformers.ViTConfig(**small)).save_pretrained(path / "vit")
    bert = transformers.BertConfig(**small, vocab_size=50, max_position_embeddings=64)
    transformers.BertForMaskedLM(bert).save_pretrained(path / "bert")
    transformers.CLIPConfig().save_pretrained(path / "clip")
    return path


@pytest.mark.parametrize(("name", "attentions"), [("vit", ["sdpa", "padre"]), ("bert", ["softmax"])])
def test_encoders_of_transformers_are_measured_at_token_counts(folders, name, attentions):
    config = config_of(f"transformers:{folders / name}", *attentions, tokens=[4, 16], batch=2)
    check(config)
    cells = plan(config)
    assert [cell.tokens for cell in cells] == [4] * (1 + len(attentions)) + [16] * (1 + len(attentions))
    results = [measure(config, cell, {}, lambda word: None) for cell in cells]
    assert all(result.status == "ok" and result.gate.passed for result in results)
    few, many = results[0].costs["forward"], results[1 + len(attentions)].costs["forward"]
    assert many.candidate.flops > 3 * few.candidate.flops


@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [
        ("vit", 5, "5 is not a square"),
        ("bert", 65, "is made for 64"),
        ("clip", 4, "can make no input for it|cannot be called on its example"),
        ("none", 4, "no such folder"),
    ],
)
def test_encoders_that_cannot_be_measured_are_refused(folders, name, tokens, words):
    with pytest.raises(ConfigError, match=words):
        check(config_of(f"transformers:{folders / name}", "sdpa", tokens=[tokens]))


def test_measure_prints_a_config_that_the_engine_runs_and_keeps_what_is_still_true(tmp_path, monkeypatch, capsys):
    """Of a function in the working directory, which is changed."""
    source = "import timm\nimport torch\n\n" + inspect.getsource(vit)
    (tmp_path / "of_my_own.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    flags = ["--attention", "padre:degree=1:kernel_size=3", "--repeats", "3", "--min-seconds", "0", "--threads", "1"]
    assert main(["measure", "of_my_own:vit", *flags]) == 0
    said = capsys.readouterr().out
    printed = yaml.safe_load(said[: said.index("output:")])
    assert printed["attentions"] == [{"name": "padre", "options": {"degree": 1, "kernel_size": 3}}]
    assert "no swap can gain more than" in said
    (folder,) = (tmp_path / "runs").iterdir()
    records = tasks.read_records(folder / RECORDS_FILE)
    assert [record.label for record in records] == ["dense", "padre degree=1 kernel_size=3"]
    assert all(record.gate.passed and record.workload == "input 2 x 3 x 32 x 64" for record in records)
    assert "forward, input 2 x 3 x 32 x 64" in (folder / "report.html").read_text()

    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    assert bench.main(["printed.yaml"]) == 0
    assert tasks.read_records(folder / RECORDS_FILE) == records, "the same model: nothing is measured again"

    (tmp_path / "of_my_own.py").write_text(source + "\n\n# changed\n")
    assert bench.main(["printed.yaml"]) == 2, "what was measured of another function does not count"
    assert "holds records of another config" in capsys.readouterr().err
    sys.modules.pop("of_my_own")


def test_the_task_is_one_of_the_tasks():
    assert tasks.find("model") is TASK

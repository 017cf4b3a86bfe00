import importlib.util
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from attnzoo.errors import AssetError, AttnZooError, ConfigError
from attnzoo.hosts.versions import facts
from attnzoo.tasks.decode import lm as decode
from attnzoo.tasks.decode.kvpress import environment, process, prompts, record, run, table, worker
from attnzoo.tasks.decode.kvpress.config import load_config, rows_of
from attnzoo.tasks.decode.needles import make_samples
from attnzoo.tasks.decode.text import Text
from tests.tasks.decode import llm

EVAL = Path(__file__).parents[3] / "eval"


def script(name):
    spec = importlib.util.spec_from_file_location(name, EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAKE = """
import json, pathlib, sys
setup = json.loads(sys.stdin.readline())
print(json.dumps({"versions": {"python": "3", "kvpress": "fake"}}), flush=True)
for number, line in enumerate(sys.stdin):
    job = json.loads(line)
    if pathlib.Path(sys.argv[1]).exists() and setup["method"] and number == 1:
        print("it broke here", file=sys.stderr)
        sys.exit(3)
    kept = job["context"] if setup["method"] is None else job["keep"]
    print(json.dumps({
        "said": [], "text": " " + job["answers"][0] + ".", "first_token_seconds": 0.5, "kept": [kept, kept],
        "cache_peak_bytes": 10, "entries_peak_bytes": 10, "memory_peak_bytes": None,
    }), flush=True)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    (folder / "prose.txt").write_text(llm.prose(), encoding="utf-8")
    return llm.save(folder / "model"), folder / "prose.txt"


@pytest.fixture(scope="module")
def samples():
    """Three prompts of 400 tokens, and their tokenizer."""
    tokenizer = llm.tokenizer()
    return make_samples(
        Text("prose", llm.prose(), ""), tokenizer, kind="single", count=3, tokens=400, seed=0
    ), tokenizer


@pytest.fixture
def settings(saved, tmp_path, monkeypatch):
    """A config's path, with kvpress's side played by a script; `broken` makes that one die."""
    fake, broken = tmp_path / "fake.py", tmp_path / "broken"
    fake.write_text(FAKE, encoding="utf-8")
    original = process.worker_command

    def command(side, python):
        if side == "attnzoo":
            return original(side, python)
        return [sys.executable, str(fake), str(broken)]

    monkeypatch.setattr(run, "worker_command", command)
    content = {
        "name": "tiny",
        "model": str(saved[0]),
        "text": str(saved[1]),
        "tokens": 500,
        "samples": 2,
        "block_size": 16,
        "policies": [
            {"policy": "keydiff", "attnzoo": {"name": "keydiff"}, "kvpress": [{"press": "KeyDiffPress"}], "note": "so"}
        ],
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return types.SimpleNamespace(path=path, broken=broken)


def go(config):
    said = []
    return run.run(config, "python", "the command", [], said.append), said


def test_a_broken_run_goes_on_and_the_table_says_who_is_ahead(settings):
    config = load_config(settings.path, ["settings=[question_after]"])
    settings.broken.touch()
    with pytest.raises(AttnZooError, match=r"kvpress KeyDiffPress ended with code 3; its last words:\nit broke here"):
        go(config)
    settings.broken.unlink()
    before = len(results(config.folder / "records.jsonl"))
    path, said = go(config)
    lines = results(path)
    assert before + len(said) == len(lines) == len({line.key for line in lines}) == 2 * 4  # samples, rows
    assert go(config)[1] == []

    for line in lines:
        share = 1 if line.policy == "dense" else 4
        assert line.context_tokens < 480
        assert line.kept == (line.context_tokens // share,) * 2
        if line.side == "attnzoo" and line.policy == "keydiff":
            entry = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
            assert line.entries_peak_bytes <= (line.kept[0] + 16) * entry < line.cache_peak_bytes * 1.2
            assert line.first_token_seconds > 0

    text = table.report(path)
    assert path.with_name("table.md").read_text(encoding="utf-8") == text
    for words in ("the command", "kvpress fake", "`keydiff`", "| 2 of 2 |", "keydiff: so", "over attnzoo's"):
        assert words in text
    assert "keydiff, `KeyDiffPress`: finds 2 pass keys, attnzoo 0 of 2, which may be chance; " in text
    assert "without eviction both environments gave the same answer to 0 of 2 prompts" in text


def results(path):
    return [line for line in record.read_records(path) if line.kind == "result"]


def test_another_config_or_text_is_not_mixed_in(settings, tmp_path):
    config, other = load_config(settings.path), load_config(settings.path, ["seed=1"])
    path = tmp_path / "records.jsonl"
    run._prepare(path, config, "text", "the command")
    assert len(run._prepare(path, config, "text", "another command")) == 1
    with pytest.raises(ConfigError, match="holds results of another config"):
        run._prepare(path, other, "text", "the command")
    with pytest.raises(ConfigError, match="holds results of another text"):
        run._prepare(path, config, "another", "the command")
    seen = {}
    run._remember("kvpress", {"torch": "1"}, seen, path)
    with pytest.raises(ConfigError, match="on the side of kvpress, now there is"):
        run._remember("kvpress", {"torch": "2"}, seen, path)


def test_a_side_that_keeps_another_share_is_refused(settings):
    config = load_config(settings.path)
    row = rows_of(config)[1][1]
    prompt = prompts.Prompt(ids=range(500), question_at=460, answers=("1",), depth=0.5, limit=9)
    stub = types.SimpleNamespace(ask=lambda job, timeout: {"kept": [job["keep"], job["keep"] + 2]})
    with pytest.raises(
        AttnZooError, match="kvpress KeyDiffPress kept 115 to 117 entries per head of prompt 0, not 115"
    ):
        run._result(config, row, "question_after", 0, prompt, stub)


def test_a_worker_that_hangs_is_killed():
    hang = "import json, sys, time\nsys.stdin.readline()\nprint('{\"versions\": {}}', flush=True)\ntime.sleep(60)"
    with (
        process.WorkerProcess([sys.executable, "-c", hang], "the sleeper", {"threads": 1}) as sleeper,
        pytest.raises(AttnZooError, match=r"the sleeper took longer than 0\.2 s"),
    ):
        sleeper.ask({}, 0.2)


def test_bad_configs(settings):
    with pytest.raises(ConfigError, match=r"policies\.0\.attnzoo.*keydif.*keydiff"):
        load_config(settings.path, ["policies.0.attnzoo.name=keydif"])
    with pytest.raises(ConfigError, match="share"):
        load_config(settings.path, ["share=1.5"])
    with pytest.raises(ConfigError, match="stand for more than one"):
        load_config(settings.path, ["policies.0.policy=dense"])
    assert script("compare_kvpress").main([str(settings.path), "--only", "nothing"]) == 2


def test_the_config_that_ships():
    config = load_config(EVAL.parent / "configs" / "decode" / "kvpress.yaml")
    assert [policy.policy for policy in config.policies] == [
        "keydiff", "snapkv", "tova", "knorm", "streaming", "h2o", "random"
    ]  # fmt: skip


def test_the_question_is_found_in_the_prompt(samples):
    samples, tokenizer = samples
    for sample in samples:
        start = prompts.question_start(sample, tokenizer)
        question = tokenizer.decode(sample.ids[start:])
        assert question.startswith("\n\nWhat is the special magic number for ")
        assert sample.answers[0] in tokenizer.decode(sample.ids[:start])


def test_an_interpreter_without_kvpress_is_refused():
    with pytest.raises(ConfigError, match=r'kvpress 0\.5\.5 is needed.*pip install "kvpress==0\.5\.5"'):
        environment.kvpress_python(sys.executable, print)
    with pytest.raises(ConfigError, match="no-such-python"):
        environment.kvpress_python("/no-such-python", print)


def test_an_environment_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(
        environment.subprocess, "run", lambda step, **_: subprocess.CompletedProcess(step, 1, "", "no network")
    )
    said = []
    with pytest.raises(AssetError, match=r"(?s)no environment with kvpress 0\.5\.5.*no network.*--python"):
        environment.kvpress_python(None, said.append)
    assert "making an environment" in said[0]


def setup(saved, side, method):
    return {
        "side": side,
        "method": method,
        "attention": "sdpa",
        "model": str(saved[0]),
        "dtype": "float32",
        "threads": 1,
    }


def job(sample, context, keep):
    return {"ids": sample.ids, "context": context, "keep": keep, "answers": sample.answers, "limit": 18, "seed": 0}


def test_both_sides_answer_as_the_house_does(saved, samples):
    sample, tokenizer = samples[0][0], samples[1]
    expected = decode.retrieve(llm.tiny_llama(), tokenizer, sample).text
    keydiff = {"name": "keydiff", "options": {"block_size": 16}}
    for side, method in (("attnzoo", None), ("kvpress", None), ("attnzoo", keydiff)):
        one = worker.Worker(setup(saved, side, method))
        for context in (400, 350):
            answer = one.answer(job(sample, context, 500))  # a budget that nothing exceeds
            assert answer["text"] == expected
            assert answer["kept"] == [context, context]


class CutPress:
    """What kvpress's presses do, in small: keep the first entries of a layer after its forward in the prefill."""

    def __init__(self, compression_ratio):
        self.share = 1 - compression_ratio

    def _cut(self, module, args, kwargs, output):
        layer = kwargs[facts().cache_argument].layers[module.layer_idx]
        kept = int(layer.keys.shape[2] * self.share)
        layer.keys, layer.values = layer.keys[:, :, :kept].clone(), layer.values[:, :, :kept].clone()

    @contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self._cut, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


def test_kvpress_is_seen_before_it_compresses_a_layer(saved, samples, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", types.SimpleNamespace(CutPress=CutPress))
    method = {"press": "CutPress", "options": {}, "block_size": None, "share": 0.25}
    one = worker.Worker(setup(saved, "kvpress", method))
    answer = one.answer(job(samples[0][0], 400, 100))
    entry = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes
    assert answer["kept"] == [100, 100]
    assert answer["cache_peak_bytes"] == (100 + 400) * entry  # the first layer cut, the second whole
    assert not any(layer.self_attn._forward_hooks for layer in one.model.model.layers)
    assert torch.get_num_threads() == 1

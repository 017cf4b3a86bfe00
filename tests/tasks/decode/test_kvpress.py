import json
import platform
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch.nn import functional as F

import attnzoo
from attnzoo import tasks
from attnzoo.bench import run as engine
from attnzoo.bench.page import page_of
from attnzoo.errors import AssetError, ConfigError
from attnzoo.hosts.versions import facts, output_cache
from attnzoo.tasks.decode import lm as decode
from attnzoo.tasks.decode.kvpress import environment, task, worker
from attnzoo.tasks.decode.kvpress.config import Comparison
from attnzoo.tasks.decode.needles import make_samples
from attnzoo.tasks.decode.text import Text
from eval import compare_kvpress
from tests.tasks.decode import llm

ROOT = Path(__file__).parents[3]
OWN = (platform.python_version(), transformers.__version__)
FAKE = """#!{python}
import json, pathlib, sys
if "-c" in sys.argv:
    print("0.5.5")
    sys.exit()
job = json.load(sys.stdin)
if pathlib.Path("{broken}").exists() and job["spec"]:
    print("it broke here", file=sys.stderr)
    sys.exit(3)
print(json.dumps({{"word": "prompt 1"}}), flush=True)
prompts = []
for prompt in job["prompts"]:
    kept = prompt["context"] if job["spec"] is None else prompt["keep"]
    answer = " " + prompt["answers"][0] + "."
    prompts.append({{"answer": answer, "kept": [kept, kept], "cache_peak_bytes": 10, "entries_peak_bytes": 10}})
print(json.dumps({{"versions": {{"python": "3", "transformers": "5.2", "kvpress": "fake"}}, "prompts": prompts}}))
"""


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
    """A config's path. Kvpress's interpreter is a script, which `broken` makes die; attnzoo's workers are run here."""
    fake, broken = tmp_path / "fake", tmp_path / "broken"
    fake.write_text(FAKE.format(python=sys.executable, broken=broken), encoding="utf-8")
    fake.chmod(0o755)
    started = task.ask

    def ask(python, job, say):
        return started(python, job, say) if job["side"] == "kvpress" else json.loads(json.dumps(worker.do(job, say)))

    monkeypatch.setattr(task, "ask", ask)
    content = {
        "name": "tiny",
        "model": str(saved[0]),
        "text": str(saved[1]),
        "tokens": 500,
        "samples": 2,
        "timed": 0,
        "block_size": 16,
        "settings": ["question_after"],
        "policies": [
            {"policy": "keydiff", "attnzoo": {"name": "keydiff"}, "kvpress": [{"press": "KeyDiffPress"}], "note": "so"}
        ],
        "python": str(fake),
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return types.SimpleNamespace(path=path, broken=broken)


def here(config):
    """The plan's cells, to be measured in this process."""
    return [cell.model_copy(update={"isolated": False}) for cell in task.plan(config)]


def go(config):
    return engine.run(replace(task.TASK, plan=here), config, "the command")


def test_a_broken_run_goes_on_and_the_page_says_who_is_ahead(settings):
    config = Comparison.load(settings.path)
    settings.broken.touch()
    *kept, broken = go(config)
    assert broken.status == "failed"
    assert "ended with code 3; its last words:\nit broke here" in broken.message
    settings.broken.unlink()
    records = go(config)
    assert records[:-1] == kept
    assert [record.label for record in records] == [
        *("dense (attnzoo)", "dense (kvpress)", "keydiff (attnzoo)", "keydiff (kvpress KeyDiffPress)")
    ]
    assert {record.status for record in records} == {"ok"}
    for record in records:
        share = 1 if record.quality.row.policy == "dense" else 4
        for prompt in record.quality.prompts:
            assert prompt.context_tokens < 480
            assert prompt.kept == (prompt.context_tokens // share,) * 2
            if record.attention == "keydiff":
                entry = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
                assert prompt.entries_peak_bytes <= (prompt.kept[0] + 16) * entry < prompt.cache_peak_bytes * 1.2
        place = record.environment
        theirs = record.quality.row.side == "kvpress"
        assert (place.python, place.transformers) == (("3", "5.2") if theirs else OWN)
        assert place.torch == torch.__version__
    page = page_of(task.TASK, records)
    for words in ("the command", "kvpress: python 3, transformers 5.2, kvpress fake.", "2 of 2", "keydiff: so"):
        assert words in page
    keydiff = next(row for row in page.splitlines() if "KeyDiffPress</td>" in row and ">keydiff<" in row)
    assert "0 of 2</td><td>2 of 2</td><td>-1.00 (2 samples)</td><td>0 of 2" in keydiff
    assert "(34% to 100%)" not in page, "of two prompts no interval is shown"


def test_several_processes_of_a_launcher_are_refused(settings, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert compare_kvpress.main([str(settings.path)]) == 2
    assert "a launcher started 4 processes" in capsys.readouterr().err


def test_what_a_row_depends_on_is_no_other_row_and_nothing_of_where_it_runs(settings, saved, tmp_path):
    def measured(*overrides):
        return {cell.label: cell.measured for cell in task.plan(Comparison.load(settings.path, overrides))}

    before = measured()
    assert measured("timeout_seconds=5", "python=null", "name=x", "policies.0.note=other") == before
    assert set(measured("only=[dense]").items()) < set(before.items())
    changed = measured("policies.0.kvpress.0.block_size=8")
    assert "keydiff (kvpress BlockPress(KeyDiffPress, 8))" in changed
    assert {label for label in before if changed.get(label) == before[label]} == set(list(before)[:3])
    (tmp_path / "other.txt").write_text(saved[1].read_text(encoding="utf-8") + "more", encoding="utf-8")
    for other in ("seed=1", "share=0.5", "tokens=490", "dtype=bfloat16", f"text={tmp_path / 'other.txt'}"):
        assert not set(measured(other).items()) & set(before.items()), other


@pytest.mark.parametrize("kind", ["quality", "cost"])
def test_a_side_that_keeps_another_share_is_refused(settings, kind, monkeypatch):
    config = Comparison.load(settings.path, ["timed=1"])
    given = task.prepare(config, task.plan(config))
    cell = next(cell for cell in task.plan(config) if cell.kind == kind and "KeyDiffPress" in cell.label)
    keep = given["prompts"][0]["question_at"] // 4
    told, versions = {"kept": [keep, keep + 2], "answer": ""}, {"torch": "2", "kvpress": "fake"}
    gate = {"oracle": "", "passed": True, "max_abs_error": 0, "scale": 1, "tolerance": 1, "at": ""}
    monkeypatch.setattr(
        task, "ask", lambda *_: {"gate": gate, "versions": versions, "prompts": [told] * 2, "row": [told]}
    )
    result = task.measure(config, cell, given, print)
    assert (result.status, result.environment) == ("failed", {"torch": "2"})
    assert f"kept {keep} to {keep + 2} entries per head of prompt 0, not {keep}: the two" in result.message


def test_bad_configs(settings, capsys):
    with pytest.raises(ConfigError, match=r"policies\.0\.attnzoo.*keydif.*keydiff"):
        Comparison.load(settings.path, ["policies.0.attnzoo.name=keydif"])
    with pytest.raises(ConfigError, match="share"):
        Comparison.load(settings.path, ["share=1.5"])
    with pytest.raises(ConfigError, match="stand for more than one"):
        Comparison.load(settings.path, ["policies.0.policy=dense"])
    assert compare_kvpress.main([str(settings.path), "--only", "nothing", "nobody"]) == 2
    assert "there is no policy nothing, nobody; policies: dense, keydiff" in capsys.readouterr().err
    assert compare_kvpress.main([str(settings.path), "--python", sys.executable]) == 2
    assert "kvpress 0.5.5 is needed" in capsys.readouterr().err


def test_the_config_that_ships():
    found, config = tasks.load(ROOT / "configs" / "decode" / "kvpress.yaml")
    assert found is task.TASK
    assert [policy.policy for policy in config.policies] == [
        "keydiff", "snapkv", "tova", "knorm", "streaming", "h2o", "random"
    ]  # fmt: skip
    assert len(task.plan(config)) == 2 * 2 * 17


def test_the_config_of_kvpresss_own_protocol_ships_with_the_same_settings_on_both_sides():
    found, config = tasks.load(ROOT / "configs" / "decode" / "kvpress_prompt.yaml")
    assert found is task.TASK
    assert config.samples >= 24
    specs = {row.policy: row.spec["options"] for row in config.rows if row.side == "attnzoo" and row.spec}
    assert {options["schedule"] for options in specs.values()} == {"prompt"}
    assert set(specs) >= {"keydiff", "snapkv", "tova", "knorm", "streaming", "h2o", "random"}
    assert "schedule" not in Comparison.load(ROOT / "configs" / "decode" / "kvpress.yaml").rows[2].spec["options"]
    assert len(task.plan(config)) == 2 * len(config.rows)


def test_the_page_says_when_attnzoo_evicted(settings):
    """Both protocols are told, each of its own records."""
    for schedule, words, note in (
        ("block", "attnzoo reads the context in blocks", "blocks of 16"),
        (
            "prompt",
            "Both read the context with full attention and evict once",
            "one eviction at the end of the context",
        ),
    ):
        config = Comparison.load(settings.path, [f"schedule={schedule}", f"output={settings.path.parent / schedule}"])
        records = go(config)
        assert {record.status for record in records} == {"ok"}
        page = page_of(task.TASK, records)
        assert words in page
        assert all(record.quality.note.endswith(note) for record in records)
        keydiff = next(record for record in records if record.attention == "keydiff")
        entry = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
        for prompt in keydiff.quality.prompts:
            assert (prompt.entries_peak_bytes > 0.5 * prompt.context_tokens * entry) == (schedule == "prompt")
            assert prompt.kept == (prompt.context_tokens // 4,) * 2


def test_an_unknown_schedule_is_refused(settings):
    with pytest.raises(ConfigError, match=r"schedule.*'block' or 'prompt'"):
        Comparison.load(settings.path, ["schedule=step"])


def scores_of_kvpress(press, keys, attention):
    """What kvpress 0.5.5's presses give each entry, ``(B, Hkv, S)``; `attention` is ``(B, H, S, S)``."""
    heads, length = keys.shape[1:3]
    if press == "KeyDiffPress":
        anchor = F.normalize(keys, p=2, dim=-1).mean(dim=2, keepdim=True)
        return -F.cosine_similarity(keys, anchor, dim=-1)
    if press == "StreamingLLMPress":
        scores = torch.ones_like(keys[..., 0])
        scores[:, :, 4 : 4 + length - length // 4] = 0
        return scores
    if press == "SnapKVPress":
        scores = attention[..., -64:, :-64].mean(dim=-2)
        scores = F.avg_pool1d(scores, kernel_size=5, padding=2, stride=1)
        scores = scores.view(1, heads, -1, length - 64).mean(2)
        return F.pad(scores, (0, 64), value=scores.max().item() + 1)
    if press == "TOVAPress":
        scores = attention[..., -1:, :-1].mean(1).repeat(1, heads, 1)
        return F.pad(scores, (0, 1), value=scores.max().item() + 1)
    assert press == "ObservedAttentionPress"
    scores = attention.sum(2) / torch.arange(length, 0, -1)
    return scores.view(1, heads, -1, length).mean(2)


@pytest.mark.parametrize("policy", ["keydiff", "streaming", "snapkv", "tova", "h2o"])
def test_with_one_eviction_both_sides_keep_the_same_entries(policy, samples):
    """Of the first layer and of the last, whose keys come out of the same full attention."""
    config = tasks.load(ROOT / "configs" / "decode" / "kvpress_prompt.yaml")[1]
    (pair,) = [entry for entry in config.policies if entry.policy == policy]
    ids = torch.tensor([samples[0][0].ids[:360]])
    dense = llm.tiny_llama()
    dense.set_attn_implementation("eager")
    model = attnzoo.replace_attention(
        llm.tiny_llama(), pair.attnzoo.name, **{"budget": 90, "schedule": "prompt", **pair.attnzoo.options}
    )
    with torch.no_grad():
        seen = dense(ids, output_attentions=True)
        held = output_cache(model(ids))
    held.flush()
    for mine, full, attention in zip(held.layers, output_cache(seen).layers, seen.attentions, strict=True):
        scores = scores_of_kvpress(pair.kvpress[0].press, full.keys, attention)
        assert mine.positions.tolist() == scores.topk(90).indices.sort().values.tolist()


def test_the_question_is_found_in_the_prompt(samples):
    samples, tokenizer = samples
    for sample in samples:
        question = tokenizer.decode(sample.ids[sample.question_at :])
        assert question.startswith("\n\nWhat is the special magic number for ")
        assert sample.answers[0] in tokenizer.decode(sample.ids[: sample.question_at])


def test_an_interpreter_without_kvpress_is_refused():
    with pytest.raises(ConfigError, match=r'kvpress 0\.5\.5 is needed.*pip install "kvpress==0\.5\.5"'):
        environment.kvpress_python(sys.executable)
    with pytest.raises(ConfigError, match="no-such-python"):
        environment.kvpress_python("/no-such-python")


def test_an_environment_that_cannot_be_made_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(
        environment.subprocess, "run", lambda step, **_: subprocess.CompletedProcess(step, 1, "", "no network")
    )
    assert environment.kvpress_python(None, make=False)
    with pytest.raises(AssetError, match=r"(?s)no environment with kvpress 0\.5\.5.*no network.*--python"):
        environment.kvpress_python(None)
    assert "making an environment" in capsys.readouterr().err


def job(saved, side, method, samples=(), kind="quality", context=350, keep=100):
    prompts = [
        {"ids": s.ids, "context": context, "keep": keep, "answers": s.answers, "limit": 18, "seed": 0} for s in samples
    ]
    return {
        "kind": kind,
        "side": side,
        "spec": method,
        "attention": "sdpa",
        "model": str(saved[0]),
        "dtype": "float32",
        "threads": 1,
        "imports": [],
        "tolerance": 1e-4,
        "prompts": prompts,
    }


KEYDIFF = {"name": "keydiff", "options": {"block_size": 16}}


def test_both_sides_answer_as_the_house_does(saved, samples):
    sample, tokenizer = samples[0][0], samples[1]
    expected = decode.retrieve(llm.tiny_llama(), tokenizer, sample).text
    for side, method in (("attnzoo", None), ("kvpress", None), ("attnzoo", KEYDIFF)):
        for context in (400, 350):
            asked = job(saved, side, method, [sample], context=context, keep=500)  # a budget that nothing exceeds
            (answer,) = worker.do(asked, print)["prompts"]
            assert answer["answer"] == expected
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


class DeafPress(CutPress):
    """Cuts what it was told to keep."""

    def __init__(self, compression_ratio):
        self.share = 0.25


class HalfPress:
    """A press that takes another, and has it keep half of what it would."""

    def __init__(self, press):
        press.share /= 2
        self.press = press

    def __call__(self, model):
        return self.press(model)


@pytest.fixture
def cut(monkeypatch):
    presses = types.SimpleNamespace(CutPress=CutPress, DeafPress=DeafPress, HalfPress=HalfPress)
    monkeypatch.setitem(sys.modules, "kvpress", presses)
    return {"press": "CutPress", "options": {}, "block_size": None, "share": 0.25}


def test_kvpress_is_seen_before_it_compresses_a_layer(saved, samples, cut):
    one = worker.Worker(job(saved, "kvpress", cut, samples[0], context=400))
    with torch.inference_mode():
        answer = one.answer(job(saved, "kvpress", cut, samples[0], context=400)["prompts"][0])
    entry = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes
    assert answer["kept"] == [100, 100]
    assert answer["cache_peak_bytes"] == (100 + 400) * entry  # the first layer cut, the second whole
    assert not any(layer.self_attn._forward_hooks for layer in one.row.model.model.layers)
    assert torch.get_num_threads() == 1


def test_a_press_that_takes_another_is_built_of_both(saved, samples, cut, settings):
    answer = worker.do(job(saved, "kvpress", {**cut, "press": "HalfPress", "base": "CutPress"}, samples[0][:1]), print)
    assert answer["prompts"][0]["kept"] == [43, 43]  # an eighth of 350
    base = "policies.0.kvpress=[{press: HalfPress, base: CutPress, block_size: 8}]"
    row = Comparison.load(settings.path, [base]).rows[-1]
    assert row.label == "keydiff (kvpress BlockPress(HalfPress(CutPress), 8))"
    assert row.spec == {**cut, "press": "HalfPress", "base": "CutPress", "block_size": 8}
    assert "base" not in Comparison.load(settings.path).rows[-1].spec


@pytest.mark.parametrize(("side", "kept"), [("dense", 350), ("keydiff", 100), ("snapkv", 100), ("kvpress", 87)])
def test_a_row_is_timed_beside_dense_after_its_gate(saved, samples, cut, side, kept):
    own = {"name": side, "options": {"block_size": 16, **({"window": 64} if side == "snapkv" else {})}}
    method = {"dense": None, "kvpress": cut}.get(side, own)
    asked = job(saved, "attnzoo" if method is own else "kvpress", method, samples[0], "cost")
    answer = worker.do(asked, print)
    assert answer["gate"]["passed"]
    assert answer["gate"]["max_abs_error"] <= 1e-4 * answer["gate"]["scale"]
    assert len(answer["row"]) == len(answer["dense"]) == 3
    assert {tuple(call["kept"]) for call in answer["row"]} == {(kept, kept)}
    assert {tuple(call["kept"]) for call in answer["dense"]} == {(350, 350)}
    assert all(call["seconds"] > 0 for call in answer["row"] + answer["dense"])


def test_nothing_is_timed_where_the_gate_did_not_pass(settings, saved, samples, cut, monkeypatch):
    """A press that evicts although it is told to keep everything, and a policy whose attention is another."""
    deaf = worker.do(job(saved, "kvpress", {**cut, "press": "DeafPress"}, samples[0], "cost"), print)
    assert (deaf["gate"]["passed"], deaf["row"], deaf["dense"]) == (False, [], [])
    swapped = worker.AttnZoo.whole_answer

    @contextmanager
    def spoiled(side, keep):
        """Have the last layer's attention give a little more."""
        with swapped(side, keep):
            last = side.model.model.layers[-1].self_attn
            last.register_forward_hook(lambda module, inputs, output: (output[0] * 1.01, *output[1:]))
            yield

    monkeypatch.setattr(worker.AttnZoo, "whole_answer", spoiled)
    config = Comparison.load(settings.path, ["timed=1"])
    given = task.prepare(config, task.plan(config))
    cell = next(cell for cell in task.plan(config) if cell.kind == "cost" and cell.attention == "keydiff")
    result = task.measure(config, cell, given, print)
    assert (result.status, dict(result.costs)) == ("failed", {})
    assert "gate did not pass, so nothing was timed" in result.message
    assert not result.gate.passed


def test_a_cost_has_both_sides_and_its_gate(settings):
    config = Comparison.load(settings.path, ["timed=9"])  # of two
    given = task.prepare(config, task.plan(config))
    cell = next(cell for cell in task.plan(config) if cell.kind == "cost" and cell.attention == "keydiff")
    result = task.measure(config, cell, given, print)
    assert (result.status, result.message) == ("ok", "")
    cost, entry = result.costs["prefill"], 2 * 2 * 2 * 8 * 4
    assert result.gate.passed
    assert cost.ratios.speedup.n == cost.candidate.latency_ms.n == 2
    assert cost.baseline.memory.cache_held_bytes == 500 * entry
    assert cost.candidate.memory.cache_held_bytes < (125 + 16 + 500 - given["prompts"][0]["question_at"]) * entry
    assert cost.ratios.parameters == 1


def test_a_worker_is_started_and_ends_with_whoever_asked(saved, samples, monkeypatch):
    asked, said = job(saved, "attnzoo", None, samples[0][:1]), []
    answer = task.ask([sys.executable, "-P"], asked, said.append)
    assert said == ["load", "prompt 1 of 1", "done"]
    assert answer["versions"]["python"] == platform.python_version()
    assert len(answer["prompts"]) == 1
    monkeypatch.setattr(worker.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit):
        worker._follow(-1)

"""The task end to end, on a tiny random Llama of bytes."""

import json
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
import yaml
from rich.console import Console

import attnzoo
from attnzoo import tasks
from attnzoo.bench import run as engine
from attnzoo.bench.page import page_of
from attnzoo.bench.record import RECORDS_FILE
from attnzoo.cores.softmax import Softmax
from attnzoo.errors import AssetError, ConfigError
from attnzoo.eviction.layers import BoundedLayer
from attnzoo.eviction.size import CacheBytes
from attnzoo.registry import unregister_attention
from attnzoo.tasks.decode import cells, lm
from attnzoo.tasks.decode.config import DecodeConfig, load_config, validate_config
from attnzoo.tasks.decode.quality import KIND_TITLES, Perplexity
from attnzoo.tasks.decode.score import unbounded
from attnzoo.tasks.decode.task import TASK
from eval import bench, decode

ROOT = Path(__file__).parents[3]
POLICIES = [
    {"name": "keydiff", "options": {"budget": 24, "block_size": 8}, "label": "keydiff"},
    {"name": "tova", "options": {"budget": 24, "block_size": 8}, "label": "tova"},
]
COST = {"prompt_tokens": 64, "new_tokens": 8}


def content(saved, folder, **changes):
    model, text = saved
    return {
        "task": "decode",
        "name": "tiny",
        "model": str(model),
        "text": str(text),
        "threads": 1,
        "attentions": POLICIES,
        "nll": {"windows": 5, "tokens": 96},
        "retrieval": {"tokens": 500, "samples": {"single": 3, "multi_value": 2}},
        # random weights are not made worse by a small cache, only other
        "canary": {"worse_by": -10.0, "tiny": {"name": "streaming", "options": {"budget": 8, "block_size": 4}}},
        "output": str(folder),
        **changes,
    }


@pytest.fixture
def settings(saved, tmp_path):
    return lambda **changes: content(saved, tmp_path / "run", **changes)


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


HERE = replace(TASK, plan=lambda config: [cell.model_copy(update={"isolated": False}) for cell in cells.plan(config)])


def run(data, task=HERE):
    """Run a config, here unless `task` says otherwise."""
    return engine.run(task, validate_config(data), "command", Console(quiet=True))


def figures(records):
    """What must not depend on how the run was made."""
    return [r.model_dump(exclude={"utc", "seconds", "command", "cost", "environment", "config_hash"}) for r in records]


def by(records, kind="quality"):
    return {(r.label, r.workload, r.phase): r for r in records if r.kind == kind}


def test_a_run_gives_a_record_a_row_and_workload_and_pairs_add_up(settings):
    records = run(settings())
    assert {(r.status, r.message) for r in records} == {("ok", "")}
    found = by(records)
    assert list(found) == [
        (label, workload, "forward")
        for workload in ("", "pass key", "3 values")
        for label in ("dense", "keydiff", "tova")
    ]
    dense, keydiff = (found[label, "", "forward"].quality for label in ("dense", "keydiff"))
    assert found["dense", "", "forward"].is_baseline
    assert dense.difference is None
    assert keydiff.difference.mean == pytest.approx(keydiff.nll - dense.nll)
    assert len(dense.window_nll) == dense.windows == 5
    assert sum(keydiff.curve) / len(keydiff.curve) == pytest.approx(keydiff.difference.mean, abs=0.05)
    assert keydiff.cache.entries / keydiff.cache_dense.entries == pytest.approx(24 / 96)
    assert dense.canary.passed
    assert dense.dense_limit is None
    assert keydiff.dense_limit.label == "keydiff block_size=8 budget=96"
    assert keydiff.dense_limit.passed
    kinds = [found["tova", KIND_TITLES[kind], "forward"].quality for kind in ("single", "multi_value")]
    assert [(k.samples, len(k.by_depth), len(k.said), k.tokens) for k in kinds] == [(3, 3, 3, 500), (2, 6, 2, 500)]


def test_batches_are_measured_each_and_the_prefill_at_the_first(settings):
    records = run(settings(attentions=POLICIES[1:], retrieval=None, cost={**COST, "batches": [1, 2]}))
    costs = by(records, "cost")
    phases = [("", "prefill"), ("", "decode"), ("batch 2", "decode")]
    assert set(costs) == {(label, *about) for label in ("dense", "tova") for about in phases}
    for batch, workload in enumerate(("", "batch 2"), start=1):
        row = costs["tova", workload, "decode"]
        assert row.cost.ratios.cache_held < 0.6
        assert row.gate.cache_most <= row.gate.cache_limit
        assert row.shapes.batch == batch
        assert row.quality == by(records)["tova", "", "forward"].quality
        assert row.cost.ratios.speedup.n == 3
    shares = [costs["dense", *about].cost.attention_share for about in phases]
    assert all(0 < share < 1 for share in shares), "of a larger batch too"
    once, twice = (costs["dense", about, "decode"].cost.candidate.memory for about in ("", "batch 2"))
    assert twice.cache_held_bytes == pytest.approx(2 * once.cache_held_bytes, rel=0.05)
    page = page_of(TASK, records)
    assert "decode, after 64 tokens, batch 2" in page
    assert "Workloads side by side" in page
    assert "decode, after 64 tokens; dense at batch 1" in page


@pytest.mark.parametrize(("first", "then"), [([1], [1, 2]), ([2], [2, 4, 6])])
def test_a_batch_is_added_to_a_finished_run(settings, first, then):
    data = settings(attentions=POLICIES[:1], retrieval=None, text=None, nll=None)
    before = run({**data, "cost": {**COST, "batches": first}})
    after = run({**data, "cost": {**COST, "batches": then}})
    assert after[: len(before)] == before
    assert [r.workload for r in after[len(before) :]] == [f"batch {batch}" for batch in then[1:] for _ in range(2)]


def test_hits_are_counted_and_paired(settings, monkeypatch):
    """Dense finds every number, keydiff every second prompt's, tova none."""
    asked = []

    def answers(model, tokenizer, sample):
        asked.append(sample)
        row = (len(asked) - 1) // 8 if sample.kind == "single" else (len(asked) - 25) // 2
        hit = row == 0 or (row == 1 and sample.index % 2 == 0)
        return lm.Answer("", (hit,) * len(sample.answers), CacheBytes(1, 1, 1))

    monkeypatch.setattr(lm, "retrieve", answers)
    found = by(run(settings(retrieval={"tokens": 500, "samples": {"multi_value": 2, "single": 8}})))
    dense, keydiff, tova = (found[label, "pass key", "forward"].quality for label in ("dense", "keydiff", "tova"))
    values = [found[label, "3 values", "forward"].quality.recall for label in ("dense", "keydiff", "tova")]
    assert [sum(quality.hits) for quality in (dense, keydiff, tova)] == [8, 4, 0]
    assert values == [1, 0.5, 0]
    assert keydiff.difference.mean == -0.5
    assert -0.9 < keydiff.difference.low < -0.5 < keydiff.difference.high < -0.1
    assert (keydiff.ratio, tova.ratio, dense.ratio) == (0.5, 0, 1)
    assert tova.p_value == pytest.approx(2 / 2**8)
    assert keydiff.recalls == [1, 0] * 4
    assert 0 < keydiff.low < 0.5 < keydiff.high < 1


def test_a_killed_run_goes_on_where_it_was_and_shows_what_it_has(settings, monkeypatch, tmp_path, capsys):
    data = settings(retrieval={"tokens": 300, "samples": {"single": 1}})
    whole = figures(run({**data, "output": str(tmp_path / "whole")}))
    left, original = [5 + 2 + 5 + 3], lm.nll  # dense's windows and canary, and some of keydiff's

    def killed(model, ids, *given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(model, ids)

    monkeypatch.setattr(lm, "nll", killed)
    with pytest.raises(KeyboardInterrupt):
        run(data)
    path, records = tmp_path / "tiny.yaml", Path(data["output"]) / RECORDS_FILE
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert decode.main([str(path), "--so-far"]) == 0
    assert "dense" in capsys.readouterr().out
    assert [r.label for r in tasks.read_records(records)] == ["dense"]
    with records.open("ab") as torn:
        torn.write(b'{"schema_version":1,"conf')
    left[0] = 10**6
    with pytest.warns(UserWarning, match="torn"):
        assert figures(run(data)) == whole
    lines = records.read_text().splitlines()
    left[0] = 0  # a finished run runs nothing
    assert figures(run(data)) == whole
    assert records.read_text().splitlines() == lines


def stopped_at(monkeypatch, name, calls):
    """Have a function of the language model stop the run at a call, and give the list of its calls."""
    seen, original = [], getattr(lm, name)

    def counted(model, *given):
        if len(seen) == calls[0]:
            raise KeyboardInterrupt
        seen.append(model)
        return original(model, *given)

    monkeypatch.setattr(lm, name, counted)
    return seen


@pytest.mark.parametrize("at", [3, 6, 7 + 4, 7 + 6, 7 + 8], ids=["dense", "canary", "keydiff", "unbounded", "limit"])
def test_a_row_goes_on_at_the_window_where_it_was_ended(settings, monkeypatch, tmp_path, at):
    data = settings(retrieval=None, attentions=POLICIES[:1])
    whole = figures(run({**data, "output": str(tmp_path / "whole")}))
    seen = stopped_at(monkeypatch, "nll", calls := [at])
    with pytest.raises(KeyboardInterrupt):
        run(data)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1
    calls[0] = -1
    assert figures(run(data)) == whole
    assert len(seen) == 5 + 2 + 5 + 2 + 2, "no window is scored twice"
    assert list((tmp_path / "run" / "samples").iterdir()) == []


def test_a_row_goes_on_at_the_prompt_where_it_was_ended(settings, monkeypatch, tmp_path):
    data = settings()
    whole = figures(run({**data, "output": str(tmp_path / "whole")}))
    seen = stopped_at(monkeypatch, "retrieve", calls := [5])
    with pytest.raises(KeyboardInterrupt):
        run(data)
    calls[0] = -1
    assert figures(run(data)) == whole
    assert len(seen) == 3 * (3 + 2)


def test_what_a_row_had_done_is_done_again_where_it_is_set_aside_or_cannot_be_read(settings, monkeypatch, tmp_path):
    data = settings(retrieval=None, attentions=POLICIES[:1])
    seen = stopped_at(monkeypatch, "nll", calls := [4])
    with pytest.raises(KeyboardInterrupt):
        run(data)
    calls[0] = 8
    with pytest.raises(KeyboardInterrupt):
        run({**data, "fresh": True})
    (path,) = (tmp_path / "run" / "samples").iterdir()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    path.write_text('{"other": 1}\n{"role": "win', encoding="utf-8")
    calls[0] = -1
    with pytest.warns(UserWarning, match="line 1: not a record.*begun anew"):
        assert {r.status for r in run(data)} == {"ok"}
    assert len(seen) == 4 + 4 + 16


def test_a_row_is_added_to_a_finished_run(settings):
    data = settings(retrieval=None)
    before = run(data)
    after = run({**data, "attentions": [*POLICIES, {"name": "softmax"}]})
    assert after[: len(before)] == before
    assert [r.label for r in after[len(before) :]] == ["softmax"]


def test_dense_comes_first_and_its_canary_before_all_else(settings):
    planned = cells.plan(validate_config(settings(cost=COST)))
    assert [cell.label for cell in planned] == ["dense", "keydiff", "tova"] * 4
    assert [(cell.stage, cell.workload) for cell in planned[::3]] == [
        ("canary", ""),
        ("score", "pass key"),
        ("score", "3 values"),
        ("time", ""),
    ]
    assert {cell.stage for cell in planned[1:3]} == {"score"}


def test_another_config_or_text_in_the_folder_is_refused_and_can_be_set_aside(settings, tmp_path):
    data = settings(retrieval=None, attentions=POLICIES[:1])
    run(data)
    with pytest.raises(ConfigError, match="another config"):
        run({**data, "seed": 5})
    text = tmp_path / "text.txt"
    text.write_text(Path(data["text"]).read_text(), encoding="utf-8")
    moved = {**data, "text": str(text), "output": str(tmp_path / "moved")}
    run(moved)
    text.write_text("New. " + text.read_text(), encoding="utf-8")
    with pytest.raises(ConfigError, match="a file that it names held something else"):
        run(moved)
    assert len(run({**moved, "fresh": True})) == 2
    assert (tmp_path / "moved" / "records.old.jsonl").exists()


def test_what_stands_for_a_text_changes_with_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "t.txt").write_text("one", encoding="utf-8")
    names = ("~/t.txt", str(tmp_path / "t.txt"), "pydoc_topics")
    before = [cells.contents(name) for name in names]
    assert before == [cells.contents(name) for name in names]
    (tmp_path / "t.txt").write_text("two", encoding="utf-8")
    monkeypatch.setattr(topics, "topics", {**topics.topics, "new": "A topic of a later Python."})
    assert not any(cells.contents(name) == was for name, was in zip(names, before, strict=True))


def test_a_pinned_text_and_a_model_of_the_hub_stand_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debian_handbook").mkdir()  # which nobody reads
    assert [cells.contents(name) for name in ("debian_handbook", "a/model")] == ["debian_handbook", "a/model"]


def test_a_tiny_cache_that_changes_nothing_leaves_no_result(settings):
    """What was scored then does not depend on the cache."""
    data = settings(canary={"worse_by": 10.0}, retrieval={"tokens": 500, "samples": {"single": 1}}, cost=COST)
    records = run(data)
    assert len(records) == 3 + 3 + 2 * 3
    for record in records:
        assert (record.status, record.cost, record.quality) == ("failed", None, None)
        assert "a canary failed: NLL above dense, of streaming block_size=16 budget=16 is" in record.message
    page_of(TASK, records)


def test_a_method_that_is_not_dense_where_nothing_is_evicted_has_no_result(settings, monkeypatch):
    """Here because its budget is exceeded after all; the other rows count."""
    module, spoiled = "attnzoo.tasks.decode.score.unbounded", lambda spec, tokens: unbounded(spec, 16)
    monkeypatch.setattr(module, lambda spec, tokens: (spoiled if spec.name == "keydiff" else unbounded)(spec, tokens))
    records = run(settings(retrieval=None, cost={**COST, "repeats": 3}))
    rows = by(records)
    assert {label: row.status for (label, *_), row in rows.items()} == {
        "dense": "ok",
        "keydiff": "failed",
        "tova": "ok",
    }
    failed = rows["keydiff", "", "forward"]
    assert "a canary failed: largest difference from dense at one token, of keydiff" in failed.message
    assert failed.quality is None
    assert {r.quality for (label, *_), r in by(records, "cost").items() if label == "keydiff"} == {None}


def test_a_text_that_gives_no_finite_nll_is_told(settings, monkeypatch):
    original = lm.nll

    def broken(model, ids, *given):
        scored = original(model, ids)
        return replace(scored, nll=(*scored.nll[:3], float("nan"), *scored.nll[4:]))

    monkeypatch.setattr(lm, "nll", broken)
    records = run(settings(retrieval=None))
    assert {r.status for r in records} == {"failed"}
    assert "dense gives an NLL that is not finite at token 4 of window 1" in records[0].message


def test_a_method_is_held_to_dense_with_a_budget_that_nothing_exceeds():
    config = validate_config(
        {"name": "x", "attentions": [*POLICIES, {"name": "softmax", "where": "model.layers.0"}], "retrieval": None}
    )
    made = [unbounded(attention, 96) for attention in config.attentions]
    assert [one.options.get("budget") for one in made] == [96, 96, None]
    assert made[2].where == "model.layers.0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attentions": [{"name": "keydif"}]}, "keydiff"),
        ({"attentions": [{"name": "padre"}]}, "mixer"),
        ({"attentions": [{"name": "tova", "options": {"budget": 0}}]}, "budget"),
        ({"attentions": [{"name": "tova", "options": {"budgt": 8}}]}, "did you mean 'budget'"),
        ({"attentions": [{"name": "tova"}]}, "needs budget"),
        ({"attentions": []}, "attentions"),
        ({"attentions": POLICIES * 2}, "labels must differ"),
        ({"nll": {"windows": 1, "tokens": 96}}, "canary.windows"),
        ({"nll": {"windows": 3, "tokens": 1}}, "nll.tokens"),
        ({"nll": None}, "retrieval needs nll"),
        ({"nll": {"windows": 3, "tokens": 96, "scored": 96}}, "must be fewer than nll.tokens"),
        (
            {"attentions": [{"name": "tova", "options": {"budget": 8, "schedule": "prompt"}}]},
            "attentions.0.options.schedule: prompt evicts after a prompt.*set nll.scored",
        ),
        ({"retrieval": {"tokens": 500, "samples": {"triple": 1}}}, "multi_key"),
        ({"windows": 3}, "unknown key"),
        ({"canary": {"tiny": {"name": "strea"}}}, "streaming"),
        ({"cost": {"batch": 4}}, "cost.batch is now cost.batches"),
        ({"cost": {"batches": [2, 3]}}, "multiples of the first"),
        ({"cost": {"new_tokens": 12}}, "attentions.0.options.block_size: 8 does not divide cost.new_tokens 12"),
        ({"quality": {"windows": 3}}, r"quality.canary_nats: canary.worse_by"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        validate_config(settings(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "no such text"}, "debian_handbook"),
        ({"model": "no/such/model"}, "model"),
        ({"nll": {"windows": 4, "tokens": 2000}}, "made for 1,024 tokens"),
        ({"nll": {"windows": 400, "tokens": 900}}, "fewer than the 400"),
        ({"retrieval": {"tokens": 60, "samples": {"single": 1}}}, "no room"),
    ],
)
def test_what_cannot_be_run_here_is_refused_before_any_weight_is_loaded(settings, monkeypatch, changes, message):
    monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = settings(**changes)
    with pytest.raises(ConfigError, match=message):
        run(data)
    assert not (Path(data["output"]) / RECORDS_FILE).exists()


def test_several_processes_of_a_launcher_are_refused(settings, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings()), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert decode.main([str(path)]) == 2
    assert "a launcher started 2 processes" in (told := capsys.readouterr().err)
    assert "workers=N" in told
    assert not (tmp_path / "run" / RECORDS_FILE).exists()


def test_the_config_survives_its_own_yaml(settings, tmp_path):
    config = validate_config(settings())
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path).hash == config.hash
    assert load_config(path, ["seed=9"]).hash != config.hash
    assert load_config(path, ["output=elsewhere", "fresh=true"]).hash == config.hash


OTHERS = {"kvpress", "kvpress_prompt", "train_bytes"}  # of other scripts, whose tests read them
CONFIGS = sorted(path for path in (ROOT / "configs" / "decode").glob("*.yaml") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configs_of_the_repository_are_sound(path):
    config = load_config(path)
    assert isinstance(config, DecodeConfig)
    assert len(cells.plan(config)) > len(config.attentions)  # dense, too


def test_the_script_reports_a_table_and_a_page_and_refuses_with_2(settings, tmp_path, capsys):
    """Two rows at a time, each in a process of its own, give what one process gives."""
    data = settings(workers=2, retrieval={"tokens": 500, "samples": {"single": 3}})
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert decode.main([str(path), "retrieval.samples.single=2"]) == 0
    shown = capsys.readouterr().out
    assert "keydiff" in shown
    assert "pass key" in shown
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "Canaries" in page
    assert "http-equiv" not in page
    records = tasks.read_records(tmp_path / "run" / RECORDS_FILE)
    assert {r.command for r in records} == {f"python eval/decode.py {path} retrieval.samples.single=2"}
    alone = {**data, "workers": 1, "output": str(tmp_path / "alone")}
    alone["retrieval"] = {"tokens": 500, "samples": {"single": 2}}

    def key(row):
        return row["workload"], row["label"]

    for a, b in zip(sorted(figures(records), key=key), sorted(figures(run(alone)), key=key), strict=True):
        assert a == b
    for main in (decode.main, bench.main):
        assert main(["--report", str(tmp_path / "run" / RECORDS_FILE)]) == 0
    assert decode.main([str(path), "attentions.0.name=keydif"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert decode.main(["--report", str(tmp_path / "none.jsonl")]) == 2


def test_a_config_that_names_no_task_is_one_of_decoding_for_its_script(settings, tmp_path, monkeypatch):
    data = settings(retrieval=None, attentions=POLICIES[:1])
    del data["task"]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    seen, original = [], engine.run

    def here(task, config, command):
        seen.append((task.name, command))
        return original(HERE, config, command)

    monkeypatch.setattr(engine, "run", here)
    assert decode.main([str(path), "fresh=false"]) == 0
    assert seen == [("decode", f"python eval/decode.py {path}")]


class Faulty(Softmax):
    """The softmax core, until it is told to be wrong."""

    wrong = False

    def __call__(self, q, k, v, **options):
        out = super().__call__(q, k, v, **options)
        return out * 1.5 if Faulty.wrong else out


@pytest.fixture
def faulty(monkeypatch):
    """A core of which a later process may have a broken kernel."""
    attnzoo.register_attention("faulty", "core", Faulty, capabilities=attnzoo.describe("softmax").capabilities)
    yield lambda: monkeypatch.setattr(Faulty, "wrong", True)
    unregister_attention("faulty")


def timings_interrupted(monkeypatch, data):
    """Run all but the timings, as a process that is interrupted then."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cells, "measure_cost", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data)


@pytest.mark.parametrize(("dtype", "row"), [("float32", 0), ("bfloat16", 1)])
def test_a_run_that_goes_on_checks_a_core_again_before_it_is_timed(settings, monkeypatch, faulty, dtype, row):
    rows = [{"name": "faulty"}, POLICIES[0]][:: 1 if row == 0 else -1]
    data = settings(attentions=rows, cost=COST, retrieval=None, dtype=dtype)
    timings_interrupted(monkeypatch, data)
    faulty()
    costs = by(run(data), "cost")
    for label in ("dense", "keydiff", "faulty"):
        for phase in ("prefill", "decode"):
            timed = costs[label, "", phase]
            assert (timed.status, timed.cost is None) == (("failed", True) if label == "faulty" else ("ok", False))
    assert "gate did not pass, so nothing was timed" in costs["faulty", "", "decode"].message


def test_a_run_that_goes_on_checks_a_policy_again_before_it_is_timed(settings, monkeypatch):
    """The bounded cache of the later process returns values that are off."""
    data = settings(attentions=[POLICIES[1]], cost=COST, retrieval=None)
    timings_interrupted(monkeypatch, data)
    original = BoundedLayer.update

    def off(self, keys, values, *args, **kwargs):
        return original(self, keys, values * 1.5, *args, **kwargs)

    monkeypatch.setattr(BoundedLayer, "update", off)
    costs = by(run(data), "cost")
    assert {(r.label, r.status) for r in costs.values()} == {("dense", "ok"), ("tova", "failed")}
    assert costs["tova", "", "prefill"].cost is None


def test_the_record_and_the_page_carry_the_gate_of_what_was_timed(settings):
    records = run(settings(attentions=[POLICIES[0]], cost=COST, retrieval=None))
    for record in records:
        if record.kind == "cost":
            assert record.gate.passed
            assert record.baseline_gate.passed
    assert "budget 52 of 52 tokens" in records[-1].gate.oracle
    assert "budget 52 of 52 tokens" in page_of(TASK, records)


def test_an_attention_may_be_expected_to_be_unsupported(settings):
    config = validate_config(settings(attentions=[{**POLICIES[0], "expect": "unsupported"}, POLICIES[1]]))
    assert TASK.expected(config) == {("language", "keydiff")}


def test_what_cannot_be_fetched_is_told(settings, monkeypatch):
    def offline(name):
        raise AssetError(f"{name} cannot be fetched")

    monkeypatch.setattr(lm, "load_tokenizer", offline)
    with pytest.raises(AssetError, match="cannot be fetched"):
        run(settings())


def test_records_hold_what_a_reader_needs_to_look_again(settings):
    """The answers, the NLL of each window, and which text it was."""
    records = run(settings(attentions=POLICIES[:1]))
    data = json.loads(records[0].model_dump_json())["quality"]
    assert len(data["window_nll"]) == 5
    assert len(data["text_sha256"]) == 64
    again = Perplexity.model_validate(data)
    assert again == records[0].quality

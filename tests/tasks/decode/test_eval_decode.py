import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import attnzoo
from attnzoo.cores.softmax import Softmax
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.eviction.cache import BoundedLayer
from attnzoo.eviction.size import CacheBytes
from attnzoo.registry import unregister_attention
from attnzoo.tasks.decode import canary
from attnzoo.tasks.decode import lm as decode
from attnzoo.tasks.decode import run as runner
from attnzoo.tasks.decode.config import DecodeConfig, load_config, validate_config
from attnzoo.tasks.decode.page import html_page
from attnzoo.tasks.decode.plan import canary_rows, quality_units, remaining
from attnzoo.tasks.decode.record import read_records, read_samples

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "eval" / "decode.py"
POLICIES = [
    {"name": "keydiff", "options": {"budget": 24, "block_size": 8}, "label": "keydiff"},
    {"name": "tova", "options": {"budget": 24, "block_size": 8}, "label": "tova"},
]


def content(saved, folder, **changes):
    model, text = saved
    return {
        "name": "tiny",
        "model": str(model),
        "text": str(text),
        "threads": 1,
        "attentions": POLICIES,
        "nll": {"windows": 4, "tokens": 96},
        "retrieval": {"tokens": 500, "samples": {"single": 3, "multi_value": 2}},
        "canary": {
            "windows": 2,
            "worse_by": 1e-4,
            "tiny": {"name": "streaming", "options": {"budget": 8, "block_size": 4}},
        },
        "output": str(folder),
        **changes,
    }


@pytest.fixture
def settings(saved, tmp_path):
    return lambda **changes: content(saved, tmp_path / "run", **changes)


@pytest.fixture(autouse=True)
def _lenient_canary(monkeypatch):
    """Random weights are not made worse by a small cache, only other: any change will do here."""
    original = canary.judge

    def judge(config, lines):
        lines = [
            line.model_copy(update={"nll": tuple(x + 1 for x in line.nll)}) if "streaming" in line.label else line
            for line in lines
            if line.task == "canary"
        ]
        return original(config, lines)

    monkeypatch.setattr(canary, "judge", judge)


def quiet():
    return Console(file=open(os.devnull, "w"))


def run(data):
    return runner.run(validate_config(data), "command", quiet())


def figures(records):
    """What must not depend on how the run was made."""
    return [r.model_dump(exclude={"utc", "seconds", "processes", "command", "cost", "environment"}) for r in records]


def test_a_run_gives_one_record_a_row_and_pairs_add_up(settings):
    records = run(settings(cost={"prompt_tokens": 64, "new_tokens": 2, "batches": [1, 2], "repeats": 1}))
    dense, keydiff, tova = records
    assert [r.label for r in records] == ["dense", "keydiff", "tova"]
    assert dense.is_baseline
    assert dense.nll.difference is None
    assert keydiff.nll.difference.mean == pytest.approx(keydiff.nll.mean - dense.nll.mean)
    assert sum(keydiff.nll.curve) / len(keydiff.nll.curve) == pytest.approx(keydiff.nll.difference.mean, abs=0.05)
    assert keydiff.nll.cache_ratio.entries == pytest.approx(24 / 96)
    assert [(k.kind, k.samples, k.asked) for k in tova.retrieval] == [("single", 3, 3), ("multi_value", 2, 6)]
    assert tova.cost.cache.held < tova.cost.cache_dense.held
    assert [b.batch for b in tova.cost.batches] == [1, 2]
    assert len(dense.canaries) == 3
    assert all(c.passed for c in dense.canaries)


def test_hits_are_counted_and_paired(settings, monkeypatch):
    """Dense finds every number, keydiff every second prompt's, tova none."""
    asked = []

    def answers(model, tokenizer, sample):
        asked.append(sample)
        hit = len(asked) % 3 == 1 or (len(asked) % 3 == 2 and sample.index % 2 == 0)
        return decode.Answer("", (hit,) * len(sample.answers), CacheBytes(1, 1, 1))

    monkeypatch.setattr(decode, "retrieve", answers)
    retrieval = {"tokens": 500, "samples": {"multi_value": 2, "single": 8}}
    dense, keydiff, tova = run(settings(retrieval=retrieval))
    assert [k.kind for k in dense.retrieval] == ["single", "multi_value"]
    assert [r.retrieval[0].hits for r in (dense, keydiff, tova)] == [8, 4, 0]
    assert [r.retrieval[1].recall for r in (dense, keydiff, tova)] == [1, 0.5, 0]
    assert keydiff.retrieval[0].difference.mean == -0.5
    assert -0.9 < keydiff.retrieval[0].difference.low < -0.5 < keydiff.retrieval[0].difference.high < -0.1
    assert tova.retrieval[0].p_value == pytest.approx(2 / 2**8)
    assert len(dense.retrieval[1].by_depth) == 6


def test_a_killed_run_goes_on_where_it_was(settings, monkeypatch):
    data = settings()
    whole = figures(run({**data, "output": str(Path(data["output"]) / "whole")}))
    left, original = [17], decode.nll

    def killed(model, ids):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(model, ids)

    monkeypatch.setattr(decode, "nll", killed)
    with pytest.raises(KeyboardInterrupt):
        run(data)
    folder = Path(data["output"])
    assert len(read_samples(folder)) == 17
    partial = runner.so_far(validate_config(data), "")
    assert [r.nll.windows for r in partial] == [3, 3, 3]
    assert partial[1].nll.difference.n == 3
    with open(folder / "samples.0.jsonl", "ab") as torn:
        torn.write(b'{"schema_version":1,"conf')
    left[0] = 10**6
    with pytest.warns(UserWarning, match="torn"):
        assert figures(run(data)) == whole
    lines = (folder / "samples.0.jsonl").read_text().splitlines()
    assert len(lines) == len(
        {json.dumps([json.loads(x)[k] for k in ("task", "kind", "sample", "label")]) for x in lines}
    )
    left[0] = 0  # a finished run runs nothing
    assert figures(run(data)) == whole


def test_a_run_cut_short_has_all_rows_of_its_samples(settings):
    units = quality_units(validate_config(settings()))
    assert all([row.label for row in unit.rows] == ["dense", "keydiff", "tova"] for unit in units)
    assert [(unit.kind, unit.sample) for unit in units[4:]] == [
        ("single", 0),
        ("multi_value", 0),
        ("single", 1),
        ("multi_value", 1),
        ("single", 2),
    ]
    (unit, *_) = remaining(units, {("nll", "", 0, "dense")})
    assert [row.label for row in unit.rows] == ["keydiff", "tova"]


def test_another_config_or_text_in_the_folder_is_refused_and_can_be_set_aside(settings, tmp_path):
    data = settings(retrieval=None)
    run(data)
    with pytest.raises(ConfigError, match="another config"):
        run({**data, "seed": 5})
    text = tmp_path / "text.txt"
    text.write_text(Path(data["text"]).read_text(), encoding="utf-8")
    moved = {**data, "text": str(text), "output": str(tmp_path / "moved")}
    run(moved)
    text.write_text("New. " + text.read_text(), encoding="utf-8")
    with pytest.raises(ConfigError, match="another text"):
        run(moved)
    assert len(run({**moved, "fresh": True})) == 3
    assert (tmp_path / "moved" / "samples.0.jsonl.old").exists()


@pytest.mark.parametrize(("label", "by"), [("streaming", -1.0), ("keydiff", 0.01)])
def test_a_canary_that_fails_leaves_no_result(settings, monkeypatch, label, by):
    original = runner._Runner._score

    def wrong(self, unit, row):
        made = original(self, unit, row)
        if label in row.label and unit.task == "canary":
            made["nll"] = tuple(x + by - 1 * ("streaming" in row.label) for x in made["nll"])
        return made

    monkeypatch.setattr(runner._Runner, "_score", wrong)
    data = settings(retrieval=None)
    with pytest.raises(canary.CanaryError, match=rf"{label}.*must be"):
        run(data)
    assert not (Path(data["output"]) / "records.jsonl").exists()


def test_every_method_has_one_canary_whatever_its_budgets(settings):
    twice = [*POLICIES, {"name": "tova", "options": {"budget": 48, "block_size": 8}}, {"name": "softmax"}]
    rows = canary_rows(validate_config(settings(attentions=twice)))
    assert [row.attention.options.get("budget") for row in rows[1:]] == [8, 96, 96, None]


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
        ({"retrieval": {"tokens": 500, "samples": {"triple": 1}}}, "multi_key"),
        ({"windows": 3}, "unknown key"),
        ({"canary": {"tiny": {"name": "strea"}}}, "streaming"),
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
    monkeypatch.setattr(decode, "load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = settings(**changes)
    with pytest.raises(ConfigError, match=message):
        run(data)
    assert not Path(data["output"]).exists()


def test_the_config_survives_its_own_yaml(settings, tmp_path):
    config = validate_config(settings())
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path).hash == config.hash
    assert load_config(path, ["seed=9"]).hash != config.hash
    assert load_config(path, ["output=elsewhere", "fresh=true"]).hash == config.hash


OTHERS = {"kvpress", "train_bytes"}  # of other scripts, whose tests read them
CONFIGS = sorted(path for path in (ROOT / "configs" / "decode").glob("*.yaml") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configs_of_the_repository_are_sound(path):
    assert isinstance(load_config(path), DecodeConfig)


def test_the_script_reports_a_table_and_a_page_and_refuses_with_2(settings, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings()), encoding="utf-8")
    assert main([str(path), "retrieval.samples.multi_value=1"]) == 0
    shown = capsys.readouterr().out
    assert "keydiff" in shown
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 6
    assert "Canaries" in page
    assert "http-equiv" not in page
    assert main(["--report", str(tmp_path / "run" / "records.jsonl")]) == 0
    assert main([str(path), "attentions.0.name=keydif"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["--report", str(tmp_path / "none.jsonl")]) == 2


def test_two_processes_give_what_one_gives(settings, tmp_path):
    data = settings()
    alone = figures(run({**data, "output": str(tmp_path / "one")}))
    path, script = tmp_path / "tiny.yaml", tmp_path / "two.py"
    path.write_text(yaml.safe_dump({**data, "output": str(tmp_path / "two")}, sort_keys=False), encoding="utf-8")
    script.write_text(
        "import sys\n"
        "from attnzoo.tasks.decode import canary, run\n"
        "from attnzoo.tasks.decode.config import load_config\n"
        "canary.judge, judge = (lambda c, l: judge(c, [x.model_copy(update={'nll': tuple(y + 1 for y in x.nll)})\n"
        "    if 'streaming' in x.label else x for x in l if x.task == 'canary'])), canary.judge\n"
        "run.run(load_config(sys.argv[1]), 'command')\n",
        encoding="utf-8",
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(script), str(path)], capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "two"
    assert {p.name for p in folder.glob("samples.*.jsonl")} == {"samples.0.jsonl", "samples.1.jsonl"}
    records = read_records(folder / "records.jsonl")
    assert records[0].processes == 2
    assert figures(records) == alone
    (folder / "samples.1.jsonl").unlink()  # half of the work is lost, and one process does it again
    assert figures(run({**data, "output": str(folder)})) == alone


COST = {"prompt_tokens": 64, "new_tokens": 2, "batches": [1], "repeats": 1}


def interrupt_before_timings(monkeypatch, data):
    """Run all but the timings, as a process that is interrupted then."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "measure_cost", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data)


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


@pytest.mark.parametrize(("dtype", "row"), [("float32", 0), ("bfloat16", 1)])
def test_a_run_that_goes_on_checks_a_core_again_before_it_is_timed(settings, monkeypatch, faulty, dtype, row):
    rows = [{"name": "faulty"}, POLICIES[0]][:: 1 if row == 0 else -1]
    data = settings(attentions=rows, cost=COST, retrieval=None, dtype=dtype)
    interrupt_before_timings(monkeypatch, data)
    faulty()
    with pytest.raises(AttnZooError, match="faulty: the gate did not pass, so nothing was timed"):
        run(data)
    timed = [line.label for line in read_samples(Path(data["output"])) if line.task == "cost"]
    assert timed == ["dense", "keydiff"][: 1 + row]


def test_a_run_that_goes_on_checks_a_policy_again_before_it_is_timed(settings, monkeypatch):
    """The bounded cache of the later process returns values that are off."""
    data = settings(attentions=[POLICIES[1]], cost=COST, retrieval=None)
    interrupt_before_timings(monkeypatch, data)
    original = BoundedLayer.update

    def off(self, keys, values, *args, **kwargs):
        return original(self, keys, values * 1.5, *args, **kwargs)

    monkeypatch.setattr(BoundedLayer, "update", off)
    with pytest.raises(AttnZooError, match="tova: the gate did not pass"):
        run(data)
    assert "tova" not in [line.label for line in read_samples(Path(data["output"])) if line.task == "cost"]


def test_the_record_and_the_page_carry_the_gate_of_what_was_timed(settings, monkeypatch):
    data = settings(attentions=[POLICIES[0]], cost=COST, retrieval=None)
    interrupt_before_timings(monkeypatch, data)
    records = run(data)
    for record in records:
        assert record.cost.gate.passed
        assert record.cost.baseline_gate.passed
    assert "budget 52 of 52 tokens" in records[1].cost.gate.oracle
    assert "budget 52 of 52 tokens" in html_page(records)


def test_timings_without_a_gate_are_made_again(settings):
    data = settings(attentions=[POLICIES[0]], cost=COST, retrieval=None)
    run(data)
    path = Path(data["output"]) / "samples.0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for key in ("gate", "baseline_gate"):
            (line["cost"] or {}).pop(key, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert all(record.cost.gate.passed for record in run(data))
    assert len(path.read_text().splitlines()) == len(lines) + 2

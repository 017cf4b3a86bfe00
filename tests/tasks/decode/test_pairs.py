"""Rows set against each other, divergence from dense, and what dense itself cannot do: end to end and one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from attnzoo.bench import page
from attnzoo.bench.page import page_of
from attnzoo.bench.stats import paired_difference
from attnzoo.bench.task import Task
from attnzoo.errors import ConfigError
from attnzoo.eviction.size import CacheBytes
from attnzoo.tables import Section
from attnzoo.tasks import suite
from attnzoo.tasks.decode import lm, pairs
from attnzoo.tasks.decode.config import paired_labels, validate_config
from attnzoo.tasks.decode.needles import Sample
from attnzoo.tasks.decode.pairs import pairs_table
from attnzoo.tasks.decode.plots import position_plots
from attnzoo.tasks.decode.quality import perplexity_of, retrieval_of
from attnzoo.tasks.decode.task import TASK, Record
from eval import decode
from tests.tasks.decode.test_eval_decode import by, content, run

ROWS = [
    {"name": name, "options": {"budget": budget, "block_size": 12}, "label": f"{name} {budget}"}
    for budget in (12, 24)
    for name in ("h2o", "caote")
]
ASKED = {
    "attentions": ROWS,
    "pairs": [["caote", "h2o"], ["h2o 12", "dense"]],
    "nll": {"windows": 5, "tokens": 60, "scored": 20, "kl": True},
    "retrieval": {"tokens": 280, "samples": {"single": 2}},
}


@pytest.fixture(scope="module")
def measured(saved, tmp_path_factory):
    """The records of a run, and its config."""
    data = content(saved, tmp_path_factory.mktemp("pairs") / "run", **ASKED)
    return run(data), data


def cells(table):
    return {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}


def test_pairs_are_set_against_each_other_window_by_window(measured):
    records, data = measured
    quality = {key[:2]: record.quality for key, record in by(records).items()}
    shown = cells(pairs_table(records, data))
    assert list(shown) == ["caote 12 - h2o 12", "caote 24 - h2o 24", "h2o 12 - dense"]
    one, other = quality["caote 12", ""], quality["h2o 12", ""]
    nll, kl = (paired_difference(*of) for of in ((one.window_nll, other.window_nll), (one.window_kl, other.window_kl)))
    assert nll.mean == pytest.approx(one.nll - other.nll)
    assert shown["caote 12 - h2o 12"][0] == f"{nll.mean:+.3f} ({nll.low:+.3f} to {nll.high:+.3f})"
    assert shown["caote 12 - h2o 12"][1] == f"{kl.mean:+.3f} ({kl.low:+.3f} to {kl.high:+.3f})"
    assert shown["h2o 12 - dense"][0] == f"{other.difference.mean:+.3f} ({other.difference.low:+.3f} to " + (
        f"{other.difference.high:+.3f})"
    )
    assert shown["h2o 12 - dense"][1] == "-", "dense is not compared with itself"
    held = paired_difference(quality["caote 12", "pass key"].held, quality["h2o 12", "pass key"].held)
    assert shown["caote 12 - h2o 12"][3].startswith(f"{held.mean:+.3f} (")


def test_tables_that_would_not_fit_a_page_come_one_below_the_other(measured, monkeypatch):
    records, data = measured
    wide = pairs_table(records, data)
    monkeypatch.setattr(pairs, "MOST_COLUMNS", 2)
    long = pairs_table(records, data)
    assert [row.title for row in long.rows if isinstance(row, Section)] == [
        column.head.removesuffix(" (95%)") for column in wide.columns[1:]
    ]
    for row in wide.rows:
        under = [one.cells[1] for one in long.rows if not isinstance(one, Section) and one.cells[0] == row.cells[0]]
        assert under == list(row.cells[1:])
    before = page_of(TASK, records).count("<table>")
    monkeypatch.setattr(page, "SIDE_BY_SIDE", 1)
    assert page_of(TASK, records).count("<table>") == before + 1, "one of prose, one of the pass key"


def test_the_table_needs_records_and_config_alone(measured, capsys):
    """The command and the page show it out of files."""
    records, data = measured
    again = [Record.model_validate_json(record.model_dump_json()) for record in records]
    assert cells(pairs_table(again, data)) == cells(pairs_table(records, data))
    assert decode.main(["--report", str(Path(data["output"]) / "records.jsonl")]) == 0
    assert "caote 24 - h2o 24" in capsys.readouterr().out
    assert "caote 24 - h2o 24" in (Path(data["output"]) / "report.html").read_text(encoding="utf-8")
    assert "Pairs" not in page_of(TASK, records)
    assert "Pairs" not in page_of(TASK, records, yaml.safe_dump({**data, "pairs": []}))
    language = yaml.safe_dump({"language": {"pairs": data["pairs"]}})
    assert "caote 24 - h2o 24" in page_of(suite.TASK, records, language)


def test_a_task_without_pairs_has_no_table(measured):
    task = Task(name="a", ref="", config=TASK.config, plan=TASK.plan, measure=TASK.measure)
    assert task.pairs(measured[0], measured[1]) is None


def test_the_divergence_of_each_window_is_in_the_records(measured):
    quality = {key[:2]: record.quality for key, record in by(measured[0]).items()}
    assert (quality["dense", ""].kl, quality["dense", ""].window_kl) == (None, ())
    small, large = quality["h2o 12", ""], quality["h2o 24", ""]
    assert len(small.window_kl) == 5
    assert small.kl.mean == pytest.approx(sum(small.window_kl) / 5)
    assert small.kl.mean > large.kl.mean > 0
    assert "KL to dense (95%)" in small.details


def test_a_divergence_that_is_not_finite_is_told(saved, tmp_path, monkeypatch):
    original = lm.nll

    def broken(model, ids, scored, step, dense):
        found = original(model, ids, scored, step, dense)
        return replace(found, kl=(found.kl[0], float("inf"), *found.kl[2:]) if dense is not None else ())

    monkeypatch.setattr(lm, "nll", broken)
    data = content(saved, tmp_path / "run", attentions=ROWS[:1], retrieval=None)
    records = by(run({**data, "nll": {"windows": 2, "tokens": 40, "kl": True}}))
    failed = records["h2o 12", "", "forward"]
    assert (failed.status, failed.quality) == ("failed", None)
    assert failed.message == "h2o 12 gives a KL to dense that is not finite at token 2 of window 1"
    assert records["dense", "", "forward"].status == "ok"


def test_records_without_the_divergence_are_kept_where_it_is_not_asked_for(saved, tmp_path):
    """It was added later: what rows depend on is as it was, and of dense even where it is asked for."""
    data = content(saved, tmp_path / "run", retrieval=None)
    plan = {cell.label: cell.measured for cell in TASK.plan(validate_config(data))}
    with_kl = validate_config({**data, "nll": {**data["nll"], "kl": True}})
    changed = {cell.label for cell in TASK.plan(with_kl) if plan[cell.label] != cell.measured}
    assert changed == {"keydiff", "tova"}
    assert all("kl" not in cell.depends_on["nll"] for cell in TASK.plan(validate_config(data)))


@pytest.mark.parametrize(
    ("pair", "found"),
    [
        (("a", "b"), [("a", "b"), ("a 2", "b 2")]),
        (("a 2", "b"), [("a 2", "b")]),
        (("a", "c"), []),
        (("a fast", "b"), [("a fast 2", "b 2")]),
        (("ab", "b"), []),
    ],
)
def test_a_pair_names_two_rows_or_all_that_begin_so(pair, found):
    assert paired_labels([pair], ["a", "b", "a 2", "a fast 2", "b 2", "a 3", "abc"]) == found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pairs": [["caote", "h2o"], ["caote", "tova"]]}, "pairs.1: no two rows are 'caote' and 'tova'.*rows: dense"),
        ({"pairs": [["h2o", "h2o"]]}, "pairs.0: no two rows are"),
        ({"pairs": [["caote"]]}, "pairs"),
        ({"pairs": "caote h2o"}, "must be a list"),
        ({"nll": {"windows": 5, "tokens": 80, "step": 1}}, "set nll.scored"),
        ({"nll": {"windows": 5, "tokens": 80, "scored": 8, "step": 0}}, "nll.step"),
    ],
)
def test_what_cannot_be_paired_or_stepped_is_refused(saved, tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        validate_config(content(saved, tmp_path / "run", **{**ASKED, **changes}))


def test_decoding_a_window_says_so(saved, tmp_path):
    data = content(saved, tmp_path / "run", attentions=ROWS[:1], retrieval=None)
    stepped = run({**data, "nll": {"windows": 2, "tokens": 60, "scored": 20, "step": 1}})
    whole = run({**data, "nll": {"windows": 2, "tokens": 60, "scored": 20}, "output": str(tmp_path / "whole")})
    for one, other in zip(stepped, whole, strict=True):
        assert one.quality.note.endswith("the last 20 scored, one by one of " + data["text"] + ", float32")
        assert one.quality.window_nll == pytest.approx(other.quality.window_nll, abs=1e-4)


def asked(hits, held, kind="two_hop"):
    samples = [Sample(kind, index, (1, 2), ("1",), (0.5,), 0, "") for index in range(len(hits))]
    answers = [lm.Answer("", (hit,), CacheBytes(1, 1, 1), share) for hit, share in zip(hits, held, strict=True)]
    return retrieval_of(samples, answers, "")


def test_a_kind_at_which_dense_itself_fails_is_flagged():
    good, bad = asked([True] * 6 + [False] * 2, [None] * 8), asked([True] * 5 + [False] * 3, [None] * 8)
    policy = asked([False] * 8, [0.25] * 4 + [0.5] * 4)
    cells = policy.against(good).details
    assert cells["two hops to dense (95%)"].text.startswith("-0.750 (")
    assert cells["two hops, % (95%)"].verdict == "worse"
    assert cells["two hops held, %"] == "37.5"
    assert "Dense itself" not in policy.against(good).remark
    cells = policy.against(bad).details
    assert cells["two hops to dense (95%)"].text == "dense fails"
    assert cells["two hops, % (95%)"].verdict == "same"
    better = asked([True] * 8, [0.75] * 8)
    judged = [better.against(dense).minus(policy.against(dense)) for dense in (good, bad)]
    assert [[cell[1] for cell in one.values()] for one in judged] == [["better", "better"], ["same", "better"]]
    assert policy.against(good).figure == "0 (0-32)"
    assert policy.against(bad).figure == "0 (0-32), dense 62%"
    assert bad.as_dense().figure == "62 (31-86)"
    assert bad.as_dense().details["two hops to dense (95%)"].text == "dense fails"
    assert "Dense itself finds 62%, less than 75%" in bad.as_dense().remark
    assert good.as_dense().details["two hops held, %"] == "-"


def test_windows_of_two_texts_are_not_paired():
    score = [lm.Scored((1.0, 2.0), CacheBytes(1, 1, 1))] * 5
    one = perplexity_of(score, "").model_copy(update={"text_sha256": "a"})
    assert set(one.minus(one)) == {"NLL"}
    assert one.minus(one.model_copy(update={"text_sha256": "b"})) == {}
    assert one.minus(one.model_copy(update={"window_nll": ()})) == {}


def test_kinds_of_needles_end_to_end(saved, tmp_path):
    """Each has a title, an answer per thing asked for, and the share of its needles that was held."""
    titles = {"4 questions": ("several", 4), "tracking": ("tracking", 3), "question first": ("question_first", 1)}
    rows = [{"name": "streaming", "options": {"budget": 24, "block_size": 24}, "label": "streaming"}]
    asked = {"tokens": 640, "samples": {kind: 1 for kind, _ in titles.values()}}
    nll = {"windows": 2, "tokens": 60}
    found = by(run(content(saved, tmp_path / "run", attentions=rows, retrieval=asked, nll=nll)))
    for title, (_, count) in titles.items():
        row = found["streaming", title, "forward"].quality
        assert len(row.by_depth) == count
        assert row.held == (0.0,)
        assert row.dense_recall == found["dense", title, "forward"].quality.recall
        assert found["dense", title, "forward"].quality.held == ()


@pytest.mark.parametrize(("budget", "told"), [(1200, "1,200"), (0.125, "12.5%"), ("64MiB", "64MiB")])
def test_curves_are_drawn_at_any_kind_of_budget(measured, budget, told):
    options = {"budget": budget}
    rows = [record.model_copy(update={"options": options}) for record in measured[0] if record.label == "h2o 12"]
    captions = [caption for caption, _ in position_plots([(row, row.quality) for row in rows if not row.workload])]
    assert captions == [f"NLL above dense along the window, budget {told}"]

"""The results page of the committed records: whole, traced to its records, and never made of broken ones."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from functools import cache
from html import unescape
from pathlib import Path

import pytest
import yaml

from attnzoo import list_attentions, register_attention
from attnzoo.bench import results, words
from attnzoo.bench.highlights import QUALITY, SPEED, Figure, Highlight, Source
from attnzoo.registry import describe, unregister_attention
from attnzoo.tasks import TASKS, suite
from attnzoo.tasks.results import COLUMNS, gather
from eval.report import main
from tests.bench.data import cost, record_data
from tests.bench.test_report import Balance

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs/records"
COMMAND = "python eval/report.py docs/records"
FIGURES = [head for head in results.CSV_HEADS if head.startswith(("quality", "speed", "peak", "cache"))]
TOY = replace(suite.TASK, name="toy", ref="tests.bench.test_results:TOY", highlights=None)


class Page(Balance):
    VOID = Balance.VOID | {"input"}


@pytest.fixture(scope="module")
def sources():
    return gather(RECORDS)


@pytest.fixture(scope="module")
def page(sources):
    return results.html(sources, COLUMNS, RECORDS, COMMAND)


@pytest.fixture(scope="module")
def lines(sources):
    return read_csv(results.csv(sources, COLUMNS, RECORDS))


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def figures(line):
    return [float(line[head]) if line[head] else None for head in FIGURES]


@cache
def json_lines(name):
    return [json.loads(line) for line in (RECORDS / name).read_text(encoding="utf-8").splitlines()]


def test_the_committed_page_and_table_are_those_of_the_committed_records(page, sources):
    assert (RECORDS / "results.html").read_text(encoding="utf-8") == page
    assert (RECORDS / "results.csv").read_text(encoding="utf-8") == results.csv(sources, COLUMNS, RECORDS)


def test_every_method_and_every_task_is_on_the_page(page, lines):
    assert re.findall(r"<td class=\"text\"><b>(\w+)</b>", page) == list_attentions()
    assert tuple(re.findall(r'<th class="text" data-task="(\w+)"', page)) == COLUMNS
    assert set(TASKS) - {"suite", "kvpress", "train_bytes", "model"} <= set(COLUMNS)  # under decode; a user's own
    assert {(line["method"], line["kind"]) for line in lines} == {(n, describe(n).kind) for n in list_attentions()}
    assert {line["task"] for line in lines} == set(COLUMNS)
    empty = re.findall(r'<td class="text none soft" data-task="\w+" data-head="\w+">not measured</td>', page)
    assert len(empty) == sum(line["status"] == "not measured" for line in lines) > 0


def test_a_method_that_no_record_measured_is_on_the_page_too(sources):
    register_attention("unseen", "mixer", "attnzoo.mixers.padre:Padre", summary="<new>")
    try:
        text = results.html(sources, COLUMNS, RECORDS, COMMAND)
        rows = [line for line in read_csv(results.csv(sources, COLUMNS, RECORDS)) if line["method"] == "unseen"]
    finally:
        unregister_attention("unseen")
    assert [(line["task"], line["status"]) for line in rows] == [(task, "not measured") for task in COLUMNS]
    body = text.partition("<b>unseen</b>")[2].partition("</tbody>")[0]
    assert body.count("not measured") == len(COLUMNS)
    assert "&lt;new&gt;" in body
    assert "Not measured in any: unseen." in text


def test_the_page_needs_nothing_else_and_its_links_exist(page, lines):
    parsed = Page()
    parsed.feed(page)
    assert not parsed.open
    assert not parsed.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\((?!#)|@import|https?:|\bsrc=|\bon\w+=", page)
    links = {unescape(link) for link in parsed.loads}
    assert links > {line[which] for line in lines for which in ("page",) if line[which]}
    for link in links - {"results.csv", "policies.csv"}:
        assert (RECORDS / link).is_file(), link
    assert all((RECORDS / line["record"]).is_file() for line in lines if line["record"])
    for path in RECORDS.rglob("*.jsonl"):  # a file that holds something else than methods is listed
        name = path.relative_to(RECORDS).as_posix()
        assert name in {line["record"] for line in lines} or f">{name}</a>" in page


def test_filters_hide_by_attributes_alone(page):
    for name, choices in (("task", COLUMNS), ("kind", ("core", "mixer", "eviction"))):
        for choice in choices:
            rule = (
                f'main:has(input[name="{name}"][value="{choice}"]:checked) [data-{name}]:not([data-{name}~="{choice}"])'
            )
            assert f"{rule} {{ display: none; }}" in page
            assert f'<input type="radio" name="{name}" value="{choice}">' in page
            assert re.search(rf'data-{name}="[^"]*\b{choice}\b', page.partition("</style>")[2])


def expected(line):
    """The figures of a line of the table, out of the lines of its record: quality, its ends, speed, its ends, needs."""
    rows = json_lines(line["record"])
    name = line["record"]
    rows = [row for row in rows if row["label"] == line["setting"] and line["measured (UTC)"] == row["utc"]]
    row = next(row for row in reversed(rows) if told(line, row))
    assert row["attention"] in (line["method"], None)
    spread = row["cost"] and (row["cost"].get("ratios") or row["cost"])["speedup"]
    speed = (
        [spread[q] if q == "p50" or spread["n"] >= 5 else None for q in ("p50", "p20", "p80")] if spread else [None] * 3
    )
    if name == "gpu_kernels.jsonl":
        assert line["method"] == {"module": "padre", "scored": "flash_scored"}[row["options"]["op"]]
        return [None] * 3 + speed + [None] * 2
    if row.get("task") == "export":
        return [None] * 3 + speed + [None] * 2
    if row["kind"] == "quality":
        ratio = [row["quality"][key] for key in ("ratio", "ratio_low", "ratio_high")]
        cache, dense = (row["quality"].get(key) for key in ("cache", "cache_dense"))
        return [*ratio, *[None] * 4, cache["held"] / dense["held"] if cache else None]
    ratios = row["cost"]["ratios"]
    peak = ratios["activation_peak"] if ratios["activation_peak"] is not None else ratios["allocator_peak"]
    return [None] * 3 + speed + [peak, ratios.get("cache_held")]


def told(line, row):
    """Whether a line of the table says of its workload what a record is of."""
    words = {"forward": "forward, ", "training": "forward and backward", "prefill": "prefill", "decode": "decode"}
    if row.get("task") == "operations":
        return True
    if row.get("task") == "export":
        return line["tokens"] == str(row["tokens"])
    workload, _, budget = line["workload"].partition(", budget ")
    if budget and int(budget) != row["options"]["budget"]:
        return False
    if row["kind"] == "quality":
        host = row["host"].partition(":")[2]
        return row["quality"] is not None and workload.endswith(row["quality"]["note"].removeprefix(host))
    size = [f"{row['tokens']:,} tokens", row.get("workload"), f"batch {row['shapes']['batch']}"]
    told = ", ".join(filter(None, dict.fromkeys(size)))
    return words[row["phase"]] in workload and f"{told}, " in workload


def test_the_policies_are_told_apart_by_what_was_asked(lines):
    """Perplexity and pass keys of every setting, each beside the dense cache."""
    prose = [line for line in lines if line["record"] == "prose.jsonl"]
    told = {line["workload"].partition(":")[0] for line in prose}
    assert told == {"perplexity", "pass key"}
    assert {line["tokens"] for line in prose} == {"2000"}
    for line in prose:
        (row,) = (
            row
            for row in json_lines("prose.jsonl")
            if row["label"] == line["setting"] and bool(row["workload"]) == line["workload"].startswith("pass key")
        )
        (dense,) = (r for r in json_lines("prose.jsonl") if r["is_baseline"] and r["workload"] == row["workload"])
        assert row["options"] == json.loads(line["options (JSON)"])
        own, base = row["quality"], dense["quality"]
        kept = base["perplexity"] / own["perplexity"] if "perplexity" in own else own["recall"] / base["recall"]
        assert figures(line)[0] == pytest.approx(kept, rel=1e-5)
        assert figures(line)[-1] == pytest.approx(own["cache"]["held"] / base["cache"]["held"], rel=1e-5)


def test_every_figure_is_that_of_its_record(lines):
    for line in lines:
        if line["status"] == "not measured":
            continue
        for found, wanted in zip(figures(line), expected(line), strict=True):
            assert wanted is ... or found == (None if wanted is None else pytest.approx(wanted, rel=1e-5)), line


def test_nothing_that_was_measured_is_missing(lines):
    """Every last line of a record that is of a method, but for the controls of a repair."""
    count = 0
    for path in RECORDS.rglob("*.jsonl"):
        rows = json_lines(path.relative_to(RECORDS))
        if "part" in rows[0]:
            last = {
                tuple(row.get(key, "") for key in ("part", "kind", "phase", "label", "tokens", "workload")): row
                for row in rows
            }.values()
            count += sum(
                row["attention"] is not None or row["options"].get("op") in ("module", "scored")
                for row in last
                if not row["label"].endswith("from scratch") and not (row["quality"] or {}).get("control")
            )
    assert count == sum(line["status"] != "not measured" for line in lines)


def shown(text):
    """The number and its ends in a figure's text."""
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_page_shows_what_the_table_says(page, lines):
    measured = [line for line in lines if line["status"] != "not measured"]
    methods = re.findall(r"<tbody data-kind=.*?\n</tbody>\n(?=<tbody data-kind|</table>)", page, re.DOTALL)
    assert len(methods) == len(list_attentions())
    rows = [row for method in methods for row in re.findall(r'^<tr data-task="(\w+)">(.*)</tr>$', method, re.MULTILINE)]
    assert len(rows) == len(measured)
    for (task, row), line in zip(rows, measured, strict=True):
        cells = [unescape(re.sub(r"<[^>]+>", " ", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        assert (task, cells[0].strip()) == (line["task"], line["setting"])
        assert all(line[head] in cells[-1] for head in ("model", "workload", "machine"))
        values = [value for value in figures(line) if value is not None]
        assert [number for cell in cells[1:-1] for number in shown(cell)] == pytest.approx(values, abs=0.00501)
        assert set(re.findall(r'href="([^"]+)"', row)) == {line["page"]}


def test_the_first_view_is_out_of_the_same_rows(page):
    for method in re.findall(r"<tbody data-kind=.*?\n</tbody>\n(?=<tbody data-kind|</table>)", page, re.DOTALL):
        first, _, folded = method.partition('<tr class="more">')
        for figure in re.findall(
            r'<div class="figure"><span>[\w -]+</span> <a (href="[^"]+") class="\w+">(.+?)</a>', first
        ):
            assert any(figure[0] in row and figure[1] in row for row in folded.splitlines()), figure


def highlight(method="padre", label="", workload="forward", figure=1.5, measure=SPEED, **changes):
    one = Highlight("classify", method, label or method, "vit", workload, "a CPU", figures={measure: Figure(figure)})
    return replace(one, **changes)


def first_view(tmp_path, *highlights):
    made = results.html([Source(tmp_path / "a.jsonl", highlights)], ("classify",), tmp_path, "make")
    return re.findall(r'class="\w+">([^<]+)</a></div>', made)


def test_a_whole_model_comes_before_a_layer_alone_of_more_tokens(tmp_path):
    layer = highlight(workload="a layer", tokens=4096, figure=9.0, typical=False)
    assert first_view(tmp_path, layer, highlight(tokens=64)) == ["1.50x"]
    assert first_view(tmp_path, layer) == ["9.00x"]


def test_the_largest_size_at_which_half_of_the_methods_were_measured_comes_first(tmp_path):
    small = [highlight(method, workload="small", tokens=64) for method in ("padre", "conv", "sima", "hyena")]
    large = highlight(workload="large", tokens=1024, figure=3.0)
    assert first_view(tmp_path, *small, large) == ["1.50x"] * 4
    assert (
        first_view(tmp_path, *small, large, highlight("conv", workload="large", tokens=1024))
        == ["3.00x"] + ["1.50x"] * 3
    )


def test_the_setting_nearest_to_the_defaults_and_the_narrower_interval_come_first(tmp_path):
    settings = [highlight(label=f"degree {d}", options={"degree": d}, figure=float(d)) for d in (1, 2, 3, 4)]
    assert first_view(tmp_path, *settings) == ["3.00x"]
    wide = highlight(workload="wide", measure=QUALITY, figures={QUALITY: Figure(0.9, 0.5, 1.5)})
    narrow = highlight(workload="narrow", measure=QUALITY, figures={QUALITY: Figure(0.8, 0.75, 0.85)})
    assert first_view(tmp_path, wide, narrow) == ["0.80x (0.75-0.85)"]


def test_a_row_that_did_not_end_well_is_told(tmp_path):
    broken = highlight(status="oom", message="no <memory>", figures={})
    source = Source(tmp_path / "a.jsonl", (broken,))
    made = results.html([source], ("classify",), tmp_path, "make")
    assert made.count(">oom<") == 2
    assert "no &lt;memory&gt;" in made
    assert [line["status"] for line in read_csv(results.csv([source], (), tmp_path)) if line["record"]] == ["oom"]
    without = Source(tmp_path / "a.jsonl", (highlight(figures={}),))
    assert results.html([without], ("classify",), tmp_path, "make").count(">no ratio to dense<") == 2


def seen(tmp_path, method, *highlights):
    """What the first view says of a method, by name."""
    made = results.html([Source(tmp_path / "a.jsonl", highlights)], ("classify",), tmp_path, "make")
    first = made.partition(f"<b>{method}</b>")[2].partition("<details>")[0]
    return dict(re.findall(r"<span>([\w -]+)</span> (?:<a [^>]+>)?([^<]+)<", first))


KEPT = highlight(workload="top-1: digits", measure=QUALITY, figure=0.9)


@pytest.mark.parametrize("status", ["oom", "timeout"])
def test_what_failed_is_not_called_not_measured(tmp_path, status):
    conv = replace(KEPT, method="conv", label="conv")
    fails = highlight("conv", phase="forward", status=status, message="why", figures={})
    others = [KEPT, highlight(phase="forward")]
    assert seen(tmp_path, "conv", *others, conv, fails) == {"top-1 kept": "0.90x", "speed-up": status}
    assert seen(tmp_path, "conv", *others, conv) == {"top-1 kept": "0.90x", "speed-up": "not measured"}
    lost = replace(fails, phase=None, workload="digits")
    found = seen(tmp_path, "conv", *others, lost, highlight("conv", phase="forward"))
    assert found == {"quality kept": status, "speed-up": "1.50x"}


def test_every_policy_stands_beside_the_others_at_its_budget(page, sources, lines):
    table = read_csv(results.policies_table(sources, RECORDS).csv())
    assert {line["method"] for line in lines if line["budget"]} == set(list_attentions("eviction"))
    groups, at = {}, {}
    for line in lines:
        budget = words.budget(yaml.safe_load(line["budget"] or "0"))
        at.setdefault((line["record"], line["setting"], budget), []).append(line)
    for row in table:
        assert f"budget {row['budget']}" in row["section"]
        assert row["section"].endswith("entries per head") == row["budget"].replace(",", "").isdigit()
        groups.setdefault((row["section"], row["record"]), []).append(row)
        own = at.get((f"{row['record']}.jsonl", row["policy"], row["budget"]), [])
        for head, which, starts in (
            ("perplexity kept", "quality", "perplexity"),
            ("pass key kept", "quality", "pass key"),
            ("speed-up, prefill", "speed", "prefill"),
            ("speed-up, decode", "speed", "decode"),
        ):
            known = [line for line in own if line["workload"].startswith(starts)]
            assert bool(row[head]) is bool(known), (row, head)
            if known:
                names = [name for name in FIGURES if name.startswith(which)]
                values = [float(known[0][name]) for name in names if known[0][name]]
                assert shown(row[head]) == pytest.approx(values, abs=0.00501)
    assert sum(map(len, groups.values())) == len(table) >= 2 * len(list_attentions("eviction"))
    assert {re.split("[ ,]", row["policy"])[0] for row in table} == set(list_attentions("eviction"))
    for rows in groups.values():
        kept = [shown(row["perplexity kept"])[0] for row in rows if row["perplexity kept"]]  # or only cost was measured
        assert [round(value, 2) for value in kept] == sorted((round(value, 2) for value in kept), reverse=True)
    assert '<div id="policies"' in page
    assert (RECORDS / "policies.csv").read_text(encoding="utf-8") == results.policies_table(sources, RECORDS).csv()


def policy(method, budget, workload, figure=0.9, measure=QUALITY, **changes):
    one = highlight(method, workload=workload, figure=figure, measure=measure, options={"budget": budget}, **changes)
    return replace(one, task="decode")


def test_policies_of_two_budgets_do_not_mix_and_a_row_without_a_figure_says_why(tmp_path):
    found = [
        *(
            policy(name, budget, "perplexity: prose", kept)
            for budget in (64, 128)
            for name, kept in (("h2o", 0.8), ("tova", 0.9))
        ),
        policy("h2o", 64, "pass key: prose", 0.5),
        policy("h2o", 64, "decode, batch 1", 2.0, SPEED, phase="decode"),
        policy("h2o", 64, "decode, batch 8", 4.0, SPEED, phase="decode"),
        policy(
            "tova", 64, "decode, batch 1", measure=SPEED, phase="decode", status="oom", message="no\nmemory", figures={}
        ),
    ]
    source = Source(tmp_path / "a.jsonl", tuple(found))
    rows = read_csv(results.policies_table([source], tmp_path).csv())
    cells = [
        (row["policy"], row["budget"], row["perplexity kept"], row["pass key kept"], row["speed-up, decode"])
        for row in rows
    ]
    assert cells == [
        ("tova", "64", "0.90x", "-", "oom"),
        ("h2o", "64", "0.80x", "0.50x", "2.00x"),
        ("tova", "128", "0.90x", "", ""),
        ("h2o", "128", "0.80x", "", ""),
    ]
    (most,) = [head for head in read_csv(results.policies_table([source], tmp_path, 1).csv())[0] if "kept" in head]
    assert most == "perplexity kept", "which four rows have; one has a pass key"
    made = results.html([source], ("decode",), tmp_path, "make")
    assert "<small>not measured</small>" in made
    assert "<small>no memory</small>" in made
    assert "<small>4.00x batch 8</small>" in made
    first = made[made.index("<b>h2o</b>") : made.index("all 5 measurements of h2o")]
    assert re.findall(r"<span>([\w -]+)</span> <a [^>]+>([^<]+)<", first) == [
        ("perplexity kept", "0.80x"),
        ("pass key kept", "0.50x"),
        ("speed-up", "2.00x"),
    ]
    assert "budget 64" in first
    assert [line["budget"] for line in read_csv(results.csv([source], (), tmp_path)) if line["method"] == "tova"] == [
        "64",
        "128",
        "64",
    ]


def test_better_or_worse_is_not_rounded_to_the_same():
    assert Figure(0.997, 0.994, 0.999, "worse").text == "0.997x (0.994-0.999)"
    assert Figure(0.997, 0.994, 1.002).text == "1.00x (0.99-1.00)"


def test_the_rows_of_a_new_task_have_a_column_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "toy", "tests.bench.test_results:TOY")
    row = record_data(task="toy", label="conv", attention="conv", is_baseline=False, cost=cost(2.0))
    (tmp_path / "toy.jsonl").write_text(json.dumps(row) + "\n")
    assert main([str(tmp_path)]) == 0
    (line,) = (
        line for line in read_csv((tmp_path / "results.csv").read_text()) if line["task"] == "toy" and line["record"]
    )
    assert (line["method"], figures(line)) == ("conv", [None] * 3 + [2.0, 1.96, 2.04, 1.0, None])
    assert '<input type="radio" name="task" value="toy">' in (tmp_path / "results.html").read_text()


GOOD = record_data(label="conv", attention="conv", is_baseline=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1}\n', "no known kind"),
        ("", "empty"),
        ("[1]\n", "not a record"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:200], "cut off"),
        (b"\xff\xfe\n", "cannot be read"),
        (json.dumps({**GOOD, "task": "clasify"}) + "\n", "unknown"),
        (json.dumps({**GOOD, "surplus": 1}) + "\n", "not a record of schema"),
        (json.dumps({**GOOD, "attention": "pader"}) + "\n", "'pader'"),
        (json.dumps({"kernel": "a", "case": "b", "registers": 1}) + '\n{"kernel": "a"}\n', "line 2: it lacks case"),
        (json.dumps({"task": "decode", "label": "x"}) + "\n", "not a record of schema"),
        (json.dumps({"kind": "run", "config": {}, "text_sha256": ""}) + "\n", "no known kind"),
    ],
)
def test_a_file_that_is_broken_or_unknown_is_named_and_nothing_is_written(content, says, tmp_path, capsys):
    shutil.copy(RECORDS / "train_bytes.jsonl", tmp_path)
    bad = tmp_path / "runs" / "bad.jsonl"
    bad.parent.mkdir()
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(bad) in said
    assert says in said
    assert not (tmp_path / "out").exists()
    bad.unlink()
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert 'href="../train_bytes.jsonl"' in (tmp_path / "out/results.html").read_text()


@pytest.mark.parametrize("name", ["samples.0.jsonl", "records.old.jsonl"])
def test_a_folder_without_records_is_refused_and_what_a_run_leaves_is_not_read(name, tmp_path, capsys):
    (tmp_path / name).write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "there are no records" in capsys.readouterr().err
    assert main([str(tmp_path / "missing")]) == 2


@pytest.mark.parametrize(
    ("budget", "told", "section"),
    [(1024, "1,024", "1,024 entries per head"), (0.125, "12.5%", "12.5%"), ("64MiB", "64MiB", "64MiB")],
)
def test_policies_whose_budget_is_a_share_or_bytes_stand_side_by_side(tmp_path, budget, told, section):
    found = [policy(name, budget, "perplexity: prose") for name in ("h2o", "tova")]
    source = Source(tmp_path / "a.jsonl", tuple(found))
    rows = read_csv(results.policies_table([source], tmp_path).csv())
    assert [(row["policy"], row["budget"]) for row in rows] == [("h2o", told), ("tova", told)]
    assert all(row["section"].endswith(f"budget {section}") for row in rows)
    made = results.html([source], ("decode",), tmp_path, "make")
    assert f"budget {told}" in made
    csv = read_csv(results.csv([source], (), tmp_path))
    assert [line["budget"] for line in csv if line["method"] == "tova"] == [str(budget)]

import math
import re
from functools import partial
from html.parser import HTMLParser

import pytest
from rich.console import Console

import attnzoo
from attnzoo.bench import plots
from attnzoo.bench.colors import DENSE, METHODS, look
from attnzoo.bench.highlights import of_records
from attnzoo.bench.page import page_of
from attnzoo.bench.readme import BEGIN, END, markdown_section, markdown_table, rewrite_readme
from attnzoo.bench.record import Cost, Interval, Quantiles
from attnzoo.bench.report import print_report
from attnzoo.bench.stats import wilson_interval
from attnzoo.bench.summary import summarize, verdict
from attnzoo.bench.words import difference, memory_verdict, need_verdict, speed_verdict
from attnzoo.errors import AttnZooError
from attnzoo.tasks.classify.quality import Accuracy
from attnzoo.tasks.decode.byte_lm import BitsPerByte
from attnzoo.tasks.decode.quality import Retrieval
from attnzoo.tasks.suite import TASK
from tests.bench.data import cost, quality, side


class Balance(HTMLParser):
    """Checks that tags are closed, and gathers what a page would load."""

    VOID = frozenset({"br", "meta", "img", "link", "hr", "use", "path", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_is_well_formed(run_records):
    page = page_of(TASK, run_records, "name: test")
    parsed = Balance()
    parsed.feed(page)
    assert not parsed.open
    assert not parsed.loads
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert not re.search(r"url\((?!#)|@import", page)
    assert page.count("<svg") == 5


def test_the_page_says_what_was_run_where_and_how_to_run_it_again(run_records):
    page = page_of(TASK, run_records, "name: test")
    for part in (
        "a CPU, 2 threads",
        "torch 2.11",
        "2026-01-02 03:04 UTC",
        "0123456789abcdef",
        "000000000000",
        "name: test",
    ):
        assert part in page
    assert "python eval/bench.py test.yaml" in page


def test_slower_is_as_plain_as_faster_and_what_failed_is_told(run_records):
    page = page_of(TASK, run_records)
    assert '<span class="worse">0.50x (0.49-0.51)</span>' in page
    assert '<span class="better">2.00x (1.96-2.04)</span>' in page
    assert '<span class="worse">70.0 (68.0-72.0)</span>' in page
    assert '<span class="worse">oom</span><br><small>no memory &lt;left&gt; at all</small>' in page


def test_every_row_is_in_the_terminal_table(run_records):
    console = Console(record=True, width=140)
    print_report(run_records, console)
    text = console.export_text()
    for part in ("16 tokens", "64 tokens", "dense", "slow", "fast", "0.50x", "2.00x", "oom"):
        assert part in text


def quality_row(make_record, label="dense", **changes):
    whose = {"label": label, "attention": label, "is_baseline": label == "dense"}
    return make_record(**{**whose, "kind": "quality", "tokens": 0, "cost": None, "gate": None, **changes})


def told(records):
    """What the terminal and the page say of records."""
    console = Console(record=True, width=200)
    print_report(records, console)
    return console.export_text(), page_of(TASK, records)


def test_a_workload_whose_quality_failed_in_every_row_has_a_column_and_its_reasons(make_record):
    row = partial(quality_row, make_record)
    lost = {"workload": "other images", "status": "failed"}
    records = [row(quality=quality()), row("slow", quality=quality(0.7, 0.74))]
    records += [row(message="no <images>\nat all", **lost), row("slow", message="a loss of nan", **lost)]
    text, page = told(records)
    for shown in (text, page):
        assert "other images" in shown
        assert shown.count("failed") >= 2
    assert "dense (quality, other images): failed: no <images> at all" in text
    assert "slow (quality, other images): failed: a loss of nan" in text
    assert '<span class="worse">failed</span><br><small>no &lt;images&gt; at all</small>' in page
    assert "70.0 (68.0-72.0)" in page, "what did not fail stands beside it"


@pytest.mark.parametrize("workload", ["", "other images"])
def test_one_row_of_quality_that_failed_says_why(make_record, workload):
    row = partial(quality_row, make_record)
    records = [row(quality=quality()), row("slow", status="timeout", message="after 600 s", workload=workload)]
    if workload:
        records += [row(quality=quality(), workload=workload), row("slow", quality=quality())]
    text, page = told(records)
    assert f"slow (quality{', other images' if workload else ''}): timeout: after 600 s" in text
    assert '<span class="worse">timeout</span><br><small>after 600 s</small>' in page
    only, _ = told(records[1:2])
    assert "after 600 s" in only, "no row has any quality"


ALONE = {"scope": "layer", "host": "timm:vit, its first attention layer alone"}
SIDE_BY_SIDE = "Workloads side by side"


@pytest.mark.parametrize("other", [ALONE, {"host": "timm:deit"}], ids=["layer", "host"])
def test_only_workloads_of_the_same_model_stand_side_by_side(make_record, other):
    whole = make_record(workload="batch 8")
    alone = make_record(workload="batch 8, another", **other)
    assert SIDE_BY_SIDE not in page_of(TASK, [whole, alone])
    part = page_of(TASK, [whole, make_record(workload="batch 1"), alone]).partition(SIDE_BY_SIDE)[2]
    table = part.partition("</table>")[0]
    assert "batch 1" in table
    assert "another" not in table
    again = alone.model_copy(update={"workload": "batch 1, another"})
    assert "another" in page_of(TASK, [whole, alone, again]).partition(SIDE_BY_SIDE)[2].partition("</table>")[0]


def test_the_markdown_has_a_table_per_host_of_at_most_seven_columns(make_record, run_records):
    lines = markdown_table(run_records).splitlines()
    assert lines[:2] == ["**vit**", ""]
    assert lines[2] == (
        "| attention | speed-up, forward, 16 tokens | speed-up, forward, 64 tokens | peak memory, forward at 64 "
        "| top-1 % | FLOPs, forward at 64 | quality kept (95% interval) |"
    )
    assert len(lines) == 2 + 2 + 4
    assert {line.count("|") for line in lines[2:]} == {8}
    assert lines[4].startswith("| `dense` | 1.00x")
    assert "oom" in lines[-1]
    many = [make_record(kind="cost", tokens=4**power, quality=None) for power in range(2, 9)]
    assert "peak memory" in markdown_table(many), "something besides speed is told however many sizes there are"


@pytest.mark.parametrize("cells", [7, 6])
def test_of_many_workloads_the_markdown_has_the_largest(make_record, cells):
    many = [make_record(tokens=tokens, quality=None) for tokens in range(16, 16 + cells)]
    for label in ("dense", "slow"):
        rows = [row.model_copy(update={"label": label}) for row in many]
        lines = [line for line in markdown_table(rows).splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {8}
    assert "speed-up, forward, 16 tokens" not in lines[0]
    assert f"speed-up, forward, {15 + cells} tokens | peak memory, forward at {15 + cells} |" in lines[0]


def unsteady(make_record, label, middle, spread):
    data = cost(middle)
    data["ratios"]["speedup"] |= {"p20": middle - spread, "p80": middle + spread}
    return make_record(label=label, attention=label, is_baseline=False, cost=data)


@pytest.mark.parametrize("names", [("wild", "steady"), ("steady", "wild")])
def test_the_fastest_is_one_that_is_faster_beyond_the_noise(make_record, names):
    speeds = {"wild": (1.8, 0.9), "steady": (1.4, 0.1), "slow": (0.5, 0.01)}
    rows = [make_record(), *(unsteady(make_record, name, *speeds[name]) for name in (*names, "slow"))]
    assert "steady is fastest, 1.40x" in verdict(summarize(rows))
    within = [row for row in rows if row.label != "steady"]
    assert "none is faster than dense beyond the noise; nearest is wild" in verdict(summarize(within))


def few(record, n):
    data = record.model_dump()
    data["cost"]["ratios"]["speedup"]["n"] = n
    return type(record).model_validate(data)


def test_of_few_pairs_of_calls_none_is_called_faster_or_slower(make_record):
    rows = [make_record(), unsteady(make_record, "quick", 1.4, 0.1), unsteady(make_record, "slow", 0.98, 0.001)]
    assert "quick is fastest, 1.40x (1.30-1.50) dense's speed" in verdict(summarize(rows))
    assert verdict(summarize([few(row, 3) for row in rows])) == (
        "vit, forward, 16 tokens: quick comes first, 1.40x dense's speed; 3 pairs of calls are too few (of 5 at least) "
        "to tell faster from slower."
    )
    assert "1 pair of calls is too few" in verdict(summarize([few(row, 1) for row in rows]))
    mixed = verdict(summarize([*rows[:2], few(rows[2], 4)]))
    assert mixed.endswith("of 2 measured, 1 faster than dense, none slower, 1 timed too few times to tell.")
    assert speed_verdict(Quantiles(p20=2, p50=2, p80=2, n=4)) == "same"
    assert speed_verdict(Quantiles(p20=0.5, p50=0.5, p80=0.5, n=4)) == "same"


def test_prefill_and_decoding_have_a_sentence_each(make_record):
    rows = [
        row.model_copy(update={"phase": phase, "tokens": tokens})
        for tokens in (16, 64)
        for phase, speed in (("prefill", 0.48), ("decode", 1.3))
        for row in (make_record(), unsteady(make_record, "a", speed, 0.01))
    ]
    prefill, decode = verdict(summarize(rows)).split(" vit, ")
    assert prefill == (
        "vit, prefill, 64 tokens: none is faster than dense beyond the noise; nearest is a, 0.48x (0.47-0.49) its "
        "speed; of 1 measured, 1 slower."
    )
    assert decode.startswith("decode, after 64 tokens: a is fastest, 1.30x")
    vision = {"prefill": "forward", "decode": "training"}
    training = [row.model_copy(update={"phase": vision[row.phase]}) for row in rows]
    assert "forward, 64 tokens: none" in verdict(summarize(training))
    assert "forward and backward, 64 tokens: a is fastest" in verdict(summarize(training))


def found(hits, asked, dense_hits):
    rows = [
        Retrieval(
            kind="single",
            tokens=8,
            samples=asked,
            recall=count / asked,
            low=wilson_interval(count, asked)[0],
            high=wilson_interval(count, asked)[1],
            by_depth=[(0.5, index < count) for index in range(asked)],
        )
        for count in (hits, dense_hits)
    ]
    return rows[0].against(rows[1]), rows[1].as_dense()


@pytest.mark.parametrize(
    ("hits", "asked", "says"),
    [
        (0, 2, "none of 1 measured found any (numbers found: 100 of dense); 2 samples are too few (of 5 at least) to"),
        (1, 2, "a comes first, 0.500x of dense's quality; 2 samples are too few (of 5 at least) to tell better from"),
        (0, 9, "none of 1 measured found any (numbers found: 100 (70-100) of dense)."),
        (3, 9, "a keeps most, 0.333x (0.132-0.840) of dense's quality; of 1 measured, 1 worse than dense"),
    ],
)
def test_of_few_samples_none_is_called_worse_and_of_none_found_none_keeps_most(make_record, hits, asked, says):
    own, dense = found(hits, asked, asked)
    base = make_record(kind="quality", cost=None, gate=None, tokens=0, shapes=None, workload="key")
    rows = [base, base.model_copy(update={"label": "a", "attention": "a", "is_baseline": False})]
    rows = [row.model_copy(update={"quality": one}) for row, one in zip(rows, (dense, own), strict=True)]
    assert says in verdict(summarize(rows))
    tied = rows[1].model_copy(update={"label": "b"})
    if hits == 1:
        assert "a and 1 more come first" in verdict(summarize([*rows, tied]))


@pytest.mark.parametrize("first", ["forward", "training"])
def test_forward_and_training_are_not_one_line(make_record, monkeypatch, first):
    both = [make_record(phase=phase, workload="batch 64") for phase in ("forward", "training")]
    assert "against token count" not in page_of(TASK, both), "there is one token count alone"
    larger = [record.model_copy(update={"tokens": 64}) for record in both if record.phase == first]
    drawn = []
    monkeypatch.setattr(plots, "plain_ticks", lambda axis, values: drawn.append(values))
    monkeypatch.setattr(plots, "add_key", lambda axes: drawn.append([len(line.get_xdata()) for line in axes.lines]))
    plots.latency_plot(summarize([*both, *larger]))
    assert drawn == ([[10.0, 10.0], [2]] if first == "forward" else [])


def test_the_memory_of_training_is_not_drawn_as_that_of_a_forward(make_record, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_trade", lambda trades, *rest: drawn.extend(len(trade.spots) for trade in trades))
    rows = [make_record(phase=phase, workload="batch 64") for phase in ("forward", "training")]
    plots.memory_trade_plot(summarize([*rows, quality_row(make_record, quality=quality())]))
    assert drawn == [1]


@pytest.mark.parametrize(("phase", "word"), [("forward", "items"), ("training", "items"), ("decode", "tokens")])
def test_only_images_are_called_images(make_record, phase, word):
    record = make_record(phase=phase, shapes=None, host="transformers:bert")
    page = page_of(TASK, [record, record.model_copy(update={"tokens": 64})])
    assert f"100.0 {word}/s" in page
    assert "per image" not in page
    assert "100.0 images/s" in page_of(TASK, [make_record()])


def test_a_page_of_quality_alone_says_who_keeps_most_and_how_many_are_worse(make_record):
    row = partial(quality_row, make_record)
    better = {**quality(0.97, 0.996), "ratio_low": 0.991, "ratio_high": 0.999}
    lost = {"status": "failed", "message": "no"}
    records = [row(quality=quality()), row("a", quality=quality(0.5, 0.53)), row("b", quality=better), row("c", **lost)]
    found = verdict(summarize(records))
    assert found == (
        "vit, top-1: b keeps most, 0.996x (0.991-0.999) of dense's quality; of 2 measured, 2 worse than dense beyond "
        "the interval, none better."
    )
    assert found in page_of(TASK, records).replace("&#39;", "'")
    other = [row(quality=quality(), workload="night"), row("a", quality=quality(0.94, 0.99), workload="night")]
    assert "vit, night: a keeps most, 0.990x of dense's quality; of 1 measured, none with an interval" in verdict(
        summarize([*records, *other])
    )
    tied = row("d", quality=better)
    assert "vit, top-1: b and 1 more keep most, 0.996x" in verdict(summarize([*records, tied]))
    assert verdict(summarize(records[:1])) == ""


def test_without_quality_the_markdown_has_no_columns_for_it(make_record):
    records = [make_record(kind="cost", tokens=tokens, quality=None) for tokens in (16, 64)]
    assert "quality" not in markdown_section(records)
    assert "parameters" in markdown_table(records)


def test_needs_are_told_of_the_largest_count_that_half_of_the_attentions_have(make_record):
    def at(tokens, label):
        return make_record(tokens=tokens, label=label, is_baseline=label == "dense")

    records = [at(16, "dense"), at(16, "a"), at(16, "b"), at(64, "dense"), at(64, "a"), at(256, "dense")]
    assert "forward at 64" in markdown_table(records)
    assert "forward at 256" in markdown_table([*records, at(256, "a")])


def test_kept_memory_is_told(make_record, run_records):
    kept = make_record(cost={**cost(), "freed_memory_kept": True})
    for report in (markdown_section, partial(page_of, TASK)):
        assert "keeps" in report([kept])
        assert "keeps" not in report(run_records)


def test_forward_and_backward_are_reported_as_such(make_record, run_records):
    both = [record.model_copy(update={"phase": "training"}) for record in run_records]
    for report in (markdown_table, partial(page_of, TASK)):
        assert "forward and backward, 64 tokens" in report(both)


def test_rewriting_a_readme_changes_only_what_is_between_the_markers(tmp_path, run_records):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    rewrite_readme(readme, run_records)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n**vit**")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "python eval/bench.py test.yaml" in text
    rewrite_readme(readme, run_records)
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_readme_without_its_markers_is_refused_and_left_alone(tmp_path, run_records, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(AttnZooError, match="bench:begin"):
        rewrite_readme(readme, run_records)
    assert readme.read_text() == text


def test_reports_do_without_cost_or_without_quality(run_records):
    for kind in ("cost", "quality"):
        page = page_of(TASK, [record for record in run_records if record.kind == kind])
        assert "<h2>" in page


def test_no_records_and_mixed_configs_are_refused(run_records, make_record):
    with pytest.raises(AttnZooError, match="no records"):
        summarize([])
    with pytest.raises(AttnZooError, match="2 configs"):
        summarize([*run_records, make_record(config_hash="f" * 16)])


@pytest.mark.parametrize(
    ("low", "middle", "high", "verdict"),
    [(1.1, 1.2, 1.3, "better"), (0.7, 0.8, 0.9, "worse"), (0.9, 1.2, 1.5, "same"), (0.99, 1.0, 1.01, "same")],
)
def test_a_speed_up_counts_only_where_its_whole_spread_does(low, middle, high, verdict):
    assert speed_verdict(Quantiles(p20=low, p50=middle, p80=high, n=9)) == verdict
    assert speed_verdict(Quantiles(p20=low, p50=middle, p80=high, n=9), Quantiles(p20=0.1, p50=1, p80=9, n=9)) == "same"


@pytest.mark.parametrize(("value", "verdict"), [(0.5, "better"), (1.5, "worse"), (1.0, "same"), (None, "same")])
def test_needing_less_is_better(value, verdict):
    assert need_verdict(value) == verdict


def test_a_method_has_one_color_whatever_stands_beside_it():
    assert set(METHODS) == set(attnzoo.list_attentions())
    assert (
        look(["dense", "padre degree=2"], "padre degree=2")[0] == look(["padre degree=2", "h2o"], "padre degree=2")[0]
    )
    assert look(["dense LLM", "dense"], "dense")[0] == look(["dense LLM"], "dense LLM")[0] == DENSE
    degrees = [f"padre degree={degree}" for degree in (1, 2, 3)]
    assert len({look(degrees, label)[0] for label in degrees}) == 3
    assert look(["its_own"], "its_own") == look(["its_own", "h2o"], "its_own")
    assert look(["its_own"], "its_own")[0] != look(["another"], "another")[0]


@pytest.mark.parametrize("which", ["activation_peak", "cache_held"])
def test_memory_that_was_too_little_to_be_measured_does_not_break_the_page(make_record, run_records, which):
    """A ratio of 0 has no place on a logarithmic axis."""
    data = cost()
    data["ratios"][which] = 0.0
    phase = "decode" if which == "cache_held" else "forward"
    rows = [r.model_copy(update={"phase": phase}) if r.kind == "cost" else r for r in run_records]
    none = make_record(cost=data, is_baseline=False, label="slow", attention="slow", tokens=64, phase=phase)
    kept = [r for r in rows if (r.kind, r.label, r.tokens) != ("cost", "slow", 64)]
    assert "<svg" in page_of(TASK, [*kept, none])


@pytest.mark.parametrize(("held", "verdict"), [(0, "better"), (1 << 30, "same"), (1 << 31, "worse")])
def test_memory_is_judged_where_a_side_took_none_that_could_be_measured(make_record, held, verdict):
    data = cost()
    data["baseline"]["memory"]["activation_peak_bytes"] = 1 << 30
    data["candidate"]["memory"]["activation_peak_bytes"] = held
    data["ratios"]["activation_peak"] = held / (1 << 30)
    record = make_record(cost=data, is_baseline=False, label="a", attention="sdpa")
    assert memory_verdict(record) == verdict
    page_of(TASK, [record])


def test_flops_that_are_not_known_are_a_dash_with_the_reason(make_record):
    data = cost()
    data["candidate"] |= {"flops": None, "flops_note": "no formula for the FLOPs of aten.mv"}
    data["ratios"]["flops"] = None
    record = make_record(cost=data, is_baseline=False, label="a", attention="sdpa")
    assert "no formula for the FLOPs of aten.mv" in page_of(TASK, [record])
    assert "| - |" in markdown_table([record])


def of_samples(node, n):
    """The same plain data with every figure out of `n` samples."""
    if isinstance(node, dict):
        changed = {"n": n} if "n" in node else {}
        return {key: of_samples(value, n) for key, value in node.items()} | changed
    return [of_samples(one, n) for one in node] if isinstance(node, (list, tuple)) else node


SPREAD = re.compile(r"\d(?: ms)?x? \(\+?\d[\d.,]*(?:-| to \+)\d")


@pytest.mark.parametrize(("n", "shown"), [(4, False), (5, True)])
def test_fewer_than_five_pairs_have_no_spread_anywhere(run_records, n, shown):
    records = [type(record).model_validate(of_samples(record.model_dump(), n)) for record in run_records]
    records = [record.model_copy(update={"quality": None}) for record in records]  # whose interval is that of images
    console = Console(record=True, width=200)
    print_report(records, console)
    page = page_of(TASK, records)
    figures = [figure.text for one in of_records(records, lambda record: "suite") for figure in one.figures.values()]
    for text in (page, console.export_text(), markdown_table(records), " ".join(figures), verdict(summarize(records))):
        assert bool(SPREAD.search(text)) is shown, text
    spots = [record.cost.ratios.speedup.bounds for record in records if record.cost]
    assert all((bounds is not None) is shown for bounds in spots)


@pytest.mark.parametrize(("ratio", "warned"), [(1.2, False), (1.3, True), (0.85, False), (0.75, True)])
def test_dense_that_is_not_as_fast_as_its_copy_is_told(run_records, ratio, warned):
    """On the page and in the terminal: no ratio of that run can be relied on."""
    at = next(i for i, record in enumerate(run_records) if record.is_baseline and record.cost and record.tokens == 64)
    run_records[at] = run_records[at].model_copy(update={"cost": Cost.model_validate(cost(ratio))})
    console = Console(record=True, width=300)
    print_report(run_records, console)
    for text in (page_of(TASK, run_records), console.export_text()):
        assert ("Dense is not as fast as a second copy of itself" in text) is warned
        assert (f"vit, forward, 64 tokens ({ratio:.2f}x" in text) is warned
        assert "16 tokens (1.00x" not in text


@pytest.mark.parametrize(("share", "noise"), [(0.4, True), (0.498, False), (0.6, False)])
def test_a_gain_above_amdahls_bound_is_called_noise(run_records, share, noise):
    """`fast` is 2.00x (1.98-2.02) as fast; were attention two fifths of the time, at most 1.67x would be possible."""
    for i, record in enumerate(run_records):
        if record.is_baseline and record.cost:
            told = record.cost.model_copy(update={"attention_share": share})
            run_records[i] = record.model_copy(update={"cost": told})
    said = verdict(summarize(run_records))
    assert f"no swap can gain more than {1 / (1 - share):.2f}x" in said
    assert ("That of fast is above this: one of the two is noise" in said) is noise


def bits(nats):
    """The quality of a model of bytes on windows of so many nats per byte."""
    mean = sum(nats) / len(nats)
    plain = {"perplexity": math.exp(mean), "nll": mean, "tokens": 9, "window_nll": tuple(nats), "parameters": 1}
    return BitsPerByte(**plain, losses=((1, 2.0), (2, 1.0)), text_sha256="")


def asked(hits):
    """The quality of a model that found numbers in prompts of one each."""
    by_depth = tuple((0.5, hit) for hit in hits)
    share, ends = sum(hits) / len(hits), wilson_interval(sum(hits), len(hits))
    plain = {"kind": "single", "samples": len(hits), "tokens": 9, "recall": share, "by_depth": by_depth}
    return Retrieval(**plain, low=ends[0], high=ends[1])


@pytest.mark.parametrize(("hits", "kept"), [([False] * 5, None), ([True, False], 1.0), ([False], None)])
def test_dense_that_got_nothing_right_keeps_no_part_of_itself(hits, kept):
    assert asked(hits).as_dense().ratio == kept
    trainings = [{**quality()["trainings"][0], "correct": sum(hits), "images": len(hits)}]
    accuracy = {**quality(), "accuracy": sum(hits) / len(hits), "images": len(hits), "trainings": trainings}
    assert Accuracy.model_validate(accuracy).as_dense().ratio == kept
    assert bits([1.0, 1.5]).as_dense().ratio == 1.0


@pytest.mark.parametrize("n", [1, 4, 5, 9])
def test_fewer_than_five_windows_or_prompts_have_no_interval_anywhere(n):
    found = Interval(mean=0.02, low=0.01, high=0.03, n=n)
    told = {1: "+0.020 (1 sample)", 4: "+0.020 (4 samples)"}
    assert difference(found) == told.get(n, "+0.020 (+0.010 to +0.030)")
    windows = bits([1.0 + 0.1 * i for i in range(n)]).against(bits([1.5 + 0.2 * i for i in range(n)]))
    prompts = asked([True] * n).against(asked([i % 2 == 0 for i in range(n)]))
    for found in (windows, prompts):
        few = n < 5
        assert (found.ratio is None, found.ratio_low is None, found.ratio_high is None) == (False, few, few)
        cells = [getattr(cell, "text", cell) for cell in found.details.values()]
        assert bool(re.search(r"\d \([-+]?\d[\d.]*(?: to |-)", " ".join([found.figure, *cells]))) is not few, cells


@pytest.mark.parametrize(
    ("slowest", "peak", "warned"),
    [(12.4, 1 << 20, False), (12.6, 1 << 20, True), (30.0, 1 << 21, False)],
    ids=["the same", "drifts", "another baseline"],
)
@pytest.mark.parametrize("phase", ["forward", "prefill"])
def test_dense_that_drifts_between_rows_is_told(run_records, slowest, peak, warned, phase):
    """In the page and in the terminal; not where a row has a baseline of its own, which holds other memory."""
    records = [record.model_copy(update={"phase": phase}) for record in run_records]
    at = next(i for i, record in enumerate(records) if record.label == "slow" and record.cost and record.tokens == 64)
    made = records[at].model_dump()
    made["cost"]["baseline"] = side(slowest, peak)
    records[at] = type(records[at]).model_validate(made)
    console = Console(record=True, width=300)
    print_report(records, console)
    said = f"vit, {phase}, 64 tokens ({slowest / 10:.2f}x)"
    for text in (page_of(TASK, records), console.export_text()):
        assert (said in text) is warned
        assert ("drifts between the rows" in text) is warned
        assert f"{phase}, 16 tokens (1.00x)" not in text

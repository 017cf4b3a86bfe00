import re
from pathlib import Path

import pytest

from attnzoo.bench.page import page_of
from attnzoo.bench.plots import memory_plot
from attnzoo.bench.summary import summarize
from attnzoo.tasks import find, read_records, task_of
from attnzoo.tasks.decode.kvpress.quality import beside
from attnzoo.units import MB, MIB, megabytes

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "records"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0.00 MB"),
        (MIB, "1.05 MB"),
        (9_994_999, "9.99 MB"),
        (9_999_999, "10.0 MB"),
        (50 * MB, "50.0 MB"),
        (369_440_000, "369.4 MB"),
        (999_960_000, "1,000 MB"),
        (1_234_567_890, "1,235 MB"),
    ],
)
def test_a_megabyte_is_a_million_bytes(count, text):
    assert megabytes(count) == text


def test_the_decode_tables_and_page_count_in_the_unit_of_the_docs():
    records = read_records(RECORDS / "prose.jsonl")
    page = page_of(find("decode"), records)
    for record in records:
        cache = record.quality.cache
        if record.workload:
            continue
        assert record.quality.details["cache held"].text.startswith(f"{cache.held / 1e6:.1f} MB")
        assert f"<td>{cache.held / 1e6:.1f} MB" in page
        assert f"<small>{cache.allocated / 1e6:.1f} MB" in page


@pytest.mark.parametrize("name", ["mixers_cpu_glibc", "detr_r50_cost/records"])
def test_the_pages_of_benchmarks_count_in_the_same_unit(name):
    task, records = task_of(RECORDS / f"{name}.jsonl"), read_records(RECORDS / f"{name}.jsonl")
    peaks = {record.cost.candidate.memory.activation_peak_bytes for record in records if record.cost}
    shown = set(re.findall(r"([\d.,]+) MB", page_of(task, records)))
    assert {f"{peak / 1e6:,.{0 if peak >= 1e9 else 1 if peak >= 1e7 else 2}f}" for peak in peaks if peak} <= shown


def test_the_memory_plot_is_drawn_in_the_unit_that_its_axis_names(monkeypatch):
    from attnzoo.bench import plots

    drawn = []
    monkeypatch.setattr(plots, "against_tokens", lambda summary, value, label: drawn.append((value, label)))
    summary = summarize(read_records(RECORDS / "mixers_cpu_glibc.jsonl"))
    memory_plot(summary)
    ((value, label),) = drawn
    record = summary.groups[0].rows[0]
    assert value(record) * record.shapes.batch * 1e6 == record.cost.candidate.memory.activation_peak_bytes
    assert "MB" in label


def test_the_comparison_with_kvpress_counts_in_the_same_unit():
    records = read_records(RECORDS / "kvpress.jsonl")
    own, press = (
        next(record.quality for record in records if record.label == f"keydiff ({side})")
        for side in ("attnzoo", "kvpress KeyDiffPress")
    )
    peaks = [max(prompt.cache_peak_bytes for prompt in quality.prompts) / 1e6 for quality in (own, press)]
    assert f"| {peaks[0]:.1f} MB | {peaks[1]:.1f} MB |" in beside(records).markdown()


def test_the_committed_pages_of_detectors_are_in_the_same_unit():
    """A size in MB of a committed page is one that its record gives."""
    for page in (RECORDS / "detr_r50_cost" / "report.html", RECORDS / "bccd_cpu" / "report.html"):
        records = read_records(page.with_name("records.jsonl"))
        sizes = re.compile(r"[\d.,]+ MB\b")
        assert sizes.findall(page.read_text(encoding="utf-8")) == sizes.findall(page_of(find("detect"), records))


def test_nothing_but_the_units_module_divides_bytes_for_a_reader():
    """One function writes sizes: a number next to MB or MiB in an f-string is a second one."""
    own = ROOT / "attnzoo" / "units.py"
    for path in [*(ROOT / "attnzoo").rglob("*.py"), *(ROOT / "eval").glob("*.py"), *(ROOT / "train").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert path == own or not re.search(r"\} (MB|MiB|GB|GiB)\b(?!/s)", text), path

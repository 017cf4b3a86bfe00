"""Convert the committed records of trained classifiers, a folder per cost, to one file per config; run once.

python convert.py: reads docs/records/NAME/*/records.jsonl and the mistakes in docs/records/NAME/report.html, writes
docs/records/NAME.jsonl, .yaml and .html, checks that no figure changed, and removes the folder.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import yaml

from attnzoo import files
from attnzoo.bench.jsonl import append_line
from attnzoo.bench.publish import page_of
from attnzoo.bench.record import read_records
from attnzoo.tasks.classify.config import ClassifyConfig
from attnzoo.tasks.classify.task import TASK
from attnzoo.tasks.records import Record

RECORDS = Path("docs/records")
FIGURE = re.compile(r'<figure><img src="data:image/png;base64,([^"]*)" alt="([^"]*)".*?<figcaption>(.*?)</figcaption>')
SAME = ("gate", "baseline_gate", "shapes", "environment", "utc", "seconds", "command", "status", "tokens", "options")


def mistakes_of(page: str) -> dict[str, list[dict[str, object]]]:
    """The mistakes shown on a page, by label."""
    found = {}
    for head, body in re.findall(r"<h3>(.*?), seed \d+</h3>(.*?)(?=<h3>|</section>|<h2>|$)", page, re.S):
        rows = []
        for picture, name, caption in FIGURE.findall(body):
            target, answer, sure = caption.split("<br>")
            share = int(sure.removesuffix("% sure")) / 100
            told = {"target": html.unescape(target), "answer": html.unescape(answer.removeprefix("taken for "))}
            rows.append({"name": html.unescape(name), **told, "confidence": share, "picture": picture})
        found[html.unescape(head)] = rows
    return found


def convert(name: str) -> None:
    """Convert the records of one config."""
    old, page = RECORDS / name, (RECORDS / name / "report.html").read_text(encoding="utf-8")
    config = ClassifyConfig.check(yaml.safe_load(html.unescape(re.findall(r"<pre>(.*?)</pre>", page, re.S)[0])))
    quality: dict[str, Record] = {}
    costs: list[Record] = []
    shown = mistakes_of(page)
    for folder in ("forward-batch1", "forward-batch64", "training-batch64"):
        if not (old / folder).is_dir():
            continue
        for record in read_records(old / folder / "records.jsonl", Record):
            changes = {
                "schema_version": 4,
                "task": "classify",
                "measured": record.config_hash,
                "benchmark": config.name,
            }
            plain = {**json.loads(record.model_dump_json()), **changes}
            if record.kind == "cost":
                costs.append(Record.model_validate({**plain, "workload": f"batch {record.shapes.batch}"}))
                continue
            plain["quality"]["trainings"][0]["mistakes"] = shown[record.label]
            quality.setdefault(record.label, Record.model_validate(plain))
            assert quality[record.label].quality.brief == record.quality
    target = RECORDS / f"{name}.jsonl"
    target.unlink(missing_ok=True)
    for record in [*quality.values(), *costs]:
        append_line(target, record)
    files.write(target.with_suffix(".yaml"), config.to_yaml())
    compare(old, target)
    text = target.with_suffix(".yaml").read_text(encoding="utf-8")
    files.write(target.with_suffix(".html"), page_of(TASK, read_records(target, Record), text))
    shutil.rmtree(old)


def compare(old: Path, new: Path) -> None:
    """Check that every figure of every old row is in a new one."""
    found = {record.key: record for record in read_records(new, Record)}
    count = 0
    for folder in sorted(path for path in old.iterdir() if path.is_dir()):
        for record in read_records(folder / "records.jsonl", Record):
            workload = f"batch {record.shapes.batch}" if record.kind == "cost" else ""
            same = found[(*record.key[:-1], workload)]
            assert (same.cost, same.quality.brief) == (record.cost, record.quality), record.label
            if record.kind == "cost":
                assert all(getattr(same, key) == getattr(record, key) for key in SAME), record.label
            count += 1
    print(f"{new}: {len(found)} rows, which hold all figures of {count} rows of before")


if __name__ == "__main__":
    for each in ("cifar10_cpu", "fashion_mnist"):
        convert(each)

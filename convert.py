"""Convert the committed records of detection to the task `detect`: once; this file stays in the history alone.

The size of images goes from the host's name into the workload; drawn boxes and the config come out of the old page.
"""

import html
import json
import re
from pathlib import Path

import yaml

from attnzoo.bench.publish import page_of
from attnzoo.tasks import read_records, task_of

FOLDERS = [Path("docs/records") / name for name in ("bccd_cpu", "trees_overfit", "detr_r50_cost")]
SIZE = re.compile(r", (\d+ x \d+ pixels)$")


def convert(line):
    """Give a record of today."""
    size = SIZE.search(line["host"])
    return line | {
        "schema_version": 4,
        "task": "detect",
        "host": SIZE.sub("", line["host"]),
        "workload": size[1] if size else "",
    }


def boxes(page):
    """By label and heading: name, JPEG in base64 and caption of each drawn image."""
    found = {}
    for label, title, body in re.findall(r"<h3>([^:<]+): ([^<]+)</h3>(.*?)</div>", page, re.DOTALL):
        figure = r'<figure><img src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"[^>]*><figcaption>(.*?)</figcaption>'
        shown = [
            [html.unescape(name), content, html.unescape(told.replace("<br>", "\n"))]
            for content, name, told in re.findall(figure, body, re.DOTALL)
        ]
        found.setdefault(html.unescape(label), {})[html.unescape(title)] = shown
    return found


for folder in FOLDERS:
    path, page = folder / "records.jsonl", (folder / "report.html").read_text(encoding="utf-8")
    lines = [convert(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")
    model = task_of(path).record
    text = "".join(model.model_validate(line).model_dump_json() + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    drawn = boxes(page)
    if drawn:
        (folder / "boxes.json").write_text(json.dumps(drawn, indent=1) + "\n", encoding="utf-8")
    given = lines[0]["command"].split()[2:]
    head = {"task": "detect", "name": lines[0]["benchmark"], "device": "cpu", "threads": None, "configs": given}
    full = html.unescape(re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)[-1])
    config = yaml.safe_dump({**head, "overrides": []}, sort_keys=False)
    config += "".join(f"# {line}".rstrip() + "\n" for line in ["", *full.strip().splitlines()])
    path.with_suffix(".yaml").write_text(config, encoding="utf-8")
    records = read_records(path)
    (folder / "report.html").write_text(page_of(task_of(path), records, config, folder), encoding="utf-8")

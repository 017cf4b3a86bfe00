"""What docs/repair.md says: its commands run, its table is that of the record."""

import re
from pathlib import Path

from attnzoo import tasks
from attnzoo.bench.report import quality_table
from attnzoo.bench.summary import summarize
from attnzoo.tasks import read_records

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/repair.md").read_text(encoding="utf-8")


def test_the_commands_run(tmp_path, forked):
    """As they stand, but for an epoch of training, fewer images and one choice of layers."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (block,) = (code for code in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) if "distill.py" in code)
    shorter = {
        "train/classify.py": ["recipe.epochs=1", "recipe.warmup_epochs=0"],
        "train/distill.py": [
            *(f"stages.{at}.samples=64" for at in range(2)),
            "seeds=[0]",
            "sensitivity_steps=2",
            "layers=[{share: 0.5}]",
        ],
    }
    for line in block.splitlines():
        _, script, *words = line.split()
        words = [word.replace("'", "") for word in words]
        ended = forked.script(script, *words, *shorter[script], cwd=tmp_path).finish()
        assert ended.returncode == 0, ended.stderr[-2000:]
    records = read_records(tmp_path / "runs/distill-digits/records.jsonl")
    assert {record.status for record in records} == {"ok"}
    assert "gap closed" in (tmp_path / "runs/distill-digits/report.html").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_record():
    records = read_records(ROOT / "docs/records/repair_digits.jsonl")
    shown = PAGE.split("<!-- repair-digits:begin -->")[1].split("<!-- repair-digits:end -->")[0].strip()
    assert shown == quality_table(summarize(records), "vision").markdown()


def test_the_committed_records_are_those_of_the_config():
    """But for where the teacher's weights lie."""
    records = read_records(ROOT / "docs/records/repair_digits.jsonl")
    assert tasks.task_of(ROOT / "docs/records/repair_digits.jsonl").name == "distill"
    assert {record.benchmark for record in records} == {"distill-digits"}
    assert all(len(record.quality.trials) == 3 for record in records if not record.is_baseline)

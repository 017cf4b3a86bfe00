"""What docs/repair.md says: its commands run, its table is that of the record."""

import re
from pathlib import Path

import pytest
import yaml

from attnzoo import tasks
from attnzoo.bench.report import quality_table
from attnzoo.bench.summary import summarize
from attnzoo.tasks import read_records

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/repair.md").read_text(encoding="utf-8")


def test_the_commands_run(tmp_path, forked):
    """As they stand, but for an epoch of training, fewer images and one choice of layers."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (block,) = (code for code in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) if "distill/digits.yaml" in code)
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


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_table_is_that_of_the_record(name):
    path = ROOT / f"docs/records/repair_{name}.jsonl"
    assert tasks.task_of(path).name == "distill"
    records = read_records(path)
    assert {record.benchmark for record in records} == {f"distill-{name}"}
    assert {record.status for record in records} == {"ok"}
    shown = PAGE.split(f"<!-- repair-{name}:begin -->")[1].split(f"<!-- repair-{name}:end -->")[0].strip()
    assert shown == quality_table(summarize(records), "vision").markdown()


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10_tenth"])
def test_the_committed_records_are_those_of_the_config(name, tmp_path):
    """Stages, and the seeds of each row; the teacher's weights are not here."""
    (tmp_path / "trained.safetensors").touch()
    weights = f"vision.model.weights={tmp_path / 'trained.safetensors'}"
    task, config = tasks.load(ROOT / f"configs/distill/{name}.yaml", [weights])
    cells = {cell.label: cell for cell in task.plan(config)}
    kept = yaml.safe_load((ROOT / f"docs/records/repair_{name}.yaml").read_text(encoding="utf-8"))
    assert kept["stages"] == [stage.model_dump() for stage in config.stages]
    for record in read_records(ROOT / f"docs/records/repair_{name}.jsonl"):
        seeds = cells[record.label].depends_on.get("seeds", (0,))
        assert [trial.seed for trial in record.quality.trials] == list(seeds)


def test_what_is_said_of_cifar10_is_in_its_records():
    rows = {record.label: record.quality for record in read_records(ROOT / "docs/records/repair_cifar10.jsonl")}
    page = " ".join(PAGE.split())
    whole, scratch = rows["padre degree=2 100%"], rows["padre degree=2 100% from scratch"]
    assert f"has {100 * whole.trials[0].points[0].score:.1f}% at the start and {whole.figure}% at the end" in page
    assert f"{whole.details['gap closed']} of the gap; from scratch the same network has {scratch.figure}%" in page
    first, second, third = (rows[f"padre degree={degree} 100%"] for degree in (1, 2, 3))
    assert f"{first.figure}, {second.figure} and {third.figure}% with degree 1, 2 and 3 (one seed each)" in page
    assert first.score < second.score < third.score
    others = [rows[f"{name} 100%"].figure for name in ("linear_angular", "conv", "pooling")]
    assert "`linear_angular` comes to {}%, the convolution alone to {}% and `pooling` to {}%".format(*others) in page
    half = [quality.score for label, quality in rows.items() if " 50%" in label and quality.trials[0].errors[1:]]
    assert max(half) - min(half) < 0.01, "in half of the layers all end within a point"
    chosen, others = (rows[f"padre degree=2 50%{order}"] for order in ("", " random"))
    assert len(chosen.trials) == len(others.trials) == 3
    assert chosen.score < others.score, "the cheapest layers are no better than others"
    longer = read_records(ROOT / "docs/records/repair_cifar10_tenth.jsonl")[1].quality
    assert longer.trials[0].points[-1].samples < 120_000, "a tenth of what the teacher saw"
    assert f"comes to {longer.figure}%, {longer.details['gap closed']} of the gap" in page
    lost = [
        quality.trials[0].final - score for quality in rows.values() for score in quality.trials[0].quantized.values()
    ]
    assert max(lost) < 0.005, "int8 costs no more than half a point"

"""What docs/repair.md says: its commands run, its table is that of the record."""

import re
import statistics
from pathlib import Path

import pytest

from attnzoo import tasks
from attnzoo.bench.report import quality_table
from attnzoo.bench.summary import summarize
from attnzoo.tables import Table
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


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10_rates", "vit_s14", "smollm2"])
def test_the_table_is_that_of_the_record(name):
    path = ROOT / f"docs/records/repair_{name}.jsonl"
    assert tasks.task_of(path).name == "distill"
    records = read_records(path)
    assert {record.benchmark for record in records} == {f"distill-{name.replace('_', '-')}"}
    assert {record.status for record in records} == {"ok"}
    shown = PAGE.split(f"<!-- repair-{name}:begin -->")[1].split(f"<!-- repair-{name}:end -->")[0].strip()
    assert shown == quality_table(summarize(records), records[0].part).markdown()


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10_tenth", "cifar10_rates", "vit_s14", "smollm2"])
def test_the_committed_records_are_those_of_the_config(name, tmp_path):
    """All that it says but where the teacher's weights are, which are not here, and how many rows run at a time."""
    (tmp_path / "trained.safetensors").touch()
    weights = [] if name in ("smollm2", "vit_s14") else [f"vision.model.weights={tmp_path / 'trained.safetensors'}"]
    task, config = tasks.load(ROOT / f"configs/distill/{name}.yaml", weights)
    cells = {cell.label: cell for cell in task.plan(config)}
    kept = tasks.load(ROOT / f"docs/records/repair_{name}.yaml", weights)[1]
    where = {"threads", "workers", "timeout_seconds", "output", "fresh", "device"}
    said, ran = (one.model_dump(exclude=where) for one in (config, kept))
    for one in (*said["attentions"], *ran["attentions"]):
        del one["scratch"]  # which decides what rows there are, and these are compared
    assert said == ran
    assert {record.label for record in read_records(ROOT / f"docs/records/repair_{name}.jsonl")} == set(cells)
    for record in read_records(ROOT / f"docs/records/repair_{name}.jsonl"):
        seeds = cells[record.label].depends_on.get("seeds", (0,))
        assert [trial.seed for trial in record.quality.trials] == list(seeds)


BOUGHT = (  # record, row, the model, what is swapped, and the device
    ("cifar10", "padre degree=2 50%", "ViT of 6 layers, CIFAR-10", "half", "one core"),
    ("cifar10", "padre degree=2 100%", "", "all", "one core"),
    ("vit_s14", "padre degree=2 50%", "ViT-S/14, pretrained, its features", "half", "one core"),
    ("vit_s14", "padre degree=2 100%", "", "all", "one core"),
    ("smollm2", "padre degree=2 10%", "SmolLM2-135M", "a tenth", "H200, shared"),
    ("smollm2", "padre degree=2 25%", "", "a quarter", "H200, shared"),
    ("smollm2", "padre degree=2 50%", "", "half", "H200, shared"),
)


def bought() -> Table:
    """What a repair buys and costs: padre of degree 2 that inherits, in each model; of several seeds the mean."""
    table = Table(("model", "layers swapped", "score", "original", "swapped", "repaired", "seen", "time of the repair"))
    for name, label, model, layers, device in BOUGHT:
        (quality,) = (r.quality for r in read_records(ROOT / f"docs/records/repair_{name}.jsonl") if r.label == label)
        ends = [quality.said([trial.points[at].score for trial in quality.trials]) for at in (0, -1)]
        seen = f"{quality.trials[0].points[-1].samples:,} {'sequences' if name == 'smollm2' else 'images'}"
        seconds = statistics.fmean(trial.points[-1].seconds for trial in quality.trials)
        metric = quality.metric if quality.metric == "NLL" else f"{quality.metric} %"
        table.add(
            model, layers, metric, quality.said([quality.teacher]), *ends, seen, f"{seconds / 60:.0f} min, {device}"
        )
    return table


def test_what_a_repair_buys_is_in_the_records():
    shown = PAGE.split("<!-- repair-bought:begin -->")[1].split("<!-- repair-bought:end -->")[0].strip()
    assert shown == bought().markdown()


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
    assert 0.01 < rows["teacher"].score - max(half) < rows["teacher"].score - min(half) < 0.0205
    chosen, others = (rows[f"padre degree=2 50%{order}"] for order in ("", " random"))
    assert len(chosen.trials) == len(others.trials) == 3
    assert chosen.score < others.score, "the cheapest layers are no better than others"
    assert sum(trial.layers in [one.layers for one in chosen.trials] for trial in others.trials) == 1
    longer = read_records(ROOT / "docs/records/repair_cifar10_tenth.jsonl")[1].quality
    assert longer.trials[0].points[-1].samples < 120_000, "a tenth of what the teacher saw"
    assert f"comes to {longer.figure}%, {longer.details['gap closed']} of the gap" in page
    lost = [
        quality.trials[0].final - score for quality in rows.values() for score in quality.trials[0].quantized.values()
    ]
    assert max(lost) < 0.005, "int8 costs no more than half a point"


def test_what_is_said_of_rates_is_in_their_record():
    rows = {record.label: record.quality for record in read_records(ROOT / "docs/records/repair_cifar10_rates.jsonl")}
    page = " ".join(PAGE.split())
    middle = [rows[f"rate {rate} 50%"] for rate in ("1e-3", "2e-3", "4e-3")]
    assert {f"{100 * one.score:.1f}" for one in middle} == {"77.3"}
    assert {one.details["gap closed"] for one in middle} == {"90%"}
    lower = [one.trials[seed].final - rows["rate 5e-4 50%"].trials[seed].final for one in middle for seed in range(2)]
    assert (f"{100 * min(lower):.1f}", f"{100 * max(lower):.1f}") == ("0.1", "0.7")
    errors = rows["rate 2e-3, layers' errors in the loss 50%"]
    assert f"it is {100 * errors.score:.1f}%, {errors.details['gap closed']} of the gap" in page
    assert all(len(one.trials) == 2 for one in (*middle, errors)), "two seeds"
    assert max(trial.points[-1].samples for one in middle for trial in one.trials) < 120_000, "a tenth of 1.2 million"


def test_what_is_said_of_the_language_model_is_in_its_record():
    rows = {record.label: record.quality for record in read_records(ROOT / "docs/records/repair_smollm2.jsonl")}
    page = " ".join(PAGE.split())
    tenth, half, window = rows["padre degree=2 10%"], rows["padre degree=2 50%"], rows["window of 64 50%"]
    assert len(tenth.trials[0].layers) == 3
    assert 0 < tenth.score - rows["teacher"].score < 0.002
    trial = half.trials[0]
    start, first = trial.points[0], trial.after("stage 1: layer")
    assert f"takes it from {rows['teacher'].figure} to {start.score:.3f}" in page
    assert f"it is {first.score:.3f}, where the window in the same layers has {window.figure}; at the end" in page
    assert f"it is {half.figure}, {half.details['gap closed']} of the gap" in page
    assert window.trials[0].layers == trial.layers
    one, three = (rows[f"padre degree={degree} 50%"].score for degree in (1, 3))
    assert one - half.score > 0.01 > half.score - three > 0
    random = {share: rows[f"padre degree=2, random start {share}"] for share in ("50%", "10%")}
    assert f"half of the layers end at {random['50%'].figure}" in page
    assert abs(random["10%"].score - tenth.score) < 0.003
    assert random["50%"].trials[0].layers != trial.layers
    closed: dict[bool, list[float]] = {True: [], False: []}  # by the first stage, from a random start or not
    for label, quality in rows.items():
        for each in quality.trials if label.startswith("padre") else ():
            closed["random" in label].append(quality.closed(each, each.after("stage 1: layer").score))
    assert 0.595 < min(closed[False]) < max(closed[False]) < 0.855
    assert 0.4 < min(closed[True]) < max(closed[True]) < 0.6
    for degree in (1, 2, 3):
        each = rows[f"padre degree={degree} 50%"].trials[0]
        assert (each.points[0].found, each.after("stage 1: layer").found, each.points[-1].found) == (0, 1, 1)
    assert window.trials[0].points[0].found == 0


def test_what_is_said_of_the_encoder_is_in_its_record():
    rows = {record.label: record.quality for record in read_records(ROOT / "docs/records/repair_vit_s14.jsonl")}
    half, whole = rows["padre degree=2 50%"], rows["padre degree=2 100%"]
    assert len(half.trials[0].layers) == 6
    assert f"{half.trials[0].points[-1].error:.2f}" == "0.12"
    assert half.figure == rows["teacher"].figure
    assert whole.details["gap closed"] == "50%"
    for share in ("50%", "100%"):
        (trial,) = rows[f"conv {share}"].trials
        assert 10 < trial.errors[0] ** 0.5 < 15, "a hundred times the square"
        assert trial.points[-1].error > 1.9
    assert half.trials[0].points[-1].samples == 3440

"""What docs/detect.md says: its commands run, its config builds, its tables are those of the records."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

import attnzoo
from attnzoo import tasks
from attnzoo.bench.page import page_of
from attnzoo.bench.readme import markdown_table
from attnzoo.errors import ConfigError
from attnzoo.tasks import read_records
from attnzoo.tasks.detect import config as configs
from attnzoo.tasks.detect import cost, mmcv_ext, page
from attnzoo.tasks.detect import data as datas
from attnzoo.tasks.detect.branches import branches, summed
from attnzoo.tasks.detect.stages import ATTENTION, ENCODER
from tests.tasks.detect.runs import make_data
from tests.tasks.detect.tables import HALF_WAY, ap_at, seeds_table

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "detect.md"
SUMS, GAIN = "padre degree=2 products=False", "padre degree=2 gain=0.02"
CONFIGS = sorted((ROOT / "configs" / "detect").glob("*.py"))


EVALUATED = ["cost.repeats=2", "cost.sizes=[[64,64]]"]  # what is changed of evaluations, to be quicker


def between(name):
    return PAGE.read_text(encoding="utf-8").split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_says_how_it_is_run(config):
    loaded = configs.load_config(config)
    detector = cost.dense_detector(loaded)
    if loaded.model.get("attention") is not None:
        cost.swapped(detector, cost.variant_of(loaded), 0)
        swapped = attnzoo.swap_report(cost.swapped(detector, cost.variant_of(loaded), 0)).swapped
        assert len(swapped) == loaded.model.encoder.num_layers
    assert config.read_text(encoding="utf-8").startswith("# ")
    cost.read(loaded)


def test_the_first_commands_run(tmp_path, forked):
    """As they stand, but for data drawn here, an epoch and few rounds; each script is started once as users do it."""
    cached = tmp_path / "cache" / "neon_tree_crowns_coco"
    for split in ("train", "val"):
        made = make_data(tmp_path / split, images=4)
        (cached / "annotations").mkdir(parents=True, exist_ok=True)
        text = (made / "boxes.json").read_text(encoding="utf-8").replace("square", "Tree")
        (cached / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")
        (made / "images").rename(cached / split)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    first, launched = (block.splitlines() for block in blocks("sh") if "trees_padre.py" in block)
    assert first[0].startswith("pip install")
    environment = {"ATTNZOO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for command in [*first[1:], *launched]:
        launcher, script, words = re.fullmatch(r"(.*?)((?:train|eval)/\S+\.py) (.*)", command).groups()
        words = [*words.split(), "train_cfg.max_epochs=1", *(EVALUATED if "eval/" in script else [])]
        if launcher == "python " and "train/" in script:
            ended = [forked.script(script, *words, cwd=tmp_path, **environment).finish()]
        elif launcher != "python " and "eval/" in script:
            count = int(re.fullmatch(r"torchrun --nproc_per_node (\d) ", launcher)[1])
            ended = [child.finish() for child in forked.scripts(count, script, *words, cwd=tmp_path, **environment)]
        else:
            module = ["-m", "torch.distributed.run", *launcher.split()[1:]] if launcher != "python " else []
            begun = [sys.executable, *module, str(ROOT / script), *words]
            bare = {**environment, "PATH": "/usr/bin:/bin"}
            ended = [subprocess.run(begun, cwd=tmp_path, env=bare, capture_output=True, text=True)]
        for done in ended:
            assert done.returncode == 0, done.stderr[-2000:]
    page = re.search(r"`(runs/detect/\S+report\.html)`", PAGE.read_text(encoding="utf-8"))[1]
    assert "Drawn boxes" in (tmp_path / page).read_text(encoding="utf-8")


def test_a_list_of_mmengines_is_given_whole():
    cost = ROOT / "configs/detect/detr_r50_cost.py"
    for override in ("cost.attentions.4.name=sima", "cost.attentions.x=sima", "test_dataloader.dataset.pipeline.9=x"):
        with pytest.raises(ConfigError, match=r"is a list of .*; give the whole list"):
            configs.load_config(cost, [override])
    assert configs.load_config(cost, ["cost.attentions.0.name=sima"]).cost.attentions[0].name == "sima"


def test_a_config_that_asks_for_no_cost_is_not_timed():
    first, *others = (f"{ROOT}/configs/detect/bccd_cpu_{name}.py" for name in ("softmax", "none", "conv"))
    _, config = tasks.load(Path(first), others)
    assert [variant.label for variant in config.variants] == ["dense", "conv"]


def test_the_config_of_the_page_builds(tmp_path):
    text = next(block for block in blocks("text") if "_base_" in block)
    (tmp_path / "one.py").write_text(text, encoding="utf-8")
    loaded = configs.load_config(tmp_path / "one.py")
    detector = mmcv_ext.load("mmdet.registry").MODELS.build(loaded.model)
    assert len(attnzoo.swap_report(detector).swapped) == 6


def test_data_of_ones_own_are_read_as_the_page_says(tmp_path, monkeypatch):
    text = next(block for block in blocks("text") if "birds" in block)
    base = ROOT / "configs" / "detect" / "trees_padre.py"
    (tmp_path / "birds.py").write_text(text.replace('"trees_padre.py"', repr(str(base))))
    for split in ("train", "val"):
        folder = make_data(tmp_path / split, images=2)
        content = json.loads((folder / "boxes.json").read_text(encoding="utf-8"))
        content["categories"] = [{"id": 1, "name": "crow"}, {"id": 2, "name": "gull"}]
        place = tmp_path / "data" / "birds"
        (place / "annotations").mkdir(parents=True, exist_ok=True)
        (place / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "images").rename(place / split)
    monkeypatch.chdir(tmp_path)
    loaded = configs.load_config("birds.py")
    assert [(one.images, one.classes) for one in datas.prepare(loaded)] == [(2, ("crow", "gull"))] * 2


def test_the_table_of_the_overfitted_is_that_of_the_records():
    records = read_records(ROOT / "docs" / "records" / "trees_overfit" / "records.jsonl")
    assert between("trees-overfit") == markdown_table(records)


@pytest.mark.parametrize(("name", "pictures"), [("trees_overfit", 16), ("bccd_cpu", 104), ("detr_r50_cost", 0)])
def test_committed_pages_are_what_the_records_give_today(name, pictures):
    folder = ROOT / "docs" / "records" / name
    records, config = read_records(folder / "records.jsonl"), (folder / "records.yaml").read_text(encoding="utf-8")
    page = page_of(tasks.find("detect"), records, config, folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    assert page.count("data:image/jpeg") == pictures
    assert {(r.task, r.environment.dirty) for r in records} == {("detect", False)}
    assert all(re.fullmatch(r"\d+ x \d+ pixels", r.workload) for r in records if r.kind == "cost")


def test_what_the_page_claims_is_in_the_records():
    overfit = read_records(ROOT / "docs" / "records" / "trees_overfit" / "records.jsonl")
    assert all(r.quality.ap50 >= 0.9 for r in overfit if r.kind == "quality")
    records = read_records(ROOT / "docs" / "records" / "detr_r50_cost" / "records.jsonl")
    assert all(record.gate.passed for record in records)
    at = {record.label: record for record in records if record.tokens == 1764}
    used = {r.label: r.cost for r in records if r.workload == "800 x 1333 pixels"}
    of_sdpa = [
        (cost.candidate.stage(ENCODER).speedup.p50, cost.ratios.speedup.p50) for cost in (at["sdpa"].cost, used["sdpa"])
    ]
    large, usual = ("{:.1f}x and the detector {:.2f}x", "{:.1f}x and {:.2f}x at 800 x 1,333")
    said = f"the encoder {large.format(*of_sdpa[0])} as fast at 1,333 x 1,333 pixels, {usual.format(*of_sdpa[1])}"
    assert said in " ".join(PAGE.read_text(encoding="utf-8").split())
    softmax, sdpa, padre = (at[label].cost.candidate for label in ("softmax", "sdpa", "padre degree=2"))
    size = used["padre degree=2"]
    gains = [size.candidate.stage(stage).speedup.p50 for stage in (ATTENTION, ENCODER)]
    whole = f"{size.ratios.speedup.p50:.2f}x"
    said = f"the attention gains {gains[0]:.1f}x, the encoder {gains[1]:.1f}x and the detector {whole}"
    assert said in PAGE.read_text(encoding="utf-8")
    alone = [side.stage("encoder's attention").latency_ms.p50 for side in (softmax, sdpa, padre)]
    assert 17.5 < alone[0] / alone[2] < 18.5
    assert 4.5 < alone[1] / alone[2] < 5.5
    assert f"{padre.stage('encoder').speedup.p50:.1f}" == "4.9"
    assert f"{at['dense'].cost.candidate.most_speedup(ATTENTION, ENCODER):.1f}" == "5.9"
    assert f"{at['padre degree=2'].cost.ratios.speedup.p50:.1f}" == "1.2"
    assert 0.99 < at["padre degree=2"].cost.ratios.activation_peak < 1.01
    peaks = [side.stage("encoder").activation_peak_bytes for side in (padre, at["dense"].cost.candidate)]
    assert 0.095 < peaks[0] / peaks[1] < 0.105
    assert sdpa.stage("encoder").activation_peak_bytes < 1.01 * peaks[0], "sdpa saves as much"
    small = next(record for record in records if (record.tokens, record.label) == (100, "padre degree=2"))
    assert small.cost.candidate.stage(ATTENTION).speedup.p80 < 1


def test_what_the_page_says_of_blood_cells_is_in_the_records():
    records = read_records(ROOT / "docs/records/bccd_cpu/records.jsonl")
    assert between("bccd-cpu") == seeds_table(records).markdown().strip()
    trained = {r.label: r.quality.trainings for r in records if r.kind == "quality"}
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    softmax, padre, sums, none = (
        trained[label] for label in ("dense", "padre degree=2", "padre degree=2 products=False", "no mixing")
    )
    gain = trained["padre degree=2 gain=0.02"]

    def aps(trainings):
        return [f"{100 * one.ap:.1f}" for one in trainings]

    def half_way(trainings):
        return sorted(100 * ap_at(one, HALF_WAY) for one in trainings)

    mean = [statistics.fmean(100 * one.ap for one in each) for each in (padre, softmax)]
    said = ["the lower mean, {:.1f} against {:.1f}% of four seeds each".format(*mean)]
    assert sum(max(padre, key=lambda one: one.ap).ap > one.ap for one in softmax) == 2
    every = [one for each in trained.values() for one in each]
    correlation = stats.spearmanr([ap_at(one, HALF_WAY) for one in every], [one.ap for one in every]).statistic
    said += [
        f"over all {len(every)} trainings AP at epoch 24 and in the end have a rank correlation of {correlation:.2f}"
    ]
    multiplied = [label for label in trained if "degree=2" in label and label not in (SUMS, GAIN)]
    late = half_way([one for label in multiplied for one in trained[label]])
    early = half_way([one for label in trained if label not in (*multiplied, GAIN) for one in trained[label]])
    assert (len(late), len(early)) == (9, 14)
    assert late[-1] < early[0]
    said += [
        f"have {late[0]:.1f} to {late[-1]:.1f}%; the fourteen without products have {early[0]:.1f} to {early[-1]:.1f}%"
    ]
    said += ["`products=False`, has {:.1f} and {:.1f}% at epoch 24 in two seeds".format(*half_way(sums))]
    said += [f"degree 2 {half_way(padre)[0]:.1f} to {half_way(padre)[-1]:.1f}% in four"]
    said += [
        "degree 1 has {:.1f}%".format(*half_way(trained["padre degree=1"])),
        "sums have {} and {}%".format(*aps(sums)),
    ]
    said += ["finds {}, {} and {}%, no less than with softmax".format(*aps(none))]
    assert statistics.fmean(one.ap for one in none) > statistics.fmean(one.ap for one in softmax)
    assert min(one.loss for one in every) == min(one.loss for one in none)
    assert max(one.ap for one in sums) < statistics.fmean(one.ap for one in softmax)
    small = half_way(gain)
    said += [f"begins at 0.02 one has {small[2]:.1f}%, the others {small[0]:.1f} and {small[1]:.1f}%"]
    tried = [one for label in multiplied if label != "padre degree=2" for one in trained[label]]
    said += [f"have {100 * min(one.ap for one in tried):.1f} to {100 * max(one.ap for one in tried):.1f}% in the end"]
    added = {label: [b.ratio for one in each for b in one.branches] for label, each in trained.items()}
    assert max(added["padre degree=2 out_norm=True gain=0.5"]) < min(added["padre degree=1"])
    said += ["has {}% in one seed, the second best of all, and {} and {}% in two".format(*aps(gain))]
    assert sorted(every, key=lambda one: one.ap)[-2] == gain[0]
    assert [phrase for phrase in said if phrase not in text] == []


def test_at_the_start_padre_adds_less_than_the_stream():
    config = configs.load_config(ROOT / "configs/detect/bccd_cpu_padre.py")
    mmcv_ext.load("mmengine.registry").init_default_scope("mmdet")
    torch.manual_seed(0)
    detector = mmcv_ext.load("mmdet.registry").MODELS.build(config.model)
    detector.init_weights()
    with summed(detector) as sums, torch.no_grad():
        detector.encoder.eval()
        x, position = torch.randn(1, 300, 128), torch.randn(1, 300, 128)
        for layer in detector.encoder.layers:
            layer.self_attn.attn.map.size = (15, 20)
        detector.encoder(query=x, query_pos=position, key_padding_mask=None)
    found = branches(sums)
    assert len(found) == 2
    assert all(0.1 < branch.ratio < 1 for branch in found), found


def test_speed_up_is_drawn_where_several_sizes_were_measured():
    records = read_records(ROOT / "docs" / "records" / "detr_r50_cost" / "records.jsonl")
    alone, whole = (svg for _, svg in page.plots(records) if svg)
    assert all(drawn.count(f">{one.label}</text>") == 1 for drawn in (alone, whole) for one in records)
    assert (alone.count(">at most</text>"), whole.count(">at most</text>")) == (0, 1)
    assert not any(svg for _, svg in page.plots([record for record in records if record.tokens == 100]))
    turned = [record.model_copy(update={"tokens": 225}) for record in records if record.tokens == 400]
    assert len([svg for _, svg in page.plots([*records, *turned]) if svg]) == 2  # two sizes of as many tokens

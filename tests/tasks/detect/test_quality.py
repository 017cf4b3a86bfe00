"""A ratio of AP where dense's is above chance, and else a difference in points: in records, tables and results."""

import csv
import io
import json
from html import unescape

import pytest

from attnzoo.bench import results
from attnzoo.bench.highlights import QUALITY, Source, of_records
from attnzoo.bench.page import page_of
from attnzoo.bench.words import quality_kept
from attnzoo.tasks import find
from attnzoo.tasks.detect import score
from attnzoo.tasks.detect.quality import CHANCE, Branch, Detecting, Detection, Record
from tests.bench.data import record_data
from tests.tasks.detect.runs import make_data


def detection(ap):
    metric = {"ap": ap, "ap50": ap, "ap75": ap, "ap_small": None, "ap_medium": None, "ap_large": None}
    return Detection(**metric, images=20, boxes=60, trainings=(Detecting(seed=0, **metric),), note="on tiles")


def test_branches_are_told_from_the_lowest_to_the_highest():
    assert detection(0.5).details["its kurtosis"] == "-", "records of before have none"
    figures = [(0.423, 3.1), (27.6, 154.2), (None, None)]
    branches = tuple(Branch(layer="encoder.0", ratio=ratio, kurtosis=kurtosis) for ratio, kurtosis in figures)
    found = detection(0.5)
    found = found.model_copy(update={"trainings": (found.trainings[0].model_copy(update={"branches": branches}),)})
    assert found.details["rms of attention over residual, lowest to highest"] == "0.42 to 27.60"
    assert found.details["its kurtosis"] == "3 to 154"
    assert not found.brief.trainings[0].branches


def record(label, quality, kind):
    own = {"task": "detect", "part": "detection", "label": label, "is_baseline": label == "dense", "kind": kind}
    own |= {"attention": None if label == "dense" else "padre", "quality": quality, "quality_note": quality.note}
    own |= {"tokens": 0, "cost": None} if kind == "quality" else {}
    return Record.model_validate(record_data(**own))


@pytest.mark.parametrize(
    ("dense", "own", "kept"),
    [(0.5, 0.45, "0.90x"), (0.06, 0.03, "0.50x"), (0.05, 0.08, "+3.0 points"), (0.0, 0.0, "+0.0 points")],
)
def test_a_ratio_only_where_dense_is_above_chance(tmp_path, dense, own, kept):
    qualities = {"dense": detection(dense).as_dense(), "padre": detection(own).against(detection(dense))}
    above = dense > CHANCE
    assert [quality_kept(one) for one in qualities.values()] == ["1.00x" if above else "-", kept]
    assert (qualities["padre"].ratio is None, qualities["padre"].points is None) == (not above, above)
    records = [record(label, one, kind) for kind in ("cost", "quality") for label, one in qualities.items()]
    records = [Record.model_validate_json(one.model_dump_json()) for one in records]
    page = unescape(page_of(find("detect"), records))
    assert kept in page.split("</svg>")[-1]
    assert page.count("Dense's AP is not above 5%") == (not above)
    assert (f"keeping {kept} of dense's" if above else f"its AP {kept} from dense's") in page.split("<svg")[0]
    highlights = of_records(records, lambda row: row.task)
    assert {one.figures[QUALITY].text for one in highlights if QUALITY in one.figures} == {kept}
    source = Source(tmp_path / "records.jsonl", tuple(highlights))
    assert f">{kept}</a>" in results.html([source], ["detect"], tmp_path, "again")
    lines = csv.DictReader(io.StringIO(results.csv([source], ["detect"], tmp_path)))
    (line,) = (line for line in lines if line["workload"] == "AP: on tiles")
    ratio, points = line["quality kept (ratio to dense)"], line["points of quality above dense"]
    assert (ratio, points) == ((f"{own / dense:.6g}", "") if above else ("", f"{100 * (own - dense):.6g}"))


@pytest.mark.parametrize("seed", [0, 1])
def test_right_boxes_on_the_wrong_images_are_below_chance(tmp_path, seed):
    """What `CHANCE` claims: as many boxes, of the right sizes, where boxes tend to be."""
    data = make_data(tmp_path / "data", images=60, seed=seed)
    truth = json.loads((data / "boxes.json").read_text(encoding="utf-8"))
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    found = [
        {**one, "image_id": (one["image_id"] + 1) % len(files), "score": 1 / (1 + number)}
        for number, one in enumerate(truth["annotations"])
    ]
    (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")
    metric = score.scores(data / "boxes.json", tmp_path / "found.json", files, ["square"]).metric
    assert metric.ap50 > 0
    assert metric.ap <= CHANCE

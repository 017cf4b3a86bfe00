"""COCO's metric, and which images a detector did best and worst on."""

import json

import pytest

from attnzoo.errors import DataError
from attnzoo.tasks.detect import score

CAT, DOG = 1, 2


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def truth(tmp_path):
    """Three images: two cats; a dog and a crowd of cats; nothing."""
    boxes = [(1, CAT, [10, 10, 40, 40], 0), (1, CAT, [60, 10, 20, 20], 0), (2, DOG, [5, 5, 50, 50], 0)]
    boxes.append((2, CAT, [60, 60, 30, 30], 1))
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2, 3)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": crowd}
            for n, (i, c, b, crowd) in enumerate(boxes, 1)
        ],
    }
    return write(tmp_path / "true.json", content)


FILES = {1: "1.png", 2: "2.png", 3: "3.png"}
RIGHT = [(1, CAT, [10, 10, 40, 40], 0.9), (1, CAT, [60, 10, 20, 20], 0.8), (2, DOG, [5, 5, 50, 50], 0.7)]


def scored(truth, tmp_path, answers, files=FILES):
    rows = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in answers]
    found = score.scores(truth, write(tmp_path / "found.json", rows), files, ["cat", "dog"])
    return found, found.metric


def test_all_right_is_one(truth, tmp_path):
    found, metric = scored(truth, tmp_path, RIGHT)
    assert (metric.ap, metric.ap50, metric.ap75) == pytest.approx((1, 1, 1))
    assert (metric.ap_small, metric.ap_medium, metric.ap_large) == (pytest.approx(1), pytest.approx(1), None)
    assert (found.images, found.boxes) == (3, 3)
    assert [one.f1 for one in found.judged] == [1, 1, 1]


def test_nothing_found_is_zero(truth, tmp_path):
    found, metric = scored(truth, tmp_path, [])
    assert (metric.ap, metric.ap50, found.threshold) == (0, 0, 0.5)
    assert [(one.path, one.f1) for one in found.judged] == [("3.png", 1), ("1.png", 0), ("2.png", 0)]


def test_what_lies_in_a_crowd_counts_for_nothing(truth, tmp_path):
    assert scored(truth, tmp_path, [*RIGHT, (2, CAT, [62, 62, 20, 20], 0.95)])[1].ap == pytest.approx(1)
    assert scored(truth, tmp_path, [*RIGHT, (2, CAT, [2, 62, 20, 20], 0.95)])[1].ap < 0.9


def test_images_are_judged_at_the_threshold_that_is_best_for_all(truth, tmp_path):
    wrong = [(3, DOG, [1, 1, 9, 9], 0.75), (3, CAT, [1, 1, 9, 9], 0.6), (2, CAT, [1, 1, 9, 9], 0.5)]
    found, _ = scored(truth, tmp_path, [*RIGHT, *wrong])
    assert found.threshold == pytest.approx(0.7)  # three hits of four: 6/7, and at 0.8 two of two: 4/5
    assert [(one.path, one.f1) for one in found.judged] == [("1.png", 1), ("2.png", 1), ("3.png", 0)]
    assert [len(one.predicted) for one in found.judged] == [2, 1, 1]
    assert found.judged[1].true == ((5, 5, 50, 50, 1),)


def test_images_that_are_not_asked_for_do_not_count(truth, tmp_path):
    found, metric = scored(truth, tmp_path, RIGHT[:2], {1: "1.png"})
    assert (metric.ap, found.images, found.boxes) == (pytest.approx(1), 1, 2)


def test_a_box_is_too_far_off_for_some_thresholds(truth, tmp_path):
    _, metric = scored(truth, tmp_path, [(1, CAT, [10, 10, 40, 26], 0.9)], {1: "1.png"})  # IoU 0.65
    assert metric.ap50 > metric.ap > 0
    assert metric.ap75 == 0


def test_curves_come_from_all_starts_of_a_run_and_survive_a_torn_line(tmp_path):
    for start, epochs in (("20260101_000000", (1, 2)), ("20260102_000000", (2, 3))):
        log = tmp_path / start / "vis_data" / "scalars.json"
        log.parent.mkdir(parents=True)
        rows = [{"coco/bbox_mAP": e / 10, "coco/bbox_mAP_50": e / 5 + len(epochs), "step": e} for e in epochs]
        rows[1:1] = [{"loss": float(epoch), "step": 10 * epoch, "epoch": epoch} for epoch in range(1, 20)]
        rows.insert(1, {"loss": 99.0, "step": 190, "epoch": 19})  # as a run that was broken off had it before
        log.write_text("\n".join(map(json.dumps, rows)) + '\n{"coco/bbox_m', encoding="utf-8")
    found = score.curve(tmp_path)
    assert found["epochs"] == [1, 2, 3]
    assert found["epoch_ap"] == pytest.approx([0.1, 0.2, 0.3])
    assert found["loss"] == 18.5, "of epochs 18 and 19"
    with log.open("a", encoding="utf-8") as lines:
        lines.write('\n{"loss": NaN, "step": 191, "epoch": 19}\n')
    assert score.curve(tmp_path)["loss"] is None, "of a training that diverged"
    assert score.curve(tmp_path / "none") == {"epochs": [], "epoch_ap": [], "epoch_ap50": [], "loss": None}


def test_where_there_is_nothing_to_find_there_is_no_ap(truth, tmp_path):
    with pytest.raises(DataError, match="the 1 test images have no box of the classes cat, dog"):
        scored(truth, tmp_path, RIGHT, {3: "3.png"})


def test_boxes_of_one_score_stand_or_fall_together(truth, tmp_path):
    wrong = [(3, DOG, [1, 1, 9, 9], 0.8), (3, CAT, [1, 1, 9, 9], 0.8)]
    assert scored(truth, tmp_path, [RIGHT[0], RIGHT[1], *wrong])[0].threshold == pytest.approx(0.8)  # 4/7, above 1/2
    assert scored(truth, tmp_path, [RIGHT[0], *wrong])[0].threshold == pytest.approx(0.9)

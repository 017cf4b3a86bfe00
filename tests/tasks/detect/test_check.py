"""COCO files are checked before any work."""

import json
import time
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from attnzoo.errors import ConfigError, DataError
from attnzoo.tasks.detect import coco, score, voc
from attnzoo.tasks.detect import data as datas


def content(*boxes, images=1, crowd=0):
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(images)],
        "annotations": [
            {"id": i + 1, "image_id": 0, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "cat"}],
    }


def changed(kind, **values):
    told = content([1, 1, 2, 2])
    told[kind][0] |= values
    return told


def without(kind, *keys):
    told = content([1, 1, 2, 2])
    told[kind][0] = {key: value for key, value in told[kind][0].items() if key not in keys}
    return told


@pytest.fixture
def dataset(tmp_path):
    def make(told, **more):
        (tmp_path / "a.json").write_text(told if isinstance(told, str) else json.dumps(told), encoding="utf-8")
        for image in told["images"] if isinstance(told, dict) else []:
            if not image.get("file_name"):
                continue
            Image.new("RGB", (20, 10)).save(tmp_path / image["file_name"])
        data = {"type": "CocoDataset", "data_root": str(tmp_path), "ann_file": "a.json", "data_prefix": {"img": ""}}
        return {**data, "metainfo": {"classes": ("cat",)}, **more}

    return make


def test_what_is_odd_is_counted(dataset):
    boxes = [[1, 1, 5, 5], [-2, 1, 8, 5], [15, 1, 8, 5], [1, 1, 0, 5], [30, 1, 5, 5], [3, 3, 1, 1]]
    (found,) = datas.dataset(dataset(content(*boxes, images=3)))
    assert (found.images, found.boxes) == (3, 6)
    assert found.odd == {
        "boxes past the edge": 2,
        "boxes without area or outside, left out": 2,
        "images without a box": 2,
    }
    assert found.classes == ("cat",)
    assert datas.dataset(dataset(content([1, 1, 5, 5], crowd=1)))[0].odd == {"crowd regions": 1}
    more = content([1, 1, 5, 5])
    more["categories"].append({"id": 8, "name": "cow"})
    more["annotations"].append({**more["annotations"][0], "id": 2, "category_id": 8})
    assert datas.dataset(dataset(more))[0].odd == {"boxes of other classes, left out": 1}
    more["annotations"] = more["annotations"][1:]
    assert datas.dataset(dataset(more))[0].odd == {"boxes of other classes, left out": 1, "images without a box": 1}
    assert datas.dataset(dataset(content([1, 1, 0, 5], [30, 1, 5, 5])))[0].odd == {
        "boxes without area or outside, left out": 2,
        "images without a box": 1,
    }
    hidden = content([1, 1, 5, 5])
    hidden["annotations"][0]["ignore"] = 1
    assert datas.dataset(dataset(hidden))[0].odd == {"boxes to be ignored, scored as crowd regions": 1}
    assert "a.json: 3 images, 6 boxes (2 boxes past the edge" in str(found)


def test_training_needs_a_box_where_images_without_one_are_left_out(dataset):
    filters = {"filter_cfg": {"filter_empty_gt": True}}
    for told in (content(), content([1, 1, 5, 5], crowd=1), content([1, 1, 0, 5])):
        with pytest.raises(DataError, match=r"a\.json has no box to train on"):
            datas.dataset(dataset(told, **filters))
        assert datas.dataset(dataset(told))
        assert datas.dataset(dataset(told, **filters, test_mode=True))
    assert datas.dataset(dataset(content([1, 1, 5, 5]), **filters))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", r"a\.json are broken"),
        ({"images": []}, r"a\.json is not a COCO file: it has no list 'annotations'"),
        (content(images=0), r"a\.json holds no image"),
        (changed("annotations", bbox=[1, 2]), r"a\.json: annotations\.0\.bbox: list should have at least 4 items"),
        (changed("annotations", image_id=9), "annotation 1 is of an image or a category that is not listed"),
        (changed("annotations", category_id=9), "annotation 1 is of an image or a category that is not listed"),
        (changed("annotations", area=None), r"annotations\.0\.area: input should be a valid number, not None"),
        (without("annotations", "area"), r"annotations\.0\.area: field required$"),
        (without("images", "width", "height"), r"images\.0\.width: field required \(and 1 more\)"),
        ({**content(), "images": [*content()["images"], *content()["images"]]}, "two of its images have the id 0"),
        (changed("annotations", id=0), r"annotations\.0\.id: .* pycocotools takes the id 0 for none"),
        (changed("annotations", id="7"), r"annotations\.0\.id: input should be a valid integer, not '7'"),
        (changed("annotations", iscrowd=None), r"annotations\.0\.iscrowd: input should be 0 or 1, not None"),
        (changed("annotations", iscrowd="0"), r"annotations\.0\.iscrowd: input should be 0 or 1, not '0'"),
        (changed("annotations", bbox=[1, 1, "2", 2]), r"annotations\.0\.bbox\.2: input should be a valid number"),
        (changed("annotations", bbox=[1, 1, float("nan"), 2]), r"annotations\.0\.bbox\.2: .* finite number, not nan"),
        (changed("annotations", area=float("inf")), r"annotations\.0\.area: .* finite number, not inf"),
        (changed("annotations", ignore="yes"), r"annotations\.0\.ignore"),
        (changed("images", width=None), r"images\.0\.width: input should be a valid integer, not None"),
        (changed("images", height="10"), r"images\.0\.height: input should be a valid integer, not '10'"),
        (changed("images", width=-1), r"images\.0\.width: input should be greater than 0, not -1"),
        (changed("images", file_name=""), r"images\.0\.file_name: string should have at least 1 character"),
        (changed("categories", name=3), r"categories\.0\.name: input should be a valid string, not 3"),
        (changed("categories", id="7"), r"categories\.0\.id: input should be a valid integer, not '7'"),
        ({**content(), "annotations": "none"}, "it has no list 'annotations'"),
    ],
)
def test_what_is_wrong_is_named(dataset, told, message):
    with pytest.raises(DataError, match=message):
        datas.dataset(dataset(told))


def test_missing_files_and_categories_are_named(dataset, tmp_path):
    good = dataset(content([1, 1, 5, 5], images=2))
    assert [one.images for one in datas.dataset({"datasets": [good, {"dataset": good}]})] == [2, 2]  # inside wrappers
    with pytest.raises(DataError, match="has no category dog; it has cat"):
        datas.dataset({**good, "metainfo": {"classes": ("cat", "dog")}})
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images of .*a\.json are not in .*: 1\.png"):
        datas.dataset(good)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        datas.dataset({**good, "ann_file": "none.json"})
    assert datas.dataset({"type": "VOCDataset", "ann_file": "list.txt"}) == []


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    datas.same_classes(("a", "b"), ["a", "b"], tmp_path)
    datas.same_classes(None, ["a"], tmp_path)
    for other in (["b", "a"], ["a"]):
        with pytest.raises(DataError, match="was trained on the classes a, b"):
            datas.same_classes(("a", "b"), other, tmp_path)


def test_classes_are_those_of_the_file_in_its_order(dataset):
    """Mmdet numbers classes in the order of the file, whatever order the config gives."""
    told = content([1, 1, 5, 5])
    told["categories"] = [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}]
    assert datas.dataset(dataset(told, metainfo={"classes": ("dog", "cat")}))[0].classes == ("dog", "cat")
    with pytest.raises(DataError, match="lists the classes as dog, cat, and mmdet numbers them so"):
        datas.dataset(dataset(told, metainfo={"classes": ("cat", "dog")}))
    with pytest.raises(DataError, match="has no category person, bicycle"):  # mmdet would take COCO's own, unasked
        datas.dataset(dataset(told, metainfo=None))


def test_a_large_file_is_read_in_seconds(tmp_path):
    told = content(*[[1, 1, 5, 5]] * 100_000)
    (tmp_path / "large.json").write_text(json.dumps(told), encoding="utf-8")
    start = time.process_time()
    assert len(coco.read(tmp_path / "large.json")["annotations"]) == 100_000
    assert time.process_time() - start < 5


# ---- pictures against the file's word


@pytest.mark.parametrize("size", [(10, 20), (40, 20)], ids=["turned", "resized"])
def test_images_of_another_size_than_annotated_are_refused(dataset, tmp_path, size):
    data = dataset(content([1, 1, 5, 5], images=3))
    Image.new("RGB", size).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=rf"1 of 3 images .*: 1\.png is {size[0]} x {size[1]}, annotated as 20 x 10"):
        datas.dataset(data)


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_turned_by_exif_are_refused_by_coco_and_voc(dataset, tmp_path, orientation):
    told = content([1, 1, 5, 5])
    told["images"][0]["file_name"] = "0.jpg"
    data = dataset(told)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(tmp_path / "0.jpg", exif=exif)
    with pytest.raises(DataError, match=rf"0\.jpg is turned by EXIF \(orientation {orientation}\)"):
        datas.dataset(data)
    with pytest.raises(DataError, match="turned by EXIF"):
        voc.read_voc(tmp_path / "none.xml", tmp_path / "0.jpg", voc.Converted())
    exif[0x0112] = 1
    Image.new("RGB", (20, 10)).save(tmp_path / "0.jpg", exif=exif)
    assert datas.dataset(data)


def test_a_file_that_is_no_image_is_refused_before_work(dataset, tmp_path):
    data = dataset(content([1, 1, 5, 5], images=2))
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png cannot be read as an image"):
        datas.dataset(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("<xmin>2", "<xmin>nan"), "xmin is nan"),
        (("<ymax>9", "<ymax>inf"), "ymax is inf"),
        (("<difficult>0", "<difficult>maybe"), "difficult is 'maybe', not 0 or 1"),
        (("<width>20", "<width>-1"), r"is for an image of -1 x 10"),
        (("<width>20", "<width>10"), r"is for an image of 10 x 10, but .* has 20 x 10"),
    ],
)
def test_the_same_is_checked_of_voc(tmp_path, change, says):
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    text = f"<a><size><width>20</width><height>10</height></size><object><name>cat</name><difficult>0</difficult>{box}"
    text += "</object></a>"
    Image.new("RGB", (20, 10)).save(tmp_path / "0.png")
    (tmp_path / "0.xml").write_text(text, encoding="utf-8")
    assert len(voc.read_voc(tmp_path / "0.xml", tmp_path / "0.png", voc.Converted()).boxes) == 1
    assert change[0] in text
    (tmp_path / "0.xml").write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(DataError, match=says):
        voc.read_voc(tmp_path / "0.xml", tmp_path / "0.png", voc.Converted())


# ---- what is scored is what the check says

ODD = {
    "no area": {"bbox": [1, 1, 0, 5], "area": 0},
    "said to have no area": {"area": 0},
    "under a pixel wide": {"bbox": [1, 1, 0.5, 5], "area": 2.5},
    "outside": {"bbox": [30, 1, 5, 5]},
    "to be ignored": {"ignore": 1},
    "a crowd": {"iscrowd": 1},
}


def scoring(evaluator, data, tmp_path):
    return Config({"work_dir": str(tmp_path / "run"), "val_dataloader": {"dataset": data}, "val_evaluator": evaluator})


@pytest.mark.parametrize("odd", ODD)
def test_a_perfect_detector_is_perfect(dataset, tmp_path, odd):
    """It finds all that a data set gives it to find; the rest must not count as missed."""
    told = content([1, 1, 6, 6], [10, 2, 6, 6])
    told["annotations"][1] |= ODD[odd]
    data = dataset(told)
    (found,) = datas.dataset(data)
    assert found.trained == 1
    assert sum(found.odd.values()) == 1
    config = scoring({"type": "CocoMetric", "ann_file": str(tmp_path / "a.json")}, data, tmp_path)
    datas.check_metrics(config, "val")
    datas.check_metrics(config, "val")  # and again, when the metric reads its copy already
    predicted = [{"image_id": 0, "category_id": 7, "bbox": [1, 1, 6, 6], "score": 0.9}]
    (tmp_path / "found.json").write_text(json.dumps(predicted), encoding="utf-8")
    truth = Path(config.val_evaluator["ann_file"])
    found = score.scores(truth, tmp_path / "found.json", {0: "0.png"}, ["cat"])
    assert found.metric.ap == pytest.approx(1.0)
    assert (truth == tmp_path / "a.json") is (odd == "a crowd"), "the user's own file where nothing is left out"


@pytest.mark.parametrize(
    "evaluator",
    [
        lambda metric: [{"type": "VOCMetric"}, metric],
        lambda metric: {"type": "Evaluator", "metrics": [metric]},
        lambda metric: {**metric, "type": "mmdet.CocoMetric"},
    ],
    ids=["list", "Evaluator", "scope"],
)
def test_what_is_scored_is_checked_wherever_the_metric_stands(dataset, tmp_path, evaluator):
    told = content([1, 1, 6, 6], [10, 2, 0, 6])
    given = {"type": "CocoMetric", "ann_file": str(tmp_path / "a.json")}
    config = scoring(evaluator(given), dataset(told), tmp_path)
    datas.check_metrics(config, "val")
    (metric,) = [one for one in datas.metrics(config.val_evaluator) if "ann_file" in one]
    assert Path(metric["ann_file"]).parent == tmp_path / "run/scored"
    assert len(coco.read(Path(metric["ann_file"]))["annotations"]) == 1
    datas.check_metrics(config, "val")
    metric["ann_file"] = "other.json"
    with pytest.raises(ConfigError, match=r"ann_file='other\.json' is not what val_dataloader reads"):
        datas.check_metrics(config, "val")


@pytest.mark.parametrize(
    ("metric", "data"),
    [("LVISMetric", "LVISV1Dataset"), ("CocoMetric", "LVISV05Dataset"), ("LVISMetric", "CocoDataset")],
)
def test_files_of_other_metrics_and_data_sets_are_left_alone(tmp_path, metric, data):
    """LVIS has no ``iscrowd``, which the schema of COCO's files asks for."""
    told = without("annotations", "iscrowd")
    (tmp_path / "lvis.json").write_text(json.dumps(told), encoding="utf-8")
    file = str(tmp_path / "lvis.json")
    config = scoring({"type": metric, "ann_file": file}, {"type": data, "ann_file": file}, tmp_path)
    datas.check_metrics(config, "val")
    datas.check_metrics(config, "val")
    assert config.val_evaluator.ann_file == file
    assert not (tmp_path / "run").exists()


def test_another_root_moves_the_files_of_all_metrics(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [{"type": "VOCMetric"}, {"type": "CocoMetric", "ann_file": "data/a.json"}]
    config = scoring(given, {**dataset(content()), "data_root": "data/"}, tmp_path)
    datas.move(config, "data/", "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "a.json").rename(tmp_path / "other/a.json")
    assert config.val_evaluator[1].ann_file == "other/a.json"
    datas.check_metrics(config, "val")

"""COCO files are checked before any work."""

import json

import pytest
from PIL import Image

from attnzoo.detection import check
from attnzoo.errors import DataError


def content(*boxes, images=1, crowd=0):
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(images)],
        "annotations": [
            {"id": i + 1, "image_id": 0, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "cat"}],
    }


@pytest.fixture
def dataset(tmp_path):
    def make(told, **more):
        (tmp_path / "a.json").write_text(told if isinstance(told, str) else json.dumps(told), encoding="utf-8")
        for image in told["images"] if isinstance(told, dict) else []:
            Image.new("RGB", (20, 10)).save(tmp_path / image["file_name"])
        data = {"type": "CocoDataset", "data_root": str(tmp_path), "ann_file": "a.json", "data_prefix": {"img": ""}}
        return {**data, "metainfo": {"classes": ("cat",)}, **more}

    return make


def test_what_is_odd_is_counted(dataset):
    boxes = [[1, 1, 5, 5], [-2, 1, 8, 5], [15, 1, 8, 5], [1, 1, 0, 5], [30, 1, 5, 5], [3, 3, 1, 1]]
    (found,) = check.dataset(dataset(content(*boxes, images=3)))
    assert (found.images, found.boxes) == (3, 6)
    assert found.odd == {
        "boxes past the edge": 2,
        "boxes without area or outside, left out": 2,
        "images without a box": 2,
    }
    assert found.classes == ("cat",)
    assert check.dataset(dataset(content([1, 1, 5, 5], crowd=1)))[0].odd == {"crowd regions": 1}
    more = content([1, 1, 5, 5])
    more["categories"].append({"id": 8, "name": "cow"})
    more["annotations"].append({**more["annotations"][0], "id": 2, "category_id": 8})
    assert check.dataset(dataset(more))[0].odd == {"boxes of other classes, left out": 1}
    assert "a.json: 3 images, 6 boxes (2 boxes past the edge" in str(found)


def test_training_needs_a_box_where_images_without_one_are_left_out(dataset):
    filters = {"filter_cfg": {"filter_empty_gt": True}}
    for told in (content(), content([1, 1, 5, 5], crowd=1), content([1, 1, 0, 5])):
        with pytest.raises(DataError, match=r"a\.json has no box to train on"):
            check.dataset(dataset(told, **filters))
        assert check.dataset(dataset(told))
        assert check.dataset(dataset(told, **filters, test_mode=True))
    assert check.dataset(dataset(content([1, 1, 5, 5]), **filters))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", r"a\.json are broken"),
        ({"images": []}, r"a\.json is no COCO file: it has no list 'annotations'"),
        (content(images=0), r"a\.json holds no image"),
        ({**content(), "annotations": [{"id": 4, "bbox": [1, 2]}]}, "annotation 4 has no bbox of four numbers"),
        (
            {**content(), "annotations": [{"id": 4, "image_id": 9, "category_id": 7, "bbox": [1, 1, 2, 2]}]},
            "annotation 4 is of an image or a category that is not listed",
        ),
        (
            {**content(), "annotations": [{"id": 4, "image_id": 0, "category_id": 7, "bbox": [1, 1, 2, 2]}]},
            "annotation 4 has no 'area'",
        ),
        ({**content(), "images": [{"id": 1, "file_name": "1.png"}]}, "one of its images has no width, height"),
        ({**content(), "images": [*content()["images"], *content()["images"]]}, "two of its images have the id 0"),
        (
            {**content(), "annotations": [{"id": 0, "image_id": 0, "category_id": 7, "bbox": [1, 1, 2, 2]}]},
            "id 0, which pycocotools takes for none",
        ),
    ],
)
def test_what_is_wrong_is_named(dataset, told, message):
    with pytest.raises(DataError, match=message):
        check.dataset(dataset(told))


def test_missing_files_and_categories_are_named(dataset, tmp_path):
    good = dataset(content([1, 1, 5, 5], images=2))
    assert [one.images for one in check.dataset({"datasets": [good, {"dataset": good}]})] == [2, 2]  # inside wrappers
    with pytest.raises(DataError, match="has no category dog; it has cat"):
        check.dataset({**good, "metainfo": {"classes": ("cat", "dog")}})
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images of .*a\.json are not in .*: 1\.png"):
        check.dataset(good)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        check.dataset({**good, "ann_file": "none.json"})
    assert check.dataset({"type": "VOCDataset", "ann_file": "list.txt"}) == []


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    check.same_classes(("a", "b"), ["a", "b"], tmp_path)
    check.same_classes(None, ["a"], tmp_path)
    for other in (["b", "a"], ["a"]):
        with pytest.raises(DataError, match="was trained on the classes a, b"):
            check.same_classes(("a", "b"), other, tmp_path)


def test_classes_are_those_of_the_file_in_its_order(dataset):
    """Mmdet numbers classes in the order of the file, whatever order the config gives."""
    told = content([1, 1, 5, 5])
    told["categories"] = [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}]
    assert check.dataset(dataset(told, metainfo={"classes": ("dog", "cat")}))[0].classes == ("dog", "cat")
    with pytest.raises(DataError, match="lists the classes as dog, cat, and mmdet numbers them so"):
        check.dataset(dataset(told, metainfo={"classes": ("cat", "dog")}))
    with pytest.raises(DataError, match="has no category person, bicycle"):  # mmdet would take COCO's own, unasked
        check.dataset(dataset(told, metainfo=None))

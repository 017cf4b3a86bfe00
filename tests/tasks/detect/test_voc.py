"""Pascal VOC to COCO: where boxes lie, what is clipped, left out or refused, and the named data sets made so."""

import json

import pytest
from PIL import Image

from attnzoo import assets
from attnzoo.errors import AssetError, DataError
from attnzoo.tasks.detect import voc
from attnzoo.tasks.detect.voc import Converted, convert, main, read_voc


def write(folder, name, boxes, size=(20, 10), said=None, difficult=0):
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "JPEGImages").mkdir(exist_ok=True)
    Image.new("RGB", size).save(folder / "JPEGImages" / f"{name}.png")
    width, height = said or size
    things = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for label, a, b, c, d in boxes
    )
    text = f"<annotation><size><width>{width}</width><height>{height}</height></size>{things}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    return folder / "Annotations" / f"{name}.xml", folder / "JPEGImages" / f"{name}.png"


def boxes_of(content):
    return [one["bbox"] for one in content["annotations"]]


def test_both_ends_of_a_box_belong_to_it(tmp_path):
    write(tmp_path, "a", [("cat", 1, 1, 20, 10), ("dog", 3, 4, 3, 4)])
    content, found = convert(tmp_path / "Annotations", tmp_path / "JPEGImages")
    assert boxes_of(content) == [[0, 0, 20, 10], [2, 3, 1, 1]]  # the whole image, and one pixel
    assert [one["area"] for one in content["annotations"]] == [200, 1]
    assert [one["name"] for one in content["categories"]] == ["cat", "dog"]
    assert (found.clipped, found.left_out) == (0, [])


def test_boxes_past_the_edge_are_clipped_and_those_without_area_left_out_and_named(tmp_path):
    outside = [("cat", -3, 2, 40, 5), ("cat", 9, 5, 7, 6), ("cat", 25, 1, 30, 5)]
    write(tmp_path, "a", outside)
    content, found = convert(tmp_path / "Annotations", tmp_path / "JPEGImages")
    assert boxes_of(content) == [[0, 1, 20, 4]]
    assert found.clipped == 1
    assert len(found.left_out) == 2
    assert all("a.xml: cat" in one for one in found.left_out)


def test_what_is_marked_difficult_becomes_a_crowd(tmp_path):
    write(tmp_path, "a", [("cat", 1, 1, 5, 5)], difficult=1)
    content, _ = convert(tmp_path / "Annotations", tmp_path / "JPEGImages")
    assert content["annotations"][0]["iscrowd"] == 1


def test_an_image_without_a_box_stays(tmp_path):
    write(tmp_path, "a", [])
    write(tmp_path, "b", [("cat", 1, 1, 5, 5)])
    content, _ = convert(tmp_path / "Annotations", tmp_path / "JPEGImages")
    assert len(content["images"]) == 2
    assert [one["image_id"] for one in content["annotations"]] == [2]


def test_bad_files_are_named(tmp_path):
    annotation, image = write(tmp_path, "a", [("cat", 1, 1, 5, 5)], said=(30, 10))
    with pytest.raises(DataError, match=r"a\.xml is for an image of 30 x 10, but .*a\.png has 20 x 10"):
        read_voc(annotation, image, Converted())
    for text in ("<annotation>", "<annotation><object><name>cat</name></object></annotation>"):
        annotation.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"a\.xml is not an annotation"):
            read_voc(annotation, image, Converted())
    image.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        read_voc(annotation, image, Converted())
    image.unlink()
    with pytest.raises(DataError, match="1 images are not in"):
        convert(tmp_path / "Annotations", tmp_path / "JPEGImages")
    with pytest.raises(DataError, match="no annotation"):
        convert(tmp_path, tmp_path)
    with pytest.raises(DataError, match="class 'cow'; classes: cat"):
        voc.coco([voc.Photo("a.png", 9, 9, [voc.Box("cow", 0, 0, 2, 2)])], ["cat"])


def test_the_command_takes_a_list(tmp_path, capsys):
    write(tmp_path, "a", [("cat", 1, 1, 5, 5)])
    write(tmp_path, "b", [("cat", 1, 1, 5, 500)])
    (tmp_path / "val.txt").write_text("b\n", encoding="utf-8")
    folders = [str(tmp_path / "Annotations"), str(tmp_path / "JPEGImages")]
    assert main([*folders, str(tmp_path / "out.json"), "--list", str(tmp_path / "val.txt")]) == 0
    assert "1 images, 1 boxes; 1 boxes past the edge clipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["images"][0]["file_name"] == "b.png"
    assert main([*folders, str(tmp_path / "out.json"), "--list", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err
    assert main([*folders, str(tmp_path / "out.json"), "--classes", "dog, cat"]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in found["categories"]] == ["dog", "cat"]
    assert {one["category_id"] for one in found["annotations"]} == {2}
    assert main([*folders, str(tmp_path / "out.json"), "--classes", "dog"]) == 2
    assert "has a box of class 'cat'; classes: dog" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path), str(tmp_path / "out.json")]) == 2
    assert "error: no annotation" in capsys.readouterr().err


def test_bccd_is_converted_by_its_lists(tmp_path, monkeypatch):
    source = tmp_path / "source" / "BCCD"
    source.mkdir(parents=True)
    lists = source / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name, split in (("x", "train"), ("y", "val"), ("z", "test")):
        write(source, name, [("RBC", 1, 1, 5, 5)])
        (lists / f"{split}.txt").write_text(f"{name}\n", encoding="utf-8")
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "cache"))
    folder = assets.get("bccd_coco", tmp_path / "source")
    for name, split in (("x", "train"), ("y", "val"), ("z", "test")):
        content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
        assert content["images"][0]["file_name"] == f"{name}.png"
        assert (folder / split / f"{name}.png").is_file()
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "other"))
    with pytest.raises(AssetError, match="holds no ImageSets folder"):
        assets.get("bccd_coco", lists)


def test_trees_are_cut_into_tiles_and_less_than_half_a_crown_is_a_crowd(tmp_path):
    data = tmp_path / "deepforest" / "data"
    data.mkdir(parents=True)
    side = 2 * voc.TILE + 30
    trees = [("Tree", 11, 21, 30, 50), ("Tree", 219, 101, 228, 110), ("Tree", 441, 441, 460, 460)]
    for name in voc.TREES.values():
        annotation, image = write(data, name, trees, size=(side, side))
        annotation.rename(data / annotation.name)
        image.rename(data / image.name)
    folder = tmp_path / "made"
    folder.mkdir()
    voc.tree_crowns(tmp_path, folder)
    content = json.loads((folder / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    assert [one["file_name"] for one in content["images"]] == [
        "0000_0000.png", "0000_0224.png", "0224_0000.png", "0224_0224.png",
    ]  # fmt: skip
    found = [(one["image_id"], one["bbox"], one["iscrowd"]) for one in content["annotations"]]
    assert found == [
        (1, [10, 20, 20, 30], 0),
        (1, [218, 100, 6, 10], 0),  # six of its ten pixels
        (2, [0, 100, 4, 10], 1),
        (4, [216, 216, 8, 8], 1),
    ]

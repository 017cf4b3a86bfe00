"""Run the tests marked `compat`, or those named there, on every release that compat.toml lists; say how each ended.

    python -m tests.compat                  releases of transformers, timm and Triton, installed beside the environment
    python -m tests.compat --torch          releases of torch, each in an environment of its own (some GB each)
    python -m tests.compat --docs           also rewrite the table of docs/compat.md

Exits with 1 if a release fails that compat.toml does not list as known to fail, or if one that it lists passes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-compat"
PAGE = ROOT / "docs" / "compat.md"
OF_TORCH = re.compile(r"torch|torchvision|triton|setuptools")
WORKERS = "2"
ROUNDS = 5  # of installing what the packages installed before require


@dataclass
class Outcome:
    """How the tests ended on one release."""

    library: str
    release: str
    installed: str = ""
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    known: list[dict[str, str]] = field(default_factory=list)

    @property
    def unknown(self) -> list[str]:
        """The failed tests that compat.toml does not list."""
        return [test for test in self.failed if not any(fnmatchcase(test, one["tests"]) for one in self.known)]

    @property
    def stale(self) -> list[str]:
        """What compat.toml lists as failing and did not fail."""
        return [one["tests"] for one in self.known if not any(fnmatchcase(test, one["tests"]) for test in self.failed)]

    @property
    def problem(self) -> str:
        """Why this is no success; empty if it is one."""
        if self.error:
            return self.error
        if self.unknown:
            return f"{len(self.unknown)} tests failed that compat.toml does not list"
        if self.stale:
            return f"compat.toml lists tests as failing that pass: {', '.join(self.stale)}"
        return "" if self.passed else "no test ran"

    def said(self) -> str:
        """One cell of the table."""
        if self.error:
            return self.error
        said = f"{self.passed} passed" if self.passed else "no test ran"
        if self.unknown:
            said += f", {len(self.unknown)} failed"
        known = len(self.failed) - len(self.unknown)
        reasons = "; ".join(one["reason"] for one in self.known)
        return f"{said}, {known} failed as known: {reasons}" if known else said


class InstallError(Exception):
    """A release that could not be installed: the last lines of what the installer said, or what it left unmet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 0 if every release ended as compat.toml says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="releases of torch, in environments of their own")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of docs/compat.md")
    parser.add_argument("--only", default="", metavar="LIBRARY", help="releases of this library alone")
    parsed = parser.parse_args(arguments)
    table = tomllib.loads((ROOT / "compat.toml").read_text(encoding="utf-8"))
    known = table.pop("known", [])
    console = Console(width=None if sys.stdout.isatty() else 120)
    outcomes = []
    for library, wanted in table.items():
        if wanted["beside"] is parsed.torch or parsed.only not in ("", library):
            continue
        for release in wanted["releases"]:
            outcome = run(library, release, wanted)
            outcome.known = [one for one in known if one["library"] == library and release in one["releases"]]
            outcomes.append(outcome)
            console.print(
                f"{library} {outcome.installed or release}: {outcome.said()} in {outcome.seconds:.0f} s",
                highlight=False,
            )
            for test in outcome.unknown:
                console.print(f"  {test}", highlight=False, markup=False, soft_wrap=True)
    if not outcomes:
        parser.error(f"compat.toml lists no release of {parsed.only!r} here")
    console.print(_rich(outcomes))
    if parsed.docs:
        rewrite(PAGE, outcomes)
    bad = [one for one in outcomes if one.problem]
    for one in bad:
        console.print(
            f"error: {one.library} {one.installed or one.release}: {one.problem}", markup=False, soft_wrap=True
        )
    return 1 if bad else 0


def run(library: str, release: str, wanted: dict[str, object]) -> Outcome:
    """Install one release and run the tests on it."""
    outcome = Outcome(library, release)
    folder = ENVIRONMENTS / f"{library}-{release.replace('.', '_').removesuffix('_*')}"
    try:
        install = _beside if wanted["beside"] else _alone
        python, path = install(library, release, folder, wanted)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "OMP_NUM_THREADS": "1"}
        outcome.installed = _output([python, "-c", f"import {library}; print({library}.__version__)"], environment)
    except InstallError as error:
        outcome.error = f"cannot be installed: {error}"
        return outcome
    report = folder.with_suffix(".xml")
    report.unlink(missing_ok=True)
    began = time.monotonic()
    tests = wanted.get("tests", ["-m", "compat"])
    assert isinstance(tests, list)
    command = [python, "-m", "pytest", *tests, "-n", WORKERS, "--dist", "worksteal", "-p", "no:cacheprovider"]
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as said:
        ended = subprocess.run(
            [*command, f"--junitxml={report}"], cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
    outcome.seconds = time.monotonic() - began
    try:
        results = list(_results(report)) if report.is_file() else []
    except ElementTree.ParseError as error:
        outcome.error = f"{report.relative_to(ROOT)} is broken off ({error}); is the disk full?"
        return outcome
    outcome.passed = sum(passed for _, passed in results)
    outcome.failed = [name for name, passed in results if not passed]
    if ended.returncode != (1 if outcome.failed else 0):  # 1: tests failed; all else ended the run before its end
        outcome.error = f"pytest ended with {ended.returncode}; see {log.relative_to(ROOT)}"
    return outcome


def _beside(library: str, release: str, folder: Path, wanted: dict[str, object]) -> tuple[str, list[str]]:
    """Install a release, and what it needs in other releases than the environment has, into a folder of its own."""
    _install("--target", folder, "--no-deps", library if release == "newest" else f"{library}=={release}")
    for _ in range(ROUNDS):
        missing = sorted({str(one) for one in _unmet(folder)})
        if not missing:
            return sys.executable, [str(folder)]
        _install("--target", folder, "--no-deps", *missing)
    missing = sorted({str(one) for one in _unmet(folder)})
    if missing:
        raise InstallError(f"after {ROUNDS} rounds of installing these requirements are not met: {', '.join(missing)}")
    return sys.executable, [str(folder)]


def _unmet(folder: Path) -> Iterator[Requirement]:
    """What the packages in `folder` require and neither it nor the environment has."""
    here = {canonicalize_name(one.name): one.version for one in importlib.metadata.distributions(path=[str(folder)])}
    for one in importlib.metadata.distributions(path=[str(folder)]):
        for text in one.requires or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = here.get(canonicalize_name(requirement.name)) or _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                requirement.marker = None
                yield requirement


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _alone(library: str, release: str, folder: Path, wanted: dict[str, object]) -> tuple[str, list[str]]:
    """Make an environment of its own: this release, and what attnzoo asks for beside it as the lock has it."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    own = {canonicalize_name(Requirement(one).name) for one in asked}
    lock = re.findall(r"^([\w.-]+)==(\S+)(.*)", (ROOT / "requirements.lock").read_text("utf-8"), re.M)
    locked = {
        name: version  # what attnzoo itself asks for; what torch needs beside is torch's to choose
        for name, version, rest in lock
        if name in own and not OF_TORCH.fullmatch(name) and ";" not in rest
    }
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in locked.items()), encoding="utf-8")
    chosen = library if release == "newest" else f"{library}=={release}"
    others = wanted.get("with", [])
    assert isinstance(others, list)
    _run("uv", "pip", "install", "--python", python, "--constraint", pins, chosen, *others, f"{ROOT}[dev]")
    return str(python), []


def _install(*arguments: object) -> None:
    _run("pip", "install", "--quiet", "--upgrade", *arguments)


def _run(module: str, *arguments: object) -> None:
    ended = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)
    if ended.returncode != 0:
        raise InstallError(" ".join(ended.stderr.strip().splitlines()[-2:]))


def _output(command: Sequence[str], environment: dict[str, str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode != 0:
        raise InstallError(" ".join(ended.stderr.strip().splitlines()[-1:]))
    return ended.stdout.strip()


def _results(report: Path) -> Iterator[tuple[str, bool]]:
    """Name of each test that ran, and whether it passed; what was skipped did not run."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("skipped") is not None:
            continue
        name = f"{str(case.get('classname')).replace('.', '/')}.py::{case.get('name')}"
        yield name, case.find("failure") is None and case.find("error") is None


def _rich(outcomes: Sequence[Outcome]) -> Table:
    table = Table("library", "asked for", "installed", "tests marked compat", "seconds")
    for one in outcomes:
        table.add_row(one.library, one.release, one.installed, one.said(), f"{one.seconds:.0f}")
    return table


def rewrite(page: Path, outcomes: Sequence[Outcome]) -> None:
    """Put the outcomes into the table of `page`, in the place of those of the same library and release."""
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- compat:begin -->\n", "<!-- compat:end -->"
    head, _, rest = text.partition(begin)
    body, _, tail = rest.partition(end)
    rows = {tuple(line.strip("| ").split(" | ")[:2]): line for line in body.splitlines()[2:] if line.startswith("|")}
    for one in outcomes:
        rows[one.library, one.release] = f"| {one.library} | {one.release} | {one.installed} | {one.said()} |"
    table = ["| library | asked for | installed | tests marked compat |", "| --- | --- | --- | --- |", *rows.values()]
    page.write_text("\n".join([head + begin.rstrip("\n"), *table, end + tail]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""The matrix of releases: a run counts only if pytest reached its end and all requirements are installed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import compat

ROOT = Path(__file__).parents[1]
PASSED = '<testcase classname="tests.test_a" name="test_b"/>'
FAILED = '<testcase classname="tests.test_a" name="test_c"><failure/></testcase>'
KNOWN = {"tests": "tests/test_a.py::test_c", "reason": "it is so"}


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """Where the matrix keeps its environments; nothing is installed."""
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(compat, "_output", lambda command, environment: "1.0")
    return tmp_path


@pytest.mark.parametrize(
    ("cases", "status", "problem"),
    [
        (PASSED, 0, ""),
        (PASSED + FAILED, 1, ""),
        (PASSED + FAILED, 3, "pytest ended with 3; see timm-1.log"),
        (PASSED + FAILED, -11, "pytest ended with -11; see timm-1.log"),
        (PASSED + FAILED, 2, "pytest ended with 2; see timm-1.log"),
        (PASSED, 1, "pytest ended with 1; see timm-1.log"),
        ("", 5, "pytest ended with 5; see timm-1.log"),
    ],
)
def test_a_known_failure_hides_no_crash(matrix, monkeypatch, cases, status, problem):
    def ended(command, **options):
        (matrix / "timm-1.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(compat, "_beside", lambda *arguments: (sys.executable, []))
    monkeypatch.setattr(compat.subprocess, "run", ended)
    outcome = compat.run("timm", "1", {"beside": True})
    outcome.known = [KNOWN] if FAILED in cases else []
    assert outcome.problem == problem


@pytest.mark.parametrize("written", ["", "<testsuites><testsuite><testcase classname="])
def test_a_report_that_breaks_off_is_an_error_of_its_release(matrix, monkeypatch, written):
    def ended(command, **options):
        (matrix / "timm-1.xml").write_text(written)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compat, "_beside", lambda *arguments: (sys.executable, []))
    monkeypatch.setattr(compat.subprocess, "run", ended)
    problem = compat.run("timm", "1", {"beside": True}).problem
    assert problem.startswith("timm-1.xml is broken off (")
    assert problem.endswith("); is the disk full?")


@pytest.mark.parametrize(
    ("wanted", "chosen"), [({}, ["-m", "compat"]), ({"tests": ["tests/kernels"]}, ["tests/kernels"])]
)
def test_a_library_may_name_its_tests(matrix, monkeypatch, wanted, chosen):
    ran = []
    monkeypatch.setattr(compat, "_beside", lambda *arguments: (sys.executable, []))
    monkeypatch.setattr(
        compat.subprocess, "run", lambda command, **options: ran.append(command) or subprocess.CompletedProcess([], 5)
    )
    compat.run("timm", "1", {"beside": True} | wanted)
    assert ran[0][3 : ran[0].index("-n")] == chosen


def test_the_oldest_triton_that_is_allowed_is_tried():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = (Requirement(one) for one in project["optional-dependencies"]["gpu"])
    oldest = tomllib.loads((ROOT / "compat.toml").read_text())["triton"]["releases"][0]
    assert str(asked.specifier) == f">={oldest.removesuffix('.*')}"


@pytest.mark.parametrize("rounds", [0, 1, compat.ROUNDS, None])
def test_requirements_that_stay_unmet_are_an_error(matrix, monkeypatch, rounds):
    """Each round installs a package that requires another; None: without end."""
    installed = []

    def install(*arguments):
        number = len(installed)
        info = matrix / "timm-1" / f"package{number}-1.0.dist-info"
        info.mkdir(parents=True)
        last = rounds is not None and number == rounds
        requires = "" if last else f"Requires-Dist: package{number + 1}==1.0\n"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package{number}\nVersion: 1.0\n{requires}")
        installed.append(arguments)

    monkeypatch.setattr(compat, "_install", install)
    if rounds is None:
        outcome = compat.run("timm", "1", {"beside": True})
        assert outcome.problem == (
            "cannot be installed: after 5 rounds of installing these requirements are not met: package6==1.0"
        )
    else:
        assert compat._beside("timm", "1", matrix / "timm-1", {}) == (sys.executable, [str(matrix / "timm-1")])
        assert len(installed) == rounds + 1

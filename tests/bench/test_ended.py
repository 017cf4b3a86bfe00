"""How benchmarks and scripts end: exit status and sentence, with what was finished kept."""

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from attnzoo import tasks
from attnzoo.bench.record import CONFIG_FILE, RECORDS_FILE
from attnzoo.command import check_rows, run_script
from attnzoo.errors import ConfigError, DataError, MissingExtraError, RunError, TrainingError
from attnzoo.tasks import read_records
from attnzoo.tasks.suite import plan, validate_config
from eval import bench
from tests.bench import test_run
from tests.tasks import test_suite_language as test_language

ROOT = Path(__file__).parents[2]
folder = test_language.folder  # a language model and a text, as files

BROKEN = """
from dataclasses import dataclass
from torch import nn
from attnzoo import AttentionInfo
from attnzoo.eviction.streaming import Streaming

@dataclass(frozen=True, kw_only=True)
class BrokenPolicy(Streaming):
    def score(self, view):
        raise RuntimeError("this policy is broken")

class BrokenMixer(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.weight = nn.Parameter(nn.init.ones_(__import__("torch").empty(dim)))
    def forward(self, x, grid=None, prefix=0, mask=None):
        raise RuntimeError("this mixer is broken")

policy = AttentionInfo("broken_policy", "eviction", "broken:BrokenPolicy")
mixer = AttentionInfo("broken_mixer", "mixer", "broken:BrokenMixer")
"""


@pytest.fixture
def published(tmp_path):
    """A package that publishes a policy and a mixer that raise; gives the environment in which it is installed."""
    site = tmp_path / "site"
    info = site / "broken-1.dist-info"
    info.mkdir(parents=True)
    (site / "broken.py").write_text(BROKEN, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n", encoding="utf-8")
    points = "[attnzoo.attentions]\nbroken_policy = broken:policy\nbroken_mixer = broken:mixer\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def script(path, *arguments, **options):
    command = [sys.executable, str(ROOT / "eval" / "bench.py"), str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def test_a_policy_and_a_mixer_that_raise_make_the_benchmark_fail_by_name(folder, tmp_path, published):
    data = test_language.tiny(
        folder, attentions=[{"name": "broken_policy", "options": {"budget": 24, "block_size": 8}}]
    )
    data = {**data, "attentions": ["sdpa", "broken_mixer"], "output": str(tmp_path / "run")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    done = script(tmp_path / "tiny.yaml", env=published)
    assert done.returncode == 1, done.stderr[-2000:]
    told = done.stderr[done.stderr.index("error: ") :]
    assert "rows did not end well" in told
    assert "cost of broken_mixer at 16 tokens: failed: RuntimeError: this mixer is broken" in told
    assert "quality of broken_policy block_size=8 budget=24: failed: RuntimeError: this policy is broken" in told
    assert "sdpa" not in told
    statuses = {(r.label, r.status) for r in read_records(tmp_path / "run" / RECORDS_FILE)}
    assert ("sdpa", "ok") in statuses, "the others are measured all the same"
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(("expect", "status"), [("ok", 1), ("unsupported", 0)])
def test_an_unsupported_row_fails_unless_the_config_expects_it(tmp_path, capsys, expect, status):
    half = {"tokens": [16], "dtype": "bfloat16", "repeats": 3, "min_seconds": 0, "gradient": True}
    unable = {"name": "its_own", "label": "no gradient", "expect": expect}
    from attnzoo.registry import register_attention, unregister_attention

    register_attention("its_own", "core", test_language.Wrong, capabilities={"backward": False, "mask": True})
    try:
        data = test_run.tiny(tmp_path / "run", attentions=[unable], cost=half)
        rows = [Row("dense", "ok"), Row("no gradient", "unsupported", "its_own has no gradient")]
        assert check_rows(rows, lambda row: ("vision", row.label) in validate_config(data).unsupported) == status
    finally:
        unregister_attention("its_own")
    told = capsys.readouterr().err
    assert ("no gradient: unsupported: its_own has no gradient" in told) is (status == 1)


class Row:
    def __init__(self, label, status, message="", part="vision"):
        self.label, self.status, self.message, self.part = label, status, message, part


def test_what_is_expected_to_be_unsupported_and_works_is_told(capsys):
    assert check_rows([Row("a", "ok"), Row("b", "ok")], lambda row: row.label == "a") == 0
    assert "note: a is expected to be unsupported, and works" in capsys.readouterr().err
    assert check_rows([Row("a", "timeout", "took long"), Row("b", "oom")], lambda row: row.label == "a") == 1
    assert "2 of 2 rows did not end well" in capsys.readouterr().err


def test_every_row_that_failed_is_counted_and_told(capsys):
    """Rows that differ by workload or phase alone are not one."""
    places = [("quality", "forward", "pass key"), ("quality", "forward", ""), ("cost", "decode", "batch 8")]
    alike = {"label": "h2o", "status": "failed", "tokens": 8}
    rows = [
        SimpleNamespace(kind=kind, phase=phase, workload=workload, message=f"reason {n}", **alike)
        for n, (kind, phase, workload) in enumerate([*places, ("cost", "prefill", "")])
    ]
    assert check_rows(rows) == 1
    told = capsys.readouterr().err
    assert "4 of 4 rows did not end well" in told
    assert "  quality of h2o at 8 tokens, pass key: failed: reason 0" in told
    assert "  cost of h2o at 8 tokens, decode, batch 8: failed: reason 2" in told


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("it cannot stand in 2 layers:\n  a: no grid\n  b: no grid", "it cannot stand in 2 layers: a: no grid"),
        ("first\nsecond", "first"),
        ("Traceback:\n  File x\nValueError: no", "ValueError: no"),
    ],
)
def test_a_reason_that_is_announced_is_told_too(message, told, capsys):
    assert check_rows([Row("a", "failed", message)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"a: failed: {told}")


@pytest.mark.parametrize(("expecting", "status"), [("vision", 1), ("language", 0)])
def test_what_is_expected_of_one_part_is_not_of_the_other(folder, tmp_path, monkeypatch, capsys, expecting, status):
    """The same label stands in both parts, and only the language model's row of it is unsupported."""
    data = test_language.tiny(folder, attentions=[{"name": "sdpa", "expect": "unsupported"}])
    data = {**data, "attentions": [{"name": "sdpa", "expect": "unsupported"}], "output": str(tmp_path / "run")}
    for part, attentions in {"vision": data["attentions"], "language": data["language"]["attentions"]}.items():
        if part != expecting:
            attentions[0].pop("expect")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    rows = [Row("sdpa", "ok", part="vision"), Row("sdpa", "unsupported", "refused", part="language")]
    monkeypatch.setattr("attnzoo.bench.run.run", lambda task, config, command: rows)
    monkeypatch.setattr("attnzoo.bench.publish.publish", lambda task, records, path, console, readme: None)
    assert bench.main([str(tmp_path / "tiny.yaml")]) == status
    assert ("note: sdpa is expected to be unsupported" in capsys.readouterr().err) is (expecting == "vision")


def test_what_is_expected_changes_nothing_that_is_measured(tmp_path):
    plain = validate_config(test_run.tiny(tmp_path, attentions=["flash"]))
    expecting = validate_config(test_run.tiny(tmp_path, attentions=[{"name": "flash", "expect": "unsupported"}]))
    assert [cell.measured for cell in plan(plain)] == [cell.measured for cell in plan(expecting)]
    assert validate_config(yaml.safe_load(expecting.to_yaml())).unsupported == {("vision", "flash")}
    assert "expect" not in plain.to_yaml()


@pytest.mark.parametrize("task", ["bench", "decode", "train_decode"])
def test_an_output_that_is_a_file_is_a_sentence(tmp_path, capsys, task, folder):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" if task != "decode" else tmp_path / "file" / "below"
    from eval import decode
    from train import decode as train_decode

    if task == "bench":
        data, main = test_run.tiny(output), bench.main
    elif task == "decode":
        data = {"name": "tiny", "model": str(folder), "text": str(folder / "text.txt"), "attentions": ["sdpa"]}
        data |= {"nll": {"windows": 2, "tokens": 32}, "canary": {"windows": 1}, "output": str(output)}
        main = decode.main
    else:
        data = {"name": "tiny", "text": str(folder / "text.txt"), "attentions": [], "output": str(output)}
        data["attentions"] = [{"name": "padre", "options": {"token_mixing": "causal_conv1d"}}]
        data |= {"held_out": 2, "recipe": {"steps": 1, "tokens": 16, "batch": 1}}
        main = train_decode.main
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert main([str(tmp_path / "tiny.yaml")]) == 2
    told = capsys.readouterr().err
    if task == "decode":
        assert f"output={output} cannot be a folder: {tmp_path / 'file'} is a file; give another" in told
    else:
        assert f"output={output} is a file; give a folder" in told
    assert "Traceback" not in told


def test_a_full_disk_keeps_what_was_written(tmp_path, capsys, monkeypatch):
    from attnzoo.bench import store

    append, room = store.append_line, 1

    def full(path, entry):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        room -= 1
        append(path, entry)

    monkeypatch.setattr(store, "append_line", full)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(test_run.tiny(tmp_path / "run")), encoding="utf-8")
    assert bench.main([str(path)]) == 1
    assert f"{tmp_path / 'run' / RECORDS_FILE}': No space left on device; finished work is kept" in (
        capsys.readouterr().err
    )
    assert [r.label for r in read_records(tmp_path / "run" / RECORDS_FILE)] == ["dense"]
    monkeypatch.undo()
    assert bench.main([str(path)]) == 0


def test_an_interrupt_is_a_sentence_and_130(tmp_path, forked):
    """While it begins, of a script that is started as users do it, and while a row is measured."""
    long = {"tokens": [16], "min_seconds": 100, "repeats": 3}
    for place in ("begin", "measure"):
        data = test_run.tiny(tmp_path / place, cost=long)
        (tmp_path / f"{place}.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    command = [sys.executable, str(ROOT / "eval" / "bench.py"), str(tmp_path / "begin.yaml")]
    begun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    measures = forked.script("eval/bench.py", tmp_path / "measure.yaml")
    deadline = time.monotonic() + 120
    for place, process, seconds in (("begin", begun, 0), ("measure", measures, 4)):
        while not (tmp_path / place / CONFIG_FILE).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGINT)
    _, told = begun.communicate(timeout=60)
    done = measures.finish(60)
    for status, said in ((begun.returncode, told), (done.returncode, done.stderr)):
        assert status == 130, said
        assert "interrupted; finished work is kept" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("kind", "status", "hint"),
    [
        (RunError, 1, True),
        (TrainingError, 1, True),
        (ConfigError, 2, False),
        (DataError, 2, False),
    ],
)
def test_what_breaks_off_a_run_is_told_from_what_refuses_it(kind, status, hint, capsys):
    def body():
        raise kind("it is so")

    assert run_script(body, "do it again") == status
    assert capsys.readouterr().err == "error: it is so\n" + "do it again\n" * hint


def test_errors_that_are_no_users_are_not_hidden():
    def bug():
        raise OSError("no number: a bug of ours")

    with pytest.raises(OSError, match="a bug of ours"):
        run_script(bug)
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


def test_missing_packages_are_named_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(test_run.tiny(tmp_path / "run")), encoding="utf-8")
    assert bench.main([str(path)]) == 2
    told = "matplotlib not installed; run: pip install -e '.[vision]', in the clone of attnzoo"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    from attnzoo.tasks.decode import cells

    with pytest.raises(MissingExtraError, match="matplotlib not installed"):
        cells.check(None)


def test_expecting_means_nothing_where_all_is_refused_at_once():
    data = {"name": "tiny", "attentions": [{"name": "padre", "expect": "unsupported"}]}
    with pytest.raises(ConfigError, match="has no meaning here"):
        tasks.find("train_bytes").config.check(data)


@pytest.mark.parametrize(
    ("script", "lacks"),
    [
        ("train/classify", "the following arguments are required: config"),
        ("train/detect", "the following arguments are required: config"),
        ("eval/classify", "give either a config or --report RECORDS"),
    ],
)
def test_what_a_command_line_lacks_is_what_it_needs(capsys, script, lacks):
    main = importlib.import_module(script.replace("/", ".")).main
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith(lacks)


@pytest.mark.parametrize("content", [None, "no markers", b"\xff\xfe"])
def test_a_readme_that_cannot_be_rewritten_is_told_before_the_page_is_written(tmp_path, capsys, content):
    records, readme = tmp_path / "quickstart.jsonl", tmp_path / "nope.md"
    shutil.copy(ROOT / "docs/records/quickstart.jsonl", records)
    if content is not None:
        readme.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert bench.main(["--report", str(records), "--readme", str(readme)]) == 2
    assert "nope.md" in capsys.readouterr().err
    assert not (tmp_path / "quickstart.html").exists()

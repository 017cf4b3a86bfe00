import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from attnzoo.errors import ConfigError
from attnzoo.tasks.decode import byte_lm as train_bytes
from attnzoo.tasks.decode import byte_run as bench
from tests.tasks.decode import llm

ROOT = Path(__file__).parents[3]
PADRE = {"name": "padre", "options": {"token_mixing": "causal_conv1d", "degree": 2, "kernel_size": 4}, "label": "padre"}


@pytest.fixture
def settings(tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text(llm.prose() * 3, encoding="utf-8")
    content = {
        "name": "tiny",
        "text": str(text),
        "host": {"width": 16, "layers": 1, "heads": 2, "hidden": 24},
        "recipe": {"steps": 20, "batch": 4, "tokens": 32, "lr": 1.0e-2, "warmup_steps": 2},
        "held_out": 3,
        "attentions": [PADRE],
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_trains_reports_and_goes_on_where_it_broke(settings, monkeypatch, capsys):
    config = bench.load_config(settings)
    monkeypatch.setattr(train_bytes, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bench.run(config)
    kept = sorted((config.folder / "checkpoints" / "dense").iterdir())
    assert [folder.name for folder in kept] == ["checkpoint-20"]
    monkeypatch.undo()
    path = bench.run(config)
    lines = path.read_text().splitlines()
    assert bench.run(config) == path
    assert path.read_text().splitlines() == lines
    dense, padre = bench.read_lines(path, bench.TrainRecord, bench.SCHEMA)
    assert (dense.label, padre.label) == ("dense", "padre")
    for record in (dense, padre):
        assert record.losses[-1][1] < record.losses[0][1]
        assert len(record.nats) == 3
        assert max(record.nats) < 6
    text = bench.report(path)
    assert "| padre |" in text
    assert path.with_name("loss.svg").read_text().startswith("<svg")
    assert list((config.folder / "checkpoints").iterdir()) == []


def test_the_command_line(settings, capsys):
    spec = importlib.util.spec_from_file_location("train_decode", ROOT / "train/decode.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(settings), "recipe.steps=2", "recipe.warmup_steps=0"]) == 0
    assert "| dense |" in capsys.readouterr().out
    assert script.main([str(settings), "seed=1"]) == 2
    assert "another config or text" in capsys.readouterr().err
    assert script.main([str(settings), "attentions.0.options.token_mixing=conv1d"]) == 2
    assert "causality" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([])


def test_the_end_of_the_text_is_held_out():
    data = train_bytes.split("abc" * 100, 2, 10)
    assert bytes(data.held_out.flatten().tolist()).decode() == ("abc" * 100)[-20:]
    assert len(data.train) == 280
    with pytest.raises(ConfigError, match="too few to keep"):
        train_bytes.split("abc" * 10, 2, 10)


def test_every_model_sees_the_same_pieces():
    recipe = train_bytes.Recipe(3, 4, 8, 1e-3, 0, 0.0)
    data = torch.arange(100, dtype=torch.uint8)
    a, b, other = (train_bytes._Pieces(data, recipe, seed) for seed in (0, 0, 1))
    assert len(a) == 12
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b, strict=True))
    assert any(not torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, other, strict=True))
    assert torch.equal(a[5]["labels"].diff(), torch.ones(7, dtype=torch.long))

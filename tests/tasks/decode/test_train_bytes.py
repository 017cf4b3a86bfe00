import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from attnzoo import tasks
from attnzoo.bench.run import run
from attnzoo.errors import ConfigError
from attnzoo.tasks.decode import byte_lm
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


def go(config):
    return run(byte_lm.TASK, config, "again")


def test_trains_reports_and_goes_on_where_it_broke(settings, monkeypatch, capsys):
    config = byte_lm.TrainConfig.load(settings)
    monkeypatch.setattr(byte_lm, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go(config)
    (kept,) = (config.folder / "checkpoints").glob("dense-*")
    assert [folder.name for folder in kept.iterdir()] == ["checkpoint-20"]
    monkeypatch.undo()
    words, train = [], byte_lm.train
    monkeypatch.setattr(byte_lm, "train", lambda *given: train(*given[:-1], words.append))
    dense, padre = go(config)
    assert words == [f"step {step} of 20" for step in range(1, 21)], "dense goes on from its checkpoint, which is done"
    path = config.folder / "records.jsonl"
    lines = path.read_text()
    assert go(config) == [dense, padre]
    assert path.read_text() == lines
    assert (dense.label, padre.label) == ("dense", "padre")
    for record in (dense, padre):
        quality = record.quality
        assert quality.losses[-1][1] < quality.losses[0][1]
        assert len(quality.window_nll) == 3
        assert max(quality.window_nll) < 6
        assert float(quality.figure.removesuffix(" bits per byte")) == pytest.approx(quality.nll / 0.693147, abs=1e-3)
    assert dense.quality.ratio == 1
    assert padre.quality.ratio == pytest.approx(dense.quality.perplexity / padre.quality.perplexity)
    assert padre.quality.details["above dense (95%)"].startswith("+")
    (one,) = byte_lm.TASK.highlights([dense, padre])
    assert (one.task, one.method, one.host) == ("decode", "padre", "a small Llama of bytes")
    assert list((config.folder / "checkpoints").iterdir()) == []


def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(settings, monkeypatch):
    config, other = (byte_lm.TrainConfig.load(settings, [f"recipe.steps={steps}"]) for steps in (20, 2))
    monkeypatch.setattr(byte_lm, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go(config)
    monkeypatch.undo()
    assert [record.quality.losses[-1][0] for record in go(other)] == [2, 2]


def stopped_at(config, monkeypatch, step):
    """Run until a step of the first model, as a process that is interrupted then; give its folder of checkpoints."""
    train = byte_lm.train

    def stop(word):
        if word.startswith(f"step {step} of"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(byte_lm, "train", lambda *given: train(*given[:-1], stop))
        with pytest.raises(KeyboardInterrupt):
            go(config)
    (folder,) = (config.folder / "checkpoints").iterdir()
    return folder


def first_words(config, monkeypatch):
    """What a run says first of each model, and its records."""
    words, train = [], byte_lm.train
    with monkeypatch.context() as patched:
        patched.setattr(byte_lm, "train", lambda *given: train(*given[:-1], words.append))
        records = go(config)
    return [word for before, word in zip(["step 20 of 20", *words], words, strict=False) if "20 of" in before], records


@pytest.mark.parametrize("lost", [None, "trainer_state.json", "model.safetensors", "optimizer.pt", "torn state"])
def test_a_checkpoint_torn_by_a_kill_is_not_gone_on_from(settings, monkeypatch, lost):
    config = byte_lm.TrainConfig.load(settings)
    folder = stopped_at(config, monkeypatch, 6)
    (last,) = folder.iterdir()
    assert last.name == "checkpoint-5"
    torn = folder / "checkpoint-6"
    shutil.copytree(last, torn)
    state = torn / "trainer_state.json"
    state.write_text(state.read_text(encoding="utf-8").replace('"global_step": 5', '"global_step": 6'), "utf-8")
    if lost is None:
        for file in torn.iterdir():
            file.unlink()
    elif lost == "torn state":
        state.write_text('{"global_step": 6, "log_hist', encoding="utf-8")
    else:
        (torn / lost).unlink()
    said, records = first_words(config, monkeypatch)
    assert said == ["step 6 of 20", "step 1 of 20"]
    assert [record.status for record in records] == ["ok", "ok"]


def test_where_the_only_checkpoint_is_torn_training_begins_anew(settings, monkeypatch):
    config = byte_lm.TrainConfig.load(settings)
    (last,) = stopped_at(config, monkeypatch, 6).iterdir()
    (last / "trainer_state.json").unlink()
    assert first_words(config, monkeypatch)[0] == ["step 1 of 20"] * 2


def test_checkpoints_are_set_aside_too(settings, monkeypatch):
    stopped_at(byte_lm.TrainConfig.load(settings), monkeypatch, 6)
    fresh = byte_lm.TrainConfig.load(settings, ["fresh=true"])
    assert first_words(fresh, monkeypatch)[0] == ["step 1 of 20"] * 2


def test_the_command_line(settings, capsys):
    spec = importlib.util.spec_from_file_location("train_decode", ROOT / "train/decode.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(settings), "recipe.steps=2", "recipe.warmup_steps=0"]) == 0
    assert "held out, bits per byte" in capsys.readouterr().out
    folder = settings.with_name("run")
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "training loss, nats per byte" in page
    assert json.loads((folder / "records.jsonl").read_text().splitlines()[0])["command"].startswith(
        "python train/decode.py"
    )
    assert script.main(["--report", str(folder / "records.jsonl")]) == 0
    assert script.main([str(settings), "seed=1"]) == 2
    assert "another config" in capsys.readouterr().err
    settings.with_name("prose.txt").write_text("another text " * 99, encoding="utf-8")
    assert script.main([str(settings), "recipe.steps=2", "recipe.warmup_steps=0"]) == 2
    assert "a file that it names held something else" in capsys.readouterr().err
    assert script.main([str(settings), "attentions.0.options.token_mixing=conv1d"]) == 2
    assert "causality" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([])


def test_several_processes_of_a_launcher_are_refused(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a launcher started 2 processes"):
        go(byte_lm.TrainConfig.load(settings))


def test_the_end_of_the_text_is_held_out(settings):
    config = byte_lm.TrainConfig.load(settings, ["held_out=2", "recipe.tokens=10"])
    seen, held_out = byte_lm.split("abc" * 100, config)
    assert bytes(held_out.flatten().tolist()).decode() == ("abc" * 100)[-20:]
    assert len(seen) == 280
    with pytest.raises(ConfigError, match="too few to keep"):
        byte_lm.split("abc" * 10, config)


def test_every_model_sees_the_same_pieces(settings, monkeypatch):
    config = byte_lm.TrainConfig.load(settings, ["recipe.steps=2", "recipe.tokens=8", "recipe.warmup_steps=0"])
    data = torch.arange(100, dtype=torch.uint8)
    seen = []
    runs = [(config, attention) for attention in (None, *config.attentions)]
    for own, attention in [*runs, (config.model_copy(update={"seed": 1}), None)]:
        model = byte_lm.build(own, attention)
        model.register_forward_pre_hook(lambda m, a, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
        byte_lm.train(model, data, own, config.folder / str(len(seen)), lambda word: None)
    assert all(torch.equal(a, b) for a, b in zip(seen[:2], seen[2:4], strict=True))
    assert not torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[0], seen[1])
    assert seen[0].shape == (4, 8)
    assert torch.equal(seen[0].diff(), torch.ones(4, 7, dtype=torch.long))


def test_the_config_that_ships():
    task, config = tasks.load(ROOT / "configs/decode/train_bytes.yaml")
    assert task is byte_lm.TASK
    assert [cell.label for cell in task.plan(config)] == ["dense", *(f"padre degree={degree}" for degree in (1, 2, 3))]

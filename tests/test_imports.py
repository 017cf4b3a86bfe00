"""Methods of files of one's own: a config's `imports`, and --import of the commands."""

import sys
from importlib import import_module

import pytest
import yaml

from attnzoo import list_attentions, tasks
from attnzoo.__main__ import main
from attnzoo.bench.record import RECORDS_FILE
from attnzoo.bench.run import planned
from attnzoo.bench.work import Job, work
from attnzoo.errors import AssetError, ConfigError, UnknownNameError
from attnzoo.registry import unregister_attention
from attnzoo.tasks.detect.config import load_config as load_detector
from tests.bench import toy
from tests.eviction.models import language_model

POLICY = """
from dataclasses import dataclass

import attnzoo
from attnzoo.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Strided(Policy):
    stride: int = 4

    def score(self, view):
        return view.positions + (view.positions % self.stride == 0) * 10**9


attnzoo.register_attention("own_strided", "eviction", Strided)
"""
MIXER = """
import attnzoo
from attnzoo.mixers.pooling import Pooling


class Pool(Pooling):
    pass


attnzoo.register_attention("own_pool", "mixer", Pool, capabilities={"grid": True})
"""
OWN = ("own_strided", "own_pool")


def forget():
    for name in {*OWN} & {*list_attentions()}:
        unregister_attention(name)
    for name in ("own_policy", "own_mixer", "own_broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A working directory with modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # which is undone at the end
    (tmp_path / "own_policy.py").write_text(POLICY)
    (tmp_path / "own_mixer.py").write_text(MIXER)
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    yield tmp_path
    forget()


CONFIGS = {
    "suite": {"name": "x", "attentions": ["own_pool"], "quality": None},
    "classify": {"name": "x", "data": {"asset": "digits"}, "attentions": ["own_pool"]},
    "model": {"name": "x", "model": "tests.tasks.test_model:vit", "attentions": ["own_pool"]},
    "export": {"name": "x", "attentions": ["own_pool"]},
    "distill": {
        "name": "x",
        "language": {},
        "attentions": ["own_pool"],
        "stages": [{"objective": "layer", "samples": 64}],
    },
    "decode": {"name": "x", "attentions": [{"name": "own_strided", "options": {"budget": 8}}]},
    "kvpress": {
        "name": "x",
        "policies": [{"policy": "s", "attnzoo": {"name": "own_strided"}, "kvpress": [{"press": "KnormPress"}]}],
    },
}


@pytest.mark.parametrize("task", CONFIGS)
def test_a_config_names_methods_of_the_modules_that_it_imports(modules, task):
    config_of, content = tasks.find(task).config.check, {"task": task, **CONFIGS[task]}
    with pytest.raises(ConfigError, match=r"no attention 'own_\w+'(?s:.*)imports: \[module\]"):
        config_of(content)
    module = "own_mixer" if "own_pool" in str(content) else "own_policy"
    config = config_of({**content, "imports": [module]})
    assert config_of(yaml.safe_load(config.to_yaml())) == config, "as the folder of a run keeps it"


@pytest.mark.parametrize("task", [*(name for name in tasks.TASKS if name != "detect"), "tests.bench.toy:TASK"])
def test_every_task_has_the_key_and_its_results_do_not_depend_on_none(task):
    schema = tasks.find(task).config
    assert "imports" in schema.model_fields
    content = CONFIGS.get(task)
    if content is None:
        return
    named = yaml.safe_load(yaml.safe_dump(content).replace("own_pool", "padre").replace("own_strided", "keydiff"))
    config = schema.check({"task": task, **named})
    assert "imports" not in {*config.identity(), *config.plain()}
    assert "imports" in schema.check({"task": task, **named, "imports": ["json"]}).identity()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (["own_missing"], "there is no module 'own_missing' in the working directory"),
        (["own_missing.inside"], "there is no module 'own_missing'"),
        (["own_policy.py"], "must be the name of a module, such as 'own_policy'"),
        (["own_broken"], "'own_broken' cannot be imported: No module named 'no_such_package'"),
        (["own_syntax"], "'own_syntax' cannot be imported: SyntaxError"),
        (["own_policy", "own_twice"], "'own_twice' cannot be imported: AttnZooError: the name 'own_strided' is taken"),
        ("own_policy", "imports: 'own_policy' is not allowed; must be a list"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_before_any_work(modules, capsys, named, words):
    (modules / "own_syntax.py").write_text("def\n")
    (modules / "own_twice.py").write_text(POLICY)
    content = {"task": "decode", "name": "x", "attentions": ["own_strided"], "imports": named}
    with pytest.raises(ConfigError) as refused:
        tasks.find("decode").config.check(content)
    assert words in str(refused.value)
    if isinstance(named, list):
        assert main(["describe", "padre", *(f"--import={name}" for name in named)]) == 2
        assert words in capsys.readouterr().err
    assert not (modules / "runs").exists()


def test_a_process_of_its_own_imports_them_before_it_reads_its_config(modules):
    config = toy.Config(name="x", imports=("own_policy",))
    cell = toy.plan(config)[0]
    job = Job(task=toy.TASK.ref, config=config.model_dump_json(), cell=cell, given={})
    assert "own_strided" not in list_attentions()
    assert '"ok"' in work(job.model_dump_json(), lambda word: None)
    assert "own_strided" in list_attentions()


def test_commands_import(modules, capsys):
    assert main(["describe", "own_strided"]) == 2
    assert "--import module" in capsys.readouterr().err
    assert main(["describe", "own_strided", "--import", "own_policy"]) == 0
    assert "own_strided (eviction)" in capsys.readouterr().out
    forget()
    assert main(["list", "mixer", "--import", "own_mixer"]) == 0
    assert "`own_pool`" in capsys.readouterr().out
    forget()
    (modules / "own_model.py").write_text(
        "import torch\ndef build():\n    return torch.nn.MultiheadAttention(8, 2, batch_first=True)\n"
    )
    assert main(["layers", "own_model:build", "--import", "own_mixer", "--import", "own_policy"]) == 0
    assert {*OWN} <= set(capsys.readouterr().out.replace(",", " ").split())
    sys.modules.pop("own_model")


def test_a_language_model_is_measured_with_an_imported_policy(modules, capsys):
    """In processes of their own."""
    language_model().save_pretrained(modules / "model")
    flags = ["--tokens", "24", "--new-tokens", "4", "--repeats", "3", "--threads", "1"]
    policy = "own_strided:budget=8:block_size=4:stride=2"
    command = ["measure", f"transformers:{modules / 'model'}", "--import", "own_policy", "--attention", policy, *flags]
    assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    printed = yaml.safe_load(said[: said.index("output:")])
    assert printed["imports"] == ["own_policy"]
    (folder,) = (modules / "runs").iterdir()
    records = tasks.read_records(folder / RECORDS_FILE)
    assert {(record.attention, record.status) for record in records} == {(None, "ok"), ("own_strided", "ok")}

    task = tasks.find("decode")
    before = [cell.measured for cell in planned(task, task.config.check(printed))]
    (modules / "own_policy.py").write_text(POLICY + "\n# changed\n")
    after = [cell.measured for cell in planned(task, task.config.check(printed))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False], "dense is what it was"


def test_lm_eval_imports(modules):
    model_of = import_module("attnzoo.lm_eval.model").AttnZooLM
    named = {"pretrained": str(modules / "no-model"), "attention": "own_strided", "budget": 8}
    with pytest.raises(UnknownNameError):
        model_of(**named)
    with pytest.raises(AssetError, match="no-model"):  # after the name
        model_of(**named, imports="own_policy")
    with pytest.raises(ConfigError, match="there is no module 'own_missing'"):
        model_of(**named, imports=["own_policy", "own_missing"])


def test_a_config_of_mmengine_finds_modules_of_the_working_directory(modules, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(modules)])
    config = modules / "detector.py"
    config.write_text("model = dict(type='DETR', attention='own_pool')\n")
    with pytest.raises(ConfigError, match=r"custom_imports = dict\(imports=\[\"module\"\]\)"):
        load_detector(config)
    config.write_text("custom_imports = dict(imports=['own_mixer'])\n" + config.read_text())
    assert load_detector(config).model.attention.name == "own_pool"

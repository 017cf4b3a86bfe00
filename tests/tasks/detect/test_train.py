"""Training by mmengine's Runner: from a config alone, resumed, killed, in two processes; and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from attnzoo.errors import ConfigError, DataError
from attnzoo.files import locked
from attnzoo.tasks.detect import config as configs
from attnzoo.tasks.detect import data as datas
from attnzoo.tasks.detect import mmcv_ext, run, score
from eval.detect import main as evaluate
from tests.tasks.detect.runs import SIDE, make_config, make_data
from train.detect import main as train

ROOT = Path(__file__).parents[3]
PADRE = {"name": "padre", "degree": 2, "kernel_size": 3, "where": "encoder.*"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("squares") / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run of four epochs that nothing broke off."""
    folder = tmp_path_factory.mktemp("trained")
    config = make_config(folder / "squares.py", data, PADRE, work_dir=str(folder / "seed0"))
    assert train([str(config)]) == 0
    return config, folder / "seed0"


def weights(folder):
    path = Path((folder / "last_checkpoint").read_text(encoding="utf-8"))
    return torch.load(path, weights_only=False)["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_mmengines_runner_trains_and_tests_from_the_config_alone(trained, tmp_path):
    """No code of ours but what the config imports; and the checkpoint loads back into the swapped detector."""
    config, folder = trained
    code = (
        "import sys; from attnzoo.tasks.detect import mmcv_ext; mmcv_ext.ensure(); "
        "from mmengine.config import Config; from mmengine.runner import Runner; "
        "c = Config.fromfile(sys.argv[1]); c.work_dir = sys.argv[2]; "
        "r = Runner.from_cfg(c); r.train(); print('AP50', r.test()['coco/bbox_mAP_50'])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(config), str(tmp_path)], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "AP50" in done.stdout
    found = weights(tmp_path)
    assert any(".mixer." in key for key in found)
    assert same(found, weights(folder))  # the same seed, the same weights: train/detect.py adds nothing to it


def test_the_padre_weights_are_left_as_their_own_initialization(trained):
    import attnzoo
    from tests.tasks.detect.models import mmdet_detector

    detector = mmdet_detector("DABDETR", attention=PADRE)
    mixer = detector.encoder.layers[0].self_attn.attn.mixer
    before = {key: value.clone() for key, value in mixer.state_dict().items()}
    host = detector.encoder.layers[0].ffn.layers[0][0].weight.clone()
    detector.init_weights()
    assert same(mixer.state_dict(), before)
    assert not torch.equal(detector.encoder.layers[0].ffn.layers[0][0].weight, host)
    assert len(attnzoo.swap_report(detector).swapped) == 2


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(trained, tmp_path):
    config, folder = trained
    words = [str(config), f"work_dir={tmp_path}"]
    assert train([*words, "train_cfg.max_epochs=2"]) == 0
    saved = json.loads((tmp_path / run.TRAINED_BY).read_text(encoding="utf-8"))
    saved["train_cfg"]["max_epochs"] = 4  # as a run that was to go on to four, and was cut off after two
    (tmp_path / run.TRAINED_BY).write_text(json.dumps(saved), encoding="utf-8")
    assert train(words) == 0
    assert same(weights(tmp_path), weights(folder))


def test_a_killed_run_goes_on_to_the_same_end(trained, tmp_path, forked):
    config, folder = trained
    words = ("train/detect.py", config, f"work_dir={tmp_path}")
    process = forked.script(*words)
    deadline = time.monotonic() + 200
    while not (tmp_path / "last_checkpoint").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    ended = forked.script(*words).finish()
    assert ended.returncode == 0, ended.stderr
    assert same(weights(tmp_path), weights(folder))


def test_two_processes_train_and_test_as_one(tmp_path, forked):
    """Testing gives the very same scores; a training of two halves of each batch gives the same weights to rounding.

    By SGD, for AdamW takes steps of full length where a gradient is nothing but rounding, as that of a key's bias is;
    and on images of one size, for each process pads its own, and the backbone sees padding.
    """
    data = make_data(tmp_path / "data", lower=SIDE)
    sgd = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 1e-2}, "clip_grad": {"max_norm": 1.0}}
    config = str(make_config(tmp_path / "squares.py", data, PADRE, flips=0.0, optim_wrapper=sgd))

    def in_two(*words):
        for child in forked.scripts(2, *words, "--launcher", "pytorch"):
            done = child.finish()
            assert done.returncode == 0, done.stdout + done.stderr

    assert train([config, f"work_dir={tmp_path}/one/seed0"]) == 0
    halves = [config, "train_dataloader.batch_size=1", f"work_dir={tmp_path}/two/seed0"]
    in_two("train/detect.py", *halves)
    one, two = (weights(tmp_path / name / "seed0") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5, msg=key)
    qualities = []
    for folder in ("alone", "shared"):
        words = [*halves, "--output", str(tmp_path / folder)]
        assert evaluate(words) == 0 if folder == "alone" else in_two("eval/detect.py", *words) is None
        line = (tmp_path / folder / "records.jsonl").read_text(encoding="utf-8").splitlines()[0]
        qualities.append(json.loads(line)["quality"])
    assert qualities[0] == qualities[1]
    (training,) = qualities[0]["trainings"]
    assert [branch["layer"] for branch in training["branches"]] == [
        f"encoder.layers.{n}.self_attn.attn" for n in (0, 1)
    ]
    assert all(branch["ratio"] > 0 and branch["kurtosis"] >= 1 for branch in training["branches"])


@pytest.mark.parametrize("task", ["train", "eval"])
def test_an_output_that_is_a_file_is_a_sentence(trained, tmp_path, capsys, task):
    (tmp_path / "file").write_text("", encoding="utf-8")
    if task == "train":
        assert train([str(trained[0]), f"work_dir={tmp_path}/file/seed0"]) == 2
    else:
        assert evaluate([str(trained[0]), "--output", str(tmp_path / "file")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'file'} is a file; give" in told
    assert "Traceback" not in told
    assert "test " not in told  # refused before any work


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_cfg.max_epoch=3", "train_cfg has no 'max_epoch'; it has type, max_epochs"),
        ("model.backbone.depth.x=3", "model.backbone.depth has no 'x'"),
        ("nonsense=1", "the config has no 'nonsense'"),
        ("work_dir", "key=value"),
        ("data_root=nowhere/", "data_root='nowhere/' does not exist"),
        ("train_cfg.max_epochs=three", "train_cfg.max_epochs='three' must be a whole number"),
        ("train_dataloader.batch_size=0", "train_dataloader.batch_size=0 must be a whole number of at least 1"),
        ("train_cfg=5", "train_cfg=5 must be a dict"),
        ("randomness.seed=abc", "randomness.seed='abc' must be a whole number from 0"),
        ("randomness.seed=-1", "randomness.seed=-1 must be a whole number from 0"),
        ("randomness=3", "randomness=3 must be a dict"),
        ("model.attention=keydiff", "model.attention.name: 'keydiff' evicts a language model's cache"),
        ("model.attention=padrre", "model.attention.name: "),
        ("model.attention=3", "model.attention=3 must be the name of a registered attention"),
        ("model.attention.degre=3", "model.attention.degre: 'padre' has no option 'degre'"),
        ("model.attention.degree=0", "model.attention: "),
    ],
)
def test_overrides_that_do_not_fit_are_refused(trained, capsys, override, message):
    assert train([str(trained[0]), override]) == 2
    told, said = capsys.readouterr()
    assert message in said
    assert "Traceback" not in said
    assert "mmengine" not in told + said  # which prints the config as soon as its Runner is made


def test_the_attentions_that_cost_adds_are_checked_as_well(data, tmp_path):
    made = make_config(tmp_path / "a.py", data, cost={"attentions": [{"name": "sdpa"}, {"name": "h2o", "budget": 9}]})
    with pytest.raises(ConfigError, match=r"cost\.attentions\.1\.name: 'h2o' evicts"):
        configs.load_config(made)


@pytest.mark.parametrize("command", [train, evaluate])
@pytest.mark.parametrize("kind", ["classify", "bench", "binary"])
def test_a_config_of_another_task_is_a_sentence(tmp_path, capsys, command, kind):
    places = {"classify": "configs/classify/digits.yaml", "bench": "configs/bench/quickstart.yaml"}
    path = ROOT / places.get(kind, "")
    if kind == "binary":
        path = tmp_path / "a.py"
        path.write_bytes(bytes(range(256)))
    assert command([str(path)]) == 2
    said = capsys.readouterr().err
    assert f"error: {path} is not a config of " in said
    assert "Traceback" not in said


def test_a_config_that_trains_or_tests_nothing_is_a_sentence(data, tmp_path, capsys):
    made = str(make_config(tmp_path / "a.py", data, train_dataloader=None, optim_wrapper=None, work_dir=str(tmp_path)))
    assert train([made]) == 2
    assert "this config trains nothing: it has no train_dataloader, optim_wrapper" in capsys.readouterr().err
    made = str(make_config(tmp_path / "a.py", data, test_dataloader=None, work_dir=str(tmp_path)))
    assert evaluate([made]) == 2
    assert "a config tests nothing: it has no test_dataloader" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["gone", "empty", "binary", "altered"])
def test_a_run_whose_last_checkpoint_is_damaged_does_not_start_over(trained, tmp_path, capsys, harm):
    config, folder = trained
    shutil.copytree(folder, tmp_path / "seed0")
    told, last = tmp_path / "seed0" / "last_checkpoint", tmp_path / "seed0" / "epoch_4.pth"
    if harm == "gone":
        last.unlink()
    elif harm == "altered":
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 255
        last.write_bytes(content)
    else:
        told.write_bytes(b"" if harm == "empty" else b"\xff\xfe")
    for command in (train, evaluate):
        assert command([str(config), f"work_dir={tmp_path}/seed0"]) == 2
        said = capsys.readouterr().err
        assert ("epoch_4.pth is damaged" if harm == "altered" else "names no checkpoint that is there") in said
        assert "or start over with resume=false" in said


def test_data_are_those_that_the_config_names(data, tmp_path):
    """A config that inherits another and names a root of its own must not go on with the other's data."""
    base = make_config(tmp_path / "base.py", data)
    mine = tmp_path / "mine.py"
    mine.write_text(f"_base_ = {str(base)!r}\ndata_root = {str(tmp_path)!r}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"not that of any data set: they read .*data; set data_root in"):
        datas.prepare(configs.load_config(mine))
    tree = ROOT / "configs" / "detect" / "trees_softmax.py"
    with pytest.raises(ConfigError, match="typo/' does not exist"):
        datas.prepare(configs.load_config(tree, [f"data_root={tmp_path}/typo/"]))
    assert not (tmp_path / "typo").exists()
    config = configs.load_config(base)
    assert datas.prepare(config)
    config.test_evaluator.ann_file = str(data / "boxes.json")
    assert datas.prepare(config)
    config.data_root = str(data.parent)
    assert datas.prepare(config)  # its data lie inside
    config.test_evaluator.ann_file = "none.json"
    with pytest.raises(ConfigError, match=r"test_evaluator.ann_file='none.json' is not what test_dataloader reads"):
        datas.prepare(config)


def test_an_attention_can_be_given_by_its_name_alone(data, tmp_path):
    config = configs.load_config(make_config(tmp_path / "a.py", data), ["model.attention=sdpa"])
    assert config.model.attention == {"name": "sdpa"}


def test_a_checkpoint_that_is_cut_short_is_named(trained, tmp_path, capsys):
    config, folder = trained
    shutil.copytree(folder, tmp_path / "seed0")
    whole = tmp_path / "seed0" / "epoch_4.pth"
    whole.write_bytes(whole.read_bytes()[:-100])
    for command in (train, evaluate):
        assert command([str(config), f"work_dir={tmp_path}/seed0"]) == 2
        assert "epoch_4.pth is cut short" in capsys.readouterr().err


def test_bad_configs_and_swaps_are_refused_before_any_work(data, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("model = (", encoding="utf-8")
    for path, message in (
        (tmp_path / "broken.py", "is not a config of mmengine"),
        (tmp_path / "none.py", "not exist"),
        (ROOT / "configs" / "bench" / "quickstart.yaml", "its model has no type"),
    ):
        assert train([str(path)]) == 2
        assert message in capsys.readouterr().err
    work = f"work_dir={tmp_path}/run"
    everywhere = make_config(tmp_path / "a.py", data, {"name": "padre"})
    assert train([str(everywhere), work]) == 2
    assert "cross-attention" in capsys.readouterr().err
    unknown = make_config(tmp_path / "b.py", data, {"name": "padrre"})
    assert train([str(unknown), work]) == 2
    assert "padre" in capsys.readouterr().err


def test_another_config_does_not_go_on_with_a_run(trained, tmp_path, capsys):
    config, folder = trained
    assert train([str(config), f"work_dir={folder}", "model.attention.degree=3"]) == 2
    said = capsys.readouterr().err
    assert "model.attention.degree: 2 -> 3" in said
    assert "resume=false" in said
    assert evaluate([str(config), f"work_dir={folder}", "model.attention.degree=3"]) == 2
    assert "was trained by another config" in capsys.readouterr().err


def test_a_corrupt_image_stops_the_run_with_its_name(tmp_path, forked):
    data = make_data(tmp_path / "data", images=4)
    (data / "images" / "2.png").write_bytes(b"not an image")
    config = make_config(tmp_path / "squares.py", data, work_dir=str(tmp_path / "run"))
    done = forked.script("train/detect.py", config).finish()
    assert done.returncode != 0
    assert "2.png" in done.stderr


def test_an_image_without_a_box_and_crowds_are_trained_on(tmp_path):
    data = make_data(tmp_path / "data", images=4)
    content = json.loads((data / "boxes.json").read_text(encoding="utf-8"))
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 0]
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"].append(  # one pixel, and one past the edge
        {"id": 90, "image_id": 3, "category_id": 1, "bbox": [5, 5, 1, 1], "area": 1, "iscrowd": 0}
    )
    content["annotations"].append(
        {"id": 91, "image_id": 3, "category_id": 1, "bbox": [-9, 40, 99, 60], "area": 5940, "iscrowd": 0}
    )
    (data / "boxes.json").write_text(json.dumps(content), encoding="utf-8")
    config = make_config(tmp_path / "squares.py", data, PADRE, epochs=2, flips=0.0, work_dir=str(tmp_path / "seed0"))
    loaded = configs.load_config(config)
    odd = datas.prepare(loaded)[0].odd
    assert odd == {"images without a box": 1, "crowd regions": 1, "boxes past the edge": 1}
    boxes = _dataset(loaded)[3]["data_samples"].gt_instances.bboxes.tensor
    assert [6, 6] in (boxes[:, 2:].tolist()), boxes  # one pixel, from 5 to 6
    assert boxes.min() >= 0
    assert boxes.max() <= SIDE
    assert train([str(config)]) == 0
    assert evaluate([str(config)]) == 0


def _dataset(config):
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    return mmcv_ext.load("mmdet.registry").DATASETS.build(config.train_dataloader.dataset)


def test_a_head_of_another_number_of_classes_is_refused(trained, capsys):
    assert train([str(trained[0]), "model.bbox_head.num_classes=2"]) == 2
    assert "num_classes is 2, but" in capsys.readouterr().err


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "detect").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_resumes_unless_the_command_says_no(config):
    assert configs.load_config(config).resume is True  # mmdet's own configs say False
    assert configs.load_config(config, ["resume=false"]).resume is False


def test_starting_over_sets_the_old_run_aside(trained, tmp_path, monkeypatch):
    """Also where all of it happens within a second, by which mmengine names runs."""
    config, _ = trained
    monkeypatch.setattr("mmengine.runner.runner.time.strftime", lambda *given: "20260101_000000")
    words = [str(config), f"work_dir={tmp_path}/seed0", "train_cfg.max_epochs=1"]
    for _ in range(3):
        assert train([*words, "resume=false"]) == 0
    assert (tmp_path / "seed0.old" / "epoch_1.pth").is_file()
    assert (tmp_path / "seed0.old2" / run.TRAINED_BY).is_file()
    assert len(list((tmp_path / "seed0").glob("*/vis_data"))) == 1  # its curves are its own


def test_given_weights_are_begun_with_and_not_gone_on_from(trained, tmp_path):
    config, folder = trained
    words = [str(config), f"work_dir={tmp_path}", f"load_from={folder / 'epoch_4.pth'}", "train_cfg.max_epochs=2"]
    assert train(words) == 0
    assert (tmp_path / "epoch_2.pth").is_file()
    found, given = weights(tmp_path), torch.load(folder / "epoch_4.pth", weights_only=False)["state_dict"]
    near = max((found[key] - given[key]).abs().max().item() for key in found)
    assert 0 < near < 0.1  # eight steps of at most 2e-3 away
    assert any("load_from" in change for change in run.changes(configs.load_config(config, [f"work_dir={tmp_path}"])))


def test_weights_that_are_gone_do_not_stop_a_run_that_has_begun_with_them(trained, tmp_path):
    config, folder = trained
    shutil.copy(folder / "epoch_4.pth", tmp_path / "given.pth")
    words = [str(config), f"work_dir={tmp_path}/seed0", f"load_from={tmp_path}/given.pth", "train_cfg.max_epochs=1"]
    assert train(words) == 0
    (tmp_path / "given.pth").unlink()
    assert train(words) == 0
    assert train([*words, "resume=false"]) == 2
    assert (tmp_path / "seed0" / "epoch_1.pth").is_file()


def test_another_root_reaches_the_data_sets_inside_wrappers(data, tmp_path):
    config = configs.load_config(make_config(tmp_path / "a.py", data))
    one = config.train_dataloader.dataset.to_dict()
    config.train_dataloader.dataset = {
        "type": "ConcatDataset",
        "datasets": [one, {"type": "RepeatDataset", "dataset": one}],
    }
    datas.move(config, str(data), "elsewhere")
    read = [one for part in ("train", "val") for one in datas.read_by(config, part)]
    assert [one["data_root"] for one in read] == ["elsewhere/"] * 3


def test_what_fails_before_it_begins_leaves_no_trace_of_its_config(trained, tmp_path, capsys):
    config, _ = trained
    assert train([str(config), f"work_dir={tmp_path}", "model.attention.name=padrre"]) == 2
    assert "padre" in capsys.readouterr().err
    assert not (tmp_path / run.TRAINED_BY).exists()


def test_one_folder_is_trained_into_by_one_process(trained, tmp_path, capsys):
    with locked(tmp_path):
        assert train([str(trained[0]), f"work_dir={tmp_path}"]) == 2
    assert "another run is writing into" in capsys.readouterr().err


def test_a_link_that_leads_nowhere_is_made_again(tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "gone", target_is_directory=True)
    (tmp_path / "asset").mkdir()
    datas.link(tmp_path / "asset", tmp_path / "data")
    assert (tmp_path / "data").resolve() == (tmp_path / "asset").resolve()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a folder"):
        datas.link(tmp_path / "asset", tmp_path / "file")


def test_configs_that_cannot_be_compared_are_refused(trained, data, tmp_path, capsys):
    config, _ = trained
    assert evaluate([str(config), str(config)]) == 2
    assert "two of the configs are called 'padre degree=2 kernel_size=3'" in capsys.readouterr().err
    other = make_config(tmp_path / "other.py", make_data(tmp_path / "data", images=4))
    assert evaluate([str(config), str(other)]) == 2
    assert "tested on different images" in capsys.readouterr().err


def test_a_checkpoint_of_other_classes_or_weights_is_refused(trained, data, tmp_path):
    from mmengine.runner import Runner

    config = configs.load_config(trained[0], [f"work_dir={tmp_path}"])
    runner = Runner.from_cfg(config)
    checkpoint = run.last_checkpoint(configs.load_config(trained[0]))
    with pytest.raises(DataError, match="trained on the classes square, but the data has cat"):
        score.load(runner, checkpoint, ["cat"])
    other = configs.load_config(trained[0], [f"work_dir={tmp_path}", "model.attention=null"])
    with pytest.raises(ConfigError, match="does not hold the weights of this config's model"):
        score.load(Runner.from_cfg(other), checkpoint, ["square"])


def test_what_is_not_trained_to_its_end_is_not_evaluated(trained, tmp_path, capsys):
    config, _ = trained
    assert evaluate([str(config), f"work_dir={tmp_path}"]) == 2
    assert "train first" in capsys.readouterr().err
    assert train([str(config), f"work_dir={tmp_path}", "train_cfg.max_epochs=1"]) == 0
    (tmp_path / run.TRAINED_BY).unlink()
    assert evaluate([str(config), f"work_dir={tmp_path}"]) == 2
    assert "trained for 1 of 4 epochs" in capsys.readouterr().err


@pytest.mark.parametrize("error", [DataError("no such box"), RuntimeError("a mistake")])
def test_a_test_that_fails_is_a_row_and_ends_all_processes_where_there_are_several(
    trained, tmp_path, capsys, monkeypatch, error
):
    def fails(config, folder):
        raise error

    words = [str(trained[0]), f"work_dir={trained[1]}", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(score, "predict", fails)
    assert evaluate(words) == 1
    (line,) = (tmp_path / "out/records.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["status"] == "failed"
    assert str(error) in capsys.readouterr().err
    monkeypatch.setattr("mmengine.dist.get_world_size", lambda: 2)
    with pytest.raises(SystemExit, match=f"error: {error}"):
        evaluate(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is no error")
def test_mixed_precision_needs_a_gpu(trained, capsys):
    assert train([str(trained[0]), "--amp"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_launcher_needs_its_processes(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert train([str(trained[0]), f"work_dir={tmp_path}", "--launcher", "pytorch"]) == 2
    assert "torchrun" in capsys.readouterr().err

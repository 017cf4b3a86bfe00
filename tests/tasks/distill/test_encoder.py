"""Image encoders without a classifier: repaired on images, scored by neighbors; and the ViT-S/14 that comes as ONNX."""

import numpy as np
import onnx
import pytest
import torch
import transformers
import yaml
from onnx import helper, numpy_helper

from attnzoo import tasks
from attnzoo.errors import AssetError, ConfigError, TrainingError
from attnzoo.tasks.distill.config import DistillConfig
from attnzoo.tasks.distill.encoder import TEMPERATURE, neighbors
from attnzoo.tasks.distill.subject import subject_of
from attnzoo.tasks.distill.vit_s14 import convert
from tests.tasks.classify.conftest import write_images
from train.distill import main


def encoder(**options):
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "image_size": 8, "patch_size": 2}
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**sizes, use_mask_token=False, **options)
    return transformers.Dinov2Model(config).eval()


@pytest.fixture
def config(tmp_path):
    write_images(tmp_path / "images/train", 16)
    write_images(tmp_path / "images/val", 10, seed=1)
    encoder().save_pretrained(tmp_path / "encoder")
    data = {"root": str(tmp_path / "images"), "image_size": 8, "workers": 0}
    return {
        "task": "distill",
        "name": "features",
        "output": str(tmp_path / "out"),
        "features": {"model": str(tmp_path / "encoder"), "data": data, "bank": 40, "queries": 30, "neighbors": 5},
        "attentions": [{"name": "padre", "options": {"degree": 2, "kernel_size": 3}, "label": "padre"}],
        "layers": [{"share": 0.5}, {"share": 1.0}],
        "sensitivity_steps": 2,
        "stages": [
            {"objective": "layer", "samples": 320, "lr": 0.01},
            {"objective": "model", "samples": 640, "lr": 0.003, "train": "all"},
        ],
        "batch": 16,
        "points": 1,
        "threads": 1,
    }


def test_an_encoder_is_repaired_without_classes(config, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main([str(tmp_path / "config.yaml")]) == 0, capsys.readouterr().err
    teacher, half, whole = tasks.read_records(tmp_path / "out/records.jsonl")
    assert teacher.quality.metric == "k-NN top-1"
    assert teacher.quality.trials[0].points[0].error == 0
    assert teacher.quality.score > 0.5, "random features tell bright from dark"
    for row in (half, whole):
        (trial,) = row.quality.trials
        start, _, by_model = trial.points
        assert trial.errors[0] > trial.errors[1]
        assert 0.7 * start.error > by_model.error > 0
    assert {"k-NN top-1 %", "error of the features at the start", "error of the features"} <= set(whole.quality.details)
    assert "k-NN top-1 %" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_an_encoder_in_half_precision_is_repaired_in_float32(config):
    encoder().bfloat16().save_pretrained(config["features"]["model"])
    teacher = subject_of(DistillConfig.check(config)).teacher()
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


def test_features_are_those_of_the_model(config):
    """Scores are those of features that are computed here, one image at a time."""
    config["features"] |= {"pool": "mean", "bank": 48}
    checked = DistillConfig.check(config)
    subject = subject_of(checked)
    model = subject.teacher()
    splits, features, classes = subject.splits, {}, {}
    for split, source, count in (("bank", splits.train, 48), ("queries", splits.test, 30)):
        found, known = [], []
        for index in np.random.default_rng(0).permutation(len(source))[:count]:
            image, target = source.read(int(index))
            pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
            mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            with torch.no_grad():
                found.append(model((pixels - mean) / std).last_hidden_state.mean(1)[0])
            known.append(target)
        features[split], classes[split] = torch.stack(found), torch.tensor(known)
    wanted = neighbors(features["bank"], classes["bank"], features["queries"], 5)
    assert subject.score(model).score == pytest.approx((wanted == classes["queries"]).float().mean().item())


def test_neighbors_vote_by_their_cosine():
    torch.manual_seed(0)
    known, asked, classes = torch.randn(40, 6), torch.randn(15, 6), torch.randint(3, (40,))
    for row, answer in zip(asked, neighbors(known, classes, asked, 7), strict=True):
        cosines = [
            (torch.cosine_similarity(row, one, dim=0).item(), int(c)) for one, c in zip(known, classes, strict=True)
        ]
        votes = [0.0, 0.0, 0.0]
        for cosine, at in sorted(cosines, reverse=True)[:7]:
            votes[at] += np.exp(cosine / TEMPERATURE)
        assert int(answer) == int(np.argmax(votes))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bank": 49}, "features.bank: 49 images asked for, but there are 48"),
        ({"queries": 31}, "features.queries: 31 images asked for, but there are 30"),
        ({"model": "./not/here"}, "'./not/here' is no image encoder"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_before_any_work(change, told, config):
    config["features"] |= change
    with pytest.raises(ConfigError, match=told):
        tasks.find("distill").check(DistillConfig.check(config))


def test_without_a_class_token_the_mean_is_asked_for(config, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    told = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=2)
    transformers.SiglipVisionModel(told).save_pretrained(tmp_path / "siglip")
    config["features"]["model"] = str(tmp_path / "siglip")
    with pytest.raises(ConfigError, match=r"has no class token.*say pool: mean"):
        subject_of(DistillConfig.check(config)).teacher()
    config["features"]["pool"] = "mean"
    assert subject_of(DistillConfig.check(config)).teacher()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bank": 4}, "neighbors: 5 cannot vote where bank has 4"),
        ({"augment": {"mixup": 0.5}}, "features.augment: mixup, cutmix and repeats mean nothing"),
    ],
)
def test_what_a_config_of_features_cannot_say_is_refused(change, told, config):
    config["features"] |= change
    with pytest.raises(ConfigError, match=told):
        DistillConfig.check(config)


def test_features_that_are_not_finite_are_told(config):
    subject = subject_of(DistillConfig.check(config))
    model = subject.teacher()
    with torch.no_grad():
        model.layernorm.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="features are not finite"):
        subject.score(model)


def test_patches_must_divide_the_image(config):
    config["features"]["data"]["image_size"] = 9
    with pytest.raises(ConfigError, match=r"^features.model: .* whose square patches"):
        tasks.find("distill").check(DistillConfig.check(config))


def onnx_file(model, path):
    """A graph as the package's: linear weights transposed and named by their nodes alone, positions in two parts."""
    weights, nodes = [], []

    def add(name, value):
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))

    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, value in model.state_dict().items():
        if name in linear:
            add(f"onnx::MatMul_{len(nodes)}", value.T.numpy())
            node = f"/backbone/{name.removesuffix('.weight').replace('.', '/').replace('layer/', 'layer.')}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], [f"y{len(nodes)}"], name=node))
        elif name.endswith("position_embeddings"):
            add("onnx::Reshape_1", value[:, 1:].numpy())
            add("onnx::Concat_2", value[:, :1].numpy())
        else:
            add(f"backbone.{name}", value.numpy())
    add("decoder.final_conv.bias", np.zeros(1, np.float32))
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["qk"], name="/backbone/encoder/layer.0/attention/MatMul"))
    graph = helper.make_graph(nodes, "encoder", [], [], weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph), str(path))


def test_an_onnx_encoder_becomes_what_transformers_reads(tmp_path):
    model = encoder()
    onnx_file(model, tmp_path / "package/models/encoder.onnx")
    convert(tmp_path / "package", tmp_path / "made")
    again = transformers.AutoModel.from_pretrained(tmp_path / "made").eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(images).last_hidden_state, model(images).last_hidden_state)
    onnx_file(torch.nn.Linear(2, 2), tmp_path / "other/other.onnx")
    with pytest.raises(AssetError, match="is not the encoder that was expected"):
        convert(tmp_path / "other", tmp_path / "again")
    onnx_file(model, tmp_path / "package/models/another.onnx")
    with pytest.raises(AssetError, match=r"2 \.onnx files"):
        convert(tmp_path / "package", tmp_path / "again")

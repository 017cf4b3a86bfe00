"""A mixer that does not give (B, N, C) back is refused in every kind of host, not broadcast by a residual."""

import pytest
import torch
import transformers
from torch import nn

import attnzoo
from attnzoo.errors import ShapeError
from tests.eviction.models import CACHE, cache_of, language_model, token_ids
from tests.tasks.detect import models
from tests.zoo import TORCH, images, seeded, vit


class Wrong(nn.Module):
    """Gives one token in the place of all, or whatever else `wrong` makes of the tokens."""

    def __init__(self, dim, num_heads):
        super().__init__()

    def wrong(self, x):
        return x.mean(1, keepdim=True)

    def forward(self, x, grid=None, prefix=0, mask=None):
        return self.wrong(x)

    def extend(self, x, state, mask):
        return self.wrong(x), (x[:, -1:],)


class Bare(Wrong):
    """Gives a tuple, as torch's attention does."""

    def wrong(self, x):
        return x, None


@pytest.fixture(params=[Wrong, Bare], ids=["one token", "a tuple"])
def wrong(request):
    causal = {"causal": True, "decode": True, "mask": True}
    attnzoo.register_attention("wrong", "mixer", request.param, capabilities=causal)
    yield "one_token" if request.param is Wrong else "tuple"
    attnzoo.unregister_attention("wrong")


def _image_encoder():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=64, patch_size=16)).eval()


HOSTS = {
    "timm": (vit, lambda model: model(images()), (2, 17, 192)),
    "torch": (lambda: seeded(TORCH[1].build), lambda model: model(TORCH[1].inputs()[0]), None),
    "image encoder of transformers": (_image_encoder, lambda model: model(images()), (2, 17, 24)),
    "decoder of transformers": (language_model, lambda model: model(token_ids(2, 9)), (2, 9, 32)),
    "decoder without a cache": (language_model, lambda model: model(token_ids(2, 9), use_cache=False), (2, 9, 32)),
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_mixer_of_another_shape_is_refused_with_both_shapes(wrong, host):
    build, call, shape = HOSTS[host]
    model = attnzoo.replace_attention(build(), "wrong")
    with torch.no_grad(), pytest.raises(ShapeError, match="the mixer 'wrong' gave ") as caught:
        call(model)
    said = str(caught.value)
    if shape is not None:
        assert f"for tokens of shape {shape}" in said
        assert (f"gave {(shape[0], 1, shape[2])} " if wrong == "one_token" else "gave a tuple ") in said


def _detect(detector):
    if type(detector).__module__.startswith("transformers."):
        detector(torch.randn(1, 3, 64, 96))
    else:
        models.mmdet_call(detector, torch.randn(1, models.WIDTH, 4, 5), [(4, 5)])


@pytest.mark.parametrize("kind", ["DETR", "Detr"])
def test_a_mixer_of_another_shape_is_refused_in_detectors(wrong, kind):
    detector = models.transformers_detector(kind) if kind == "Detr" else models.mmdet_detector(kind)
    attnzoo.replace_attention(detector, "wrong", where="*encoder.*")
    with torch.no_grad(), pytest.raises(ShapeError, match=r"'wrong' gave .* for tokens of shape \(1, \d+, 16\)"):
        _detect(detector)


def test_a_state_of_a_wrong_output_is_not_gone_on_from():
    class Late(Wrong):
        def extend(self, x, state, mask):
            return (x if state is None else x[:, :1]), (x[:, -1:],)

    attnzoo.register_attention("late", "mixer", Late, capabilities={"causal": True, "decode": True, "mask": True})
    try:
        model, ids = attnzoo.replace_attention(language_model(), "late"), token_ids(1, 9)
        with torch.no_grad():
            cache = cache_of(model(ids[:, :5]))
            with pytest.raises(ShapeError, match=r"'late' gave \(1, 1, 32\) for tokens of shape \(1, 4, 32\)"):
                model(ids[:, 5:], **{CACHE: cache})
            with pytest.raises(attnzoo.AttnZooError, match="broke off"):
                model(ids[:, 5:], **{CACHE: cache})
    finally:
        attnzoo.unregister_attention("late")

"""Images of a vision-language model in fewer tokens: the same as cutting its embeddings by hand."""

import pytest
import torch
import transformers

import attnzoo
from attnzoo import prune_visual_tokens
from attnzoo.errors import OptionError, UnsupportedError
from tests.eviction.models import TEXT, cache_of, language_model
from tests.eviction.test_families import vision_language

pytestmark = pytest.mark.compat

IMAGE, PATCHES = 50, 16
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llava(kind="Llava", text="Llama"):
    sizes = {key: value for key, value in TEXT.items() if not key.endswith("_id")}
    config = getattr(transformers, f"{kind}Config")(
        text_config=getattr(transformers, f"{text}Config")(**sizes, num_key_value_heads=2),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        image_token_id=IMAGE,
        **({"image_token_index": IMAGE} if kind == "VipLlava" else {}),
    )
    if kind == "VipLlava":
        config.vision_feature_layers = [-2, -1]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():  # the initialization is too small for attention to tell tokens apart
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def pixels(images):
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prompt(*parts):
    """Token numbers of a row: a number stands for a token, ``"image"`` for all pieces of an image."""
    return [token for part in parts for token in ([IMAGE] * PATCHES if part == "image" else [part])]


def one_image():
    ids = torch.tensor([prompt(1, 5, "image", 7, 8, 9)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(1)}


def farthest(features, count):
    """The paper's greedy rule, entry by entry."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    distance = (1 - unit @ unit.T).tolist()
    every = range(len(features))
    chosen = [max(every, key=lambda i: min(distance[i][j] for j in every if j != i))]
    while len(chosen) < count:
        chosen.append(max((i for i in every if i not in chosen), key=lambda i: min(distance[i][j] for j in chosen)))
    return sorted(chosen)


def features_of(model, images):
    out = model.model.get_image_features(pixel_values=images, return_dict=True)
    return torch.stack(list(out.pooler_output))


@pytest.mark.parametrize("kind", ["Llava", "VipLlava"])
def test_all_tokens_are_the_model_as_it_is(kind):
    model, inputs = llava(kind), one_image()
    with torch.no_grad():
        torch.testing.assert_close(model(**prune_visual_tokens(model, inputs, keep=1)).logits, model(**inputs).logits)


@pytest.mark.parametrize(("keep", "count"), [(0.25, 4), (0.1, 2), (0.01, 1), (0.97, 16)])
@pytest.mark.parametrize("text", ["Llama", "Qwen2"])
def test_what_is_kept_is_most_diverse(keep, count, text):
    model, inputs = llava(text=text), one_image()
    with torch.no_grad():
        features = features_of(model, inputs["pixel_values"])[0]
        words = model.get_input_embeddings()(inputs["input_ids"][0])
        kept = farthest(features, count)
        cut = torch.cat([words[:2], features[kept], words[2 + PATCHES :]])[None]
        pruned = prune_visual_tokens(model, inputs, keep=keep)
        torch.testing.assert_close(pruned["inputs_embeds"], cut)
        assert pruned["attention_mask"].tolist() == [[1] * (5 + count)]
        torch.testing.assert_close(model(**pruned).logits, model(inputs_embeds=cut).logits)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(**pruned, **settings), model.generate(inputs_embeds=cut, **settings))


def test_rows_are_pruned_each_by_itself():
    """Of no, one and two images, with padding on either side; rows of other lengths are padded on the left."""
    model = llava()
    rows = [prompt(1, 5, "image", 7), prompt(1, "image", 6, "image", 9), prompt(1, 4, 3)]
    width = max(map(len, rows)) + 2
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for index, (row, at) in enumerate(zip(rows, (0, 2, 5), strict=True)):
        ids[index, at : at + len(row)] = torch.tensor(row)
        mask[index, at : at + len(row)] = 1
    images = pixels(3)
    with torch.no_grad():
        both = prune_visual_tokens(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": images}, keep=0.5)
        assert both["attention_mask"].sum(1).tolist() == [3 + 8, 3 + 16, 3]
        logits = model(**both).logits
        for index, some in ((0, images[:1]), (1, images[1:])):
            alone = {"input_ids": torch.tensor([rows[index]]), "pixel_values": some}
            single = prune_visual_tokens(model, alone, keep=0.5)
            length = single["attention_mask"].shape[1]
            torch.testing.assert_close(both["inputs_embeds"][index, -length:], single["inputs_embeds"][0])
            torch.testing.assert_close(logits[index, -length:], model(**single).logits[0], rtol=1e-5, atol=1e-5)


def test_the_language_model_may_be_bounded_besides():
    model, inputs = llava(), one_image()
    attnzoo.replace_attention(model, "keydiff", where="model.language_model", budget=6, block_size=4)
    with torch.no_grad():
        pruned = prune_visual_tokens(model, inputs, keep=0.5)
        assert pruned["inputs_embeds"].shape[1] == 13
        cache = cache_of(model(**pruned))
        assert cache.get_seq_length() == 13
        assert all(layer.keys.shape[2] < 10 for layer in cache.layers)
        assert model.generate(**pruned, max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, 5)


def test_gradients_reach_the_image():
    model, inputs = llava(), one_image()
    inputs["pixel_values"].requires_grad_()
    model(**prune_visual_tokens(model, inputs)).logits.sum().backward()
    assert inputs["pixel_values"].grad.abs().sum() > 0


def test_what_is_refused():
    model, inputs = llava(), one_image()
    for keep in (0, 1.5, -1, True, "half", float("nan")):
        with pytest.raises(OptionError, match="keep must be a share above 0"):
            prune_visual_tokens(model, inputs, keep=keep)
    with pytest.raises(OptionError, match="input_ids"):
        prune_visual_tokens(model, {"inputs_embeds": torch.zeros(1, 3, 32)})
    with pytest.raises(OptionError, match="no image in these inputs"):
        prune_visual_tokens(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is no vision-language model"):
        prune_visual_tokens(language_model(), {"input_ids": torch.tensor([[1, 2, 3]])})
    assert not model.model.language_model._forward_pre_hooks


def test_models_that_tell_more_about_their_tokens_are_refused():
    gemma = vision_language("Gemma3").eval()
    image = gemma.config.image_token_id
    ids = torch.tensor([[1, *[image] * 4, 3]])
    kinds = (ids == image).long()
    inputs = {"input_ids": ids, "token_type_ids": kinds, "pixel_values": torch.zeros(1, 3, 16, 16)}
    with torch.no_grad(), pytest.raises(UnsupportedError, match="Gemma3ForConditionalGeneration makes the masks"):
        prune_visual_tokens(gemma, inputs)
    sizes = {key: value for key, value in TEXT.items() if not key.endswith("_id")}
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    qwen = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={**sizes, "num_key_value_heads": 2, "rope_parameters": rotary},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            **{"image_token_id": IMAGE, "vision_start_token_id": 48, "vision_end_token_id": 49},
        )
    ).eval()
    inputs = {
        "input_ids": torch.tensor([[1, 48, *[IMAGE] * 4, 49, 3]]),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
    }
    with torch.no_grad(), pytest.raises(UnsupportedError, match="positions on several axes"):
        prune_visual_tokens(qwen, inputs)

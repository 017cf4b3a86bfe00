"""Small swapped models to repair, one per kind of host, and detectors."""

import timm
import torch
import transformers
from torch import nn

import attnzoo
from tests.tasks.detect import models as detectors
from tests.zoo import _TEXT, _VISION, Host, images, tokens

CAUSAL = {  # options under which mixers of the registry stand in decoders
    "padre": {"token_mixing": "causal_conv1d", "degree": 2, "kernel_size": 5},
    "power": {"bidirectional": False},
}


def vit(**options):
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64, "num_classes": 5, **options}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_TEXT, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True), 2).eval()


def padded():
    x = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(3))
    hidden = torch.arange(16) >= torch.tensor([16, 11, 5])[:, None]
    return {"src": x, "src_key_padding_mask": hidden}


def hf_vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION, num_labels=5)).eval()


def detr():
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "num_queries": 4, "num_labels": 3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        **sizes,
        **heads,
    )
    return transformers.DetrForObjectDetection(config).eval()


def detr_images():
    mask = torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, :, 64:] = 0
    return {"pixel_values": torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(4)), "pixel_mask": mask}


def mmdet():
    return detectors.mmdet_detector("DABDETR")


def mmdet_images():
    """As mmengine calls it: a padded batch, what is told of each image, and what is asked for."""
    images = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(5))
    return images, detectors.samples([(64, 80), (48, 64)], 64, 80), "tensor"


KINDS = [
    Host("timm", vit, images, lambda model, x: model(x), 2),
    Host("torch", encoder, padded, lambda model, x: model(**x), 2),
    Host("transformers", hf_vit, images, lambda model, x: model(x).logits, 2),
    Host("detector", detr, detr_images, lambda model, x: model(**x).logits, 2),
    Host("mmdet", mmdet, mmdet_images, lambda model, x: model(*x)[0], 2),
    Host("decoder", llama, tokens, lambda model, x: model(**x).logits, 2, causal=True),
]


def swap_options(host, name):
    """Options under which a mixer can be tried in a host; None where it cannot stand there."""
    count = {"timm": 17, "transformers": 17, "torch": 16, "detector": 12, "mmdet": 20}.get(host.name)
    grid = attnzoo.describe(name).capabilities.grid
    options = {"kernel_size": 5} if grid and name != "pooling" else {}
    if name == "mlp_mixer":
        options["tokens"] = count
    if host.causal:
        return CAUSAL.get(name)
    if host.name == "torch" and grid:
        options["grid"] = (4, 4)
    return options | ({"where": "*encoder.*"} if host.name in ("detector", "mmdet") else {})

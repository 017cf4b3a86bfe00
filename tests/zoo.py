"""Small models of every supported host, with inputs: what the contract tests run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import VisionTransformer

# the tolerances of the identity contract, by dtype, against the largest value or 1
OUTPUT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-4}


@dataclass(frozen=True)
class Host:
    """A small host model: how to build it, its inputs, and how to call it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    call: Callable[[nn.Module, Any], Tensor]
    layers: int
    causal: bool = False

    def __str__(self) -> str:
        return self.name


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    # class tokens, biases and norms start at 0 and 1, where much hides: move everything
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs of a host with every floating tensor in `dtype`."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: cast(value, dtype) for key, value in inputs.items()}
    return tuple(cast(value, dtype) for value in inputs)


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _timm(name: str, layers: int = 2, size: int = 64, **options: Any) -> Host:
    def build() -> nn.Module:
        return timm.create_model(name, depth=2, num_classes=11, img_size=size, **options)

    return Host(f"timm:{name}", build, lambda: images(size), lambda model, x: model(x), layers)


def _vision(name: str, config: Any) -> Host:
    def build() -> nn.Module:
        return transformers.AutoModel.from_config(config)

    layers = 3 if "siglip" in name else 2  # with its pooling head
    return Host(f"transformers:{name}", build, images, _call_vision, layers)


def _call_vision(model: nn.Module, x: Tensor) -> Tensor:
    out = model(pixel_values=x)
    return torch.cat([out.last_hidden_state.flatten(1), out.pooler_output], dim=1)


_VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}
_TEXT = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokens(batch: int = 3, length: int = 17) -> dict[str, Tensor]:
    """Token ids with left padding of 0, 4 and 9."""
    ids = torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 9)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _call_lm(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits
    return logits * inputs["attention_mask"].unsqueeze(-1)  # what stands at padding means nothing


def _lm(name: str, config: type, implementation: str = "sdpa", **options: Any) -> Host:
    def build() -> nn.Module:
        made = config(**{**_TEXT, **options})
        return transformers.AutoModelForCausalLM.from_config(made, attn_implementation=implementation)

    return Host(f"transformers:{name}", build, tokens, _call_lm, 2, causal=True)


def _torchvision() -> nn.Module:
    model = VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96)
    nn.init.normal_(model.heads[0].weight)
    return model


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True), 2)


def _padded() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([16, 11, 5])
    return x, torch.arange(16) >= lengths[:, None]


def _call_encoder(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
    x, hidden = inputs
    return model(x, src_key_padding_mask=hidden) * ~hidden.unsqueeze(-1)


TIMM = [
    _timm("vit_tiny_patch16_224"),
    _timm("deit_tiny_distilled_patch16_224"),
    _timm("deit3_small_patch16_224", init_values=0.5),
    _timm("vit_small_patch14_reg4_dinov2", size=56, init_values=0.5),
    _timm("eva02_tiny_patch14_224", size=56),
    _timm("vit_base_patch16_siglip_224", layers=3, embed_dim=192, num_heads=3),
]
TORCH = [
    Host("torchvision:vit", _torchvision, images, lambda model, x: model(x), 2),
    Host("torch:encoder", _encoder, _padded, _call_encoder, 2),
]
VISION = [
    _vision("vit", transformers.ViTConfig(**_VISION)),
    _vision("deit", transformers.DeiTConfig(**_VISION)),
    _vision("dinov2", transformers.Dinov2Config(**_VISION, mlp_ratio=2)),
    _vision("clip-vision", transformers.CLIPVisionConfig(**_VISION)),
    _vision("siglip-vision", transformers.SiglipVisionConfig(**_VISION)),
]
# its learned position bias reaches a core as an additive mask that requires a gradient
RELATIVE = Host(
    "transformers:beit-relative",
    lambda: transformers.BeitModel(
        transformers.BeitConfig(**_VISION, use_relative_position_bias=True, use_mean_pooling=True, drop_path_rate=0.0)
    ),
    images,
    _call_vision,
    2,
)
LANGUAGE = [
    _lm("llama", transformers.LlamaConfig, num_key_value_heads=2),
    _lm("llama-eager", transformers.LlamaConfig, implementation="eager", num_key_value_heads=2),
    _lm("mistral", transformers.MistralConfig, num_key_value_heads=2, sliding_window=6),
    _lm("qwen3", transformers.Qwen3Config, num_key_value_heads=2, head_dim=12),
    _lm("gemma", transformers.GemmaConfig, num_key_value_heads=1, head_dim=16),
    _lm("phi3", transformers.Phi3Config, num_key_value_heads=2),
    _lm("gpt-neox", transformers.GPTNeoXConfig),
]
HOSTS = [*TIMM, *TORCH, *VISION, *LANGUAGE]


def fingerprint(model: nn.Module) -> list:
    """What a refused swap must leave alone: modules, hooks, modes and weights, by identity."""
    return [
        (path, id(m), m.training, sorted(map(id, m._forward_pre_hooks.values())), [id(p) for p in m.parameters()])
        for path, m in model.named_modules()
    ] + [{k: v for k, v in vars(m).items() if isinstance(v, bool)} for m in model.modules()]


def vit(**options) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=3, **options).eval()


def torch_layer(cls=nn.TransformerEncoderLayer, **options) -> nn.Module:
    return cls(32, 4, 64, batch_first=True, **options)


def mha(**options) -> nn.Module:
    return nn.ModuleList([nn.MultiheadAttention(32, 4, **options)])

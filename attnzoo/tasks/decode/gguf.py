"""GGUF to safetensors: transformers takes half a minute to read the first and a second to read the second."""

from __future__ import annotations

from pathlib import Path

import torch

from attnzoo.assets import only_file
from attnzoo.extras import require


def convert(folder: Path, target: Path) -> None:
    """Write the causal language model of the one GGUF file under `folder`, dequantized to float32, into `target`.

    `target` becomes a folder that ``from_pretrained`` of model and tokenizer read. Raises `MissingExtraError` without
    transformers, gguf or safetensors; `AssetError` if there is not exactly one GGUF file.
    """
    require("transformers", "gguf", "safetensors", extra="llm")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = only_file(folder, ".gguf")
    place, name = file.parent, file.name
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # its weights are plain now, but transformers refuses to save the mark
    with torch.device("meta"):
        plain = type(read)(type(read.config).from_dict(settings))
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(target)

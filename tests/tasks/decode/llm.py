"""A tiny random Llama and a tokenizer of single bytes, as transformers keeps them on disk; and a text."""

import json
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(chat=False):
    """One token a byte, and an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>")
    if chat:
        made.chat_template = CHAT
    return made


def tiny_llama(vocabulary=257, layers=2):
    """Weights large enough that what a token sees matters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


def prose(words=4000):
    """Sentences of random words."""
    draw = random.Random(0)
    made = []
    while len(made) < words:
        sentence = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(9)]
        made += [sentence[0].capitalize(), *sentence[1:-1], sentence[-1] + "."]
        if draw.random() < 0.1:
            made[-1] += "\n\n"
    return " ".join(made).replace("\n\n ", "\n\n")


def save(folder, chat=False):
    """Put model and tokenizer into a folder that ``from_pretrained`` reads."""
    tiny_llama().save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""


def write_task(folder):
    """Put a task of the harness into a folder: ``tiny_choice``, six questions with three answers each."""
    words = prose(400).split()
    docs = [
        {"context": " ".join(words[20 * i : 20 * i + 20]), "choices": [" yes", " no", " perhaps"], "label": i % 3}
        for i in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (folder / "tiny.yaml").write_text(TASK.format(data=data), encoding="utf-8")

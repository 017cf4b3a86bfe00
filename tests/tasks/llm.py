"""A tiny random Llama and a tokenizer of single bytes, as transformers keeps them on disk; and a text."""

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

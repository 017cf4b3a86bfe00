"""What accumulated attention costs in memory as prompts grow."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnzoo
from attnzoo.bench.memory import peak_memory


def peak(tokens, **options):
    """Most bytes that PyTorch gave out at once while a prompt was read, beyond the model's."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16000,
    )
    llm = LlamaForCausalLM(config).eval()
    if options:
        attnzoo.replace_attention(llm, "h2o", **options)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        return peak_memory([lambda: llm(ids, logits_to_keep=1)], torch.device("cpu"))[0].allocator_bytes


def test_h2o_reads_8000_tokens_in_memory_linear_in_their_number():
    """The budget is never reached, so that all queries meet all keys in one step: the worst that can be."""
    whole = [peak(tokens, budget=8000, core="flash_scored") for tokens in (2000, 8000)]
    assert whole[1] < 4.1 * whole[0]
    matrix = 2 * 8000**2 * 4  # of one layer's attention
    assert whole[1] < matrix / 25
    bounded = [peak(tokens, budget=512, core="flash_scored") for tokens in (2000, 8000)]
    assert bounded[1] < whole[1]
    assert bounded[1] < 4.1 * bounded[0]

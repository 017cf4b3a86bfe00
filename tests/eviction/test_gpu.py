"""On a GPU every policy keeps what it keeps on a CPU, and later blocks need no mask; on a CPU this is tried there."""

import pytest
import torch

import attnzoo
from attnzoo.cores import sdpa
from attnzoo.registry import build_core, describe
from tests.eviction.models import ADAPTIVE, CACHE, POLICIES, bounded, cache_of, language_model, token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    *((name, {"schedule": schedule}) for name in POLICIES for schedule in ("block", "prompt")),
    *((name, {"budgets": "adaptive"}) for name in ADAPTIVE),
    ("h2o", {"core": "flash_scored"}),
    ("snapkv", {"core": "flash_scored", "window": 4}),
    ("h2o", {"budgets": "pyramid"}),
    ("keydiff", {"budget": 0.25}),
]


def read(model, ids, device):
    """Logits of a prompt and of single steps after it, and what the cache holds then, on the CPU."""
    model, ids, logits = model.to(device), ids.to(device), []
    with torch.no_grad():
        out = model(ids[:, :40], use_cache=True)
        for at in range(40, ids.shape[1]):
            logits.append(out.logits[:, -1:])
            out = model(ids[:, at : at + 1], use_cache=True, **{CACHE: cache_of(out)})
    held = [layer.positions.cpu() for layer in cache_of(out).layers]
    return torch.cat([*logits, out.logits], 1).cpu(), held


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: case if isinstance(case, str) else str(case))
def test_a_gpu_keeps_what_a_cpu_keeps(name, options):
    model = bounded(name, **{"budget": 12, "block_size": 6, **options})
    ids = token_ids(2, 52)
    expected, kept = read(model, ids, "cpu")
    logits, held = read(model, ids, DEVICE)
    for own, other in zip(held, kept, strict=True):
        assert torch.equal(own, other)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # rotary angles are of float32


@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(128, 1152, 8), (65, 300, 2), (128, 640, 1)])
def test_later_blocks_on_a_gpu_attend_as_the_oracle_does(queries, keys, kv_heads):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q = torch.randn(2, 8, queries, 64, device=DEVICE, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, keys, 64, device=DEVICE, dtype=dtype)
    assert sdpa._flash_runs(q, k, v, 0.0) == (DEVICE == "cuda")
    out = build_core(describe("sdpa"), {})(q, k, v, causal=True)
    oracle = build_core(describe("softmax"), {})(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(out.double(), oracle, atol=2e-2, rtol=2e-2)


def test_a_swap_made_on_a_cpu_follows_its_model_to_a_gpu():
    model = attnzoo.replace_attention(language_model(), "criticalkv", budget=12, block_size=6, base="snapkv")
    _, held = read(model, token_ids(1, 48), DEVICE)
    assert all(int((positions >= 0).sum(-1).max()) <= 12 + 6 for positions in held)

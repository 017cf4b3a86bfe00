"""Scored attention: the output of softmax attention, and how much attention each key got, without an N x S matrix.

    A = softmax(scale * Q K^T)             a query sees all keys, or those up to its own place (causal, ends lined up)
    O = A V
    sums_j = sum of A_ij over the last `window` queries i        last_j = A_nj, n the last query

What policies of KV-cache eviction score entries by (H2O, https://arxiv.org/abs/2306.14048; SnapKV,
https://arxiv.org/abs/2404.14469; TOVA, https://arxiv.org/abs/2401.06104). Memory is linear in queries and keys; query
heads that share a key head read it where it stands.

Three ways, by device and shape alone. *Chunks*: a few queries at a time in plain PyTorch, on CPUs and for what the
others do not take; on CPUs queries before the window, of which nobody asks a weight, go to PyTorch's fused kernel, and
one query alone is computed without a custom op, whose dispatch takes longer than the work.
*Flash*: on GPUs, in half precision, FlashAttention gives O and each query's log-sum-exp L_i; a second pass over tiles
computes A_ij = exp(S_ij - L_i) again and sums it, each program having keys of its own. *Decode*: on GPUs, for one
query, keys and values are read once; the scores, S numbers a head, are kept and scaled at the end. Sums are in float32
(float64 for float64). The backward goes by chunks, with softmax computed again; `sums` and `last` have no gradient.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from attnzoo.checks import check_int, check_qkv
from attnzoo.cores.sdpa import torch_sdpa
from attnzoo.errors import ShapeError
from attnzoo.kernels.dispatch import launch, note, side_by_side, sums_dtype, triton_works
from attnzoo.kernels.language import tl, triton

CHUNK = 64  # queries whose weights are in memory at a time
WIDEST = 256  # head that FlashAttention takes
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention


class Scored(NamedTuple):
    """What scored attention gives.

    Attributes
    ----------
    output
        ``(B, H, N, Dv)``, in the dtype of the queries.
    sums
        ``(B, H, S)``: attention that each key got from the queries of the window; float32, or float64.
    last
        ``(B, H, S)``: attention that each key got from the last query, of the same dtype.
    """

    output: Tensor
    sums: Tensor
    last: Tensor


def scored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = False,
    lengths: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Scored:
    """Attend, and tell what each key got.

    Parameters
    ----------
    q, k, v
        ``(B, H, N, D)``, ``(B, Hkv, S, D)`` and ``(B, Hkv, S, Dv)``, Hkv dividing H.
    window
        How many of the last queries count for the sums; None for all.
    causal
        Let query i see keys up to ``i + S - N``. A query that sees no key gets zeros.
    lengths
        Numbers of real queries and of real keys of each row, ``(B,)`` each, where rows differ. The real ones come
        first; the last query, the window and `causal` go by them. What stands behind is not read (NaN included), and
        gets zeros.
    scale
        Of the scores; ``D ** -0.5`` where None.
    softcap
        Scores s become ``softcap * tanh(s / softcap)``.

    Raises
    ------
    ShapeError
        If shapes do not fit together.
    OptionError
        If the window is not a whole number of at least 0.
    """
    check_qkv(q, k, v)
    if window is not None:
        check_int("window", window, minimum=0)
    if lengths is not None and any(n.shape != (len(q),) for n in lengths):
        raise ShapeError(
            f"lengths are two of shape ({len(q)},), one number a row, not {[tuple(n.shape) for n in lengths]}"
        )
    autocast = torch.is_autocast_enabled(q.device.type)
    if autocast and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    window = q.shape[2] if window is None else min(window, q.shape[2])
    # the context takes a tenth of the time of one query
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        if _is_one_query(q, k, v, lengths):
            note("scored_attention", "one query")
            return _one_query(q, k, v, window, scale, softcap)
        output, sums, last = _scored(q, k, v, *(lengths or (None, None)), window, causal, scale, softcap)
    return Scored(output, sums.detach(), last.detach())


def _is_one_query(q: Tensor, k: Tensor, v: Tensor, lengths: object) -> bool:
    """Whether the call is of one query on a CPU, without gradients: then dispatch would take longer than the work."""
    plain = lengths is None and k.shape[2] > 0 and not triton_works(q.device)
    graph = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)))
    return q.shape[2] == 1 and q.device.type == "cpu" and plain and not graph


def _one_query(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, softcap: float | None) -> Scored:
    """As by chunks, without what several queries need: a query that stands at the end sees all keys."""
    dtype = sums_dtype(q.dtype)
    batch, heads, _, width = q.shape
    scores = (q.to(dtype) * scale).reshape(batch, k.shape[1], -1, width) @ k.to(dtype).mT  # (B, Hkv, G, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    found = scores.softmax(-1)
    output = (found @ v.to(dtype)).to(q.dtype).reshape(batch, heads, 1, v.shape[3])
    last = found.reshape(batch, heads, k.shape[2])
    return Scored(output, last.clone() if window else torch.zeros_like(last), last)


# ----------------------------------------------------------------------------------------------------------- chunks


def weights(
    q: Tensor, k: Tensor, first: int, queries: int, causal: bool, lengths: tuple[Tensor, Tensor] | None,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attention of the queries `first` and on, of `queries` in all, over the keys that any of them sees.

    Queries are ``(B, Hkv, G, n, D)``, weights ``(B, Hkv, G, n, seen)``.
    """
    count, keys = q.shape[3], k.shape[2]
    seen = keys
    if causal and lengths is None:
        seen = min(max(first + count + keys - queries, 0), keys)
    scores = (q * scale).flatten(2, 3) @ k[:, :, :seen].mT
    scores = scores.unflatten(2, q.shape[2:4])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(first, first + count, device=q.device)[:, None]
    key = torch.arange(seen, device=q.device)
    if lengths is not None:
        asked, held = (n.to(q.device)[:, None, None] for n in lengths)
        visible = (row < asked) & (key < held)
        if causal:
            visible = visible & (key <= row + held - asked)
        visible = visible[:, None, None]
        blind = ~visible.any(-1, keepdim=True)
        return scores.masked_fill_(~(visible | blind), float("-inf")).softmax(-1).masked_fill(blind, 0.0)
    if not causal:
        return scores.softmax(-1)
    own = max(first + keys - queries + 1, 0)  # every query sees the keys before this one
    scores[..., own:].masked_fill_(key[own:] > row + keys - queries, float("-inf"))
    found = scores.softmax(-1)
    return found if first + keys - queries >= 0 else torch.where(row + keys - queries >= 0, found, 0.0)


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """``(B, H, N, D)`` as ``(B, Hkv, G, N, D)``."""
    return x.unflatten(1, (kv_heads, -1))


def _real(x: Tensor, length: Tensor | None) -> Tensor:
    """Zeros for what stands behind the real entries of each row."""
    if length is None:
        return x
    return torch.where(
        (torch.arange(x.shape[2], device=x.device) < length.to(x.device)[:, None])[:, None, :, None], x, 0
    )


def _chunks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, CHUNK):
        yield slice(first, min(first + CHUNK, stop))


def _by_chunks(
    q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, window: int, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition, a few queries at a time."""
    queries, keys, dtype = q.shape[2], k.shape[2], sums_dtype(q.dtype)
    lengths = None if asked is None or held is None else (asked, held)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    picked = q.new_zeros(*q.shape[:2], 2, keys, dtype=dtype)
    fused = q.device.type == "cpu" and q.shape[3] == v.shape[3] and lengths is None and softcap is None
    first = 0
    if fused and keys and (not causal or queries == keys):
        first = max(queries - max(window, 1), 0) // CHUNK * CHUNK
    if first:
        earlier = slice(0, first if causal else keys)
        out[:, :, :first] = torch_sdpa(q[:, :, :first], k[:, :, earlier], v[:, :, earlier], None, causal, scale, 0.0)
    q, k, v = (_real(x.to(dtype), n) for x, n in ((q, asked), (k, held), (v, held)))
    grouped, of_group, out_of_group = (_by_group(x, k.shape[1]) for x in (q, picked, out))
    last = queries - 1 if asked is None else asked.to(q.device)[:, None] - 1
    row = torch.arange(queries, device=q.device)
    which = torch.stack([(row > last - window) & (row <= last), row == last], -2).to(dtype)  # (B or none, 2, N)
    which = which if which.dim() == 2 else which[:, None, None]
    for part in _chunks(first, queries):
        w = weights(grouped[..., part, :], k, part.start, queries, causal, lengths, scale, softcap)
        seen = w.shape[-1]
        out_of_group[..., part, :] = (w.flatten(2, 3) @ v[:, :, :seen]).unflatten(2, w.shape[2:4]).to(out.dtype)
        if lengths is not None or part.stop > queries - max(window, 1):
            of_group[..., :seen] += which[..., part] @ w
    return out, picked[:, :, 0].clone(), picked[:, :, 1].clone()  # which share no memory


def _backward_by_chunks(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, from which further ones can be had."""
    with torch.autocast(q.device.type, enabled=False):
        return _gradients(grad, q, k, v, asked, held, causal, scale, softcap)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, queries = sums_dtype(q.dtype), q.shape[2]
    lengths = None if asked is None or held is None else (asked, held)
    given = q, k, v
    q, k, v = (_real(x.to(dtype), n) for x, n in ((q, asked), (k, held), (v, held)))
    grouped, of_out = _by_group(q, k.shape[1]), _by_group(_real(grad.to(dtype), asked), k.shape[1])
    grad_q, grad_k, grad_v = [], k.new_zeros(k.shape), v.new_zeros(v.shape)
    for part in _chunks(0, queries):
        rows, g = grouped[..., part, :], of_out[..., part, :]
        w = weights(rows, k, part.start, queries, causal, lengths, scale, softcap)
        seen = w.shape[-1]
        behind = (0, 0, 0, k.shape[2] - seen)
        grad_v = grad_v + F.pad(w.flatten(2, 3).mT @ g.flatten(2, 3), behind)
        of_w = (g.flatten(2, 3) @ v[:, :, :seen].mT).unflatten(2, w.shape[2:4])
        of_scores = w * (of_w - (w * of_w).sum(-1, keepdim=True))
        if softcap is not None:
            scores = ((rows * scale).flatten(2, 3) @ k[:, :, :seen].mT).unflatten(2, w.shape[2:4])
            of_scores = of_scores * (1 - torch.tanh(scores / softcap).square())
        of_scores = of_scores.flatten(2, 3) * scale
        grad_q.append((of_scores @ k[:, :, :seen]).unflatten(2, w.shape[2:4]))
        grad_k = grad_k + F.pad(of_scores.mT @ rows.flatten(2, 3), behind)
    whole = torch.cat(grad_q, 3).flatten(1, 2) if grad_q else q.new_zeros(q.shape)
    return whole.to(given[0].dtype), grad_k.to(given[1].dtype), grad_v.to(given[2].dtype)


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _capped(scores, softcap):
    """Squash scores; tanh by way of exp, in a form that cannot overflow."""
    if softcap is not None:
        shrunk = tl.exp(-2 * tl.abs(scores) / softcap)
        size = softcap * (1 - shrunk) / (1 + shrunk)
        scores = tl.where(scores < 0, -size, size)
    return scores


def _config(rows: int, columns: int, warps: int, stages: int) -> Any:
    return triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)


def _fitting(configs: Sequence[Any], named: Mapping[str, Any], **constants: Any) -> list[Any]:
    """Configurations whose tiles find room in the registers: of wide heads the small ones, and those of many warps."""
    wide = {**named, **constants}["DEPTH"] > 64
    tiles = [(c, c.kwargs["ROWS"] * c.kwargs["COLUMNS"] // c.num_warps) for c in configs]
    return [c for c, tile in tiles if not wide or tile <= 1024]


CONFIGS = [_config(32, 64, 4, 2), _config(64, 64, 4, 3), _config(64, 128, 4, 3), _config(64, 128, 8, 3)]


@triton.autotune(
    CONFIGS,
    ["window_size", "keys_size", "WIDTH", "GROUPS", "CAUSAL"],
    {"early_config_prune": _fitting},
    cache_results=True,
)
@triton.jit
def _sums_kernel(
    q, k, lse, sums, last, q_image, q_head, q_token, k_image, k_head, k_token, queries, keys, kv_heads, first, scale,
    window_size, keys_size,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the attention of a block of keys over the queries from `first` on, for all heads that share the keys.

    `window_size` and `keys_size` are for the choice of a configuration alone.
    """
    blocks = tl.cdiv(keys, COLUMNS)
    part = tl.program_id(0) % blocks * COLUMNS
    image = (tl.program_id(0) // blocks).to(tl.int64) // kv_heads
    kv_head = (tl.program_id(0) // blocks).to(tl.int64) % kv_heads
    key = part + tl.arange(0, COLUMNS)
    deep = tl.arange(0, DEPTH)
    at = key.to(tl.int64)[None, :] * k_token + deep[:, None]
    known = (key < keys)[None, :] & (deep < WIDTH)[:, None]
    block = tl.load(k + image * k_image + kv_head * k_head + at, mask=known, other=0.0)
    start = first
    if CAUSAL:
        start = tl.maximum(first, part - keys + queries)
    for group in range(GROUPS):
        head = kv_head * GROUPS + group
        line = (image * kv_heads * GROUPS + head) * queries
        total = tl.zeros((ROWS, COLUMNS), tl.float32)  # its rows are added up once, behind the loop
        final = tl.zeros((COLUMNS,), tl.float32)
        for row in range(start, queries, ROWS):
            rows = row + tl.arange(0, ROWS)
            asked = rows < queries
            place = rows.to(tl.int64)[:, None] * q_token + deep[None, :]
            there = asked[:, None] & (deep < WIDTH)[None, :]
            tile = tl.load(q + image * q_image + head * q_head + place, mask=there, other=0.0)
            norm = tl.load(lse + line + rows, mask=asked, other=float("inf"))
            weight = tl.exp2(tl.dot(tile, block) * (scale * 1.4426950408889634) - (norm * 1.4426950408889634)[:, None])
            if CAUSAL:
                weight = tl.where(key[None, :] <= rows[:, None] + (keys - queries), weight, 0.0)
            total += weight
            if row + ROWS >= queries:
                final = tl.sum(tl.where((rows == queries - 1)[:, None], weight, 0.0), 0)
        own = (image * kv_heads * GROUPS + head) * keys + key
        tl.store(sums + own, tl.sum(total, 0), mask=key < keys)
        tl.store(last + own, final, mask=key < keys)


@triton.jit
def _decode_kernel(
    q, k, v, held, scores, out, most, norm, q_image, q_head, k_image, k_head, k_token, v_image, v_head, v_token,
    keys, kv_heads, splits, share, scale, softcap,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, V_WIDTH: tl.constexpr,
    V_DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One query a head over a share of the keys: scores, and an output that is still to be scaled."""
    split = tl.program_id(0) % splits
    image = (tl.program_id(0) // splits).to(tl.int64) // kv_heads
    kv_head = (tl.program_id(0) // splits).to(tl.int64) % kv_heads
    group, deep, across = tl.arange(0, HEADS), tl.arange(0, DEPTH), tl.arange(0, V_DEPTH)
    head = kv_head * GROUPS + group
    place = image * q_image + head[:, None] * q_head + deep[None, :]
    tile = tl.load(q + place, mask=(group < GROUPS)[:, None] & (deep < WIDTH)[None, :], other=0.0)
    real = keys
    if held is not None:
        real = tl.load(held + image).to(tl.int32)
    line = image * kv_heads * GROUPS + head
    top = tl.full((HEADS,), -1e30, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, V_DEPTH), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, keys), COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        at = key.to(tl.int64)
        k_at = image * k_image + kv_head * k_head + at[None, :] * k_token + deep[:, None]
        block = tl.load(k + k_at, mask=(key < real)[None, :] & (deep < WIDTH)[:, None], other=0.0)
        score = _capped(tl.dot(tile, block, input_precision="ieee") * scale, softcap)
        score = tl.where((key < real)[None, :], score, float("-inf"))
        tl.store(
            scores + line[:, None] * keys + at[None, :], score, mask=(group < GROUPS)[:, None] & (key < keys)[None, :]
        )
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        kept = tl.exp(top - higher)
        v_at = image * v_image + kv_head * v_head + at[:, None] * v_token + across[None, :]
        value = tl.load(v + v_at, mask=(key < real)[:, None] & (across < V_WIDTH)[None, :], other=0.0)
        total = total * kept + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(value.dtype), value, mixed * kept[:, None], input_precision="ieee")
        top = higher
    part = line * splits + split
    tl.store(most + part, top, mask=group < GROUPS)
    tl.store(norm + part, total, mask=group < GROUPS)
    own = part[:, None] * V_WIDTH + across[None, :]
    tl.store(out + own, mixed, mask=(group < GROUPS)[:, None] & (across < V_WIDTH)[None, :])


@triton.jit
def _combine_kernel(
    scores, parts, most, norm, out, sums, keys, splits,
    V_WIDTH: tl.constexpr, V_DEPTH: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scale the scores of some keys to weights, where they stand; the program of the first also combines the output.

    With one query the sums are the weights, or nothing: `sums` is None where they are.
    """
    blocks = tl.cdiv(keys, COLUMNS)
    block = tl.program_id(0) % blocks
    line = (tl.program_id(0) // blocks).to(tl.int64)
    split = tl.arange(0, SPLITS)
    tops = tl.load(most + line * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(tops, 0)
    share = tl.exp(tops - top)
    total = tl.sum(tl.load(norm + line * splits + split, mask=split < splits, other=0.0) * share, 0)
    total = tl.where(total > 0, total, 1.0)  # no key: zeros
    key = block * COLUMNS + tl.arange(0, COLUMNS)
    score = tl.load(scores + line * keys + key, mask=key < keys, other=float("-inf"))
    weight = tl.exp(score - top) / total
    tl.store(scores + line * keys + key, weight, mask=key < keys)
    if sums is not None:
        tl.store(sums + line * keys + key, weight, mask=key < keys)
    if block == 0:
        across = tl.arange(0, V_DEPTH)
        at = (line * splits + split)[:, None] * V_WIDTH + across[None, :]
        inside = (split < splits)[:, None] & (across < V_WIDTH)[None, :]
        mixed = tl.sum(tl.load(parts + at, mask=inside, other=0.0) * share[:, None], 0) / total
        tl.store(out + line * V_WIDTH + across, mixed.to(out.dtype.element_ty), mask=across < V_WIDTH)


TILE = 8192  # bytes of keys, and of values, that a program of the decode kernel reads at a time, but 16 keys at least
PROGRAMS = 256  # among which keys are shared out when decoding
SPLITS = 64  # shares at most
GROUPS = 16  # query heads that share a key head, at most, of whom one program has room


def _by_flash(
    q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention, then the weights again by tiles from its log-sum-exp."""
    width = q.shape[3]
    # with fewer queries than keys this operator lines up the ends: see torch.nn.attention.bias
    out, lse = _FLASH(*(_for_flash(x) for x in (q, k, v)), 0.0, causal, False, scale=scale)[:2]
    return out[..., :width].contiguous(), *sums_from_lse(q, k, lse, window, causal, scale)


def _for_flash(x: Tensor) -> Tensor:
    """`x` as FlashAttention can read it, copied if need be: heads of a multiple of 8, rows that begin at 16 bytes.

    PyTorch checks neither strides nor the address where this operator is called by itself.
    """
    if x.shape[3] % 8:
        x = F.pad(x, (0, -x.shape[3] % 8))
    apart = x.stride(3) != 1 or any(stride % 8 for stride in x.stride()[:3]) or x.data_ptr() % 16
    return x.clone(memory_format=torch.contiguous_format) if apart else x


def sums_from_lse(q: Tensor, k: Tensor, lse: Tensor, window: int, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Sums over the window, and the last row, of attention whose log-sum-exp ``(B, H, N)`` is known."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    sums, last = (q.new_empty(batch, heads, keys, dtype=torch.float32) for _ in range(2))
    q, k = side_by_side(q), side_by_side(k)
    launch(
        _sums_kernel, lambda c: (triton.cdiv(keys, c["COLUMNS"]) * batch * kv_heads,), q.device,
        q, k, lse.contiguous(), sums, last, *q.stride()[:3], *k.stride()[:3],
        queries, keys, kv_heads, min(queries - window, queries - 1), scale,
        triton.next_power_of_2(max(window, 1)), triton.next_power_of_2(keys),
        GROUPS=heads // kv_heads, WIDTH=width, DEPTH=_power(width), CAUSAL=causal,
    )  # fmt: skip
    return (sums if window else torch.zeros_like(sums)), last


def _by_decoding(
    q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, window: int, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One query: keys and values are read once, shared out among programs."""
    (batch, heads, _, width), (_, kv_heads, keys, _), v_width = q.shape, k.shape, v.shape[3]
    q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)
    if asked is not None and held is not None:
        held = (held * (asked > 0)).to(q.device, torch.int32).contiguous()  # no query sees no key
    columns = min(max(TILE // (max(_power(width), _power(v_width)) * q.element_size()), 16), 64)
    splits = max(min(triton.cdiv(keys, columns), triton.cdiv(PROGRAMS, batch * kv_heads), SPLITS), 1)
    share = triton.cdiv(triton.cdiv(keys, splits), columns) * columns
    splits = triton.cdiv(keys, share)
    scores = q.new_empty(batch, heads, keys, dtype=torch.float32)
    sums = torch.empty_like(scores) if window else None
    parts = q.new_empty(batch, heads, splits, v_width, dtype=torch.float32)
    most, norm = (q.new_empty(batch, heads, splits, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(batch, heads, 1, v_width)
    groups = heads // kv_heads
    launch(
        _decode_kernel, (splits * batch * kv_heads,), q.device,
        q, k, v, held, scores, parts, most, norm, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        keys, kv_heads, splits, share, scale, softcap,
        GROUPS=groups, HEADS=max(triton.next_power_of_2(groups), 16), WIDTH=width, DEPTH=_power(width),
        V_WIDTH=v_width, V_DEPTH=_power(v_width), COLUMNS=columns,
    )  # fmt: skip
    launch(
        _combine_kernel, (triton.cdiv(keys, 1024) * batch * heads,), q.device,
        scores, parts, most, norm, out, sums, keys, splits,
        V_WIDTH=v_width, V_DEPTH=_power(v_width), SPLITS=triton.next_power_of_2(splits), COLUMNS=1024,
    )  # fmt: skip
    return out, (torch.zeros_like(scores) if sums is None else sums), scores


def _power(width: int) -> int:
    """The power of 2, at least 16, that holds a head's width: what matrix products are made of."""
    return max(triton.next_power_of_2(width), 16)


def _has_flash(device: torch.device) -> bool:
    """Whether PyTorch's FlashAttention runs there; where kernels are only interpreted a test puts its own in."""
    if device.type != "cuda":
        return True
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _way(q: Tensor, k: Tensor, v: Tensor, lengths: bool, causal: bool, softcap: float | None) -> str:
    """Which of the three ways is taken; see the head of this file."""
    if not triton_works(q.device) or not q.numel() or not v.numel() or q.dtype == torch.float64:
        return "chunks"
    if q.shape[2] == 1 and max(q.shape[3], v.shape[3]) <= WIDEST and q.shape[1] // k.shape[1] <= GROUPS:
        return "decode"
    half = q.dtype in (torch.float16, torch.bfloat16) and _has_flash(q.device)
    widths = q.shape[3] == v.shape[3] <= WIDEST
    fits = not lengths and softcap is None and (not causal or q.shape[2] <= k.shape[2])
    return "flash" if half and widths and fits else "chunks"


# ----------------------------------------------------------------------------------------------------- registration


@torch.library.custom_op("attnzoo::scored_attention", mutates_args=())
def _scored(
    q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, window: int, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    way = _way(q, k, v, asked is not None, causal, softcap)
    note("scored_attention", way)
    if way == "decode":
        return _by_decoding(q, k, v, asked, held, window, scale, softcap)
    if way == "flash":
        return _by_flash(q, k, v, window, causal, scale)
    return _by_chunks(q, k, v, asked, held, window, causal, scale, softcap)


@torch.library.custom_op("attnzoo::scored_attention_backward", mutates_args=())
def _scored_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_by_chunks(grad, q, k, v, asked, held, causal, scale, softcap)


@_scored.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, window: int, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scores = q.new_empty(*q.shape[:2], k.shape[2], dtype=sums_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[3]), scores, torch.empty_like(scores)


@_scored_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, asked: Tensor | None, held: Tensor | None, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, causal, scale, softcap = inputs
    ctx.options = causal, scale, softcap
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    run = _backward_by_chunks if torch.is_grad_enabled() else _scored_backward
    q, k, v, asked, held = ctx.saved_tensors
    return (*run(grad, q, k, v, asked, held, *ctx.options), *[None] * 6)


_scored.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.attnzoo.scored_attention)
def _flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *a: Any, **options: Any) -> int:
    """Two products of matrices, counted whole as torch counts those of its attention; the second pass is not."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


@register_flop_formula(torch.ops.attnzoo.scored_attention_backward)
def _flops_backward(
    grad: tuple[int, ...], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *a: Any, **options: Any
) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (3 * width + 2 * v[3])

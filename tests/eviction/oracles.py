"""Scores of single policies, each in a few lines, from the keys, values, queries and attention of a dense model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnzoo.eviction.directions import Directions
from tests.eviction import noise


@dataclass
class Row:
    """One row of one layer, read as one block, and the key/value head that is asked about.

    `keys` ``(S, D)`` and `values` ``(S, D)`` are that head's; `queries` ``(G, S, D)`` and `attention` ``(G, S, S)``
    those of the query heads that share it, which are `heads` among all; `rotary` is Llama's rotary embedding,
    `projection` ``(G, D, C)`` the heads' part of the output projection.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    attention: Tensor
    kv_head: int
    heads: range
    budget: int
    rotary: nn.Module
    projection: Tensor


AGGREGATE = {"max": lambda x: x.amax(0), "mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0)}


def pooled(row, kernel=7):
    half = kernel // 2
    return [max(row[max(0, j - half) : j + half + 1]) for j in range(len(row))]


def zipcache(row, window=128, aggregate="mean"):
    seen = torch.arange(len(row.keys), 0, -1).clamp(max=window)  # of the window's queries, those that see each entry
    return AGGREGATE[aggregate](row.attention[:, -window:].sum(1) / seen).tolist(), 0, row.budget // 2


def noisy_sums(attention, heads, temperature=2.0, steps=1024, seed=0):
    """Keyformer's sums over all queries: the logits are the logarithm of attention, but for a number per query."""
    sums = torch.zeros_like(attention[:, 0])
    for at, head in enumerate(heads):
        for i in range(attention.shape[1]):
            t = 1 + (temperature - 1) * min(i / steps, 1)
            drawn = torch.tensor([noise.gumbel(seed, 0, head, i, j) for j in range(i + 1)], dtype=attention.dtype)
            sums[at, : i + 1] += ((attention[at, i, : i + 1].log() + drawn) / t).softmax(-1)
    return sums


def keyformer(row, normalize=True, aggregate="mean", **how):
    sums = noisy_sums(row.attention, row.heads, **how)
    seen = torch.arange(len(row.keys), 0, -1) if normalize else 1
    return AGGREGATE[aggregate](sums / seen).tolist(), 0, row.budget // 2


def lagkv(row, lag=None):
    lag = row.budget // 3 if lag is None else lag
    ranks = []
    for start in range(4, len(row.keys) - 2 * lag + 1, lag):
        total = torch.zeros(lag, dtype=row.keys.dtype)
        for states in (row.keys, row.values):
            here, after = states[start : start + lag], states[start + lag : start + 2 * lag]
            low, high = after.min(0).values, after.max(0).values
            total += ((here - low) / (high - low)).std(-1).softmax(-1)
        ranks += [sum(other < mine for other in total.tolist()) / lag for mine in total.tolist()]
    return [1.0] * 4 + ranks + [1.0] * (len(row.keys) - 4 - len(ranks)), 4, lag


def rkv(row, window=8, kernel=7, weight=0.1, threshold=0.5):
    entries = len(row.keys)
    logits = (row.queries[:, -window:] @ row.keys.T * row.keys.shape[-1] ** -0.5).amax(0)
    importance = pooled(logits[:, : entries - window].softmax(-1).mean(0).tolist(), kernel)
    sums = torch.zeros(entries, dtype=row.keys.dtype)
    for i in range(entries):
        cosines = torch.cosine_similarity(row.keys[i : i + 1], row.keys)
        cosines[i] = 0
        similar = [j for j in range(entries) if cosines[j] > threshold]
        cosines[similar[-1:]] = 0  # the newest of those like it is let off
        sums += cosines
    redundancy = (sums / entries).softmax(-1).tolist()
    before = [weight * a - (1 - weight) * b for a, b in zip(importance, redundancy, strict=False)]
    return before + [1.0] * window, 0, row.budget // 2


def lsh(row, bits=16, seed=0):
    width = row.keys.shape[1]
    drawn = [[noise.normal(seed, 0, row.kv_head, d, b) for b in range(bits)] for d in range(width)]
    codes, *asked = (x @ torch.tensor(drawn, dtype=x.dtype) >= 0 for x in (row.keys, *row.queries[:, -1:]))
    differ = [sum(int((code != query[0]).sum()) for query in asked) for code in codes]
    return [-n / len(asked) for n in differ], 4, row.budget // 2


def averaged(row, kernel):
    """Each list of numbers pooled over neighbors, with zeros around it, and scaled back to its sum."""
    half = kernel // 2
    sums = [sum(row[max(0, j - half) : j + half + 1]) for j in range(len(row))]
    return [number * sum(row) / sum(sums) for number in sums]


def worst(row, window, kernel, aggregate="max"):
    """The worst that the window's queries saw of each entry before it, at least the mean, and of each entry in it."""
    before = len(row.keys) - window
    heads = []
    for head in row.attention[:, -window:].tolist():
        rows = [averaged(query[:before], kernel) + query[before:] for query in head]
        heads.append([max(column) for column in zip(*rows, strict=True)])
    together = AGGREGATE[aggregate](torch.tensor(heads, dtype=row.keys.dtype)).tolist()
    mean = sum(together[:before]) / before
    return [max(score, mean) for score in together[:before]] + together[before:]


def defensive(row, window=32, kernel=5, aggregate="max"):
    return worst(row, window, kernel, aggregate), 0, min(window, row.budget)


def criticalkv(row, base="h2o", base_options=None, first_stage=0.5, epsilon=1e-4):
    """Entries of the first stage have a score above all others, the protected ones among them."""
    entries, options = len(row.keys), base_options or {}
    if base == "h2o":
        sums = (row.attention.sum(1) / torch.arange(entries, 0, -1)).mean(0).tolist()
        recent = row.budget // 2
    else:
        sums, _, recent = {"zipcache": zipcache, "defensive": defensive}[base](row, **options)
    norms = [(value @ row.projection).abs().sum(-1).mean().item() for value in row.values]
    product = [(score / sum(sums) + epsilon) * norm for score, norm in zip(sums, norms, strict=True)]
    rest = sorted(range(entries - recent), key=lambda j: (sums[j], j), reverse=True)
    for j in rest[: max(int(row.budget * first_stage) - recent, 0)]:
        product[j] = float("inf")
    return product, 0, recent


def divprune(row, recent=None):
    recent = row.budget // 2 if recent is None else recent
    entries = len(row.keys)
    distance = (1 - torch.cosine_similarity(row.keys[:, None], row.keys, dim=-1)).tolist()
    chosen = list(range(entries - recent, entries))
    if not chosen:
        others = [[distance[i][j] for j in range(entries) if j != i] for i in range(entries)]
        chosen.append(max(range(entries), key=lambda i: min(others[i])))
    while len(chosen) < row.budget:
        left = [i for i in range(entries) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i][j] for j in chosen)))
    return [float(j in chosen) for j in range(entries)], 0, recent


def turns(rotary, positions, width):
    """Llama's rotations to `positions` as matrices ``(N, D, D)`` in float64: x at position p is matrix times x."""
    angles = torch.outer(positions.double(), rotary.inv_freq.double())
    cos, sin = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)


def expected_attention(row, window=128, future=512, covariance=True, epsilon=0.0, count_sinks=True, aggregate="mean"):
    entries, width = row.keys.shape
    last = torch.arange(max(entries - window, 0), entries)
    back = turns(row.rotary, last, width).mT
    plain = torch.einsum("wde,gwe->gwd", back, row.queries[:, last])  # before rotary embedding
    ahead = turns(row.rotary, torch.arange(entries, entries + future), width).mean(0)
    found = []
    for queries in plain:
        mean, spread = ahead @ queries.mean(0), ahead @ queries.T.cov(correction=0) @ ahead.T
        logits = row.keys @ mean * width**-0.5
        if covariance:
            logits = logits + (row.keys @ spread * row.keys).sum(-1) / width / 2
        counted = logits.exp() * (1 if count_sinks else torch.arange(entries) >= 4)
        found.append(counted / counted.sum())
    scores = AGGREGATE[aggregate](torch.stack(found)) + epsilon
    return (scores * row.values.norm(dim=-1)).tolist(), 4, row.budget // 2


def qfilters(row, filters, recent=None):
    direction = Directions.load(filters).layers[0][row.kv_head].to(row.keys)
    return [float(key @ direction) for key in row.keys], 0, row.budget // 2 if recent is None else recent

"""What each case runs: the operation, its rivals, its oracle, and the fewest bytes and operations it takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnzoo
from attnzoo.kernels.depthwise_pair import depthwise_pair
from attnzoo.kernels.depthwise_pair import reference as pair_reference
from attnzoo.kernels.hadamard import hadamard_chain
from attnzoo.kernels.hadamard import reference as chain_reference
from attnzoo.kernels.scored import scored_attention
from attnzoo.tasks.classify.build import build_model
from attnzoo.tasks.operations.config import ChainCase, ModuleCase, OperationsConfig, PairCase, ScoredCase

Function = Callable[..., Any]
PATCH = 8
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Work:
    """One case, ready to run.

    `shapes` are of the inputs, with the deviation of their values. `rivals` are what PyTorch has, by name, on the same
    inputs. The `oracle` is called with the inputs in float64, with the first `checked` images, all by default; the
    outputs of `run` must be close to its. `bytes` and `flops` are the fewest that a forward takes, None where nobody
    counted; they say nothing where a call is a forward and a `backward`. The `modules` must go to the device.
    """

    shapes: Sequence[tuple[tuple[int, ...], float]]
    run: Function
    rivals: Mapping[str, Function]
    oracle: Function
    bytes: int
    flops: int | None
    backward: bool = False
    checked: int | None = None
    modules: Sequence[nn.Module] = field(default_factory=list)


def work(config: OperationsConfig, case: PairCase | ChainCase | ModuleCase | ScoredCase) -> Work:
    """Give what a case runs."""
    if isinstance(case, PairCase):
        return _pair(config, case)
    if isinstance(case, ChainCase):
        return _chain(config, case)
    return _module(config, case) if isinstance(case, ModuleCase) else _scored(config, case)


def _size(config: OperationsConfig) -> int:
    """Bytes of a number."""
    return int(getattr(torch, config.dtype).itemsize)


def _with_compiled(config: OperationsConfig, rivals: dict[str, Function]) -> dict[str, Function]:
    if not config.compiled:
        return rivals
    compiled = {f"{name}, compiled": torch.compile(run, fullgraph=True, dynamic=False) for name, run in rivals.items()}
    return rivals | compiled


def _pair(config: OperationsConfig, case: PairCase) -> Work:
    side, kernel, width = case.grid, case.kernel, config.width
    batch = max(config.tokens // side**2, 1)
    grid = (side, side)

    def run(x_a: Tensor, w_a: Tensor, b_a: Tensor, x_b: Tensor, w_b: Tensor, b_b: Tensor) -> Tensor:
        return depthwise_pair(x_a, w_a, b_a, x_b, w_b, b_b, grid=grid)

    def convolve(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=kernel // 2, groups=width)

    def channels_last(x_a: Tensor, w_a: Tensor, b_a: Tensor, x_b: Tensor, w_b: Tensor, b_b: Tensor) -> Tensor:
        maps = [x.mT.unflatten(2, grid) for x in (x_a, x_b)]
        return (convolve(maps[0], w_a, b_a) * convolve(maps[1], w_b, b_b)).flatten(2).mT

    def channels_first(x_a: Tensor, w_a: Tensor, b_a: Tensor, x_b: Tensor, w_b: Tensor, b_b: Tensor) -> Tensor:
        maps = [x.view(batch, width, *grid) for x in (x_a, x_b)]  # the same numbers, as if they came in this layout
        return convolve(maps[0], w_a, b_a) * convolve(maps[1], w_b, b_b)

    tokens, taps = (batch, side**2, width), (width, 1, kernel, kernel)
    numbers = 3 * math.prod(tokens) + 2 * (math.prod(taps) + width)
    one = [(tokens, 1.0), (taps, 1 / kernel), ((width,), 1.0)]
    return Work(
        shapes=[*one, *one],
        run=run,
        rivals=_with_compiled(config, {"channels last": channels_last, "channels first": channels_first}),
        oracle=lambda *x: pair_reference(*x, grid=grid),
        checked=None,
        bytes=numbers * _size(config),
        flops=(4 * kernel**2 + 1) * math.prod(tokens),
        backward=case.backward,
    )


def _chain(config: OperationsConfig, case: ChainCase) -> Work:
    count = case.plain + case.products
    shape = (1, config.tokens, config.width)

    def parts(given: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Any, Any]:
        split = case.plain, case.plain + case.products, case.plain + 2 * case.products
        extras = given[split[2] :] if case.weighted else (None, None)
        return given[: split[0]], given[split[0] : split[1]], given[split[1] : split[2]], *extras

    def run(*given: Tensor) -> Tensor:
        plain, us, ys, weights, bias = parts(given)
        return hadamard_chain(plain, list(zip(us, ys, strict=True)), weights, bias)

    def rival(*given: Tensor) -> Tensor:
        return chain_reference(*parts(given))

    terms = case.plain + 2 * case.products
    extras = [((count, config.width), 1.0), ((config.width,), 1.0)] if case.weighted else []
    each = case.products + (count if case.weighted else 0) + count - 1 + case.weighted
    return Work(
        shapes=[(shape, 1.0)] * terms + extras,
        run=run,
        rivals=_with_compiled(config, {"written out": rival}),
        oracle=rival,
        bytes=(terms + 1) * math.prod(shape) * _size(config),
        flops=each * math.prod(shape),
        backward=case.backward,
    )


def _module(config: OperationsConfig, case: ModuleCase) -> Work:
    batch = max(config.tokens // case.tokens, 1)
    side = math.isqrt(case.tokens)

    def layer(padre: bool) -> nn.Module:
        options = {"embed_dim": config.width, "num_heads": config.heads, "depth": 1, "class_token": False}
        model = build_model(
            "vit_small_patch16_224",
            image_size=side * PATCH,
            patch_size=PATCH,
            channels=3,
            classes=10,
            options={**options, "global_pool": "avg"},
            seed=config.seed,
        )
        if padre:
            attnzoo.replace_attention(model, "padre", degree=case.degree)
        found = model.get_submodule("blocks.0.attn")
        assert isinstance(found, nn.Module)
        return found.eval()

    own: Any = layer(padre=True)
    dense: Any = layer(padre=False)
    dense.fused_attn = case.beside == "fused"
    double = copy.deepcopy(own).double()
    rivals: dict[str, Function] = {}
    if case.beside == "fused":
        for name, backend in BACKENDS.items():
            rivals[f"timm, {name}"] = _under(backend, dense)
    else:
        rivals["timm, unfused"] = dense
    tokens = (batch, case.tokens, config.width)
    numbers = sum(p.numel() for p in own.parameters()) + 2 * math.prod(tokens)
    return Work(
        shapes=[(tokens, 1.0)],
        run=own,
        rivals=rivals,
        oracle=double,
        checked=1,
        bytes=numbers * _size(config),
        flops=None,
        modules=[own, dense, double],
    )


def _under(backend: SDPBackend, function: Function) -> Function:
    def run(*x: Tensor) -> Any:
        with sdpa_kernel(backend):
            return function(*x)

    return run


def _scored(config: OperationsConfig, case: ScoredCase) -> Work:
    queries, width = case.queries, config.width // config.heads
    kv_heads = config.heads if case.kv_heads is None else case.kv_heads
    batch = max(config.tokens // case.keys, 1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(scored_attention(q, k, v, causal=True, window=case.window))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=not case.decode, enable_gqa=kv_heads < config.heads)

    one = (batch, kv_heads, case.keys, width)
    asked = (batch, config.heads, queries, width)
    seen = queries * (2 * case.keys - queries + 1) // 2
    window = queries if case.window is None else min(case.window, queries)
    again = window * (2 * case.keys - window + 1) // 2 if queries > 1 else 0
    heads = batch * config.heads
    return Work(
        shapes=[(asked, 1.0), (one, 1.0), (one, 1.0)],
        run=run,
        rivals={f"attention alone, {name}": _under(backend, attend) for name, backend in BACKENDS.items()},
        oracle=run,  # in float64 it goes by chunks
        checked=1,
        bytes=2 * (math.prod(one) + math.prod(asked)) * _size(config) + 2 * 4 * heads * case.keys,
        flops=heads * width * (4 * seen + 2 * again),
    )

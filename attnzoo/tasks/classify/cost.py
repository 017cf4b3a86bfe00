"""The cost of one attention in a vision model, beside the dense one, once both passed their gates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.bench import gate as gates
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.cost import attention_paths, cost_of
from attnzoo.bench.gate import OracleError
from attnzoo.bench.isolate import is_out_of_memory
from attnzoo.bench.measure import clock_for, interleave, share_of
from attnzoo.bench.memory import keep_all_buffers, keep_buffers, map_buffers, peak_memory
from attnzoo.bench.record import Gate, Shapes
from attnzoo.bench.task import OnProgress, Result
from attnzoo.bench.trace import Trace, missing_op, trace
from attnzoo.swap import swapped_layers
from attnzoo.tasks.classify.build import equal_parameters, swapped, with_baseline
from attnzoo.tasks.classify.cost_config import CostConfig
from attnzoo.tasks.classify.workload import Workload

ORACLE = "softmax"
MUST_RUN = {"flash": "flash"}  # attention: a word in the name of an operator that must have run


def measure_cost(work: Workload, say: OnProgress) -> Result:
    """Build, swap, gate; then, only where the gate passed, memory and time of candidate and baseline."""
    cost, spec = work.cost, work.attention
    device, dtype = torch.device(work.device), getattr(torch, cost.dtype)
    map_buffers()
    say("build")
    x = _inputs(work).to(device, dtype)
    dense = work.build().to(device, dtype)
    layers = attention_paths(dense)
    more = equal_parameters(work.build, spec, work.seed) if cost.equal_parameters and spec is not None else {}
    candidate = swapped(work.build(more), spec, work.seed).to(device, dtype)
    shapes = _shapes(dense, layers, x, work.tokens)
    with torch.inference_mode():
        say("gate")
        gate, baseline_gate, traced, traced_dense = _gates(work, candidate, dense, layers, shapes, x)
        result = Result(status="ok", shapes=shapes, gate=gate, baseline_gate=baseline_gate, backends=traced.backends)
        if failed := result.refused:
            return failed
    path = next(iter(swapped_layers(candidate)), layers[0])  # of what is timed alone
    if cost.gradient:
        gate, baseline_gate = (_gradient_gate(model, path, x) for model in (candidate, dense))
        result = result.model_copy(update={"gate": gate, "baseline_gate": baseline_gate})
        if failed := result.refused:
            return failed
    models, traces = (candidate, dense), (traced, traced_dense)
    calls = [_timed(cost, model, path, x) for model in models]
    with torch.inference_mode(not cost.gradient):
        if cost.of == "layer" or cost.gradient:
            traces = trace(calls[0]), trace(calls[1])
        say("memory")
        peaks = peak_memory(calls, device)
        (keep_all_buffers if cost.keep_freed_memory else keep_buffers)()
        say("time")
        how = cost.model_dump(include={"warmup", "repeats", "min_seconds"})
        times = interleave(calls[0], calls[1], clock_for(device), **how)
        share = None
        if cost.of == "model" and not cost.gradient:
            attention = [dense.get_submodule(path) for path in layers]
            share = share_of(device, attention, calls[1], cost.repeats)
    about: dict[str, Any] = {"freed_memory_kept": cost.keep_freed_memory, "attention_share": share}
    found = cost_of(models, layers, times, len(x), traces, peaks, **about)
    return Result(**{**dict(result), "costs": {"training" if cost.gradient else "forward": found}})


def _gates(
    work: Workload, candidate: nn.Module, dense: nn.Module, layers: list[str], shapes: Shapes, x: Tensor
) -> tuple[Gate, Gate, Trace, Trace]:
    """The gates of the candidate and of the dense baseline on exactly the inputs that will be timed, and both traces.

    The forwards of the traces are those whose outputs are checked.
    """
    spec, tolerance, name = work.attention, gates.TOLERANCE[x.dtype], f"{ORACLE} core, same weights and inputs"
    oracle = _softmax_core(work, layers, x)
    with gates.noted(dense, layers) as got_dense:
        traced_dense = trace(lambda: dense(x))
    baseline_gate = gates.compare(got_dense, oracle, name, tolerance)
    del got_dense
    with gates.noted(candidate, layers) as got:
        traced = trace(lambda: candidate(x))
    first = {at: tensor[:1] for at, tensor in got.items()}
    if spec is not None and attnzoo.describe(spec.name).kind == "mixer":
        gate = gates.compare(first, _double(candidate, layers, x), "itself in float64, first image", tolerance)
        if "tokens" not in spec.options:  # else it was built for one number of tokens and takes no other
            mixers = {path: layer.get_submodule("mixer") for path, layer in swapped_layers(candidate).items()}
            small = gates.mixer_gate(mixers, shapes.dim, shapes.prefix, x, work.seed)
            gate = gate if small.passed and not gate.passed else small
    elif spec is not None and spec.name == ORACLE:
        own = _double(with_baseline(work.build(), fused=False).to(x), layers, x)
        gate = gates.compare(first, own, "the host's own attention in float64, first image", tolerance)
    else:
        gate = gates.compare(got, oracle, name, tolerance)
    gate = gates.finite(gate, got[gates.OUTPUT])
    if spec is not None and spec.name in MUST_RUN:
        gate = gates.refuse(gate, missing_op(traced.backends, MUST_RUN[spec.name]))
    return gate, baseline_gate, traced, traced_dense


def _softmax_core(work: Workload, layers: list[str], x: Tensor) -> dict[str, Tensor]:
    """Outputs of the softmax core on the host's weights, image by image, for it needs much memory."""
    model = swapped(work.build(), AttentionConfig(name=ORACLE), work.seed).to(x)
    parts: list[dict[str, Tensor]] = []
    try:
        for one in x.split(1):
            with gates.noted(model, layers) as found:
                model(one)
            parts.append(found)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OracleError(f"the oracle ran out of memory, so nothing was checked or timed: {error}") from error
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _double(model: nn.Module, layers: list[str], x: Tensor) -> dict[str, Tensor]:
    """Outputs of a copy of `model` in float64, on the first image."""
    double = copy.deepcopy(model).double()
    with gates.noted(double, layers) as found:
        double(x[:1].double())
    return found


def _inputs(work: Workload) -> Tensor:
    generator = torch.Generator().manual_seed(work.seed)
    return torch.randn(work.batch, work.host.channels, *work.pixels, generator=generator)


def _timed(cost: CostConfig, model: nn.Module, path: str, x: Tensor) -> Callable[[], object]:
    """One call as it is timed: of the model, or of its attention layer at `path`; with a backward if asked."""
    module, inputs = model, x
    if cost.of == "layer":
        module, inputs = model.get_submodule(path), _input_of(model, path, x)
    if not cost.gradient:
        return lambda: module(inputs)
    inputs = inputs.requires_grad_()
    cotangent = _cotangent(module, inputs)

    def step() -> None:
        for leaf in (inputs, *module.parameters()):
            leaf.grad = None
        module(inputs).backward(cotangent)

    return step


def _cotangent(module: nn.Module, inputs: Tensor) -> Tensor:
    """A random gradient of the module's output, the same for all that is called on these inputs."""
    with torch.no_grad():
        out = module(inputs)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out.shape, generator=generator).to(out)


def _gradient_gate(model: nn.Module, path: str, x: Tensor) -> Gate:
    """Compare each gradient of the attention layer, by its input and every parameter, with its own in float64."""
    module, inputs = model.get_submodule(path), _input_of(model, path, x)[:1]
    cotangent = _cotangent(module, inputs)

    def gradients(module: nn.Module, inputs: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        leaves = {"gradient of the input": inputs.clone().requires_grad_()}
        leaves |= {f"gradient of {name}": p for name, p in module.named_parameters()}
        out = module(leaves["gradient of the input"])
        found = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    expected = gradients(copy.deepcopy(module).double(), inputs.double(), cotangent.double())
    oracle = "gradients of the layer itself in float64, first image, after its outputs passed"
    return gates.compare(gradients(module, inputs, cotangent), expected, oracle, gates.TOLERANCE[x.dtype])


def _input_of(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """The tokens that the module at `path` gets when `model` is called on `x`."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return found[0].clone()


def _shapes(model: nn.Module, layers: list[str], x: Tensor, tokens: int) -> Shapes:
    first = model.get_submodule(layers[0]) if layers else None
    return Shapes(
        batch=len(x),
        tokens=tokens,
        prefix=int(getattr(model, "num_prefix_tokens", 0)),
        dim=int(getattr(model, "embed_dim", 0)),
        heads=int(getattr(first, "num_heads", 0)),
        depth=len(layers),
    )

"""What is measured of a vision model: one attention's cost at a token count, or its accuracy after training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.bench import gate as gates
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.cost import attention_paths, ratios_of, side_of
from attnzoo.bench.gate import OracleError, gate_message
from attnzoo.bench.isolate import is_out_of_memory
from attnzoo.bench.measure import clock_for, interleave, quantiles, share_of
from attnzoo.bench.memory import keep_all_buffers, keep_buffers, map_buffers, peak_memory
from attnzoo.bench.record import Cost, Gate, Shapes
from attnzoo.bench.task import Result, Say
from attnzoo.bench.trace import Trace, missing_op, trace
from attnzoo.errors import UnsupportedError
from attnzoo.swap import swapped_layers
from attnzoo.tasks.classify import small as classify
from attnzoo.tasks.classify.quality import Training, accuracy_of

if TYPE_CHECKING:
    from attnzoo.tasks.suite import SuiteConfig

ORACLE = "softmax"
MUST_RUN = {"flash": "flash"}  # attention: a word in the name of an operator that must have run


def measure_cost(config: SuiteConfig, spec: AttentionConfig | None, tokens: int, say: Say) -> Result:
    """Build, swap, gate; then, only where the gate passed, memory and time of candidate and baseline."""
    device, dtype = torch.device(config.device), getattr(torch, config.cost.dtype)
    map_buffers()
    say("build")
    x = _inputs(config, tokens).to(device, dtype)
    fused = config.baseline.fused if spec is None or spec.fused is None else spec.fused
    dense = _with_baseline(build_host(config, tokens), fused).to(device, dtype)
    layers = attention_paths(dense)
    more: dict[str, Any] = {}
    if config.cost.equal_parameters and spec is not None:
        more = classify.equal_parameters(
            lambda more: build_host(config, tokens, more),
            lambda more: _swapped(build_host(config, tokens, more), spec, config.seed),
            spec.label,
        )
    candidate = _swapped(build_host(config, tokens, more), spec, config.seed).to(device, dtype)
    shapes = _shapes(dense, layers, x, tokens)
    with torch.inference_mode():
        say("gate")
        checks = _Checks(config, tokens, spec, layers, shapes, x)
        gate, baseline_gate, traced, traced_dense = checks.run(candidate, dense)
        result = Result(
            status="ok",
            shapes=shapes,
            gate=gate,
            baseline_gate=baseline_gate,
            backends=traced.backends,
        )
        for name, check in (("gate", gate), ("the baseline's gate", baseline_gate)):
            if not check.passed:
                return result.model_copy(update={"status": "failed", "message": gate_message(name, check)})
    path = next(iter(swapped_layers(candidate)), layers[0])  # of what is timed alone
    if config.cost.gradient:
        gate = _gradient_gate(candidate, path, x, checks.tolerance)
        baseline_gate = _gradient_gate(dense, path, x, checks.tolerance)
        result = result.model_copy(update={"gate": gate, "baseline_gate": baseline_gate})
        for name, check in (("gate", gate), ("the baseline's gate", baseline_gate)):
            if not check.passed:
                return result.model_copy(update={"status": "failed", "message": gate_message(name, check)})
    timed, timed_dense = _timed(config, candidate, path, x), _timed(config, dense, path, x)
    with torch.inference_mode(not config.cost.gradient):
        if config.cost.of == "layer" or config.cost.gradient:
            traced, traced_dense = trace(timed), trace(timed_dense)
        say("memory")
        peak, peak_dense = peak_memory([timed, timed_dense], device)
        (keep_all_buffers if config.cost.keep_freed_memory else keep_buffers)()
        say("time")
        times = interleave(
            timed,
            timed_dense,
            clock_for(device),
            warmup=config.cost.warmup,
            repeats=config.cost.repeats,
            min_seconds=config.cost.min_seconds,
        )
        share = None
        if config.cost.of == "model" and not config.cost.gradient:
            attention = [dense.get_submodule(path) for path in layers]
            share = share_of(device, attention, timed_dense, config.cost.repeats)
    side = side_of(candidate, layers, quantiles(times.a, 1e3), len(x), traced, peak)
    side_dense = side_of(dense, layers, quantiles(times.b, 1e3), len(x), traced_dense, peak_dense)
    uncounted = tuple(sorted({*traced.uncounted, *traced_dense.uncounted}))
    ratios = ratios_of(side, side_dense, quantiles(times.ratios))
    cost = Cost(
        candidate=side,
        baseline=side_dense,
        ratios=ratios,
        uncounted_ops=uncounted,
        freed_memory_kept=config.cost.keep_freed_memory,
        attention_share=share,
    )
    return Result(**{**dict(result), "costs": {"training" if config.cost.gradient else "forward": cost}})


def measure_quality(config: SuiteConfig, spec: AttentionConfig | None, data: str, say: Say) -> Result:
    """Train once per seed and test on the held-out images, which lie in the folder `data`."""
    quality = config.quality
    assert quality is not None
    images = classify.load_images(quality.dataset, Path(data), train_images=quality.train_images, std=quality.input_std)
    recipe = classify.Recipe(**quality.recipe.model_dump())
    trainings: list[Training] = []
    for seed in quality.seeds:

        def build(spec: AttentionConfig | None, options: Mapping[str, Any], seed: int = seed) -> nn.Module:
            model = classify.build_model(
                quality.host.model,
                image_size=images.side,
                patch_size=quality.host.patch_size,
                channels=images.channels,
                classes=images.classes,
                options={**quality.host.options, **options},
                seed=seed,
            )
            return _swapped(_with_baseline(model, config.baseline.fused), spec, seed)

        found: dict[str, Any] = {}
        if quality.equal_parameters and spec is not None:
            found = classify.equal_parameters(
                lambda more: build(None, more), lambda more: build(spec, more), spec.label
            )
        model = build(spec, found)

        def tell(epoch: int, loss: float, seed: int = seed) -> None:
            say(f"train seed {seed}: epoch {epoch}/{recipe.epochs}, loss {loss:.3f}")

        trained = classify.train(model, images, recipe, seed=seed, device=config.device, on_epoch=tell)
        if not all(map(math.isfinite, trained.epoch_losses)):
            return Result(status="failed", message=f"seed {seed}: the training loss became {trained.epoch_losses[-1]}")
        correct = classify.count_correct(model, images, device=config.device)
        trainings.append(
            Training(
                seed=seed,
                correct=correct,
                images=len(images.test_x),
                final_loss=trained.epoch_losses[-1],
                seconds=trained.seconds,
                epoch_losses=trained.epoch_losses,
                parameters=sum(p.numel() for p in model.parameters()),
            )
        )
    return Result(status="ok", quality=accuracy_of(quality, trainings))


class _Checks:
    """The gates of one row: the candidate's and the dense baseline's, on exactly the inputs that will be timed."""

    def __init__(
        self,
        config: SuiteConfig,
        tokens: int,
        spec: AttentionConfig | None,
        layers: list[str],
        shapes: Shapes,
        x: Tensor,
    ) -> None:
        self.config, self.tokens, self.spec = config, tokens, spec
        self.layers, self.shapes, self.x = layers, shapes, x
        self.tolerance = gates.TOLERANCE[x.dtype]
        self.kind = None if spec is None else attnzoo.describe(spec.name).kind

    def run(self, candidate: nn.Module, dense: nn.Module) -> tuple[Gate, Gate, Trace, Trace]:
        """Give both gates and both traces; the forwards of the traces are those whose outputs are checked."""
        oracle = self._softmax_core()
        with gates.noted(dense, self.layers) as got_dense:
            traced_dense = trace(lambda: dense(self.x))
        baseline_gate = gates.compare(got_dense, oracle, f"{ORACLE} core, same weights and inputs", self.tolerance)
        del got_dense
        with gates.noted(candidate, self.layers) as got:
            traced = trace(lambda: candidate(self.x))
        gate = gates.finite(self._candidate_gate(candidate, got, oracle), got[gates.OUTPUT])
        if self.spec is not None and self.spec.name in MUST_RUN:
            gate = gates.refuse(gate, missing_op(traced.backends, MUST_RUN[self.spec.name]))
        return gate, baseline_gate, traced, traced_dense

    def _candidate_gate(self, candidate: nn.Module, got: dict[str, Tensor], oracle: dict[str, Tensor]) -> Gate:
        if self.spec is not None and self.kind == "mixer":
            mixers = {path: layer.get_submodule("mixer") for path, layer in swapped_layers(candidate).items()}
            small = None
            if "tokens" not in self.spec.options:  # else it was built for one number of tokens and takes no other
                small = gates.mixer_gate(mixers, self.shapes.dim, self.shapes.prefix, self.x, self.config.seed)
            double = copy.deepcopy(candidate).double()
            with gates.noted(double, self.layers) as expected:
                double(self.x[:1].double())
            first = {name: tensor[:1] for name, tensor in got.items()}
            timed = gates.compare(first, expected, "itself in float64, first image", self.tolerance)
            return timed if small is None or (small.passed and not timed.passed) else small
        if self.spec is not None and self.spec.name == ORACLE:
            first = {name: tensor[:1] for name, tensor in got.items()}
            return gates.compare(
                first, self._double(), "the host's own attention in float64, first image", self.tolerance
            )
        return gates.compare(got, oracle, f"{ORACLE} core, same weights and inputs", self.tolerance)

    def _softmax_core(self) -> dict[str, Tensor]:
        """Outputs of the softmax core on the host's weights, image by image, for it needs much memory."""
        model = _swapped(build_host(self.config, self.tokens), AttentionConfig(name=ORACLE), self.config.seed).to(
            self.x
        )
        parts: list[dict[str, Tensor]] = []
        try:
            for one in self.x.split(1):
                with gates.noted(model, self.layers) as found:
                    model(one)
                parts.append(found)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OracleError(f"the oracle ran out of memory, so nothing was checked or timed: {error}") from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _double(self) -> dict[str, Tensor]:
        """Outputs of the host with its own attention, not fused, in float64, on the first image."""
        model = _with_baseline(build_host(self.config, self.tokens), fused=False).to(self.x).double()
        with gates.noted(model, self.layers) as found:
            model(self.x[:1].double())
        return found


def build_host(config: SuiteConfig, tokens: int, more: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the host as the config says, with its own attention, in evaluation mode; the same weights every time.

    `more` are further options of the host.
    """
    model = classify.build_model(
        config.host.model,
        image_size=math.isqrt(tokens) * config.host.patch_size,
        patch_size=config.host.patch_size,
        channels=config.host.channels,
        classes=config.host.classes,
        options={**config.host.options, **(more or {})},
        seed=config.seed,
    )
    return _with_baseline(model, config.baseline.fused).eval()


def _inputs(config: SuiteConfig, tokens: int) -> Tensor:
    side = math.isqrt(tokens) * config.host.patch_size
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(config.cost.batch[tokens], config.host.channels, side, side, generator=generator)


def _timed(config: SuiteConfig, model: nn.Module, path: str, x: Tensor) -> Callable[[], object]:
    """One call as it is timed: of the model, or of its attention layer at `path`; with a backward if asked."""
    module, inputs = model, x
    if config.cost.of == "layer":
        module, inputs = model.get_submodule(path), _input_of(model, path, x)
    if not config.cost.gradient:
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


def _gradient_gate(model: nn.Module, path: str, x: Tensor, tolerance: float) -> Gate:
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
    return gates.compare(gradients(module, inputs, cotangent), expected, oracle, tolerance)


def _input_of(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """The tokens that the module at `path` gets when `model` is called on `x`."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return found[0].clone()


def _with_baseline(model: nn.Module, fused: bool) -> nn.Module:
    """Choose between the host's own two ways of computing its attention."""
    for path in attention_paths(model):
        layer: Any = model.get_submodule(path)
        if not isinstance(getattr(layer, "fused_attn", None), bool):
            raise UnsupportedError(
                f"{path} ({type(layer).__name__}) has no switch between fused and written-out attention"
            )
        layer.fused_attn = fused
    return model


def _swapped(model: nn.Module, spec: AttentionConfig | None, seed: int) -> nn.Module:
    """Put the attention of `spec` into `model`; what it adds is initialized from `seed`."""
    if spec is None:
        return model
    torch.manual_seed(seed)
    return attnzoo.replace_attention(model, spec.name, keep_original=False, **spec.swap)


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

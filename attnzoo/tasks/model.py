"""Any model: what methods cost in what a function of one's own returns, or in an encoder of transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

import attnzoo
from attnzoo import models
from attnzoo.bench import gate as gates
from attnzoo.bench.attentions import AttentionConfig, attention_problems, refuse_expect, refuse_vision_keys, row_of
from attnzoo.bench.config import Dtype, RunConfig, Section, refuse_twins
from attnzoo.bench.cost import attention_paths, cost_of
from attnzoo.bench.isolate import is_out_of_memory
from attnzoo.bench.measure import clock_for, interleave, share_of
from attnzoo.bench.memory import keep_buffers, map_buffers, peak_memory
from attnzoo.bench.record import Gate
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.bench.trace import trace, without_fast_path
from attnzoo.errors import ConfigError, OptionError
from attnzoo.extras import require
from attnzoo.models import Call, tensors
from attnzoo.swap import split_host_options, swapped_layers
from attnzoo.tasks.classify.cost_config import vision_problems


class ModelCostConfig(Section):
    """What is timed, for how long. `tokens` and `batch` are for encoders of transformers, whose inputs are random."""

    tokens: tuple[PositiveInt, ...] = ()
    batch: PositiveInt = 1
    dtype: Dtype = "float32"
    repeats: Annotated[int, Field(ge=3)] = 7
    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    warmup: Annotated[int, Field(ge=1)] = 2
    timeout_seconds: PositiveFloat = 120.0


class ModelConfig(RunConfig):
    """Time, memory and FLOPs of methods in any model whose attention layers attnzoo can swap.

    `model` is a ``package.module:function`` that returns (model, example input): a tensor, a tuple of positional
    arguments or a mapping of keyword arguments. Or it is ``transformers:FOLDER``, an encoder of images or of text,
    which is built with random weights. What is timed is a forward on that input, without gradients.
    """

    task: Literal["model"] = "model"
    model: Annotated[str, Field(min_length=1)]
    baseline: Annotated[str, Field(min_length=1, description="the dense baseline's label")] = "dense"
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    cost: ModelCostConfig = ModelCostConfig()

    @model_validator(mode="after")
    def _rows_differ_and_sizes_fit(self) -> ModelConfig:
        refuse_twins([self.baseline, *(attention.label for attention in self.attentions)])
        refuse_expect(self.attentions)
        refuse_vision_keys(self.attentions)
        if self.is_function and (self.cost.tokens or self.cost.batch != 1):
            raise ValueError("cost.tokens and cost.batch have no meaning here: the example input decides")
        if not self.is_function and not self.cost.tokens:
            raise ValueError("cost.tokens must be given for a model of transformers")
        return self

    @property
    def is_function(self) -> bool:
        """Whether a function of one's own gives the model."""
        return not self.model.startswith("transformers:")

    def identity(self) -> dict[str, Any]:
        """All that is measured, and what stands for the model's code."""
        return {**super().identity(), "source": models.source_of(self.model)}

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions, with those that the module of the model's function registers."""
        model = data.get("model")
        if isinstance(model, str) and not model.startswith("transformers:"):
            try:
                models.function_of(model)
            except ConfigError as error:
                return [str(error)]
        return attention_problems(data.get("attentions"), "attentions", _problems)


def _problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with an attention; its options may say what the model does not know itself, such as a grid."""
    try:
        _, own = split_host_options(info.given(options), dict(options))
    except OptionError as error:
        return [f"{where}.options: {error}"]
    return vision_problems(info, own, where)


def load(config: ModelConfig, tokens: int) -> Call:
    """Build the model with its example input, on the config's device and in its dtype; the same every time."""
    torch.manual_seed(config.seed)
    if config.is_function:
        call = models.load_with_example(config.model)
    else:
        call = models.encoder_with_example(config.model, tokens, config.cost.batch)
    return call.to(config.device, getattr(torch, config.cost.dtype))


def check(config: ModelConfig) -> None:
    """Build the model at every size, look for attention layers and call it at the smallest.

    Raises `ConfigError` if it cannot be built or called, or has no attention layer that can be swapped.
    """
    require("matplotlib")
    for tokens in sorted(config.cost.tokens, reverse=True) or [0]:
        call = load(config, tokens)
    if not attention_paths(call.model):
        raise ConfigError(f"model {config.model!r} has no attention layer that attnzoo can swap")
    try:
        with torch.inference_mode():
            given = tensors(call())
    except Exception as error:  # of any model
        if is_out_of_memory(error):
            return  # each row will tell
        what = f"cannot be called on its example ({call.shape}): {type(error).__name__}: {error}"
        raise ConfigError(f"model {config.model!r} {what}") from error
    if not any(x.is_floating_point() for x in given):
        raise ConfigError(f"model {config.model!r} returns no tensor of floating point that could be compared")


def plan(config: ModelConfig) -> list[Cell]:
    """A cell per size and attention, the dense baseline first."""
    shared = config.model_dump(mode="json", include={"model", "seed", "device", "threads"})
    shared |= config.cost.model_dump(mode="json", exclude={"tokens", "timeout_seconds"})
    shared |= {"source": models.source_of(config.model)}
    workload = load(config, 0).shape if config.is_function else f"batch {config.cost.batch}"
    return [
        Cell(
            **row_of(spec, config.baseline, "model"),
            kind="cost",
            tokens=tokens,
            workload=workload,
            host=f"function:{config.model}" if config.is_function else config.model,
            dtype=config.cost.dtype,
            depends_on={
                **shared,
                "input": [workload, tokens],
                "attention": None if spec is None else [spec.name, spec.swap],
            },
            asks={"attention": index},
            stage="time",
            timeout=config.cost.timeout_seconds,
            threads=config.threads,
            weight=1 + tokens / 1000,
        )
        for tokens in config.cost.tokens or (0,)
        for index, spec in [(None, None), *enumerate(config.attentions)]
    ]


def measure(config: ModelConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Build, swap, gate; then, only where both gates passed, memory and time of candidate and dense in turn."""
    device, cost = torch.device(config.device), config.cost
    map_buffers()
    say("build")
    dense = load(config, cell.tokens)
    index, layers = cell.asks["attention"], attention_paths(dense.model)
    spec = None if index is None else config.attentions[index]
    candidate = dense.twin()
    if spec is not None:
        attnzoo.replace_attention(candidate.model, spec.name, keep_original=False, **spec.swap)
        candidate = candidate.to(config.device, getattr(torch, cost.dtype))
    with torch.inference_mode():
        say("gate")
        gate, baseline_gate = _gates(candidate, dense, layers, spec, config.seed)
        traces = trace(candidate), trace(dense)
        result = Result(status="ok", gate=gate, baseline_gate=baseline_gate, backends=traces[0].backends)
        if refused := result.refused:
            return refused
        say("memory")
        peaks = peak_memory([candidate, dense], device)
        keep_buffers()
        say("time")
        how = cost.model_dump(include={"warmup", "repeats", "min_seconds"})
        times = interleave(candidate, dense, clock_for(device), **how)
        modules = [dense.model.get_submodule(path) for path in layers]
        share = share_of(device, modules, dense, cost.repeats)
        if not share:  # a library goes round its attention layers
            with without_fast_path():
                share = share_of(device, modules, dense, cost.repeats)
    batch = next((len(x) for x in dense.inputs if x.dim()), 1)
    models = candidate.model, dense.model
    measured = cost_of(models, layers, times, batch, traces, peaks, attention_share=share or None)
    return Result(**{**dict(result), "costs": {"forward": measured}})


def _gates(
    candidate: Call, dense: Call, layers: Sequence[str], spec: AttentionConfig | None, seed: int
) -> tuple[Gate, Gate]:
    """Compare the dense model with itself in float64, a core with the dense model, a mixer with its own oracles."""
    tolerance, own = gates.TOLERANCE[next(dense.model.parameters()).dtype], _outputs(dense, layers)

    def against_double(call: Call, got: dict[str, Tensor], noted: Sequence[str]) -> Gate:
        double = call.twin().to(call.inputs[0].device, torch.float64)
        return gates.compare(got, _outputs(double, noted), "itself in float64", tolerance)

    baseline_gate = against_double(dense, own, layers)
    if spec is None:
        return baseline_gate, baseline_gate
    if attnzoo.describe(spec.name).kind != "mixer":
        told = "the model's own attention, same weights and input"
        return gates.compare(_outputs(candidate, layers), own, told, tolerance), baseline_gate
    mixers = {f"{path}.mixer": layer.get_submodule("mixer") for path, layer in swapped_layers(candidate.model).items()}
    noted = [*layers, *mixers]
    got = _outputs(candidate, noted)
    found = [against_double(candidate, got, noted)]
    for width in sorted({got[path].shape[-1] for path in mixers}) if "tokens" not in spec.options else ():
        alike = {path: mixer for path, mixer in mixers.items() if got[path].shape[-1] == width}
        found.append(gates.mixer_gate(alike, width, 0, next(candidate.model.parameters()), seed))
    return next((gate for gate in found if not gate.passed), found[-1]), baseline_gate


def _outputs(call: Call, layers: Iterable[str]) -> dict[str, Tensor]:
    """Outputs of layers, and of the model as it is timed: hooks may change the path that it takes."""
    with gates.noted(call.model, layers) as found:
        call()
    given = [x for x in tensors(call()) if x.is_floating_point()]
    return found | {gates.OUTPUT: given[0]} | {f"output {number}": x for number, x in enumerate(given[1:], 2)}


TASK = Task(
    name="model",
    ref="attnzoo.tasks.model:TASK",
    config=ModelConfig,
    plan=plan,
    measure=measure,
    check=check,
    preload=lambda config: ("attnzoo.tasks.model", *({"timm", "transformers"} & sys.modules.keys())),  # `check` loads
)

"""The cost of a detector with its own attention and with others, beside one another in one process.

The weights are those that the config begins with: time and memory do not depend on what was learned. A config says what
to measure in a key of its own::

    cost = dict(sizes=[(800, 1333)], batch=1, repeats=10, attentions=[dict(label="softmax", name="softmax")])

`sizes` are heights and widths of images in pixels; `attentions`, beside those of the configs given, are what
`attnzoo.replace_attention` takes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from attnzoo.bench import gate as gates
from attnzoo.bench.config import Section, validated
from attnzoo.bench.cost import ratios_of, side_of
from attnzoo.bench.environment import environment
from attnzoo.bench.gate import gate_message
from attnzoo.bench.isolate import ChildResult, Isolation, is_out_of_memory
from attnzoo.bench.memory import keep_buffers, map_buffers
from attnzoo.bench.record import Cost, Entry, Gate, Shapes, Status
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.hosts.site import MixerLayer
from attnzoo.swap import replace_attention, swap_report, swapped_layers
from attnzoo.tasks.detect import mmcv_ext, stages
from attnzoo.tasks.records import Record

PRELOAD = ("attnzoo.tasks.detect.cost", "attnzoo.tasks.detect.model")  # the second imports mmdet
ORACLE = "softmax"
DENSE = "dense"
STATUS: dict[str, Status] = {"timeout": "timeout", "oom": "oom"}  # by the end of a process; any other is a failure
SECONDS_TO_COUNT = 300.0  # the tokens of a size that could not be measured


class CostConfig(Section):
    """What is measured: images of these heights and widths, so many at a time, timed in so many rounds."""

    sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(min_length=1)
    batch: PositiveInt = 1
    repeats: PositiveInt = 10
    warmup: PositiveInt = 2
    threads: PositiveInt | None = None
    timeout_seconds: PositiveFloat = 3600.0
    attentions: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Variant:
    """An attention by the name that tables give it; without `attention`, the detector's own."""

    label: str
    attention: Mapping[str, Any] | None = None

    @property
    def name(self) -> str | None:
        """Registered name."""
        return None if self.attention is None else self.attention["name"]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method and of the swap."""
        return {key: value for key, value in (self.attention or {}).items() if key != "name"}


def variant_of(config: Any) -> Variant:
    """The attention that a detection config names."""
    attention = config.model.get("attention")
    attention = None if attention is None else attention.to_dict() if hasattr(attention, "to_dict") else dict(attention)
    return Variant(config.get("label") or label_of(attention), attention)


def label_of(attention: Mapping[str, Any] | None) -> str:
    """What tables call an attention: its name and options, without where it stands."""
    if attention is None:
        return DENSE
    options = [f"{key}={value}" for key, value in attention.items() if key not in ("name", "where", "label")]
    return " ".join([attention["name"], *options])


def read(config: Any) -> CostConfig | None:
    """The config's `cost`, checked; None where it has none."""
    asked = config.get("cost")
    if asked is None:
        return None
    return validated(CostConfig, asked.to_dict(), [], "cost")


def variants(cost: CostConfig, named: Sequence[Variant]) -> list[Variant]:
    """All that is measured: the detector's own attention first, then those of configs and those that `cost` adds.

    Raises
    ------
    ConfigError
        If two different attentions have one label, or one has no name.
    """
    found: dict[str, Variant] = {}
    dense = next((variant for variant in named if variant.attention is None), Variant(DENSE))
    more = []
    for one in cost.attentions:
        attention = {key: value for key, value in one.items() if key != "label"}
        if "name" not in attention:
            raise ConfigError(f"cost.attentions: {one} has no name; give that of a registered attention")
        more.append(Variant(one.get("label") or label_of(attention), attention))
    for variant in [dense, *named, *more]:
        other = found.setdefault(variant.label, variant)
        if other.attention != variant.attention:
            raise ConfigError(f"two attentions are called {variant.label!r}; give one of them another label")
    return list(found.values())


def dense_detector(config: Any) -> nn.Module:
    """Build a config's detector with its own attention, and initialize it by the config's seed."""
    registry, scopes = mmcv_ext.load("mmdet.registry"), mmcv_ext.load("mmengine.registry")
    scopes.init_default_scope("mmdet")
    model = copy.deepcopy(config.model)
    model.pop("attention", None)
    if model.get("backbone") is not None:
        model.backbone.pop("init_cfg", None)  # weights from elsewhere do not change what a call costs
    mmcv_ext.load("mmengine.logging").MMLogger.get_instance("attnzoo", log_level="ERROR")  # or it tells every weight
    torch.manual_seed(config.randomness.seed)
    detector: Any = registry.MODELS.build(model)
    detector.init_weights()
    return detector.eval()


class Job(Entry):
    """What a child measures: a config as text, its `cost`, the variants and what all records share."""

    config: str
    cost: CostConfig
    variants: tuple[tuple[str, dict[str, Any] | None], ...]
    facts: dict[str, Any]


class Answer(Entry):
    """What it found, or why it could not begin, or the error of an allocation that failed."""

    records: tuple[Record, ...] = ()
    refused: str = ""
    out_of_memory: str = ""


def measure(
    config: Any,
    cost: CostConfig,
    found: Sequence[Variant],
    facts: Mapping[str, Any],
    say: Callable[[str], None],
    done: Callable[[float], None],
) -> list[Record]:
    """Measure all variants, those of one size side by side in a process; nothing is timed that fails its oracle.

    Parameters
    ----------
    config
        A detection config, whose detector is taken.
    cost, found
        What to measure; the first variant is the detector's own attention.
    facts
        Fields that all records share: `config_hash`, `benchmark`, `command`.
    say
        Told what is being done.
    done
        Told after each size what part of all pixels is done.

    Returns
    -------
    list
        A record per size and variant. Where the process of a size died, ran out of memory or took too long, the
        records of all its variants say so.

    Raises
    ------
    ConfigError
        If a swap cannot be made, or two sizes have as many tokens.
    """
    isolation = Isolation(PRELOAD, cuda=torch.cuda.is_available())
    records: list[Record] = []
    pixels, whole = 0, sum(height * width for height, width in cost.sizes)
    for size in cost.sizes:
        job = Job(
            config=config.pretty_text,
            cost=cost.model_copy(update={"sizes": (size,)}),
            variants=tuple((v.label, None if v.attention is None else dict(v.attention)) for v in found),
            facts=dict(facts),
        )
        start = time.monotonic()
        pixels += size[0] * size[1]
        result = isolation.run(main, job.model_dump_json(), cost.timeout_seconds, say)
        done(pixels / whole)
        answer = Answer.model_validate_json(result.answer) if result.end == "done" else Answer()
        if answer.refused:
            raise ConfigError(answer.refused)
        measured = answer.records or _unmeasured(config, job, found, _status(result, answer), isolation)
        if measured[0].tokens and measured[0].tokens in {record.tokens for record in records}:
            raise ConfigError(f"cost.sizes: {size} gives as many tokens as another size; leave one of them out")
        seconds = round((time.monotonic() - start) / len(measured), 3)
        records += [record.model_copy(update={"seconds": seconds}) for record in measured]
    return records


def _status(result: ChildResult, answer: Answer) -> tuple[Status, str]:
    """How a size ended that gave no records, and why."""
    if answer.out_of_memory:
        return "oom", answer.out_of_memory
    return STATUS.get(result.end, "failed"), result.message


def _unmeasured(
    config: Any, job: Job, found: Sequence[Variant], ended: tuple[Status, str], isolation: Isolation
) -> tuple[Record, ...]:
    """Records of a size that could not be measured; the token count is 0 where that cannot be told either."""
    (height, width), (status, message) = job.cost.sizes[0], ended
    counted = isolation.run(count_tokens, job.model_dump_json(), SECONDS_TO_COUNT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = f"{height} x {width} pixels"
    return tuple(
        Record(
            **job.facts,
            part="detection",
            kind="cost",
            label=variant.label,
            attention=variant.name,
            options=variant.options,
            is_baseline=variant.attention is None,
            status=status,
            message=f"{size}: {message}",
            utc=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=0.0,
            environment=environment(device, job.cost.threads),
            host=f"{host_name(config)}, {size}",
            dtype="float32",
            tokens=int(counted.answer or 0),
            shapes=None,
            gate=None,
            baseline_gate=None,
            backends=(),
            cost=None,
            quality=None,
            quality_note="",
        )
        for variant in found
    )


def count_tokens(job: str, say: Callable[[str], None]) -> str:
    """Count the encoder's tokens at the size of a `Job`, on the meta device: nothing is computed or allocated."""
    asked = Job.model_validate_json(job)
    dense = dense_detector(_config_of(asked)).to("meta")
    height, width = asked.cost.sizes[0]
    with torch.inference_mode():
        return str(_shapes(dense, 1, _caller(torch.empty(1, 3, height, width, device="meta"))).tokens)


def main(job: str, say: Callable[[str], None]) -> str:
    """Do a `Job` and give an `Answer`, both as JSON."""
    asked = Job.model_validate_json(job)
    config = _config_of(asked)
    if asked.cost.threads is not None:
        torch.set_num_threads(asked.cost.threads)
    map_buffers()
    try:
        found = [Variant(*one) for one in asked.variants]
        records = _measure(config, asked.cost, found, asked.facts, say)
    except ConfigError as error:
        return Answer(refused=str(error)).model_dump_json()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Answer(out_of_memory=str(error) or type(error).__name__).model_dump_json()
    return Answer(records=tuple(records)).model_dump_json()


def _config_of(job: Job) -> Any:
    mmcv_ext.ensure()
    return mmcv_ext.load("mmengine.config").Config.fromstring(job.config, ".py")


@dataclass
class _Measured:
    """One variant at one size, on its way to a record."""

    variant: Variant
    detector: nn.Module
    paths: list[str]
    gate: Gate | None = None
    needed: dict[str, Any] = field(default_factory=dict)


def _measure(
    config: Any, cost: CostConfig, found: Sequence[Variant], facts: Mapping[str, Any], say: Callable[[str], None]
) -> list[Record]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = dense_detector(config).to(device)
    detectors = []
    for variant in found:
        try:
            detectors.append(swapped(dense, variant, config.randomness.seed))
        except AttnZooError as error:
            raise ConfigError(f"{variant.label}: {error}") from error
    again = copy.deepcopy(dense)  # dense against a second copy of itself: what is not a difference
    measured = [_Measured(v, d, _encoder_paths(d)) for v, d in zip(found, [again, *detectors[1:]], strict=True)]
    records = []
    with torch.inference_mode():
        for height, width in cost.sizes:
            images = torch.randn(cost.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
            run = _caller(images.to(device))
            size = f"{height} x {width} pixels"
            shapes = _shapes(dense, cost.batch, run)
            costs = _at_size(measured, dense, run, cost, config.randomness.seed, partial(_tell, say, size))
            records += [
                _record(one, costs.get(one.variant.label), shapes, config, size, facts, measured[0].gate)
                for one in measured
            ]
    return records


def _tell(say: Callable[[str], None], size: str, stage: str) -> None:
    say(f"{size}: {stage}")


def _at_size(
    measured: Sequence[_Measured],
    dense: nn.Module,
    run: Callable[[nn.Module], Any],
    cost: CostConfig,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Cost]:
    """Gate all variants, then measure memory and time of those that pass, by label; none where the dense one fails."""
    map_buffers()
    say("gates")
    oracle = swapped(dense, Variant(ORACLE, {"name": ORACLE}), 0)
    for one in measured:
        one.gate, one.needed = _gate(one, oracle, run, seed), {}
    passed = [one for one in measured if one.gate is not None and one.gate.passed]
    baseline = next((one for one in passed if one.variant.attention is None), None)
    if baseline is None:
        return {}
    say("memory")
    calls = [_stages_of(one, run) for one in passed]
    for one, needed in zip(passed, stages.needs(calls, next(dense.parameters()).device), strict=True):
        one.needed = needed
    del calls
    keep_buffers()
    say("time")
    clocks = [_clock(dense, baseline.paths, run), *(_clock(one.detector, one.paths, run) for one in passed)]
    base, *times = stages.in_turn(clocks, warmup=cost.warmup, repeats=cost.repeats)
    return {
        one.variant.label: _cost(one, timed, baseline, base, cost.batch)
        for one, timed in zip(passed, times, strict=True)
    }


def _stages_of(one: _Measured, run: Callable[[nn.Module], Any]) -> dict[str, Callable[[], object]]:
    modules = {**stages.modules_of(one.detector, one.paths), stages.WHOLE: [one.detector]}
    return stages.calls_of(modules, lambda: run(one.detector))


def swapped(dense: nn.Module, variant: Variant, seed: int) -> nn.Module:
    """A copy of the dense detector with a variant's attention; a core has the dense weights, a mixer has its own."""
    detector = copy.deepcopy(dense)
    if variant.attention is None:
        return detector
    torch.manual_seed(seed)
    return replace_attention(detector, **{"keep_original": False, **variant.attention})


def _encoder_paths(detector: nn.Module) -> list[str]:
    """Paths of the encoder's attention, as a swap finds them."""
    return [layer.path for layer in swap_report(detector).layers if layer.path.startswith("encoder.")]


def _caller(images: Tensor) -> Callable[[nn.Module], Any]:
    """A call of any detector on the same images ``(B, 3, H, W)``, without padding."""
    structures = mmcv_ext.load("mmdet.structures")
    samples = [structures.DetDataSample() for _ in images]
    size = tuple(images.shape[-2:])
    for sample in samples:
        sample.set_metainfo({"img_shape": size, "batch_input_shape": size, "ori_shape": size, "scale_factor": (1, 1)})
    return lambda detector: detector(images, samples, mode="tensor")


def _clock(
    detector: nn.Module, paths: Sequence[str], run: Callable[[nn.Module], Any]
) -> Callable[[], dict[str, float]]:
    modules = stages.modules_of(detector, paths)
    return lambda: stages.clock(detector, modules, lambda: run(detector))


def _gate(one: _Measured, oracle: nn.Module, run: Callable[[nn.Module], Any], seed: int) -> Gate:
    """Hold cores, and the detector's own attention, to written-out softmax, and mixers to their equation."""
    mixers = {p: m.mixer for p, m in swapped_layers(one.detector).items() if isinstance(m, MixerLayer)}
    watched = ["encoder", *one.paths]
    with gates.noted(one.detector, watched) as got:
        run(one.detector)
    output = next(iter(one.detector.parameters()))
    if mixers:
        like = torch.empty(0, device=output.device, dtype=output.dtype)
        dim = _attention_of(one.detector, one.paths[0])[0]
        return gates.finite(gates.mixer_gate(mixers, dim, 0, like, seed), got["encoder"])
    with gates.noted(oracle, watched) as expected:
        run(oracle)
    return gates.compare(got, expected, "written-out softmax", gates.TOLERANCE[output.dtype])


def _attention_of(detector: Any, path: str) -> tuple[int, int]:
    """Width and heads of an attention of the encoder."""
    wrapper = detector.get_submodule(path.rpartition(".")[0])
    return wrapper.embed_dims, wrapper.num_heads


def _shapes(dense: nn.Module, batch: int, run: Callable[[nn.Module], Any]) -> Shapes:
    paths = _encoder_paths(dense)
    with gates.noted(dense, ["encoder"]) as seen:
        run(dense)
    dim, heads = _attention_of(dense, paths[0])
    return Shapes(batch=batch, tokens=seen["encoder"].shape[1], prefix=0, dim=dim, heads=heads, depth=len(paths))


def _cost(one: _Measured, timed: stages.Timed, baseline: _Measured, base: stages.Timed, batch: int) -> Cost:
    """Set a variant against the dense baseline, whole and stage by stage."""
    side, dense = _side(one, timed, base, batch), _side(baseline, base, base, batch)
    uncounted = {op for traced, _ in one.needed.values() for op in traced.uncounted}
    return Cost(
        candidate=side,
        baseline=dense,
        ratios=ratios_of(side, dense, timed.speedup(base, stages.WHOLE)),
        uncounted_ops=tuple(sorted(uncounted)),
    )


def _side(one: _Measured, timed: stages.Timed, base: stages.Timed, batch: int) -> Any:
    traced, peak = one.needed[stages.WHOLE]
    side = side_of(one.detector, one.paths, timed.latency(stages.WHOLE), batch, traced, peak)
    told = stages.stages_of(stages.modules_of(one.detector, one.paths), timed, base, one.needed)
    return side.model_copy(update={"stages": told})


def _record(
    one: _Measured,
    cost: Cost | None,
    shapes: Shapes,
    config: Any,
    size: str,
    facts: Mapping[str, Any],
    baseline_gate: Gate | None,
) -> Record:
    device = next(one.detector.parameters()).device
    problem = "" if one.gate is None or one.gate.passed else gate_message("gate", one.gate)
    if cost is None and not problem:
        problem = "the dense detector did not pass its gate"
    return Record(
        **facts,
        part="detection",
        kind="cost",
        label=one.variant.label,
        attention=one.variant.name,
        options=one.variant.options,
        is_baseline=one.variant.attention is None,
        status="failed" if problem else "ok",
        message=problem,
        utc=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        environment=environment(str(device), torch.get_num_threads()),
        host=f"{host_name(config)}, {size}",
        dtype="float32",
        tokens=shapes.tokens,
        shapes=shapes,
        gate=one.gate,
        baseline_gate=baseline_gate,
        backends=one.needed["encoder"][0].backends if one.needed else (),
        cost=cost,
        quality=None,
        quality_note="",
    )


def host_name(config: Any) -> str:
    """What tables call a config's detector."""
    backbone = config.model.get("backbone") or {}
    depth = f"-{backbone['depth']}" if "depth" in backbone else ""
    return f"mmdet:{config.model.type.removeprefix('Swapped')} with {backbone.get('type', 'a backbone')}{depth}"

"""The cost of a detector with another attention, beside the same detector with its own, in one process.

The weights are those that the config begins with: time and memory do not depend on what was learned. A config says what
to measure in a key of its own::

    cost = dict(sizes=[(800, 1333)], batch=1, repeats=10, attentions=[dict(label="softmax", name="softmax")])

`sizes` are heights and widths of images in pixels; `attentions`, beside those of the configs given, are what
`attnzoo.replace_attention` takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from attnzoo.bench import gate as gates
from attnzoo.bench.config import Section, validated
from attnzoo.bench.cost import ratios_of, side_of
from attnzoo.bench.measure import quantiles
from attnzoo.bench.memory import keep_buffers, map_buffers
from attnzoo.bench.record import Cost, Gate, Shapes
from attnzoo.bench.task import OnProgress, Result
from attnzoo.errors import ConfigError
from attnzoo.hosts.site import MixerLayer
from attnzoo.swap import replace_attention, swap_report, swapped_layers
from attnzoo.tasks.detect import mmcv_ext, stages

PRELOAD = ("attnzoo.tasks.detect.cost", "attnzoo.tasks.detect.model")  # the second imports mmdet
ORACLE = "softmax"
DENSE = "dense"
Call = Callable[[nn.Module], Any]


class CostConfig(Section):
    """What is measured: images of these heights and widths, so many at a time, timed in so many rounds."""

    sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(min_length=1)
    batch: PositiveInt = 1
    repeats: PositiveInt = 10
    warmup: PositiveInt = 2
    threads: PositiveInt | None = None
    timeout_seconds: PositiveFloat = 3600.0
    attentions: tuple[dict[str, Any], ...] = ()


class Variant(NamedTuple):
    """An attention by the name that tables give it; without `attention`, the detector's own."""

    label: str
    attention: Mapping[str, Any] | None = None


def variant_of(config: Any) -> Variant:
    """The attention that a detection config names."""
    attention = config.model.get("attention")
    return _variant(None if attention is None else dict(attention), config.get("label"))


def _variant(attention: Mapping[str, Any] | None, label: str | None) -> Variant:
    """By default it is called by its name and options, without where it stands."""
    if attention is None:
        return Variant(label or DENSE)
    options = [f"{key}={value}" for key, value in attention.items() if key not in ("name", "where", "label")]
    return Variant(label or " ".join([attention["name"], *options]), attention)


def read(config: Any) -> CostConfig | None:
    """The config's `cost`, checked; None where it has none."""
    asked = config.get("cost")
    return None if asked is None else validated(CostConfig, asked.to_dict(), [], "cost")


def variants(cost: CostConfig, named: Sequence[Variant]) -> list[Variant]:
    """All that is measured: the detector's own attention first, then those of configs and those that `cost` adds.

    Raises `ConfigError` if two different attentions have one label.
    """
    added = [
        _variant({key: value for key, value in one.items() if key != "label"}, one.get("label"))
        for one in cost.attentions
    ]
    dense = next((variant for variant in named if variant.attention is None), Variant(DENSE))
    found: dict[str, Variant] = {}
    for variant in [dense, *named, *added]:
        if found.setdefault(variant.label, variant).attention != variant.attention:
            raise ConfigError(f"two attentions are called {variant.label!r}; give one of them another label")
    return list(found.values())


def host_name(config: Any) -> str:
    """What tables call a config's detector."""
    backbone = config.model.get("backbone") or {}
    depth = f"-{backbone['depth']}" if "depth" in backbone else ""
    return f"mmdet:{config.model.type.removeprefix('Swapped')} with {backbone.get('type', 'a backbone')}{depth}"


def dense_model(config: Any) -> Any:
    """The config's `model` with its own attention, and without weights from elsewhere: they change no call's cost."""
    model = copy.deepcopy(config.model)
    model.pop("attention", None)
    if model.get("backbone") is not None:
        model.backbone.pop("init_cfg", None)
    return model


def dense_detector(config: Any, initialized: bool = True) -> nn.Module:
    """Build a config's detector with its own attention, by default initialized by the config's seed."""
    registry, scopes = mmcv_ext.load("mmdet.registry"), mmcv_ext.load("mmengine.registry")
    scopes.init_default_scope("mmdet")
    mmcv_ext.load("mmengine.logging").MMLogger.get_instance("attnzoo", log_level="ERROR")  # or it tells every weight
    torch.manual_seed(config.randomness.seed)
    detector: Any = registry.MODELS.build(dense_model(config))
    if initialized:
        detector.init_weights()
    return detector.eval()


def swapped(dense: nn.Module, variant: Variant, seed: int) -> nn.Module:
    """A copy of the dense detector with a variant's attention; a core has the dense weights, a mixer has its own."""
    detector = copy.deepcopy(dense)
    if variant.attention is None:
        return detector
    torch.manual_seed(seed)
    return replace_attention(detector, **{"keep_original": False, **variant.attention})


def count_tokens(dense: nn.Module, size: tuple[int, int]) -> int:
    """The encoder's tokens at a size of image; `dense` is on the meta device, where nothing is computed or allocated.

    They are 0 where the detector takes no image of this size: the measurement will say why.
    """
    try:
        with torch.inference_mode():
            return _shapes(dense, 1, _caller(torch.empty(1, 3, *size, device="meta"))).tokens
    except Exception:
        return 0


def measure(
    config: Any, cost: CostConfig, variant: Variant, size: tuple[int, int], device: str, say: OnProgress
) -> Result:
    """Measure a variant beside the config's own detector at a size; nothing is timed that does not match its oracle."""
    map_buffers()
    say("build")
    seed, place = config.randomness.seed, torch.device(device)
    dense = dense_detector(config).to(place)
    candidate = swapped(dense, variant, seed)
    images = torch.randn(cost.batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(place)
    run = _caller(images)
    with torch.inference_mode():
        say("gate")
        shapes = _shapes(dense, cost.batch, run)
        gate, baseline_gate = _gates(candidate, dense, run, seed)
        result = Result(status="ok", shapes=shapes, gate=gate, baseline_gate=baseline_gate)
        if refused := result.refused:
            return refused
        pair = candidate, dense
        parts = [stages.modules_of(one, encoder_paths(one)) for one in pair]
        calls: list[stages.Run] = [partial(run, one) for one in pair]
        say("memory")
        whole = [{**own, stages.WHOLE: [one]} for one, own in zip(pair, parts, strict=True)]
        needs = stages.needs(list(map(stages.calls_of, whole, calls)), place)
        keep_buffers()
        say("time")
        rounds = {"warmup": cost.warmup, "repeats": cost.repeats}
        seconds = stages.in_turn(dict(zip(calls, parts, strict=True)), place, **rounds)
    sides = []
    for one, own, needed, times in zip(pair, parts, needs, seconds, strict=True):
        latency = quantiles(times[stages.WHOLE], 1e3)
        side = side_of(one, encoder_paths(one), latency, cost.batch, *needed[stages.WHOLE])
        sides.append(side.model_copy(update={"stages": stages.stages_of(own, times, seconds[1], needed)}))
    ratios = ratios_of(sides[0], sides[1], stages.speedup(seconds[0], seconds[1], stages.WHOLE))
    uncounted = {op for needed in needs for traced, _ in needed.values() for op in traced.uncounted}
    measured = Cost(candidate=sides[0], baseline=sides[1], ratios=ratios, uncounted_ops=tuple(sorted(uncounted)))
    backends = needs[0][stages.ENCODER][0].backends
    return Result(**{**dict(result), "costs": {"forward": measured}, "backends": backends})


def encoder_paths(detector: nn.Module) -> list[str]:
    """Paths of the encoder's attention, as a swap finds them."""
    return [layer.path for layer in swap_report(detector).layers if layer.path.startswith("encoder.")]


def _caller(images: Tensor) -> Call:
    """A call of any detector on the same images ``(B, 3, H, W)``, without padding."""
    structures = mmcv_ext.load("mmdet.structures")
    samples = [structures.DetDataSample() for _ in images]
    size = tuple(images.shape[-2:])
    for sample in samples:
        sample.set_metainfo({"img_shape": size, "batch_input_shape": size, "ori_shape": size, "scale_factor": (1, 1)})
    return lambda detector: detector(images, samples, mode="tensor")


def _gates(candidate: nn.Module, dense: nn.Module, run: Call, seed: int) -> tuple[Gate, Gate]:
    """Hold cores, and the detector's own attention, to written-out softmax, and mixers to their equation."""
    like = next(dense.parameters())
    paths = encoder_paths(dense)
    oracle = _seen(swapped(dense, Variant(ORACLE, {"name": ORACLE}), 0), paths, run)

    def held(detector: nn.Module) -> Gate:
        got = _seen(detector, paths, run)
        mixers = {path: m.mixer for path, m in swapped_layers(detector).items() if isinstance(m, MixerLayer)}
        if not mixers:
            return gates.compare(got, oracle, "written-out softmax", gates.TOLERANCE[like.dtype])
        empty = torch.empty(0, device=like.device, dtype=like.dtype)
        return gates.finite(gates.mixer_gate(mixers, _attention_of(dense, paths[0])[0], 0, empty, seed), got["encoder"])

    return held(candidate), held(dense)


def _seen(detector: nn.Module, paths: Sequence[str], run: Call) -> dict[str, Tensor]:
    """Outputs of the encoder and of its attention layers."""
    with gates.noted(detector, ["encoder", *paths]) as found:
        run(detector)
    return found


def _attention_of(detector: Any, path: str) -> tuple[int, int]:
    """Width and heads of an attention of the encoder."""
    wrapper = detector.get_submodule(path.rpartition(".")[0])
    return wrapper.embed_dims, wrapper.num_heads


def _shapes(dense: nn.Module, batch: int, run: Call) -> Shapes:
    paths = encoder_paths(dense)
    dim, heads = _attention_of(dense, paths[0])
    tokens = _seen(dense, [], run)["encoder"].shape[1]
    return Shapes(batch=batch, tokens=tokens, prefix=0, dim=dim, heads=heads, depth=len(paths))

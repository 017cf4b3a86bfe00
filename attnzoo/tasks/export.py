"""The task export: image models in ONNX Runtime, in float32 and quantized to int8, attention beside mixers.

A model is exported by ``torch.export``, and quantized by ONNX Runtime's own static quantization: QDQ nodes round every
operator, ranges from calibration images. Time and file size are beside those of the dense model in float32, in ONNX
Runtime too; the quality of a row is how far its outputs are from those of the same model in float32.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from attnzoo.bench import gate as gates
from attnzoo.bench.attentions import AttentionConfig, attention_problems, refuse_expect, refuse_vision_keys, row_of
from attnzoo.bench.config import RunConfig, refuse_twins
from attnzoo.bench.highlights import SPEED, Highlight, highlight, speed
from attnzoo.bench.measure import interleave, quantiles, wall_clock
from attnzoo.bench.record import Count, Entry, Envelope, NonNegative, Quantiles, Share
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.bench.words import milliseconds, times
from attnzoo.checks import not_square
from attnzoo.errors import ConfigError
from attnzoo.extras import require
from attnzoo.tables import Column, Table
from attnzoo.tasks.classify.build import build_host, check_model_name, swapped
from attnzoo.tasks.classify.cost_config import HostConfig, vision_problems
from attnzoo.units import megabytes

Precision = Literal["float32", "int8", "int8 per tensor"]
TOLERANCE = 1e-4  # of float32 in ONNX Runtime against PyTorch, as a part of the largest output
OPSET = 18


class ExportConfig(RunConfig):
    """Every attention in every precision at every number of tokens.

    ``int8`` has a scale for each channel of a weight, ``int8 per tensor`` one for each weight; activations have one per
    tensor, found on `calibration_images` random images.
    """

    task: Literal["export"] = "export"
    device: Literal["cpu"] = "cpu"
    threads: PositiveInt = 1
    model: HostConfig = HostConfig()
    baseline: Annotated[str, Field(min_length=1, description="the dense model's label")] = "dense"
    attentions: tuple[AttentionConfig, ...] = ()
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("float32", "int8", "int8 per tensor")
    tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (196, 784, 3136)
    calibration_images: PositiveInt = 8
    repeats: Annotated[int, Field(ge=3)] = 7
    min_seconds: NonNegativeFloat = 2.0
    timeout_seconds: PositiveFloat = 1200.0

    @model_validator(mode="after")
    def _rows_differ(self) -> ExportConfig:
        if odd := [n for n in self.tokens if math.isqrt(n) ** 2 != n]:
            raise ValueError(f"tokens: {not_square(odd[0])}, as images given by their tokens are")
        refuse_expect(self.attentions)
        refuse_vision_keys(self.attentions)
        refuse_twins([self.baseline, *(attention.label for attention in self.attentions)])
        return self

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions."""
        return attention_problems(data.get("attentions"), "attentions", vision_problems)


class ExportCost(Entry):
    """What a row costs in ONNX Runtime beside the dense model in float32.

    `error` is the Euclidean distance of the outputs from those of the same model in float32, as a part of their norm;
    `agreement` the share of images with the same first answer. Both are over `images` images that did not calibrate.
    """

    latency_ms: Quantiles
    baseline_ms: Quantiles
    speedup: Quantiles
    file_bytes: Count
    baseline_file_bytes: Count
    error: NonNegative
    agreement: Share
    images: Count


class ExportRecord(Envelope):
    """A model in a precision."""

    cost: ExportCost | None
    quality: None


def plan(config: ExportConfig) -> list[Cell]:
    """A cell per attention, precision and number of tokens; the dense model in float32 comes first at each."""
    how = config.model_dump(mode="json", include={"model", "calibration_images", "repeats", "min_seconds", "seed"})
    cells = []
    for tokens in config.tokens:
        for index, attention in enumerate((None, *config.attentions)):
            for precision in config.precisions:
                row = row_of(attention, config.baseline, "vision")
                dense = attention is None and precision == "float32"
                label = f"{row['label']} {precision}"
                about = {"attention": row["attention"], "options": row["options"], "precision": precision}
                cells.append(
                    Cell(
                        **{**row, "label": label, "is_baseline": dense},
                        kind="cost",
                        host=f"{config.model.library}:{config.model.name}",
                        dtype=precision,
                        tokens=tokens,
                        depends_on={**how, **about, "tokens": tokens, "threads": config.threads},
                        asks={"attention": index, "precision": precision},
                        stage="export",
                        threads=config.threads,
                        timeout=config.timeout_seconds,
                        weight=5 + tokens / 200,
                    )
                )
    return cells


def check(config: ExportConfig) -> None:
    """Check that the model and what runs it are there; raises `ConfigError` or `MissingExtraError`."""
    require("timm")
    require("onnx", "onnxscript", "onnxruntime", extra="dev")
    try:
        check_model_name(config.model.name)
    except ConfigError as error:
        raise ConfigError(f"model.name: {error}") from error


def measure(config: ExportConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Export, compare with PyTorch, quantize where asked, and time beside the dense model."""
    spec = (None, *config.attentions)[cell.asks["attention"]]
    side = math.isqrt(cell.tokens) * config.model.patch_size
    shape = config.model.channels, side, side
    seen, others = (_images(config.calibration_images, shape, config.seed + at) for at in range(2))
    with tempfile.TemporaryDirectory() as folder:
        say("export")
        model = build_host(config.model, side, config.seed, True, {}).eval()
        dense = export(model, shape, Path(folder) / "dense.onnx")
        own = dense
        if spec is not None:
            own = export(swapped(model, spec, config.seed).eval(), shape, Path(folder) / "own.onnx")
        base, exact = Session(dense, config.threads), Session(own, config.threads)
        with torch.no_grad():
            oracle = {gates.OUTPUT: torch.cat([model(x) for x in others])}
        wanted = torch.cat([exact(x) for x in others])
        gate = gates.compare({gates.OUTPUT: wanted}, oracle, "PyTorch, same weights and images", TOLERANCE)
        if failed := (result := Result(status="ok", gate=gate)).refused:
            return failed
        timed = exact
        if cell.asks["precision"] != "float32":
            say("quantize")
            per_channel = cell.asks["precision"] == "int8"
            own = quantize(own, Path(folder) / "int8.onnx", seen, per_channel)
            timed = Session(own, config.threads)
        say("time")
        found = torch.cat([timed(x) for x in others])
        seconds = interleave(
            lambda: timed(others[0]),
            lambda: base(others[0]),
            wall_clock,
            warmup=2,
            repeats=config.repeats,
            min_seconds=config.min_seconds,
        )
        cost = ExportCost(
            latency_ms=quantiles(seconds.a, 1e3),
            baseline_ms=quantiles(seconds.b, 1e3),
            speedup=quantiles(seconds.ratios),
            file_bytes=own.stat().st_size,
            baseline_file_bytes=dense.stat().st_size,
            error=float((found - wanted).norm() / wanted.norm()),
            agreement=float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
            images=len(others),
        )
    return result.model_copy(update={"costs": {"forward": cost}})


def _images(count: int, shape: tuple[int, int, int], seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *shape, generator=draw) for _ in range(count)]


def export(model: nn.Module, shape: tuple[int, ...], path: Path, batch: int = 1) -> Path:
    """Write a model of images ``(batch, C, H, W)`` as ONNX, its weights inside the file."""
    example = (torch.zeros(batch, *shape),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, example)
        torch.onnx.export(program, example, path, dynamo=True, verbose=False, external_data=False, opset_version=OPSET)
    return path


def quantize(path: Path, target: Path, images: Sequence[Tensor], per_channel: bool) -> Path:
    """Quantize an ONNX file to int8, weights and activations, in QDQ form."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    name = Session(prepared, 1).name
    inputs = iter([{name: image.numpy()} for image in images])
    quantization.quantize_static(
        str(prepared),
        str(target),
        SimpleNamespace(get_next=lambda: next(inputs, None)),  # what a CalibrationDataReader is asked
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return target


class Session:
    """An ONNX file, run on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # two sessions are timed in turn, and waiting threads of one must not take the other's time
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._run = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.name: str = self._run.get_inputs()[0].name

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return torch.from_numpy(self._run.run(None, {self.name: x.numpy()})[0])


def columns(records: Sequence[ExportRecord]) -> Table:
    """A row per model, precision and number of tokens."""
    heads = "tokens", "ms", "speed-up", "file", "error", "same answer"
    table = Table((Column("model", code=True), *heads, Column("status", left=True)))
    for record in records:
        cost = record.cost
        if cost is None:
            table.add(record.label, f"{record.tokens:,}", *["-"] * 5, f"{record.status}: {record.message}")
            continue
        table.add(
            record.label,
            f"{record.tokens:,}",
            milliseconds(cost.latency_ms),
            times(cost.speedup),
            f"{megabytes(cost.file_bytes)} ({cost.file_bytes / cost.baseline_file_bytes:.2f}x)",
            f"{cost.error:.1%}",
            f"{cost.agreement:.0%}",
            "",
            base=record.is_baseline,
        )
    return table.without_empty_columns()


HOW_TO_READ = (
    "All in ONNX Runtime on the CPU. A speed-up is the dense model's time in float32 over the row's, pair by pair. The "
    "error is the distance of the outputs from the same model's in float32, as a part of their norm. Weights are "
    "random: the same answer says how far int8 moves outputs that are nearly equal, not what a trained model loses."
)


def highlights(records: Sequence[ExportRecord]) -> list[Highlight]:
    """What the results page shows: speed-ups in ONNX Runtime."""
    found = []
    for record in (record for record in records if record.attention):
        figures = {} if record.cost is None else {SPEED: speed(record.cost.speedup)}
        other = {"host": record.host, "typical": record.dtype == "int8"}
        found.append(highlight(record, "export", f"ONNX Runtime, {record.dtype}", figures, **other))
    return found


TASK = Task(
    name="export",
    ref="attnzoo.tasks.export:TASK",
    config=ExportConfig,
    plan=plan,
    measure=measure,
    check=check,
    record=ExportRecord,
    preload=lambda config: ("attnzoo.tasks.export", "timm"),
    columns=columns,
    how_to_read=HOW_TO_READ,
    highlights=highlights,
)

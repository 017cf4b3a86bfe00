"""Evaluation of trained detectors, several configs side by side: quality, cost by stage, and a page of drawn boxes.

The first config whose detector keeps its own attention is the dense baseline of quality. Cost is measured for the
first config's detector, with its own attention and with that of every config.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from attnzoo import assets, files
from attnzoo.bench.environment import environment
from attnzoo.bench.record import RecordStore
from attnzoo.errors import ConfigError
from attnzoo.tasks.detect import cost as costs
from attnzoo.tasks.detect import score
from attnzoo.tasks.detect.config import prepare
from attnzoo.tasks.detect.quality import Detecting, Detection
from attnzoo.tasks.detect.run import FITTED, changes, is_main
from attnzoo.tasks.records import Record

FOLDER = "eval"
RUN = "scores.json"


@dataclass(frozen=True)
class Run:
    """A config of one attention and one seed, and what its detector scored."""

    config: Any
    variant: costs.Variant
    scores: score.Scores

    @property
    def seed(self) -> int:
        """Of the training."""
        return int(self.config.randomness.seed)


def seeds_of(config: Any) -> list[Any]:
    """The config once for each seed that was trained beside its own: ``.../seed0``, ``.../seed1``."""
    folder = Path(config.work_dir)
    own = f"seed{config.randomness.seed}"
    if folder.name != own:
        return [config]
    found = []
    for other in sorted(folder.parent.glob("seed*")):
        if other.name[4:].isdigit() and (other / "last_checkpoint").is_file():
            one = copy.deepcopy(config)
            one.work_dir, one.randomness.seed = str(other), int(other.name[4:])
            found.append(one)
    return found or [config]


def score_run(config: Any, say: Callable[[str], None]) -> Run:
    """Test a trained run; what was tested before, with the same weights and data, is kept."""
    changed = changes(config, FITTED)
    if changed:
        raise ConfigError(
            f"{config.work_dir} was trained by another config ({'; '.join(changed[:5])}); train this one first"
        )
    weights = assets.sha256_of(score.finished(config))
    folder = Path(config.work_dir) / FOLDER
    known = {"weights": weights, "data": _data_of(config)}
    kept = folder / RUN
    earlier = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if {key: earlier.get(key) for key in known} == known:
        if is_main():
            say(f"{config.work_dir} was tested before; its scores are kept")
    else:
        files.check_folder(config.work_dir, "work_dir", FOLDER)
        say(f"test {config.work_dir}")
        true, predicted, images = score.predict(config, folder)
        if not is_main():
            return Run(config, costs.variant_of(config), _no_scores())
        earlier = {**known, "scores": asdict(score.scores(true, predicted, images, classes_of(config)))}
        files.write_json(kept, earlier)
    found = dict(earlier["scores"])
    found["judged"] = tuple(
        score.Judged(one["path"], tuple(map(tuple, one["true"])), tuple(map(tuple, one["predicted"])), one["f1"])
        for one in found["judged"]
    )
    return Run(config, costs.variant_of(config), score.Scores(**found))


def _data_of(config: Any) -> dict[str, str]:
    """What stands for the test images: how they are read and scored, and their annotations."""
    dataset = config.test_dataloader.dataset
    annotations = Path(dataset.get("data_root") or ".") / dataset.get("ann_file", "")
    how = {key: repr(config.model.get(key)) for key in ("test_cfg", "data_preprocessor")}
    how["annotations"] = assets.sha256_of(annotations) if annotations.is_file() else ""
    return {**how, "dataset": repr(dataset), "metric": repr(config.test_evaluator)}


def _no_scores() -> score.Scores:
    return score.Scores(0, 0, 0, None, None, None, 0, 0, 0, ())


def qualities(runs: Sequence[Run]) -> dict[str, Detection]:
    """Quality by label, all seeds of an attention together, with its ratio to the dense baseline's."""
    found: dict[str, Detection] = {}
    for label in dict.fromkeys(run.variant.label for run in runs):
        own = [run for run in runs if run.variant.label == label]
        scored = [run.scores for run in own]
        found[label] = Detection.model_validate(
            {
                **{name: _mean([getattr(one, name) for one in scored]) for name in score.STATS},
                "images": scored[0].images,
                "boxes": scored[0].boxes,
                "ratio": None,
                "trainings": [_detecting(run) for run in own],
                "note": _note(own),
            }
        )
    dense = next((run.variant.label for run in runs if run.variant.attention is None), None)
    base = None if dense is None else found[dense]
    done: dict[str, Detection] = {}
    for label, one in found.items():
        if base is None:
            done[label] = one
        else:
            done[label] = one.model_copy(update={"ratio": 1.0}) if label == dense else one.against(base)
    return done


def _detecting(run: Run) -> Detecting:
    epochs, ap, ap50 = score.curve(Path(run.config.work_dir))
    scored = {name: getattr(run.scores, name) for name in score.STATS}
    return Detecting(seed=run.seed, **scored, epochs=epochs, epoch_ap=ap, epoch_ap50=ap50)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _note(runs: Sequence[Run]) -> str:
    data = runs[0].config.test_dataloader.dataset
    epochs = runs[0].config.train_cfg.get("max_epochs")
    seeds = ", ".join(str(run.seed) for run in runs)
    return (
        f"COCO's metric by pycocotools on {runs[0].scores.images} images of {data['ann_file']}, {epochs} epochs, "
        f"seeds {seeds}; no interval"
    )


def quality_records(runs: Sequence[Run], found: Mapping[str, Detection], facts: Mapping[str, Any]) -> list[Record]:
    """A record of quality for each attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records = []
    for label, quality in found.items():
        run = next(run for run in runs if run.variant.label == label)
        records.append(
            Record(
                **facts,
                part="detection",
                kind="quality",
                label=label,
                attention=run.variant.name,
                options=run.variant.options,
                is_baseline=run.variant.attention is None,
                status="ok",
                message="",
                utc=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=0.0,
                environment=environment(device, torch.get_num_threads()),
                host=costs.host_name(run.config),
                dtype="float32",
                tokens=0,
                shapes=None,
                gate=None,
                baseline_gate=None,
                backends=(),
                cost=None,
                quality=quality,
                quality_note=quality.note,
            )
        )
    return records


def check_comparable(configs: Sequence[Any]) -> None:
    """Raise `ConfigError` unless all configs have labels of their own and are tested on the same images."""
    for config in configs:
        missing = [key for key in ("test_dataloader", "test_evaluator") if config.get(key) is None]
        if missing:
            raise ConfigError(f"a config tests nothing: it has no {', '.join(missing)}; see configs/detect")
    labels = [costs.variant_of(config).label for config in configs]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"two of the configs are called {label!r}; give one of them another label: label=...")
    keys = ("data_root", "ann_file", "data_prefix", "indices")
    tested = {repr([config.test_dataloader.dataset.get(key) for key in keys]) for config in configs}
    if len(tested) > 1:
        raise ConfigError(f"the configs are tested on different images and cannot be compared: {'; '.join(tested)}")


def cost_records(
    configs: Sequence[Any],
    found: Mapping[str, Detection],
    facts: Mapping[str, Any],
    say: Callable[[str], None],
    done: Callable[[float], None],
) -> list[Record]:
    """Records of cost where the first config asks for it, with the quality of each attention."""
    asked = costs.read(configs[0])
    if asked is None:
        return []
    variants = costs.variants(asked, [costs.variant_of(config) for config in configs])
    measured = costs.measure(configs[0], asked, variants, facts, say, done)
    records = []
    for record in measured:
        quality = found.get(record.label)
        note = "not measured" if quality is None else quality.note
        records.append(record.model_copy(update={"quality": quality, "quality_note": note}))
    return records


def hash_of(configs: Sequence[Any]) -> str:
    """What stands for a set of configs."""
    text = "\n".join(config.pretty_text for config in configs)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keep(folder: Path, records: Sequence[Record]) -> None:
    """Put records into a folder, replacing those of an earlier evaluation."""
    with RecordStore(folder, Record, records[0].config_hash, fresh=True) as store:
        for record in records:
            store.append(record)


def classes_of(config: Any) -> list[str]:
    """Names of the classes of the test images, in the detector's order."""
    meta = config.test_dataloader.dataset.get("metainfo") or {}
    if meta.get("classes"):
        return list(meta["classes"])
    return list(prepare(config)[-1].classes)

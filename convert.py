"""Convert docs/records/train_bytes.jsonl to the engine's records, once; run from the repository's root."""

import json
import math
from pathlib import Path

from attnzoo import tasks
from attnzoo.tasks.decode.byte_lm import BitsPerByte, TrainRecord

UTC = "2026-11-22T18:12:09+00:00"  # of the commit that brought the records, which say no time of their own


def convert(path, config_path):
    """Rewrite a file of records in place, and write its config beside it."""
    old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    task, config = tasks.load(config_path)
    recipe, records = config.recipe, []
    for cell, row in zip(task.plan(config), old, strict=True):
        assert cell.label == row["label"]
        mean = math.fsum(row["nats"]) / len(row["nats"])
        note = (
            f"{recipe.steps} steps from scratch of {recipe.batch} windows of {recipe.tokens} bytes of {config.text}, "
            f"{len(row['nats'])} windows of its end held out"
        )
        quality = BitsPerByte(
            perplexity=math.exp(mean),
            nll=mean,
            tokens=recipe.tokens,
            window_nll=row["nats"],
            parameters=row["parameters"],
            losses=row["losses"],
            text_sha256=row["text_sha256"],
            note=note,
        )
        quality = quality.against(records[0].quality) if records else quality.model_copy(update={"ratio": 1.0})
        records.append(
            TrainRecord(
                task=task.name,
                config_hash=row["config_hash"],
                benchmark=config.name,
                command="python train/decode.py configs/decode/train_bytes.yaml",
                part=cell.part,
                kind=cell.kind,
                label=cell.label,
                attention=cell.attention,
                options=dict(cell.options),
                is_baseline=cell.is_baseline,
                status="ok",
                message="",
                utc=UTC,
                seconds=row["seconds"],
                environment=row["environment"],
                host=cell.host,
                dtype=cell.dtype,
                tokens=0,
                shapes=None,
                gate=None,
                baseline_gate=None,
                backends=(),
                cost=None,
                quality=quality,
                quality_note=note,
            )
        )
    path.with_suffix(".yaml").write_text(config.to_yaml(), encoding="utf-8")
    path.write_text("".join(record.model_dump_json() + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    convert(Path("docs/records/train_bytes.jsonl"), Path("configs/decode/train_bytes.yaml"))

"""Convert docs/records/kvpress.jsonl to the engine's records, once; run from the repository's root.

Times and memory of the old records were taken without a gate: they are no costs, and are left out.
"""

import json
from pathlib import Path

from attnzoo import tasks
from attnzoo.tasks.decode.kvpress.config import Row
from attnzoo.tasks.decode.kvpress.quality import Answered, PassKeys, Record

UTC = "2026-11-23T04:22:00+00:00"  # of the commit that brought the records, which say no time of their own
KEPT = ("context_tokens", "kept", "answer", "expected", "hits", "depth", "cache_peak_bytes", "entries_peak_bytes")


def convert(path, config_path):
    """Rewrite a file of records in place, and write its config beside it."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    begun = lines[0]
    versions = {line["side"]: line["versions"] for line in lines if line["kind"] == "versions"}
    task, config = tasks.load(config_path, ["timed=0"])
    dense, records = {}, []
    for cell in task.plan(config):
        row = Row.model_validate(cell.asks["row"])
        name = (cell.asks["setting"], row.policy, row.side, row.method)
        own = [
            x for x in lines if x["kind"] == "result" and (x["setting"], x["policy"], x["side"], x["method"]) == name
        ]
        assert [x["sample"] for x in sorted(own, key=lambda x: x["sample"])] == list(range(config.samples))
        prompts = [Answered(**{key: x[key] for key in KEPT}) for x in sorted(own, key=lambda x: x["sample"])]
        quality = PassKeys(
            row=row,
            prompts=tuple(prompts),
            versions=versions[row.side],
            text_sha256=begun["text_sha256"],
            note=f"{config.samples} prompts of {config.tokens:,} tokens with a pass key in prose ({config.text}), "
            f"{cell.part}; {config.share:.0%} of the cache kept, blocks of {config.block_size}",
        )
        if cell.is_baseline:
            quality = dense[cell.part] = quality.model_copy(update={"ratio": 1.0})
        else:
            quality = quality.against(dense[cell.part])
        records.append(
            Record(
                task=task.name,
                config_hash=begun["config_hash"],
                benchmark=config.name,
                command=begun["command"],
                part=cell.part,
                kind=cell.kind,
                label=cell.label,
                attention=cell.attention,
                options=dict(cell.options),
                is_baseline=cell.is_baseline,
                status="ok",
                message="",
                utc=UTC,
                seconds=0,
                environment=begun["environment"],
                host=cell.host,
                dtype=cell.dtype,
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
    path.with_suffix(".yaml").write_text(config.to_yaml(), encoding="utf-8")
    path.write_text("".join(record.model_dump_json() + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    convert(Path("docs/records/kvpress.jsonl"), Path("configs/decode/kvpress.yaml"))

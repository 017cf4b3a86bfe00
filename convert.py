"""Convert docs/records/prose.jsonl once from decoding's own records, a line per row, to the engine's.

python convert.py docs/records/prose.jsonl

No figure changes: what is set against dense is computed again from what each record holds of its own, where it holds
that, and must be what the record said.
"""

import json
import math
import sys
from pathlib import Path

from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.record import Interval
from attnzoo.tasks.decode.quality import KIND_TITLES, Canary, DenseLimit, Perplexity, Retrieval
from attnzoo.tasks.decode.score import unbounded
from attnzoo.tasks.decode.task import Record

LIMIT = ": largest difference from dense at one token"
TINY = "streaming block_size=16 budget=16"  # the options of configs/decode/prose.yaml
ROUNDED = 1e-9


def perplexity(row, dense):
    """Of the windows."""
    nll, base = row["nll"], dense["nll"]
    difference = nll["difference"]
    ratios = {}
    if difference is not None:
        ends = (math.exp(-difference[end]) for end in ("mean", "high", "low"))
        ratios = dict(zip(("ratio", "ratio_low", "ratio_high"), ends, strict=True))
        assert math.isclose(difference["mean"], nll["mean"] - base["mean"], abs_tol=ROUNDED)
    checks = {check["name"]: check for check in row["canaries"]}
    canary = limit = None
    if row["is_baseline"]:
        (tiny,) = (check for check in checks.values() if check["at_least"])
        canary = Canary(label=TINY, above_dense=tiny["figure"], at_least=tiny["limit"])
    else:
        spec = AttentionConfig(name=row["attention"], options=row["options"])
        label = unbounded(spec, nll["tokens"]).label
        check = checks[label + LIMIT]
        limit = DenseLimit(label=label, difference=check["figure"], at_most=check["limit"])
    return Perplexity(
        perplexity=nll["perplexity"],
        nll=nll["mean"],
        tokens=nll["tokens"],
        windows=nll["windows"],
        difference=difference,
        curve=nll["curve"],
        cache=nll["cache"],
        cache_dense=None if row["is_baseline"] else base["cache"],
        canary=canary,
        dense_limit=limit,
        text_sha256=row["text_sha256"],
        note=f"{row['model']} on {nll['windows']} windows of {nll['tokens']:,} tokens of {row['text']}, {row['dtype']}",
        **(ratios or {"ratio": 1.0}),
    )


def retrieval(row, result, base):
    """Of the prompts of one kind."""

    def own(one):
        keys = ("kind", "samples", "tokens", "recall", "low", "high", "by_depth", "cache")
        what = f"{one['samples']} prompts of {one['tokens']:,} tokens"
        note = f"{row['model']} on {what} of {row['text']}, {row['dtype']}"
        return Retrieval(**{key: one[key] for key in keys}, note=note)

    made = own(result)
    assert (sum(made.hits), len(made.hits)) == (result["hits"], result["asked"])
    if row["is_baseline"]:
        return made.model_copy(update={"ratio": 1.0})
    against = made.against(own(base))
    assert math.isclose(against.p_value, result["p_value"])
    assert math.isclose(against.difference.mean, result["difference"]["mean"])
    given = Interval(**result["difference"])  # its bootstrap was drawn by other random numbers than today's
    return against.model_copy(update={"difference": given, "p_value": result["p_value"]})


def records(rows):
    """The engine's records, in its order: windows, then prompts; dense first."""
    (dense,) = (row for row in rows if row["is_baseline"])
    shared = ("config_hash", "benchmark", "command", "label", "attention", "options", "is_baseline", "utc")
    found = []
    for row in rows:
        about = {key: row[key] for key in (*shared, "environment", "dtype")}
        about |= {"task": "decode", "part": "language", "kind": "quality", "status": "ok", "message": "", "tokens": 0}
        about |= {"host": f"transformers:{row['model']}", "shapes": None, "gate": None, "baseline_gate": None}
        about |= {"backends": (), "cost": None}
        assert row["cost"] is None, "a cost without a gate is none of the engine's"
        quality = perplexity(row, dense)
        # the time of a row was noted for all of its samples together
        found.append(Record(**about, seconds=row["seconds"], quality=quality, quality_note=quality.note))
        for result, base in zip(row["retrieval"], dense["retrieval"], strict=True):
            quality = retrieval(row, result, base)
            more = {"workload": KIND_TITLES[result["kind"]], "quality_note": quality.note}
            found.append(Record(**about, seconds=0, quality=quality, **more))
    return sorted(found, key=lambda record: record.workload)


def main():
    path = Path(sys.argv[1])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(record.model_dump_json() + "\n" for record in records(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()

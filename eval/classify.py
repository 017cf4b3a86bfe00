"""Evaluate what train/classify.py trained: accuracy, calibration, cost against the dense model, the worst mistakes.

python eval/classify.py configs/classify/digits.yaml [key=value ...]             what was evaluated before is kept
accelerate launch eval/classify.py configs/classify/digits.yaml [key=value ...]  processes share the test images
python eval/classify.py CONFIG --batch 64                                        so many test images at a time (256)
python eval/classify.py --report RECORDS.jsonl                                   report again, without measuring
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from attnzoo.tasks.script import run_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--batch", type=int)
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.batch is not None and parsed.batch < 1:
        parser.error("--batch must be at least 1")
    batch = [] if parsed.batch is None else [f"test_batch={parsed.batch}"]
    return run_task("eval/classify.py", __doc__, [*rest, *batch], task="classify")


if __name__ == "__main__":
    sys.exit(main())

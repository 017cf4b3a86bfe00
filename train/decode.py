"""Train a small causal language model of bytes once per attention, each against the dense one, and report.

python train/decode.py configs/decode/train_bytes.yaml [key=value ...]    run; an interrupted run resumes
python train/decode.py CONFIG [key=value ...] --so-far                    table and page of what a run has done
python train/decode.py --report RECORDS.jsonl                             table and page again, without training
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attnzoo.tasks.script import run_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    return run_task("train/decode.py", __doc__, arguments, task="train_bytes")


if __name__ == "__main__":
    sys.exit(main())

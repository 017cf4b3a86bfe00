"""Repair swapped copies of a trained model by distillation, and report what each stage gives back.

python train/distill.py configs/distill/digits.yaml [key=value ...]    run; an interrupted run resumes
python train/distill.py CONFIG [key=value ...] --so-far                table and page of what a run has done
python train/distill.py --report RECORDS.jsonl                         table and page again, without training
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attnzoo.tasks.script import run_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    return run_task("train/distill.py", __doc__, arguments, task="distill", only=True)


if __name__ == "__main__":
    sys.exit(main())

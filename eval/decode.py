"""Measure what cache eviction costs a language model in quality, and what it saves, and report it.

python eval/decode.py configs/decode/prose.yaml [key=value ...]    run; an interrupted run resumes
python eval/decode.py CONFIG [key=value ...] --so-far              table and page of what a run under way has done
python eval/decode.py --report RECORDS.jsonl                       report again from records, without running
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attnzoo.tasks.script import run_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    return run_task("eval/decode.py", __doc__, arguments, task="decode")


if __name__ == "__main__":
    sys.exit(main())

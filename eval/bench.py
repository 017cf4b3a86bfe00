"""Run the benchmark of a config, whatever its task, and report it.

python eval/bench.py configs/bench/quickstart.yaml [key=value ...]   measure; an interrupted run resumes
python eval/bench.py CONFIG [key=value ...] --so-far                 table and page of what a run under way has done
python eval/bench.py --report RECORDS.jsonl [--readme README.md]     report again from records, without measuring
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attnzoo.tasks.script import run_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    return run_task("eval/bench.py", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

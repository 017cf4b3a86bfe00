"""Compare attnzoo with kvpress, side by side: same model, prompts and share of the cache kept, one process per row.

python eval/compare_kvpress.py configs/decode/kvpress.yaml [key=value ...]    run; an interrupted run resumes
python eval/compare_kvpress.py configs/decode/kvpress.yaml --only keydiff tova    only these policies, for now
python eval/compare_kvpress.py CONFIG [key=value ...] --so-far                table and page of what a run has done
python eval/compare_kvpress.py --report RECORDS.jsonl                         table and page again, without running

kvpress pins an old transformers, so it has an environment of its own: the one whose interpreter `--python` names, or
one that this script makes in attnzoo's cache folder (about 6 GB, once).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from attnzoo.tasks.script import run_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    keys = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    keys.add_argument("--python")
    keys.add_argument("--only", nargs="+")
    given, others = keys.parse_known_args(arguments)
    others += [f"{key}={json.dumps(value)}" for key, value in vars(given).items() if value is not None]
    return run_task("eval/compare_kvpress.py", __doc__, others, task="kvpress")


if __name__ == "__main__":
    sys.exit(main())

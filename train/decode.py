"""Train a small causal language model of bytes once per attention, each against the dense one, and report.

python train/decode.py configs/decode/train_bytes.yaml [key=value ...]    run; an interrupted run resumes
python train/decode.py --report RECORDS.jsonl                             table and plot again, without training
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo.command import run_script


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config, such as configs/decode/train_bytes.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--report", type=Path, metavar="RECORDS", help="report from these records; train nothing")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.config is None) == (parsed.report is None):
        parser.error("give either a config or --report RECORDS")

    def body() -> None:
        from attnzoo.tasks.decode.byte_run import load_config, report, run

        print(report(parsed.report or run(load_config(parsed.config, parsed.overrides))))

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())

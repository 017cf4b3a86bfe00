"""Measure what cache eviction costs a language model in quality, and what it saves, and report it.

python eval/decode.py configs/decode/prose.yaml [key=value ...]    run; an interrupted run resumes
accelerate launch eval/decode.py configs/decode/prose.yaml         the same, the samples split over GPUs
torchrun --standalone --nproc_per_node 2 eval/decode.py CONFIG     the same, split over 2 processes on CPUs
python eval/decode.py CONFIG --so-far                              table of what the run of CONFIG has finished so far
python eval/decode.py --report RECORDS.jsonl                       report again from records, without running
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo.command import run_script


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config, such as configs/decode/smoke.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--report", type=Path, metavar="RECORDS", help="report from these records; run nothing")
    parser.add_argument("--so-far", action="store_true", help="show what the run of CONFIG has done; run nothing")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.config is None) == (parsed.report is None):
        parser.error("give either a config or --report RECORDS")

    def body() -> None:
        from attnzoo.tasks.decode import task
        from attnzoo.tasks.decode.config import load_config

        if parsed.report is not None:
            task.report(parsed.report)
        elif parsed.so_far:
            task.show(load_config(parsed.config, parsed.overrides))
        else:
            lasting = [argument for argument in arguments if not argument.startswith("fresh=")]
            command = shlex.join(["python", "eval/decode.py", *lasting])
            task.evaluate(load_config(parsed.config, parsed.overrides), command)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())

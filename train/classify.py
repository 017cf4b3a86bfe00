"""Train image classifiers with any attention, each against the model's own; an interrupted run resumes.

python train/classify.py configs/classify/digits.yaml [key=value ...]             one process
accelerate launch train/classify.py configs/classify/digits.yaml [key=value ...]  many processes, on one machine or more

Started twice at a time, the two share the runs: each takes those that the other has not begun. One that ends while the
other still trains says which runs those are, and its exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo import processes
from attnzoo.command import FAILED, OK, output_console, run_script


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML config, such as configs/classify/digits.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parsed = parser.parse_intermixed_args(arguments)

    def body() -> int:
        from accelerate import PartialState

        from attnzoo.tasks.classify.config import load_config
        from attnzoo.tasks.classify.run import left_to_others, table, train_all

        config = load_config(parsed.config, parsed.overrides)
        results = train_all(config)
        left = left_to_others(config, results)
        if PartialState().is_main_process:
            output_console().print(table(results).rich())
            if left:
                print(
                    f"error: not done here, for other processes are training them: {', '.join(left)}. When they have "
                    "ended, the same command shows all",
                    file=sys.stderr,
                )
        processes.leave()
        return FAILED if left else OK

    return run_script(body, "run the same command again, without resume=never, to resume from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())

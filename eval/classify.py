"""Evaluate what train/classify.py trained: accuracy, calibration, cost against the dense model, the worst mistakes.

python eval/classify.py configs/classify/digits.yaml [key=value ...]             what was evaluated before is kept
accelerate launch eval/classify.py configs/classify/digits.yaml [key=value ...]  processes share the test images
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
    parser.add_argument("config", type=Path, help="a YAML config, such as configs/classify/digits.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--batch", type=int, help="test images at a time, as test_batch=N (256)")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.batch is not None and parsed.batch < 1:
        parser.error("--batch must be at least 1")

    def body() -> int:
        from attnzoo.bench.publish import measure
        from attnzoo.tasks.classify.task import TASK, ClassifyConfig

        batch = [] if parsed.batch is None else [f"test_batch={parsed.batch}"]
        config = ClassifyConfig.load(parsed.config, [*parsed.overrides, *batch])
        lasting = [argument for argument in arguments if not argument.startswith("fresh=")]
        return measure(TASK, config, shlex.join(["python", "eval/classify.py", *lasting]))

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())

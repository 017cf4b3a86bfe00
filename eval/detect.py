"""Evaluate detectors that train/detect.py trained, side by side: COCO's metric, cost by stage, drawn boxes, one page.

python eval/detect.py configs/detect/trees_softmax.py configs/detect/trees_padre.py [key=value ...]
torchrun --nproc_per_node 2 eval/detect.py CONFIG ... --launcher pytorch

A config that trains nothing, such as configs/detect/detr_r50_cost.py, is measured for its cost alone. What was measured
before is kept; fresh=true measures all again. python eval/bench.py takes the same configs, in one process.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo.command import run_script
from attnzoo.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="CONFIG or key=value", help="configs, and keys to set in all")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="mmengine's")
    parser.add_argument("--output", type=Path, help="folder of records and page (eval, beside the first config's runs)")
    parsed = parser.parse_intermixed_args(arguments)
    output = [] if parsed.output is None else [f"output={parsed.output}"]
    command = shlex.join(["python", "eval/detect.py", *(word for word in arguments if not word.startswith("fresh="))])
    return run_script(lambda: evaluate([*parsed.inputs, *output], parsed.launcher, command))


def evaluate(inputs: Sequence[str], launcher: str, command: str) -> int:
    """Test all runs, measure what they cost, report, and give the exit status."""
    from attnzoo import tasks
    from attnzoo.tasks.detect.run import fit_to_machine
    from attnzoo.tasks.script import measure

    first = next((one for one in inputs if "=" not in one), None)
    if first is None:
        raise ConfigError("give at least one config, such as configs/detect/trees_softmax.py")
    more = list(inputs)
    more.remove(first)
    task, config = tasks.load(Path(first), more)
    if task.name != "detect":
        raise ConfigError(f"{first} is not a config of detection; run: python eval/bench.py {first}")
    config.check_folder()
    for detector in config.detectors:
        fit_to_machine(detector, launcher)
    return measure(task, config, command, None)


if __name__ == "__main__":
    sys.exit(main())

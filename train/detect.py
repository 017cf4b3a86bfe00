"""Train a detector of MMDetection with any attention, on mmengine's Runner; an interrupted run resumes.

python train/detect.py configs/detect/trees_padre.py [key=value ...]
torchrun --nproc_per_node 2 train/detect.py configs/detect/trees_padre.py --launcher pytorch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo import files, processes
from attnzoo.command import run_script
from attnzoo.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config of mmengine, such as configs/detect/trees_padre.py")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="mmengine's")
    parser.add_argument("--amp", action="store_true", help="mixed precision, mmengine's AmpOptimWrapper")
    parsed = parser.parse_intermixed_args(arguments)

    def body() -> None:
        import torch

        from attnzoo.tasks.detect import data, run
        from attnzoo.tasks.detect.config import load_config

        config = load_config(parsed.config, parsed.overrides)
        files.check_folder(config.work_dir, "work_dir")
        if parsed.amp:
            if not torch.cuda.is_available():
                raise ConfigError("mixed precision is mmengine's AmpOptimWrapper, which needs a GPU, and none is here")
            config.optim_wrapper.type = "AmpOptimWrapper"
        for checked in data.prepare(config):
            print(checked, file=sys.stderr)
        run.fit_to_machine(config, parsed.launcher)
        folder = run.train(config)
        processes.leave()
        print(f"trained: {folder}")

    return run_script(body, "run the same command again to resume from the last checkpoint, if there is one")


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate detectors that train/detect.py trained, side by side: COCO's metric, cost by stage, drawn boxes, one page.

python eval/detect.py configs/detect/trees_softmax.py configs/detect/trees_padre.py [key=value ...]
torchrun --nproc_per_node 2 eval/detect.py CONFIG ... --launcher pytorch

A config that trains nothing, such as configs/detect/detr_r50_cost.py, is measured for its cost alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo import files, processes
from attnzoo.command import check_rows, output_console, run_script
from attnzoo.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="CONFIG or key=value", help="configs, and keys to set in all")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="mmengine's")
    parser.add_argument("--output", type=Path, help="folder of records and page (eval, beside the first config's runs)")
    parsed = parser.parse_intermixed_args(arguments)
    command = shlex.join(["python", "eval/detect.py", *arguments])
    return run_script(lambda: evaluate(parsed.inputs, parsed.launcher, parsed.output, command))


def evaluate(inputs: Sequence[str], launcher: str, output: Path | None, command: str) -> int:
    """Test all runs, measure what they cost, report, and give the exit status."""
    from rich.console import Console

    from attnzoo.bench.page import html_page
    from attnzoo.bench.progress import bars
    from attnzoo.bench.report import print_report
    from attnzoo.tasks.detect import evaluate as evaluation
    from attnzoo.tasks.detect import page
    from attnzoo.tasks.detect.config import load_config, prepare
    from attnzoo.tasks.detect.run import fit_to_machine, is_main

    paths = [one for one in inputs if "=" not in one]
    if not paths:
        raise ConfigError("give at least one config, such as configs/detect/trees_softmax.py")
    configs = [load_config(path, [one for one in inputs if "=" in one]) for path in paths]
    folder = output or Path(configs[0].work_dir).parent / evaluation.FOLDER
    files.check_folder(folder, "--output")
    progress, out = Console(stderr=True), output_console()
    trained = [config for config in configs if config.get("data_root", "") is not None]
    if not trained and configs[0].get("cost") is None:
        raise ConfigError(f"{paths[0]} has neither test images (data_root) nor a cost to measure")
    evaluation.check_comparable(trained)
    for config in trained:
        prepare(config)
    runs = []
    for config in [seed for one in trained for seed in evaluation.seeds_of(one)]:
        fit_to_machine(config, launcher)
        runs.append(evaluation.score_run(config, lambda told: progress.print(told, highlight=False)))
    main_process = is_main()
    processes.leave()  # what follows one process does alone
    if not main_process:
        return 0
    facts = {
        "config_hash": evaluation.hash_of(configs),
        "benchmark": f"detect-{Path(paths[0]).stem}",
        "command": command,
    }
    qualities = evaluation.qualities(runs)
    with bars(progress) as shown:
        bar = shown.add_task("cost", total=1, stage="", visible=configs[0].get("cost") is not None)
        costs = evaluation.cost_records(
            configs,
            qualities,
            facts,
            lambda told: shown.update(bar, stage=told),
            lambda part: shown.update(bar, completed=part),
        )
    records = [*evaluation.quality_records(runs, qualities, facts), *costs]
    evaluation.keep(folder, records)
    sections = [page.sizes(costs)]
    if runs:
        first = {run.variant.label: run.scores for run in reversed(runs)}
        labels = dict.fromkeys(run.variant.label for run in runs)
        sections += [
            page.curves(qualities),
            page.drawn({label: first[label] for label in labels}, evaluation.classes_of(runs[0].config)),
        ]
    text = "\n\n".join(config.pretty_text for config in configs)
    target = folder / "report.html"
    files.write(target, html_page(records, text, sections))
    print_report(records, out)
    out.print(f"page: {target}", highlight=False, soft_wrap=True)
    return check_rows(records)


if __name__ == "__main__":
    sys.exit(main())

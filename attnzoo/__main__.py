"""List the methods, show the attention layers of a model, and measure what a swap would cost and save on this machine.

attnzoo list                    every registered method with its capabilities, as a Markdown table
attnzoo list --sources          every method with its file, its paper and what it does
attnzoo describe NAME ...       options with defaults, capabilities and paper of methods
attnzoo keys [TASK ...]         every key of the configs of tasks, what it takes and its default
attnzoo layers MODEL            the attention layers of a model, and which methods can replace them, or why not
attnzoo measure timm:NAME       time, memory and FLOPs of methods against the model's own attention: a table and a page

MODEL is timm:NAME, transformers:FOLDER_OR_NAME or package.module:function.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from attnzoo.command import check_rows, output_console, run_script
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.registry import BUILT_IN, AttentionInfo, Capabilities, describe, list_attentions
from attnzoo.tables import Column, Table

BUDGET = 64  # entries per head, to try a policy with


def capability_table() -> str:
    """Give every registered attention with its capabilities, as a Markdown table."""
    columns = [f.name for f in fields(Capabilities)]
    table = Table(("name", Column("kind", left=True), *columns))
    for info in map(describe, list_attentions()):
        can = ["yes" if getattr(info.capabilities, column) else "" for column in columns]
        table.add(f"`{info.name}`", info.kind, *can)
    return table.markdown()


def source_table(root: str = "..") -> str:
    """Give every method that attnzoo ships with its file, its paper and what it does, as a Markdown table.

    `root` is the repository's folder as seen from the page that holds the table.
    """
    table = Table(
        ("name", Column("kind", left=True), *(Column(head, left=True) for head in ("file", "paper", "what it does")))
    )
    for info in BUILT_IN:
        path = str(info.target).partition(":")[0].replace(".", "/") + ".py"
        table.add(f"`{info.name}`", info.kind, f"[{path}]({root}/{path})", _links(info.paper), info.summary)
    return table.markdown()


def _links(paper: str) -> str:
    """``"Title, address; Title, address"`` as links; what has no address stays as it is."""
    return "; ".join(re.sub(r"^(.*), (https?://\S+)$", r"[\1](\2)", each) for each in paper.split("; "))


def layers(name: str) -> None:
    """Print the attention layers of a model, and for each method whether it can replace them, or why not."""
    import attnzoo
    from attnzoo.models import load_model

    model = load_model(name)
    print(attnzoo.swap_report(model), end="\n\n")
    table = Table(("method", Column("kind", left=True), Column("can be swapped in", left=True)))
    for info in map(describe, list_attentions()):
        table.add(info.name, info.kind, _tried(model, info))
    _print(table)


def _tried(model: Any, info: AttentionInfo) -> str:
    """Try a swap and restore the model: how many layers can be swapped, or the reason why not."""
    import attnzoo

    options: dict[str, Any] = {"budget": BUDGET} if info.kind == "eviction" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attnzoo.replace_attention(model, info.name, **options)
        except AttnZooError as error:
            return f"no: {' '.join(str(error).split())}"
        report = attnzoo.swap_report(model)
        attnzoo.restore_attention(model)
    return f"in {len(report.swapped)} of {len(report.layers)} layers, {report.added:,} new parameters"


def measure(parsed: argparse.Namespace, command: str) -> int:
    """Measure methods in a timm model: print the config, the table and the verdict, and write the page."""
    import yaml

    from attnzoo.bench.publish import publish
    from attnzoo.bench.record import RECORDS_FILE
    from attnzoo.bench.run import run
    from attnzoo.bench.summary import summarize, verdict
    from attnzoo.tasks.suite import TASK, SuiteConfig

    library, _, model = parsed.model.partition(":")
    if library != "timm":
        raise ConfigError(
            f"model {parsed.model!r}: measure takes timm:NAME; for language models see configs/bench/quickstart.yaml, "
            "for detectors configs/detect/detr_r50_cost.py"
        )
    content: dict[str, Any] = {
        "device": parsed.device,
        "threads": parsed.threads,
        "host": {"library": library, "model": model, "patch_size": parsed.patch_size},
        "attentions": [name for name in parsed.attention if name != "dense"],
        "cost": {
            "tokens": parsed.tokens,
            "batch": parsed.batch,
            "dtype": parsed.dtype,
            "repeats": parsed.repeats,
            "min_seconds": parsed.min_seconds,
            "timeout_seconds": parsed.timeout,
        },
        "output": parsed.output,
    }
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:8]
    content = {"task": "suite", "name": f"measure-{re.sub(r'[^A-Za-z0-9._-]', '-', model)}-{key}", **content}
    config = SuiteConfig.check(content, command)
    print(yaml.safe_dump(content, sort_keys=False), end="")
    records = run(TASK, config, command)
    console = output_console()
    publish(TASK, records, config.folder / RECORDS_FILE, console)
    console.print(verdict(summarize(records)), highlight=False, markup=False, soft_wrap=True)
    return check_rows(records)


def keys(names: Sequence[str] = ()) -> str:
    """The reference of all keys of the configs of tasks, by default of all of them, in Markdown."""
    from attnzoo import tasks
    from attnzoo.bench.keys import reference

    return "\n\n".join(f"## {name}\n\n{reference(tasks.find(name).config)}" for name in names or tasks.TASKS)


def _print(table: Table) -> None:
    """In color where a terminal and rich are there, else in Markdown."""
    try:
        console = output_console()
    except ImportError:
        print(table.markdown())
        return
    console.print(table.rich())


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    plain = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser("attnzoo", description=__doc__, formatter_class=plain)
    commands = found.add_subparsers(dest="command", metavar="list | describe | keys | layers | measure")
    one = commands.add_parser("list", help="every registered method")
    one.add_argument("--sources", action="store_true", help="attnzoo's own, with file, paper and a sentence on each")
    one = commands.add_parser("describe", help="options, capabilities and paper of a method")
    one.add_argument("names", nargs="+", metavar="NAME")
    one = commands.add_parser("keys", help="every key of a task's config")
    one.add_argument("tasks", nargs="*", metavar="TASK", help="by default all of them")
    one = commands.add_parser("layers", help="the attention layers of a model, and what can replace them")
    one.add_argument("model", metavar="MODEL")
    one = commands.add_parser("measure", help="measure methods in a model on this machine")
    one.add_argument("model", metavar="MODEL", help="timm:NAME")
    one.add_argument(
        "--attention",
        default="padre,sdpa",
        type=lambda text: text.split(","),
        help="comma-separated names (padre,sdpa)",
    )
    one.add_argument(
        "--tokens", default=[196, 784], type=_numbers, help="comma-separated token counts, squares (196,784)"
    )
    one.add_argument("--batch", default=1, type=int, help="images per forward (1)")
    one.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    one.add_argument("--device", default="cpu", help="cpu or cuda")
    one.add_argument("--threads", default=None, type=int, help="threads of PyTorch; by default its own choice")
    one.add_argument("--patch-size", default=16, type=int, help="side of a patch in pixels (16)")
    one.add_argument("--repeats", default=5, type=int, help="minimum number of timed pairs of calls (5)")
    one.add_argument("--min-seconds", default=1.0, type=float, help="minimum seconds of timed calls (1)")
    one.add_argument("--timeout", default=120.0, type=float, help="seconds per row (120)")
    one.add_argument("--output", default=None, help="folder for records and page (runs/measure-...)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser().parse_args(arguments)

    def body() -> int:
        if parsed.command == "measure":
            return measure(parsed, shlex.join(["attnzoo", *arguments]))
        if parsed.command == "layers":
            layers(parsed.model)
        elif parsed.command == "keys":
            print(keys(parsed.tasks))
        elif parsed.command == "describe":
            print("\n\n".join(str(describe(name)) for name in parsed.names))
        else:
            print(source_table(".") if getattr(parsed, "sources", False) else capability_table())
        return 0

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())

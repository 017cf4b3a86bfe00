"""List the methods, show the attention layers of a model, and measure what a swap would cost and save on this machine.

attnzoo list [KIND]             every registered method with its capabilities, as a Markdown table
attnzoo list --sources          every method with its file, its paper and what it does
attnzoo describe NAME ...       options with defaults, capabilities and paper of methods
attnzoo keys [TASK ...]         every key of the configs of tasks, what it takes and its default
attnzoo layers MODEL            the attention layers of a model, and which methods can replace them, or why not
attnzoo measure MODEL           time, memory and FLOPs of methods against the model's own attention: a table and a page

MODEL is timm:NAME, transformers:FOLDER_OR_NAME or package.module:function, which is called without arguments; to be
measured, it returns (model, example input): a tensor, a tuple of arguments or a dict of keyword arguments.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from attnzoo.command import check_rows, output_console, run_script, split_outside_brackets
from attnzoo.errors import AttnZooError
from attnzoo.imports import import_modules
from attnzoo.registry import BUILT_IN, AttentionInfo, Capabilities, Kind, describe, list_attentions
from attnzoo.tables import Column, Table

BUDGET = 64  # entries per head, to try a policy with


def capability_table(kind: Kind | None = None) -> str:
    """Give every registered attention, or those of a kind, with its capabilities, as a Markdown table.

    What none of them supports has no column. Under `decode` stands what token by token is decoded from: a mixer's
    state, the model's own cache or a policy's bounded one.
    """
    columns = [f.name for f in fields(Capabilities)]
    table = Table(("name", Column("kind", left=True), *columns))
    for info in map(describe, list_attentions(kind)):
        can = {column: "yes" if getattr(info.capabilities, column) else "" for column in columns}
        if info.capabilities.causal or can["decode"]:
            can["decode"] = {"core": "cache", "eviction": "bounded cache", "mixer": "state"}[info.kind]
        table.add(f"`{info.name}`", info.kind, *can.values())
    return table.without_empty_columns().markdown()


def source_table(root: str = "..", kind: Kind | None = None) -> str:
    """Give every method that attnzoo ships, or those of a kind, with its file, paper and what it does, in Markdown.

    `root` is the repository's folder as seen from the page that holds the table.
    """
    table = Table(
        ("name", Column("kind", left=True), *(Column(head, left=True) for head in ("file", "paper", "what it does")))
    )
    named = list_attentions(kind)
    for info in (info for info in BUILT_IN if info.name in named):
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
    alike: dict[tuple[str, str], list[str]] = {}
    for info in map(describe, list_attentions()):
        alike.setdefault((info.kind, _tried(model, info)), []).append(info.name)
    table = Table((Column("method", left=True), Column("kind", left=True), Column("can be swapped in", left=True)))
    for (kind, told), names in alike.items():
        table.add(", ".join(names), kind, told)
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
            reasons = getattr(error, "reasons", ()) or (str(error),)
            return f"no: {'; '.join(' '.join(reason.split()) for reason in reasons)}"
        report = attnzoo.swap_report(model)
        attnzoo.restore_attention(model)
    return f"in {len(report.swapped)} of {len(report.layers)} layers, {report.added:,} new parameters"


def measure(parsed: argparse.Namespace, command: str) -> int:
    """Measure methods in a model: print the config, the table and the verdict, and write the page."""
    import yaml

    from attnzoo import tasks
    from attnzoo.bench.publish import publish
    from attnzoo.bench.record import RECORDS_FILE
    from attnzoo.bench.run import run
    from attnzoo.bench.summary import summarize, verdict
    from attnzoo.tasks.flags import config_of

    content = config_of(parsed)
    task = tasks.find(content["task"])
    config = task.config.check(content, command)
    print(yaml.safe_dump(content, sort_keys=False), end="")
    records = run(task, config, command)
    console = output_console()
    publish(task, records, config.folder / RECORDS_FILE, console)
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
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them") from None


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    plain = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser("attnzoo", description=__doc__, formatter_class=plain)
    commands = found.add_subparsers(dest="command", metavar="list | describe | keys | layers | measure")
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="import a module first, for the methods that it registers; it may lie in the working directory",
    )
    one = commands.add_parser("list", parents=[own], help="every registered method")
    one.add_argument("kind", nargs="?", metavar="KIND", help=f"those of one kind: {', '.join(get_args(Kind))}")
    one.add_argument("--sources", action="store_true", help="attnzoo's own, with file, paper and a sentence on each")
    one = commands.add_parser("describe", parents=[own], help="options, capabilities and paper of a method")
    one.add_argument("names", nargs="+", metavar="NAME")
    one = commands.add_parser("keys", help="every key of a task's config")
    one.add_argument("tasks", nargs="*", metavar="TASK", help="by default all of them")
    one = commands.add_parser(
        "layers", parents=[own], help="the attention layers of a model, and what can replace them"
    )
    one.add_argument("model", metavar="MODEL")
    one = commands.add_parser("measure", parents=[own], help="measure methods in a model on this machine")
    one.add_argument("model", metavar="MODEL")
    one.add_argument(
        "--attention",
        default=None,
        type=lambda text: split_outside_brackets(text, ","),
        help="comma-separated names, each with options, if any: padre:degree=2:kernel_size=7,sdpa (padre,sdpa; of "
        "language models sdpa,keydiff:budget=256); of encoders that do not know their grid 'padre:grid=(8,8):prefix=1'",
    )
    one.add_argument(
        "--tokens", default=None, type=_numbers, help="comma-separated token counts: squares of images, or prompts"
    )
    one.add_argument("--batch", default=None, type=int, help="images, texts or prompts at a time (1)")
    one.add_argument(
        "--new-tokens", default=None, type=int, help="of language models: tokens decoded after a prompt (128)"
    )
    one.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    one.add_argument("--device", default="cpu", help="cpu or cuda")
    one.add_argument("--threads", default=None, type=int, help="threads of PyTorch; by default its own choice")
    one.add_argument("--patch-size", default=None, type=int, help="of timm: side of a patch in pixels (16)")
    one.add_argument("--repeats", default=5, type=int, help="minimum number of timed pairs of calls (5)")
    one.add_argument("--min-seconds", default=None, type=float, help="minimum seconds of timed calls (1)")
    one.add_argument("--timeout", default=120.0, type=float, help="seconds per row (120)")
    one.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    one.add_argument("--output", default=None, help="folder for records and page (runs/measure-...)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser().parse_args(arguments)

    def body() -> int:
        import_modules(getattr(parsed, "imports", ()))  # `keys` knows no methods
        if parsed.command == "measure":
            return measure(parsed, shlex.join(["attnzoo", *arguments]))
        if parsed.command == "layers":
            layers(parsed.model)
        elif parsed.command == "keys":
            print(keys(parsed.tasks))
        elif parsed.command == "describe":
            print("\n\n".join(str(describe(name)) for name in parsed.names))
        else:
            kind = getattr(parsed, "kind", None)  # without any command, nothing was parsed
            print(source_table(".", kind) if getattr(parsed, "sources", False) else capability_table(kind))
        return 0

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())

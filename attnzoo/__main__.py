"""``python -m attnzoo``: the registered attentions as a table; ``python -m attnzoo NAME``: one of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields

from attnzoo.errors import AttnZooError
from attnzoo.registry import Capabilities, describe, list_attentions
from attnzoo.tables import Column, Table


def capability_table() -> str:
    """Give every registered attention with what it can honour, as a Markdown table."""
    columns = [f.name for f in fields(Capabilities)]
    table = Table(("name", Column("kind", left=True), *columns))
    for info in map(describe, list_attentions()):
        can = ["yes" if getattr(info.capabilities, column) else "" for column in columns]
        table.add(f"`{info.name}`", info.kind, *can)
    return table.markdown()


def main(arguments: Sequence[str]) -> int:
    """Print the table, or the entries named; give the exit status."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    try:
        print("\n\n".join(str(describe(name)) for name in arguments) or capability_table())
    except AttnZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What each file says its paper did are options that there are, and those that the page on eviction lists."""

import importlib
from pathlib import Path

from attnzoo.registry import build_policy, describe
from tests.eviction.models import POLICIES, needed

PAGE = Path(__file__).parents[2] / "docs/eviction.md"


def published_options() -> str:
    """A line per policy."""
    lines = ["| name | closest to its paper |", "| --- | --- |"]
    for name in POLICIES:
        module = importlib.import_module(describe(name).target.partition(":")[0])
        if hasattr(module, "AS_PUBLISHED"):
            build_policy(describe(name), {"budget": 64, **needed(name), **module.AS_PUBLISHED})
            told = ", ".join(f"{key}={value!r}" for key, value in module.AS_PUBLISHED.items()).replace("'", '"')
            lines.append(f"| `{name}` | `{told}` |")
    return "\n".join(lines)


def test_the_options_as_published_are_those_of_the_files():
    listed = PAGE.read_text(encoding="utf-8").partition("<!-- published:begin -->\n")[2]
    assert listed.partition("\n<!-- published:end -->")[0] == published_options()
    assert set(POLICIES) - {line.split("`")[1] for line in published_options().splitlines()[2:]} == {"random", "auto"}

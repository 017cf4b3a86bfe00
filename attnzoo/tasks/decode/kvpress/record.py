"""The records of a comparison with kvpress: JSON lines, each a result of one prompt through one row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, RootModel

from attnzoo.bench.jsonl import read_lines
from attnzoo.bench.record import Count, Entry, Environment, NonNegative
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.tasks.decode.kvpress.config import Comparison, Key, Setting, Side

SCHEMA = 1


class RunLine(Entry):
    """The first line of the records: what was run."""

    kind: Literal["run"] = "run"
    schema_version: Literal[1] = 1
    config_hash: str
    config: Comparison
    text_sha256: str
    environment: Environment
    command: str


class VersionsLine(Entry):
    """Versions of Python and packages in the environment of one side."""

    kind: Literal["versions"] = "versions"
    side: Side
    versions: dict[str, str]


class ResultLine(Entry):
    """One prompt through one row.

    `kept` is the least and the most entries per head that any layer holds after the context. `cache_peak_bytes` is the
    largest size of the cache, all layers together, seen after any layer's attention: everything allocated;
    `entries_peak_bytes` counts keys and values in use alone. `memory_peak_bytes` is the peak of the resident set above
    that of the loaded model; null where the system does not tell.
    """

    kind: Literal["result"] = "result"
    side: Side
    policy: str
    method: str
    setting: Setting
    sample: Count
    context_tokens: Count
    kept: tuple[Count, Count]
    answer: str
    expected: tuple[str, ...]
    hits: tuple[bool, ...]
    depth: NonNegative
    first_token_seconds: NonNegative
    cache_peak_bytes: Count
    entries_peak_bytes: Count
    memory_peak_bytes: Count | None

    @property
    def key(self) -> Key:
        """What it is the result of."""
        return self.setting, self.policy, f"{self.side} {self.method}", self.sample


AnyLine = RunLine | VersionsLine | ResultLine


class Line(RootModel[Annotated[AnyLine, Field(discriminator="kind")]]):
    """A line of the records."""


def read_records(path: Path, mend: bool = False) -> list[AnyLine]:
    """Read the lines of a records file."""
    try:
        return [line.root for line in read_lines(path, Line, SCHEMA, mend=mend)]
    except OSError as error:
        raise ConfigError(f"the records {str(path)!r} cannot be read: {error.strerror}") from error


def first_line(lines: Sequence[AnyLine], path: Path) -> RunLine:
    """Give the line that says what was run."""
    if not lines or not isinstance(lines[0], RunLine):
        raise AttnZooError(f"{path} does not begin with what was run")
    return lines[0]

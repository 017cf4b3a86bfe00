"""What a task is to the engine: data and functions, named by one lazy line in `attnzoo.tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.config import RunConfig, digest
from attnzoo.bench.gate import gate_message
from attnzoo.bench.html import Section
from attnzoo.bench.isolate import OnProgress
from attnzoo.bench.record import Envelope, Key, Outcome, Phase, Record, Row
from attnzoo.tables import Table

if TYPE_CHECKING:
    from attnzoo.bench.highlights import Highlight


class Cell(Row):
    """One piece of work, an attention's cost at one workload or its quality; it gives a record per phase.

    Its figures depend on `depends_on`, plain data, and on nothing else: a record of an earlier run is kept where this
    is the same. Where it differs the run is refused, or if the cell is to be `renewed` (of what was trained again, say)
    measured again. `asks` is what the task's own `measure` wants to know besides, as plain data.

    Stages come one after another; `stage` is what the progress bar calls work of this kind, of which `workers` cells
    may run at a time. An `isolated` cell runs in a process of its own and is ended after `timeout` seconds. `threads`
    are PyTorch's; None leaves its own choice. `weight` is a guess at the time it takes, in arbitrary units, for the
    time left.

    A cell that `needs_baseline` means nothing unless the quality of its part's dense baseline, that without a
    `workload`, could be measured; it is not measured where an earlier stage has shown that it could not.
    """

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = ("forward",)
    depends_on: Mapping[str, Any]
    asks: Mapping[str, Any] = Field(default_factory=dict)
    stage: str
    timeout: PositiveFloat = 600.0
    threads: PositiveInt | None = None
    workers: PositiveInt = 1
    isolated: bool = True
    needs_baseline: bool = False
    renewed: bool = False
    weight: PositiveFloat = 1.0

    @property
    def keys(self) -> list[Key]:
        """Of its records."""
        return [(self.part, self.kind, phase, self.label, self.tokens, self.workload) for phase in self.phases]

    @property
    def measured(self) -> str:
        """16 hex digits over `depends_on`."""
        return digest(self.depends_on)

    @property
    def title(self) -> str:
        """What is measured, in words."""
        at = f" at {self.tokens:,} tokens" if self.tokens else ""
        return f"{self.label}{at}{f', {self.workload}' if self.workload else ''}"


class Result(Outcome):
    """What a cell gave.

    `environment` holds fields of `Environment` that were not those of this process where it was measured. `costs` are
    by phase. Nothing that has a cost can be made without the gates that it passed in the same process.
    """

    environment: Mapping[str, Any] = Field(default_factory=dict)
    costs: Mapping[str, Any] = Field(default_factory=dict)
    quality: Any = None

    @model_validator(mode="after")
    def _gate_before_clock(self) -> Self:
        return self.refuse_ungated(self.costs)

    @property
    def refused(self) -> Result | None:
        """The same as failed, with the reason, where a gate did not pass: then nothing may be timed."""
        for name, gate in self.failed_gates.items():
            return self.model_copy(update={"status": "failed", "message": gate_message(name, gate)})
        return None


@dataclass(frozen=True)
class Task:
    """A task: its `name`, as `attnzoo.tasks` and configs call it, and `ref`, where it is, as ``module:NAME``.

    `config` is the class of its configs. Before any work `check` finds what the schema cannot and raises `ConfigError`.
    `plan` gives a config's cells in the order of measurement, a part's dense baseline first; `prepare`,
    given the config and the cells to do, plain data that all of them share; `preload` the modules that its processes
    need, to be imported once for all; `expected` part and label of the rows that the config expects to be unsupported.

    `measure` does a cell, given the config, the cell, what `prepare` gave and a function to say how far it is. `assist`
    does the part of a process that a launcher started beside the main one, and gives True; in the main process, whose
    `measure` shares its work with the others, it gives False. It is asked before anything else.

    `record` is the class of its records, `columns` the table of cost of a task whose records have another cost than the
    engine's, `how_to_read` what its columns mean, and `verdict` what it shows, in a sentence. On the page, `plots` are
    captions and pictures (SVG) after the engine's own, `sections` further parts, `attached` those that come out of
    files beside the records, given the records and their folder, and `pairs` a table of rows set against each other,
    given the records and, as plain data, the config that says which.

    On the results page `highlights` stand in place of the engine's own, for a task whose `record` has another cost or
    whose rows stand in several columns; `others` says in words what its records hold that is no method's.
    """

    name: str
    ref: str
    config: type[RunConfig]
    plan: Callable[[Any], Sequence[Cell]]
    measure: Callable[[Any, Cell, Mapping[str, Any], OnProgress], Result]
    prepare: Callable[[Any, Sequence[Cell]], Mapping[str, Any]] = lambda config, cells: {}
    assist: Callable[[Any], bool] = lambda config: False
    check: Callable[[Any], None] = lambda config: None
    record: type[Envelope] = Record
    preload: Callable[[Any], Sequence[str]] = lambda config: ()
    expected: Callable[[Any], set[tuple[str, str]]] = lambda config: set()
    columns: Callable[[Sequence[Any]], Table] | None = None
    how_to_read: str = ""
    verdict: Callable[[Sequence[Any]], str] = lambda records: ""
    plots: Callable[[Sequence[Any]], Sequence[tuple[str, str]]] = lambda records: ()
    sections: Callable[[Sequence[Any]], Sequence[Section | None]] = lambda records: ()
    attached: Callable[[Sequence[Any], Path], Sequence[Section | None]] = lambda records, folder: ()
    pairs: Callable[[Sequence[Any], Mapping[str, Any]], Table | None] = lambda records, config: None
    highlights: Callable[[Sequence[Any]], Sequence[Highlight]] | None = None
    others: str = ""

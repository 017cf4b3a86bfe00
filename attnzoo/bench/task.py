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
    """One piece of work: an attention's cost at one workload, or its quality.

    Attributes
    ----------
    phases
        A cell gives a record per phase.
    depends_on
        All that its figures depend on, as plain data: a record of an earlier run is kept where this is the same.
    asks
        What the task's own `measure` wants to know besides, as plain data.
    stage
        What the progress bar calls work of this kind; stages come one after another.
    timeout
        Seconds after which it is ended; only of an isolated cell.
    threads
        Of PyTorch; None leaves its own choice.
    workers
        How many cells of its stage may run at a time.
    isolated
        Whether it runs in a process of its own.
    needs_baseline
        Whether it means nothing unless the quality of its part's dense baseline, that without a `workload`, could be
        measured. It is not measured where an earlier stage has shown that it could not.
    renewed
        Whether a record of an earlier run that depends on something else is measured again, rather than refused: of
        what was trained again, say.
    weight
        A guess at the time it takes, in arbitrary units, for the time left.
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
    """A task.

    Attributes
    ----------
    name
        As `attnzoo.tasks` and configs call it.
    ref
        Where it is, as ``module:NAME``, for the processes that do its work.
    config
        The class of its configs.
    plan
        Gives a config's cells in the order of measurement. A part's dense baseline comes first.
    measure
        Does a cell, given the config, the cell, what `prepare` gave and a function to say how far it is.
    prepare
        Given the config and the cells to do, gives plain data that all of them share; before any work.
    assist
        Does the part of a process that a launcher started beside the main one, and gives True; gives False in the main
        process, whose `measure` shares its work with the others. It is asked before anything else.
    check
        Finds what the schema cannot; raises `ConfigError`.
    record
        The class of its records.
    preload
        Gives the modules that its processes need, to be imported once for all.
    expected
        Gives part and label of the rows that the config expects to be unsupported.
    columns
        Gives the table of cost in place of the engine's own, for a task whose `record` has another cost.
    how_to_read
        What the columns of that table mean.
    verdict
        Gives what that table shows, in a sentence.
    plots
        Gives captions and pictures (SVG) to be shown after the engine's own.
    sections
        Gives further parts of the page.
    attached
        Gives those that come out of files beside the records, given the records and their folder.
    pairs
        Gives a table of rows set against each other, given the records and, as plain data, the config that says which.
    highlights
        Gives what the results page shows, in place of the engine's own, for a task whose `record` has another cost or
        whose rows stand in several columns.
    others
        What its records hold that is no method's, in words.
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

"""Files of records, written line by line into a folder that one run at a time holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Self, TypeVar

from attnzoo import files
from attnzoo.bench.jsonl import append_line, read_lines
from attnzoo.bench.record import FINAL, RECORDS_FILE, SCHEMA_VERSION, Envelope, Key
from attnzoo.errors import AttnZooError, ConfigError

R = TypeVar("R", bound=Envelope)


def read_records(path: Path, model: type[R]) -> list[R]:
    """Read a records file: the latest record of each row, in the order in which rows first appear.

    A last line that a killed writer left torn is dropped with a warning.

    Raises `AttnZooError` if the file is missing or any other line is not a record of this schema.
    """
    try:
        records = read_lines(path, model, SCHEMA_VERSION)
    except OSError as error:
        raise AttnZooError(f"records {str(path)!r} cannot be read: {error.strerror}") from error
    return latest(records)


def latest(records: Iterable[R]) -> list[R]:
    """Keep the last record of each row."""
    return list({record.key: record for record in records}.values())


@dataclass
class RecordStore(Generic[R]):
    """A folder that one process at a time writes records into.

    Use it as a context manager: it takes a lock that the system lets go when the process ends, however it ends, and
    reads what an earlier run left.

    `measured` gives, by the key of each row that will be asked for, what stands for all that its figures depend on.
    Records stay where theirs is the same, or the row is not asked for; any other makes the folder refused, but for rows
    among `renewed`, which are measured again. `changed` names the keys of the config that differ from the folder's, for
    the message. With `fresh`, earlier records are set aside, as ``records.old.jsonl``.
    """

    folder: Path
    model: type[R]
    config_hash: str
    measured: Mapping[Key, str] = field(default_factory=dict)
    fresh: bool = False
    changed: Callable[[], str] = lambda: ""
    renewed: Collection[Key] = ()
    records: dict[Key, R] = field(default_factory=dict, init=False)
    _lock: ExitStack = field(default_factory=ExitStack, init=False)

    @property
    def path(self) -> Path:
        """The file of the records."""
        return self.folder / RECORDS_FILE

    def __enter__(self) -> Self:
        with self._lock:
            self._lock.enter_context(files.locked(self.folder))
            self._load()
            self._lock = self._lock.pop_all()  # or leaving this block would let the lock go
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def append(self, record: R) -> None:
        """Put one record on disk, whole, before returning."""
        append_line(self.path, record)
        self.records[record.key] = record

    def done(self, key: Key) -> bool:
        """Whether a row needs no new measurement."""
        return key in self.records and self.records[key].status in FINAL

    def _load(self) -> None:
        if self.fresh and self.path.exists():
            os.replace(self.path, self.folder / "records.old.jsonl")
        if not self.path.exists():
            return
        records = latest(read_lines(self.path, self.model, SCHEMA_VERSION, mend=True, stacklevel=4))
        records = [r for r in records if r.key not in self.renewed or r.measured == self.measured.get(r.key)]
        records = [r for r in records if r.status in FINAL or self._valid(r)]  # others have no figures to lose
        other = next((record for record in records if not self._valid(record)), None)
        if other is not None:
            hashes = f"{other.config_hash}, this one is {self.config_hash}"
            told = f"of another config ({hashes}): {other.label} was measured by it{self.changed()}"
            if other.config_hash == self.config_hash:
                told = f"of this config, but {other.label} was measured when a file that it names held something else"
            raise ConfigError(
                f"{self.folder} holds records {told}. Give another folder with output=PATH, or set them aside with "
                "fresh=true."
            )
        self.records = {record.key: record for record in records}

    def _valid(self, record: R) -> bool:
        """Whether a record may stand beside those that this run will write."""
        asked = self.measured.get(record.key)
        if record.measured and asked is not None:
            return record.measured == asked
        return bool(record.measured) or record.config_hash == self.config_hash

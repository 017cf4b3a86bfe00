"""The record of the tasks that share the table of cost."""

from __future__ import annotations

from attnzoo.bench.record import Record as Measured
from attnzoo.tasks.classify.quality import Accuracy
from attnzoo.tasks.decode.quality import Perplexity, Retrieval


class Record(Measured):
    """A row whose quality is that of a classifier or a language model."""

    quality: Accuracy | Perplexity | Retrieval | None

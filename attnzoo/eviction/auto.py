"""Auto: for who does not want to choose, the recipe that lost least in attnzoo's own comparison.

Source: docs/eviction.md, "Which policy keeps most"; the records are docs/records/claims.jsonl and
docs/records/claims_reference.jsonl.

    CAOTE over H2O's attention per query that saw the entry; half the budget recent

Chosen on one text at budgets of 12.5 and 25%, confirmed on another; tests/test_docs.py holds it to these records. It
may become another recipe in a later version: name `caote` for one that stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.eviction.caote import Caote


@dataclass(frozen=True, kw_only=True)
class Auto(Caote):
    """`Caote` with its defaults, whose options it has."""

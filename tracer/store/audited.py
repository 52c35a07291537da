"""How many stored gradients were compared with those of an example that runs alone, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tracer.store.row_table import RowTable


@dataclass(frozen=True)
class AuditedShare:
    """The gradients of tables that were audited.

    Attributes:
        audited: The number of stored gradients whose example was run alone with the same result.
        stored: The number of stored gradients.

    >>> print(AuditedShare(300, 10_000))
    300 of 10,000 gradients, all right: at most 0.99 % are wrong (95 % confidence)
    """

    audited: int
    stored: int

    @classmethod
    def of(cls, tables: Iterable[RowTable]) -> AuditedShare:
        """Count the rows of tables, of which one at a time is read."""
        audited = stored = 0
        for table in tables:
            done = table.done
            audited += int(np.count_nonzero(done & table.column("audited")))
            stored += int(np.count_nonzero(done))
        return cls(audited, stored)

    @property
    def bound(self) -> float:
        """The share of wrong gradients that is not exceeded with 95 % confidence, ``1 - 0.05^(1 / audited)``.

        It holds if the audited examples are like the others; a wrong one that is found is mended or refused.
        """
        return 1.0 if not self.audited else 1.0 - 0.05 ** (1.0 / self.audited)

    def __str__(self) -> str:
        if not self.audited:
            return f"none of {self.stored:,} gradients"
        return (
            f"{self.audited:,} of {self.stored:,} gradients, all right: at most {100 * self.bound:.2g} % are wrong "
            f"(95 % confidence)"
        )

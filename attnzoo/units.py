"""Units of memory: MB is 10**6 bytes and MiB 2**20, as ISO/IEC 80000-13 has it. All that a reader sees is in MB."""

from __future__ import annotations

MB = 10**6
MIB = 2**20


def megabytes(count: int | None) -> str:
    """Write a number of bytes for a reader: ``1.23 MB``, ``12.3 MB``, ``123.4 MB``, ``1,234 MB``; a dash for None."""
    if count is None:
        return "-"
    figure = count / MB
    digits = 0 if figure >= 999.95 else 1 if figure >= 9.995 else 2  # where rounding gets to 1,000 and to 10
    return f"{figure:,.{digits}f} MB"

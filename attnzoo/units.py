"""Units of memory: MB is 10**6 bytes and MiB 2**20, as ISO/IEC 80000-13 has it. All that a reader sees is in MB."""

from __future__ import annotations

import re

from attnzoo.errors import OptionError, short

MB = 10**6
MIB = 2**20
_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


def megabytes(count: int | None) -> str:
    """Write a number of bytes for a reader: ``1.23 MB``, ``12.3 MB``, ``123.4 MB``, ``1,234 MB``; a dash for None."""
    if count is None:
        return "-"
    figure = count / MB
    digits = 0 if figure >= 999.95 else 1 if figure >= 9.995 else 2  # where rounding gets to 1,000 and to 10
    return f"{figure:,.{digits}f} MB"


def parse_bytes(name: str, text: str) -> int:
    """Read a number of bytes with its unit: ``64MiB``, ``1.5 GiB``, ``500MB``, ``300 kB``; kB may be written KB.

    Raises
    ------
    OptionError
        If `text`, the value of the option `name`, is anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = None if found is None else _UNITS.get("kB" if found[2] == "KB" else found[2])
    if found is None or unit is None:
        raise OptionError(
            f"{name} must be a number, or bytes with their unit, such as '64MiB' or '500 MB', not {short(text)}; the "
            f"units are {', '.join(_UNITS)}"
        )
    return int(float(found[1]) * unit)

"""Bytes in words."""

from __future__ import annotations

import re

from ..errors import ConfigError

UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def parse_bytes(text: str | int | float) -> int:
    """Read ``40GB``, ``40 gb``, ``40GiB``, ``4e10`` or a number.

    Raises:
        ConfigError: it is no size.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = repr(text)
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    try:
        if found is None or found[2] not in UNITS:
            raise ValueError
        size = int(float(found[1]) * UNITS[found[2]])
        if size <= 0:
            raise ValueError
        return size
    except (ValueError, OverflowError):
        raise ConfigError(f"memory={text!r} is no size; write 40GB (10^9 bytes each), 40GiB (2^30) or 4e10.") from None


def in_words(size: float) -> str:
    """A size in GB or MB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"

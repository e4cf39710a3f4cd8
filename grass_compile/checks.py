"""Checks of single values: each returns the value as it will be used, or raises a `ConfigError` that says what is wrong."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .errors import ConfigError

STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float64)


def nearest(word: str, words: Iterable[str]) -> str:
    """A "did you mean" for messages: `` Did you mean 'x'?`` or the full list when nothing is near."""
    words = list(words)
    close = difflib.get_close_matches(str(word), words, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Valid: {', '.join(map(repr, words))}."


def one_of(what: str, value: object, valid: tuple[str, ...]) -> Any:
    """Return ``value`` if it is one of ``valid``, else raise `ConfigError` naming the nearest valid one."""
    if not isinstance(value, str) or value not in valid:
        raise ConfigError(f"{what}={value!r} is not known.{nearest(str(value), valid)}")
    return value


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number (``True`` is not a number here)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def positive_int(what: str, value: Any) -> int:
    """Return ``value`` as an int if it is a whole number of at least 1."""
    if not is_whole(value) or int(value) < 1:
        raise ConfigError(f"{what} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def finite(what: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(float(value)):
        raise ConfigError(f"{what} must be a finite number, got {value!r}.")
    return float(value)


def boolean(what: str, value: object) -> bool:
    """Return ``value`` if it is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise ConfigError(f"{what} must be True or False, got {value!r}.")
    return value


@functools.lru_cache(maxsize=4096)
def matching(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern (``fnmatch``) that fits a parameter's name, or None; a leading dot lets ``*.head.weight`` fit
    ``head.weight``."""
    plain = name.replace("_orig_mod.", "")
    fits = (p for p in patterns if fnmatch.fnmatchcase(plain, p) or fnmatch.fnmatchcase(f".{plain}", p))
    return next(fits, None)


def name_patterns(what: str, value: Any) -> tuple[str, ...]:
    """Return ``value`` as a tuple if it is a list of name patterns. A string is refused, since each letter would be a pattern,
    and so is an iterator, which can be read only once."""
    patterns = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, Iterator)) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{what} must be a list of name patterns such as ['*lm_head*'], got {value!r}.")
    return patterns


def rank(what: str, value: Any) -> int | float | None:
    """Return a rank as an int (rows or columns), as a float (a fraction of the width), or None (dense)."""
    if value is None:
        return None
    if value == "full":
        raise ConfigError(f"{what}='full' is not available in this version. Give a number, a fraction of the width, or None.")
    if is_whole(value) and int(value) >= 1:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and 0 < float(value) < 1:
        return float(value)
    raise ConfigError(
        f"{what} must be a whole number of at least 1, a fraction of the width between 0 and 1, or None, got {value!r}."
    )


def rank_along(value: int | float, length: int) -> int:
    """The rank of a weight whose size along the axis is ``length``: a fraction is rounded, to at least 1; a number is clamped."""
    return min(value, length) if isinstance(value, int) else max(1, round(value * length))


def bool_or_count(what: str, value: object) -> bool | int:
    """Return ``value`` if it is ``True``, ``False`` or a whole number of at least 1."""
    return value if isinstance(value, bool) else positive_int(what, value)


def bool_or_auto(what: str, value: object) -> bool | str:
    """Return ``value`` if it is ``True``, ``False`` or ``"auto"``."""
    if not isinstance(value, bool) and value != "auto":
        raise ConfigError(f"{what} must be 'auto', True or False, got {value!r}.")
    return value


def max_norm(what: str, value: object) -> float | None:
    """Return ``value`` if it is None or a finite number above 0."""
    if value is not None and finite(what, value) <= 0:
        raise ConfigError(f"{what} must be above 0, got {value!r}.")
    return None if value is None else finite(what, value)


def state_dtype(what: str, value: object) -> torch.dtype | None:
    """Return ``value`` if moments can be of that dtype."""
    if value not in STATE_DTYPES:
        raise ConfigError(f"{what} must be one of {STATE_DTYPES}, got {value!r}.")
    return value


def seed(what: str, value: Any) -> int:
    """Return ``value`` as an int if it is a whole number; 0 for None."""
    if value is not None and not is_whole(value):
        raise ConfigError(f"{what} must be a whole number, got {value!r}.")
    return 0 if value is None else int(value)

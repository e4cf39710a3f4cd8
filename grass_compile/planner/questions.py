"""What a user wants to know of a device: the largest batch, sequence or rank that fits, and the best way to train that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..errors import ConfigError
from .models import load
from .plan import of_request
from .request import OTHERS, Request, width_of
from .result import Plan
from .sizes import parse_bytes

Quantity = Literal["batch", "seq", "rank"]

STEPS: dict[Quantity, int] = {"batch": 1, "seq": 128, "rank": 8}
"""In which a quantity is looked for."""

PREFERENCE: tuple[tuple[str, float], ...] = (
    ("Muon", 1 / 2),
    ("Muon", 1 / 4),
    ("AdamW", 1 / 4),
    ("AdamW8bit", 1 / 4),
    ("AdamW", 1 / 8),
    ("AdamW8bit", 1 / 8),
    ("AdamW8bit", 1 / 16),
)
"""Rules and shares of the width, the one that learns best first (``docs/choosing.md``)."""


def compare(request: Request, others: tuple[str, ...] = OTHERS) -> dict[str, Plan]:
    """The same model and batch under other methods, ours first, by name."""
    plans = {"grass": of_request(request)}
    rank = dict(request.keywords).get("rank")
    if isinstance(rank, float):
        rank = max(1, int(_width(request) * rank))
    keywords = (("rank", rank),) if rank is not None else ()
    return plans | {name: of_request(dataclasses.replace(request, optimizer=name, keywords=keywords)) for name in others}


def largest(request: Request, quantity: Quantity, memory: str | int | float) -> tuple[int, Plan] | None:
    """The largest ``quantity`` with which training fits, and its plan; None if even the smallest does not.

    Memory grows nearly linearly with each of them, so two plans say where to look; what is returned was planned, and so was the
    next larger one, which does not fit.

    Raises:
        ConfigError: ``memory`` is no size; nothing depends on ``quantity``.
    """
    limit, step = parse_bytes(memory), STEPS[quantity]

    def at(number: int) -> Plan:
        return of_request(_with(request, quantity, number * step))

    first = at(1)
    if first.peak_bytes > limit:
        return None
    slope = at(2).peak_bytes - first.peak_bytes
    if slope <= 0:
        raise ConfigError(f"the peak does not depend on {quantity}.")
    return _climb(at, max(1, 1 + (limit - first.peak_bytes) // slope), limit, step, _most(request, quantity))


def _climb(at: Callable[[int], Plan], guess: int, limit: int, step: int, most: int | None) -> tuple[int, Plan]:
    fits, fails = 1, most // step + 1 if most is not None else None
    guess = min(guess, fails - 1) if fails is not None else guess
    while fails is None or fails - fits > 1:
        plan = at(guess)
        if plan.peak_bytes <= limit:
            fits = guess
        else:
            fails = guess
        guess = fits + 1 if fails is None or guess == fits else fails - 1
        if fails is not None and not fits < guess < fails:
            break
    return fits * step, at(fits)


def _with(request: Request, quantity: Quantity, value: int) -> Request:
    if quantity != "rank":
        return dataclasses.replace(request, **{quantity: value})  # type: ignore[arg-type]
    return dataclasses.replace(request, keywords=tuple(sorted({**dict(request.keywords), "rank": value}.items())))


def _most(request: Request, quantity: Quantity) -> int | None:
    return _width(request) if quantity == "rank" else None


def _width(request: Request) -> int:
    return width_of(load(request.model, None, False))


def best(request: Request, memory: str | int | float) -> tuple[Plan, int] | None:
    """The first of `PREFERENCE` that fits, and its rank; None if none does.

    Raises:
        ConfigError: ``memory`` is no size.
    """
    limit = parse_bytes(memory)
    for plan, rank in _preferred(request):
        if plan.peak_bytes <= limit:
            return plan, rank
    return None


def _preferred(request: Request) -> Iterator[tuple[Plan, int]]:
    width = _width(request)
    rest: dict[str, Any] = {name: value for name, value in request.keywords if name != "rank"}
    for name, share in PREFERENCE:
        rank = max(1, int(width * share))
        keywords = tuple(sorted({**rest, "rank": rank}.items()))
        yield of_request(dataclasses.replace(request, optimizer=name, keywords=keywords)), rank

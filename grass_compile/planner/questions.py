"""What a user wants to know of a device: the largest batch, sequence or rank that fits, and the best way to train that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..checks import rank_along
from ..errors import ConfigError
from .models import load
from .plan import of_request
from .request import OTHERS, Request, width_of
from .result import Plan
from .sizes import parse_bytes

Quantity = Literal["batch", "seq", "rank"]

STEPS: dict[Quantity, int] = {"batch": 1, "seq": 128, "rank": 8}
"""In which a quantity is looked for."""

FAR = 2**24
"""No quantity is looked for beyond so many steps."""

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
    keywords = (("rank", rank),) if rank is not None else ()
    return plans | {name: of_request(dataclasses.replace(request, optimizer=name, keywords=keywords)) for name in others}


def largest(request: Request, quantity: Quantity, memory: str | int | float) -> tuple[int, Plan] | None:
    """The largest ``quantity`` with which training fits, and its plan; None if even the smallest does not.

    Two plans say where to look if memory grows linearly; from there on the strides double. What is returned was planned, and so
    was the next larger one, which does not fit, unless the rank is the width already.

    Raises:
        ConfigError: ``memory`` is no size; the peak does not depend on ``quantity``.
    """
    limit, step, most = parse_bytes(memory), STEPS[quantity], _most(request, quantity)

    def at(number: int) -> Plan:
        return of_request(_with(request, quantity, number * step))

    first = at(1)
    if first.peak_bytes > limit:
        return None
    slope = at(2).peak_bytes - first.peak_bytes if most is None or most >= 2 else 0
    guess = 1 + (limit - first.peak_bytes) // slope if slope > 0 else 2
    return _search(at, limit, step, guess, most if most is not None else FAR, most is not None)


def _search(at: Callable[[int], Plan], limit: int, step: int, guess: int, most: int, bounded: bool) -> tuple[int, Plan]:
    """From ``guess`` in strides that double, until one fits and another does not; then between these."""
    fits, fails = 1, most + 1
    probe, stride = min(max(2, guess), most), 1
    while fails - fits > 1:
        if at(probe).peak_bytes <= limit:
            fits = probe
        else:
            fails = probe
        if fails > most or fits == 1:  # only one side of it is known
            probe = fits + stride if fails > most else fails - stride
            stride *= 2
        else:
            probe = (fits + fails) // 2
        probe = min(max(probe, fits + 1), fails - 1)
    if fits == most and not bounded:
        raise ConfigError(f"even {fits * step} fits: the peak does not depend on it.")
    return fits * step, at(fits)


def _with(request: Request, quantity: Quantity, value: int) -> Request:
    if quantity != "rank":
        return dataclasses.replace(request, **{quantity: value})  # type: ignore[arg-type]
    return dataclasses.replace(request, keywords=tuple(sorted({**dict(request.keywords), "rank": value}.items())))


def _most(request: Request, quantity: Quantity) -> int | None:
    return _width(request) // STEPS["rank"] if quantity == "rank" else None


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
        rank = rank_along(share, width)
        keywords = tuple(sorted({**rest, "rank": rank}.items()))
        yield of_request(dataclasses.replace(request, optimizer=name, keywords=keywords)), rank

"""When a weight chooses new rows, and what its steps are counted as: pure functions of whole numbers."""

from __future__ import annotations


def offset(number: int, count: int, gap: int, slots: int) -> int:
    """Steps by which the refreshes of one weight, but for its first, come early.

    Args:
        number: which of the optimizer's parameters it is.
        count: how many the optimizer has.
        gap: steps between refreshes.
        slots: into how many parts the interval is divided; 1 for all weights at once.
    """
    return number * slots // count * gap // slots if slots > 1 else 0


def since_refresh(updates: int, offset: int, gap: int) -> int:
    """Updates since the last refresh, the next one not included; 0 if the next one is a refresh."""
    return min(updates, (updates + offset) % gap)


def is_due(updates: int, offset: int, gap: int, ahead: bool) -> bool:
    """Whether the next backward has to choose new rows.

    Args:
        updates: how many the weight has had.
        offset: see `offset`.
        gap: steps between refreshes.
        ahead: whether rows are proposed one step before they serve, rather than in the step that they serve first.
    """
    if ahead:
        return updates == 0 or since_refresh(updates + 1, offset, gap) == 0
    return since_refresh(updates, offset, gap) == 0


def seed_of(seed: int, updates: int) -> int:
    """The seed of one step's rounding: below ``2**23``, so that fp32 holds it and its successor exactly."""
    return (seed * 2654435761 + (updates + 1) * 40503 * 2 + (updates >> 7) * 7919) % 2**23

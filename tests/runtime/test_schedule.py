"""When weights choose new rows: the functions of counts, against counting."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from grass_compile.runtime import schedule

GAPS, SLOTS = st.integers(1, 40), st.integers(1, 40)


@given(gap=GAPS, offset=st.integers(0, 39), ahead=st.booleans())
def test_a_weight_refreshes_first_and_then_once_in_a_gap(gap: int, offset: int, ahead: bool) -> None:
    offset %= gap
    due = [updates for updates in range(4 * gap + 1) if schedule.is_due(updates, offset, gap, ahead)]
    assert due[0] == 0
    later = [updates for updates in due if updates > 0]
    assert all(b - a == gap for a, b in itertools.pairwise(later))
    assert later and later[0] <= gap, "no weight keeps its rows for longer than a gap"


@given(gap=GAPS, offset=st.integers(0, 39))
def test_updates_since_a_refresh_count_from_it(gap: int, offset: int) -> None:
    offset, since = offset % gap, None
    for updates in range(3 * gap):
        since = 0 if since is None or schedule.is_due(updates, offset, gap, False) else since + 1
        assert schedule.since_refresh(updates, offset, gap) == since


@given(count=st.integers(1, 300), gap=GAPS, slots=SLOTS)
def test_staggered_weights_spread_evenly(count: int, gap: int, slots: int) -> None:
    slots = min(slots, gap)
    offsets = [schedule.offset(number, count, gap, slots) for number in range(count)]
    assert offsets == sorted(offsets) and offsets[0] == 0 and max(offsets) < gap
    sizes = [offsets.count(offset) for offset in set(offsets)]
    assert len(sizes) <= slots and max(sizes) - min(sizes) <= -(-count // slots)
    if slots == 1:
        assert set(offsets) == {0}


@given(seed=st.integers(0, 2**31), updates=st.integers(0, 10**6))
def test_seeds_are_exact_in_fp32(seed: int, updates: int) -> None:
    value = schedule.seed_of(seed, updates)
    assert 0 <= value < 2**23 and value != schedule.seed_of(seed, updates + 1)

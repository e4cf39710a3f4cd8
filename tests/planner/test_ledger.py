"""Which storage lives when."""

from __future__ import annotations

import torch

from grass_compile.planner.ledger import Ledger


def test_a_peak_is_the_most_that_lives_at_once() -> None:
    ledger = Ledger(rounding=1)
    first = torch.empty(100, dtype=torch.uint8)
    ledger.see(first, "parameters", "a")
    start = ledger.now
    second = torch.empty(30, dtype=torch.uint8)
    ledger.see(second)
    del second
    third = torch.empty(20, dtype=torch.uint8)
    ledger.see(third)
    end = ledger.now
    peak = ledger.peak(start, end - 1)
    assert peak.bytes == 130
    assert {kind: size for kind, size in peak.kinds.items() if size} == {"parameters": 100, "temporary": 30}
    assert peak.owners == {"a": {"parameters": 100}, "": {"temporary": 30}}
    assert ledger.peak(end - 1, end - 1).bytes == 120


def test_what_lives_before_the_first_event_counts() -> None:
    """Also where nothing happens at all, and where the first thing that happens is a release."""
    ledger = Ledger(rounding=1)
    tensors = [torch.empty(size, dtype=torch.uint8) for size in (100, 7)]
    for tensor in tensors:
        ledger.see(tensor)
    del tensor
    start = ledger.now
    assert ledger.peak(start, start - 1).bytes == 107
    tensors.clear()
    assert ledger.peak(start, start - 1).bytes == ledger.peak(start, ledger.now).bytes == 107


def test_views_are_one_storage_and_a_later_kind_holds_from_the_beginning() -> None:
    ledger = Ledger(rounding=1)
    base = torch.empty(64, dtype=torch.uint8)
    ledger.see(base)
    ledger.see(base[3:5], "dense gradients")
    assert len(ledger.storages) == 1
    assert ledger.peak(0, ledger.now).kinds["dense gradients"] == 64


def test_rounding_is_slack() -> None:
    ledger = Ledger(rounding=512)
    kept = [torch.empty(size, dtype=torch.uint8) for size in (1, 512, 513)]
    for tensor in kept:
        ledger.see(tensor)
    peak = ledger.peak(0, ledger.now)
    assert (peak.bytes, peak.slack) == (1026, 511 + 511)


def test_what_the_forward_leaves_is_saved() -> None:
    ledger = Ledger(rounding=1)
    weight, activation = (torch.empty(10, dtype=torch.uint8) for _ in range(2))
    ledger.see(weight, "parameters")
    ledger.see(activation)
    assert ledger.saved() == 10
    later = torch.empty(5, dtype=torch.uint8)
    ledger.see(later)
    assert ledger.peak(0, ledger.now).kinds["saved activations"] == 10
    assert ledger.peak(0, ledger.now).kinds["temporary"] == 5

"""Several processes against one, and how many numbers they send."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import torch

from .ranks import Ranks, result_of
from .training import HIDDEN, PROJECTED, RANK, WIDTH, Outcome, Training, train

SHAPES = 2 * [(WIDTH, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]
COMPACT = {"columns": sum(m * RANK for m, _ in SHAPES), "rows": sum(n * RANK for _, n in SHAPES)}
SCORES = {"columns": sum(n for _, n in SHAPES), "rows": sum(m for m, _ in SHAPES)}


def how(**keywords: Any) -> tuple[tuple[str, Any], ...]:
    """Keywords, for a `Training`."""
    return tuple(keywords.items())


def compare(ranks: Ranks, training: Training) -> Outcome:
    """Train on all ranks and on one process: all ranks end with the same bits, and near the one. Returns what the first has."""
    outcomes: list[Outcome] = result_of(ranks(train, training))
    alone = train(training, distributed=False)
    first = outcomes[0]
    for other in outcomes[1:]:
        for found, expected in ((other.weights, first.weights), (other.rows, first.rows)):
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    excluded = dict(training.how).get("exclude", ())
    projected = {name for name in PROJECTED if not any(fnmatch(f"{name}.weight", pattern) for pattern in excluded)}
    assert first.rows.keys() == alone.rows.keys() and {name.rpartition(".")[0] for name in alone.rows} == projected
    for name, rows in alone.rows.items():  # whole numbers, but for a basis
        tolerance = 1e-4 if rows.is_floating_point() else 0
        torch.testing.assert_close(first.rows[name], rows, rtol=tolerance, atol=tolerance)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(
            first.weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    return first

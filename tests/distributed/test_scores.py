"""Rows chosen by sampled and estimated scores, under each parallelism: those that one process chooses on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest

from grass_compile.ops.scores import SKETCH

from ..pairs import every_value
from .compare import COMPACT, SCORES, SHAPES, compare, how
from .ranks import Ranks
from .test_ddp import DENSE
from .training import Training

PARALLELISMS: dict[str, Any] = {
    "ddp": {},
    "fsdp": {"place": "blocks", "mesh": (2,)},
    "tensor": {"place": "model", "tensor": 2},
}


def training_of(parallelism: str, axis: str, **keywords: Any) -> Training:
    """Of its own axes under tensor parallelism, where some weights take rows."""
    more = {} if parallelism == "tensor" else {"axis": axis}
    shard = {"fsdp": how(dim=int(axis == "rows"))} if parallelism == "fsdp" else {}
    return Training(how(**more, **keywords), **PARALLELISMS[parallelism], **shard)


@every_value(
    parallelism=PARALLELISMS,
    axis=["rows", "columns"],
    scores=["estimate", "sampled"],
    selection=["norm", "top"],
    mode=[True, "auto", False],
)
def test_ranks_are_one_process(ranks: Ranks, parallelism: str, axis: str, scores: str, selection: str, mode: Any) -> None:
    """Each rank has 24 tokens, so that every eighth of its own are every eighth of all."""
    compare(ranks, training_of(parallelism, axis, scores=scores, selection=selection, step_in_backward=mode))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_what_is_sent(ranks: Ranks, axis: str) -> None:
    """With estimates, the step before a refresh sends sketches and scores too, and others do not."""
    found = compare(ranks, training_of("ddp", axis, scores="estimate", selection="top"))
    sketches = SKETCH * SCORES[axis] if axis == "rows" else 0
    before_a_refresh, after = found.regular, found.refresh  # the last step is the first of new rows
    assert before_a_refresh == {"_c10d_functional": COMPACT[axis] + SCORES[axis] + sketches, "c10d": DENSE}
    assert after == {"_c10d_functional": COMPACT[axis], "c10d": DENSE}


def test_what_a_sample_sends(ranks: Ranks) -> None:
    """A product of the sampled tokens is as large as that of all."""
    found = compare(ranks, training_of("ddp", "columns", scores="sampled", selection="top"))
    assert found.regular["_c10d_functional"] == COMPACT["columns"] + SCORES["columns"] + sum(m * n for m, n in SHAPES)


@pytest.mark.parametrize(
    ("scores", "mesh", "tensor"),
    [
        pytest.param("estimate", (2,), 2, marks=pytest.mark.exhaustive),
        pytest.param("sampled", (2,), 2, marks=pytest.mark.exhaustive),
        pytest.param("estimate", (2, 2), 1, marks=pytest.mark.exhaustive),
    ],
)
def test_four_ranks(four: Ranks, scores: str, mesh: tuple[int, ...], tensor: int) -> None:
    """Parts of what tensor parallelism has taken apart already, and replicas of parts. (Four times 12 tokens have another sample
    than 48.)"""
    training = Training(how(scores=scores, selection="top"), place="blocks", mesh=mesh, tensor=tensor, world=4)
    compare(four, training)


@pytest.mark.parametrize("scores", ["estimate", "sampled"])
def test_columns_in_common(ranks: Ranks, scores: str) -> None:
    compare(ranks, training_of("ddp", "columns", scores=scores, selection="top", share_index=True))

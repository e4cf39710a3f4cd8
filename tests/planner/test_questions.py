"""The largest batch, the largest rank, the best rule that fits."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from grass_compile import ConfigError
from grass_compile.planner import questions
from grass_compile.planner.request import Request
from grass_compile.planner.result import Plan
from grass_compile.planner.sizes import in_words, parse_bytes

REQUEST = Request(nn.Linear(64, 64), 1, 128, "AdamW", None, "cpu", "whole", keywords=(("rank", 8),))
COSTS = {"Muon": 1, "AdamW": 2, "AdamW8bit": 0.5}


def invented(request: Request) -> Plan:
    """Bytes that grow with everything, and a little faster than a line."""
    rank = dict(request.keywords)["rank"]
    size = 1000 + 10 * request.batch * request.seq + request.batch**2 + int(100 * rank * COSTS[str(request.optimizer)])
    return Plan("invented", str(request.optimizer), {}, 1, size, "", {}, (), 0, {})


@pytest.fixture(autouse=True)
def _invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "of_request", invented)


@pytest.mark.parametrize("memory", [5_000, 10_000, 123_456, 1_000_000])
@pytest.mark.parametrize("quantity", ["batch", "seq", "rank"])
def test_the_largest_fits_and_the_next_does_not(quantity: questions.Quantity, memory: int) -> None:
    found = questions.largest(REQUEST, quantity, memory)
    assert found is not None
    step = questions.STEPS[quantity]
    assert found[0] % step == 0 and found[1].peak_bytes <= memory
    larger = invented(questions._with(REQUEST, quantity, found[0] + step))
    assert larger.peak_bytes > memory or (quantity == "rank" and found[0] == 64)


@pytest.mark.parametrize("memory", [10**6, 10**7 + 3, 10**9])
def test_a_peak_that_is_flat_at_first(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of the optimizer is the peak until the batch is large: two plans say nothing, and a few more everything."""
    asked = []

    def flat(request: Request) -> Plan:
        asked.append(request.batch)
        return dataclasses.replace(invented(REQUEST), peak_bytes=max(500_000, 1000 * request.batch))

    monkeypatch.setattr(questions, "of_request", flat)
    found = questions.largest(REQUEST, "batch", memory)
    assert found is not None and found[0] == memory // 1000
    assert len(asked) < 50


def test_what_the_peak_does_not_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "of_request", lambda request: invented(REQUEST))
    with pytest.raises(ConfigError, match="does not depend"):
        questions.largest(REQUEST, "batch", "1GB")


def test_nothing_fits() -> None:
    assert questions.largest(REQUEST, "batch", 1000) is None
    assert questions.best(REQUEST, 1000) is None


def test_the_best_that_fits_is_the_first_by_preference() -> None:
    roomy, tight = questions.best(REQUEST, "1MB"), questions.best(REQUEST, 1000 + 1280 + 1 + 1000)
    assert roomy is not None and (roomy[0].method, roomy[1]) == ("Muon", 32)
    assert tight is not None and (tight[0].method, tight[1]) == ("AdamW8bit", 16)


@pytest.mark.parametrize(
    ("text", "size"),
    [("40GB", 40 * 10**9), ("40 gb", 40 * 10**9), ("40GiB", 40 * 2**30), ("4e10", 4 * 10**10), ("1.5 MiB", 3 * 2**19), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "40 parsecs", "-3GB", "0", "1.2.3GB", "nan", True])
def test_what_is_no_size(text: str | bool) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_bytes(text)


def test_words() -> None:
    assert in_words(32_200_000_000) == "32.20 GB" and in_words(1_500_000) == "1.5 MB"

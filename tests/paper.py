"""The optimizers with the paper's recipe and the step in the backward: what most tests compare with an oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import grass_compile

PAPER: dict[str, Any] = dict(preset="paper", axis="auto", step_in_backward=True, weight_decay=0.0)
"""What they are given; whatever a test gives goes before it."""

OPTIONS: dict[str, Any] = dict(preset="paper", axis="auto")
"""The like of it for ``options={"rank": ...}``."""

Made = TypeVar("Made")


def as_in_the_paper(make: Callable[..., Made]) -> Callable[..., Made]:
    """``make``, with `PAPER`."""

    @functools.wraps(make, updated=())
    def made(*args: Any, **keywords: Any) -> Made:
        return make(*args, **{**PAPER, **keywords})

    return made


AdamW = as_in_the_paper(grass_compile.AdamW)
AdamW8bit = as_in_the_paper(grass_compile.AdamW8bit)
Adafactor = as_in_the_paper(grass_compile.Adafactor)
Apollo = as_in_the_paper(grass_compile.Apollo)
Lion = as_in_the_paper(grass_compile.Lion)
Muon = as_in_the_paper(grass_compile.Muon)
Optimizer = as_in_the_paper(grass_compile.Optimizer)
SGD = as_in_the_paper(grass_compile.SGD)
Sketchy = as_in_the_paper(grass_compile.Sketchy)

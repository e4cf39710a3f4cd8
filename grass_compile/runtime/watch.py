"""``step_in_backward="auto"``: a loop proves that its weights may move inside the backward, and is deferred until then.

Before a backward nobody can know what the script will do *after* it: read, clip, scale or replace a gradient, write another
learning rate, drop the step. So the first steps are deferred and watched. When `CLEAN_STEPS` of them have gone by without any of
this, the weights move inside the backward; a loop that does any of it once is deferred for good. (Everything that can be known
before a backward is decided there, for each weight: `grass_compile.runtime.call`.)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Literal

from .moved import MovedGrad
from .parameter import ProjectedParameter

log = logging.getLogger(__name__)

Mode = Literal["auto"] | bool

CLEAN_STEPS = 2
"""Steps that are watched before the first one that is fused."""


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Where projected weights move, and why. True if it is inside the backward.

    Attributes:
        active: whether it is.
        reason: why, or why not (yet).
    """

    active: bool
    reason: str

    def __bool__(self) -> bool:
        return self.active

    def __str__(self) -> str:
        return f"inside the backward: {self.reason}" if self.active else f"in opt.step(): {self.reason}"


class LoopWatch:
    """The watch over a loop, and its verdict so far.

    Attributes:
        mode: ``step_in_backward`` as the optimizer was given it.
        watching: whether anything that the loop does still matters.
    """

    def __init__(self, mode: Mode) -> None:
        self.set_mode(mode)

    def set_mode(self, mode: Mode) -> None:
        """Begin anew."""
        self.mode: Mode = mode
        self._clean = 0
        self._failure: str | None = None

    @property
    def watching(self) -> bool:
        return self.mode == "auto" and self._failure is None

    @property
    def status(self) -> Fusion:
        """Where the weights move at the next backward."""
        if isinstance(self.mode, bool):
            return Fusion(self.mode, f"step_in_backward={self.mode}")
        if self._failure is not None:
            return Fusion(False, self._failure)
        if self._clean < CLEAN_STEPS:
            return Fusion(False, f"the loop is watched for {CLEAN_STEPS} steps, {self._clean} have passed")
        return Fusion(True, f"{CLEAN_STEPS} steps have passed in which nobody touched a gradient")

    def failed(self, reason: str) -> None:
        """Note that the loop did something for which its steps have to wait."""
        if self.watching:
            self._failure = reason
            log.info("weights move in opt.step(), not inside the backward: %s", reason)

    def passed(self) -> None:
        """Note that a step has gone by."""
        if self.watching and self._clean < CLEAN_STEPS:
            self._clean += 1
            if self._clean == CLEAN_STEPS:
                log.info("weights move inside the backward from now on: %s", self.status.reason)

    def before_backward(self, records: Iterable[ProjectedParameter], again: bool) -> None:
        """Look at what the script has done since the last backward.

        Args:
            records: what the optimizer manages.
            again: whether that backward too came after the last ``opt.step()``, and not under ``opt.accumulate()``.
        """
        if not self.watching:
            return
        held = [record for record in records if record.chosen is not None]
        if held and again:
            lost = any(record.gradient is None for record in held)
            dropped = "gradients were dropped without opt.step()"
            self.failed(dropped if lost else "several backwards come before one opt.step()")
        if any(record.waits and record.chosen is None for record in records):
            self.failed("gradients are not cleared after opt.step()")

    def look_back(self, records: Iterable[ProjectedParameter]) -> None:
        """At ``opt.step()``, look at what the script has done to weights and gradients since the backward."""
        if not self.watching:
            return
        for record in records:
            gradient = record.gradient
            if record.chosen is None:
                if record.assigned is not None and gradient is not None and not isinstance(gradient, MovedGrad):
                    self.failed(f"{record.label} gets its gradient from outside of its compiled region")
            elif gradient is None or record.delivered is None or record.delivered() is not gradient:
                self.failed("gradients are replaced or dropped between backward() and opt.step()")
            elif record.seen != record.look():
                self.failed("weights are written between backward() and opt.step()")

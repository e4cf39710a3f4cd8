"""``step_in_backward="auto"``: a loop proves that its weights may move inside the backward, and is deferred until then.

Before a backward nobody can know what the script will do *after* it: read, clip, scale or replace a gradient, write another
learning rate, drop the step. So the first steps are deferred and watched. When `CLEAN_STEPS` of them have gone by without any of
this, the weights move inside the backward; a loop that does any of it once is deferred for good. (Everything that can be known
before a backward is decided there, for each weight: `grass_compile.runtime.call`.)
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

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

"""What a sequence is, and the list of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from grass_compile.conformance.loop import Evidence, Loop

Play = Callable[[Loop, Loop], Evidence]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A training loop with something in it, and the plain loop that is equal to it.

    Attributes:
        name: the function's, with spaces.
        play: takes the loop under test and the one that does right; returns what came out beside what is right.
        exact: the right one is the same optimizer, uninterrupted, and must be met bit for bit.
        isolated: what goes wrong in it can hang a process, or leave it unfit for the next one.
    """

    name: str
    play: Play
    exact: bool = False
    isolated: bool = False

    @property
    def right(self) -> str:
        """The first paragraph of the docstring: what is right."""
        return " ".join((self.play.__doc__ or "").split("\n\n")[0].split())


SEQUENCES: dict[str, Sequence] = {}


def sequence(play: Play) -> Play:
    """Register a sequence whose oracle is a plain loop that is handed the right gradients, met up to rounding."""
    return _register(play)


def exact_sequence(play: Play) -> Play:
    """Register a sequence whose oracle is the same optimizer in a run that was never interrupted, met bit for bit."""
    return _register(play, exact=True)


def isolated_sequence(play: Play) -> Play:
    """Register a sequence as `sequence` does, to be run in a process of its own."""
    return _register(play, isolated=True)


def _register(play: Play, exact: bool = False, isolated: bool = False) -> Play:
    name = play.__name__.replace("_", " ")
    SEQUENCES[name] = Sequence(name, play, exact, isolated)
    return play

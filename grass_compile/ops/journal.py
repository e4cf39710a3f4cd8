"""A record of what the compiled code of this thread has written, in case it breaks off.

A backward that raises (out of memory, Ctrl-C) has moved some weights and not others, and nobody but the operators that write
knows which. They note it here; whoever runs the compiled code opens a journal around it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor


class Journal:
    """Addresses of what was written, one list for each kind of write."""

    __slots__ = ("_busy", "_handler", "_interrupt", "refreshed", "stepped")

    def __init__(self) -> None:
        self.stepped: set[int] = set()
        """Weights whose step is complete."""
        self.refreshed: set[int] = set()
        """Indices that were chosen anew, along with the state that goes with them."""
        self._busy = False
        self._handler: Any = None
        self._interrupt: tuple[Any, ...] | None = None

    def begin(self) -> None:
        """A write begins, and Ctrl-C has to wait."""
        self._busy = True

    def end(self) -> None:
        """It has ended. Ctrl-C, if there was one, comes now."""
        self._busy = False
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            self._handler(*interrupt)

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Inside, Ctrl-C waits for the end of a write. (Python runs signal handlers in the main thread alone.)"""
        if threading.current_thread() is not threading.main_thread() or not callable(handler := signal.getsignal(signal.SIGINT)):
            yield
            return
        self._handler = handler
        signal.signal(signal.SIGINT, self._caught)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def _caught(self, *interrupt: Any) -> None:
        if self._busy:
            self._interrupt = interrupt
        else:
            self._handler(*interrupt)


_open = threading.local()


@contextlib.contextmanager
def recording() -> Iterator[Journal]:
    """Inside, writes of this thread go to the journal that is returned."""
    outer = getattr(_open, "journal", None)
    journal = _open.journal = Journal()
    try:
        with journal.catching():
            yield journal
    finally:
        _open.journal = outer


@contextlib.contextmanager
def writing(target: Tensor, kind: Literal["stepped", "refreshed"]) -> Iterator[None]:
    """Around a write that happens as a whole or raises and has written nothing (`grass_compile.passes.kernel`); it is noted once
    it is complete. Ctrl-C waits until then.

    Args:
        target: what is written; its address is noted.
        kind: the list that it goes to.
    """
    journal: Journal | None = getattr(_open, "journal", None)
    if journal is None:
        yield
        return
    journal.begin()
    try:
        yield
        getattr(journal, kind).add(target.data_ptr())
    finally:
        journal.end()

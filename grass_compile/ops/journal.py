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

    __slots__ = ("refreshed", "stepped")

    def __init__(self) -> None:
        self.stepped: set[int] = set()
        """Weights whose step is complete."""
        self.refreshed: set[int] = set()
        """Indices that were chosen anew, along with the state that goes with them."""


_open = threading.local()


@contextlib.contextmanager
def recording() -> Iterator[Journal]:
    """Inside, writes of this thread go to the journal that is returned."""
    outer = getattr(_open, "journal", None)
    journal = _open.journal = Journal()
    try:
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
    with uninterrupted():
        yield
        getattr(journal, kind).add(target.data_ptr())


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits. (Only the main thread is ever interrupted.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler if handler is not None else signal.SIG_DFL)
    if waiting and callable(handler):
        handler(*waiting[0])

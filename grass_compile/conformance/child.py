"""Run a function in a process of its own, so that what hangs or dies there does so alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")


class ChildError(RuntimeError):
    """The process came to no result."""


def in_child(function: Callable[[], T], timeout: float = 600.0) -> T:
    """Call ``function`` in a forked copy of this process, or in this one where there is no fork.

    Args:
        function: its result must be picklable.
        timeout: seconds.

    Raises:
        ChildError: the process died, or was killed since it took longer than ``timeout``.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return function()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            raise ChildError(f"it came to no end within {timeout:.0f} s")
        return cast(T, here.recv())
    except EOFError:
        process.join()
        raise ChildError(f"the process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send(function: Callable[[], Any], there: Connection) -> None:
    torch.set_num_threads(torch.get_num_threads())  # torch makes its pool anew after a fork, and two threads at once get none
    there.send(function())

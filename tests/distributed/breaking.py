"""A rank that breaks off in the middle of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from torch.utils._python_dispatch import TorchDispatchMode


class OnPurpose(Exception):
    """Raised by a rank in the middle of a step."""


def raise_on_purpose() -> NoReturn:
    raise OnPurpose


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class AtCollective(TorchDispatchMode):
    """Calls a function before a collective of compiled regions."""

    def __init__(self, number: int, act: Callable[[], Any]) -> None:
        super().__init__()
        self.left, self.act = number, act

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "_c10d_functional" and "wait" not in function._schema.name:
            self.left -= 1
            if not self.left:
                self.act()
        return function(*args, **(kwargs or {}))

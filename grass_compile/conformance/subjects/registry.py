"""The list of all optimizers under test, and how one gets onto it."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from grass_compile.conformance.loop import Subject, trainable

SUBJECTS: dict[str, Subject] = {}
Build = Callable[[nn.Module], Any]


def subject(name: str, **attributes: Any) -> Callable[[Build], Build]:
    """Register the function below as an optimizer's constructor.

    Args:
        name: ``family.Class`` or ``family.Class, mode``.
        **attributes: those of `Subject`.
    """

    def register(build: Build) -> Build:
        SUBJECTS[name] = Subject(name, build, **attributes)
        return build

    return register


def select(patterns: Sequence[str]) -> list[Subject]:
    """The subjects whose names match one of the patterns, all of them if there are none.

    ``module:Class`` is an optimizer of the caller's own, built as ``Class(parameters, lr=0.01)``.

    Raises:
        ValueError: nothing has such a name; the message lists those that there are.
    """
    chosen: dict[str, Subject] = {}
    for pattern in patterns or ("*",):
        if ":" in pattern:
            found = [own(pattern)]
        else:
            found = [SUBJECTS[name] for name in fnmatch.filter(SUBJECTS, pattern)]
            found = found or [SUBJECTS[name] for name in SUBJECTS if name.startswith(pattern)]
        if not found:
            raise ValueError(f"no optimizer is called {pattern!r}; there are: {', '.join(SUBJECTS)}, or module:Class for another")
        chosen |= {one.name: one for one in found}
    return list(chosen.values())


def package(module: str) -> Any:
    """Import a module that may not be installed, and of which no types are known."""
    return importlib.import_module(module)


def own(path: str) -> Subject:
    """An optimizer that is no part of this suite, from ``module:Class``."""
    module, _, name = path.partition(":")

    def build(net: nn.Module) -> Any:
        return getattr(package(module), name)(trainable(net), lr=1e-2)

    return Subject(f"{module}.{name}", build, package=module.partition(".")[0])

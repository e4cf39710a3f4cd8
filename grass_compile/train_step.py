"""``@grass_compile.train_step(opt)``: a function that returns a loss becomes a compiled training step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _aot
from .checks import positive_int
from .errors import ConfigError, NonFiniteError
from .optim.base import GrassOptimizer

P = ParamSpec("P")
R = TypeVar("R")


def train_step(
    optimizer: torch.optim.Optimizer, *, accumulate: int = 1, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn a function that returns a loss into a step: forward, backward, update, ``zero_grad``.

    Example::

        @grass_compile.train_step(opt)
        def step(x, y):
            return F.cross_entropy(model(x), y)

        for x, y in loader:
            loss = step(x, y)

    Args:
        optimizer: a grass optimizer, or one of torch's with ``options={"rank": ...}``.
        accumulate: calls per update; each call is a micro-batch whose loss counts ``1 / accumulate``.
        options: same as in ``torch.compile(..., backend="grass", options=...)``.
        mode: same as in ``torch.compile``.

    Returns:
        A decorator. The function that it makes takes the same arguments and returns the same values, detached; ``loss`` as the
        function computed it.

    Raises:
        ConfigError: ``accumulate`` is not a positive whole number, or (when called) the function returned neither a scalar loss
            nor a tuple that begins with one.
        NonFiniteError: (when called) as ``optimizer.step()``; the gradients are cleared, and the next call starts afresh.
    """
    count = positive_int("accumulate", accumulate)
    keywords: dict[str, Any] = {"options": dict(options)} if options else {"mode": mode} if mode else {}
    if options and mode:
        keywords = {"options": {**options, "mode": mode}}

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled = torch.compile(function, backend="grass", **keywords)
        calls = 0

        @functools.wraps(function)
        def step(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal calls
            last = (calls + 1) % count == 0
            waits = isinstance(optimizer, GrassOptimizer) and not last
            with optimizer.accumulate() if waits else contextlib.nullcontext():  # type: ignore[attr-defined]
                returned = compiled(*args, **kwargs)
                loss = _loss_of(returned, function)
                (loss / count if count > 1 else loss).backward()
            calls += 1
            if last:
                try:
                    optimizer.step()
                except NonFiniteError:
                    optimizer.zero_grad()  # the next call starts afresh
                    raise
                optimizer.zero_grad()
            detached: R = _aot.tree_map_only(Tensor, Tensor.detach, returned)
            return detached

        return step

    return decorate


def _loss_of(returned: Any, function: Callable[..., Any]) -> Tensor:
    loss = returned[0] if isinstance(returned, tuple) and returned else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        name = getattr(function, "__name__", "the function")
        raise ConfigError(f"train_step: {name} must return a scalar loss that needs a gradient, or (loss, aux); got {loss!r}.")
    return loss

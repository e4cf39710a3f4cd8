"""Halves of a graph that are finished and compiled when they are first needed, and told at each call what they have to do."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from .. import _aot, _dynamo
from ..ops.journal import Journal, recording
from .kernels import steps_of


@dataclasses.dataclass(frozen=True)
class Run:
    """The task of the next call of a half.

    Attributes:
        key: which of its compiled forms.
        task: the number of the backward that it belongs to; -1 for a forward.
        broke_off: told what was written if the call raises.
    """

    key: Any
    task: int = -1
    broke_off: Callable[[Journal], None] | None = None


class LazyGraph:
    """The forward or the backward of one graph, compiled for each key when it first runs with it.

    AOTAutograd calls it with the graph's inputs alone, so the task of a call travels beside it: whoever starts the call names the
    task right before, in the same thread (`will_run`). Two threads that run one graph never see each other's.
    """

    def __init__(self) -> None:
        """Set up a half that knows nothing yet: `prepare` tells how it is finished, and `accept` brings the graph."""
        self.finish: Callable[[fx.GraphModule, Any], fx.GraphModule] | None = None
        self.expected: tuple[Any, ...] = ()
        self.values: dict[Any, list[Any]] = {}
        """For each key, the fake values that the compiled graph returns, with the strides that the compiler chose."""
        self._boxed_call = True
        self._contexts: _aot.CompileContexts | None = None
        self._gm: fx.GraphModule | None = None
        self._compile: Callable[[fx.GraphModule], _dynamo.Compiled] | None = None
        self._compiled: dict[Any, _dynamo.Compiled] = {}
        self._runs = threading.local()

    def prepare(self, finish: Callable[[fx.GraphModule, Any], fx.GraphModule], expected: tuple[Any, ...]) -> None:
        """Say what is to be made of the graph.

        Args:
            finish: makes a runnable copy of it for a key.
            expected: the keys that are needed first. With dynamic shapes all of them are compiled at once, while Dynamo still
                collects guards.
        """
        self.finish, self.expected = finish, expected

    def accept(self, gm: fx.GraphModule, compile: Callable[[fx.GraphModule], _dynamo.Compiled]) -> LazyGraph:
        """Take what AOTAutograd hands to a compiler: the graph, and how it would have been compiled."""
        self._gm, self._compile, self._contexts = gm, compile, _aot.CompileContexts.current()
        if _aot.has_symbolic_inputs(gm):
            for key in self.expected:
                self._prepare(key)
        return self

    def outputs(self) -> list[Any]:
        """The outputs of the unfinished graph, as nodes."""
        assert self._gm is not None
        return _returned(self._gm)

    # ---------------------------------------------------------------------------------------------------------- a call

    def will_run(self, run: Run) -> None:
        """Name the task of the next call in this thread. A backward inside of another one comes back before it."""
        runs = self._waiting()
        while runs and runs[-1].task >= run.task >= 0:  # of a backward that never got here
            runs.pop()
        runs.append(run)

    @contextlib.contextmanager
    def running(self, key: Any) -> Iterator[None]:
        """Inside, the call of this thread runs with ``key``."""
        runs = self._waiting()
        depth = len(runs)
        runs.append(Run(key))
        try:
            yield
        finally:
            del runs[depth:]

    def _waiting(self) -> list[Run]:
        runs: list[Run] = self._runs.__dict__.setdefault("waiting", [])
        return runs

    def __call__(self, args: Any) -> Any:
        run = self._waiting()[-1]
        if run.task >= 0:
            self._waiting().pop()
        if run.key not in self._compiled:
            assert self._contexts is not None
            with _dynamo.compiling(), _aot.outside_of_tracing(), self._contexts.entered():
                self._prepare(run.key)
        compiled = self._compiled[run.key]
        if run.broke_off is None:
            return compiled(args)
        with recording() as journal:
            try:
                return compiled(args)
            except BaseException:  # Ctrl-C too: what was written has to be known whatever it was
                run.broke_off(journal)
                raise

    def _prepare(self, key: Any) -> None:
        if key in self._compiled:
            return
        assert self._gm is not None and self._compile is not None and self.finish is not None
        gm = self.finish(self._gm, key)
        values = [node.meta["val"] if isinstance(node, fx.Node) else None for node in _returned(gm)]
        steps = steps_of(gm)
        try:
            with _aot.built_in_background(gm):
                with _aot.kept_buffers(self._gm, gm), _aot.reported_strides() as strides:
                    compiled = self._compile(gm)
                for step, tensors in steps:
                    step.compiled_for(tensors)
        except BaseException:  # Ctrl-C too: what was generated may not have been built
            for step, _ in steps:
                step.forget()
            raise
        for number, stride in enumerate(strides or []):
            value = values[number]
            if stride is not None and isinstance(value, Tensor) and tuple(value.stride()) != tuple(stride):
                values[number] = value.as_strided(value.size(), stride)
        self.values[key] = values
        self._compiled[key] = compiled


def _returned(gm: fx.GraphModule) -> list[Any]:
    values: Any = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    return list(values)


@dataclasses.dataclass(frozen=True)
class CompiledPair:
    """Both halves of one graph."""

    forward: LazyGraph = dataclasses.field(default_factory=LazyGraph)
    backward: LazyGraph = dataclasses.field(default_factory=LazyGraph)

    def saved(self, key: Any) -> dict[str, Any]:
        """Fake values of what the forward returns for ``key``, by the names that they have as inputs of the backward."""
        pairs = zip(self.forward.outputs(), self.forward.values.get(key, ()), strict=False)
        return {node.name: value for node, value in pairs if node is not None}

"""The compiled steps of single weights, by the names under which backward graphs call them (`grass_compile.passes.kernel`)."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from .. import _aot, _autograd, _dynamo, ops
from ..config import BackendOptions, SiteConfig
from ..passes.fx_utils import outputs, placeholders
from ..passes.kernel import step_graphs

log = logging.getLogger(__name__)


@functools.cache
def named(options: BackendOptions, config: SiteConfig, dim: int) -> str:
    """The name under which graphs call this step: the same in every process, so that a compile cache may hold such a graph,
    unless two settings look alike and are not."""
    settings = (options, config.step_alone, dim)
    name = f"{type(config.rule).__name__}_{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}"
    while _named_kernels.setdefault(name, settings) != settings:
        name += "_"
    if name not in ops.kernels:
        ops.kernels[name] = _Step(*settings)
    return name


_apart: contextvars.ContextVar[dict[Any, dict[Any, Callable[..., Any]]] | None]
_apart = contextvars.ContextVar("grass_steps_apart", default=None)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, in this thread, steps are compiled anew, and forgotten after: what is compiled does not really run."""
    token = _apart.set({})
    try:
        yield
    finally:
        _apart.reset(token)


_named_kernels: dict[str, tuple[BackendOptions, SiteConfig, int]] = {}


class _Step:
    """The step of weights of one configuration, in place; compiled for each shape when it first comes."""

    def __init__(self, options: BackendOptions, config: SiteConfig, dim: int) -> None:
        self._settings = options, config, dim
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        compiled = self.compiled_for(tensors)
        with _autograd.without_autocast():
            compiled(*tensors)

    def forget(self) -> None:
        """Forget what was compiled, since some of it may not be whole."""
        self._compiled.clear()
        _compiled_step.cache_clear()

    def compiled_for(self, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        """The step for tensors like these, which may be fake."""
        specs = tuple([(t.shape, t.stride(), t.dtype, t.device) for t in tensors])
        apart = _apart.get()
        known = self._compiled if apart is None else apart.setdefault(self._settings, {})
        compiled = known.get(specs)
        if compiled is None:
            plain = tuple((tuple(shape), *rest) for shape, *rest in specs)
            make = _compiled_step if apart is None else _compiled_step.__wrapped__
            with _dynamo.compiling(), _aot.outside_of_tracing():
                compiled = known[specs] = make(*self._settings, plain)
        return compiled


def steps_of(gm: fx.GraphModule) -> list[tuple[_Step, list[Tensor]]]:
    """The steps that a backward graph calls, with fake tensors like those that it will call them with."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=ops.step_):
        arguments: Any = node.args
        *tensors, state, kernel = arguments
        step = ops.kernels[kernel]
        assert isinstance(step, _Step)
        found.append((step, [tensor.meta["val"] for tensor in (*tensors, *state)]))
    return found


def run(options: BackendOptions, config: SiteConfig, dim: int, *tensors: Tensor) -> None:
    """Run the step of one weight by itself."""
    ops.kernels[named(options, config, dim)](*tensors)


RECOMPUTE = {"realize_reads_threshold": 64, "realize_acc_reads_threshold": 64, "realize_opcount_threshold": 512}
"""Inductor config values with which what a rule decodes from its codes is computed again where it is needed twice: in a buffer it
would be as large as what the codes are there to save."""


@functools.cache
def _compiled_step(options: BackendOptions, config: SiteConfig, dim: int, specs: Any) -> Callable[..., Any]:
    log.info("compiling a step: rank %d along dimension %d of %s", specs[0][0][dim], dim, list(specs[1][0]))
    with _autograd.without_autocast():  # whoever calls this first must not decide in which dtype a rule's products are
        unsafe = not _aot.CPP_LOOPS_ARE_SAFE and specs[1][3].type == "cpu"
        graphs = step_graphs(config, dim, specs, apart=unsafe)
    patches = {**(RECOMPUTE if config.rule.state_dtypes else {}), **dict(options.inductor)}
    compile = functools.partial(
        _aot.compile_kernel, compiler=options.compiler, mode=options.mode, patches=patches, key=source_hash()
    )
    for graph in graphs:
        _aot.trace_graph("grass_step", graph)
    first = compile(graphs[0])
    if len(graphs) == 1:
        return first
    for node, result in zip(placeholders(graphs[1])[len(specs) :], outputs(graphs[0]), strict=True):
        node.meta["val"] = result.meta["val"]
    then = compile(graphs[1])
    return lambda *tensors: then(*tensors, *first(*tensors))


@functools.cache
def source_hash() -> str:
    """A hash over the source of this package, so that no cache serves a graph that other passes made."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

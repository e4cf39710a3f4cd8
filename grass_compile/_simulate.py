"""Running training on tensors without memory, through the very code that Inductor generates.

Inductor's product is a Python module: a function ``call`` that allocates buffers, launches kernels and deletes buffers again.
Under `simulated` its kernels do nothing and its buffers are fake, so that running it shows each allocation and each release in
the order in which they will come, and costs neither memory nor a compiler. Nothing that is made inside outlives it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._ops import _higher_order_ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from . import _aot
from ._described import compile_for_described_device, described_device

aten = torch.ops.aten

ALL = (aten.all.default, aten.all.dim, aten.all.dims)

Called = Callable[[Sequence[Tensor]], contextlib.AbstractContextManager[None]]


class SimulationMode(FakeTensorMode):
    """Fake tensors, of which `watch` hears whenever an operator makes one.

    Reading a number off a tensor that has none gives zero, so that a check for non-finite gradients finds nothing; whether all of
    them are true gives yes, so that a check whether a batch is padded or packed finds that it is not.

    Attributes:
        watch: told of every tensor that an operator makes, or None.
        running: whether generated code runs, rather than a trace.
        reads: how many numbers were read off tensors that have none, those aside whose answer is known.
    """

    def __init__(self, operators: Mapping[Any, Callable[..., Any]]) -> None:
        """Set up the mode.

        Args:
            operators: what to call in place of some operators when generated code runs them: those that are made of others.
        """
        super().__init__(allow_non_fake_inputs=True)
        self.watch: Callable[[Tensor], None] | None = None
        self.running = False
        self.reads = 0
        self.operators = operators
        self._depth = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        if func is aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            self.reads += not hasattr(args[0], "grass_answer")
            return getattr(args[0], "grass_answer", _zero(args[0].dtype))
        if func in ALL:
            result: Any = super().dispatch(func, types, args, kwargs)
            result.grass_answer = True
            return result
        if self.running and func in self.operators:
            return self.operators[func](*args, **(kwargs or {}))
        if self.watch is None or self._depth:
            return super().dispatch(func, types, args, kwargs)
        self._depth += 1  # what an operator is made of on fake tensors is no memory of the real one
        try:
            result = super().dispatch(func, types, args, kwargs)
        finally:
            self._depth -= 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result


def _zero(dtype: torch.dtype) -> Any:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


@contextlib.contextmanager
def fake(mode: SimulationMode) -> Iterator[None]:
    """Inside, tensors have no memory; Dynamo forgets all graphs before and after."""
    for operator in _higher_order_ops.values():  # they look their rules up by the type of the mode
        if FakeTensorMode in operator.python_key_table:
            operator.python_key_table.setdefault(SimulationMode, operator.python_key_table[FakeTensorMode])
    torch._dynamo.reset()
    try:
        with mode:
            yield
    finally:
        torch._dynamo.reset()


@contextlib.contextmanager
def simulated(mode: SimulationMode, called: Called, device: str) -> Iterator[None]:
    """Inside, generated code runs on fake tensors and its kernels do nothing; Dynamo forgets all graphs before and after.

    Args:
        mode: the mode that makes fake tensors, which say that they are on a CPU; active inside.
        called: entered with the inputs of each generated function for as long as it runs.
        device: what code is generated for, ``cpu`` or ``cuda``. There need not be a GPU.
    """
    load = inspect.getattr_static(PyCodeCache, "load_by_key_path").__func__

    def loaded(cls: Any, key: str, path: str, linemap: Any = None, attrs: Any = None, **keywords: Any) -> types.ModuleType:
        with _kept_out_of_caches():  # with attributes it is not looked up
            module: types.ModuleType = load(cls, key, path, linemap, attrs or {}, **keywords)
        if hasattr(module, "extern_kernels"):
            vars(module)["extern_kernels"] = _ExternKernels(module.extern_kernels)
        if hasattr(module, "call"):
            vars(module)["call"] = _watched(module.call, mode, called, device)
        return module

    def nothing(*args: Any, **keywords: Any) -> Any:
        return _Kernel()

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch._C._dynamo.guards, "_empty_strided_cpu", _empty),
        (torch._C._dynamo.guards, "_empty_strided_cuda", _empty),
        (torch._C._dynamo.guards, "_reinterpret_tensor", _reinterpret),
        (PyCodeCache, "load_by_key_path", loaded),
        *((AsyncCompile, name, nothing) for name in ("cpp", "cpp_pybinding", "triton", "multi_kernel")),
        *([(_aot, "compile_fx_inner", compile_for_described_device)] if device == "cuda" else []),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(_in_this_thread(owner, name, function))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        stack.enter_context(fake(mode))
        yield


@contextlib.contextmanager
def code_seen_by(see: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``see`` is shown what Inductor writes in this thread."""
    with _in_this_thread(GraphLowering, "save_output_code", see):
        yield


@contextlib.contextmanager
def _in_this_thread(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, this thread gets ``function`` for ``owner.name``, and others what was there: they may be training."""
    found = inspect.getattr_static(owner, name, None)
    kind = type(found) if isinstance(found, (classmethod, staticmethod)) else None
    real: Any = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
    thread, inside = threading.get_ident(), True

    def choose(*args: Any, **keywords: Any) -> Any:  # generated code may keep it for longer than the patch is there
        return (function if inside and threading.get_ident() == thread else real)(*args, **keywords)

    with mock.patch.object(owner, name, choose if kind is None else kind(choose), create=found is None):
        try:
            yield
        finally:
            inside = False


@contextlib.contextmanager
def _kept_out_of_caches() -> Iterator[None]:
    """Inside, a generated module is loaded that nobody else may find."""
    known = len(PyCodeCache.modules)
    yield
    for module in PyCodeCache.modules[known:]:
        sys.modules.pop(module.__name__, None)
    del PyCodeCache.modules[known:]


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cpu")


def _reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int) -> Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


class _Kernel:
    """Stands for a kernel, C++ or Triton."""

    def __call__(self, *args: Any, **keywords: Any) -> None:
        pass

    def run(self, *args: Any, **keywords: Any) -> None:
        pass


class _ExternKernels:
    """The library's products; those that write into a buffer do nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._real, name)

        def call(*args: Any, **keywords: Any) -> Any:
            out = keywords.get("out")
            return function(*args, **keywords) if out is None else out

        return call


def _watched(call: Callable[[list[Any]], Any], mode: SimulationMode, called: Called, device: str) -> Callable[..., Any]:
    believed = described_device if device == "cuda" else contextlib.nullcontext

    def watched(args: list[Any]) -> Any:
        mode.running, before = True, mode.running
        try:
            with believed(), mode, called([arg for arg in args if isinstance(arg, Tensor)]):
                return call(args)
        finally:
            mode.running = before

    return watched

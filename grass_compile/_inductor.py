"""The parts of Inductor that lower our operators.

Inductor is imported when the first lowering is registered, which is at import: it costs nothing that ``torch.compile`` does not
pay anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from torch._inductor import ir
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as virtual_ops

F = TypeVar("F", bound=Callable[..., Any])


def cpp_library(source: str) -> ctypes.CDLL:
    """Compile C++ as Inductor compiles its own, from its cache if it is there."""
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load(source)
    return library


@contextlib.contextmanager
def built_in_background() -> Iterator[None]:
    """Inside, this thread does not wait for the C++ compiler after each graph: while Inductor's threads build what it has
    generated for one, it generates the next. At the end everything is there.

    Only for graphs on a CPU: Inductor keeps what it has made of Triton for its cache as soon as a graph is done.
    """
    plain, thread = AsyncCompile._wait_futures, threading.get_ident()
    waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []

    def later(builds: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            waiting.append((builds, scope))
        else:
            plain(builds, scope)

    AsyncCompile._wait_futures = later  # type: ignore[method-assign,assignment]
    failed: list[BaseException] = []
    try:
        yield
    except BaseException as error:
        failed.append(error)
    AsyncCompile._wait_futures = plain  # type: ignore[method-assign]
    for builds, scope in waiting:  # all of them: Inductor may hand out the same module again
        try:
            plain(builds, scope)
        except BaseException as error:
            failed.append(error)
            with contextlib.suppress(Exception):  # Ctrl-C breaks off the wait, and not what is waited for
                plain(builds, scope)
    if failed:
        raise failed[0]


def lowering(op: Any) -> Callable[[F], F]:
    """Make the decorated function the way in which Inductor lowers an operator."""
    return cast(Callable[[F], F], register_lowering(op, type_promotion_kind=None))


def lowering_of(op: Any) -> Callable[..., Any]:
    """How Inductor lowers an operator of torch."""
    found: Callable[..., Any] = lowerings[op]
    return found


def fallback(op: Any) -> Callable[..., Any]:
    """The lowering of an operator that is called as it is."""
    handler: Callable[..., Any] = fallback_handler(op, add_to_fallback_set=False)
    return handler


def lower_as_write(op: Any) -> None:
    """Lower an operator that writes some of its arguments as it is, after everything that reads them was computed.

    An expression that no loop has computed yet reads its inputs when one does. Inductor sees to that before its own writes, not
    before those of a custom operator (torch 2.13): it would read what has been written.
    """
    call = fallback(op)
    written = [
        number for number, argument in enumerate(op._schema.arguments) if argument.alias_info and argument.alias_info.is_write
    ]

    def lower(*args: Any) -> Any:
        for number in written:
            values = args[number] if isinstance(args[number], (list, tuple)) else [args[number]]
            for value in values:
                for reader in V.graph.name_to_users.get(value.get_name(), ()):
                    reader.realize()
        return call(*args)

    lowering(op)(lower)


def ops() -> Any:
    """The operations on single elements that make up the body of a loop."""
    return virtual_ops


def keep_unfused(value: Any) -> None:
    """Store a value, and let no loop that reads it compute it again."""
    value.realize()
    V.graph.no_fuse_buffer_names.add(value.get_name())


def scatter_(
    target: Any, value: Callable[[Sequence[Any]], Any], ranges: Sequence[Any], indexer: Callable[[Sequence[Any]], list[Any]]
) -> None:
    """Emit a loop over ``ranges`` that stores ``value(position)`` to ``target[indexer(position)]``."""
    scatter = ir.Scatter(
        device=target.get_device(),
        dtype=target.get_dtype(),
        inner_fn=value,
        ranges=list(ranges),
        output_indexer=indexer,
        scatter_mode=None,
    )
    buffer = ir.ComputedBuffer(name=None, layout=ir.MutationLayoutSHOULDREMOVE(target), data=scatter)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)

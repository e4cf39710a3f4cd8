"""How Inductor makes code of our operators: their lowerings, and C++ that is compiled as it compiles its own.

Beside `grass_compile._torch` the only file that knows private torch names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch


def cpp_library(source: str) -> ctypes.CDLL:
    """Compile C++ as Inductor compiles its own, from its cache if it is there."""
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load(source)
    return library


def register_gather_lowering(op: Any, on_cpu: Any) -> None:
    """Teach Inductor ``gather([features], [index])``: a loop without bounds checks on a GPU, an operator of its own on a CPU.

    On a CPU, Inductor puts neighbouring loops into one C++ function. A gather among them would make the model's own functions
    differ between the regular variant and the refresh, and the C++ compiler, which takes most of the time, would see them twice.
    """
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering

    fallback = fallback_handler(on_cpu, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def lower(features: Any, index: Any) -> Any:
        if features[0].get_device().type == "cpu":
            return fallback(features, index)
        unchecked = lowerings[torch.ops.aten._unsafe_index.Tensor]
        gathered = [unchecked(source, [None, rows]) for source, rows in zip(features, index, strict=True)]
        return gathered[0] if len(gathered) == 1 else lowerings[torch.ops.aten.cat.default](gathered, 1)


def register_contiguous_lowering(op: Any, on_cpu: Any) -> None:
    """Teach Inductor ``contiguous(matrix)``, which stands in graphs of a CPU only: an operator of its own."""
    from torch._inductor.lowering import fallback_handler, register_lowering

    register_lowering(op, type_promotion_kind=None)(fallback_handler(on_cpu, add_to_fallback_set=False))


def register_once_lowering(op: Any) -> None:
    """Teach Inductor ``once(value)``: on a CPU, a loop of its own; on a GPU, where a kernel waits for memory anyway, nothing."""
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    @register_lowering(op, type_promotion_kind=None)
    def lower(value: Any) -> Any:
        if value.get_device().type == "cpu":
            value.realize()
            V.graph.no_fuse_buffer_names.add(value.get_name())
        return value


def register_row_update_lowering(op: Any) -> None:
    """Teach Inductor ``row_update_(weight, dim, index, update, noise)``: one loop that loads, adds, rounds and stores.

    It is a scatter whose value reads the very element that it writes. Inductor's own ``index_put_`` may not do that, since
    it cannot know that the indices are distinct; ours are.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V, ops

    @register_lowering(op, type_promotion_kind=None)
    def lower(weight: Any, dim: int, index: Any, update: Any, noise: Any = None) -> None:
        weight.realize()
        length = weight.get_size()[dim]
        load_weight, load_index, load_update = weight.make_loader(), index.make_loader(), update.make_loader()
        wide, narrow = update.get_dtype(), weight.get_dtype()

        def target(position: Sequence[Any]) -> list[Any]:
            row = ops.indirect_indexing(load_index([position[dim]]), length, check=False, wrap_neg=False)
            return [row, position[1]] if dim == 0 else [position[0], row]

        def value(position: Sequence[Any]) -> Any:
            old = ops.to_dtype(load_weight(target(position)), wide)
            new = ops.add(old, load_update(position))
            if noise is not None:
                bits = ops.add(ops.to_dtype_bitcast(new, torch.int32, wide), noise.make_loader()(position))
                rounded = ops.bitwise_and(bits, ops.constant(-65536, torch.int32))
                finite = ops.lt(ops.abs(new), ops.constant(float("inf"), wide))
                new = ops.where(finite, ops.to_dtype_bitcast(rounded, wide, torch.int32), new)
            return ops.to_dtype(new, narrow)

        scatter = ir.Scatter(
            device=weight.get_device(),
            dtype=narrow,
            inner_fn=value,
            ranges=list(update.get_size()),
            output_indexer=target,
            scatter_mode=None,
        )
        buffer = ir.ComputedBuffer(name=None, layout=ir.MutationLayoutSHOULDREMOVE(weight), data=scatter)
        buffer.name = V.graph.register_buffer(buffer)
        V.graph.register_operation(buffer)

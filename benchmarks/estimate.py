"""Inductor's own estimate of the peak memory of the graphs it schedules."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch._functorch.config
import torch._inductor.config
from torch._inductor import memory
from torch._inductor.virtualized import V


@dataclass(frozen=True)
class PeakEstimate:
    """The estimate for one compiled graph.

    Attributes:
        kind: "forward", "backward" or "inference".
        peak_bytes: Most bytes live at once, of the graph's own buffers and of the inputs it may free (what the forward
            saved, in a backward). Parameters, optimizer state and the user's inputs are never counted.
        saved_bytes: In a backward, bytes of the inputs it may free; 0 otherwise.
        nodes: Kernels in the schedule.
        live: The largest buffers live at the peak, as `(name, bytes, operation)`.
    """

    kind: str
    peak_bytes: int
    saved_bytes: int
    nodes: int
    live: tuple[tuple[str, int, str], ...]


def _operation(buffer: Any) -> str:
    """What makes a buffer: the target of a kernel call, or the FX nodes that were fused."""
    if isinstance(buffer, memory.FreeableInputBuffer):
        return "saved by the forward"
    node = buffer.node
    kernel = getattr(node, "python_kernel_name", None)
    origins = sorted(origin.name for origin in node.get_origins())
    return f"{kernel or type(node).__name__} of {', '.join(origins[:4])}"


def _estimate(order: list[Any], outputs: Any, inputs: Any) -> PeakEstimate:
    freeable = memory.get_freeable_input_buf(order, inputs)
    timeline, _, _ = memory.compute_memory_timeline(order, freeable, outputs)
    change = [0] * (len(order) + 1)
    for buffer in timeline:
        change[buffer.start_step] += buffer.size_alloc
        if buffer.end_step != -1:  # the others are outputs
            change[buffer.end_step + 1] -= buffer.size_free
    at_step = list(itertools.accumulate(change))
    peak = max(at_step)
    step = at_step.index(peak)
    live = [b for b in timeline if b.start_step <= step and (b.end_step == -1 or step <= b.end_step) and b.size_alloc]
    live.sort(key=lambda b: -b.size_alloc)
    graph = V.graph
    return PeakEstimate(
        kind="backward" if graph.is_backward else "inference" if graph.is_inference else "forward",
        peak_bytes=peak,
        saved_bytes=sum(b.mpi_buffer.size_free for b in freeable.values()),
        nodes=len(order),
        live=tuple((b.buffer.get_name(), b.size_alloc, _operation(b.buffer)) for b in live[:40]),
    )


@contextlib.contextmanager
def estimated_peaks() -> Iterator[list[PeakEstimate]]:
    """Collect Inductor's peak-memory estimate of every graph it schedules inside the `with` block, in that order.

    The estimate is that of the order Inductor chose (the best of those `reorder_for_peak_memory` tried), from the
    lifetimes of whole buffers: reuse of a buffer in place is not seen, nor is what a library kernel allocates inside.
    Caches of compiled graphs are off inside the block, for a cached graph is not scheduled again; a graph compiled
    before the block does not appear either (`torch._dynamo.reset()` drops it).

    Example::

        with estimated_peaks() as peaks:
            torch.compile(model)(x).backward()
        print([(p.kind, p.peak_bytes) for p in peaks])
    """
    estimates: list[PeakEstimate] = []
    reorder: Callable[..., list[Any]] = memory.reorder_for_peak_memory

    def recording(
        nodes: list[Any],
        name_to_buf: Any,
        name_to_fused_node: Any,
        inputs: Any,
        outputs: Any,
        *rest: Any,
        **keywords: Any,
    ) -> list[Any]:
        order = reorder(nodes, name_to_buf, name_to_fused_node, inputs, outputs, *rest, **keywords)
        estimates.append(_estimate(order, outputs, inputs))
        return order

    with (
        mock.patch.object(memory, "reorder_for_peak_memory", recording),
        torch._inductor.config.patch(reorder_for_peak_memory=True, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield estimates

"""Average gradients over the ranks of a group, where their weights are the same on each; a bucket of them at a time.

Before, for two weights::

    mm:       f32[m, r]
    anchor:   f32[m, r] = grass_compile.anchor(mm, weight, hyper, ...)
    mm_1:     f32[n, r]
    anchor_1: f32[n, r] = grass_compile.anchor(mm_1, weight_1, hyper, ...)

After::

    mm:          f32[m, r]
    mm_1:        f32[n, r]
    cat:         f32[(m + n) r] = cat([div(mm, size), div(mm_1, size)])       <- flattened
    all_reduce:  f32[(m + n) r] = _c10d_functional.all_reduce(cat, "sum", group)
    wait_tensor: f32[(m + n) r] = _c10d_functional.wait_tensor(all_reduce)
    anchor:      f32[m, r] = grass_compile.anchor(<its part>, weight, hyper, ...)
    anchor_1:    f32[n, r] = grass_compile.anchor(<its part>, weight_1, hyper, ...)

A weight of which each rank owns a part (FSDP2) gets its part of the mean: a ``reduce_scatter_tensor`` takes the place of
``all_reduce``, of a matrix with a row for each rank, in which parts are padded to equal lengths. With replicas of each part
(HSDP) an ``all_reduce`` over these follows. Under tensor parallelism the gradient is that of the part already, and stays.

Where new rows are chosen by the whole gradient, each rank gets its part of that, even if it has all of the weight: no rank then
holds the sum of whole gradients. `scores_of_parts` adds up the squares of its scores; what is chosen of the parts is put together
by `gathered` where the weight is not in parts. (A decomposition takes whole gradients, so with ``projection="galore"`` each rank
gets these.)

Contract: what a refresh chooses by is averaged even where gradients are not (``no_sync()``), since all ranks have to choose the
same. The order of collectives follows from the graph, which is the same on all ranks. Nothing that the forward saves changes,
since the halves are apart already.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...distributed.layout import Layout, MeshDim, averages
from ...math.selection import scores
from ..context import PassContext
from ..fx_utils import call, inline, provenance, shape_of, specs_of, trace
from ..joint.anchor import anchors
from ..records import Projection

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional

STARTS_BUCKET = "grass_starts_bucket"
"""Marks the first collective of a bucket. It is waited for behind that of the next, see `schedule_steps`."""

BUCKET_BYTES = 25 * 2**20
"""How much travels together at most, as in ``DistributedDataParallel``."""

SPLIT_BYTES = 2**20
"""More than this travels in buckets of a quarter even if one would hold it: a region of one block then has little to wait for."""


@dataclasses.dataclass(frozen=True)
class Share:
    """One gradient to be averaged.

    Attributes:
        name: of its weight.
        anchor: the anchor that takes it.
        gradient: this rank's.
        layout: how its weight is spread.
        checked: whether ranks have to tell each other of a part that is not finite.
    """

    name: str
    anchor: fx.Node
    gradient: fx.Node
    layout: Layout
    checked: bool

    @property
    def bytes(self) -> int:
        """Bytes of the gradient, the same on all ranks."""
        value, dim = self.gradient.meta["val"], self.layout.sharded_dim
        bytes_ = int(value.nbytes)
        return bytes_ // value.shape[dim] * self.layout.widest if dim is not None and self.layout.widest else bytes_

    @property
    def kind(self) -> Any:
        """Equal for those that may travel together."""
        value = self.gradient.meta["val"]
        return self.layout.mesh, self.layout.reduce_dtype, value.dtype, value.device, self.checked


def reduce(gm: fx.GraphModule, context: PassContext) -> int:
    """Average gradients, in place.

    Args:
        gm: a backward graph with anchors.
        context: says which weights are spread over ranks, and whether this backward averages.

    Returns:
        How many gradients are averaged.
    """
    plan, shares = context.planned, []
    for node in anchors(gm):
        arguments: Any = node.args
        gradient, number = arguments[0], arguments[-1]
        projection, action = plan.projections[number], context.actions[number]
        config, full = projection.config, projection.position in context.full
        if config.layout is not None and _is_reduced(config.layout, action, full, context.syncs, config.checked):
            chooses = full and action in ("choose", "step")  # by scores, which are finite on all ranks or on none
            layout = of_chosen(projection) if chooses else config.layout
            shares.append(Share(projection.name, node, gradient, layout or config.layout, config.checked and not chooses))
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    for bucket in _buckets(sorted(shares, key=lambda share: order[share.gradient])):
        last = max((share.gradient for share in bucket), key=order.__getitem__)
        _reduce(gm, bucket, last, [share.anchor for share in bucket if order[share.anchor] < order[last]])
    return len(shares)


def _is_reduced(layout: Layout, action: str, full: bool, syncs: bool, checked: bool) -> bool:
    if layout.parts:  # the leaf has the shape of the part
        return action != "skip" and (layout.averages or checked)
    return averages(action, full, syncs)


def _buckets(shares: Sequence[Share]) -> list[list[Share]]:
    """Gradients that travel together, those that are computed first in front."""
    buckets: list[list[Share]] = []
    open_: dict[Any, list[Share]] = {}
    total = collections.Counter[Any]()
    for share in shares:
        total[share.kind] += share.bytes
    for share in shares:
        bucket, limit = open_.get(share.kind), min(BUCKET_BYTES, max(SPLIT_BYTES, total[share.kind] // 4))
        if bucket is None or sum(other.bytes for other in bucket) + share.bytes > limit:
            bucket = open_[share.kind] = []
            buckets.append(bucket)
        bucket.append(share)
    return buckets


def _reduce(gm: fx.GraphModule, bucket: Sequence[Share], last: fx.Node, early: Sequence[fx.Node]) -> None:
    """Average a bucket behind the last of its gradients, and give its anchors their parts; those that stand before that move."""
    graph, layout = gm.graph, bucket[0].layout
    behind = last.next
    while behind.op == "placeholder":
        behind = behind.next
    with provenance(gm, "reduce", bucket[0].name, last), graph.inserting_before(behind):
        means = _means(graph, bucket) if layout.averages else [share.gradient for share in bucket]
        if layout.parts and bucket[0].checked:
            means = _not_finite_anywhere(graph, means, layout)
    for share, mean in zip(bucket, means, strict=True):
        share.anchor.update_arg(0, mean)
    for anchor in early:
        behind.prepend(anchor)


def _means(graph: fx.Graph, bucket: Sequence[Share]) -> list[fx.Node]:
    """The mean of each gradient of a bucket, or this rank's part of it."""
    layout = bucket[0].layout
    scatters = layout.scatters
    mine = [_flat(graph, share) for share in bucket]
    dim = 0 if scatters is None else 1
    joined = mine[0] if len(mine) == 1 else call(graph, aten.cat.default, mine, dim)
    sends = joined
    if scatters is not None:
        sent = call(graph, c10d.reduce_scatter_tensor.default, joined, "sum", scatters.size, scatters.group)
        joined = call(graph, aten.reshape.default, call(graph, c10d.wait_tensor.default, sent), [-1])
    for mesh_dim in layout.mesh:
        if mesh_dim.averages and mesh_dim != scatters:
            joined = _summed(graph, joined, mesh_dim)
    sends.next.meta[STARTS_BUCKET] = True  # what was inserted behind it first: a collective
    means, start = [], 0
    for share, flat in zip(bucket, mine, strict=True):
        length = shape_of(flat)[dim]
        part = joined if len(bucket) == 1 else call(graph, aten.slice.Tensor, joined, 0, start, start + length)
        means.append(_shaped(graph, part, share))
        start += length
    return means


def _flat(graph: fx.Graph, share: Share) -> fx.Node:
    """A gradient as a vector, or as a matrix with a row for each rank; divided by the number of ranks, in the dtype to send."""
    layout, value = share.layout, share.gradient
    if layout.reduce_dtype is not None and value.meta["val"].dtype != layout.reduce_dtype:
        value = call(graph, prims.convert_element_type.default, value, layout.reduce_dtype)
    value = call(graph, aten.div.Tensor, value, layout.size)
    if layout.scatters is None:
        return call(graph, aten.reshape.default, value, [-1])
    if layout.sharded_dim:
        value = call(graph, aten.permute.default, value, [1, 0])
    if missing := layout.padded * layout.scatters.size - shape_of(value)[0]:
        value = call(graph, aten.constant_pad_nd.default, value, [0, 0, 0, missing])
    value = call(graph, aten.reshape.default, value, [layout.scatters.size, -1])
    return call(graph, aten.clone.default, value, memory_format=torch.contiguous_format)


def _shaped(graph: fx.Graph, flat: fx.Node, share: Share) -> fx.Node:
    """The mean, or this rank's part of it, as its anchor takes it."""
    layout, shape = share.layout, list(shape_of(share.gradient))
    own = layout.part_of_gradient
    if layout.scatters is None or own is None or layout.sharded_dim is None:
        return call(graph, aten.reshape.default, flat, shape)
    along, length = layout.sharded_dim, own[layout.sharded_dim]
    part = call(graph, aten.reshape.default, flat, [layout.padded, shape[1 - along]])
    if length != layout.padded:
        part = call(graph, aten.slice.Tensor, part, 0, 0, length)
    return call(graph, aten.permute.default, part, [1, 0]) if along else part


def _summed(graph: fx.Graph, value: fx.Node, dim: MeshDim) -> fx.Node:
    return call(graph, c10d.wait_tensor.default, call(graph, c10d.all_reduce.default, value, "sum", dim.group))


def _not_finite_anywhere(graph: fx.Graph, parts: Sequence[fx.Node], layout: Layout) -> list[fx.Node]:
    """Each not finite if the part of any rank is not, so that all of them skip the same steps."""
    squares = []
    for part in parts:
        dtype = part.meta["val"].dtype
        wide = call(graph, prims.convert_element_type.default, part, torch.promote_types(dtype, torch.float32))
        total = call(graph, aten.sum.default, call(graph, aten.mul.Tensor, wide, wide))
        squares.append(call(graph, aten.reshape.default, total, [1]))
    flags = call(graph, aten.mul.Tensor, call(graph, aten.cat.default, squares), 0.0)
    for dim in layout.parts:
        flags = _summed(graph, flags, dim)
    return [
        call(graph, aten.add.Tensor, part, call(graph, aten.select.int, flags, 0, number)) for number, part in enumerate(parts)
    ]


def of_chosen(projection: Projection) -> Layout | None:
    """How the mean of a whole gradient is spread by which new rows are chosen; None if every rank gets all of it."""
    layout = projection.config.layout
    if layout is None or layout.parts:
        return layout
    return layout.in_parts(1 - projection.dim, projection.shape) if projection.config.projection == "grass" else None


def gathered(graph: fx.Graph, part: fx.Node, layout: Layout, length: int) -> fx.Node:
    """The whole of a tensor of which each rank has an equal part; ``length`` along the dimension that is in parts."""
    (dim,) = layout.parts
    part = call(graph, aten.permute.default, part, [1, 0]) if dim.shards else part
    part = call(graph, aten.clone.default, part, memory_format=torch.contiguous_format)
    sent = call(graph, c10d.all_gather_into_tensor.default, part, dim.size, dim.group)
    whole = call(graph, aten.slice.Tensor, call(graph, c10d.wait_tensor.default, sent), 0, 0, length)
    return call(graph, aten.permute.default, whole, [1, 0]) if dim.shards else whole


def scores_of_parts(graph: fx.Graph, gradient: fx.Node, dim: int, layout: Layout) -> fx.Node:
    """The scores of the rows of a whole gradient, of which each rank has a part: the same on all of them, bit for bit."""
    (energies,) = inline(graph, trace(_energies, (dim,), specs_of([gradient])), [gradient])
    for part in layout.parts:
        energies = _summed(graph, energies, part)
    return call(graph, aten.sqrt.default, energies)


def _energies(dim: int, gradient: torch.Tensor) -> tuple[torch.Tensor]:
    return (scores(gradient, dim).square(),)

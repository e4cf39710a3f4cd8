"""Replace each dense weight gradient by an index-gather and a small matmul.

Rows (out-features) of an ``nn.Linear`` weight, before::

    permute: f32[m, b] = permute(grad_out, [1, 0])
    mm:      f32[m, n] = mm(permute, x)

After::

    gather:  f32[b, r] = grass_compile.gather(grad_out, idx)
    permute: f32[r, b] = permute(gather, [1, 0])
    mm:      f32[r, n] = mm(permute, x)

Columns (in-features), after::

    gather:  f32[b, r] = grass_compile.gather(x, idx)                <- known in the forward: only this is saved of x
    permute: f32[m, b] = permute(grad_out, [1, 0])
    mm:      f32[m, r] = mm(permute, gather)

The gather makes a ``[b, r]`` buffer (neighbouring threads read one row of ``grad_out``) that the matmul reads transposed.

``gather`` checks no bounds: the index is ours, and always valid.

Contract: adds nodes only; the value made for a site equals ``slot[idx]`` (``slot[:, idx]``) up to rounding, in the slot's
dtype. The dense product dies with its slot, which `fuse` gives a new meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ..runtime import ops
from .fx_utils import call, provenance, shape_of
from .records import Cast, Gradient, Operand, Product, Site, Sum

aten = torch.ops.aten
prims = torch.ops.prims


def rewrite(
    gm: fx.GraphModule, *, sites: tuple[Site, ...], index: Mapping[int, fx.Node], from_slot: bool = False
) -> dict[int, fx.Node]:
    """Insert the compact gradient of every site.

    Args:
        gm: the joint graph, changed in place.
        sites: what `detect` found; sites of a refresh step are not to be passed.
        index: for each site's weight position, the placeholder that holds ``idx``, ``int64[r]``.
        from_slot: take the rows from the dense gradient instead of computing them alone (to debug the rewrite).

    Returns:
        For each weight position, the compact gradient, ``[r, n]`` or ``[m, r]`` in stored orientation.
    """
    compact = {}
    for site in sites:
        position = site.weight.position
        with provenance(gm, "rewrite", site.weight.name, site.slot), gm.graph.inserting_before(site.slot.next):
            if from_slot:
                where = [None, index[position]] if site.dim else [index[position]]
                compact[position] = call(gm.graph, aten.index.Tensor, site.slot, where)
            else:
                compact[position] = _select(gm.graph, site.gradient, site.dim, index[position])
    return compact


def _select(graph: fx.Graph, gradient: Gradient, dim: int, index: fx.Node) -> fx.Node:
    """The rows ``index`` of ``gradient`` along stored dimension ``dim``."""
    if isinstance(gradient, Product):
        gathered = _gather(graph, _features_last(graph, gradient.operand(dim), whole=True), gradient.operand(dim), index)
        return _matmul(graph, gathered, _features_last(graph, gradient.operand(1 - dim)), dim)
    if isinstance(gradient, Cast):
        return call(graph, prims.convert_element_type.default, _select(graph, gradient.inner, dim, index), gradient.dtype)
    if isinstance(gradient, Sum):
        total, *rest = [_select(graph, term, dim, index) for term in gradient.terms]
        for term in rest:
            total = call(graph, aten.add.Tensor, total, term)
        return total
    if gradient.dim != dim:
        return call(graph, aten.cat.default, [_select(graph, part, dim, index) for part in gradient.parts], gradient.dim)
    products = [part for part in gradient.parts if isinstance(part, Product)]
    joined = call(graph, aten.cat.default, [_features_last(graph, p.operand(dim)) for p in products], 1)
    gathered = call(graph, ops.gather, joined, index)
    return _matmul(graph, gathered, _features_last(graph, products[0].operand(1 - dim)), dim)


def _gather(graph: fx.Graph, features: fx.Node, operand: Operand, index: fx.Node) -> fx.Node:
    """``features[:, start + index]``, ``[b, r]``."""
    if operand.start:
        index = call(graph, aten.add.Tensor, index, operand.start)
    return call(graph, ops.gather, features, index)


def _features_last(graph: fx.Graph, operand: Operand, whole: bool = False) -> fx.Node:
    """An operand as ``[tokens, features]``; only the features of this weight unless ``whole``."""
    node = operand.node
    if operand.dims != tuple(range(len(operand.dims))):
        node = call(graph, aten.permute.default, node, list(operand.dims))
    features = shape_of(node)[-1]
    if len(shape_of(node)) > 2:
        node = call(graph, aten.reshape.default, node, [-1, features])
    if not whole and operand.length != features:
        node = call(graph, aten.slice.Tensor, node, 1, operand.start, operand.start + operand.length)
    return node


def _matmul(graph: fx.Graph, gathered: fx.Node, other: fx.Node, dim: int) -> fx.Node:
    """``gathered^T other`` (``[r, n]``) along dimension 0, ``other^T gathered`` (``[m, r]``) along dimension 1."""
    left, right = (other, gathered) if dim else (gathered, other)
    return call(graph, aten.mm.default, call(graph, aten.permute.default, left, [1, 0]), right)

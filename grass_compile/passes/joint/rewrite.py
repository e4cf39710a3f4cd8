"""Replace each dense weight gradient by an index-gather and a small matmul.

Rows (out-features) of an ``nn.Linear`` weight, before::

    permute: f32[m, b] = permute(grad_out, [1, 0])
    mm:      f32[m, n] = mm(permute, x)

After::

    gather:  f32[b, r] = grass_compile.gather([grad_out], [idx])
    permute: f32[r, b] = permute(gather, [1, 0])
    mm:      f32[r, n] = mm(permute, x)

Columns (in-features), after::

    gather:  f32[b, r] = grass_compile.gather([x], [idx])            <- known in the forward: only this is saved of x
    permute: f32[m, b] = permute(grad_out, [1, 0])
    mm:      f32[m, r] = mm(permute, gather)

On a GPU the gather makes a ``[b, r]`` buffer (neighbouring threads read one row of ``grad_out``) that the matmul reads
transposed; on a CPU, where a transposed operand costs more than the gather, it makes an ``[r, b]`` buffer, and ``gather`` is its
view. It checks no bounds: the index is ours, and always valid.

With a dense projection, ``mm(grad_out, basis)`` or ``mm(x, basis)`` takes the gather's place, and everything else is the same.
The basis ``f32[m, r]`` is an input (``galore``), or computed from the key right there (``gaussian``).

On a refresh, `restore_full_grad` takes the gathers out of a copy of the forward and of the backward graph again. What remains
forms the full gradient; the output of the forward that held the gathered activations holds all of ``x``.

Contract: adds nodes only; the value made for a site equals ``slot[idx]`` (``slot[:, idx]``) up to rounding, in the slot's
dtype. The dense product dies with its slot, which `lower_anchors` gives a new meaning.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

import torch
from torch import fx

from ... import ops
from ...math.projection import SELECTORS, basis_of
from ..context import PassContext
from ..fx_utils import call, inline, provenance, shape_of, specs_of, trace
from ..records import Cast, Concat, Factor, Gradient, Operand, Padded, Product, Reordered, Scale, Scaled, Site, parts_of

aten = torch.ops.aten
prims = torch.ops.prims
log = logging.getLogger(__name__)


SELECTION = "grass_compile_selection"
"""``node.meta`` key of every node that selects features; its value is a `Selection`."""


OF_SELECTOR = "grass_compile_of_selector"
"""``node.meta`` key of every node that is computed from an index, a basis or a key alone."""


class Selection(NamedTuple):
    """Which features a node selects from, or projects: those of the weight at ``position``, ``length`` of them from ``start``
    on."""

    position: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a gradient to compute: those at ``index``, for the weight at ``position``, along stored dimension ``dim``;
    with a dense projection, which ``rank`` sums of rows. ``maps`` say where the weight has the rows of the expression at hand,
    the innermost first."""

    index: fx.Node
    position: int
    dim: int
    projection: str
    rank: int
    maps: tuple[Padded | Reordered, ...] = ()


def rewrite(gm: fx.GraphModule, context: PassContext) -> int:
    """Insert the compact gradient of every site.

    Args:
        gm: the joint graph, changed in place.
        context: has the sites; gets for each weight position the compact gradient, ``[r, n]`` or ``[m, r]`` in stored
            orientation. Where ``rewrite`` is disabled, the rows are taken from the dense gradient instead of being computed
            alone (to debug the rewrite).

    Returns:
        How many were inserted.
    """
    inputs, leaders, from_slot = context.inputs, context.leaders, "rewrite" in context.disabled
    for site in context.findings.sites:
        position, config = site.weight.position, site.weight.config
        index = inputs[leaders[position]][SELECTORS[config.projection]]
        rows = Rows(index, position, site.dim, config.projection, site.rank)
        with provenance(gm, "rewrite", site.weight.name, site.slot), gm.graph.inserting_before(site.slot.next):
            formed = from_slot or site.needed is not None
            made = _from_slot(gm.graph, site, rows) if formed else _select(gm.graph, site.gradient, rows)
        context.findings.compact[position] = made
    if changes := len(context.findings.sites):
        log.info("rewrite: %d weight gradients made compact", changes)
    return changes


def _from_slot(graph: fx.Graph, site: Site, rows: Rows) -> fx.Node:
    """The rows of a gradient that is formed."""
    length = site.shape[site.dim]
    if rows.projection != "grass":
        features = site.slot if rows.dim else call(graph, aten.permute.default, site.slot, [1, 0])
        chosen = _gather(graph, features, rows, 0, length)
        return chosen if rows.dim else call(graph, aten.permute.default, chosen, [1, 0])
    chosen = call(graph, aten.index.Tensor, site.slot, [None, rows.index] if site.dim else [rows.index])
    chosen.meta[SELECTION] = Selection(rows.position, 0, length)
    return chosen


def _select(graph: fx.Graph, gradient: Gradient, rows: Rows) -> fx.Node:
    """These rows of ``gradient``."""
    dim = rows.dim
    if isinstance(gradient, Product):
        operand = gradient.operand(dim)
        if rows.maps:
            gathered = _gather_mapped(graph, features_last(graph, operand), rows)
        else:
            gathered = _gather(graph, features_last(graph, operand, whole=True), rows, operand.start, operand.length)
        if gradient.scaled is not None:
            return _scaled_matmul(graph, gathered, gradient, gradient.scaled, rows)
        return _matmul(graph, gathered, features_last(graph, gradient.operand(1 - dim)), rows)
    if isinstance(gradient, Concat) and gradient.dim == dim:
        products = [part for part in gradient.parts if isinstance(part, Product)]
        joined = call(graph, aten.cat.default, [features_last(graph, p.operand(dim)) for p in products], 1)
        return _matmul(graph, _gather_mapped(graph, joined, rows), features_last(graph, products[0].operand(1 - dim)), rows)
    if isinstance(gradient, (Padded, Reordered)) and gradient.dim == dim:
        return _select(graph, gradient.inner, dataclasses.replace(rows, maps=(gradient, *rows.maps)))
    parts = [_select(graph, part, rows) for part in parts_of(gradient)]
    if isinstance(gradient, Cast):
        return call(graph, prims.convert_element_type.default, parts[0], gradient.dtype)
    if isinstance(gradient, Scale):
        return call(graph, gradient.target, parts[0], *_factor(graph, gradient, rows))
    if isinstance(gradient, (Padded, Reordered)):
        return mapped(graph, parts[0], gradient, gradient.dim)
    if isinstance(gradient, Concat):
        return call(graph, aten.cat.default, parts, gradient.dim)
    total, *rest = parts
    for term in rest:
        total = call(graph, aten.add.Tensor, total, term)
    return total


def _gather_mapped(graph: fx.Graph, features: fx.Node, rows: Rows) -> fx.Node:
    """The selected ones of features that are first put where the weight has them."""
    for place in rows.maps:
        features = mapped(graph, features, place, 1)
    return _gather(graph, features, rows, 0, shape_of(features)[1])


def _factor(graph: fx.Graph, scale: Scale, rows: Rows) -> list[Any]:
    """The factor of the selected rows, if there is one."""
    factor = scale.factor
    if factor.value is None:
        return []
    if factor.dims[rows.dim] is None:
        return [factor.value if factor.dims[1 - rows.dim] is None else as_matrix(graph, factor)]
    value = as_matrix(graph, factor)
    for place in rows.maps:
        value = mapped(graph, value, place, rows.dim, fill=1)  # what it scales there is zero; nothing is divided by zero
    chosen = call(graph, aten.index.Tensor, value, [None, rows.index] if rows.dim else [rows.index])
    chosen.meta[SELECTION] = Selection(rows.position, 0, shape_of(value)[rows.dim])
    return [chosen]


def as_matrix(graph: fx.Graph, factor: Factor) -> fx.Node:
    """A factor as a matrix in stored orientation; it has a single row or column where they are all the same."""
    node: fx.Node = factor.value
    kept = [dim for dim in factor.dims if dim is not None]
    others = [dim for dim in range(len(shape_of(node))) if dim not in kept]
    shape = [1 if dim is None else shape_of(node)[dim] for dim in factor.dims]
    if [*others, *kept] != list(range(len(shape_of(node)))):
        node = call(graph, aten.permute.default, node, [*others, *kept])
    node = call(graph, aten.reshape.default, node, shape)
    for dim in (0, 1):
        start, length = factor.starts[dim], factor.lengths[dim]
        if factor.dims[dim] is not None and length != shape[dim]:
            node = call(graph, aten.slice.Tensor, node, dim, start, start + length)
    return node


def mapped(graph: fx.Graph, value: fx.Node, place: Padded | Reordered, dim: int, fill: float = 0) -> fx.Node:
    """A matrix whose rows (columns for ``dim`` 1) are put where ``place`` says, with ``fill`` between them."""
    if dim == 0:
        turned = call(graph, aten.permute.default, value, [1, 0])
        return call(graph, aten.permute.default, mapped(graph, turned, place, 1, fill), [1, 0])
    if isinstance(place, Reordered):
        split = call(graph, aten.reshape.default, value, [-1, *place.sizes])
        ordered = call(graph, aten.permute.default, split, [0, *(1 + number for number in place.order)])
        return call(graph, aten.reshape.default, ordered, [-1, shape_of(value)[1]])
    length = shape_of(value)[1]
    if place.step > 1:
        apart = call(
            graph, aten.constant_pad_nd.default, call(graph, aten.unsqueeze.default, value, 2), [0, place.step - 1], fill
        )
        value, length = call(graph, aten.reshape.default, apart, [-1, length * place.step]), length * place.step
    return call(graph, aten.constant_pad_nd.default, value, [place.start, place.size - place.start - length], fill)


def _gather(graph: fx.Graph, features: fx.Node, rows: Rows, start: int, length: int) -> fx.Node:
    """``features[:, start + index]``, or ``features[:, start : start + length] @ basis``; ``[b, r]``."""
    if rows.projection != "grass":
        if length != shape_of(features)[1]:
            features = call(graph, aten.slice.Tensor, features, 1, start, start + length)
        basis = _basis(graph, rows, length, features.meta["val"].dtype)
        projected = call(graph, aten.mm.default, features, basis)
        projected.meta[SELECTION] = Selection(rows.position, 0, length)
        return projected
    index = call(graph, aten.add.Tensor, rows.index, start) if start else rows.index
    gathered = call(graph, ops.gather, [features], [index])
    gathered.meta[SELECTION] = Selection(rows.position, start, length)
    return gathered


def _basis(graph: fx.Graph, rows: Rows, length: int, dtype: torch.dtype) -> fx.Node:
    """The basis of a dense projection, ``[length, rank]``, in a dtype."""
    if rows.projection == "galore" and rows.index.meta["val"].dtype == dtype:
        return rows.index
    traced = trace(_basis_of, (rows.projection, length, rows.rank, dtype), specs_of([rows.index]))
    (basis,) = inline(graph, traced, [rows.index])
    made: list[fx.Node] = [basis]
    for node in made:
        node.meta[OF_SELECTOR] = True
        made += [source for source in node.all_input_nodes if source.op == "call_function" and source not in made]
    return made[0]


def _basis_of(projection: str, length: int, rank: int, dtype: torch.dtype, selector: torch.Tensor) -> tuple[torch.Tensor]:
    return (basis_of(projection, selector, length, rank, dtype),)


def features_last(graph: fx.Graph, operand: Operand, whole: bool = False) -> fx.Node:
    """An operand as ``[tokens, features]``; only the features of this weight unless ``whole``."""
    node = operand.node
    if operand.dims != tuple(range(len(operand.dims))):
        node = call(graph, aten.permute.default, node, list(operand.dims))
    features = shape_of(node)[-1]
    if len(shape_of(node)) != 2:
        node = call(graph, aten.reshape.default, node, [-1, features])
    if not whole and operand.length != features:
        node = call(graph, aten.slice.Tensor, node, 1, operand.start, operand.start + operand.length)
    return node


def _matmul(graph: fx.Graph, gathered: fx.Node, other: fx.Node, rows: Rows) -> fx.Node:
    """``gathered^T other`` (``[r, n]``) along dimension 0, ``other^T gathered`` (``[m, r]``) along dimension 1.

    On a CPU the latter is ``gathered^T other`` transposed: BLAS is so much faster at few rows than at few columns that a copy is
    little against it.
    """
    if rows.dim and not ops.on_cpu(other.meta["val"]):
        return call(graph, aten.mm.default, call(graph, aten.permute.default, other, [1, 0]), gathered)
    product = call(graph, aten.mm.default, call(graph, aten.permute.default, gathered, [1, 0]), other)
    if not rows.dim:
        return product
    transposed = call(graph, aten.permute.default, product, [1, 0])
    copied = call(graph, ops.contiguous, transposed)
    copied.meta[SELECTION] = Selection(rows.position, 0, 0)  # of a full gradient, no copy is made
    return copied


def _scaled_matmul(graph: fx.Graph, gathered: fx.Node, product: Product, scaled: Scaled, rows: Rows) -> fx.Node:
    """`_matmul` of float8 numbers: ``_scaled_mm`` takes its first factor in row-major order and its second in column-major order,
    so that the tokens of both lie side by side."""
    sides = [gathered, features_last(graph, product.operand(1 - rows.dim))]
    scales = [_scale_of(graph, product, scaled, rows, dim) for dim in (0, 1)]
    left, right = sides[::-1] if rows.dim else sides
    first, second = (_tokens_last(graph, side) for side in (left, right))
    second = call(graph, aten.permute.default, second, [1, 0])
    return call(graph, aten._scaled_mm.default, first, second, *scales, None, None, scaled.dtype, scaled.fast)


def _tokens_last(graph: fx.Graph, features: fx.Node) -> fx.Node:
    """``[features, tokens]`` in row-major order."""
    turned = call(graph, aten.permute.default, features, [1, 0])
    return call(graph, aten.clone.default, turned, memory_format=torch.contiguous_format)


def _scale_of(graph: fx.Graph, product: Product, scaled: Scaled, rows: Rows, dim: int) -> fx.Node:
    """The scales of one operand; of those of the selected features, where each has its own."""
    scale, operand = scaled.scales[dim], product.operand(dim)
    if scale.meta["val"].numel() == 1:
        return scale
    scale = call(graph, aten.reshape.default, scale, [1, -1])
    if dim == rows.dim:
        scale = _gather(graph, scale, rows, operand.start, operand.length)
    elif operand.length != shape_of(scale)[1]:
        scale = call(graph, aten.slice.Tensor, scale, 1, operand.start, operand.start + operand.length)
    return scale if dim else call(graph, aten.reshape.default, scale, [-1, 1])

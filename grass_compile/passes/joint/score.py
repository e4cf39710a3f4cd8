"""Rank the rows of a weight gradient beside its compact product, where new rows are to be chosen without the full one.

Rows, ``scores="estimate"``::

    scores: f32[m] = grass_compile.sketched_energy(grad_out, x, hyper, due)

Columns, ``scores="sampled"``::

    sample: f32[b/8, n] = grass_compile.sample(x, 8, group)                         <- in the forward, saved
    scores: f32[n] = grass_compile.product_energy(sample, grad_out, 1, 8)

Columns, ``scores="estimate"``::

    scores: f32[n] = grass_compile.energy(x, due)                                   <- in the forward, saved

With several ranks, ``sketched_energy`` and ``product_energy`` are told the groups over which sketches and products are added up
before they are squared; the rest is this rank's summand, and `lower_anchors` has these added up where rows are proposed.

Contract: adds nodes only. What ``estimate`` adds obeys ``due`` and stays in every step's graph; the sample that a forward keeps
takes memory, so `forget_samples` takes it out of a copy for steps that do not choose.
"""

from __future__ import annotations

import torch
from torch import fx

from ...distributed.layout import Layout
from ...ops import scores as ops
from ..context import PassContext
from ..fx_utils import call, output_node, propagate, provenance, shape_of
from ..records import Concat, Gradient, Operand, Padded, Product, Reordered, Scale, Site, parts_of
from .rewrite import as_matrix, features_last, mapped

aten = torch.ops.aten

SAMPLED = "grass_compile_sampled"
"""``node.meta`` key of a sample that the forward keeps; its value, the positions of the weights that it serves. Those that score
by one operand share a node once the partitioner has computed equal expressions once; others never do, since the number of their
group stands in the expression."""


Readers = dict[Operand, set[int]]
"""Which weights score by a sample of one operand."""


def score(gm: fx.GraphModule, context: PassContext) -> int:
    """Insert the energies of the rows of every site that asks for them.

    Args:
        gm: the joint graph, changed in place.
        context: has the sites; gets for each such weight position the energies, ``[m]`` along the indexed dimension. Weights
            with the same leader have their sum.

    Returns:
        How many weights are scored.
    """
    inputs, leaders = context.inputs, context.leaders
    found: dict[int, fx.Node] = {}
    readers: Readers = {}
    for site in context.findings.sites:
        if site.weight.config.scores != "exact":
            position = site.weight.position
            with provenance(gm, "score", site.weight.name, site.slot), gm.graph.inserting_before(site.slot.next):
                leader = inputs[leaders[position]]
                numbers = inputs[position]["hyper"], leader.get("due")
                found[position] = _energy(gm.graph, site, site.gradient, numbers, readers)
    totals: dict[int, fx.Node] = {}
    for position, energy in found.items():
        total = totals.get(leaders[position])
        with gm.graph.inserting_before(output_node(gm)):
            totals[leaders[position]] = energy if total is None else call(gm.graph, aten.add.Tensor, total, energy)
    context.findings.energy.update({position: totals[leaders[position]] for position in found})
    return len(found)


def forget_samples(gm: fx.GraphModule, context: PassContext) -> int:
    """Sample nothing for the scores of weights that choose no rows in this step.

    Args:
        gm: a copy of a forward graph, changed in place.
        context: says which weights choose.

    Returns:
        How many samples were taken out.
    """
    resting = {p.position for p, new in zip(context.planned.projections, context.refresh, strict=True) if not new}
    changed: set[fx.Node] = set()
    changes = 0
    for node in list(gm.graph.nodes):
        if SAMPLED in node.meta and node.meta[SAMPLED] <= resting:
            changed.update(node.users)
            with gm.graph.inserting_before(node):
                empty = call(gm.graph, aten.new_empty.default, node.args[0], [0, shape_of(node)[1]])
            node.replace_all_uses_with(empty)
            gm.graph.erase_node(node)
            changes += 1
    propagate(gm, changed)
    return changes


Numbers = tuple[fx.Node, fx.Node | None]
"""The hyper-parameters, and whether new rows are due, of one weight."""


def _energy(graph: fx.Graph, site: Site, gradient: Gradient, numbers: Numbers, readers: Readers) -> fx.Node:
    """The energies of the rows of ``gradient``; of a sum, those of the terms, whose common part is left out."""
    dim = site.dim
    if isinstance(gradient, Product):
        return _product(graph, site, gradient, numbers, readers)
    energies = [_energy(graph, site, part, numbers, readers) for part in parts_of(gradient)]
    if isinstance(gradient, Scale):
        return _scaled(graph, energies[0], gradient, dim)
    if isinstance(gradient, (Padded, Reordered)):
        if gradient.dim != dim:
            return energies[0]
        row = call(graph, aten.unsqueeze.default, energies[0], 0)
        return call(graph, aten.squeeze.dim, mapped(graph, row, gradient, 1), 0)
    if isinstance(gradient, Concat) and gradient.dim == dim:
        return call(graph, aten.cat.default, energies, 0)
    total, *rest = energies
    for energy in rest:
        total = call(graph, aten.add.Tensor, total, energy)
    return total


def _scaled(graph: fx.Graph, energy: fx.Node, scale: Scale, dim: int) -> fx.Node:
    """The energies of scaled rows: exact for a factor of each row, and by the mean square of the factors within a row."""
    factor = scale.factor
    if factor.value is None:
        return energy
    value = factor.value
    if isinstance(value, fx.Node) and factor.dims != (None, None):
        matrix = as_matrix(graph, factor)
        square = call(graph, aten.mean.dim, call(graph, aten.mul.Tensor, matrix, matrix), [1 - dim])
        return call(graph, scale.target, energy, square)
    return call(graph, scale.target, call(graph, scale.target, energy, value), value)


def _product(graph: fx.Graph, site: Site, product: Product, numbers: Numbers, readers: Readers) -> fx.Node:
    config, operand = site.weight.config, product.operand(site.dim)
    own, other = features_last(graph, operand), features_last(graph, product.operand(1 - site.dim))
    layout = config.layout or Layout(())
    tokens = [dim.group for dim in layout.mesh if dim.averages]
    if config.scores == "estimate":
        hyper, due = numbers
        if operand.is_grad_out:
            parts = next((dim.group for dim in layout.parts if not dim.averages), None)
            everyone = [dim.group for dim in layout.mesh]
            return call(graph, ops.sketched_energy, own, other, hyper, due, everyone, parts, layout.widest)
        energy = call(graph, ops.energy, own, due)
        return energy if layout.copies == 1 else call(graph, aten.div.Tensor, energy, layout.copies)
    if operand.is_grad_out:
        return call(graph, ops.product_energy, own, other, ops.STRIDE, ops.STRIDE, tokens)
    readers.setdefault(operand, set()).add(site.weight.position)
    sample = call(graph, ops.sample, own, ops.STRIDE, list(readers).index(operand))
    sample.meta[SAMPLED] = readers[operand]
    return call(graph, ops.product_energy, sample, other, 1, ops.STRIDE, tokens)

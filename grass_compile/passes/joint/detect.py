"""Find the weight gradients of linear layers in a joint graph. Pure analysis: the graph is not touched.

From each weight's gradient slot the pass walks back to the products of ``dY`` and ``X`` that make it::

    permute_9: f32[n, b]  = permute(view_3, [1, 0])
    mm_4:      f32[n, m]  = mm(permute_9, grad_out)           Site(gradient=Product(left=grad_out, right=view_3),
    permute:   f32[m, n]  = permute(mm_4, [1, 0])       ->         slot=convert, out_dim=0, ...)
    convert:   f32[m, n]  = convert_element_type(permute)
    return (loss, ..., convert)

Contract: every weight asked for comes back either as a `Site` or as a `Refusal` with a reason; the expression of a site
equals its slot for all inputs; a site says whether somebody else needs its full gradient.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ...checks import rank_along
from ..context import PassContext
from ..fx_utils import depends_on, is_tangent, outputs, shape_of
from ..records import Cast, Concat, Gradient, Padded, Product, Refusal, Reordered, Scale, Site, WeightInput, parts_of, products_of
from . import costs
from .interface import interface
from .reasons import Refused
from .walk import Frame, Walk

log = logging.getLogger(__name__)


def detect(gm: fx.GraphModule, context: PassContext) -> int:
    """Find the sites of the weights that are asked for, and a refusal for every weight without one.

    Args:
        gm: the joint graph; returns forward outputs, then one gradient slot per primal.
        context: gets ``sites``, in the order of its ``weights``, and ``refusals``.

    Returns:
        0, since the graph stays as it is.
    """
    sites, refusals = _find(gm, context.weights, context.num_fwd_outputs)
    context.findings.sites, context.findings.refusals = sites, refusals
    log.info("detect: %d weights projected, %d dense", len(sites), len(refusals))
    for site in sites:
        log.debug("detect: %s: %s, rank %d: %s", site.weight.name, site.choice.axis, site.rank, site.choice.why)
    for refusal in refusals:
        log.debug("detect: %s stays dense: %s", refusal.weight.name, refusal.reason)
    return 0


def _find(
    gm: fx.GraphModule, weights: Sequence[WeightInput], num_fwd_outputs: int
) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """The sites and the refusals of ``weights``."""
    graph_inputs, values = interface(gm, num_fwd_outputs), outputs(gm)
    in_backward = depends_on(gm, is_tangent)
    found: dict[int, Site] = {}
    reasons: dict[int, str] = {}
    for weight in weights:
        try:
            position = weight.position
            if position in graph_inputs.wrapped and weight.refusal is None:
                raise Refused("its gradient is a tensor subclass, as an input or a tangent is one")
            slot = values[graph_inputs.slots[position]] if position in graph_inputs.slots else None
            found[position] = _site(weight, graph_inputs.nodes.get(position), slot, in_backward)
        except Refused as refused:
            reasons[weight.position] = str(refused)
    sites = costs.choose_axes(tuple(_mark_needed(found).values()), lambda site, dim: obstacle(site, dim) is None)
    for site in sites:
        if why := obstacle(site, site.dim):
            reasons[site.weight.position] = f"{why}, so axis={site.choice.axis!r} is not possible"
    sites = tuple(site for site in sites if site.weight.position not in reasons)
    refusals = tuple(Refusal(w, reasons[w.position]) for w in weights if w.position in reasons)
    return sites, refusals


def _site(weight: WeightInput, node: fx.Node | None, slot: Any, in_backward: set[fx.Node]) -> Site:
    """The site of one weight.

    Raises:
        Refused: with the reason why it stays dense.
    """
    if weight.refusal is not None:
        raise Refused(weight.refusal)
    if node is None:
        raise Refused("it is a tensor subclass, which the compiler takes apart")
    shape = shape_of(node)
    if len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        raise Refused(f"it has {len(shape)} dimensions; only matrices of fixed size can be projected")
    if max(shape) < weight.config.rank or min(shape) < 2:
        raise Refused(f"it is smaller than the rank: {shape[0]}x{shape[1]} against rank {weight.config.rank}")
    if not isinstance(slot, fx.Node):
        raise Refused("no gradient reaches it in this graph")
    if shape_of(slot) != shape:
        raise Refused("its gradient has another shape than the weight")
    walk = Walk(in_backward)
    gradient = walk.parse(slot, Frame(((0,), (1,)), (0, 0), shape))
    for product in products_of(gradient):
        if product.left.is_grad_out == product.right.is_grad_out:
            raise Refused("both factors of its gradient depend on the backward pass (a gradient of a gradient)")
    out_dim = 0 if products_of(gradient)[0].left.is_grad_out else 1
    undecided = costs.UNDECIDED  # and the rank with it, which may be a fraction of the size along the axis
    return Site(weight, slot, gradient, frozenset(walk.chain), shape, out_dim, undecided, 0)


def _mark_needed(found: dict[int, Site]) -> dict[int, Site]:
    """Note of each site whose full gradient somebody else reads what that is, until nothing more is found."""
    while True:
        alone = [site for site in found.values() if site.needed is None]
        owned = {node for site in alone for node in site.chain}
        factors = {(p.matmul, factor) for site in alone for p in site.products for factor in p.matmul.all_input_nodes}
        slots = collections.Counter(site.slot for site in alone)
        marked = False
        for position, site in found.items():
            readers = (user for node in site.chain for user in node.users if not _own(user, node, owned, factors, slots))
            if site.needed is None and (user := next(readers, None)) is not None:
                what = "an output of the graph" if user.op == "output" else f"node {user.name} ({user.target})"
                found[position], marked = dataclasses.replace(site, needed=what), True
        if not marked:
            return found


def _own(
    user: fx.Node, node: fx.Node, owned: set[fx.Node], factors: set[tuple[fx.Node, fx.Node]], slots: Mapping[fx.Node, int]
) -> bool:
    """Whether what a user makes of a chain node is part of a gradient that is projected: not as a factor of another product."""
    if user.op == "output":
        return slots[node] == sum(value is node for value in _returned(user))
    return user in owned and (user, node) not in factors


def _returned(output: fx.Node) -> list[Any]:
    values = output.args[0]
    return list(values) if isinstance(values, (list, tuple)) else [values]


def activations(site: Site) -> Any:
    """What is equal for sites whose columns are columns of the same activations, as `normalize` leaves them; None for others."""
    gradient = site.gradient
    while isinstance(gradient, (Cast, Scale)):
        gradient = gradient.inner
    if not isinstance(gradient, Product) or gradient.operand(site.dim).is_grad_out:
        return None
    return gradient.operand(site.dim)


OWNED_BY_PARTS = "each rank owns a part of it"
"""The beginning of the reason for which a weight cannot be projected along the dimension that is sharded."""


def obstacle(site: Site, dim: int) -> str | None:
    """Why rows along stored dimension ``dim`` cannot be computed without the others; None if they can, or need not be."""
    layout = site.weight.config.layout
    if layout is not None and layout.sharded_dim == dim:
        return f"{OWNED_BY_PARTS} along dimension {dim}"
    if any(product.scaled is not None for product in site.products) and site.weight.config.scores != "exact":
        return f"it is a float8 product, with which scores={site.weight.config.scores!r} does not go"
    if site.needed is not None:
        return None
    return _float8_obstacle(site, dim) or _obstacle(site.gradient, dim, site.weight.config.projection)


def _float8_obstacle(site: Site, dim: int) -> str | None:
    """Why a product of float8 numbers cannot be taken apart along a dimension; None if it can, or there is none."""
    products, config = [product for product in site.products if product.scaled is not None], site.weight.config
    if not products:
        return None
    rank = rank_along(config.rank, site.shape[dim])
    sizes = (rank, *(operand.length for product in products for operand in (product.left, product.right)))
    if any(size % 16 for size in sizes) and products[0].matmul.meta["val"].device.type != "cpu":
        return f"it is a float8 product, for which a GPU takes only multiples of 16, with rank {rank} of {list(site.shape)}"
    if config.projection != "grass":
        return f"it is a float8 product, with which projection={config.projection!r} does not go"
    return "it is a float8 product of a part of the weight" if _is_moved(site.gradient, dim) else None


def _is_moved(gradient: Gradient, dim: int) -> bool:
    """Whether a float8 product's rows along ``dim`` are put elsewhere, or joined with others."""
    if isinstance(gradient, (Concat, Padded, Reordered)) and gradient.dim == dim:
        return any(product.scaled is not None for product in products_of(gradient))
    return any(_is_moved(part, dim) for part in parts_of(gradient))


def _obstacle(gradient: Gradient, dim: int, projection: str) -> str | None:
    if isinstance(gradient, Scale) and projection != "grass" and gradient.factor.dims[dim] is not None:
        return f"it is scaled by a tensor, which projection={projection!r} would have to project too"
    if isinstance(gradient, Concat) and gradient.dim == dim:
        products = [part for part in gradient.parts if isinstance(part, Product)]
        if len(products) != len(gradient.parts) or len({p.operand(1 - dim) for p in products}) != 1:
            return "it is split into parts that read different activations"
    return next((why for part in parts_of(gradient) if (why := _obstacle(part, dim, projection))), None)

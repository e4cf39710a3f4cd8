"""Find the weight gradients of linear layers in a joint graph. Pure analysis: the graph is not touched.

From each weight's gradient slot the pass walks back to the products of ``dY`` and ``X`` that make it::

    permute_9: f32[n, b]  = permute(view_3, [1, 0])
    mm_4:      f32[n, m]  = mm(permute_9, grad_out)           Site(gradient=Product(left=grad_out, right=view_3),
    permute:   f32[m, n]  = permute(mm_4, [1, 0])       ->         slot=convert, out_dim=0, ...)
    convert:   f32[m, n]  = convert_element_type(permute)
    return (loss, ..., convert)

Contract: every weight asked for comes back either as a `Site` or as a `Refusal` with a reason; the expression of a site
equals its slot for all inputs; each dense product is needed by projected weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ..fx_utils import depends_on, is_tangent, outputs, primals, shape_of
from ..records import Cast, Gradient, Product, Refusal, Site, Sum, WeightInput, products_of
from . import costs
from .walk import Frame, Refused, Walk


def detect(
    gm: fx.GraphModule, *, weights: Sequence[WeightInput], num_fwd_outputs: int
) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """Find the sites of ``weights`` in a joint graph.

    Args:
        gm: the joint graph; returns forward outputs, then one gradient slot per primal.
        weights: what the optimizer wants projected.
        num_fwd_outputs: how many of the outputs belong to the forward.

    Returns:
        The sites in the order of ``weights``, and a refusal for every weight without one.
    """
    slots = dict(zip(input_positions(gm), outputs(gm)[num_fwd_outputs:], strict=True))
    inputs = dict(zip(input_positions(gm), primals(gm), strict=True))
    in_backward = depends_on(gm, is_tangent)
    found: dict[int, Site] = {}
    reasons: dict[int, str] = {}
    for weight in weights:
        try:
            found[weight.position] = _site(weight, inputs[weight.position], slots[weight.position], in_backward)
        except Refused as refused:
            reasons[weight.position] = str(refused)
    found = _drop_shared(found, reasons)
    sites = costs.choose_axes(tuple(found.values()), selectable)
    for site in sites:
        if not selectable(site.gradient, site.dim):
            reasons[site.weight.position] = (
                f"it is split into parts that read different activations, so axis={site.choice.axis!r} is not possible"
            )
    sites = tuple(site for site in sites if site.weight.position not in reasons)
    refusals = tuple(Refusal(w, reasons[w.position]) for w in weights if w.position in reasons)
    return sites, refusals


def input_positions(gm: fx.GraphModule) -> list[int]:
    """For each primal, its position among the inputs of the Dynamo graph (-1 for inputs that AOTAutograd added)."""
    nodes = primals(gm)
    described: list[Any] = [node.meta.get("desc") for node in nodes]
    if all(desc is None for desc in described):
        return list(range(len(nodes)))
    added = iter(range(-1, -len(nodes) - 1, -1))
    return [desc.idx if type(desc).__name__ == "PlainAOTInput" else next(added) for desc in described]


def _site(weight: WeightInput, node: fx.Node, slot: Any, in_backward: set[fx.Node]) -> Site:
    """The site of one weight.

    Raises:
        Refused: with the reason why it stays dense.
    """
    if weight.refusal is not None:
        raise Refused(weight.refusal)
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


def _drop_shared(found: dict[int, Site], reasons: dict[int, str]) -> dict[int, Site]:
    """Refuse sites whose dense product is needed by somebody else, until none is left."""
    while True:
        owned = {node for site in found.values() for node in site.chain}
        shared = {
            position: next(user for node in site.chain for user in node.users if not _own(user, owned, site, node))
            for position, site in found.items()
            if any(not _own(user, owned, site, node) for node in site.chain for user in node.users)
        }
        if not shared:
            return found
        for position, user in shared.items():
            what = "an output of the graph" if user.op == "output" else f"node {user.name} ({user.target})"
            reasons[position] = f"its gradient is also used elsewhere, by {what}"
        found = {position: site for position, site in found.items() if position not in shared}


def _own(user: fx.Node, owned: set[fx.Node], site: Site, node: fx.Node) -> bool:
    """Whether a user of a chain node is part of a projected gradient itself, or the gradient slot of that site."""
    if user.op == "output":
        returned = user.args[0] if isinstance(user.args[0], (list, tuple)) else [user.args[0]]
        return node is site.slot and sum(value is node for value in returned) == 1
    return user in owned


def activations(site: Site) -> Any:
    """What is equal for sites whose columns are columns of the same activations, as `normalize` leaves them; None for others."""
    gradient = site.gradient
    while isinstance(gradient, Cast):
        gradient = gradient.inner
    if not isinstance(gradient, Product) or gradient.operand(site.dim).is_grad_out:
        return None
    return gradient.operand(site.dim)


def selectable(gradient: Gradient, dim: int) -> bool:
    """Whether rows along stored dimension ``dim`` can be computed without the others."""
    if isinstance(gradient, Product):
        return True
    if isinstance(gradient, Cast):
        return selectable(gradient.inner, dim)
    if isinstance(gradient, Sum):
        return all(selectable(term, dim) for term in gradient.terms)
    if gradient.dim != dim:
        return all(selectable(part, dim) for part in gradient.parts)
    products = [part for part in gradient.parts if isinstance(part, Product)]
    return len(products) == len(gradient.parts) and len({p.operand(1 - dim) for p in products}) == 1

"""The symbolic cost model behind ``axis="auto"``: what a step costs per axis, in bytes, over m, n, b and r.

For a weight of ``m`` out-features and ``n`` in-features, ``b`` tokens and rank ``r``:

================  ==========================  =============================
what              rows (out-features)         columns (in-features)
================  ==========================  =============================
flops             ``2 b r n``                 ``2 b r m``
state bytes       ``2 s r n``                 ``2 s r m``
saved activation  ``e b n / k``               ``e b r / c``
================  ==========================  =============================

``s`` is the size of a state element, ``e`` of an activation element, and ``k`` the number of weights that read the same
``X``: with rows they save one ``X`` together, with columns each keeps its own ``X[:, idx]`` (``c = 1``), unless ``share_index``
lets them save one (``c = k``). Flops become bytes through
``FLOPS_PER_BYTE``, the arithmetic intensity at which moving a byte costs as much time as computing.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import sympy

from ...checks import rank_along
from ...keywords import Axis
from ..fx_utils import shape_of
from ..records import Choice, Product, Site

FLOPS_PER_BYTE = 100
"""Between a CPU (about 10 to 30 flops per byte) and an H200 (about 200 in bf16); the choice is not sensitive to it."""

m, n, b, r, s, e, k, c = sympy.symbols("m n b r s e k c", positive=True)

FLOPS: dict[Axis, sympy.Expr] = {"rows": 2 * b * r * n, "columns": 2 * b * r * m}
STATE_BYTES: dict[Axis, sympy.Expr] = {"rows": 2 * s * r * n, "columns": 2 * s * r * m}
ACTIVATION_BYTES: dict[Axis, sympy.Expr] = {"rows": e * b * n / k, "columns": e * b * r / c}

AXES: tuple[Axis, ...] = ("rows", "columns")

UNDECIDED = Choice("rows", "not decided yet")


def total_bytes(axis: Axis) -> sympy.Expr:
    """The whole cost of a step along ``axis``, in bytes, as a sympy expression."""
    return FLOPS[axis] / FLOPS_PER_BYTE + STATE_BYTES[axis] + ACTIVATION_BYTES[axis]


def choose_axes(sites: tuple[Site, ...], selectable: Callable[[Site, int], bool]) -> tuple[Site, ...]:
    """Settle the axis and the rank of every site.

    Args:
        sites: sites whose ``choice`` is still open.
        selectable: tells whether the gradient of a site can be computed along a stored dimension alone.
    """
    readers = collections.Counter(activation(product).node for site in sites for product in site.products[:1])
    return tuple(_settle(site, readers[activation(site.products[0]).node], selectable) for site in sites)


def _settle(site: Site, sharers: int, selectable: Callable[[Site, int], bool]) -> Site:
    asked = site.weight.config.axis
    possible: list[Axis] = [axis for axis in AXES if selectable(site, site.out_dim if axis == "rows" else 1 - site.out_dim)]
    if asked != "auto":
        choice = Choice(asked, "asked for")
    elif site.weight.config.projection != "grass" and len(possible) == 2:
        choice = smaller_side(site)
    elif len(possible) == 1:
        choice = Choice(possible[0], "the only axis along which a split weight can be computed")
    else:
        choice = cheaper(site, sharers)
    if site.needed is not None:
        choice = dataclasses.replace(choice, why=f"{choice.why}; its full gradient is formed anyway, for {site.needed}")
    decided = dataclasses.replace(site, choice=choice)
    return dataclasses.replace(decided, rank=rank_along(site.weight.config.rank, site.shape[decided.dim]))


def cheaper(site: Site, sharers: int) -> Choice:
    """The axis with the smaller total, with its reasons."""
    costs = {axis: float(total_bytes(axis).subs(numbers(site, sharers, axis))) for axis in AXES}
    axis: Axis = "rows" if costs["rows"] < costs["columns"] else "columns"
    parts = ", ".join(f"{name} {costs[name] / 1e6:.2f} MB" for name in AXES)
    return Choice(axis, f"cost per step: {parts} (b={token_count(site)})")


def smaller_side(site: Site) -> Choice:
    """The axis of the shorter stored dimension, of equal ones the second, as galore-torch's ``proj_type="std"`` has it."""
    dim = 1 if site.shape[0] >= site.shape[1] else 0
    return Choice("rows" if dim == site.out_dim else "columns", "the shorter side, as GaLore takes it")


def numbers(site: Site, sharers: int, axis: Axis) -> dict[sympy.Symbol, Any]:
    """The values of the model's symbols at a site, for a step along ``axis``; a symbolic ``b`` enters with its hint.

    Reading the hint puts no guard.
    """
    out_features, in_features = site.shape[site.out_dim], site.shape[1 - site.out_dim]
    weight_bytes = activation(site.products[0]).node.meta["val"].element_size()
    return {
        m: out_features,
        n: in_features,
        b: hint(token_count(site)),
        r: rank_along(site.weight.config.rank, out_features if axis == "rows" else in_features),
        s: max(4, weight_bytes),
        e: weight_bytes,
        k: sharers,
        c: sharers if site.weight.config.share_index else 1,
    }


def activation(product: Product) -> Any:
    """The operand of a product that is known in the forward (``X``)."""
    return product.right if product.left.is_grad_out else product.left


def token_count(site: Site) -> Any:
    """How many tokens all products of a site sum over; an int or a symbolic expression."""
    total: Any = 0
    for product in site.products:
        operand = activation(product)
        tokens: Any = 1
        for dim in operand.dims[:-1]:
            tokens = tokens * shape_of(operand.node)[dim]
        total = total + tokens
    return total


def hint(size: Any) -> int:
    """The value that a symbolic size had when the graph was traced; reading it installs no guard."""
    if isinstance(size, int):
        return size
    value = size.node.hint
    return int(value) if value is not None else 4096

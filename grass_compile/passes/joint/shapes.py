"""How shapes relate on the way through reshapes, permutations and broadcasts; no policy, and no guard on symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from ..fx_utils import shape_of
from .reasons import Refused

aten = torch.ops.aten

PERMUTES = (aten.permute.default, aten.t.default, aten.transpose.int)

Dims: TypeAlias = "tuple[int, ...]"


def aligned(new: Sequence[Any], old: Sequence[Any]) -> list[tuple[Dims, Dims]]:
    """Split two shapes of one reshape into the smallest blocks of consecutive dimensions with equal products.

    Dimensions of size 1 belong to no block. Symbolic sizes match only themselves.

    Raises:
        Refused: the shapes do not align.
    """
    left, right = ([dim for dim, size in enumerate(shape) if not is_one(size)] for shape in (new, old))
    blocks: list[tuple[Dims, Dims]] = []
    while left or right:
        mine, theirs = left[:1], right[:1]
        a, b = (shape[dims[0]] if dims else 1 for shape, dims in ((new, mine), (old, theirs)))
        while a is not b and not (isinstance(a, int) and isinstance(b, int) and a == b):
            if not (isinstance(a, int) and isinstance(b, int)) or max(len(mine), len(theirs)) > len(new) + len(old):
                raise Refused("its gradient is reshaped along a dynamic dimension")
            if a < b and len(mine) < len(left):
                mine = left[: len(mine) + 1]
                a *= new[mine[-1]]
            elif b < a and len(theirs) < len(right):
                theirs = right[: len(theirs) + 1]
                b *= old[theirs[-1]]
            else:
                raise Refused("its gradient is reshaped in a way that mixes rows and columns")
        blocks.append((tuple(mine), tuple(theirs)))
        left, right = left[len(mine) :], right[len(theirs) :]
    return blocks


def peel(node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
    """Look through permutations, so that ``dims`` orders the source's dimensions as tokens, then features."""
    while node.op == "call_function" and node.target in PERMUTES:
        order = permutation(node)
        node, dims = arguments(node)[0], tuple(order[dim] for dim in dims)
    return node, dims


def permutation(node: fx.Node) -> list[int]:
    """The order of source dimensions that a permute, t or transpose node gives."""
    rank = len(shape_of(node))
    _, *dims = arguments(node)
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in dims[0]]
    order = list(range(rank))
    first, second = (0, rank - 1) if node.target is aten.t.default else (int(dim) % rank for dim in dims)
    order[first], order[second] = order[second], order[first]
    return order


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node, whose kinds the operator's schema fixes."""
    return node.args


def is_one(size: Any) -> bool:
    """Whether a size is 1, without a guard on symbolic sizes (a symbolic size is taken as not 1)."""
    return isinstance(size, int) and size == 1


def is_same(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal."""
    if isinstance(one, int) or isinstance(other, int):
        return isinstance(one, int) and isinstance(other, int) and one == other
    return one is other or bool(one.node.expr == other.node.expr)


def extent(value: Any, dim: int, rank: int) -> Any:
    """The size of ``value`` along dimension ``dim`` of a tensor of ``rank`` dimensions that it is broadcast to."""
    shape = shape_of(value) if isinstance(value, fx.Node) else ()
    own = dim - rank + len(shape)
    return shape[own] if own >= 0 else 1

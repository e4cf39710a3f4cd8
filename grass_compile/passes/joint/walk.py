"""The walk from a weight's gradient slot back to the matrix products of ``dY`` and ``X`` that make it.

One method per kind of operator on the way: permutes and reshapes move the weight's rows and columns about, casts and sums are
kept as expressions, slices and concatenations cut a window, and a matmul ends the walk.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from ..fx_utils import shape_of
from ..records import Cast, Concat, Gradient, Operand, Product, Sum

aten = torch.ops.aten
prims = torch.ops.prims

PERMUTES = (aten.permute.default, aten.t.default, aten.transpose.int)
RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
ALIASES = (aten.alias.default, aten.clone.default, aten.detach.default)
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)

EMBEDDING = "it is an embedding table: its gradient is a scatter over tokens, not a matrix product"
TIED = "it is also used as an embedding table (tied weights), so its gradient is not a matrix product alone"
REASONS: dict[str, str] = {
    "embedding_dense_backward": EMBEDDING,
    "index_put": EMBEDDING,
    "_unsafe_index_put": EMBEDDING,
    "_unsafe_masked_index_put_accumulate": EMBEDDING,
    "convolution_backward": "it is the weight of a convolution; only matrix products can be projected",
    "slice_scatter": "only a slice of it is used, so its gradient is padded with zeros",
    "constant_pad_nd": "only a slice of it is used, so its gradient is padded with zeros",
}


class Refused(Exception):
    """Raised inside the walk with the reason why a gradient is not understood; caught by `detect`."""


Dims: TypeAlias = "tuple[int, ...]"


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where the stored dimensions 0 and 1 of the weight lie in a node's value.

    Attributes:
        dims: for each stored dimension, the node's dimensions that make it up in row-major order (heads, head_dim).
        starts: first index of the weight in it; 0 unless it is a single dimension.
        lengths: the number of the weight's indices in it.
    """

    dims: tuple[Dims, Dims]
    starts: tuple[int, int]
    lengths: tuple[int, int]

    def moved(self, where: Callable[[Dims], Dims]) -> Frame:
        """The same window, each group of dimensions mapped by ``where``."""
        return dataclasses.replace(self, dims=(where(self.dims[0]), where(self.dims[1])))

    def stored(self, dim: int) -> int:
        """Which stored dimension the node's dimension ``dim`` is.

        Raises:
            Refused: it is neither, or only a part of one.
        """
        if (dim,) not in self.dims:
            raise Refused("a part of a head or of a batch of it is cut out or joined")
        return self.dims.index((dim,))

    def shifted(self, dim: int, start: int) -> Frame:
        """The window in a tensor of which the present one is a slice along ``dim`` from ``start``."""
        starts = list(self.starts)
        starts[self.stored(dim)] += start
        return dataclasses.replace(self, starts=(starts[0], starts[1]))


class Walk:
    """One walk from a gradient slot back to its matrix products; ``chain`` collects the nodes on the way."""

    def __init__(self, in_backward: set[fx.Node]) -> None:
        self.in_backward = in_backward
        self.chain: set[fx.Node] = set()

    def parse(self, node: Any, frame: Frame) -> Gradient:
        """The gradient expression that ``node`` computes inside ``frame``.

        Raises:
            Refused: the node is not a structural operation or a matrix product.
        """
        if not isinstance(node, fx.Node) or node.op != "call_function":
            raise Refused("its gradient is an input of the graph or a constant")
        handler = self._handler(node.target)
        if handler is None:
            raise Refused(_reason(node))
        self.chain.add(node)
        return handler(node, frame)

    def _handler(self, target: Any) -> Callable[[fx.Node, Frame], Gradient] | None:
        for targets, handler in (
            (PERMUTES, self._permute),
            (RESHAPES, self._reshape),
            (ALIASES, lambda node, frame: self.parse(node.args[0], frame)),
            (CASTS, self._cast),
            ((aten.slice.Tensor,), self._slice),
            ((operator.getitem,), self._split_part),
            ((aten.cat.default,), self._concat),
            ((aten.add.Tensor,), self._add),
            ((aten.mm.default, aten.bmm.default), self._product),
            ((aten.addmm.default,), self._addmm),
            ((aten.sum.dim_IntList,), self._sum_over_batch),
        ):
            if target in targets:
                return handler
        return None

    def _permute(self, node: fx.Node, frame: Frame) -> Gradient:
        order = permutation(node)
        return self.parse(node.args[0], frame.moved(lambda dims: tuple(order[dim] for dim in dims)))

    def _reshape(self, node: fx.Node, frame: Frame) -> Gradient:
        """Dimensions may be split and merged, as long as rows stay rows and columns stay columns."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        blocks = aligned(shape_of(node), shape_of(source))

        def where(dims: Dims) -> Dims:
            mine = [(new, old) for new, old in blocks if set(new) <= set(dims)]
            if tuple(dim for new, _ in mine for dim in new) != tuple(d for d in dims if not _is_one(shape_of(node)[d])):
                raise Refused("its gradient is reshaped in a way that mixes rows and columns")
            return tuple(dim for _, old in mine for dim in old)

        return self.parse(source, frame.moved(where))

    def _cast(self, node: fx.Node, frame: Frame) -> Gradient:
        return Cast(self.parse(node.args[0], frame), node.meta["val"].dtype)

    def _slice(self, node: fx.Node, frame: Frame) -> Gradient:
        source, dim, start, _, step = (*_arguments(node), None, None, None, None)[:5]
        assert isinstance(source, fx.Node)
        dim, start = int(dim or 0), start or 0
        if step not in (None, 1) or not isinstance(start, int):
            raise Refused("its gradient is a slice with a step or with a symbolic start")
        start = start + shape_of(source)[dim] if start < 0 else start
        return self.parse(source, frame.shifted(dim % len(shape_of(source)), start))

    def _split_part(self, node: fx.Node, frame: Frame) -> Gradient:
        split, part = node.args
        if not isinstance(split, fx.Node) or split.target not in SPLITS:
            raise Refused(_reason(split if isinstance(split, fx.Node) else node))
        source, sizes, dim = (*_arguments(split), 0)[:3]
        assert isinstance(source, fx.Node) and isinstance(part, int)
        start = part * sizes if isinstance(sizes, int) else sum(sizes[:part])
        if not isinstance(start, int):
            raise Refused("its gradient is a split of symbolic sizes")
        self.chain.add(split)
        return self.parse(source, frame.shifted(int(dim) % len(shape_of(source)), start))

    def _concat(self, node: fx.Node, frame: Frame) -> Gradient:
        parts, dim = (*_arguments(node), 0)[:2]
        dim = int(dim) % len(shape_of(node))
        stored = frame.stored(dim)
        if frame.starts[stored] != 0 or frame.lengths[stored] != shape_of(node)[dim]:
            raise Refused("its gradient is a part of a concatenation")
        found = []
        for part in parts:
            lengths = list(frame.lengths)
            lengths[stored] = shape_of(part)[dim]
            found.append(self.parse(part, dataclasses.replace(frame, lengths=(lengths[0], lengths[1]))))
        return Concat(tuple(found), stored)

    def _add(self, node: fx.Node, frame: Frame) -> Gradient:
        if node.kwargs.get("alpha", 1) != 1:
            raise Refused("its gradient is a weighted sum")
        terms, reasons = [], []
        for term in _arguments(node):
            if isinstance(term, fx.Node) and shape_of(term) != shape_of(node):
                raise Refused("its gradient is a sum of tensors of different shapes")
            try:
                terms.append(self.parse(term, frame))
            except Refused as refused:
                reasons.append(str(refused))
        if reasons:
            raise Refused(TIED if terms and EMBEDDING in reasons else reasons[0])
        return Sum(tuple(terms))

    def _addmm(self, node: fx.Node, frame: Frame) -> Gradient:
        added, left, right = node.args
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            raise Refused("its gradient is a weighted sum")
        if not isinstance(added, fx.Node) or shape_of(added) != shape_of(node):
            raise Refused("its gradient is a sum of tensors of different shapes")
        return Sum((self.parse(added, frame), self._operands(node, left, right, frame)))

    def _sum_over_batch(self, node: fx.Node, frame: Frame) -> Gradient:
        """``sum(bmm(dY^T, X), 0)``: one product over all tokens of all batches."""
        source, dims, keepdim = (*_arguments(node), False)[:3]
        if not isinstance(source, fx.Node) or source.target is not aten.bmm.default or list(dims) != [0]:
            raise Refused("its gradient is a sum that is not over the batch of a bmm")
        self.chain.add(source)
        inner = frame if keepdim else frame.moved(lambda dims: tuple(dim + 1 for dim in dims))
        return self._operands(source, source.args[0], source.args[1], inner)

    def _product(self, node: fx.Node, frame: Frame) -> Gradient:
        if node.target is aten.bmm.default and not _is_one(shape_of(node)[0]):
            raise Refused("its gradient is a batch of products (one matrix per batch entry)")
        return self._operands(node, node.args[0], node.args[1], frame)

    def _operands(self, matmul: fx.Node, left: Any, right: Any, frame: Frame) -> Product:
        """Assign the two factors of ``matmul`` to the stored dimensions."""
        rank = len(shape_of(matmul))
        if sorted(frame.dims) != [(rank - 2,), (rank - 1,)]:
            raise Refused("its gradient mixes a batch, rows and columns")
        factors: dict[Dims, tuple[Any, int]] = {(rank - 2,): (left, rank - 2), (rank - 1,): (right, rank - 1)}
        operands = []
        for stored in (0, 1):
            node, features = factors[frame.dims[stored]]
            tokens = tuple(dim for dim in range(rank) if dim != features)
            node, dims = _peel(node, (*tokens, features))
            start, length = frame.starts[stored], frame.lengths[stored]
            operands.append(Operand(node, dims, start, length, node in self.in_backward))
        return Product(matmul, operands[0], operands[1])


def aligned(new: Sequence[Any], old: Sequence[Any]) -> list[tuple[Dims, Dims]]:
    """Split two shapes of one reshape into the smallest blocks of consecutive dimensions with equal products.

    Dimensions of size 1 belong to no block. Symbolic sizes match only themselves.

    Raises:
        Refused: the shapes do not align.
    """
    left, right = ([dim for dim, size in enumerate(shape) if not _is_one(size)] for shape in (new, old))
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


def _peel(node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
    """Look through permutations, so that ``dims`` orders the source's dimensions as tokens, then features."""
    while node.op == "call_function" and node.target in PERMUTES:
        order = permutation(node)
        node, dims = _arguments(node)[0], tuple(order[dim] for dim in dims)
    return node, dims


def permutation(node: fx.Node) -> list[int]:
    """The order of source dimensions that a permute, t or transpose node gives."""
    rank = len(shape_of(node))
    _, *dims = _arguments(node)
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in dims[0]]
    order = list(range(rank))
    first, second = (0, rank - 1) if node.target is aten.t.default else (int(dim) % rank for dim in dims)
    order[first], order[second] = order[second], order[first]
    return order


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node, whose kinds the operator's schema fixes."""
    return node.args


def _is_one(size: Any) -> bool:
    """Whether a size is 1, without a guard on symbolic sizes (a symbolic size is taken as not 1)."""
    return isinstance(size, int) and size == 1


def _reason(node: fx.Node) -> str:
    """The sentence for an operator that ends the walk."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _reason(node.args[0])
    name = getattr(node.target, "overloadpacket", node.target)
    name = getattr(name, "__name__", str(name))
    return REASONS.get(name, f"its gradient is computed by {node.target}, not by a matrix product")

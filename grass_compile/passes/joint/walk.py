"""The walk from a weight's gradient slot back to the matrix products of ``dY`` and ``X`` that make it.

One method per kind of operator on the way: permutes and reshapes move the weight's rows and columns about, casts, sums, scales
and what puts rows elsewhere are kept as expressions, slices and concatenations cut a window. A matmul ends the walk, or the
multiplication of a column by a row that a matmul over a single token is decomposed into.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..fx_utils import shape_of
from ..records import Cast, Concat, Factor, Gradient, Operand, Padded, Product, Reordered, Scale, Scaled, Sum
from .reasons import EMBEDDING, PADDED, TIED, Refused, reason
from .shapes import PERMUTES, Dims, aligned, arguments, extent, is_one, is_same, peel, permutation

aten = torch.ops.aten
prims = torch.ops.prims

RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
ALIASES = (aten.alias.default, aten.clone.default, aten.detach.default)
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
ZEROS = (aten.full.default, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full_like.default)


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

    def covers(self, dim: int, size: Any) -> bool:
        """Whether the weight has all ``size`` indices of a node along stored dimension ``dim``."""
        return self.starts[dim] == 0 and is_same(self.lengths[dim], size)

    def resized(self, dim: int, length: int) -> Frame:
        """The same window with another length along stored dimension ``dim``."""
        lengths = list(self.lengths)
        lengths[dim] = length
        return dataclasses.replace(self, lengths=(lengths[0], lengths[1]))

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
            raise Refused(reason(node))
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
            ((aten._scaled_mm.default,), self._scaled),
            ((aten.sum.dim_IntList,), self._sum_over_batch),
            (SCALES, self._scale),
            ((aten.slice_scatter.default,), self._padded),
        ):
            if target in targets:
                return handler
        return None

    def _permute(self, node: fx.Node, frame: Frame) -> Gradient:
        order = permutation(node)
        return self.parse(node.args[0], frame.moved(lambda dims: tuple(order[dim] for dim in dims)))

    def _reshape(self, node: fx.Node, frame: Frame) -> Gradient:
        """Dimensions may be split, merged and reordered, as long as rows stay rows and columns stay columns."""
        source, shape = node.args[0], shape_of(node)
        assert isinstance(source, fx.Node)
        blocks = aligned(shape, shape_of(source))
        dims: list[Dims] = []
        reordered: list[tuple[int, Dims, Dims]] = []
        for stored in (0, 1):
            asked = tuple(dim for dim in frame.dims[stored] if not is_one(shape[dim]))
            mine = [(new, old) for new, old in blocks if set(new) <= set(asked)]
            found = tuple(dim for new, _ in mine for dim in new)
            if set(found) != set(asked):
                raise Refused("its gradient is reshaped in a way that mixes rows and columns")
            if found != asked:  # heads innermost
                sizes = tuple(shape[dim] for dim in found)
                reordered.append((stored, sizes, tuple(found.index(dim) for dim in asked)))
            dims.append(tuple(dim for _, old in mine for dim in old))
        gradient = self.parse(source, dataclasses.replace(frame, dims=(dims[0], dims[1])))
        for stored, sizes, order in reordered:
            gradient = Reordered(gradient, stored, sizes, order)
        return gradient

    def _cast(self, node: fx.Node, frame: Frame) -> Gradient:
        return Cast(self.parse(node.args[0], frame), node.meta["val"].dtype)

    def _slice(self, node: fx.Node, frame: Frame) -> Gradient:
        source, dim, start, _, step = (*arguments(node), None, None, None, None)[:5]
        assert isinstance(source, fx.Node)
        dim, start = int(dim or 0), start or 0
        if step not in (None, 1) or not isinstance(start, int):
            raise Refused("its gradient is a slice with a step or with a symbolic start")
        start = start + shape_of(source)[dim] if start < 0 else start
        return self.parse(source, frame.shifted(dim % len(shape_of(source)), start))

    def _split_part(self, node: fx.Node, frame: Frame) -> Gradient:
        split, part = node.args
        if not isinstance(split, fx.Node) or split.target not in SPLITS:
            raise Refused(reason(split if isinstance(split, fx.Node) else node))
        source, sizes, dim = (*arguments(split), 0)[:3]
        assert isinstance(source, fx.Node) and isinstance(part, int)
        start = part * sizes if isinstance(sizes, int) else sum(sizes[:part])
        if not isinstance(start, int):
            raise Refused("its gradient is a split of symbolic sizes")
        self.chain.add(split)
        return self.parse(source, frame.shifted(int(dim) % len(shape_of(source)), start))

    def _concat(self, node: fx.Node, frame: Frame) -> Gradient:
        parts, dim = (*arguments(node), 0)[:2]
        dim = int(dim) % len(shape_of(node))
        stored = frame.stored(dim)
        if not frame.covers(stored, shape_of(node)[dim]):
            raise Refused("its gradient is a part of a concatenation")
        return Concat(tuple(self.parse(part, frame.resized(stored, shape_of(part)[dim])) for part in parts), stored)

    def _padded(self, node: fx.Node, frame: Frame) -> Gradient:
        """``slice_scatter(zeros, part, dim, start, end, step)``: the gradient of a slice of the weight."""
        zeros, part, dim, start, _, step = (*arguments(node), 0, None, None, 1)[:6]
        size = shape_of(node)[dim]
        stored, start, step = frame.stored(int(dim) % len(shape_of(node))), start or 0, 1 if step is None else step
        if not (_is_zero(zeros) and isinstance(start, int) and isinstance(size, int) and frame.covers(stored, size)):
            raise Refused(PADDED)
        start = start + size if start < 0 else start
        return Padded(self.parse(part, frame.resized(stored, shape_of(part)[dim])), stored, start, step, size)

    def _scale(self, node: fx.Node, frame: Frame) -> Gradient:
        """A factor beside the gradient, be it a number or a tensor; or, of a column and a row, the gradient itself."""
        left, right = (*arguments(node), None)[:2]
        if product := self._outer(node, node, frame, ()):
            return product
        candidates = [(left, right)] if node.target not in (aten.mul.Tensor, aten.mul.Scalar) else [(left, right), (right, left)]
        sources = [(inner, factor) for inner, factor in candidates if isinstance(inner, fx.Node)]
        sources = [(inner, factor) for inner, factor in sources if shape_of(inner) == shape_of(node)] or sources[:1]
        sources.sort(key=lambda pair: pair[0] not in self.in_backward)
        reasons: list[str] = []
        for inner, factor in sources:
            known = set(self.chain)
            try:
                return Scale(self.parse(inner, frame), node.target, _factor(node, factor, frame))
            except Refused as refused:
                self.chain = known
                reasons.append(str(refused))
        raise Refused(reasons[0] if reasons else reason(node))

    def _add(self, node: fx.Node, frame: Frame) -> Gradient:
        if node.kwargs.get("alpha", 1) != 1:
            raise Refused("its gradient is a weighted sum")
        terms, reasons = [], []
        for term in arguments(node):
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
        source, dims, keepdim = (*arguments(node), False)[:3]
        if isinstance(source, fx.Node) and list(dims) == [0]:
            inner = frame if keepdim else frame.moved(lambda dims: tuple(dim + 1 for dim in dims))
            if source.target is aten.bmm.default:
                self.chain.add(source)
                return self._operands(source, source.args[0], source.args[1], inner)
            if source.target is aten.mul.Tensor and (product := self._outer(source, source, inner, (0,))):
                self.chain.add(source)
                return product
        raise Refused("its gradient is a sum that is not over the batch of a bmm")

    def _product(self, node: fx.Node, frame: Frame) -> Gradient:
        if node.target is aten.bmm.default and not is_one(shape_of(node)[0]):
            raise Refused("its gradient is a batch of products (one matrix per batch entry)")
        return self._operands(node, node.args[0], node.args[1], frame)

    def _scaled(self, node: fx.Node, frame: Frame) -> Gradient:
        """A product of float8 numbers, with a scale for each operand or for each of its features."""
        left, right, *scales, bias, scale_result, dtype, fast = (*arguments(node), None, None, None, False)[:8]
        if bias is not None or scale_result is not None:
            raise Refused("its gradient is a float8 product with a bias or a scale of its own")
        product = self._operands(node, left, right, frame)
        if frame.dims[0] != (0,):
            scales.reverse()
        for scale, size in zip(scales, (node.meta["val"].shape[dims[0]] for dims in frame.dims), strict=True):
            if scale.meta["val"].numel() != 1 and shape_of(scale) not in ((size, 1), (1, size)):
                raise Refused("its gradient is a float8 product with scales for blocks of it")
        operands = (product.left, product.right)
        plain = [dataclasses.replace(o, node=source, dims=dims) for o in operands for source, dims in [_laid_out(o.node, o.dims)]]
        out = node.meta["val"].dtype if dtype is None else dtype
        return Product(node, plain[0], plain[1], Scaled((scales[0], scales[1]), out, bool(fast)))

    def _outer(self, node: fx.Node, matmul: fx.Node, frame: Frame, tokens: Dims) -> Product | None:
        """``mul(column, row)``, summed over ``tokens`` afterwards: what a matmul over a single token is decomposed into. None if
        the multiplication is another one."""
        shape, factors = shape_of(node), arguments(node)
        rank = len(shape)
        if node.target is not aten.mul.Tensor or any(len(dims) != 1 for dims in frame.dims):
            return None
        own = frame.dims[0][0], frame.dims[1][0]
        if any(dim not in (*own, *tokens) and not is_one(size) for dim, size in enumerate(shape)):
            return None
        for pair in (factors, factors[::-1]):
            if not all(isinstance(factor, fx.Node) for factor in pair):
                return None
            other = is_one(extent(pair[0], own[1], rank)) and is_one(extent(pair[1], own[0], rank))
            if other and all(
                is_same(extent(x, dim, rank), shape[dim]) for x, d in zip(pair, own, strict=True) for dim in (d, *tokens)
            ):
                first, second = (self._operand(pair[stored], own[stored], rank, frame, stored) for stored in (0, 1))
                return Product(matmul, first, second)
        return None

    def _operand(self, node: fx.Node, features: int, rank: int, frame: Frame, stored: int) -> Operand:
        """A factor that is broadcast to ``rank`` dimensions, of which ``features`` is stored dimension ``stored``."""
        missing = rank - len(shape_of(node))
        tokens = tuple(dim - missing for dim in range(missing, rank) if dim != features)
        source, dims = peel(node, (*tokens, features - missing))
        return Operand(source, dims, frame.starts[stored], frame.lengths[stored], node in self.in_backward)

    def _operands(self, matmul: fx.Node, left: Any, right: Any, frame: Frame) -> Product:
        """Assign the two factors of ``matmul`` to the stored dimensions."""
        rank = len(shape_of(matmul))
        if sorted(frame.dims) != [(rank - 2,), (rank - 1,)]:
            raise Refused("its gradient mixes a batch, rows and columns")
        factors = {rank - 2: left, rank - 1: right}
        own = frame.dims[0][0], frame.dims[1][0]
        first, second = (self._operand(factors[own[stored]], own[stored], rank, frame, stored) for stored in (0, 1))
        return Product(matmul, first, second)


def _laid_out(node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
    """Look through permutations and the copies that only lay memory out anew."""
    node, dims = peel(node, dims)
    while node.target is aten.clone.default:
        node, dims = peel(arguments(node)[0], dims)
    return node, dims


def _is_zero(node: Any) -> bool:
    """Whether a node is a tensor of zeros."""
    if not isinstance(node, fx.Node) or node.target not in ZEROS:
        return False
    return not node.target.__name__.startswith("full") or arguments(node)[1] == 0


def _factor(node: fx.Node, factor: Any, frame: Frame) -> Factor:
    """What a gradient is multiplied or divided by, seen in the weight's stored dimensions.

    Raises:
        Refused: it differs along a dimension that is only a part of a stored one.
    """
    if not isinstance(factor, fx.Node):
        return Factor(factor)
    rank, dims = len(shape_of(node)), []
    for stored in (0, 1):
        varied = [dim for dim in frame.dims[stored] if not is_one(extent(factor, dim, rank))]
        if varied and len(frame.dims[stored]) > 1:
            raise Refused("its gradient is scaled by a tensor that has a dimension for the heads")
        dims.append(varied[0] - rank + len(shape_of(factor)) if varied else None)
    return Factor(factor, (dims[0], dims[1]), frame.starts, frame.lengths)

"""The frozen records that passes hand to one another: what was found (`Site`) and what was not (`Refusal`).

Terms. A weight is stored as a matrix; its *stored dimensions* are 0 and 1. Its gradient is a small expression over
matrix products, and each product has one operand that supplies stored dimension 0 and one that supplies stored
dimension 1. To compute only some rows (or columns) of the gradient is to gather features of one operand.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import torch
from torch import fx

from ..config import SiteConfig, UserPass, hashed_once
from ..keywords import Axis
from ..math.layout import graph_state


@dataclasses.dataclass(frozen=True)
class Operand:
    """One side of a weight-gradient product, seen as ``[tokens, features]``.

    Attributes:
        node: the operand as it stands in the graph.
        dims: the dimensions of ``node``, tokens first and features last.
        start: first feature that belongs to this weight (a weight may be a slice of a larger product).
        length: number of features that belong to this weight.
        is_grad_out: whether it depends on the tangents, i.e. is ``dY`` and supplies the out-features.
    """

    node: fx.Node
    dims: tuple[int, ...]
    start: int
    length: int
    is_grad_out: bool


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What a product of float8 numbers takes beside its operands.

    Attributes:
        scales: of the left and of the right operand: one number, or one for each feature.
        dtype: of the product.
        fast: whether a GPU may add up in fewer bits.
    """

    scales: tuple[fx.Node, fx.Node]
    dtype: torch.dtype
    fast: bool


@dataclasses.dataclass(frozen=True)
class Product:
    """``G = left^T right``, summed over tokens; ``left`` supplies stored dimension 0, ``right`` stored dimension 1."""

    matmul: fx.Node
    left: Operand
    right: Operand
    scaled: Scaled | None = None

    def operand(self, dim: int) -> Operand:
        """The operand that supplies stored dimension ``dim``."""
        return self.right if dim else self.left


@dataclasses.dataclass(frozen=True)
class Cast:
    """``G = inner.to(dtype)`` (autocast, fp32 logits)."""

    inner: Gradient
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Sum:
    """``G = a + b``: the weight is used more than once in the graph."""

    terms: tuple[Gradient, ...]


@dataclasses.dataclass(frozen=True)
class Concat:
    """``G = cat(parts, dim)``: the weight was split into parts that were used separately."""

    parts: tuple[Gradient, ...]
    dim: int


@dataclasses.dataclass(frozen=True)
class Factor:
    """What a gradient is multiplied or divided by.

    Attributes:
        value: a node, a number, or None (of a negation).
        dims: for each stored dimension, the dimension of ``value`` that it is; None where all rows (columns) have the same.
        starts: for each stored dimension, the first index of ``value`` that belongs to the weight.
        lengths: for each, the number of them.
    """

    value: Any
    dims: tuple[int | None, int | None] = (None, None)
    starts: tuple[int, int] = (0, 0)
    lengths: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Scale:
    """``G = target(inner, factor)``: the weight was multiplied by something before use."""

    inner: Gradient
    target: Any
    factor: Factor


@dataclasses.dataclass(frozen=True)
class Padded:
    """The rows ``start, start + step, ...`` of ``G`` (columns for ``dim`` 1), which has ``size``, are those of ``inner``, and the
    others are zero: a slice of the weight was used."""

    inner: Gradient
    dim: int
    start: int
    step: int
    size: int


@dataclasses.dataclass(frozen=True)
class Reordered:
    """The rows of ``G`` (columns for ``dim`` 1) are those of ``inner``, viewed as ``sizes`` and permuted by ``order``: the weight
    was used with its heads innermost."""

    inner: Gradient
    dim: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]


Gradient: TypeAlias = "Product | Cast | Sum | Concat | Scale | Padded | Reordered"


@dataclasses.dataclass(frozen=True)
class WeightInput:
    """A weight that the optimizer wants projected, as an input of the joint graph.

    Attributes:
        name: the parameter's qualified name, for people.
        position: its position among the inputs of the Dynamo graph.
        config: what the optimizer asks for.
        refusal: a reason known before the graph was looked at (excluded name, tensor hook), or None.
    """

    name: str = dataclasses.field(compare=False)
    position: int
    config: SiteConfig
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The axis of one site, with the reasons: cost in bytes for each axis and the formulas they come from."""

    axis: Axis
    why: str


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight gradient found in a joint graph.

    Attributes:
        weight: which weight, and what is asked of it.
        slot: the node that the joint graph returns as the weight's gradient, ``[dim0, dim1]`` as stored.
        gradient: the expression over matrix products that ``slot`` computes.
        chain: every node between the products and the slot, both included.
        shape: the weight's stored shape.
        out_dim: the stored dimension that holds out-features (0 for ``nn.Linear``, 1 for GPT-2's ``Conv1D``).
        choice: the axis taken, and why.
        rank: the rank after clamping to the axis' length.
        needed: what else needs the full gradient, so that it is formed anyway and its rows are taken from it; None if nothing.
    """

    weight: WeightInput
    slot: fx.Node
    gradient: Gradient
    chain: frozenset[fx.Node]
    shape: tuple[int, int]
    out_dim: int
    choice: Choice
    rank: int
    needed: str | None = None

    @property
    def dim(self) -> int:
        """The stored dimension that is indexed."""
        return self.out_dim if self.choice.axis == "rows" else 1 - self.out_dim

    @property
    def products(self) -> tuple[Product, ...]:
        """Every matrix product of the gradient."""
        return tuple(products_of(self.gradient))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a weight stays dense, in a sentence that a user understands."""

    weight: WeightInput
    reason: str


@hashed_once
@dataclasses.dataclass(frozen=True)
class Projection:
    """What the runtime needs to know of a site; free of graph nodes, hashable, part of the key of what is compiled.

    Attributes:
        reads: a number for the activations whose columns are selected, the same for all weights that read the same ones; None
            along rows, or where a gradient is more than one product.
    """

    name: str = dataclasses.field(compare=False)
    position: int
    config: SiteConfig
    axis: Axis
    dim: int
    rank: int
    shape: tuple[int, int]
    why: str = dataclasses.field(compare=False)
    tokens: int = dataclasses.field(compare=False)
    reads: int | None = None


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The outcome of detection over one joint graph, free of graph nodes: what is projected, and what is not and why."""

    projections: tuple[Projection, ...]
    refusals: tuple[Refusal, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled from one joint graph; hashable.

    Attributes:
        weights: what the optimizer asked for, refusals known beforehand included.
        projections: the weights that are projected.
        hyper: for each projection, which of the tensors of hyper-parameters it reads.
        kernels: for each projection, the name under which `grass_compile.ops.operators` finds its step.
        leaders: for each projection, the position of the weight whose rows it takes; its own, but for those that share.
        disabled: names of passes to leave out.
        clipped: positions of the dense parameters whose gradients are clipped along with the compact ones, inside the graph;
            None if nothing is clipped there.
        joint_passes: the user's, which see the joint graph first.
        backward_passes: the user's, which see each finished backward graph before it is verified.
    """

    weights: tuple[WeightInput, ...]
    projections: tuple[Projection, ...] = ()
    hyper: tuple[int, ...] = ()
    kernels: tuple[str, ...] = ()
    leaders: tuple[int, ...] = ()
    disabled: tuple[str, ...] = ()
    clipped: tuple[int, ...] | None = None
    joint_passes: tuple[UserPass, ...] = ()
    backward_passes: tuple[UserPass, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that follow those of the Dynamo graph: state tensors, leaves, hyper-parameters, the norm's leaf."""
        state = [f"grass_{name}_{p.position}" for p in self.projections for name in self.state_names(p)]
        leaves = [f"grass_leaf_{p.position}" for p in self.projections]
        norm = () if self.clipped is None else ("grass_norm",)
        return (*state, *leaves, *(f"grass_hyper_{slot}" for slot in range(1 + max(self.hyper, default=-1))), *norm)

    def takes_inputs_of(self, other: Plan) -> bool:
        """Whether a graph that was traced with the inputs of another plan can be compiled for this one."""

        def inputs(plan: Plan) -> tuple[Any, ...]:
            shapes = [(p.dim, p.rank) for p in plan.projections]
            return plan.input_names, shapes, plan.hyper

        return inputs(self) == inputs(other)

    @staticmethod
    def state_names(projection: Projection) -> tuple[str, ...]:
        """The names of the state tensors of a projected weight that are inputs of its graphs."""
        layout = projection.config.layout
        shard = ("shard",) if layout is not None and layout.shape is not None else ()
        return (*graph_state(projection.config), *shard)


def parts_of(gradient: Gradient) -> tuple[Gradient, ...]:
    """The expressions that a gradient is made of; a product has none."""
    if isinstance(gradient, Product):
        return ()
    if isinstance(gradient, Sum):
        return gradient.terms
    return gradient.parts if isinstance(gradient, Concat) else (gradient.inner,)


def products_of(gradient: Gradient) -> list[Product]:
    """Every `Product` in a gradient expression, in order."""
    if isinstance(gradient, Product):
        return [gradient]
    return [product for part in parts_of(gradient) for product in products_of(part)]

"""`Rule`, the base of update rules."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

StateLayout = Literal["full", "selected", "others", "whole"]
"""A state tensor has a number for each element of the compact gradient, for each selected row, for each feature of the rows, or
for the weight as a whole. On a refresh, numbers that belong to rows go with them; ``others`` and ``whole`` stay, unless
everything is reset."""


RESERVED = frozenset(
    (
        "axis", "basis", "dim", "due", "hyper", "index", "key", "leaf", "noise", "nonfinite", "proposed", "read", "row_scale",
        "shard", "square_sum", "step", "updates", "weight",
    )
)  # fmt: skip
"""Names that a state tensor of a rule cannot have: they stand for something else in a weight's state or in a compiled region."""


class Rule(abc.ABC):
    """An optimizer's arithmetic in the compact space.

    A rule is frozen and hashable (it is part of the key of what is compiled), and holds no tensors. `update` is traced and
    compiled once per shape, so it must be a pure function of its arguments.

    A worked example is in docs/rules.md.
    """

    state_names: ClassVar[tuple[str, ...]]
    """Names of the state tensors, zero when the rows are new."""

    state_layout: ClassVar[Mapping[str, StateLayout]] = {}
    """The layout of each; those that are not named are ``full``."""

    state_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    """The dtype of those that hold codes rather than numbers; `update` takes and returns these as they are stored. The others are
    at least fp32. Zero must stand for what the state of new rows is."""

    hyper_names: ClassVar[tuple[str, ...]]
    """Names of the numbers that reach the graph as elements of one tensor, so that changing one never recompiles."""

    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}
    """Keywords of `grass_compile.Optimizer` that the rule reads from a parameter group, with their defaults."""

    coupled_decay: ClassVar[bool] = False
    """Whether weight decay is added to the gradient (L2, of the selected rows; ``weight_decay`` is then one of ``hyper_names``)
    rather than applied to the whole weight."""

    reads_weight: ClassVar[bool] = False
    """Whether `update` finds the selected rows of the weight in ``state["weight"]``."""

    by_parts: ClassVar[bool] = False
    """Whether the update of a part of the weight is that part of the update of the whole, so that ranks which own a part each
    (FSDP2) need nothing of one another. It holds for the `update` of the same class, not for one that overrides it."""

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """The values for ``hyper_names`` from a parameter group, computed in double precision on the host."""
        return tuple(float(group[name]) for name in self.hyper_names)

    @abc.abstractmethod
    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step.

        Args:
            compact_grad: ``[r, n]``, the selected rows (columns, transposed) of the gradient, in the dtype of the state.
            state: the tensors named by ``state_names``, by their layout ``[r, n]``, ``[r, width]``, ``[width, n]`` or ``[1, 1]``;
                and ``step``: the number of updates these rows have had since their state was last zero, this one included,
                0-d or ``[r, 1]``.
            hyper: 0-d tensors named by ``hyper_names``.

        Returns:
            The update, to be *subtracted* from the weight, learning rate included; and the new state.
        """

    def layout(self, name: str) -> StateLayout:
        """The layout of one state tensor."""
        return self.state_layout.get(name, "full")

    def width(self, name: str, features: int) -> int | None:
        """How many numbers a state tensor has for each selected row, or for each of the ``features`` that the rows have; None for
        one number, which is stored without a dimension of its own."""
        return None

    def shape(self, name: str, rows: int, features: int) -> tuple[int, ...]:
        """The shape of one state tensor as it is stored, but for ``full``, which is stored as the gradient is."""
        width = self.width(name, features)
        wide = () if width is None else (width,)
        shapes = {"full": (rows, features), "selected": (rows, *wide), "others": (*wide, features), "whole": (1,)}
        return shapes[self.layout(name)]

    def seen(self, name: str, tensor: Tensor) -> Tensor:
        """A stored state tensor as `update` sees it: a matrix."""
        shapes = {"selected": (tensor.shape[0], -1), "others": (-1, tensor.shape[-1]), "whole": (1, 1)}
        layout = self.layout(name)
        return tensor if layout == "full" else tensor.reshape(shapes[layout])

    def over_parts(self, groups: tuple[str, ...], length: int) -> Rule | None:
        """The rule for a weight of which each rank of some process groups owns a part; None if there is none.

        Args:
            groups: their names, as functional collectives know them.
            length: of the whole weight, along the dimension that is sharded, which is not the one along which rows are selected.
        """
        source = next(kind for kind in type(self).__mro__ if "update" in vars(kind))
        return self if vars(source).get("by_parts", False) else None

    @property
    def exchanges(self) -> bool:
        """Whether `update` calls collectives. Such a step waits for ``opt.step()``, where it comes in the same order on all
        ranks."""
        return False

    @property
    def elementwise(self) -> bool:
        """Whether every number is computed from those at its own place, as far as the layouts tell; such a rule gets a compact
        gradient of columns as it is stored, ``[m, r]``."""
        return not self.state_layout and not self.reads_weight


_rules: dict[str, Rule] = {}


def register_rule(name: str, rule: Rule) -> None:
    """Make a rule known by name, for ``grass_compile.Optimizer(..., rule=name)``; a name that is taken is replaced."""
    _rules[name] = rule


def registered_rules() -> Mapping[str, Rule]:
    """The rules that are known by name."""
    return _rules

"""What an update rule is."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Rule(abc.ABC):
    """An optimizer's arithmetic in the compact space.

    A rule is frozen and hashable (it is part of the key of what is compiled), and holds no tensors. `update` is traced and
    compiled once per shape, so it must be a pure function of its arguments.
    """

    state_names: ClassVar[tuple[str, ...]]
    """Names of the state tensors, each of the compact gradient's shape, zero when the rows are new."""

    hyper_names: ClassVar[tuple[str, ...]]
    """Names of the numbers that reach the graph as elements of one tensor, so that changing one never recompiles."""

    coupled_decay: ClassVar[bool] = False
    """Whether weight decay is added to the gradient (L2, of the selected rows; ``weight_decay`` is then one of ``hyper_names``)
    rather than applied to the whole weight."""

    @abc.abstractmethod
    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """The values for ``hyper_names`` from a parameter group, computed in double precision on the host."""

    @abc.abstractmethod
    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step.

        Args:
            compact_grad: ``[r, n]`` (rows) or ``[m, r]`` (columns), in the dtype of the state.
            state: the tensors named by ``state_names``, and ``step``: the number of updates these rows have had since their
                state was last zero, this one included; broadcasts against ``compact_grad``.
            hyper: 0-d tensors named by ``hyper_names``.

        Returns:
            The update, to be *subtracted* from the weight, learning rate included; and the new state.
        """

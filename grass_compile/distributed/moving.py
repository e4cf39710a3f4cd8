"""What of a weight the steps of an optimizer move: all that `diloco` asks of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from .layout import MeshDim


@dataclasses.dataclass(frozen=True)
class Moving:
    """Selected rows (columns), which the last step has moved; the others it has multiplied by ``1 - lr * weight_decay`` at most.

    Attributes:
        dim: the dimension that is indexed.
        index: ``int64[r]``, which of it.
        updates: steps that the weight has had in all, skipped ones included.
        decays: whether the others are multiplied (decoupled weight decay), or stay as they are.
        skipped: ``int32[1]`` on the device, how many of the steps have changed nothing, since their gradient was not finite.
    """

    dim: int
    index: Tensor
    updates: int
    decays: bool
    skipped: Tensor


@runtime_checkable
class MovesRows(Protocol):
    """An optimizer whose steps move selected rows of some weights."""

    def moving(self, parameter: Tensor) -> Moving | None:
        """What of a parameter the last step has moved; None if that is all of it."""

    def share_rows(self, mesh: Sequence[MeshDim]) -> None:
        """Have all ranks select the same rows, whatever their batches; all of them have to call this.

        Raises:
            ConfigError: on all ranks, if their settings differ; or a weight's rows are chosen by its gradient.
        """

"""`OuterWeight`: one parameter under DiLoCo, its outer copy, and which part of it can differ from that copy here.

Between two refreshes the steps of a worker move selected rows (columns) only. A row that has not moved since the weight last took
the outer values is the outer row times the decoupled weight decay since then, on every worker, so nothing has to be sent of it.
That stays true beyond a refresh because rows which have left the selection take the outer values whole; only those in force since
the message was sent are mixed with them.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from .moving import Moving


@dataclasses.dataclass
class Cut:
    """The part of a weight that a message is about.

    Attributes:
        dim: the dimension that is indexed.
        rows: ``int64[k]``, those that have moved; None for all of it.
        factor: what all others have been multiplied by.
    """

    dim: int = 0
    rows: Tensor | None = None
    factor: float = 1.0

    def checksum(self, step: int) -> int:
        """32 bits that all workers have to have in common."""
        rows = b"" if self.rows is None else self.rows.cpu().numpy().tobytes()
        return zlib.crc32(rows, zlib.crc32(repr((step, self.dim, self.rows is None)).encode()))


@dataclasses.dataclass
class Window:
    """What the steps since the weight last took the outer values have done to it.

    Attributes:
        whole: whether something else than selected rows may have moved.
        rows: which have, ``bool``; None as long as the weight is not projected.
        factor: the product of ``1 - lr * weight_decay``, skipped steps included.
        steps: how many it is of.
        skipped: steps that the weight had skipped before.
        updates: its steps in all, up to now.
    """

    whole: bool = False
    rows: Tensor | None = None
    factor: float = 1.0
    steps: int = 0
    skipped: int = 0
    updates: int = 0


class OuterWeight:
    """One parameter.

    Attributes:
        name: its name.
        parameter: this worker's.
        outer: the copy that is the same on all workers, at least fp32.
        window: see `Window`.
    """

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name, self.parameter = name, parameter
        self.outer = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        self.window = Window()
        self._moving: Moving | None = None

    def begin(self, moving: Moving | None) -> None:
        """Count from the steps that were taken before."""
        if moving is not None:
            self.window.updates, self.window.skipped = moving.updates, int(moving.skipped)

    # --------------------------------------------------------------------------------------------------- what has moved

    def note(self, moving: Moving | None, decay: float) -> None:
        """Note a step.

        Args:
            moving: what it has moved.
            decay: ``lr * weight_decay`` in it.
        """
        window, self._moving = self.window, moving
        if moving is None:
            window.whole = True
        elif moving.updates != window.updates:
            window.updates = moving.updates
            if window.rows is None:
                window.rows = torch.zeros(self.parameter.shape[moving.dim], dtype=torch.bool, device=self.parameter.device)
            window.rows.index_fill_(0, moving.index, True)
            if moving.decays:
                window.factor *= 1.0 - decay
                window.steps += 1

    def cut(self, sparse: bool) -> Cut:
        """What has moved.

        Args:
            sparse: whether to leave out the rest.
        """
        window, moving = self.window, self._moving
        if not sparse or window.whole or window.rows is None or moving is None:
            return Cut()
        return Cut(moving.dim, window.rows.nonzero().flatten(), self._factor(window, moving))

    def _factor(self, window: Window, moving: Moving) -> float:
        """What rows that have not moved have been multiplied by. Which steps were skipped is not known, only how many: under a
        schedule of learning rates that were skipped count as one of the mean."""
        skipped = int(moving.skipped) - window.skipped if window.steps else 0
        if not skipped or window.factor <= 0:
            return window.factor
        return math.pow(window.factor, (window.steps - skipped) / window.steps)

    def delta(self, cut: Cut) -> Tensor:
        """The outer values less this worker's, of what has moved, as a vector."""
        outer, inner = self.outer, self.parameter.detach()
        if cut.rows is not None:
            outer, inner = outer.index_select(cut.dim, cut.rows), inner.index_select(cut.dim, cut.rows)
        return (outer - inner).flatten()

    def sent(self) -> None:
        """Begin anew to note which rows move."""
        self.window.whole = False
        if self.window.rows is not None:
            self.window.rows.zero_()

    # ------------------------------------------------------------------------------------------------- what comes of it

    def length(self, cut: Cut) -> int:
        """How many numbers a message about a cut has."""
        count = self.outer.numel()
        return count if cut.rows is None else count // self.outer.shape[cut.dim] * len(cut.rows)

    def gradient(self, cut: Cut, mean: Tensor) -> Tensor:
        """The outer gradient, of the whole weight: the mean of what the workers have sent, and of the rest what is known."""
        mean = mean.to(self.outer.dtype)
        if cut.rows is None:
            return mean.view_as(self.outer)
        shape = list(self.outer.shape)
        shape[cut.dim] = len(cut.rows)
        found = self.outer * (1.0 - cut.factor) if cut.factor != 1.0 else torch.zeros_like(self.outer)
        return found.index_copy_(cut.dim, cut.rows, mean.view(shape))

    def merge(self, alpha: float) -> None:
        """Take the outer values, and of what has moved since the message was sent, or moves now, keep a share.

        Args:
            alpha: that share.
        """
        window, moving, merged = self.window, self._moving, self.outer
        if alpha:
            merged = torch.lerp(self.outer, self.parameter.detach().to(self.outer.dtype), alpha)
            window.whole = window.whole or moving is None
            if not window.whole and moving is not None and window.rows is not None:
                window.rows.index_fill_(0, moving.index, True)
                kept = window.rows.unsqueeze(1 - moving.dim)
                merged = torch.where(kept, merged, self.outer)
        else:
            self.sent()
        self.parameter.detach().copy_(merged)
        window.factor, window.steps = 1.0, 0
        window.skipped = int(moving.skipped) if moving is not None and moving.decays else 0

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"outer": self.outer, **vars(self.window)}

    def check(self, state: dict[str, Any]) -> None:
        """Refuse the state of another weight.

        Raises:
            StateError: its shape differs.
        """
        if state["outer"].shape != self.outer.shape:
            shapes = f"{list(state['outer'].shape)} in the state, and {list(self.outer.shape)} here"
            raise StateError(f"{self.name}: its shape is {shapes}. Nothing was changed.")

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state that fits."""
        self.outer.copy_(state["outer"])
        rows = state["rows"]
        values = {name: state[name] for name in vars(self.window)}
        self.window = Window(**{**values, "rows": None if rows is None else rows.to(self.outer.device, copy=True)})

"""`Report`: which weights were projected and which were not, for people to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: qualified name.
        shape: stored shape.
        dtype: of the parameter.
        projected: whether only ``rank`` rows or columns of its gradient are computed.
        axis: ``rows``, ``columns`` or None.
        rank: after clamping to the axis' length, or None.
        reason: why it is projected this way, or why it stays dense.
        dim: the stored dimension that is indexed, or None.
        tokens: tokens per step in its products, 0 if unknown.
        state_bytes: bytes of the update rule's state if it is projected, or None.
        projection: what takes its gradient into the compact space (``grass``: selected rows or columns), or None.
        spread: how it is spread over processes, in words; empty on one process, or if that is not known.
        sent_bytes: bytes that each rank hands to the collective for its gradient in a regular step, 0 on one process.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    projected: bool
    axis: str | None
    rank: int | None
    reason: str
    dim: int | None = None
    tokens: int = 0
    state_bytes: int | None = None
    projection: str | None = None
    spread: str = ""
    sent_bytes: int = 0

    @property
    def dense_elements(self) -> int:
        """Elements of the full gradient."""
        return int(torch.Size(self.shape).numel())

    @property
    def compact_elements(self) -> int:
        """Elements of the gradient that is really computed."""
        if not self.projected or self.rank is None or self.dim is None:
            return self.dense_elements
        return self.dense_elements // self.shape[self.dim] * self.rank

    @property
    def weight_grad_flops(self) -> float:
        """Flops of the gradient that is really computed, per regular step; a dense projection costs a product of its own."""
        product = 2.0 * self.compact_elements * self.tokens
        if self.projection in (None, "grass") or self.rank is None or self.dim is None:
            return product
        return product + 2.0 * self.tokens * self.shape[self.dim] * self.rank


@dataclasses.dataclass(frozen=True)
class Totals:
    """A quantity summed over all parameters, for dense training and for ours."""

    dense: float
    compact: float

    @property
    def ratio(self) -> float:
        """Compact over dense."""
        return self.compact / self.dense if self.dense else 1.0


@dataclasses.dataclass(frozen=True)
class Report:
    """A row per parameter, and totals. ``str(report)`` is a table.

    Attributes:
        rows: in the order of the model's parameters.
        moves: where projected weights move at the optimizer's next step, and why; empty if no optimizer was asked.
    """

    rows: tuple[Row, ...]
    moves: str = ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of a parameter.

        Raises:
            KeyError: no parameter has this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def projected(self) -> tuple[Row, ...]:
        """The rows of projected weights."""
        return tuple(row for row in self.rows if row.projected)

    @property
    def weight_grad_flops(self) -> Totals:
        """Flops of the weight gradients that are matrix products found in the graph, per regular step."""
        return Totals(
            sum(2.0 * row.dense_elements * row.tokens for row in self.rows),
            sum(row.weight_grad_flops for row in self.rows),
        )

    @property
    def gradient_bytes(self) -> Totals:
        """Bytes of all gradients; ours are never all alive at once."""
        return Totals(
            sum(row.dense_elements * row.dtype.itemsize for row in self.rows),
            sum(row.compact_elements * row.dtype.itemsize for row in self.rows),
        )

    @property
    def state_bytes(self) -> Totals:
        """Bytes of AdamW's two moments, which torch keeps in the weight's dtype; of projected weights what their rule keeps, and
        a basis."""
        moments = [2 * row.dense_elements * row.dtype.itemsize for row in self.rows]
        compact = [dense if row.state_bytes is None else row.state_bytes for row, dense in zip(self.rows, moments, strict=True)]
        return Totals(sum(moments), sum(compact))

    @property
    def sent_bytes(self) -> Totals:
        """Bytes that each rank hands to collectives for the gradients of projected weights in a regular step."""
        spread = [row for row in self.rows if row.sent_bytes]
        dense = sum(row.sent_bytes * row.dense_elements / row.compact_elements for row in spread)
        return Totals(dense, sum(row.sent_bytes for row in spread))

    def __str__(self) -> str:
        lines = [("name", "shape", "dtype", "projected", "axis", "rank", "reason"), *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
        table = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines]
        return "\n".join([table[0], "-" * min(120, len(table[0]) + 40), *table[1:], "", *self._summary()])

    def _summary(self) -> list[str]:
        quantities = (
            ("weight-gradient flops", self.weight_grad_flops, 1e9, "G"),
            ("gradient bytes", self.gradient_bytes, 2**20, "MiB"),
            ("optimizer state bytes", self.state_bytes, 2**20, "MiB"),
            *((("bytes sent, projected", self.sent_bytes, 2**20, "MiB"),) if self.sent_bytes.dense else ()),
        )
        moves = f"; they move {self.moves}" if self.moves else ""
        return [
            f"{len(self.projected)} of {len(self.rows)} parameters projected{moves}",
            *(
                f"{name:22} {total.dense / unit:9.2f} {symbol} -> {total.compact / unit:9.2f} {symbol}  ({total.ratio:.3f})"
                for name, total, unit, symbol in quantities
            ),
        ]


def _cells(row: Row) -> tuple[str, ...]:
    shape, dtype = "x".join(map(str, row.shape)), str(row.dtype).removeprefix("torch.")
    projected = "yes" if row.projected else "no"
    return row.name, shape, dtype, projected, row.axis or "-", str(row.rank or "-"), row.reason

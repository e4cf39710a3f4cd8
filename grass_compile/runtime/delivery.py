"""How the gradient of a projected weight reaches its ``.grad``: always from here, whoever made it.

A compiled region never hands a gradient to the weight itself. It is given the weight without its place in the autograd graph, and
a *leaf* beside it: an input of the compact gradient's shape, without storage, that no forward reads. The backward returns the
compact gradient as that of the leaf, autograd adds it up over all calls of one backward, and `_deliver` makes a `CompactGrad` of
the sum.

So only code outside of the regions that project a weight reaches the weight's own accumulator, and whether it will is known
before a backward runs (`grass_compile.runtime.call`). The two may arrive in any order. Their sum is the same: the selected rows
of the full gradient are added.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _autograd, _dynamo
from ..distributed.averaging import from_outside
from ..distributed.crossed import refused_outside
from ..distributed.layout import part_like
from ..math.finite import is_finite
from ..math.projection import selected
from ..math.selection import scores, top
from .compact import leaf_like
from .gradient import CompactGrad
from .moved import MovedGrad
from .parameter import ProjectedParameter


def leaf_of(record: ProjectedParameter) -> Tensor:
    """The input of a compiled graph whose gradient is a weight's compact gradient."""
    if record.leaf is None:
        assert record.assigned is not None
        record.leaf = leaf_like(record.spanned, record.assigned).requires_grad_()
        record.leaf_node = _autograd.accumulator(record.leaf)
        _on_arrival(record, record.leaf, _deliver)
    return record.leaf


def twin_of(record: ProjectedParameter) -> Tensor:
    """A dense parameter as the input of a graph that clips all gradients: the clipped gradient comes back for it, and the
    parameter's own accumulator is left to gradients from outside."""
    twin = record.parameter.detach().requires_grad_()
    _on_arrival(record, twin, _deliver_dense)
    return twin


def _on_arrival(record: ProjectedParameter, leaf: Tensor, deliver: Callable[[ProjectedParameter, Tensor], None]) -> None:
    me = weakref.ref(record)

    @_dynamo.outside_dynamo
    def arrived(leaf: Tensor) -> None:
        values, leaf.grad = leaf.grad, None
        record = me()
        if record is not None and values is not None:
            deliver(record, values)

    leaf.register_post_accumulate_grad_hook(arrived)


def _deliver(record: ProjectedParameter, values: Tensor) -> None:
    """Turn the compact gradient of one backward into the weight's ``.grad``, or add it to what is there."""
    record.flight = None
    present = record.gradient
    if isinstance(present, CompactGrad) and not present.zeroed:
        present.compact.add_(values)
        if record.averaging is not None:
            record.averaging.arrived(present.compact, is_new=False, mixed=False)
        return
    assert record.assigned is not None and record.rows is not None
    fresh = record.rows is not record.state[record.selector]
    # Nobody writes into the basis of a state, so that need not be copied.
    rows = record.rows.clone() if fresh or record.options.projection != "galore" else record.rows
    made = _compact_grad(record, values, rows, fresh, record.proposed.clone() if record.proposes else None)
    mixed = present is not None and not isinstance(present, (CompactGrad, MovedGrad))
    if mixed:
        made.compact.add_(made.part_of(_full(record)))
        made.mixed = True
    _put(record, made)
    if record.averaging is not None:
        record.averaging.arrived(made.compact, is_new=True, mixed=mixed)


def _deliver_dense(record: ProjectedParameter, values: Tensor) -> None:
    present = record.gradient
    record.gradient = values if present is None else present + values


def reduced(record: ProjectedParameter, full: Tensor) -> CompactGrad:
    """The compact form of a weight's full gradient, which came from code outside of any region that projects it.

    Rows that a gradient of the same step was computed for stay; otherwise, on a refresh, the full gradient chooses.
    """
    assert record.assigned is not None
    record.check_known()
    if record.averaging is not None:
        full = record.averaging.layout.mean_(full.clone())
    dim, rank, projection = record.assigned.dim, record.assigned.rank, record.options.projection
    rows, fresh, next_rows = record.state[record.selector].clone(), False, None
    if record.chosen is not None:
        rows, fresh, next_rows = record.chosen
    elif record.renewed:
        rows, fresh = record.select(full), True
    elif record.due:
        next_rows = top(scores(full, dim), rank)
    compact = selected(projection, dim, rank, full, rows)
    compact = compact.to(torch.promote_types(compact.dtype, torch.float32))
    if fresh and record.options.checked and not record.options.blind:
        compact = torch.where(is_finite(full), compact, torch.nan)
    return _compact_grad(record, compact, rows, fresh, next_rows)


def reduce(record: ProjectedParameter) -> CompactGrad:
    """Replace the full gradient in a weight's ``.grad`` by its compact form."""
    with torch.no_grad():
        made = reduced(record, _full(record))
    made.mixed = True
    _put(record, made)
    return made


def _full(record: ProjectedParameter) -> Tensor:
    """The full gradient in a weight's ``.grad``, or the part of it that goes with the part of the weight which this rank owns."""
    full = record.parameter.grad
    assert full is not None
    if record.config().crossed is not None:
        raise refused_outside(record.label)
    full = part_like(record.parameter, full) if record.sharded else full
    return full.to_dense() if full.layout is not torch.strided else full


def _compact_grad(record: ProjectedParameter, values: Tensor, rows: Tensor, fresh: bool, next_rows: Tensor | None) -> CompactGrad:
    assert record.assigned is not None
    how = record.assigned.dim, record.weight, record.label, fresh, next_rows, record.options.projection
    return CompactGrad(values, rows, *how)


def _put(record: ProjectedParameter, made: CompactGrad) -> None:
    record.gradient = made
    record.chosen = made.rows, made.fresh, made.next_rows
    record.delivered, record.seen = weakref.ref(made), record.look()
    made.on_touch = record.on_touch()
    if record.config().crossed is not None:
        made.outside = functools.partial(refused_outside, record.label)
    elif record.averaging is not None:
        made.outside = functools.partial(from_outside, record.label)

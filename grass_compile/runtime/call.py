"""One forward through a compiled region, and what its backward does with each weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _torch
from ..errors import StateError
from ..math.layout import Action
from .parameter import ProjectedParameter, lookup


class Call:
    """One forward through a compiled region that may be followed by one backward.

    The autograd node of the call keeps this object alive, through the hooks on it: a graph that is dropped without a backward
    drops its `Call`, and with it the claim on the weights.
    """

    __slots__ = ("__weakref__", "_actions", "_backward", "_clips", "_in_graph", "_numbers", "_records", "_refresh", "_updates")

    def __init__(
        self,
        records: Sequence[ProjectedParameter],
        refresh: Sequence[bool],
        backward: _torch.LazyGraph,
        clips: bool,
        numbers: Sequence[tuple[Tensor, ProjectedParameter, bool]],
    ) -> None:
        """Note a forward.

        Args:
            records: the weights that it projects.
            refresh: for each, whether its backward chooses new rows.
            backward: that backward.
            clips: whether that can clip all gradients of the optimizer.
            numbers: each tensor of hyper-parameters that went in, with a record that it is of, and whether that is a refresh.
        """
        self._numbers = tuple(numbers)
        self._clips = clips
        self._records, self._refresh, self._backward = tuple(records), tuple(refresh), backward
        self._in_graph = in_graph(records, refresh)
        self._updates = [record.state["updates"] for record in records]
        self._actions: tuple[Action, ...] = ()
        for record in records:
            record.outstanding.add(self)

    @_torch.outside_dynamo
    def before_backward(self, grad_outputs: Any) -> None:
        """Decide what this backward does with each gradient. Runs before anything was computed.

        Raises:
            StateError: the gradient would be that of a weight which has moved; names it, and what to do.
        """
        for record, updates in zip(self._records, self._updates, strict=True):
            if record.holder is None or lookup(record.parameter) is not record:
                raise StateError(f"{record.name}: its optimizer was replaced or deleted between forward and backward.")
            if record.state["updates"] != updates:
                raise StateError(
                    f"{record.name}: it has moved since the forward that this backward belongs to (a second backward through "
                    "one graph, or an opt.step() in between). Run the forward again; to use one forward twice, put its "
                    "backwards under opt.accumulate()."
                )
            if record.moved:
                raise StateError(
                    f"{record.name}: it was already updated by a backward since the last opt.step(). Call opt.step() after "
                    "each backward, or put every micro-batch but the last under opt.accumulate()."
                )
            if record.parameter.grad is not None and record.pending is None:
                raise StateError(
                    f"{record.name}: it is projected, yet its .grad holds a full gradient from outside its compiled region. Set "
                    ".grad to None, or keep this weight dense with exclude=."
                )
        wanted = [self._wanted(record) for record in self._records]
        steps = [self._may_step(record) for record in self._records]
        holder = self._records[0].holder
        assert holder is not None
        clip = self._clips and all(steps) and all(wanted) and all(parameter.grad is None for parameter in holder.records)
        self._actions = tuple(
            _action(record, step, refresh, clip) if want else "skip"
            for record, want, step, refresh in zip(self._records, wanted, steps, self._in_graph, strict=True)
        )
        for record, action, refresh in zip(self._records, self._actions, self._refresh, strict=True):
            if action == "step":
                record.parameter.grad = None  # at most what zero_grad(set_to_none=False) has left
                if refresh and record.options.blind:
                    record.restart()
        self._refresh_numbers()
        self._backward.key = self._in_graph, self._actions, clip

    def _refresh_numbers(self) -> None:
        """Bring the numbers that went in with the forward up to date: the learning rate may have changed since."""
        for tensor, record, fresh in self._numbers:
            assert record.holder is not None
            current = record.holder.hyper(record, fresh)
            if current is not tensor:
                with _torch.unversioned([tensor]):
                    tensor.copy_(current)

    @staticmethod
    def _wanted(record: ProjectedParameter) -> bool:
        """Whether this backward is to train the weight: not ``torch.autograd.grad`` of the inputs alone.

        Raises:
            StateError: the weight is named in ``backward(inputs=...)``, which its compact gradient cannot reach.
        """
        if _torch.will_run(record.leaf):
            return True
        if not _torch.will_run(record.parameter):
            return False
        raise StateError(
            f"{record.name}: its gradient cannot be asked for by name (backward(inputs=...) or torch.autograd.grad), since it is "
            "never formed. Call loss.backward() without inputs, or keep this weight dense with exclude=."
        )

    def _may_step(self, record: ProjectedParameter) -> bool:
        assert record.holder is not None
        alone = len(record.outstanding) == (self in record.outstanding)
        return alone and not record.waits and not record.holder.deferred

    @_torch.outside_dynamo
    def after_backward(self, grad_inputs: Any, grad_outputs: Any) -> None:
        """Note what the backward has done."""
        moved = []
        for record, action, refresh in zip(self._records, self._actions, self._refresh, strict=True):
            if action != "skip":  # a backward that was not for the weights leaves theirs still to come
                record.outstanding.discard(self)
            if action in ("choose", "keep"):
                record.expect(refresh)
            if action != "step":
                continue
            moved.append(record.parameter)
            record.stepped(refresh)
        _torch.mark_written(moved)


def in_graph(records: Sequence[ProjectedParameter], refresh: Sequence[bool]) -> tuple[bool, ...]:
    """For each weight, whether its graphs are those of a refresh, given whether one is due: never where rows are drawn blindly,
    always where every step's graph can choose."""
    options = [record.options for record in records]
    return tuple(o.proposes_anytime or (new and not o.blind) for o, new in zip(options, refresh, strict=True))


def expected(
    records: Sequence[ProjectedParameter], refresh: tuple[bool, ...], clips: bool
) -> tuple[tuple[bool, ...], tuple[Action, ...], bool]:
    """The key of the backward that a call most likely needs; see `Call`."""
    fused = [record.holder is not None and record.holder.fused for record in records]
    clip = clips and all(fused)
    actions = (_action(record, step, new, clip) for record, step, new in zip(records, fused, refresh, strict=True))
    return refresh, tuple(actions), clip


def _action(record: ProjectedParameter, step: bool, refresh: bool, clip: bool) -> Action:
    """What to do with one gradient, given whether its weight may move and whether all gradients are clipped on the way."""
    assert record.holder is not None
    if step and (clip or record.holder.max_norm is None):
        return "step"
    return "choose" if refresh and not record.waits else "keep"

"""One forward through a compiled region, and what its backward does with each weight gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _autograd, _dynamo
from ..config import SiteConfig
from ..distributed.averaging import from_outside
from ..distributed.layout import averages
from ..errors import StateError
from ..math.layout import Action
from ..ops.journal import Journal
from . import registry
from .manager import ProjectionManager
from .moved import MovedGrad
from .parameter import ProjectedParameter

Key = tuple[tuple[bool, ...], tuple[Action, ...], bool, bool]
"""The work of one backward: for each weight, whether its graph is that of a refresh; for each, what to do with its gradient;
whether all gradients are clipped by their common norm; and whether they are averaged over the ranks."""

Start = Callable[[Key, Callable[[Journal], None]], None]
"""Says what the backward that is about to run in this thread has to do, and whom to tell if it breaks off."""


class Call:
    """One forward through a compiled region that may be followed by one backward.

    The autograd node of the call keeps this object alive, through the hooks on it: a graph that is dropped without a backward
    drops its `Call`, and with it the claim on the weights.
    """

    def __init__(
        self,
        records: Sequence[ProjectedParameter],
        refresh: Sequence[bool],
        start: Start,
        clips: bool,
        numbers: Sequence[tuple[Tensor, ProjectedParameter, bool]],
        others: Sequence[Tensor],
        syncs: bool = True,
    ) -> None:
        """Note a forward.

        Args:
            records: the weights that it projects.
            refresh: for each, whether its backward chooses new rows.
            start: that backward.
            clips: whether that can clip all gradients of the optimizer.
            numbers: each tensor of hyper-parameters that went in, with a record that it belongs to, and whether that is a
                refresh.
            others: the parameters that it does not project.
            syncs: whether the backward averages gradients over the ranks.
        """
        self._syncs = syncs
        self._numbers, self._clips, self._others, self._start = tuple(numbers), clips, tuple(others), start
        self._records, self._refresh = tuple(records), tuple(refresh)
        self._in_graph = in_graph(records, refresh)
        self._updates = [record.state["updates"] for record in records]
        self._addresses = [record.weight.data_ptr() for record in records]
        self._configs = [record.config() for record in records]
        self._actions: tuple[Action, ...] = ()
        for record in records:
            record.outstanding.add(self)
        for manager in {manager_of(record) for record in records}:
            manager.note_forward()

    # ----------------------------------------------------------------------------------------------- before the backward

    @_dynamo.outside_dynamo
    def before_backward(self, grad_outputs: Any) -> None:
        """Decide what this backward does with each gradient. Runs before anything was computed.

        Raises:
            StateError: the gradient would be that of a weight which has moved; names it, and what to do.
        """
        for record, updates in zip(self._records, self._updates, strict=True):
            _check(record, updates)
        managers = {id(manager): manager for manager in map(manager_of, self._records)}
        for manager in managers.values():
            manager.begin_backward(_autograd.graph_task())
        others = [_autograd.will_run(node) for node in _autograd.accumulators([record.gathered for record in self._records])]
        wanted = [self._wanted(record, other) for record, other in zip(self._records, others, strict=True)]
        others = [other or self._part_gets_another(record) for record, other in zip(self._records, others, strict=True)]
        forwards = zip(self._records, others, self._addresses, self._configs, strict=True)
        reasons = [self._why_it_waits(*forward) if want else None for want, forward in zip(wanted, forwards, strict=True)]
        waits = [reason is not None for reason in reasons]
        (manager, *more) = managers.values()
        clip = self._clips and not more and not any(waits) and all(wanted) and manager.nothing_else_comes()
        self._actions = tuple(
            _action(record, not wait, refresh, clip) if want else "skip"
            for record, want, wait, refresh in zip(self._records, wanted, waits, self._in_graph, strict=True)
        )
        for record, action, refresh in zip(self._records, self._actions, self._refresh, strict=True):
            if action == "step":
                record.gradient = None  # at most what zero_grad(set_to_none=False) has left
                if refresh and record.options.blind:
                    record.restart()
        self._refresh_numbers()
        self._start((self._in_graph, self._actions, clip, self._decide_averages()), self._broke_off)

    def _decide_averages(self) -> bool:
        """Whether this backward averages gradients inside its graph: not if what waits has to be averaged along with them."""
        syncs = self._syncs and not any(r.averaging is not None and r.averaging.apart and r.waits for r in self._records)
        for record, action, full in zip(self._records, self._actions, self._in_graph, strict=True):
            if record.averaging is not None:
                record.averaging.expect(averages(action, full, syncs), self._syncs, along=record.in_flight)
        return syncs

    def _refresh_numbers(self) -> None:
        """Bring the numbers that went in with the forward up to date: the learning rate may have changed since."""
        for tensor, record, fresh in self._numbers:
            current = manager_of(record).hyper(record, fresh)
            if current is not tensor:
                manager_of(record).overwrite(tensor, current)

    def _wanted(self, record: ProjectedParameter, other: bool) -> bool:
        """Whether this backward is to train the weight: not ``torch.autograd.grad`` of the inputs alone.

        Args:
            record: the weight.
            other: whether this backward will bring it a gradient from outside of this region too.

        Raises:
            StateError: the weight is named in ``backward(inputs=...)``, which its compact gradient cannot reach.
        """
        if not record.parameter.requires_grad:  # frozen since the forward
            return False
        if _autograd.will_run(record.leaf_node):
            if other and (record.averaging is not None or record.gathered is not record.parameter):
                raise from_outside(record.label)
            return True
        held = [p for p in self._others if p.requires_grad and registry.lookup(p) is not None]
        named = [_autograd.will_accumulate(node) for node in _autograd.accumulators(held)]
        if (named and all(named)) or other:
            raise StateError(
                f"{record.label}: its gradient cannot be asked for by name (backward(inputs=...) or torch.autograd.grad), since "
                "it is never formed. Call loss.backward() without inputs, or keep this weight dense with exclude=."
            )
        return False

    def _part_gets_another(self, record: ProjectedParameter) -> bool:
        """Whether this backward will bring a gradient to the part of a sharded weight that this rank owns, as a penalty does that
        a script computes from its parameters."""
        return record.sharded and _autograd.will_run(_autograd.accumulator(record.parameter))

    def _why_it_waits(self, record: ProjectedParameter, other: bool, address: int, config: SiteConfig) -> str | None:
        """Why a weight may not move inside this backward, or None if it may. The one place that decides.

        Args:
            record: the weight.
            other: whether this backward will bring it a gradient from outside of this region too.
            address: where it stood at the forward, which is where this backward would write it.
            config: what was asked of it then, which is what this backward would do.
        """
        manager = manager_of(record)
        if (reason := manager.deferred) is not None:
            return reason
        if len(record.outstanding) != (self in record.outstanding):
            return "several forwards of it wait for their backward"
        if record.waits:
            return "a gradient of it waits for opt.step() already"
        if config.exchanges:
            return "its update exchanges numbers with other ranks"
        if record.averaging is not None and not self._syncs:
            return "no_sync() leaves it a gradient of its own on each rank"
        if other:
            return "it gets a gradient from outside of this region too"
        if record.weight.data_ptr() != address:
            return "its storage was replaced since the forward"
        if record.config() != config:
            return "its settings have changed since the forward"
        present = record.gradient
        if present is not None and record.pending is None and not isinstance(present, MovedGrad):
            return "its .grad holds a gradient already"
        return None

    # ------------------------------------------------------------------------------------------------ after the backward

    @_dynamo.outside_dynamo
    def after_backward(self, grad_inputs: Any, grad_outputs: Any) -> None:
        """Note what the backward has done."""
        moved = []
        for record, action, refresh in zip(self._records, self._actions, self._refresh, strict=True):
            if action != "skip":  # a backward that was not for the weights leaves theirs still to come
                record.outstanding.discard(self)
            if action in ("choose", "keep"):
                record.expect(refresh)
            if action == "step":
                moved.append(record.weight)
                self._note_step(record, refresh)
        _autograd.mark_written(moved)
        for record, action in zip(self._records, self._actions, strict=True):
            if action == "step":
                record.seen = record.look()

    def _note_step(self, record: ProjectedParameter, refresh: bool) -> None:
        record.stepped(refresh)
        manager_of(record).note_fused_step()

    def _broke_off(self, journal: Journal) -> None:
        """Note what a backward has done that raised in the middle."""
        moved, steps = [], [action == "step" for action in self._actions]
        for record, step, refresh in zip(self._records, steps, self._refresh, strict=True):
            record.outstanding.discard(self)
            if not step:
                continue
            address = record.weight.data_ptr()
            if address in journal.stepped:
                moved.append(record.weight)
                self._note_step(record, refresh)
            elif refresh and not record.options.blind and record.scratch_address() in journal.refreshed:
                record.broke_off_after_refresh()
        _autograd.mark_written(moved)
        if moved:
            manager_of(self._records[0]).broke_off(len(moved), sum(steps))


def _check(record: ProjectedParameter, updates: int) -> None:
    """Refuse a backward whose gradient would not be that of the weight as it is.

    Args:
        record: the weight.
        updates: how many it had had at the forward.

    Raises:
        StateError: naming it, and what to do.
    """
    if record.owner is None or registry.lookup(record.parameter) is not record:
        raise StateError(f"{record.label}: its optimizer was replaced or deleted between forward and backward.")
    manager = manager_of(record)
    if record.moved and manager.broken:
        raise StateError(f"{record.label}: {manager.broken}")
    if record.state["updates"] != updates:
        raise StateError(
            f"{record.label}: it has moved since the forward that this backward belongs to (a second backward through one graph, "
            "another loss of the same weights whose backward came first, or an opt.step() in between). Run the forward again; to "
            "use one forward twice, put its backwards under opt.accumulate(); or make the optimizer with step_in_backward=False."
        )
    if record.moved:
        manager.watch.failed("several backwards come before one opt.step()")
        raise StateError(
            f"{record.label}: it was already updated by a backward since the last opt.step(). Call opt.step() after each "
            "backward; put every micro-batch but the last under opt.accumulate(); or, for several losses or checkpointed blocks "
            "that share weights, make the optimizer with step_in_backward=False."
        )
    present = record.gradient
    if isinstance(present, MovedGrad) and not present.zeroed:
        manager.watch.failed("gradients are not cleared after opt.step()")
        raise StateError(
            f"{record.label}: the gradient of its last step was not cleared, and cannot be added to since it is gone. Call "
            "opt.zero_grad() after each opt.step(); to add up gradients, use opt.accumulate() or step_in_backward=False."
        )


def manager_of(record: ProjectedParameter) -> ProjectionManager:
    """The manager of a record whose optimizer lives."""
    manager = record.owner
    assert isinstance(manager, ProjectionManager)
    return manager


def in_graph(records: Sequence[ProjectedParameter], refresh: Sequence[bool]) -> tuple[bool, ...]:
    """For each weight, whether its graphs are those of a refresh, given whether one is due: never where rows are drawn blindly,
    always where every step's graph can choose."""
    options = [record.options for record in records]
    return tuple(o.proposes_anytime or (new and not o.blind) for o, new in zip(options, refresh, strict=True))


def expected(records: Sequence[ProjectedParameter], refresh: tuple[bool, ...], clips: bool) -> list[Key]:
    """The keys of the backwards that calls most likely need: those that move the weights and those that do not, as far as the
    optimizers may come to want them."""
    modes = {manager_of(record).watch.mode for record in records}
    keys: list[Key] = []
    for fused in (False, True):
        if modes != {not fused}:
            clip = clips and fused
            actions = (_action(record, fused, new, clip) for record, new in zip(records, refresh, strict=True))
            keys.append((refresh, tuple(actions), clip, True))
    return keys


def _action(record: ProjectedParameter, step: bool, refresh: bool, clip: bool) -> Action:
    """The action for one gradient, given whether its weight may move and whether all gradients are clipped on the way."""
    if step and (clip or manager_of(record).max_norm is None):
        return "step"
    return "choose" if refresh and not record.waits else "keep"

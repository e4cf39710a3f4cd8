"""Which parameters are projected, what has become of each, and which backward passes are still to come.

A compiled graph serves many parameters, so nothing about a parameter is baked into one: at each call the backend looks its
`ProjectedParameter` up here.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _torch
from ..config import GroupOptions, SiteConfig
from ..errors import StateError
from ..math import selection
from ..math.finite import is_finite
from ..math.layout import layout_of, settled_state, step_state
from ..math.noise import new_key
from ..math.projection import SELECTORS, singular_vectors
from ..math.refresh import settled
from ..math.rule import Rule
from ..math.transfer import to_device
from ..ops.scores import DUE
from .compact import Assigned, initial_state, is_compact, leaf_like
from .gradient import CompactGrad

if TYPE_CHECKING:
    from .call import Call
    from .manager import ProjectionManager


Kernel = Callable[..., None]
"""``kernel(config, dim, compact_grad, weight, hyper, *state)`` runs one compiled step by itself, in place."""


class ProjectedParameter:
    """One parameter of an optimizer that projects.

    Attributes:
        name: its qualified name, or ``""`` if the optimizer was given parameters without names.
        number: how many parameters its optimizer was given before.
        group: its parameter group, read live.
        options: our keywords of that group, validated.
        rule: the update rule.
        holder: what holds the records of its optimizer.
        assigned: how it is projected, or None as long as it is not.
        kernel: the step by itself; supplied by the backend along with ``assigned``.
        outstanding: forwards that wait for their backward.
        moved: whether a backward has updated it since the last ``opt.step()``.
        flight: the backward in which a compact gradient has been computed that autograd has not delivered yet (it waits until
            every call in the same graph has contributed), or None.
        rows: the index of that gradient; with a dense projection, the basis or the key.
        proposes: whether the backward of that gradient has proposed the rows to take next.
        trained_dense: whether full moments are known to be no mere zeros.
        refreshed: whether the last update was the first of rows chosen by its gradient.
        skipped: how many of its steps are known to have been skipped, see `grass_compile.runtime.nonfinite`.
    """

    __slots__ = (
        "__weakref__", "_agrees", "_configs", "_holder", "_lead", "_leaf", "_noise", "_parameter", "_proposed", "_scratch",
        "assigned", "flight", "group", "kernel", "moved", "name", "number", "options", "outstanding", "proposes", "refreshed",
        "rows", "rule", "skipped", "trained_dense",
    )  # fmt: skip

    def __init__(
        self, parameter: Tensor, name: str, group: dict[str, Any], options: GroupOptions, rule: Rule, holder: ProjectionManager
    ) -> None:
        self._parameter = weakref.ref(parameter)
        self._holder = weakref.ref(holder)
        self._configs: dict[Any, SiteConfig] = {}
        self._leaf: Tensor | None = None
        self.name, self.group, self.options, self.rule = name, group, options, rule
        self.number = len(holder.records)
        self.assigned: Assigned | None = None
        self.kernel: Kernel | None = None
        self.outstanding: weakref.WeakSet[Call] = weakref.WeakSet()
        self.moved = False
        self.trained_dense = False
        self.refreshed, self.skipped = False, 0
        self.flight: int | None = None
        self.rows: Tensor | None = None
        self._scratch: Tensor | None = None
        self._noise: Tensor | None = None
        self._proposed: Tensor | None = None
        self.proposes = False
        self._lead: weakref.ref[ProjectedParameter] | None = None
        self._agrees = False

    @property
    def parameter(self) -> Tensor:
        parameter = self._parameter()
        assert parameter is not None
        return parameter

    @property
    def holder(self) -> ProjectionManager | None:
        """None if the optimizer is gone."""
        holder = self._holder()
        return holder if holder is not None and holder.optimizer is not None else None

    @property
    def state(self) -> dict[str, Any]:
        """``optimizer.state[parameter]``."""
        assert self.holder is not None and self.holder.optimizer is not None
        return self.holder.optimizer.state[self.parameter]  # type: ignore[no-any-return]

    def config(self) -> SiteConfig:
        """What is asked of this weight now; the axis is fixed once it is assigned."""
        decays = self.group["weight_decay"] != 0
        axis = self.assigned.axis if self.assigned else self.options.axis
        key = (decays, axis)
        if key not in self._configs:
            self._configs[key] = self.options.site(axis, decays, self.rule)
        return self._configs[key]

    def refusal(self, name: str) -> str | None:
        """Why this weight stays dense whatever the graph looks like, or None.

        Args:
            name: the name to match ``exclude`` with if the optimizer knows none.
        """
        if reason := refusal(self.name or name, self.parameter, self.options):
            return reason
        if self.assigned is None and self._trained_dense():
            return "the optimizer has already trained it dense and holds its full moments"
        return None

    def _trained_dense(self) -> bool:
        """Whether there are full moments. All zero, they come from a step that only initialised the state, and are dropped."""
        moments = [self.optimizer_state()[key] for key in self.rule.state_names if key in self.optimizer_state()]
        if moments and not self.trained_dense:
            self.trained_dense = any(bool(moment.count_nonzero()) for moment in moments)
            if not self.trained_dense:
                self.state.clear()
        return bool(moments) and self.trained_dense

    def optimizer_state(self) -> Mapping[str, Any]:
        """The state as it is, without creating an entry."""
        optimizer = self.holder.optimizer if self.holder is not None else None
        return optimizer.state.get(self.parameter, {}) if optimizer is not None else {}

    def assign(self, assigned: Assigned, kernel: Kernel) -> None:
        """Settle how this weight is projected, and create its compact state.

        Raises:
            StateError: it is already projected in another way.
        """
        if self.assigned is not None and self.assigned != assigned:
            raise StateError(
                f"{self.name}: one compiled region projects it along {self.assigned.axis} with rank {self.assigned.rank}, "
                f"another along {assigned.axis} with rank {assigned.rank}. Set axis= for its parameter group."
            )
        self.kernel = kernel
        if self.assigned is None:
            self.assigned = assigned
        if not is_compact(self.state):
            options = self.options
            how = options.on_refresh, self.rule, options.state_dtype, options.checked, options.projection
            self.state.update(initial_state(self.parameter, assigned, *how))
            self.refreshed, self.skipped = False, 0

    def resume(self, assigned: Assigned, state: dict[str, Any]) -> None:
        """Go on from a loaded state that fits."""
        assert self.holder is not None and self.holder.optimizer is not None
        self.assigned = assigned
        state["step"] = state["step"].to(self.parameter.device if self.config().counted else "cpu")
        self.holder.optimizer.state[self.parameter] = state
        self.refreshed, self.skipped = False, int(state["nonfinite"])

    @property
    def leaf(self) -> Tensor:
        """The input of the compiled graph whose gradient is this weight's compact gradient; it has no storage to speak of."""
        if self._leaf is None:
            assert self.assigned is not None
            self._leaf = leaf_like(self.parameter, self.assigned).requires_grad_()
            me = weakref.ref(self)
            self._leaf.register_post_accumulate_grad_hook(lambda leaf: _deliver(me(), leaf))
        return self._leaf

    @property
    def waits(self) -> bool:
        """Whether a compact gradient waits for ``opt.step()``, or is on its way there."""
        return self.in_flight or (self.pending is not None and not self.pending.zeroed)

    @property
    def in_flight(self) -> bool:
        """Whether a compact gradient is on its way; one of a backward that has broken off is not."""
        return self.flight is not None and self.flight == _torch.graph_task()

    def forget(self) -> None:
        """Forget what follows from the options; they have changed."""
        self._configs.clear()
        self._leaf = self._scratch = self._noise = self._proposed = self.rows = None
        self.moved = self.trained_dense = self.proposes = False
        self.flight = None
        self._lead = None

    @property
    def pending(self) -> CompactGrad | None:
        """The compact gradient that waits for ``opt.step()``."""
        gradient = self.parameter.grad
        return gradient if isinstance(gradient, CompactGrad) else None

    @property
    def due(self) -> bool:
        """Whether the next backward has to choose new rows: those of its own gradient, or those of the next step."""
        if self.options.scores == "exact":
            return self.since_refresh == 0
        updates = int(self.state["updates"])
        return updates == 0 or self._since_refresh(updates + 1) == 0

    @property
    def renewed(self) -> bool:
        """Whether the next update is that of rows which its own backward chooses."""
        return self.due and self.options.scores == "exact"

    @property
    def offset(self) -> int:
        """Steps by which its refreshes, but for the first, come early."""
        gap, slots = self.options.update_proj_gap, self.options.stagger
        if slots == 1 or self.holder is None:
            return 0
        return self.lead.number * slots // len(self.holder.records) * gap // slots

    def next_step(self, fresh: bool) -> int:
        """Updates since the moments were last zero, the next one included; 0 where the step itself counts them.

        Args:
            fresh: whether the next update is the first of new rows.
        """
        if self.config().counted:
            return 0
        return 1 if fresh and self.options.on_refresh == "reset" else int(self.state["step"]) + 1

    @property
    def since_refresh(self) -> int:
        """Updates since the last refresh, the next one not included; of a refresh itself, 0."""
        return self._since_refresh(int(self.state["updates"]))

    def _since_refresh(self, updates: int) -> int:
        return min(updates, (updates + self.offset) % self.options.update_proj_gap)

    def hyper_key(self, fresh: bool) -> tuple[Any, ...]:
        """Weights for which this is equal may share one tensor of hyper-parameters."""
        seed = self.state["updates"] if self.draws else 0
        alike = id(self.group), self.parameter.dtype, self.parameter.device, self.offset
        return *alike, self.next_step(fresh), seed

    @property
    def draws(self) -> bool:
        """Whether the next step draws random numbers inside the graph: to round, or to estimate scores."""
        return self.options.stochastic_rounding or (self.options.scores == "estimate" and self.due)

    def tensors(self) -> list[Tensor]:
        """The state tensors that a step reads and writes, in their order."""
        state = self.state
        return [state[name] for name in step_state(self.config())]

    def noise(self, drawn: bool) -> Tensor:
        """The noise that draws new rows, ``[m]``; not part of the state, since the seed and the updates are.

        Args:
            drawn: whether its values matter.
        """
        if self._noise is None:
            assert self.assigned is not None
            wide = torch.promote_types(self.parameter.dtype, torch.float32)
            self._noise = torch.full((self.parameter.shape[self.assigned.dim],), 0.5, dtype=wide, device=self.parameter.device)
        if drawn:
            with _torch.unversioned([self._noise]):
                selection.fill_with_noise(self._noise, self.options.seed, self.lead.number, self.state["updates"])
        return self._noise

    def select(self, gradient: Tensor) -> Tensor:
        """New rows from a full gradient, as a refresh chooses them; or a new basis or key."""
        assert self.assigned is not None
        config = self.config()
        if config.projection == "galore":
            return singular_vectors(gradient, self.assigned.dim, self.assigned.rank)
        if self.options.blind:
            return self._drawn()
        noise = self.noise(True) if config.selection in selection.DRAWN_BY_SCORE else None
        return selection.select(config.selection, selection.scores(gradient, self.assigned.dim), noise, self.assigned.rank)

    def scratch(self) -> Tensor:
        """Where a refresh puts what it chooses."""
        if self._scratch is None:
            self._scratch = self.chosen.clone()
        return self._scratch

    @property
    def selector(self) -> str:
        """The state tensor that says where the compact gradient lies."""
        return SELECTORS[self.options.projection]

    @property
    def chosen(self) -> Tensor:
        """The index (the basis, the key) of the state."""
        return self.state[self.selector]  # type: ignore[no-any-return]

    def _choose(self, rows: Tensor) -> None:
        """Make ``rows`` what `chosen` is.

        A basis is taken over as it is, and the old one is not written: it may be that of a compact gradient that somebody keeps.
        """
        if self.options.projection == "galore":
            self.state[self.selector] = rows
            self._scratch = None
            return
        with _torch.unversioned([self.chosen]):
            self.chosen.copy_(rows)

    def _drawn(self) -> Tensor:
        """What the refresh that is due takes, where that depends on no gradient: a key, or rows."""
        assert self.assigned is not None
        if self.options.projection == "gaussian":
            return to_device(new_key(self.options.seed, self.number, self.state["updates"]), self.parameter.device)
        noise = self.noise(True)
        return selection.select(self.options.selection, torch.ones_like(noise), noise, self.assigned.rank)

    def inputs(self, refresh: bool) -> list[Tensor]:
        """`tensors`, and the noise if there is any, as the inputs of a compiled region.

        A region that may choose new rows gets a scratch copy of the index: the new rows become the state's when the weight
        moves, and not before, so that a step which is skipped changes nothing.
        """
        tensors = self.tensors()
        if self.options.selection in selection.DRAWN_BY_SCORE:
            tensors.append(self.noise(refresh))
        if self.options.scores != "exact":
            return [*tensors, self.proposed, *((DUE[refresh],) if self.options.proposes_anytime else ())]
        if not refresh:
            return tensors
        scratch = self.scratch()
        pending = self.pending
        if pending is not None and not pending.zeroed:
            current = pending.rows
        else:
            current = self._drawn() if self.options.blind else self.chosen
        if not self.in_flight:
            with _torch.unversioned([scratch]):
                scratch.copy_(current)
        return [scratch, *tensors[1:]]

    def expect(self, refresh: bool) -> None:
        """Note that a compact gradient is on its way, of the rows that a region was given or has chosen."""
        if not self.in_flight:
            exact = self.options.scores == "exact"
            self.rows = self.scratch() if refresh and exact else self.state[self.selector]
            self.proposes = refresh and not exact
        self.flight = _torch.graph_task()

    def settle(self, gradient: CompactGrad) -> None:
        """Make the rows of a fresh gradient those of the state; unless they were chosen by that gradient, and its step will be
        skipped."""
        checked = self.options.checked and not self.options.blind
        self._settle(gradient.rows, is_finite(gradient.compact) if checked else None)

    def _settle(self, rows: Tensor, ok: Tensor | None) -> None:
        assert self.assigned is not None
        chosen, dim, names = self.chosen, self.assigned.dim, settled_state(self.config())
        rest = [self.state[name] for name in names]
        layouts = "".join(layout_of(self.rule, name)[0] for name in names)
        length = self.parameter.shape[dim]
        new = settled(self.options.on_refresh, layouts, length, dim, chosen, rows, rest)

        def unless_skipped(value: Tensor, old: Tensor) -> Tensor:
            return value if ok is None else torch.where(ok, value, old)

        with _torch.unversioned(rest):
            for old, value in zip(rest, new, strict=True):
                old.copy_(unless_skipped(value, old))
        self._choose(unless_skipped(rows, chosen))

    def restart(self) -> None:
        """Before a backward that moves the weight by what was drawn blindly: the state that goes with that. (A refresh in the
        graph sees to it itself.) A backward that breaks off has done no harm: the refresh is still due, and draws the same. A
        step that is skipped keeps what was drawn."""
        if self.options.projection == "grass":
            self._settle(self.scratch(), None)
        elif self.options.on_refresh == "reset":
            moments = [self.state[name] for name in settled_state(self.config())]
            with _torch.unversioned(moments):
                for moment in moments:
                    moment.zero_()

    @property
    def proposed(self) -> Tensor:
        """Where a backward puts the rows that it proposes for the next step, ``int64[r]``."""
        if self._proposed is None:
            self._proposed = self.state["index"].clone()
        return self._proposed

    def renew(self, rows: Tensor) -> None:
        """Go over to other rows between two steps: those that were proposed by the one that is done, or another weight's."""
        self._settle(rows, None)
        if self.options.on_refresh == "reset" and not self.config().counted:  # otherwise the count is settled with the rest
            self.state["step"].zero_()

    @property
    def lead(self) -> ProjectedParameter:
        """The record whose columns these are, and whose choice of new ones will be made here too: itself, unless it follows
        another."""
        lead = self._lead() if self._lead is not None else None
        return lead if lead is not None else self

    def follow(self, lead: ProjectedParameter) -> bool:
        """Have the columns that ``lead`` has, from now on.

        Returns:
            Whether that is so: not as long as something waits that has been computed for other columns.
        """
        if self.lead is lead and (self._agrees or lead is self):
            return True
        if self.waits or self.outstanding:
            return False
        if not torch.equal(self.state["index"], lead.state["index"]):
            self.renew(lead.chosen)
        self._lead, self._agrees = weakref.ref(lead), True
        return True

    def doubt(self) -> None:
        """Have `follow` see for itself whether the columns still agree."""
        self._agrees = False

    def stepped(self, refresh: bool) -> None:
        """Note that a backward has moved the weight."""
        assert self.holder is not None
        exact = self.options.scores == "exact"
        if refresh and exact:
            self._choose(self.scratch())
        self.count(refresh and exact)
        if refresh and not exact:
            self.renew(self.lead.proposed)
        self.moved = True
        self.holder.clipped = self.holder.max_norm is not None

    def count(self, fresh: bool) -> None:
        """Note that this weight was updated, or that its step was skipped: that is for the device to know."""
        if not self.config().counted:
            self.state["step"].fill_(self.next_step(fresh))
        self.state["updates"] += 1
        self.refreshed = fresh and not self.options.blind


def refusal(name: str, parameter: Tensor, options: GroupOptions) -> str | None:
    """Why a parameter stays dense whatever graph and optimizer look like, or None."""
    for pattern in options.exclude:
        if fnmatch.fnmatchcase(name, pattern):
            return f"its name matches exclude={pattern!r}"
    if _torch.has_hooks(parameter):
        return "it has a tensor hook, which must see the whole gradient"
    if parameter.is_complex() or not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}; only real floating point weights can be projected"
    return None


@_torch.outside_dynamo
def _deliver(record: ProjectedParameter | None, leaf: Tensor) -> None:
    """Turn what autograd has accumulated into a leaf into the weight's ``.grad``."""
    values, leaf.grad = leaf.grad, None
    if record is None or values is None:
        return
    record.flight = None
    parameter, pending = record.parameter, record.pending
    if pending is not None and not pending.zeroed:
        pending.compact.add_(values)
        return
    assert record.assigned is not None and record.rows is not None
    fresh, projection = record.rows is not record.state[record.selector], record.options.projection
    rows = record.rows.clone() if fresh or projection != "galore" else record.rows  # nobody writes into the basis of a state
    next_rows = record.proposed.clone() if record.proposes else None
    how = record.assigned.dim, parameter, record.name, fresh, next_rows, projection
    parameter.grad = CompactGrad(values, rows, *how)


_records: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register(parameter: Tensor, record: ProjectedParameter) -> None:
    """Make ``record`` the one that compiled regions find for ``parameter``; the newest optimizer wins."""
    _records[parameter] = record


def lookup(parameter: Tensor) -> ProjectedParameter | None:
    """The record of a parameter, or None if no living optimizer projects it."""
    record = _records.get(parameter)
    return record if record is not None and record.holder is not None else None

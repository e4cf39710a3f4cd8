"""`ProjectedParameter`: how one parameter of an optimizer is projected, which rows it has, and what comes next.

A compiled graph serves many parameters, so nothing about a parameter is baked into one: at each call the backend looks its
`ProjectedParameter` up (`grass_compile.runtime.registry`).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _autograd
from ..checks import matching
from ..config import GroupOptions, SiteConfig
from ..distributed.averaging import Averaging
from ..distributed.layout import Layout
from ..errors import ConfigError, StateError
from ..math import selection
from ..math.finite import is_finite
from ..math.layout import layout_of, settled_state, step_state
from ..math.noise import new_key
from ..math.projection import SELECTORS, singular_vectors
from ..math.refresh import settled
from ..math.rule import Rule
from ..math.transfer import to_device
from ..ops.scores import DUE
from . import schedule
from .compact import Assigned, initial_state, is_compact
from .gradient import CompactGrad
from .moved import MovedGrad

Kernel = Callable[..., None]
"""``kernel(config, dim, compact_grad, weight, hyper, *state)`` runs one compiled step by itself, in place."""


class Watch(Protocol):
    """The watch that is told when a loop does something for which its steps have to wait."""

    def failed(self, reason: str) -> None: ...


class Owner(Protocol):
    """The part of its manager that a parameter needs; see `grass_compile.runtime.manager.ProjectionManager`."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...

    @property
    def watch(self) -> Watch: ...

    @property
    def records(self) -> Mapping[Tensor, ProjectedParameter]: ...


class ProjectedParameter:
    """One parameter of an optimizer that projects.

    Attributes:
        parameter: the parameter.
        name: its qualified name, or ``""`` if the optimizer was given parameters without names.
        number: how many parameters its optimizer was given before.
        group: its parameter group, read live.
        options: our keywords of that group, validated.
        rule: the update rule.
        assigned: how it is projected, or None as long as it is not.
        kernel: the step by itself; supplied by the backend along with ``assigned``.
        outstanding: forwards that wait for their backward.
        moved: whether a backward has updated it since the last ``opt.step()``.
        flight: the backward in which a compact gradient has been computed that autograd has not delivered yet (it waits until
            every call in the same graph has contributed), or None.
        rows: the index of that gradient; with a dense projection, the basis or the key.
        proposes: whether the backward of that gradient has proposed the rows to take next.
        trained_dense: whether full moments are known to hold something else than zeros.
        refreshed: whether the last update was the first of rows chosen by its gradient.
        skipped: how many of its steps are known to have been skipped, see `grass_compile.runtime.nonfinite`.
        chosen: rows, whether they were chosen by it, and those to take next, of the gradient that was delivered since the last
            ``opt.step()``; None if none was.
        delivered: that gradient.
        seen: where the weight stood, and its version, when its gradient was delivered or had moved it.
        leaf: the input of compiled graphs whose gradient is the compact one, see `grass_compile.runtime.delivery`.
        leaf_node: the autograd node that accumulates that.
        averaging: how its gradient is averaged over processes; None on one.
    """

    __slots__ = (
        "__weakref__", "_agrees", "_configs", "_lead", "_noise", "_owner", "_proposed", "_scratch", "_square_sum", "_stand_in",
        "assigned", "averaging", "chosen", "delivered", "flight", "group", "kernel", "leaf",
        "leaf_node", "moved", "name", "number", "options", "outstanding", "parameter", "proposes", "refreshed", "rows", "rule",
        "seen", "skipped", "trained_dense",
    )  # fmt: skip

    def __init__(
        self, parameter: Tensor, name: str, group: dict[str, Any], options: GroupOptions, rule: Rule, owner: Owner
    ) -> None:
        self.parameter = parameter
        self._owner = weakref.ref(owner)
        self.name, self.group, self.options, self.rule = name, group, options, rule
        self.number = len(owner.records)
        self.assigned: Assigned | None = None
        self.kernel: Kernel | None = None
        self.outstanding: weakref.WeakSet[Any] = weakref.WeakSet()
        self.refreshed, self.skipped = False, 0
        self._configs: dict[Any, SiteConfig] = {}
        self._agrees = False
        self.averaging: Averaging | None = None
        self.forget()

    def forget(self) -> None:
        """Forget what follows from the options and the state; they have changed."""
        self._configs.clear()
        self.leaf: Tensor | None = None
        self.leaf_node: Any = None
        self.rows: Tensor | None = None
        self.flight: int | None = None
        self.chosen: tuple[Tensor, bool, Tensor | None] | None = None
        self.delivered: weakref.ref[CompactGrad] | None = None
        self.seen: tuple[int, int] | None = None
        self.moved = self.trained_dense = self.proposes = False
        self._scratch: Tensor | None = None
        self._noise: Tensor | None = None
        self._proposed: Tensor | None = None
        self._square_sum: Tensor | None = None
        self._stand_in: MovedGrad | None = None
        self._lead: weakref.ref[ProjectedParameter] | None = None

    @property
    def owner(self) -> Owner | None:
        """None if the optimizer is gone."""
        owner = self._owner()
        return owner if owner is not None and owner.optimizer is not None else None

    @property
    def state(self) -> dict[str, Any]:
        """``optimizer.state[parameter]``."""
        owner = self._owner()
        optimizer = owner.optimizer if owner is not None else None
        assert optimizer is not None
        return optimizer.state[self.parameter]  # type: ignore[no-any-return]

    @property
    def label(self) -> str:
        """The name, for messages."""
        return self.name or f"parameter {self.number}"

    # ----------------------------------------------------------------------------------------------- how it is projected

    def config(self) -> SiteConfig:
        """The optimizer's wishes for this weight now; the axis is fixed once it is assigned."""
        decays = self.group["weight_decay"] != 0
        axis = self.assigned.axis if self.assigned else self.options.axis
        key = (decays, axis)
        if key not in self._configs:
            layout = self.averaging.layout if self.averaging is not None else None
            self._configs[key] = dataclasses.replace(self.options.site(axis, decays, self.rule), layout=layout)
        return self._configs[key]

    def spread(self, layout: Layout) -> None:
        """Note that the weight is spread over processes; that cannot change any more.

        Raises:
            ConfigError: it is spread in another way already, or one of its keywords does not go with it yet.
        """
        if self.averaging is not None and self.averaging.layout == layout:
            return
        if self.averaging is not None:
            raise ConfigError(f"{self.label}: it is trained by two groups of processes, {self.averaging.layout} and {layout}.")
        if self.options.scores != "exact":
            raise ConfigError(
                f"{self.label}: scores={self.options.scores!r} is not supported with several processes, whose sketches would "
                "differ. Use scores='exact', or selection='uniform'."
            )
        self.averaging = Averaging(layout)
        self._configs.clear()

    def refusal(self, name: str, hooked: bool) -> str | None:
        """Why this weight stays dense whatever the graph looks like, or None.

        Args:
            name: the name to match ``exclude`` with if the optimizer knows none.
            hooked: whether somebody waits for its gradient.
        """
        if reason := refusal(self.name or name, self.parameter, self.options, hooked):
            return reason
        if self.assigned is None and self._trained_dense():
            return "the optimizer has already trained it dense and holds its full moments"
        return None

    def _trained_dense(self) -> bool:
        """Whether there are full moments that hold anything; those of gradients that were all zero do not."""
        moments = [self.optimizer_state()[key] for key in self.rule.state_names if key in self.optimizer_state()]
        if moments and not self.trained_dense:
            self.trained_dense = any(bool(moment.count_nonzero()) for moment in moments)
        return bool(moments) and self.trained_dense

    def optimizer_state(self) -> Mapping[str, Any]:
        """The state as it is, without creating an entry."""
        optimizer = self.owner.optimizer if self.owner is not None else None
        return optimizer.state.get(self.parameter, {}) if optimizer is not None else {}

    def assign(self, assigned: Assigned, kernel: Kernel) -> None:
        """Settle how this weight is projected, and create its compact state.

        Raises:
            StateError: it is already projected in another way.
        """
        if self.assigned is not None and self.assigned != assigned:
            raise StateError(
                f"{self.label}: one compiled region projects it along {self.assigned.axis} with rank {self.assigned.rank}, "
                f"another along {assigned.axis} with rank {assigned.rank}. Set axis= for its parameter group."
            )
        self.kernel = kernel
        if self.assigned is None:
            self.assigned = assigned
        if not is_compact(self.state):
            self._start(assigned)

    def _start(self, assigned: Assigned) -> None:
        """The state before the first step; steps that a dense optimizer has taken with gradients of zero count."""
        options = self.options
        how = options.on_refresh, self.rule, options.state_dtype, options.checked, options.projection
        made = initial_state(self.parameter, assigned, *how)
        if isinstance(taken := self.state.get("step"), Tensor) and taken.numel() == 1:
            made["step"].fill_(float(taken))
        self.state.clear()
        self.state.update(made)
        self.refreshed, self.skipped = False, 0

    def resume(self, assigned: Assigned, state: dict[str, Any]) -> None:
        """Go on from a loaded state that fits."""
        assert self.owner is not None and self.owner.optimizer is not None
        self.assigned = assigned
        state["step"] = state["step"].to(self.parameter.device if self.config().counted else "cpu")
        self.owner.optimizer.state[self.parameter] = state
        self.refreshed, self.skipped = False, int(state["nonfinite"])

    # ---------------------------------------------------------------------------------------------------- its gradients

    @property
    def waits(self) -> bool:
        """Whether a compact gradient waits for ``opt.step()``, or is on its way there."""
        return self.in_flight or (self.pending is not None and not self.pending.zeroed)

    @property
    def in_flight(self) -> bool:
        """Whether a compact gradient is on its way; one of a backward that has broken off is not."""
        return self.flight is not None and self.flight == _autograd.graph_task()

    def check_change(self, options: GroupOptions) -> None:
        """Refuse a change that a forward which waits for its backward could not follow.

        Raises:
            StateError: naming the parameter.
        """
        for key in ("scale", "checked"):
            if self.outstanding and getattr(options, key) != getattr(self.options, key):
                key = "nonfinite" if key == "checked" else key
                raise StateError(
                    f"{self.label}: {key} cannot change between a forward and its backward. Change it after opt.step(), before "
                    "the next forward. Nothing was changed."
                )

    def change(self, options: GroupOptions) -> None:
        """Go by other options from the next step on; they ask for the same state."""
        self.options = options
        self._configs.clear()
        if self.assigned is not None and is_compact(self.optimizer_state()):
            self.state["step"] = self.state["step"].to(self.parameter.device if self.config().counted else "cpu")

    @property
    def pending(self) -> CompactGrad | None:
        """The compact gradient that waits for ``opt.step()``."""
        gradient = self.parameter.grad
        return gradient if isinstance(gradient, CompactGrad) else None

    def look(self) -> tuple[int, int]:
        """Where the weight stands, and its version. A write changes one or the other; only ``weight.data.mul_()`` and its like
        change neither."""
        return self.parameter.data_ptr(), self.parameter._version

    def on_touch(self) -> Callable[[str], None]:
        """The function that a gradient of this weight calls if a script does something to it."""
        owner = self._owner

        def told(what: str) -> None:
            if (manager := owner()) is not None:
                manager.watch.failed(f"gradients are {what} between backward() and zero_grad()")

        return told

    def owns(self, gradient: MovedGrad) -> bool:
        """Whether a stand-in is this weight's, and not that of another optimizer which had it before."""
        return gradient is self._stand_in

    @property
    def stand_in(self) -> MovedGrad:
        """The ``.grad`` of the weight after a backward that has moved it."""
        if self._stand_in is None:
            self._stand_in = MovedGrad(self.parameter, self.square_sum, self.label, self.on_touch())
        return self._stand_in

    # -------------------------------------------------------------------------------------------------- when, and numbers

    @property
    def offset(self) -> int:
        """Steps by which its refreshes, but for the first, come early."""
        count = len(self.owner.records) if self.owner is not None else 1
        return schedule.offset(self.lead.number, count, self.options.update_proj_gap, self.options.stagger)

    @property
    def due(self) -> bool:
        """Whether the next backward has to choose new rows: those of its own gradient, or those of the next step."""
        ahead = self.options.scores != "exact"
        return schedule.is_due(int(self.state["updates"]), self.offset, self.options.update_proj_gap, ahead)

    @property
    def renewed(self) -> bool:
        """Whether the next update is that of rows which its own backward chooses."""
        return self.due and self.options.scores == "exact"

    def next_step(self, fresh: bool) -> int:
        """Updates since the moments were last zero, the next one included; 0 where the step itself counts them.

        Args:
            fresh: whether the next update is the first of new rows.
        """
        if self.config().counted:
            return 0
        return 1 if fresh and self.options.on_refresh == "reset" else int(self.state["step"]) + 1

    def hyper_key(self, fresh: bool) -> tuple[tuple[Any, ...], tuple[int, int]]:
        """Weights for which this is equal may share one tensor of hyper-parameters: what never changes, and what does with each
        step."""
        seed = self.state["updates"] if self.draws else 0
        return (id(self.group), self.parameter.dtype, self.parameter.device, self.offset), (self.next_step(fresh), seed)

    @property
    def draws(self) -> bool:
        """Whether the next step draws random numbers inside the graph: to round, or to estimate scores."""
        return self.options.stochastic_rounding or (self.options.scores == "estimate" and self.due)

    def seed(self) -> int:
        """The seed of the next step's random numbers."""
        return schedule.seed_of(self.options.seed, self.state["updates"]) if self.draws else 0

    # ---------------------------------------------------------------------------------------------------- its tensors

    @property
    def selector(self) -> str:
        """The state tensor that says where the compact gradient lies."""
        return SELECTORS[self.options.projection]

    def tensors(self) -> list[Tensor]:
        """The tensors that a step reads and writes, in their order."""
        state = self.state
        return [self.square_sum if name == "square_sum" else state[name] for name in step_state(self.config())]

    @property
    def square_sum(self) -> Tensor:
        """Where a step leaves the squared norm of its compact gradient, ``[1]``; not part of the state."""
        if self._square_sum is None:
            wide = torch.promote_types(self.parameter.dtype, torch.float32)
            self._square_sum = torch.zeros(1, dtype=wide, device=self.parameter.device)
        return self._square_sum

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
            with _autograd.unversioned([self._noise]):
                selection.fill_with_noise(self._noise, self.options.seed, self.lead.number, self.state["updates"])
        return self._noise

    @property
    def proposed(self) -> Tensor:
        """Where a backward puts the rows that it proposes for the next step, ``int64[r]``."""
        if self._proposed is None:
            self._proposed = self.state["index"].clone()
        return self._proposed

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
        if not self.in_flight:
            pending = self.pending
            waits = pending is not None and not pending.zeroed
            rows = pending.rows if waits and pending is not None else self.drawn() if self.options.blind else None
            scratch = self._scratch_rows()
            with _autograd.unversioned([scratch]):
                scratch.copy_(self.state[self.selector] if rows is None else rows)
        return [self._scratch_rows(), *tensors[1:]]

    def _scratch_rows(self) -> Tensor:
        """Where a refresh puts what it chooses."""
        if self._scratch is None:
            self._scratch = self.state[self.selector].clone()
        return self._scratch

    def scratch_address(self) -> int:
        """Where the rows stand that a refresh chooses."""
        return self._scratch_rows().data_ptr()

    # -------------------------------------------------------------------------------------------------- choosing new rows

    def select(self, gradient: Tensor) -> Tensor:
        """New rows from a full gradient, as a refresh chooses them; or a new basis or key."""
        assert self.assigned is not None
        config = self.config()
        if config.projection == "galore":
            return singular_vectors(gradient, self.assigned.dim, self.assigned.rank)
        if self.options.blind:
            return self.drawn()
        noise = self.noise(True) if config.selection in selection.DRAWN_BY_SCORE else None
        scores = selection.scores(gradient, self.assigned.dim)
        return selection.select(config.selection, scores, noise, self.assigned.rank)

    def drawn(self) -> Tensor:
        """The rows, or the key, that the due refresh takes where they depend on no gradient."""
        assert self.assigned is not None
        if self.options.projection == "gaussian":
            return to_device(new_key(self.options.seed, self.number, self.state["updates"]), self.parameter.device)
        noise = self.noise(True)
        return selection.select(self.options.selection, torch.ones_like(noise), noise, self.assigned.rank)

    def expect(self, refresh: bool) -> None:
        """Note that a compact gradient is on its way, of the rows that a region was given or has chosen."""
        if not self.in_flight:
            exact = self.options.scores == "exact"
            self.rows = self._scratch_rows() if refresh and exact else self.state[self.selector]
            self.proposes = refresh and not exact
        self.flight = _autograd.graph_task()

    def settle(self, gradient: CompactGrad) -> None:
        """Make the rows of a fresh gradient those of the state; unless they were chosen by that gradient, and its step will be
        skipped."""
        checked = self.options.checked and not self.options.blind
        self._settle(gradient.rows, is_finite(gradient.compact) if checked else None)

    def _settle(self, rows: Tensor, ok: Tensor | None) -> None:
        assert self.assigned is not None
        old_rows, dim, names = self.state[self.selector], self.assigned.dim, settled_state(self.config())
        rest = [self.state[name] for name in names]
        layouts = "".join(layout_of(self.rule, name)[0] for name in names)
        new = settled(self.options.on_refresh, layouts, self.parameter.shape[dim], dim, old_rows, rows, rest)

        def unless_skipped(value: Tensor, old: Tensor) -> Tensor:
            return value if ok is None else torch.where(ok, value, old)

        with _autograd.unversioned(rest):
            for old, value in zip(rest, new, strict=True):
                old.copy_(unless_skipped(value, old))
        self._choose(unless_skipped(rows, old_rows))

    def _choose(self, rows: Tensor) -> None:
        """Make ``rows`` those of the state.

        A basis is taken over as it is, and the old one is not written: it may be that of a compact gradient that somebody keeps.
        """
        if self.options.projection == "galore":
            self.state[self.selector] = rows
            self._scratch = None
            return
        with _autograd.unversioned([self.state[self.selector]]):
            self.state[self.selector].copy_(rows)

    def restart(self) -> None:
        """Before a backward that moves the weight by what was drawn blindly: the state that goes with that. (A refresh in the
        graph sees to it itself.) A backward that breaks off has done no harm: the refresh is still due, and draws the same. A
        step that is skipped keeps what was drawn."""
        if self.options.projection == "grass":
            self._settle(self._scratch_rows(), None)
        elif self.options.on_refresh == "reset":
            moments = [self.state[name] for name in settled_state(self.config())]
            with _autograd.unversioned(moments):
                for moment in moments:
                    moment.zero_()

    def renew(self, rows: Tensor) -> None:
        """Go over to other rows between two steps: those that were proposed by the one that is done, or another weight's."""
        self._settle(rows, None)
        if self.options.on_refresh == "reset" and not self.config().counted:  # otherwise the count is settled with the rest
            self.state["step"].zero_()

    # ------------------------------------------------------------------------------------------------ rows in common

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
            self.renew(lead.state["index"])
        self._lead, self._agrees = weakref.ref(lead), True
        return True

    def doubt(self) -> None:
        """Have `follow` see for itself whether the columns still agree."""
        self._agrees = False

    # ------------------------------------------------------------------------------------------------------ after a step

    def stepped(self, refresh: bool) -> None:
        """Note that a backward has moved the weight."""
        exact = self.options.scores == "exact"
        if refresh and exact:
            self._choose(self._scratch_rows())
        self.count(refresh and exact)
        if refresh and not exact:
            self.renew(self.lead.proposed)
        self.moved = True
        self.stand_in.spent = self.stand_in.zeroed = False
        self.parameter.grad = self.stand_in

    def broke_off_after_refresh(self) -> None:
        """Note that a backward has chosen new rows, and settled the state with them, but has not moved the weight."""
        self._choose(self._scratch_rows())

    def count(self, fresh: bool) -> None:
        """Note that this weight was updated, or that its step was skipped: that is for the device to know."""
        if not self.config().counted:
            self.state["step"].fill_(self.next_step(fresh))
        self.state["updates"] += 1
        self.refreshed = fresh and not self.options.blind


def refusal(name: str, parameter: Tensor, options: GroupOptions, hooked: bool) -> str | None:
    """Why a parameter stays dense whatever graph and optimizer look like, or None."""
    if (pattern := matching(name, options.exclude)) is not None:
        return f"its name matches exclude={pattern!r}"
    if hooked:
        return "it has a hook that waits for its gradient, which must see the whole of it"
    if not parameter.dtype.is_floating_point:
        return f"its dtype is {parameter.dtype}; only real floating point weights can be projected"
    return None

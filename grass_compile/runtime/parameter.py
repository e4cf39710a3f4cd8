"""`ProjectedParameter`: one parameter of an optimizer, its rows, and what becomes of its gradients.

A compiled graph serves many parameters, so nothing about a parameter is baked into one: at each call the backend looks its
`ProjectedParameter` up (`grass_compile.runtime.registry`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _autograd
from ..checks import matching
from ..config import GroupOptions
from ..distributed import crossed
from ..distributed.layout import local_part, mesh_of, placed_like, why_left_out
from ..distributed.tensor_parallel import why_not
from ..errors import StateError
from ..math import selection
from ..math.layout import step_state
from ..math.rule import Rule
from ..ops.scores import DUE
from . import schedule
from .compact import Assigned, fits, initial_state, is_compact, likely
from .gradient import CompactGrad
from .moved import MovedGrad
from .rows import Owner, WeightRows

Kernel = Callable[..., None]
"""``kernel(config, dim, compact_grad, weight, hyper, *state)`` runs one compiled step by itself, in place."""


class ProjectedParameter(WeightRows):
    """One parameter of an optimizer that projects: its rows, and its gradients between a forward and the end of a step.

    Attributes:
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
    """

    __slots__ = (
        "_agrees", "_square_sum", "_stand_in", "chosen", "delivered", "flight", "kernel", "leaf", "leaf_node", "moved",
        "outstanding", "proposes", "refreshed", "rows", "seen", "skipped", "trained_dense",
    )  # fmt: skip

    def __init__(
        self, parameter: Tensor, name: str, group: dict[str, Any], options: GroupOptions, rule: Rule, owner: Owner
    ) -> None:
        super().__init__(parameter, name, group, options, rule, owner)
        self.kernel: Kernel | None = None
        self.outstanding: weakref.WeakSet[Any] = weakref.WeakSet()
        self.refreshed, self.skipped = False, 0
        self._agrees = False
        self.forget()

    def forget(self) -> None:
        """Forget what follows from the options and the state; they have changed."""
        self.forget_rows()
        self.leaf: Tensor | None = None
        self.leaf_node: Any = None
        self.rows: Tensor | None = None
        self.flight: int | None = None
        self.chosen: tuple[Tensor, bool, Tensor | None] | None = None
        self.delivered: weakref.ref[CompactGrad] | None = None
        self.seen: tuple[int, int] | None = None
        self.moved = self.trained_dense = self.proposes = False
        self._square_sum: Tensor | None = None
        self._stand_in: MovedGrad | None = None

    # ----------------------------------------------------------------------------------------------- how it is projected

    def refusal(self, name: str, hooked: bool) -> str | None:
        """Why this weight stays dense whatever the graph looks like, or None.

        Args:
            name: the name to match ``exclude`` with if the optimizer knows none.
            hooked: whether somebody waits for its gradient.
        """
        if reason := refusal(self.name or name, self.parameter, self.options, hooked):
            return reason
        if self.sharded and self.layout is None:
            return why_not(self.parameter)
        if reason := why_left_out(self.layout):
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
        made = initial_state(self.spanned, assigned, *how)
        if isinstance(taken := self.state.get("step"), Tensor) and taken.numel() == 1:
            made["step"].fill_(float(taken))
        self.state.clear()
        self.state.update(made)
        self.refreshed, self.skipped = False, 0

    def guess(self) -> bool:
        """Make the state that this weight will have if it is that of an ``nn.Linear``; `drop_guess` undoes it.

        Returns:
            Whether it is to be expected that it is projected at all.
        """
        parameter, options = self.parameter, self.options
        if options.rank is None or parameter.dim() != 2 or refusal(self.name, parameter, options, False) is not None:
            return False
        asked, shape = self.config(), (parameter.shape[0], parameter.shape[1])
        if not fits(asked, shape):
            return False
        sharded = next((dim.shards for dim in mesh_of(parameter) if dim.shards is not None), None) if self.sharded else None
        by_parts = crossed.selected_dim(parameter) if self.sharded else None
        self.assigned = likely(asked, shape, sharded if by_parts is None else 1 - by_parts)
        self._start(self.assigned)
        return True

    def drop_guess(self) -> None:
        """Be as before `guess`."""
        self.assigned = None
        self.state.clear()
        self.forget()

    def resume(self, assigned: Assigned, state: dict[str, Any]) -> None:
        """Go on from a loaded state that fits."""
        assert self.owner is not None and self.owner.optimizer is not None
        self.assigned = assigned
        state["step"] = state["step"].to(self.weight.device if self.config().counted else "cpu")
        self.owner.optimizer.state[self.parameter] = state
        self.refreshed, self.skipped = False, int(state["nonfinite"])

    # ---------------------------------------------------------------------------------------------------- its gradients

    @property
    def gradient(self) -> Tensor | None:
        """``.grad`` of the parameter; of one that is sharded, this rank's part of it."""
        gradient = self.parameter.grad
        return local_part(gradient) if self.sharded and gradient is not None else gradient

    @gradient.setter
    def gradient(self, gradient: Tensor | None) -> None:
        if self.sharded and gradient is not None:
            gradient = placed_like(self.parameter, gradient)
        self.parameter.grad = gradient

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
            self.state["step"] = self.state["step"].to(self.weight.device if self.config().counted else "cpu")

    @property
    def pending(self) -> CompactGrad | None:
        """The compact gradient that waits for ``opt.step()``."""
        gradient = self.gradient
        return gradient if isinstance(gradient, CompactGrad) else None

    def look(self) -> tuple[int, int]:
        """Where the weight stands, and its version. A write changes one or the other; only ``weight.data.mul_()`` and its like
        change neither."""
        return self.weight.data_ptr(), self.weight._version

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
            self._stand_in = MovedGrad(self.weight, self.square_sum, self.label, self.on_touch())
        return self._stand_in

    # -------------------------------------------------------------------------------------------------- when, and numbers

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
        return self.group_key(), (self.next_step(fresh), seed)

    def group_key(self) -> tuple[Any, ...]:
        """The part of `hyper_key` that never changes."""
        return id(self.group), self.weight.dtype, self.weight.device, self.offset

    @property
    def draws(self) -> bool:
        """Whether the next step draws random numbers inside the graph: to round, or to estimate scores."""
        return self.options.stochastic_rounding or (self.options.scores == "estimate" and self.due)

    def seed(self) -> int:
        """The seed of the next step's random numbers."""
        return schedule.seed_of(self.options.seed, self.state["updates"]) if self.draws else 0

    # ---------------------------------------------------------------------------------------------------- its tensors

    def tensors(self) -> list[Tensor]:
        """The tensors that a step reads and writes, in their order."""
        state = self.state
        return [self.square_sum if name == "square_sum" else state[name] for name in step_state(self.config())]

    @property
    def square_sum(self) -> Tensor:
        """Where a step leaves the squared norm of its compact gradient, ``[1]``; not part of the state."""
        if self._square_sum is None:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self._square_sum = torch.zeros(1, dtype=wide, device=self.weight.device)
        return self._square_sum

    def inputs(self, refresh: bool) -> list[Tensor]:
        """The inputs of a compiled region for this weight: its state, and the part of it that this rank owns if it is sharded."""
        shard = [self.weight] if self.layout is not None and self.layout.shape is not None else []
        return [*self._state_inputs(refresh), *shard]

    def _state_inputs(self, refresh: bool) -> list[Tensor]:
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
            scratch = self.scratch_rows()
            with _autograd.unversioned([scratch]):
                scratch.copy_(self.state[self.selector] if rows is None else rows)
        return [self.scratch_rows(), *tensors[1:]]

    # -------------------------------------------------------------------------------------------------- choosing new rows

    def expect(self, refresh: bool) -> None:
        """Note that a compact gradient is on its way, of the rows that a region was given or has chosen."""
        if not self.in_flight:
            exact = self.options.scores == "exact"
            self.rows = self.scratch_rows() if refresh and exact else self.state[self.selector]
            self.proposes = refresh and not exact
        self.flight = _autograd.graph_task()

    # ------------------------------------------------------------------------------------------------ rows in common

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
            self.choose(self.scratch_rows())
        self.count(refresh and exact)
        if refresh and not exact:
            self.renew(self.lead.proposed)
        self.moved = True
        self.stand_in.spent = self.stand_in.zeroed = False
        self.gradient = self.stand_in

    def broke_off_after_refresh(self) -> None:
        """Note that a backward has chosen new rows, and settled the state with them, but has not moved the weight."""
        self.choose(self.scratch_rows())

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

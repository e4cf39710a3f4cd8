"""`WeightRows`: one parameter of an optimizer, the rows (columns) that have compact state, and how new ones take their place."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _autograd
from ..config import GroupOptions, SiteConfig
from ..distributed import crossed
from ..distributed.averaging import Averaging
from ..distributed.layout import Layout, is_sharded, local_part
from ..errors import ConfigError, StateError
from ..math import selection
from ..math.finite import is_finite
from ..math.layout import layout_of, settled_state
from ..math.noise import new_key
from ..math.projection import SELECTORS, singular_vectors
from ..math.refresh import settled
from ..math.rounding import ROUNDS_AWAY
from ..math.rule import Rule
from ..math.transfer import to_device
from . import schedule
from .compact import Assigned
from .gradient import CompactGrad


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
    def records(self) -> Mapping[Tensor, Any]: ...


class WeightRows:
    """One parameter of an optimizer that projects, and its rows.

    Attributes:
        parameter: the parameter, as the optimizer was given it.
        name: its qualified name, or ``""`` if the optimizer was given parameters without names.
        number: how many parameters its optimizer was given before.
        group: its parameter group, read live.
        options: our keywords of that group, validated.
        rule: the update rule.
        assigned: how it is projected, or None as long as it is not.
        gathered: what compiled regions read: the parameter, or the whole of it that FSDP2 gathers from all ranks.
        found: what FSDP2 knows of it, or None.
        layout: how it is spread over processes; None on one.
        averaging: what is known of the average of its gradient, where every rank has the whole of it.
        sharded: whether the parameter is a ``DTensor``, of which each rank owns a part.
    """

    __slots__ = (
        "__weakref__", "_configs", "_decay_shows", "_lead", "_noise", "_owner", "_proposed", "_scratch",
        "assigned", "averaging", "found", "gathered", "group", "layout", "name", "number", "options", "parameter", "rule",
        "sharded",
    )  # fmt: skip

    def __init__(
        self, parameter: Tensor, name: str, group: dict[str, Any], options: GroupOptions, rule: Rule, owner: Owner
    ) -> None:
        self.parameter = parameter
        self._owner = weakref.ref(owner)
        self.name, self.group, self.options, self.rule = name, group, options, rule
        self.number = len(owner.records)
        self.assigned: Assigned | None = None
        self.gathered = parameter
        self.found: Any = None
        self.layout: Layout | None = None
        self.averaging: Averaging | None = None
        self.sharded = is_sharded(parameter)
        self._configs: dict[Any, SiteConfig] = {}
        self._decay_shows = False
        self.forget_rows()

    def forget_rows(self) -> None:
        """Forget what follows from the options and the state; they have changed."""
        self._configs.clear()
        self._scratch: Tensor | None = None
        self._noise: Tensor | None = None
        self._proposed: Tensor | None = None
        self._lead: weakref.ref[WeightRows] | None = None

    # -------------------------------------------------------------------------------------------------- how it is projected

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

    def optimizer_state(self) -> Mapping[str, Any]:
        """The state as it is, without creating an entry."""
        optimizer = self.owner.optimizer if self.owner is not None else None
        return optimizer.state.get(self.parameter, {}) if optimizer is not None else {}

    @property
    def weight(self) -> Tensor:
        """What its steps write: the parameter, or the part of it that this rank owns."""
        return local_part(self.parameter) if self.sharded else self.parameter

    @property
    def spanned(self) -> Tensor:
        """A tensor of the shape of this rank's part of the gradient and of full moments; what it owns, unless that is crossed."""
        return crossed.part_of_gradient(self.parameter) if self.sharded else self.parameter

    @property
    def label(self) -> str:
        """The name, for messages."""
        return self.name or f"parameter {self.number}"

    def config(self) -> SiteConfig:
        """The optimizer's wishes for this weight now; the axis is fixed once it is assigned."""
        decays = self._decays()
        axis = self.assigned.axis if self.assigned else self.options.axis
        key = (decays, axis)
        if key not in self._configs:
            rule = self.rule if self.layout is None else self.rule_over_parts(self.layout)
            self._configs[key] = dataclasses.replace(self.options.site(axis, decays, rule or self.rule), layout=self.layout)
        return self._configs[key]

    def _decays(self) -> bool:
        """Whether weight decay changes anything of a weight of the dtype it has. Once it does, or a scheduler says that it will,
        it is taken to for good, so that no schedule compiles anything twice."""
        rate, decay = self.group["lr"], self.group["weight_decay"]
        if decay == 0:
            return False
        rounds = self.parameter.dtype == torch.bfloat16 and not self.options.stochastic_rounding
        if not rounds or self.rule.coupled_decay or isinstance(rate, Tensor):
            return True
        if not self._decay_shows:
            highest = max(
                rate, *(self.group.get(name, 0.0) for name in ("initial_lr", "max_lr"))
            )  # as torch's schedulers note them
            self._decay_shows = abs(highest * decay) > ROUNDS_AWAY
        return self._decay_shows

    # ---------------------------------------------------------------------------------------- how it is spread over ranks

    def rule_over_parts(self, layout: Layout) -> Rule | None:
        """The rule as it is for the part of the weight that a rank owns, or the rule itself where each has the whole; None if it
        works on whole weights alone."""
        if not layout.parts:
            return self.rule
        return self.rule.over_parts(tuple(dim.group for dim in layout.parts), self.parameter.shape[layout.sharded_dim or 0])

    def spread(self, layout: Layout | None) -> None:
        """Note that the weight is spread over processes; that cannot change any more.

        Args:
            layout: how; None if it can only be trained dense so.

        Raises:
            ConfigError: it is spread in another way already, or one of its keywords does not go with it yet.
        """
        if layout is None or self.layout == layout:
            return
        if self.layout is not None:
            raise ConfigError(f"{self.label}: it is trained by two groups of processes, {self.layout} and {layout}.")
        if layout.parts:
            self._check_by_parts(layout)
        self.layout = layout
        self.averaging = Averaging(layout) if not layout.parts else None
        self._configs.clear()

    def _check_by_parts(self, layout: Layout) -> None:
        """Refuse keywords that do not go with a weight of which each rank owns a part."""
        if self.rule_over_parts(layout) is None:
            raise ConfigError(
                f"{self.label}: {type(self.rule).__name__} looks at whole rows and columns of a weight, of which each rank has a "
                "part (fully_shard, parallelize_module). Use AdamW, Adam, SGD, Lion or Muon, or DistributedDataParallel."
            )
        if self.options.projection != "grass":
            raise ConfigError(
                f"{self.label}: projection={self.options.projection!r} is not supported for a weight of which each rank has a "
                "part (fully_shard, parallelize_module). Use projection='grass', or DistributedDataParallel."
            )

    def check_known(self) -> None:
        """Refuse a step of a sharded weight as long as nothing is known of the ranks that own its other parts.

        Raises:
            StateError: naming it, and what to do.
        """
        if self.sharded and self.layout is None:
            raise StateError(
                f"{self.label}: it is sharded, and no compiled region has read it in this process yet, so nothing is known of "
                "the ranks that own its other parts. Run the compiled model forward before the first opt.step()."
            )

    def owns_part_of(self, name: str) -> bool:
        """Whether a state tensor of a sharded weight belongs to the part that this rank owns, rather than to all."""
        return self.sharded and name in self.rule.state_names and self.rule.layout(name) == "full"

    # ------------------------------------------------------------------------------------------------ when new rows are due

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

    # ---------------------------------------------------------------------------------------------------------- its tensors

    @property
    def selector(self) -> str:
        """The state tensor that says where the compact gradient lies."""
        return SELECTORS[self.options.projection]

    @property
    def proposed(self) -> Tensor:
        """Where a backward puts the rows that it proposes for the next step, ``int64[r]``."""
        if self._proposed is None:
            self._proposed = self.state["index"].clone()
        return self._proposed

    def scratch_rows(self) -> Tensor:
        """Where a refresh puts what it chooses."""
        if self._scratch is None:
            self._scratch = self.state[self.selector].clone()
        return self._scratch

    def scratch_address(self) -> int:
        """Where the rows stand that a refresh chooses."""
        return self.scratch_rows().data_ptr()

    def noise(self, drawn: bool) -> Tensor:
        """The noise that draws new rows, ``[m]``; not part of the state, since the seed and the updates are.

        Args:
            drawn: whether its values matter.
        """
        if self._noise is None:
            assert self.assigned is not None
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self._noise = torch.full((self.spanned.shape[self.assigned.dim],), 0.5, dtype=wide, device=self.weight.device)
        if drawn:
            with _autograd.unversioned([self._noise]):
                selection.fill_with_noise(self._noise, self.options.seed, self.lead.number, self.state["updates"])
        return self._noise

    # ---------------------------------------------------------------------------------------------------- choosing new rows

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
        scores = scores if self.layout is None else self.layout.norms(scores)
        return selection.select(config.chosen_by, scores, noise, self.assigned.rank)

    def drawn(self) -> Tensor:
        """The rows, or the key, that the due refresh takes where they depend on no gradient."""
        assert self.assigned is not None
        if self.options.projection == "gaussian":
            return to_device(new_key(self.options.seed, self.number, self.state["updates"]), self.weight.device)
        noise = self.noise(True)
        return selection.select(self.config().chosen_by, torch.ones_like(noise), noise, self.assigned.rank)

    # ----------------------------------------------------------------------------------------------- going over to new rows

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
        new = settled(self.options.on_refresh, layouts, self.spanned.shape[dim], dim, old_rows, rows, rest)

        def unless_skipped(value: Tensor, old: Tensor) -> Tensor:
            return value if ok is None else torch.where(ok, value, old)

        with _autograd.unversioned(rest):
            for old, value in zip(rest, new, strict=True):
                old.copy_(unless_skipped(value, old))
        self.choose(unless_skipped(rows, old_rows))

    def choose(self, rows: Tensor) -> None:
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
            self._settle(self.scratch_rows(), None)
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

    # ------------------------------------------------------------------------------------------------------- rows in common

    @property
    def lead(self) -> WeightRows:
        """The record whose columns these are, and whose choice of new ones will be made here too: itself, unless it follows
        another."""
        lead = self._lead() if self._lead is not None else None
        return lead if lead is not None else self

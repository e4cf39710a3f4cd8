"""The base of every grass optimizer: groups, the step, clipping, checkpoints. `optimizers` holds the classes that users see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dynamo
from ..config import parse_group
from ..distributed.layout import MeshDim, sharded_by, spread_differently
from ..distributed.moving import Moving
from ..errors import ConfigError, StateError
from ..keywords import COMMON, PROJECT, check_names, completed
from ..math.rule import Rule
from ..runtime.checkpoint import check_dense, fitting, local, placed, unprotect
from ..runtime.compact import Assigned, is_compact
from ..runtime.manager import ProjectionManager
from ..runtime.moving import check_blind, moved_last
from ..runtime.parameter import ProjectedParameter
from ..runtime.step_checks import check_idle, check_rows, check_step
from ..runtime.watch import Fusion
from .live import ParamGroup, check_flags
from .saved_groups import matching_groups


class GrassOptimizer(torch.optim.Optimizer):
    """The base of every grass optimizer: it has a manager for the projected weights, and the class that comes next among its
    bases, most often torch's own, steps the dense rest.

    A parameter is *projected* once a compiled backward has found its gradient. From then on its ``.grad`` is a `CompactGrad` and
    it moves in `step`, or it moves inside the backward and its ``.grad`` is a `MovedGrad`, a stand-in.
    """

    def __init__(self, params: Any, rule: Rule, own: Mapping[str, Any], **torch_keywords: Any) -> None:
        """Set up groups.

        Args:
            params: parameters, named parameters or groups, as for any torch optimizer.
            rule: what moves the projected weights.
            own: defaults of the keywords that are ours; those that are missing have the package's.
            **torch_keywords: defaults of torch's keywords.
        """
        self.rule = rule
        check_names(own, type(self).__name__)
        self._given = _with_seed(own)
        self._manager = ProjectionManager(self, False)
        self._manager.ranks.seed_drawn = own.get("seed") is None
        try:
            super().__init__(params, **torch_keywords)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from error
        self.defaults.update(completed(self._given))
        self._settle()
        self._manager.ranks.compare_parameters()

    def _settle(self) -> None:
        """Take from the groups what has to be common to all."""
        group = self.param_groups[0]
        if self._manager.watch.mode != group["step_in_backward"]:
            self._manager.watch.set_mode(group["step_in_backward"])
        self._manager.max_norm = None if group["max_grad_norm"] is None else float(group["max_grad_norm"])
        self._manager.nonfinite.checked = parse_group(group).checked

    def __getstate__(self) -> dict[str, Any]:
        """The contents of a copy or a pickle of the optimizer."""
        own = {key: value for key, value in self.__dict__.items() if key in ("rule", "_given", "_momentum")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy: it manages the parameters in its groups, and goes on from the compact state that it was given."""
        super().__setstate__(state)
        if "rule" not in state:  # torch calls this in `load_state_dict` too
            return
        self._manager = ProjectionManager(self, False)
        self.param_groups = [ParamGroup(group, self) for group in self.param_groups]
        for group in self.param_groups:
            options, names = parse_group(group), group.get("param_names") or [""] * len(group["params"])
            for parameter, name in zip(group["params"], names, strict=True):
                self._manager.add(parameter, name, group, options, self.rule)
        self._settle()
        for parameter, record in self._manager.records.items():
            if is_compact(entry := self.state.get(parameter, {})):
                self._resume(record, *fitting(record, entry))

    def _resume(self, record: ProjectedParameter, assigned: Assigned, state: dict[str, Any]) -> None:
        """Go on from a state that fits. Before its first update one holds nothing, and may be no more than a guess."""
        if state["updates"]:
            record.resume(assigned, state)
        else:
            self.state.pop(record.parameter, None)

    # ------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; keywords that it lacks take the optimizer's defaults.

        Raises:
            ConfigError: an unknown or invalid keyword, a parameter that is there already, or one that cannot be trained here.
        """
        unknown = set(param_group) - {"params", "param_names", "initial_lr", *PROJECT, *self.defaults}
        if unknown:
            raise ConfigError(f"parameter group has unknown keywords {sorted(unknown)}; valid: {sorted(PROJECT)}.")
        param_group = {**param_group, **completed(param_group, self._given)}
        param_group.pop("preset", None)
        options = parse_group(param_group)
        if options.state_dtype is not None and self.rule.state_dtypes:
            which = f"state_dtype={options.state_dtype}: the state of {type(self).__name__}"
            raise ConfigError(f"{which} is quantised by its rule; leave state_dtype out.")
        given = param_group["params"]
        param_group["params"] = given = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        names = [entry[0] if isinstance(entry, tuple) else f"parameter {i}" for i, entry in enumerate(given)]
        self._check_parameters(tensors, names)
        check_flags(param_group, self)
        for key in COMMON:
            if self.param_groups and self.param_groups[0][key] != param_group[key]:
                raise ConfigError(f"{key} differs between parameter groups; it belongs to the optimizer as a whole.")
        super().add_param_group(param_group)
        group = self.param_groups[-1] = ParamGroup(self.param_groups[-1], self)
        for parameter, name in zip(group["params"], group.get("param_names") or [""] * len(tensors), strict=True):
            self._manager.add(parameter, name, group, options, self.rule)

    def _change(self, group: ParamGroup, values: Mapping[str, Any]) -> None:
        """Have keywords of ours, assigned to ``group``, hold from now on; those of the optimizer as a whole in every group.

        Raises:
            ConfigError: a value is invalid; nothing was changed.
            StateError: a forward that was made with the old value waits for its backward; nothing was changed.
        """
        whole = {key: value for key, value in values.items() if key in COMMON}
        changes = {id(other): {**whole, **(values if other is group else {})} for other in self.param_groups}
        wanted = [(other, parse_group({**other, **changes[id(other)]})) for other in self.param_groups if changes[id(other)]]
        records = [(self._manager.records[parameter], options) for other, options in wanted for parameter in other["params"]]
        for record, options in records:
            record.check_change(options)
        for other, _ in wanted:
            dict.update(other, changes[id(other)])
        for record, options in records:
            record.change(options)
        self._settle()

    def _check_parameters(self, tensors: Sequence[Any], names: Sequence[str]) -> None:
        seen: set[int] = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for tensor, name in zip(tensors, names, strict=True):
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"{name}: an optimizer takes tensors, got {type(tensor).__name__}.")
            if id(tensor) in seen:
                raise ConfigError(f"{name}: it is in the optimizer twice; give each parameter once.")
            seen.add(id(tensor))
            if tensor.layout is not torch.strided:
                raise ConfigError(f"{name}: sparse weights are not supported; give them to another optimizer.")
            if tensor.is_complex():
                raise ConfigError(f"{name}: complex weights are not supported; give them to another optimizer.")
            if wrapper := sharded_by(tensor):
                raise ConfigError(
                    f"{name}: it is sharded by {wrapper}, which is not supported yet; train it on one device or with "
                    "torch.optim.AdamW."
                )

    # --------------------------------------------------------------------------------------------------------- step

    @_dynamo.outside_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the compact gradients that wait, move the dense parameters (norms, embeddings, biases, refused weights), and
        close the step.

        Args:
            closure: as in torch; it runs forward and backward, in which projected weights may move.

        Raises:
            StateError: a hyper-parameter was written after a backward that has already moved weights by it.
            NonFiniteError: as ``nonfinite="raise"`` says, after all else is done.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        manager = self._manager
        manager.drop_guesses()
        check_step(manager)
        manager.warn_uncompiled()
        if manager.unread and manager.initialises:
            manager.guess_states()
        manager.warn_of_nothing()
        if manager.max_norm is not None and not manager.clipped:
            manager.clip(manager.max_norm)
        manager.average()
        waiting = manager.pending()
        manager.apply(waiting)
        guessed = [record.parameter for record in manager.guessed]
        done = (*waiting, *manager.stand_ins(), *manager.nonfinite.withhold(manager.records), *guessed)
        hidden = {parameter: parameter.grad for parameter in done}
        try:
            for parameter in hidden:
                parameter.grad = None
            self._dense_step()
        finally:
            for parameter, gradient in hidden.items():
                parameter.grad = gradient
        manager.close()
        return loss

    def _dense_step(self) -> None:
        """Move what is not projected, without running the hooks around a step once more."""
        for group in self.param_groups:
            if not group.get("foreach"):
                continue
            if isinstance(group["lr"], Tensor):  # torch takes a tensor only where it may choose
                dict.__setitem__(group, "foreach", None)
            if spread_differently([parameter for parameter in group["params"] if parameter.grad is not None]):
                dict.__setitem__(group, "foreach", False)
        step = super().step
        if getattr(step, "hooked", False):  # torch hooks the ``step`` of a class when the first plain optimizer of it is made
            step.__func__.__wrapped__(self)  # type: ignore[attr-defined]
        else:
            step()

    @_dynamo.outside_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as in torch. Before `step`, after a backward that has moved weights, it leaves it at that: these
        stay as they are, with a `GrassWarning`, and training goes on.

        Args:
            set_to_none: as in torch.
        """
        self._manager.leave_off()
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """``GradScaler.step`` reads this first.

        Raises:
            StateError: the gradients of the weights that moved inside the backward were scaled.
        """
        self._manager.watch.failed("GradScaler scales the loss")
        if self._manager.watch.status:
            raise StateError(
                "GradScaler scales the loss, and with it the gradients that have already moved the weights inside the backward. "
                "Make the optimizer with step_in_backward=False."
            )
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Torch's fused optimizers write this; here the getter above answers."""

    def check_agreement(self) -> None:
        """Compare the weights that are projected, and their state, between all processes that train them; each has to call this.

        Raises:
            StateError: on all of them, with what differs.
        """
        self._manager.ranks.check()

    def share_rows(self, mesh: Sequence[MeshDim]) -> None:
        """Have workers with batches of their own select the same rows, as `grass_compile.distributed.diloco` needs it; all of
        them have to call this.

        Args:
            mesh: the groups of ranks.

        Raises:
            ConfigError: on all ranks, if their settings differ; or a weight's rows are chosen by its gradient.
        """
        self._manager.ranks.agree(mesh)
        for record in self._manager.records.values():
            check_blind(record)

    def moving(self, parameter: Tensor) -> Moving | None:
        """What of a parameter the last step has moved; None if that is all of it, or this optimizer does not hold it."""
        record = self._manager.records.get(parameter)
        return None if record is None else moved_last(record)

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """For every micro-batch but the last: inside, ``backward()`` leaves compact gradients and moves nothing.

        Compact gradients add up in ``.grad`` (at least fp32) and are applied by `step`. On a refresh the first
        micro-batch chooses the rows.
        """
        return self._manager.accumulate()

    # ---------------------------------------------------------------------------------------------------- gradients

    @property
    def fused(self) -> Fusion:
        """Whether projected weights move inside ``loss.backward()`` now; true or false, and its ``reason`` says why."""
        return self._manager.watch.status

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm before the last clipping, 0-d, on the device; None if nothing was clipped yet.

        The norm is that of what is computed: the dense gradients, and the selected rows of each projected weight, without their
        row scale. It is therefore smaller than the norm of all full gradients. Unless ``nonfinite="propagate"``, a gradient
        whose norm is not finite is left out.
        """
        return self._manager.grad_norm

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of all parameters, compact and dense, by their common norm, as FSDP's method of this name does.

        Args:
            max_norm: the largest norm allowed.
            norm_type: the order of the norm.

        Returns:
            The norm before clipping (see `grad_norm`).

        Raises:
            StateError: weights have already moved inside the backward.
        """
        self._manager.watch.failed("gradients are clipped between backward() and opt.step()")
        return self._manager.clip(max_norm, norm_type)

    def compact_grad(self, parameter: Tensor) -> Tensor | None:
        """The compact gradient of a projected weight that waits for `step`: ``[r, n]`` or ``[m, r]``; None without one.

        Raises:
            ConfigError: the optimizer does not hold this parameter.
        """
        if parameter not in self._manager.records:
            raise ConfigError("compact_grad: this optimizer does not hold that parameter.")
        self._manager.watch.failed("gradients are read between backward() and opt.step()")
        pending = self._manager.records[parameter].pending
        return None if pending is None else pending.compact

    # ---------------------------------------------------------------------------------------------------- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """As in torch. The state of a weight of which each rank owns a part holds ``DTensor``s, for
        ``torch.distributed.checkpoint`` to save."""
        found = super().state_dict()
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(order):
            record, entry = self._manager.records[parameter], found["state"].get(number, {})
            if record.sharded and is_compact(entry):
                found["state"][number] = placed(record, entry)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave; compact state keeps its own dtypes, and keywords of ours that the saved groups lack
        stay as they are.

        Raises:
            StateError: the state is of another rank, axis, shape or model; or a gradient waits, or has moved a weight, for which
                another state has to be there at `step`. Names the parameter. Nothing was changed.
        """
        check_idle(self._manager)
        groups = matching_groups(self.param_groups, state_dict)
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        loaded = {}
        for parameter, index in zip(order, saved, strict=True):
            entry = state_dict["state"].get(index, {})
            record = self._manager.records[parameter]
            if is_compact(entry):
                loaded[parameter] = fitting(record, local(unprotect(entry)))
                check_rows(record, loaded[parameter][1])
            else:
                check_dense(record, entry)
        super().load_state_dict({**state_dict, "param_groups": groups})
        self.param_groups = [ParamGroup(group, self) for group in self.param_groups]
        for group in self.param_groups:
            options = parse_group(group)
            for parameter in group["params"]:
                record = self._manager.records[parameter]
                record.group, record.options, record.assigned = group, options, None
                record.forget()
                if parameter in loaded:
                    self._resume(record, *loaded[parameter])
        self._manager.guessed.clear()
        self._manager.forget_numbers()
        self._settle()


def _with_seed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our keywords as they were given, with a seed drawn from torch's default generator if one is needed and none was given."""
    chosen = completed(given)
    if chosen["seed"] is None:
        draws = chosen["stochastic_rounding"] or chosen["selection"] != "top" or chosen["projection"] == "gaussian"
        return {**given, "seed": int(torch.randint(2**31, (), device="cpu")) if draws else 0}
    return dict(given)

"""What every grass optimizer shares: groups, the step, clipping, checkpoints. `optimizers` holds the classes that users see."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..config import PROJECT, nearest, parse_group
from ..errors import ConfigError, GrassWarning, StateError
from ..math.rule import Rule
from ..runtime.checkpoint import check_dense, fitting, unprotect
from ..runtime.compact import is_compact
from ..runtime.manager import ProjectionManager

COMMON = ("step_in_backward", "max_grad_norm", "nonfinite")
"""Keywords that belong to an optimizer as a whole."""


class GrassOptimizer(torch.optim.Optimizer):
    """What every grass optimizer shares: a holder for the backend. The dense rest is stepped by the class that comes next, most
    often torch's own.

    A parameter is *projected* once a compiled backward has found its gradient; from then on it moves there and its ``.grad``
    stays None, or its ``.grad`` is a `CompactGrad` and it moves in `step`.
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
        self._own = _completed(own)
        self._holder = ProjectionManager(self, fused=True)
        self._warned = False
        try:
            super().__init__(params, **torch_keywords)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from error
        self.defaults.update(self._own)
        self._settle()

    def _settle(self) -> None:
        """Take from the groups what has to be common to all."""
        group = self.param_groups[0]
        self._holder.fused = group["step_in_backward"]
        self._holder.max_norm = None if group["max_grad_norm"] is None else float(group["max_grad_norm"])
        self._holder.checked = parse_group(group).checked

    # ------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; keywords that it lacks take the optimizer's defaults.

        Raises:
            ConfigError: an unknown or invalid keyword, a parameter that is there already, or one that cannot be trained here.
        """
        for key, value in self._own.items():
            param_group.setdefault(key, value)
        unknown = set(param_group) - {"params", "param_names", "initial_lr", *self._own, *self.defaults}
        if unknown:
            raise ConfigError(f"parameter group has unknown keywords {sorted(unknown)}; valid: {sorted(self._own)}.")
        options = parse_group(param_group)
        if options.state_dtype is not None and self.rule.state_dtypes:
            which = f"state_dtype={options.state_dtype}: the state of {type(self).__name__}"
            raise ConfigError(f"{which} is quantised by its rule; leave state_dtype out.")
        given = param_group["params"]
        param_group["params"] = given = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        names = [entry[0] if isinstance(entry, tuple) else f"parameter {i}" for i, entry in enumerate(given)]
        self._check_parameters(tensors, names)
        for key in COMMON:
            if self.param_groups and self.param_groups[0][key] != param_group[key]:
                raise ConfigError(f"{key} differs between parameter groups; it belongs to the optimizer as a whole.")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter, name in zip(group["params"], group.get("param_names") or [""] * len(tensors), strict=True):
            self._holder.add(parameter, name, group, options, self.rule)

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
            if wrapper := _torch.sharded_by(tensor):
                raise ConfigError(
                    f"{name}: it is sharded by {wrapper}, which is not supported yet; train it on one device or with "
                    "torch.optim.AdamW."
                )

    # --------------------------------------------------------------------------------------------------------- step

    @_torch.outside_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the compact gradients that wait, move the dense parameters (norms, embeddings, biases, refused weights), and
        close the step.

        Args:
            closure: as in torch; it runs forward and backward, in which projected weights may move.

        Raises:
            StateError: a projected weight has a full gradient as well, from outside its compiled region.
            NonFiniteError: as ``nonfinite="raise"`` says, after all else is done.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        holder = self._holder
        holder.check()
        self._warn_uncompiled()
        if holder.max_norm is not None and not holder.clipped:
            holder.clip(holder.max_norm)
        waiting = holder.pending()
        holder.apply(waiting)
        hidden = {**waiting, **holder.withhold()}
        try:
            for parameter in hidden:
                parameter.grad = None
            self._dense_step()
        finally:
            for parameter, gradient in hidden.items():
                parameter.grad = gradient
        holder.close()
        return loss

    def _dense_step(self) -> None:
        """Move what is not projected."""
        super().step()

    def _warn_uncompiled(self) -> None:
        """Say once that nothing is compiled."""
        if self._warned or any(record.assigned for record in self._holder.records.values()):
            return
        dense = [
            record.name
            for parameter, record in self._holder.records.items()
            if parameter.grad is not None and record.options.rank is not None and parameter.dim() == 2
        ]
        initialises = all(float(group["lr"]) == 0 for group in self.param_groups)  # torch.distributed.checkpoint does
        if dense and not initialises and not any(self.state.get(parameter) for parameter in self._holder.records):
            self._warned = True
            warnings.warn(
                f"{len(dense)} weights, {dense[0] or 'unnamed'} the first, got full gradients: no compiled backward holds them. "
                'Compile the model: model = torch.compile(model, backend="grass"). If it is compiled, Dynamo runs the part that '
                'uses them uncompiled, as it does nn.LSTM and other recurrent layers; TORCH_LOGS="graph_breaks" says why.',
                GrassWarning,
                stacklevel=_torch.stacklevel_of_caller(),
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``GradScaler.step`` asks first.

        Raises:
            StateError: the gradients of the weights that moved inside the backward were scaled.
        """
        if self._holder.fused:
            raise StateError(
                "GradScaler scales the loss, and with it the gradients that have already moved the weights inside the backward. "
                "Make the optimizer with step_in_backward=False."
            )
        return False

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """For every micro-batch but the last: inside, ``backward()`` leaves compact gradients and moves nothing.

        Compact gradients add up in ``.grad`` (at least fp32) and are applied by `step`. On a refresh the first
        micro-batch chooses the rows.
        """
        return self._holder.accumulate()

    # ---------------------------------------------------------------------------------------------------- gradients

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm before the last clipping, 0-d, on the device; None if nothing was clipped yet.

        The norm is that of what is computed: the dense gradients, and of each projected weight the selected rows, without their
        row scale. It is therefore smaller than the norm of all full gradients. Unless ``nonfinite="propagate"``, a gradient
        whose norm is not finite is left out.
        """
        return self._holder.grad_norm

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
        return self._holder.clip(max_norm, norm_type)

    def compact_grad(self, parameter: Tensor) -> Tensor | None:
        """The compact gradient of a projected weight that waits for `step`: ``[r, n]`` or ``[m, r]``; None if there is none.

        Raises:
            ConfigError: the optimizer does not hold this parameter.
        """
        if parameter not in self._holder.records:
            raise ConfigError("compact_grad: this optimizer does not hold that parameter.")
        pending = self._holder.records[parameter].pending
        return None if pending is None else pending.compact

    # ---------------------------------------------------------------------------------------------------- checkpoint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave; compact state keeps its own dtypes, and keywords of ours that the saved groups lack
        stay as they are.

        Raises:
            StateError: the state is of another rank, axis, shape or model; names the parameter. Nothing was changed.
        """
        groups = self._matching_groups(state_dict)
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        loaded = {}
        for parameter, index in zip(order, saved, strict=True):
            entry = state_dict["state"].get(index, {})
            record = self._holder.records[parameter]
            if is_compact(entry):
                loaded[parameter] = fitting(record, unprotect(entry))
            else:
                check_dense(record, entry)
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group in self.param_groups:
            options = parse_group(group)
            for parameter in group["params"]:
                record = self._holder.records[parameter]
                record.group, record.options, record.assigned = group, options, None
                record.forget()
                if parameter in loaded:
                    record.resume(*loaded[parameter])
        self._holder.forget_numbers()
        self._settle()

    def _matching_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The saved groups, completed, after a check that they are groups of this optimizer."""
        groups = []
        if not {"state", "param_groups"} <= set(state_dict):
            raise StateError("load_state_dict takes what state_dict() gave: 'state' and 'param_groups'. Nothing was changed.")
        mine, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in mine] != [len(group["params"]) for group in saved]:
            raise StateError(
                f"the loaded state has groups of {[len(group['params']) for group in saved]} parameters, this optimizer of "
                f"{[len(group['params']) for group in mine]}: it belongs to another model. Nothing was changed."
            )
        for group, other in zip(mine, saved, strict=True):
            merged = {**{key: group[key] for key in self._own}, **other}
            for name, parameter in zip(group.get("param_names") or [], group["params"], strict=False):
                for key in ("rank", "axis", "projection"):
                    if merged[key] != group[key]:
                        raise StateError(
                            f"{name}: the loaded state was made with {key}={merged[key]!r}, this optimizer with "
                            f"{key}={group[key]!r} (weight of shape {tuple(parameter.shape)}). Nothing was changed."
                        )
            try:
                parse_group(merged)
            except ConfigError as error:
                raise StateError(f"the loaded parameter groups are not usable: {error} Nothing was changed.") from error
            groups.append(merged)
        for key in COMMON:
            if len({group[key] for group in groups}) > 1:
                raise StateError(f"{key} differs between the loaded parameter groups. Nothing was changed.")
        return groups


def _completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our keywords, completed.

    Raises:
        ConfigError: an unknown one.
    """
    for key in given:
        if key not in PROJECT:
            raise ConfigError(f"{key}={given[key]!r}: this optimizer has no such argument.{nearest(key, PROJECT)}")
    own = {**PROJECT, "rank": 128, **given}
    if not isinstance(own["exclude"], str):
        own["exclude"] = tuple(own["exclude"])
    if given.get("seed") is None:
        draws = own["stochastic_rounding"] or own["selection"] != "top" or own["projection"] == "gaussian"
        own["seed"] = int(torch.randint(2**31, (), device="cpu")) if draws else 0
    return own

"""``grass_compile.AdamW``: a ``torch.optim.Optimizer`` whose linear weights move inside the compiled backward."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..config import AxisChoice, parse_group
from ..errors import ConfigError, GrassWarning, StateError
from . import state as registry
from .rules import AdamWRule, Rule
from .state import Assigned, Record

DEFAULT_EXCLUDE = ("*lm_head*", "*embed*")
STATE_KEYS = ("index", "row_scale", "step")


class GrassOptimizer(torch.optim.AdamW):
    """What every grass optimizer shares: records for the backend, and the dense rest through torch's own AdamW.

    A parameter is *projected* once a compiled backward has found its gradient; from then on it moves there, its ``.grad`` stays
    None, and `step` passes it over.
    """

    rule: Rule

    def __init__(self, params: Any, *, own: Mapping[str, Any], **torch_keywords: Any) -> None:
        """Set up groups.

        Args:
            params: parameters, named parameters or groups, as for any torch optimizer.
            own: defaults of the keywords that are ours.
            **torch_keywords: defaults of torch's keywords.
        """
        self._own = dict(own)
        self._records: dict[Tensor, Record] = {}
        self._hyper_cache: dict[Any, tuple[tuple[float, ...], Tensor]] = {}
        self._warned = False
        super().__init__(params, **torch_keywords)
        self.defaults.update(self._own)

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
        given = param_group["params"]
        param_group["params"] = given = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        names = [entry[0] if isinstance(entry, tuple) else f"parameter {i}" for i, entry in enumerate(given)]
        self._check_parameters(tensors, names)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter, name in zip(group["params"], group.get("param_names") or [""] * len(tensors), strict=True):
            record = Record(parameter, _torch.strip_dynamo_prefix(name), group, options, self.rule, self)
            self._records[parameter] = record
            registry.register(parameter, record)

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

    # --------------------------------------------------------------------------------------------- the compiled side

    def hyper(self, record: Record) -> Tensor:
        """The numbers for a weight's next step as one tensor on its device; rebuilt only when one of them has changed.

        Weights with equal `Record.hyper_key` get the same tensor.
        """
        group, parameter = record.group, record.parameter
        decay = 1.0 - float(group["lr"]) * float(group["weight_decay"])
        values = (*self.rule.hyper(group), decay, float(record.next_step))
        cached = self._hyper_cache.get(record.hyper_key)
        if cached is None or cached[0] != values:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            cached = (values, torch.tensor(values, dtype=dtype, device=parameter.device))
            self._hyper_cache = {key: entry for key, entry in self._hyper_cache.items() if entry[0][-1] >= values[-1] - 1}
            self._hyper_cache[record.hyper_key] = cached
        return cached[1]

    # --------------------------------------------------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the dense parameters (norms, embeddings, biases, refused weights) and close the step.

        Args:
            closure: as in torch; it runs forward and backward, in which the projected weights move.

        Raises:
            StateError: a projected weight has a full gradient as well, from outside its compiled region.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        super().step()
        for record in self._records.values():
            record.moved = False
        return loss

    def _check_gradients(self) -> None:
        unprojected = []
        for parameter, record in self._records.items():
            if parameter.grad is None:
                continue
            if registry.lookup(parameter) is not record:
                raise StateError(f"{record.name}: another optimizer has taken it over; this one must not be used any more.")
            if record.assigned is not None:
                raise StateError(
                    f"{record.name}: it is projected, yet a full gradient reached it from outside its compiled region (eager "
                    "code, a tensor hook added later, a graph break). Set its .grad to None, or keep it dense with exclude=."
                )
            if record.options.rank is not None and parameter.dim() == 2 and not self.state[parameter]:
                unprojected.append(record)
        if unprojected and not self._warned and not any(record.assigned for record in self._records.values()):
            self._warned = True
            warnings.warn(
                f"{len(unprojected)} weights, {unprojected[0].name or 'unnamed'} the first, got full gradients: no compiled "
                'backward holds them. Compile the model: model = torch.compile(model, backend="grass").',
                GrassWarning,
                stacklevel=3,
            )

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Not available in this version.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("accumulate() is not available in this version of grass_compile; use one larger batch.")

    # ---------------------------------------------------------------------------------------------------- checkpoint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave; compact state keeps its own dtypes.

        Raises:
            StateError: a compact state does not fit its weight; nothing was changed.
        """
        loaded = {}
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(order, ids, strict=False):
            entry = state_dict["state"].get(index, {})
            if "index" in entry:
                loaded[parameter] = self._fitting(self._records[parameter], entry)
        super().load_state_dict(state_dict)
        for parameter, record in self._records.items():
            if parameter in loaded:
                record.assigned, self.state[parameter] = loaded[parameter]
            else:
                record.assigned = None
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        for parameter, record in self._records.items():
            record.group = groups[id(parameter)]
        self._hyper_cache.clear()

    def _fitting(self, record: Record, entry: Mapping[str, Any]) -> tuple[Assigned, dict[str, Any]]:
        """A copy of a loaded compact state on the weight's device, and how it is projected."""
        parameter, rank, wanted = record.parameter, len(entry["index"]), record.options.rank
        shape = list(parameter.shape)
        if wanted is not None and parameter.dim() == 2 and rank == min(wanted, shape[entry["dim"]]):
            shape[entry["dim"]] = rank
            if list(entry["exp_avg"].shape) == shape:
                tensors = {key: _copied(value, parameter.device) for key, value in entry.items()}
                return Assigned(entry["axis"], entry["dim"], rank), tensors
        raise StateError(
            f"{record.name}: the loaded state has rank {rank} and moments of shape {tuple(entry['exp_avg'].shape)}, which does "
            f"not fit a weight of shape {tuple(parameter.shape)} with rank {wanted}. Nothing was changed."
        )


def _copied(value: Any, device: torch.device) -> Any:
    """A copy of a state value; scalars stay on the CPU, where torch keeps step counts."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().to(device if value.dim() else "cpu")


class AdamW(GrassOptimizer):
    """AdamW with structured sparse gradients (Grass, arXiv 2406.17660), fused into the compiled backward.

    Of the gradient ``m x n`` of each linear weight only ``rank`` rows or columns are ever computed; the moments have that
    size, and only these rows of the weight move until the next refresh chooses others. Everything else is trained by
    ``torch.optim.AdamW``, whose arguments keep their names and meaning. With ``rank`` equal to the weight's size along ``axis``
    training equals ``torch.optim.AdamW`` to rounding.

    ``state[p]`` of a projected weight holds ``index`` (``int64[r]``), ``row_scale`` (``[r]``), ``exp_avg`` and ``exp_avg_sq``
    (``[r, n]`` for rows, ``[m, r]`` for columns; transposed for a weight that is stored in x out), ``step`` (updates since the
    moments were last zero; per row with ``on_refresh="carry"``), ``updates`` (updates in all) and ``axis``.

    Args:
        params: ``model.named_parameters()`` (the names serve ``exclude`` and messages), ``parameters()``, or groups; a group may
            override any keyword below.
        lr: learning rate; may change at any time without a recompilation.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        rank: r, the number of rows or columns that move at a time; None keeps the group dense.
        update_proj_gap: steps between refreshes; the first backward is always a refresh.
        selection: ``"top"``, the rows of largest norm.
        replacement: not available in this version.
        axis: ``"rows"`` (out-features), ``"columns"`` (in-features) or ``"auto"`` (the cheaper by the cost model).
        on_refresh: ``"reset"`` zeroes the moments; ``"carry"`` keeps those of rows that stay selected.
        scale: the paper's alpha, a factor on the update.
        exclude: name patterns (``fnmatch``) that stay dense.
        step_in_backward: only True in this version: the weights move inside ``loss.backward()``.
        max_grad_norm: not available in this version.

    Raises:
        ConfigError: an argument is out of range, unknown, or not available in this version.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        selection: str = "top",
        replacement: bool = False,
        axis: AxisChoice = "auto",
        on_refresh: str = "reset",
        scale: float = 1.0,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        step_in_backward: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        self.rule = AdamWRule()
        own = dict(
            rank=rank, update_proj_gap=update_proj_gap, selection=selection, replacement=replacement, axis=axis,
            on_refresh=on_refresh, scale=scale, exclude=tuple(exclude) if not isinstance(exclude, str) else exclude,
            step_in_backward=step_in_backward, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        try:
            super().__init__(params, own=own, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"AdamW: {error}") from error

"""Which parameters a grass optimizer holds, what has become of each, and which backward passes are still to come.

A compiled graph serves many parameters, so nothing about a parameter is baked into one: at each call the backend looks its
`Record` up here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _torch
from ..config import Axis, GroupOptions, SiteConfig
from ..errors import StateError
from .rules import Rule
from .step import graph_state

if TYPE_CHECKING:
    from .optimizer import GrassOptimizer


@dataclasses.dataclass(frozen=True)
class Assigned:
    """How a weight is projected; settled when its first graph is analysed, and fixed from then on."""

    axis: Axis
    dim: int
    rank: int
    why: str = dataclasses.field(default="", compare=False)


class Record:
    """One parameter of a grass optimizer.

    Attributes:
        name: its qualified name, or ``""`` if the optimizer was given parameters without names.
        group: its parameter group, read live.
        options: our keywords of that group, validated.
        rule: the update rule.
        assigned: how it is projected, or None as long as it is not.
        outstanding: forwards that wait for their backward.
        moved: whether a backward has updated it since the last ``opt.step()``.
    """

    __slots__ = (
        "__weakref__", "_configs", "_optimizer", "_parameter", "assigned", "group", "moved", "name", "options",
        "outstanding", "rule",
    )  # fmt: skip

    def __init__(
        self,
        parameter: Tensor,
        name: str,
        group: dict[str, Any],
        options: GroupOptions,
        rule: Rule,
        owner: GrassOptimizer,
    ) -> None:
        self._parameter = weakref.ref(parameter)
        self._optimizer = weakref.ref(owner)
        self._configs: dict[Any, SiteConfig] = {}
        self.name, self.group, self.options, self.rule = name, group, options, rule
        self.assigned: Assigned | None = None
        self.outstanding: weakref.WeakSet[Call] = weakref.WeakSet()
        self.moved = False

    @property
    def parameter(self) -> Tensor:
        parameter = self._parameter()
        assert parameter is not None
        return parameter

    @property
    def optimizer(self) -> GrassOptimizer | None:
        return self._optimizer()

    @property
    def state(self) -> dict[str, Any]:
        """``optimizer.state[parameter]``."""
        optimizer = self.optimizer
        assert optimizer is not None
        return optimizer.state[self.parameter]  # type: ignore[no-any-return]

    def config(self) -> SiteConfig:
        """What is asked of this weight now; the axis is fixed once it is assigned."""
        decays = self.group["weight_decay"] != 0
        axis = self.assigned.axis if self.assigned else self.options.axis
        key = (decays, axis)
        if key not in self._configs:
            assert self.options.rank is not None
            rank, on_refresh, scale = self.options.rank, self.options.on_refresh, self.options.scale
            self._configs[key] = SiteConfig(rank, axis, on_refresh, decays, scale, self.rule)
        return self._configs[key]

    def refusal(self, name: str) -> str | None:
        """Why this weight stays dense whatever the graph looks like, or None.

        Args:
            name: the name to match ``exclude`` with if the optimizer knows none.
        """
        for pattern in self.options.exclude:
            if fnmatch.fnmatchcase(self.name or name, pattern):
                return f"its name matches exclude={pattern!r}"
        if _torch.has_hooks(self.parameter):
            return "it has a tensor hook, which must see the whole gradient"
        if self.assigned is None and "exp_avg" in self.optimizer_state():
            return "the optimizer has already trained it dense and holds its full moments"
        if self.parameter.is_complex() or not self.parameter.is_floating_point():
            return f"its dtype is {self.parameter.dtype}; only real floating point weights can be projected"
        return None

    def optimizer_state(self) -> Mapping[str, Any]:
        """The state as it is, without creating an entry."""
        optimizer = self.optimizer
        return optimizer.state.get(self.parameter, {}) if optimizer is not None else {}

    def assign(self, assigned: Assigned) -> None:
        """Settle how this weight is projected, and create its compact state.

        Raises:
            StateError: it is already projected in another way.
        """
        if self.assigned is not None and self.assigned != assigned:
            raise StateError(
                f"{self.name}: one compiled region projects it along {self.assigned.axis} with rank {self.assigned.rank}, "
                f"another along {assigned.axis} with rank {assigned.rank}. Set axis= for its parameter group."
            )
        if self.assigned is None:
            self.assigned = assigned
        if "index" not in self.state:
            self.state.update(initial_state(self.parameter, assigned, self.options.on_refresh, self.rule))

    @property
    def due(self) -> bool:
        """Whether the next backward has to choose new rows."""
        return bool(self.state["updates"] % self.options.update_proj_gap == 0)

    @property
    def next_step(self) -> int:
        """Updates since the moments were last zero, the next one included; 0 where that is counted per row."""
        return 0 if self.options.on_refresh == "carry" else self.state["updates"] % self.options.update_proj_gap + 1

    @property
    def hyper_key(self) -> tuple[Any, ...]:
        """Weights for which this is equal may share one tensor of hyper-parameters."""
        return id(self.group), self.parameter.dtype, self.parameter.device, self.next_step

    def tensors(self) -> list[Tensor]:
        """The state tensors that are inputs of the graph, in their order there."""
        state = self.state
        return [state[name] for name in graph_state(self.config())]

    def count(self) -> None:
        """Note that a backward has updated this weight."""
        if self.options.on_refresh != "carry":
            self.state["step"].fill_(self.next_step)
        self.state["updates"] += 1
        self.moved = True


def initial_state(parameter: Tensor, assigned: Assigned, on_refresh: str, rule: Rule) -> dict[str, Any]:
    """The compact state of a weight before its first refresh.

    Returns:
        ``index`` ``int64[r]``; ``row_scale`` ``[r]``; ``step`` (0-d on the CPU, as torch keeps it; ``[r]`` beside the moments if
        it is counted per row); ``updates`` (how many the weight has had in all); ``axis`` and ``dim`` (the stored dimension that
        is indexed); and the rule's state, each ``[r, n]`` or ``[m, r]``, in at least fp32.
    """
    dtype, device = torch.promote_types(parameter.dtype, torch.float32), parameter.device
    shape = list(parameter.shape)
    shape[assigned.dim] = assigned.rank
    state: dict[str, Any] = {
        "index": torch.arange(assigned.rank, device=device),
        "row_scale": torch.ones(assigned.rank, dtype=dtype, device=device),
        "step": torch.zeros(assigned.rank, device=device) if on_refresh == "carry" else torch.zeros(()),
        "updates": 0,
        "axis": assigned.axis,
        "dim": assigned.dim,
    }
    return state | {name: torch.zeros(shape, dtype=dtype, device=device) for name in rule.state_names}


_records: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register(parameter: Tensor, record: Record) -> None:
    """Make ``record`` the one that compiled regions find for ``parameter``; the newest optimizer wins."""
    _records[parameter] = record


def lookup(parameter: Tensor) -> Record | None:
    """The record of a parameter, or None if no living grass optimizer holds it."""
    record = _records.get(parameter)
    return record if record is not None and record.optimizer is not None else None


class Call:
    """One forward through a compiled region that may be followed by one backward.

    The autograd node of the call keeps this object alive, through the hooks on it: a graph that is dropped without a backward
    drops its `Call`, and with it the claim on the weights.
    """

    __slots__ = ("__weakref__", "_done", "_records")

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = tuple(records)
        self._done = False
        for record in records:
            record.outstanding.add(self)

    def before_backward(self, grad_outputs: Any) -> None:
        """Refuse a backward that would use or make a wrong weight. Runs before anything was computed.

        Raises:
            StateError: naming the weight and what to do.
        """
        if self._done:
            raise StateError(
                f"{self._first}: second backward through one forward (retain_graph): the weights have moved since. Run the "
                "forward again, or leave the model to another backend."
            )
        for record in self._records:
            if record.moved:
                raise StateError(
                    f"{record.name}: it was already updated by a backward since the last opt.step(). Call opt.step() after "
                    "each backward; gradient accumulation is not available in this version."
                )
            if len(record.outstanding) > 1:
                raise StateError(
                    f"{record.name}: {len(record.outstanding)} forwards wait for their backward, and the first backward would "
                    "move the weight under the others. Run forward and backward in turn, run one larger batch, or keep this "
                    "weight dense with exclude=."
                )
            if record.optimizer is None or lookup(record.parameter) is not record:
                raise StateError(f"{record.name}: its optimizer was replaced or deleted between forward and backward.")

    def after_backward(self, grad_inputs: Any, grad_outputs: Any) -> None:
        """Note that the weights have moved."""
        self._done = True
        for record in self._records:
            record.outstanding.discard(self)
            record.count()
        _torch.mark_written([record.parameter for record in self._records])

    @property
    def _first(self) -> str:
        return self._records[0].name

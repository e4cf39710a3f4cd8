"""`ProjectionManager`, between an optimizer and the compiled regions: its records, its numbers, and the steps that wait."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _autograd, _dynamo
from ..config import GroupOptions
from ..distributed.layout import MeshDim, spread_not_finite
from ..errors import GrassWarning
from ..math.finite import clip_, total_norm
from ..math.rule import Rule
from ..math.update import run_eagerly
from ..ops.journal import recording, writing
from . import registry
from .delivery import reduce
from .gradient import CompactGrad
from .hyper import HyperTensors
from .moved import MovedGrad
from .nonfinite import NonFinite
from .parameter import ProjectedParameter
from .ranks import RankAgreement
from .watch import LoopWatch, Mode


class ProjectionManager:
    """The projected side of one optimizer, ours or torch's.

    Attributes:
        optimizer: the optimizer, or None once it is gone. ``param_groups`` and ``state`` are its own, read live.
        records: one for each of its parameters.
        watch: whether weights may move inside the backward, as far as the loop is concerned.
        max_norm: the largest common norm of all gradients, or None.
        nonfinite: what is known of gradients that are not finite.
        clipped: whether the gradients of this step have been clipped inside the backward.
        grad_norm: the gradient norm at the last clipping, 0-d, on the device.
        hidden: gradients that are taken out of ``.grad`` while torch's own code takes its step.
        ranks: what the ranks have to have in common.
        unread: whether no compiled region has read any of the parameters yet.
        guessed: the parameters that have a state, but only as a place to load a checkpoint into.
        broken: what to do after a backward that broke off when some weights had moved, or "".
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mode: Mode) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.records: dict[Tensor, ProjectedParameter] = {}
        self.watch = LoopWatch(mode)
        self.max_norm: float | None = None
        self.nonfinite = NonFinite()
        self.clipped = False
        self.grad_norm: Tensor | None = None
        self.hidden: dict[Tensor, Tensor] = {}
        self.guessed: list[ProjectedParameter] = []
        self.broken = ""
        self.ranks = RankAgreement(self.records)
        self.unread = True
        self._norm_leaf: Tensor | None = None
        self._accumulating = 0
        self._task = -1
        self._began: dict[str, Any] | None = None
        self._forwards = 0
        self._warned: set[str] = set()
        self._hyper = HyperTensors()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return self._optimizer()

    @property
    def deferred(self) -> str | None:
        """Why backwards leave compact gradients rather than moving the weights, or None if they may move them."""
        if self._accumulating:
            return "opt.accumulate()"
        status = self.watch.status
        return None if status else status.reason

    def add(self, parameter: Tensor, name: str, group: dict[str, Any], options: GroupOptions, rule: Rule) -> None:
        """Manage a parameter."""
        record = ProjectedParameter(parameter, _dynamo.strip_dynamo_prefix(name), group, options, rule, self)
        self.records[parameter] = record
        registry.register(record)

    def guess_states(self) -> None:
        """Give parameters that no compiled region has read yet the state that they will most likely have, so that a checkpoint
        can be loaded into it. The next region, or step, or loaded state, takes its place."""
        records = self.records.values()
        if any(record.optimizer_state() for record in records):
            return
        if any(bool(record.gradient.any()) for record in records if record.gradient is not None):
            return
        self.guessed = [record for record in records if record.guess()]

    def note_reading(self) -> None:
        """Note that a compiled region reads parameters."""
        self.unread = False
        self.drop_guesses()

    def drop_guesses(self) -> None:
        """Be as before `guess_states`."""
        guessed, self.guessed = self.guessed, []
        for record in guessed:
            record.drop_guess()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backwards leave compact gradients."""
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    # ------------------------------------------------------------------------------------------------------ numbers

    def hyper(self, record: ProjectedParameter, fresh: bool) -> Tensor:
        """The numbers for a weight's next step, see `grass_compile.runtime.hyper`.

        Args:
            record: the weight's.
            fresh: whether the step is the first of new rows.
        """
        return self._hyper.of(record, fresh, self.max_norm)

    def overwrite(self, numbers: Tensor, current: Tensor) -> None:
        """Bring the numbers that a forward was given up to what a weight needs now. They may be other weights' as well, who then
        ask for theirs anew."""
        self._hyper.forget()
        with _autograd.unversioned([numbers]):
            numbers.copy_(current)

    def norm_leaf(self, like: Tensor) -> Tensor:
        """The input of a compiled graph in whose gradient slot the norm comes back; stored as ``grad_norm``."""
        if self._norm_leaf is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._norm_leaf = torch.zeros((), dtype=dtype, device=like.device, requires_grad=True)
            me = weakref.ref(self)
            self._norm_leaf.register_post_accumulate_grad_hook(lambda leaf: _take_norm(me(), leaf))
        return self._norm_leaf

    def forget_numbers(self) -> None:
        """The groups or the state were replaced; the counts in a loaded state are known as they are."""
        self._hyper.forget()
        self.nonfinite.forget()

    # ----------------------------------------------------------------------------------------------- around a backward

    def note_forward(self) -> None:
        """Note that a compiled region has run forward for a backward to come."""
        self._forwards += 1

    def begin_backward(self, task: int) -> None:
        """Look at what the script has done since the last backward; once for each, before it has computed anything."""
        if task == self._task:
            return
        self._task = task
        self.watch.before_backward(self.records.values(), again=not self._accumulating and self._began is not None)
        if not self._accumulating:
            self._began = self._numbers()

    def nothing_else_comes(self) -> bool:
        """Whether a region that clips all gradients is the source of all: none is there already, and none comes from outside."""
        parameters = [parameter for parameter in self.records if parameter.requires_grad]
        present = [self.records[parameter].gradient for parameter in parameters]
        if any(gradient is not None and not _is_emptied(gradient) for gradient in present):
            return False
        return not any(map(_autograd.will_run, _autograd.accumulators(parameters)))

    def note_fused_step(self) -> None:
        """Note that a backward has moved a weight."""
        self.clipped = self.max_norm is not None

    def broke_off(self, moved: int, steps: int) -> None:
        """Note that a backward raised when some of the weights that it was to move had moved."""
        self.watch.failed("a backward broke off in the middle")
        self.broken = (
            f"the last backward broke off when {moved} of the {steps} weights that it moves had moved; what has moved stays. "
            "Call opt.zero_grad() to leave it at that and go on, or load a checkpoint to go back."
        )

    def leave_off(self) -> None:
        """``zero_grad()`` before ``opt.step()``: what has moved stays, what has not is skipped."""
        moved = [record for record in self.records.values() if record.moved]
        if not moved:
            return
        self.watch.failed("gradients were dropped without opt.step()")
        warnings.warn(
            f"zero_grad() comes before opt.step(), after a backward that has already moved {len(moved)} weights, "
            f"{moved[0].label} the first. They stay as they are now; the others are not moved. To be able to drop a step, make "
            "the optimizer with step_in_backward=False.",
            GrassWarning,
            stacklevel=_dynamo.stacklevel_of_caller(),
        )
        self._end()

    def _numbers(self) -> dict[str, Any]:
        """The hyper-parameters as they are, by a name for messages."""
        found: dict[str, Any] = {"max_grad_norm": self.max_norm}
        for number, group in enumerate(self.optimizer.param_groups if self.optimizer is not None else ()):
            for key, value in group.items():
                if key not in ("params", "param_names", "initial_lr"):
                    found[f"{key} of group {number}"] = float(value) if isinstance(value, Tensor) else value
        return found

    # -------------------------------------------------------------------------------------------------- at the step

    def changed_numbers(self) -> list[tuple[str, Any, Any]]:
        """Hyper-parameters that differ from those at the last backward: name, value then, value now. Asked once a step."""
        began, now = self._began, self._numbers()
        self._began = None
        if began is None:
            return []
        return [(key, began[key], value) for key, value in now.items() if key in began and began[key] != value]

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, once for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, GrassWarning, stacklevel=_dynamo.stacklevel_of_caller())

    def warn_of_nothing(self) -> None:
        """Say once that a step had nothing to do although forwards were run for it."""
        forwards, self._forwards = self._forwards, 0
        idle = forwards and not any(record.moved for record in self.records.values())
        if idle and all(parameter.grad is None for parameter in self.records):
            self.warn_once(
                "nothing",
                "opt.step() found no gradient at all, though compiled regions have run forward. If you call "
                "backward(inputs=...): projected weights cannot be named there; call it without inputs.",
            )

    def warn_uncompiled(self) -> None:
        """Say once that nothing is compiled."""
        records = self.records.values()
        if "uncompiled" in self._warned or any(record.assigned for record in records):
            return
        dense = [
            record.name
            for parameter, record in self.records.items()
            if parameter.grad is not None and record.options.rank is not None and parameter.dim() == 2
        ]
        if dense and not self.initialises and not any(record.optimizer_state() for record in records):
            self.warn_once(
                "uncompiled",
                f"{len(dense)} weights, {dense[0] or 'unnamed'} the first, got full gradients: no compiled backward holds them. "
                'Compile the model: model = torch.compile(model, backend="grass"). If it is compiled, Dynamo runs the part that '
                'uses them uncompiled, as it does nn.LSTM and other recurrent layers; TORCH_LOGS="graph_breaks" says why.',
            )

    @property
    def initialises(self) -> bool:
        """Whether this is how ``torch.distributed.checkpoint`` has an optimizer make its state: a step at a rate of zero."""
        return self.optimizer is not None and all(float(group["lr"]) == 0 for group in self.optimizer.param_groups)

    def pending(self) -> dict[Tensor, CompactGrad]:
        """The compact gradients that wait."""
        found = {parameter: record.pending for parameter, record in self.records.items()}
        return {parameter: gradient for parameter, gradient in found.items() if gradient is not None}

    def stand_ins(self) -> dict[Tensor, MovedGrad]:
        """The gradients that have been applied."""
        found = {parameter: record.gradient for parameter, record in self.records.items()}
        return {parameter: gradient for parameter, gradient in found.items() if isinstance(gradient, MovedGrad)}

    @torch.no_grad()
    def clip(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients, compact and dense, in place, so that their common norm is at most ``max_norm``.

        Returns:
            The norm before, 0-d, without a synchronisation.

        Raises:
            StateError: weights have already moved inside the backward.
        """
        for record in self.records.values():
            if record.moved:
                self.watch.failed("gradients are clipped between backward() and opt.step()")
                raise record.stand_in.refusal("clipped")
        for record in self.records.values():
            gradient = record.gradient
            if record.assigned is not None and gradient is not None and not isinstance(gradient, CompactGrad):
                reduce(record)
        self.average()
        gradients = [parameter.grad for parameter in self.records if parameter.grad is not None]
        if self.nonfinite.checked:
            self.grad_norm = clip_(gradients, max_norm, norm_type)
        else:
            self.grad_norm = total_norm(gradients, norm_type)
            factor = (max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return self.grad_norm

    @torch.no_grad()
    def average(self) -> None:
        """Average what waits over the ranks, as far as no backward has. What came in full to parts of weights is the mean
        already; if any part of it is not finite, no part is."""
        mixed: dict[tuple[MeshDim, ...], list[Tensor]] = {}
        for record in self.records.values():
            gradient = record.pending
            if gradient is None:
                continue
            if record.averaging is not None:
                record.averaging.finish(gradient.compact)
            elif record.layout is not None and gradient.mixed and record.options.checked:
                mixed.setdefault(record.layout.parts, []).append(gradient.compact)
        for dims, parts in mixed.items():
            for dim in dims:
                spread_not_finite(dim, parts)

    @torch.no_grad()
    def apply(self, gradients: Mapping[Tensor, CompactGrad]) -> None:
        """Run the compact step of every weight in ``gradients``; of those that an earlier call has run before it broke off, not
        again."""
        with recording():
            for parameter, gradient in gradients.items():
                if not gradient.applied:
                    record = self.records[parameter]
                    with writing(record.weight, "stepped"):
                        self._apply(record, gradient)
        _autograd.mark_written([self.records[parameter].weight for parameter in gradients])

    def _apply(self, record: ProjectedParameter, gradient: CompactGrad) -> None:
        assert record.assigned is not None
        record.check_known()
        if fresh := gradient.fresh:
            record.settle(gradient)
            gradient.fresh = False
        hyper, dim = self.hyper(record, fresh), record.assigned.dim
        run = record.kernel or run_eagerly
        run(record.config(), dim, gradient.compact, record.weight, hyper, *record.tensors())
        gradient.applied = True
        record.count(fresh)
        if gradient.next_rows is not None:
            record.renew(gradient.next_rows)
        if fresh or gradient.next_rows is not None:
            record.doubt()

    def close(self) -> None:
        """Note the end of a step.

        Raises:
            NonFiniteError: parameters with ``nonfinite="raise"`` have been left as they were, in this step or (on a GPU) in the
                one before.
            StateError: the ranks have come to train different rows.
        """
        self.ranks.compare_now_and_then()
        if any(record.moved or record.chosen is not None for record in self.records.values()):
            self.watch.passed()
        self._end()
        self.nonfinite.close(self.records.values())

    def _end(self) -> None:
        """Begin the next step."""
        self.clipped, self.broken, self._began, self._forwards = False, "", None, 0
        for record in self.records.values():
            if record.moved:
                record.stand_in.spent = True
            record.moved, record.chosen = False, None
            if (gradient := record.pending) is not None:
                gradient.applied = False


@_dynamo.outside_dynamo
def _take_norm(manager: ProjectionManager | None, leaf: Tensor) -> None:
    if manager is not None and leaf.grad is not None:
        manager.grad_norm = leaf.grad
    leaf.grad = None


def _is_emptied(gradient: Tensor) -> bool:
    return isinstance(gradient, (CompactGrad, MovedGrad)) and gradient.zeroed

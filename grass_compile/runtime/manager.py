"""What stands between an optimizer and the compiled regions: its records, its numbers, and the steps that wait for it."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .. import _torch
from ..config import GroupOptions
from ..errors import StateError
from ..math.finite import clip_, not_finite
from ..math.rule import Rule
from ..math.transfer import to_device
from ..math.update import seed_of
from . import parameter as registry
from .gradient import CompactGrad
from .nonfinite import Skips, report
from .parameter import ProjectedParameter


class ProjectionManager:
    """The projected side of one optimizer, ours or torch's.

    Attributes:
        optimizer: the optimizer, or None once it is gone. ``param_groups`` and ``state`` are its own, read live.
        records: one for each of its parameters.
        fused: whether weights may move inside the backward.
        max_norm: the largest common norm of all gradients, or None.
        checked: whether gradients of dense parameters that are not finite are to be kept from the optimizer's own code.
        clipped: whether the gradients of this step have been clipped inside the backward.
        grad_norm: the gradient norm at the last clipping, 0-d, on the device.
        hidden: gradients that are taken out of ``.grad`` while torch's own code takes its step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, fused: bool) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.records: dict[Tensor, ProjectedParameter] = {}
        self.fused = fused
        self.max_norm: float | None = None
        self.checked = False
        self.clipped = False
        self._norm_leaf: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.hidden: dict[Tensor, Tensor] = {}
        self._accumulating = 0
        self._skips = Skips()
        self._withheld: list[ProjectedParameter] = []
        self._taken: dict[ProjectedParameter, Tensor] = {}
        self._hyper: dict[object, tuple[tuple[float, ...], Tensor]] = {}

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return self._optimizer()

    @property
    def deferred(self) -> bool:
        """Whether a backward leaves compact gradients rather than moving the weights."""
        return not self.fused or self._accumulating > 0

    def add(self, parameter: Tensor, name: str, group: dict[str, object], options: GroupOptions, rule: Rule) -> None:
        """Hold a parameter."""
        record = ProjectedParameter(parameter, _torch.strip_dynamo_prefix(name), group, options, rule, self)
        self.records[parameter] = record
        registry.register(parameter, record)

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
        """The numbers for a weight's next step as one tensor on its device; rebuilt only when one of them has changed.

        Weights with equal `ProjectedParameter.hyper_key` get the same tensor.

        Args:
            record: of the weight.
            fresh: whether the step is the first of new rows.
        """
        group, parameter = record.group, record.parameter
        decay = 1.0 - float(group["lr"]) * float(group["weight_decay"])
        seed = seed_of(record.options.seed, record.state["updates"]) if record.draws else 0
        limit = float("inf") if self.max_norm is None else self.max_norm
        values = (*record.rule.hyper(group), decay, float(record.next_step(fresh)), float(seed), limit)
        key = record.hyper_key(fresh)
        cached = self._hyper.get(key)
        if cached is None or cached[0] != values:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            if len(self._hyper) > 64:
                self._hyper.clear()
            cached = self._hyper[key] = values, to_device(torch.tensor(values, dtype=dtype, device="cpu"), parameter.device)
        return cached[1]

    def norm_leaf(self, like: Tensor) -> Tensor:
        """The input of a compiled graph in whose gradient slot the norm comes back; stored as ``grad_norm``."""
        if self._norm_leaf is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._norm_leaf = torch.zeros((), dtype=dtype, device=like.device, requires_grad=True)
            me = weakref.ref(self)
            self._norm_leaf.register_post_accumulate_grad_hook(lambda leaf: _take_norm(me(), leaf))
        return self._norm_leaf

    def forget_numbers(self) -> None:
        """Rebuild all numbers at their next use, and take the counts of skipped steps as they are."""
        self._hyper.clear()
        self._skips.forget()
        for record in self._taken:
            record.skipped = 0
        self._taken.clear()

    # -------------------------------------------------------------------------------------------------- at the step

    def check(self) -> None:
        """Refuse gradients that a step would use wrongly.

        Raises:
            StateError: a projected weight has a full gradient, or belongs to another optimizer by now.
        """
        for parameter, record in self.records.items():
            if parameter.grad is None:
                continue
            if registry.lookup(parameter) is not record:
                raise StateError(f"{record.name}: another optimizer has taken it over; this one must not be used any more.")
            if record.assigned is not None and record.pending is None:
                raise StateError(
                    f"{record.name}: it is projected, yet a full gradient reached it from outside its compiled region (eager "
                    "code, a tensor hook added later, a graph break). Set its .grad to None, or keep it dense with exclude=."
                )

    def pending(self) -> dict[Tensor, CompactGrad]:
        """The compact gradients that wait."""
        found = {parameter: record.pending for parameter, record in self.records.items()}
        return {parameter: gradient for parameter, gradient in found.items() if gradient is not None}

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
                raise StateError(
                    f"{record.name}: it has already moved inside the backward, so its gradient can no longer be clipped. Use "
                    "step_in_backward=False, or max_grad_norm=."
                )
        gradients = {parameter: parameter.grad for parameter in self.records if parameter.grad is not None}
        if self.checked:
            self.grad_norm = clip_(list(gradients.values()), max_norm, norm_type)
        else:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(gradients, max_norm, norm_type)
        return self.grad_norm

    @torch.no_grad()
    def apply(self, gradients: Mapping[Tensor, CompactGrad]) -> None:
        """Run the compact step of every weight in ``gradients``."""
        for parameter, gradient in gradients.items():
            record = self.records[parameter]
            assert record.assigned is not None and record.kernel is not None
            if fresh := gradient.fresh:
                record.settle(gradient)
                gradient.fresh = False
            hyper, dim = self.hyper(record, fresh), record.assigned.dim
            with _torch.without_autocast():
                record.kernel(record.config(), dim, gradient.compact, parameter, hyper, *record.tensors())
            record.count(fresh)
            if gradient.next_rows is not None:
                record.renew(gradient.next_rows)
            if fresh or gradient.next_rows is not None:
                record.doubt()
        _torch.mark_written(list(gradients))

    @torch.no_grad()
    def withhold(self) -> dict[Tensor, Tensor]:
        """Gradients of dense parameters that are not to be applied, since they are not finite.

        Those on a GPU are only counted: the answer would have to be waited for.
        """
        if not self.checked:
            return {}
        given = {p: p.grad for p, record in self.records.items() if p.grad is not None and record.pending is None}
        dense = {parameter: gradient for parameter, gradient in given.items() if gradient.layout is torch.strided}
        near = {parameter: gradient for parameter, gradient in dense.items() if _is_at_hand(gradient)}
        self._watch({parameter: gradient for parameter, gradient in dense.items() if parameter not in near})
        bad = not_finite(list(near.values())).tolist()
        found = {parameter: gradient for (parameter, gradient), is_bad in zip(near.items(), bad, strict=True) if is_bad}
        self._withheld = [self.records[parameter] for parameter in found]
        return found

    def _watch(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Count, without waiting for the device, which gradients are not finite."""
        if not gradients:
            return
        records = [self.records[parameter] for parameter in gradients]
        bad = not_finite(list(gradients.values())).to(torch.int32)
        zero = torch.zeros_like(bad[:1])
        counts = torch._foreach_add([self._taken.get(record, zero) for record in records], list(bad.split(1)))
        self._taken.update(zip(records, counts, strict=True))

    def close(self) -> None:
        """Note the end of a step.

        Raises:
            NonFiniteError: parameters with ``nonfinite="raise"`` have been left as they were, in this step or (on a GPU) in the
                one before.
        """
        self.clipped = False
        for record in self.records.values():
            record.moved = False
        withheld, self._withheld = self._withheld, []
        news = self._news()
        taken = {record: count for record, count in news.items() if record.assigned is None}
        report(Counter(withheld) + news - Counter(taken), taken)

    def _news(self) -> Counter[ProjectedParameter]:
        """How many gradients that were not finite have become known. A refresh that was skipped is due again if its rows were to
        be chosen by that gradient; only then does the host have to know at once."""
        state = self.optimizer.state if self.optimizer is not None else {}
        checked = {p: record for p, record in self.records.items() if record.assigned is not None and record.options.checked}
        refreshed = [record for record in checked.values() if record.refreshed]
        counts = {record: state[parameter]["nonfinite"] for parameter, record in checked.items()}
        late, current = self._skips.look({**self._taken, **counts}, now=bool(refreshed))
        for record in refreshed:
            record.refreshed = False
            if record in current:
                record.state["updates"] -= 1
        return Counter(late) + Counter(current)


@_torch.outside_dynamo
def _take_norm(holder: ProjectionManager | None, leaf: Tensor) -> None:
    if holder is not None and leaf.grad is not None:
        holder.grad_norm = leaf.grad
    leaf.grad = None


def _is_at_hand(gradient: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return gradient.device.type == "cpu"

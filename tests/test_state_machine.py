"""Random sequences of everything a training loop may do, against an eager model of what has to come of them.

The model, `Oracle`, knows nothing of graphs: full gradients from autograd on a twin, full-size moments that are nonzero only in
the chosen rows, and the rules for what may move when, written down once more.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import grass_compile
from grass_compile import StateError
from grass_compile.runtime.gradient import CompactGrad
from grass_compile.runtime.moved import MovedGrad

from . import paper
from .forms import separated
from .pairs import every_pair

TOKENS, IN, HIDDEN, OUT, RANK, GAP = 4, 6, 8, 5, 3, 2
BETAS, EPS = (0.9, 0.999), 1e-3
LRS, DECAYS = (1e-2, 3e-3), (0.1, 0.2)
OUTSTANDING = 3
SETTINGS = hypothesis.settings(
    max_examples=12, stateful_step_count=20, deadline=None, derandomize=True, phases=(hypothesis.Phase.generate,)
)


class Net(nn.Module):
    """Two projected weights, and all kinds of dense parameters. The loss is an output of the graph, so that a refused backward
    frees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(IN, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)
        self.double()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.second(self.norm(self.first(x)).tanh()) * target).sum()


PROJECTED = ("first.weight", "second.weight")


def batch(seed: int, size: float) -> tuple[Tensor, Tensor]:
    """Inputs and targets; ``size`` decides whether the gradient's norm is above the limit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) * separated(IN)
    target = torch.randn(TOKENS, OUT, generator=generator, dtype=torch.float64) * separated(OUT)
    return x, size * target


@dataclasses.dataclass(frozen=True)
class Variant:
    """What an optimizer is made with."""

    fused: bool
    axis: str
    on_refresh: str
    max_grad_norm: float | None

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> grass_compile.AdamW:
        return paper.AdamW(
            model.named_parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay, rank=RANK, update_proj_gap=GAP,
            axis=self.axis, on_refresh=self.on_refresh, step_in_backward=self.fused, max_grad_norm=self.max_grad_norm,
        )  # type: ignore[arg-type]  # fmt: skip


VARIANTS = [Variant(*values) for values in itertools.product((True, False), ("rows", "columns"), ("reset", "carry"), (None, 0.5))]


# ------------------------------------------------------------------------------------------------------------- the oracle


@dataclasses.dataclass(eq=False)
class Forward:
    """A forward that was run, with the full gradients that its backward will find."""

    loss: float
    gradients: dict[str, Tensor]
    updates: int
    dense_updates: int
    waits: bool = True


@dataclasses.dataclass
class Moments:
    """Of one parameter; of a projected one full-size, and zero outside of ``rows``. ``steps`` is per row, or one."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    rows: list[int] = dataclasses.field(default_factory=list)


class Oracle:
    """Eager and full-size.

    Attributes:
        gradients: what ``.grad`` holds; that of a projected weight is zero outside of ``rows``.
        rows: of these gradients, rows or columns.
        fresh: whether they were chosen by them, so that they are not those of the moments yet.
        pending: whether such a gradient waits for `step`.
        moved: whether a backward has moved the projected weights since the last `step`.
        clipped: whether it has clipped the gradients.
    """

    def __init__(self, model: nn.Module, variant: Variant, lr: float, weight_decay: float) -> None:
        self.twin = copy.deepcopy(model)
        self.variant, self.lr, self.weight_decay = variant, lr, weight_decay
        self.weights = dict(self.twin.named_parameters())
        self.dense = [name for name in self.weights if name not in PROJECTED]
        self.dim = 0 if variant.axis == "rows" else 1
        self.moments = {name: self._new_moments(name) for name in self.weights}
        self.updates = self.dense_updates = 0
        self.forget()

    def _new_moments(self, name: str) -> Moments:
        weight = self.weights[name].detach()
        steps = torch.zeros(weight.shape[self.dim] if name in PROJECTED else ())
        return Moments(torch.zeros_like(weight), torch.zeros_like(weight), steps)

    def forget(self) -> None:
        """What a checkpoint does not hold."""
        self.gradients: dict[str, Tensor] = {}
        self.rows: dict[str, list[int]] = {}
        self.fresh = self.pending = False
        self.forwards: list[Forward] = []
        self.moved = self.clipped = False
        self.norm: Tensor | None = None

    def forward(self, x: Tensor, target: Tensor) -> Forward:
        loss = self.twin(x, target)
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        found = Forward(float(loss.detach()), dict(zip(self.weights, gradients, strict=True)), self.updates, self.dense_updates)
        self.forwards.append(found)
        return found

    def refusal(self, forward: Forward) -> tuple[type[Exception], str] | None:
        """What a backward through ``forward`` has to raise."""
        if forward.updates != self.updates:
            return StateError, "it has moved since the forward"
        if self.moved:
            return StateError, "already updated"
        if forward.dense_updates != self.dense_updates:
            return RuntimeError, "modified by an inplace operation"  # torch's own: the norm's weight has moved
        return None

    def backward(self, forward: Forward, accumulating: bool) -> None:
        alone = not any(other.waits for other in self.forwards if other is not forward)
        steps = self.variant.fused and not accumulating and alone and not self.pending
        limit = self.variant.max_grad_norm
        if limit is not None and self.gradients:
            steps = False
        if not self.pending:
            self.fresh, self.pending = self.updates % GAP == 0, True
            for name in PROJECTED:
                self.rows[name] = self._top(forward.gradients[name]) if self.fresh else self.moments[name].rows
                self.gradients.pop(name, None)
        for name, gradient in forward.gradients.items():
            kept = gradient * self._mask(name) if name in PROJECTED else gradient
            self.gradients[name] = self.gradients[name] + kept if name in self.gradients else kept.clone()
        if steps:
            if limit is not None:
                self.clip(limit)
                self.clipped = True
            self._move_projected()
            self._forget_projected()
            self.moved = True
        forward.waits = False

    def backward_together(self, accumulating: bool) -> None:
        """The gradients arrive together, so none of these backwards can move anything, but the first may choose."""
        for forward in reversed(self.forwards):
            self.backward(forward, accumulating)

    def step(self) -> None:
        if self.variant.max_grad_norm is not None and not self.clipped:
            self.clip(self.variant.max_grad_norm)
        if PROJECTED[0] in self.gradients:
            self._move_projected()
        if self.dense[0] in self.gradients:
            self._move(self.dense)
            self.dense_updates += 1
        self.moved = self.clipped = False

    def zero_grad(self, set_to_none: bool) -> None:
        """Zeros are gradients to the next step, as in torch; but to the next backward nothing waits."""
        if set_to_none:
            self.gradients = {}
        self.gradients = {name: torch.zeros_like(gradient) for name, gradient in self.gradients.items()}
        self.pending = False

    def _forget_projected(self) -> None:
        for name in PROJECTED:
            del self.gradients[name]
        self.pending = False

    def _along(self, name: str, values: Tensor) -> Tensor:
        return values.unsqueeze(1 - self.dim) if name in PROJECTED else values

    def _mask(self, name: str) -> Tensor:
        mask = torch.zeros(self.weights[name].shape[self.dim], dtype=torch.float64)
        mask[self.rows[name]] = 1.0
        return self._along(name, mask)

    def _top(self, gradient: Tensor) -> list[int]:
        norms = gradient.square().sum(1 - self.dim).tolist()
        return sorted(sorted(range(len(norms)), key=lambda row: -norms[row])[:RANK])

    def clip(self, limit: float) -> None:
        self.norm = (
            torch.stack([torch.zeros((), dtype=torch.float64), *(g.square().sum() for g in self.gradients.values())]).sum().sqrt()
        )
        scale = min(1.0, limit / (float(self.norm) + 1e-6))
        self.gradients = {name: gradient * scale for name, gradient in self.gradients.items()}

    def _move_projected(self) -> None:
        """New rows take effect now and not before; those that were not among the old ones start from zero."""
        for name in PROJECTED if self.fresh else ():
            moments, rows = self.moments[name], self.rows[name]
            stays = set(rows) & set(moments.rows) if self.variant.on_refresh == "carry" else set()
            lost = torch.tensor([row not in stays for row in range(len(moments.steps))])
            moments.rows = rows
            moments.steps[lost] = 0.0
            moments.exp_avg.masked_fill_(self._along(name, lost), 0.0)
            moments.exp_avg_sq.masked_fill_(self._along(name, lost), 0.0)
        self._move(PROJECTED)
        self.updates += 1
        self.fresh = False

    @torch.no_grad()
    def _move(self, names: Iterable[str]) -> None:
        for name in names:
            moments, gradient, weight = self.moments[name], self.gradients[name], self.weights[name]
            moments.steps[moments.rows if name in PROJECTED else ...] += 1
            moments.exp_avg = BETAS[0] * moments.exp_avg + (1 - BETAS[0]) * gradient
            moments.exp_avg_sq = BETAS[1] * moments.exp_avg_sq + (1 - BETAS[1]) * gradient**2
            steps = self._along(name, moments.steps.double().clamp(min=1))
            first, second = moments.exp_avg / (1 - BETAS[0] ** steps), moments.exp_avg_sq / (1 - BETAS[1] ** steps)
            weight.copy_(weight * (1 - self.lr * self.weight_decay) - self.lr * first / (second.sqrt() + EPS))


# ------------------------------------------------------------------------------------------------------------ the machine


class Loop(RuleBasedStateMachine):
    """A training loop of the compiled model, and the oracle beside it."""

    variant: Variant

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[tuple[Tensor, Forward]] = []
        self.scheduled = (LRS[0], DECAYS[0])
        self.kept: list[tuple[Any, Tensor]] = []

    @initialize(seed=st.integers(0, 9))
    def start(self, seed: int) -> None:
        torch.manual_seed(seed)
        model = Net()
        self.oracle = Oracle(model, self.variant, *self.scheduled)
        self._take(model)

    def _take(self, model: nn.Module) -> None:
        """Train this model from now on, with a new optimizer."""
        self.model, self.parameters = model, dict(model.named_parameters())
        self.optimizer = self.variant.optimizer(model, *self.scheduled)
        self.compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})

    # ---------------------------------------------------------------------------------------------------------- rules

    @precondition(lambda self: len(self.forwards) < OUTSTANDING)
    @rule(seed=st.integers(0, 99), size=st.sampled_from([0.01, 1.0]))
    def forward(self, seed: int, size: float) -> None:
        inputs = batch(seed, size)
        loss, expected = self.compiled(*inputs), self.oracle.forward(*inputs)
        assert abs(float(loss.detach()) - expected.loss) < 1e-9
        self.forwards.append((loss, expected))

    @precondition(lambda self: self.forwards)
    @rule(position=st.integers(0, OUTSTANDING - 1), retain=st.booleans(), accumulating=st.booleans())
    def backward(self, position: int, retain: bool, accumulating: bool) -> None:
        """Any of the forwards; one whose graph is retained may be used again, and a refused one tried again."""
        position %= len(self.forwards)
        with self.optimizer.accumulate() if accumulating else contextlib.nullcontext():
            refused = self._backward(*self.forwards[position], retain, accumulating)
        if not refused and not retain:
            self._drop(position)

    @rule(seed=st.integers(0, 99), size=st.sampled_from([0.01, 1.0]), accumulating=st.booleans())
    def forward_and_backward(self, seed: int, size: float, accumulating: bool) -> None:
        inputs = batch(seed, size)
        with self.optimizer.accumulate() if accumulating else contextlib.nullcontext():
            loss, expected = self.compiled(*inputs), self.oracle.forward(*inputs)
            self._backward(loss, expected, False, accumulating)
        self.oracle.forwards.remove(expected)

    @rule(seed=st.integers(0, 99), steps=st.integers(1, 3), size=st.sampled_from([0.01, 1.0]), zero=st.booleans())
    def train(self, seed: int, steps: int, size: float, zero: bool) -> None:
        """The usual loop, as far as what came before lets it run."""
        for batch_seed in range(seed, seed + steps):
            self.forward_and_backward(batch_seed, size, False)
            self.step()
            if zero:
                self.zero_grad(True, False)

    @precondition(lambda self: len(self.forwards) > 1 and all(f.waits and not self.oracle.refusal(f) for _, f in self.forwards))
    @rule(accumulating=st.booleans())
    def backward_together(self, accumulating: bool) -> None:
        """One backward through all forwards that wait, as of a contrastive loss; autograd begins with the newest."""
        with self.optimizer.accumulate() if accumulating else contextlib.nullcontext():
            torch.stack([loss for loss, _ in self.forwards]).sum().backward()
        self.oracle.backward_together(accumulating)
        self.forwards.clear()
        self.oracle.forwards.clear()

    @precondition(lambda self: self.forwards)
    @rule(position=st.integers(0, OUTSTANDING - 1))
    def look_at_a_gradient(self, position: int) -> None:
        """``torch.autograd.grad`` of something else than the projected weights trains nothing."""
        loss, expected = self.forwards[position % len(self.forwards)]
        before = self._everything()
        if self.variant.fused and self.variant.max_grad_norm:  # gradients that are clipped in the graph come by other leaves
            with pytest.raises(RuntimeError, match="not have been used in the graph"):
                torch.autograd.grad(loss, self.parameters["norm.bias"], retain_graph=True)
        elif refusal := self.oracle.refusal(expected):
            with pytest.raises(refusal[0], match=refusal[1]):
                torch.autograd.grad(loss, self.parameters["norm.bias"], retain_graph=True)
        else:
            (found,) = torch.autograd.grad(loss, self.parameters["norm.bias"], retain_graph=True)
            self._close(found, expected.gradients["norm.bias"], "norm.bias")
        self._unchanged(before)

    def _backward(self, loss: Tensor, expected: Forward, retain: bool, accumulating: bool) -> bool:
        refusal, error = self.oracle.refusal(expected), None
        before = self._everything() if refusal else None
        try:
            loss.backward(retain_graph=retain)
        except (StateError, RuntimeError) as raised:
            error = type(raised), str(raised)
        if refusal:
            assert error and error[0] is refusal[0] and refusal[1] in error[1], f"expected {refusal}, got {error}"
        else:
            assert not error, error
            self.oracle.backward(expected, accumulating)
        if before is not None:
            self._unchanged(before)
        return refusal is not None

    @rule()
    def step(self) -> None:
        """A gradient that was applied in the backward has to be cleared: it cannot be added to, nor applied again."""
        moved = self.oracle.moved
        self.optimizer.step()
        self.oracle.step()
        if moved:
            self.zero_grad(True, False)

    @rule(limit=st.sampled_from([0.1, 10.0]))
    def clip_by_hand(self, limit: float) -> None:
        if self.oracle.moved:
            with pytest.raises(StateError, match="already moved inside the backward"):
                self.optimizer.clip_grad_norm_(limit)
        else:
            self.optimizer.clip_grad_norm_(limit)
            self.oracle.clip(limit)

    @precondition(lambda self: not self.oracle.moved)  # `tests/test_border.py` has what is refused or told then
    @rule(set_to_none=st.booleans(), model=st.booleans())
    def zero_grad(self, set_to_none: bool, model: bool) -> None:
        """A gradient that is let go belongs to whoever has kept it, and stays what it is."""
        gradients = [self.parameters[name].grad for name in PROJECTED]
        if set_to_none and isinstance(gradients[0], CompactGrad):
            self.kept = [(gradient, gradient.full().clone()) for gradient in gradients]  # type: ignore[union-attr]
        (self.model if model else self.optimizer).zero_grad(set_to_none=set_to_none)
        self.oracle.zero_grad(set_to_none)

    @precondition(lambda self: self.forwards)
    @rule(position=st.integers(0, OUTSTANDING - 1))
    def drop(self, position: int) -> None:
        self._drop(position % len(self.forwards))

    def _drop(self, position: int) -> None:
        self.oracle.forwards.remove(self.forwards.pop(position)[1])

    @rule()
    def save_and_load(self) -> None:
        """Into a model and an optimizer that know nothing, as a restarted process would."""
        buffer = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        self.forwards.clear()
        self._take(Net())
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.oracle.forget()

    @rule(seed=st.integers(0, 99))
    def evaluate(self, seed: int) -> None:
        inputs = batch(seed, 1.0)
        with torch.no_grad():
            torch.testing.assert_close(self.compiled(*inputs), self.oracle.twin(*inputs), rtol=0, atol=1e-9)

    @precondition(lambda self: not self.oracle.moved)
    @rule(lr=st.sampled_from(LRS), weight_decay=st.sampled_from(DECAYS))
    def schedule(self, lr: float, weight_decay: float) -> None:
        self.scheduled = lr, weight_decay
        self.oracle.lr, self.oracle.weight_decay = lr, weight_decay
        for group in self.optimizer.param_groups:
            group.update(lr=lr, weight_decay=weight_decay)

    # ----------------------------------------------------------------------------------------------------- comparisons

    def _everything(self) -> dict[str, Tensor]:
        """Weights, gradients and optimizer state as they are."""
        found = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            gradient = self._gradient(name)
            if gradient is not None:
                found[f"{name}.grad"] = gradient.clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, str):
                    found[f"{name}.{key}"] = torch.as_tensor(value).clone()
        return found

    def _unchanged(self, before: dict[str, Tensor]) -> None:
        after = self._everything()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    def _gradient(self, name: str) -> Tensor | None:
        gradient = self.parameters[name].grad
        if isinstance(gradient, MovedGrad):
            return None
        return gradient.full() if name in PROJECTED and gradient is not None else gradient  # type: ignore[attr-defined]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "oracle"):
            return
        for name, parameter in self.parameters.items():
            self._close(parameter.detach(), self.oracle.weights[name].detach(), name)
            gradient, expected = self._gradient(name), self.oracle.gradients.get(name)
            assert (gradient is None) == (expected is None), f"{name}.grad"
            if gradient is not None:
                self._close(gradient, expected, f"{name}.grad")
            self._state_agrees(name, self.optimizer.state.get(parameter, {}), self.oracle.moments[name])
        assert all(torch.equal(gradient.full(), value) for gradient, value in self.kept), "a gradient that was kept"
        if self.oracle.norm is not None:
            assert self.optimizer.grad_norm is not None
            self._close(self.optimizer.grad_norm, self.oracle.norm, "grad_norm")

    def _state_agrees(self, name: str, state: dict[str, Any], expected: Moments) -> None:
        if name not in PROJECTED:
            if state or self.oracle.dense_updates:
                assert int(state["step"]) == self.oracle.dense_updates
                self._close(state["exp_avg"], expected.exp_avg, f"{name}.exp_avg")
            return
        assert state.get("updates", 0) == self.oracle.updates
        if not expected.rows:
            return
        assert state["index"].tolist() == expected.rows, f"{name}.index"
        for key, moment in (("exp_avg", expected.exp_avg), ("exp_avg_sq", expected.exp_avg_sq)):
            self._close(state[key], moment.index_select(self.oracle.dim, torch.tensor(expected.rows)), f"{name}.{key}")
        assert torch.equal(state["step"].expand(RANK), expected.steps[expected.rows]), f"{name}.step"

    @staticmethod
    def _close(found: Tensor, expected: Tensor, what: str) -> None:
        assert float((found - expected).abs().max()) < 1e-9, what


ONCE_WRONG: dict[str, Callable[[Loop], Any]] = {
    "a learning rate that came after the forward was ignored": lambda loop: (
        loop.forward(0, 1.0), loop.schedule(LRS[1], DECAYS[1]), loop.backward(0, False, False), loop.step(),
    ),
    "the bias correction began anew where the rows stayed": lambda loop: (
        loop.train(0, 3, 1.0, False), loop.zero_grad(True, False), loop.train(3, 3, 1.0, True),
    ),
    "rows were never chosen again once gradients were zeroed": lambda loop: [
        (loop.train(seed, 1, 1.0, False), loop.zero_grad(False, False)) for seed in range(5)
    ],
    "rows took effect although their gradient was dropped": lambda loop: (
        loop.train(0, 2, 1.0, True), loop.forward_and_backward(5, 1.0, True), loop.zero_grad(True, True),
        loop.save_and_load(), loop.train(2, 3, 1.0, True),
    ),
    "a backward that did not clip lost the norm": lambda loop: (
        loop.train(0, 1, 1.0, False), loop.forward_and_backward(1, 1.0, True),
    ),
    "a look at a gradient gave up the claim of a forward": lambda loop: (
        loop.forward(0, 1.0), loop.look_at_a_gradient(0), loop.forward(1, 1.0), loop.backward_together(False), loop.step(),
    ),
    "a forward changed the rows of a zeroed gradient": lambda loop: (
        loop.forward_and_backward(0, 1.0, True), loop.zero_grad(False, False), loop.forward(1, 1.0), loop.step(),
    ),
    "a backward changed the rows of a gradient that was kept": lambda loop: (
        loop.forward_and_backward(0, 1.0, True), loop.zero_grad(True, False), loop.agrees(), loop.train(7, 3, 1.0, True),
    ),
}  # fmt: skip


@every_pair(fused=(True, False), axis=("rows", "columns"), on_refresh=("reset", "carry"), max_grad_norm=(None, 0.5))
def test_any_order_of_events(fused: bool, axis: str, on_refresh: str, max_grad_norm: float | None) -> None:
    variant = Variant(fused, axis, on_refresh, max_grad_norm)
    machine: Any = type("Loop", (Loop,), {"variant": variant})
    hypothesis.seed(VARIANTS.index(variant))(machine)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with functorch_config.patch(donated_buffer=False):  # torch compiles backwards that cannot retain their graph otherwise
        for what, happens in ONCE_WRONG.items():
            loop = machine()
            try:
                loop.start(0)
                happens(loop)
                loop.agrees()
            except AssertionError as error:
                raise AssertionError(what) from error
        run_state_machine_as_test(machine, settings=SETTINGS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 2  # with and without gradients

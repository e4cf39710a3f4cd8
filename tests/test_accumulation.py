"""Several backwards for one step, several forwards for one backward: the weights move once, by the sum."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass_compile import StateError
from grass_compile.runtime.gradient import CompactGrad
from grass_compile.runtime.moved import MovedGrad

from . import forms, paper
from .harness import Pair, pair
from .pairs import every_pair

MICRO = 4
Model = Callable[..., Any]


def x(seed: int = 0) -> Tensor:
    return forms.batch(torch.float64, seed)


def loss_on(seed: int, scale: float = 1.0) -> Callable[[Model], Tensor]:
    """The loss on one batch, as a function of the model."""
    return lambda model: forms.loss_of(model(x(seed))) * scale


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16)).double()


def indices(run: Pair) -> dict[str, list[int]]:
    """The rows that the compiled path has chosen, after a check that the oracle's are the same."""
    found = {name: run.optimizer.state[run.model.get_parameter(name)]["index"].tolist() for name in run.oracle.projected}
    assert found == {name: run.oracle.state[name].index.tolist() for name in run.oracle.projected}
    return found


def updates(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[int]:
    """How many updates the projected weights have had."""
    return {optimizer.state[p]["updates"] for p in model.parameters() if "updates" in optimizer.state[p]}


# ------------------------------------------------------------------------------------------------------- accumulation


@every_pair(rank=[32, 4, "blind"], axis=["rows", "columns"], deferred=[False, True])
def test_accumulating_equals_one_big_batch(rank: int | str, axis: str, deferred: bool) -> None:
    """At full rank and with rows that are drawn blindly always; otherwise if the first micro-batch chooses the rows that the
    whole batch would."""
    model, big = forms.LinearBias().double(), forms.LinearBias().double()
    big.load_state_dict(model.state_dict())
    sides = []
    for side in (model, big):
        keywords: dict[str, Any] = dict(lr=1e-2, eps=1e-3, rank=rank, axis=axis, update_proj_gap=3, weight_decay=0.1)
        if rank == "blind":
            keywords |= dict(rank=4, selection="uniform", on_refresh="carry", seed=1)
        optimizer = paper.AdamW(side.named_parameters(), step_in_backward=not deferred, **keywords)
        sides.append((optimizer, torch.compile(side, backend="grass", options={"compiler": "aot_eager"})))
    (optimizer, compiled), (big_optimizer, big_compiled) = sides
    stretch, narrow = (2.0 ** -torch.arange(size).double() for size in (forms.M, forms.N))  # every batch chooses alike
    if rank == "blind":
        stretch, narrow = torch.ones_like(stretch), torch.ones_like(narrow)

    def loss_of(y: Tensor) -> Tensor:
        return (nn.functional.softplus(y) * stretch).sum()

    for _ in range(5):
        batches = [torch.rand(15, forms.N, dtype=torch.float64) * narrow for _ in range(MICRO)]
        for micro, batch in enumerate(batches):
            if micro < MICRO - 1:
                with optimizer.accumulate():
                    loss_of(compiled(batch)).backward()
            else:
                loss_of(compiled(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(big_compiled(torch.cat(batches))).backward()
        big_optimizer.step()
        big_optimizer.zero_grad()
        assert torch.equal(optimizer.state[model.layer.weight]["index"], big_optimizer.state[big.layer.weight]["index"])
    for p, q in zip(model.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert updates(model, optimizer) == updates(big, big_optimizer) == {5}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("on_refresh", ["reset", "carry"])
def test_first_micro_batch_chooses(on_refresh: str, deferred: bool) -> None:
    """Also where the others would have chosen other rows."""
    run = pair(mlp(), [x()], rank=5, axis="rows", on_refresh=on_refresh, step_in_backward=not deferred)
    differs = False
    for step in range(7):
        run.update(*(loss_on(MICRO * step + micro) for micro in range(MICRO)))
        chosen = indices(run)
        alone = copy.deepcopy(run.twin)
        for micro in range(1, MICRO):
            loss_on(MICRO * step + micro)(alone).backward()
        for name in chosen:
            others = alone.get_parameter(name).grad.norm(dim=1).topk(5).indices.sort().values.tolist()  # type: ignore[union-attr]
            differs = differs or (step % 3 == 0 and others != chosen[name])
    assert differs, "every micro-batch would have chosen the same rows"
    assert run.difference() < 1e-12
    assert updates(run.model, run.optimizer) == {7}


def test_accumulation_of_uneven_length_and_with_steps_between() -> None:
    """Accumulating in some steps and not in others, refreshes under both."""
    run = pair(mlp(), [x()], rank=5, axis="columns")
    for step, count in enumerate([1, 3, 1, 2, 4, 1, 1, 2]):
        run.update(*(loss_on(10 * step + micro) for micro in range(count)))
        indices(run)
    assert run.difference() < 1e-12


def test_step_under_accumulate_applies_what_is_there() -> None:
    """All micro-batches under ``accumulate()``, the step behind it: as a script may well do."""
    run = pair(mlp(), [x()], rank=5, axis="rows")
    for step in range(5):
        with run.optimizer.accumulate():
            for micro in range(2):
                loss_on(2 * step + micro)(run.compiled).backward()
        for micro in range(2):
            loss_on(2 * step + micro)(run.twin).backward()
            run.oracle.choose()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.oracle.step()
        assert run.difference() < 1e-12


def test_compact_gradients_add_up_in_fp32_for_bf16_weights() -> None:
    """256 + 1 is 256 in bf16, and the sum of 256 such micro-batches would stay there."""
    model = nn.Linear(2, 2, bias=False).bfloat16()
    optimizer = paper.AdamW(model.named_parameters(), rank=1, axis="rows")
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    inputs = torch.eye(2, dtype=torch.bfloat16)
    pick = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).bfloat16().t()
    with optimizer.accumulate():
        (compiled(inputs) * pick * 256).sum().backward()
        for _ in range(64):
            (compiled(inputs) * pick).sum().backward()
    assert model.weight.grad.compact.dtype is torch.float32
    assert optimizer.compact_grad(model.weight).tolist() == [[320.0, 320.0]]
    assert model.weight.grad.rows.tolist() == [0]


@pytest.mark.parametrize("deferred", [False, True])
def test_retained_graph_twice_gives_twice_the_gradient(deferred: bool) -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows", step_in_backward=not deferred)
    weight = run.model[0].weight
    for step in range(5):
        with run.optimizer.accumulate():
            loss = loss_on(step)(run.compiled)
            loss.backward(retain_graph=True)
            once = run.optimizer.compact_grad(weight).clone()
            loss.backward()
            assert torch.equal(run.optimizer.compact_grad(weight), once + once)
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss_on(step, 2.0)(run.twin).backward()
        run.oracle.step()
        indices(run)
        assert run.difference() < 1e-12
    assert updates(run.model, run.optimizer) == {5}


def test_retained_graph_with_the_last_backward_outside_of_accumulate() -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows")
    for step in range(5):
        loss = loss_on(step)(run.compiled)
        with run.optimizer.accumulate():
            loss.backward(retain_graph=True)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss_on(step, 2.0)(run.twin).backward()
        run.oracle.step()
        assert run.difference() < 1e-12


# ---------------------------------------------------------------------------------- several forwards for one backward


def oracle_backward(run: Pair, loss_of: Callable[[Any, Any], Tensor]) -> None:
    """The oracle's backward of a loss that runs the model, or parts of it, twice.

    The second time it runs on a copy, whose gradient chooses the rows: in the compiled path its backward is the first.
    """
    second = copy.deepcopy(run.twin)
    second.zero_grad()
    loss_of(run.twin, second).backward()
    run.oracle.choose(**{name: parameter.grad for name, parameter in second.named_parameters() if parameter.grad is not None})
    for parameter, other in zip(run.twin.parameters(), second.parameters(), strict=True):
        if other.grad is not None:
            parameter.grad = other.grad if parameter.grad is None else parameter.grad + other.grad


def close(run: Pair) -> None:
    """End the step on both sides; the oracle's rows and weights are the same."""
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.oracle.step()
    indices(run)
    assert run.difference() < 1e-10


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_siamese_equals_oracle(axis: str, deferred: bool) -> None:
    run = pair(mlp(), [x()], rank=5, axis=axis, step_in_backward=not deferred)
    for step in range(7):

        def loss_of(a: Model, b: Model, step: int = step) -> Tensor:
            return forms.loss_of(a(x(2 * step))) + 0.5 * forms.loss_of(b(x(2 * step + 1)))

        loss_of(run.compiled, run.compiled).backward()
        oracle_backward(run, loss_of)
        close(run)
    assert updates(run.model, run.optimizer) == {7}


def test_contrastive_loss_equals_oracle() -> None:
    """A loss in which both outputs meet (InfoNCE), so that neither gradient exists without the other forward."""

    def contrast(a: Model, b: Model, step: int) -> Tensor:
        views = x(step).flatten(0, 1), x(step + 100).flatten(0, 1)
        left, right = (nn.functional.normalize(model(view), dim=-1) for model, view in zip((a, b), views, strict=True))
        return nn.functional.cross_entropy(left @ right.t() / 0.1, torch.arange(len(left)))

    run = pair(mlp(), [x().flatten(0, 1)], rank=5, axis="rows", eps=1e-8)
    for step in range(7):
        contrast(run.compiled, run.compiled, step).backward()
        oracle_backward(run, lambda a, b, step=step: contrast(a, b, step))
        close(run)


def test_siamese_under_accumulate() -> None:
    """Two forwards in each of two micro-batches: four backwards of the region, one update."""
    run = pair(mlp(), [x()], rank=5, axis="rows")
    for step in range(5):
        for micro in range(2):
            seed = 4 * step + 2 * micro

            def loss_of(a: Model, b: Model, seed: int = seed) -> Tensor:
                return forms.loss_of(a(x(seed))) + forms.loss_of(b(x(seed + 1)))

            with run.optimizer.accumulate() if micro == 0 else contextlib.nullcontext():
                loss_of(run.compiled, run.compiled).backward()
            oracle_backward(run, loss_of)
        close(run)
    assert updates(run.model, run.optimizer) == {5}


def test_forward_whose_output_is_not_in_the_loss() -> None:
    """It holds a claim as long as it lives, so the weight waits for the step; the number is right all the same."""
    run = pair(mlp(), [x()], rank=5, axis="rows")
    for step in range(5):
        unused = run.compiled(x(100 + step))
        loss_on(step)(run.compiled).backward()
        assert unused.grad_fn is not None and isinstance(run.model[0].weight.grad, CompactGrad)
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss_on(step)(run.twin).backward()
        run.oracle.step()
        del unused
        indices(run)
        assert run.difference() < 1e-12
    loss_on(7)(run.compiled).backward()
    assert isinstance(run.model[0].weight.grad, MovedGrad)  # the claim is gone with the output


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("how", ["grad", "backward"])
def test_gradient_of_the_inputs_alone_is_no_backward_of_the_weights(how: str, deferred: bool) -> None:
    """``autograd.grad(loss, x)`` and ``backward(inputs=[x])`` must neither move weights nor touch their state."""
    run = pair(mlp(), [x()], rank=5, axis="rows", step_in_backward=not deferred)
    for step in range(5):
        inputs = x(100 + step).requires_grad_()
        before = [p.detach().clone() for p in run.model.parameters()]
        output = forms.loss_of(run.compiled(inputs))
        if how == "grad":
            (found,) = torch.autograd.grad(output, inputs)
        else:
            output.backward(inputs=[inputs])
            found = inputs.grad
        (expected,) = torch.autograd.grad(forms.loss_of(run.twin(inputs)), inputs)
        torch.testing.assert_close(found, expected)
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True)), "the weights have moved"
        assert all(p.grad is None for p in run.model.parameters())
        run.update(loss_on(step))
    assert run.difference() < 1e-12


@pytest.mark.parametrize("deferred", [False, True])
def test_backward_with_the_weights_as_inputs_is_refused(deferred: bool) -> None:
    """``loss.backward(inputs=parameters)``: autograd would drop the compact gradients, so it is refused before anything moves."""
    run = pair(mlp(), [x()], rank=5, axis="rows", step_in_backward=not deferred)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(StateError, match=r"0\.weight: its gradient cannot be asked for by name"):
        loss_on(0)(run.compiled).backward(inputs=list(run.model.parameters()))
    run.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
    run.optimizer.zero_grad()
    for step in range(3):
        loss_on(step)(run.compiled).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss_on(step)(run.twin).backward()
        run.oracle.step()
    assert run.difference() < 1e-12 and updates(run.model, run.optimizer) == {3}


def test_gradient_of_a_projected_weight_by_autograd_grad() -> None:
    """There is none to return. The weight must not move for it."""
    run = pair(mlp(), [x()], rank=5, axis="rows")
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises((RuntimeError, StateError)):
        torch.autograd.grad(loss_on(0)(run.compiled), [run.model[0].weight])
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True)), "the weights have moved"


# ------------------------------------------------------------------------------------------------------------- regions


class Broken(nn.Module):
    """A graph break, with one weight on both sides of it and one on each."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(self.shared(x).tanh())
        torch._dynamo.graph_break()
        return self.right(self.shared(x).tanh())


def halves(model: Any, again: Any, x: Tensor) -> Tensor:
    """`Broken` with the second half by another copy."""
    x = model.left(model.shared(x).tanh())
    return again.right(again.shared(x).tanh())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_graph_break_with_a_weight_on_both_sides(axis: str) -> None:
    """It waits for the step; what is on one side moves inside the backward."""
    run = pair(Broken().double(), [x()], rank=5, axis=axis)
    model = run.model
    for step in range(7):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        run.compiled(x(step)).square().sum().backward()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == {"left.weight", "right.weight"}
        assert isinstance(model.shared.weight.grad, CompactGrad)
        assert all(isinstance(layer.weight.grad, MovedGrad) for layer in (model.left, model.right))
        oracle_backward(run, lambda a, b, step=step: halves(a, b, x(step)).square().sum())
        close(run)
    assert updates(model, run.optimizer) == {7}


def test_graph_break_under_accumulate() -> None:
    run = pair(Broken().double(), [x()], rank=5, axis="rows")
    for step in range(5):
        for micro in range(3):
            with run.optimizer.accumulate() if micro < 2 else contextlib.nullcontext():
                run.compiled(x(3 * step + micro)).square().sum().backward()
            oracle_backward(run, lambda a, b, seed=3 * step + micro: halves(a, b, x(seed)).square().sum())
        close(run)
    assert updates(run.model, run.optimizer) == {5}


def test_graph_break_with_clipping() -> None:
    """No region sees all gradients, so nothing moves before the step; what moves then is clipped by the norm of all."""
    run = pair(Broken().double(), [x()], rank=5, axis="rows", max_grad_norm=0.1)
    for step in range(5):
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        run.compiled(x(step)).square().sum().backward()
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
        oracle_backward(run, lambda a, b, step=step: halves(a, b, x(step)).square().sum())
        close(run)
        assert float(run.optimizer.grad_norm) == pytest.approx(run.oracle.grad_norm, rel=1e-12)
        assert run.oracle.grad_norm > 0.1
    assert updates(run.model, run.optimizer) == {5}


def test_siamese_with_clipping() -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows", max_grad_norm=0.1)
    for step in range(5):

        def loss_of(a: Model, b: Model, step: int = step) -> Tensor:
            return forms.loss_of(a(x(2 * step))) + 0.5 * forms.loss_of(b(x(2 * step + 1)))

        loss_of(run.compiled, run.compiled).backward()
        oracle_backward(run, loss_of)
        close(run)
        assert float(run.optimizer.grad_norm) == pytest.approx(run.oracle.grad_norm, rel=1e-12)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_step_with_a_closure(max_grad_norm: float | None, deferred: bool) -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows", max_grad_norm=max_grad_norm, step_in_backward=not deferred)
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            run.optimizer.zero_grad()
            loss = loss_on(step)(run.compiled)
            loss.backward()
            return loss

        found = run.optimizer.step(closure)
        expected = loss_on(step)(run.twin)
        expected.backward()
        run.oracle.step()
        torch.testing.assert_close(found, expected)
        indices(run)
        assert run.difference() < 1e-12
    assert updates(run.model, run.optimizer) == {5}


# ---------------------------------------------------------------------------------------------------- what can go wrong


def test_exception_under_accumulate_leaves_the_optimizer_usable() -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows")
    run.update(loss_on(0))
    with contextlib.suppress(ZeroDivisionError), run.optimizer.accumulate():
        loss_on(1)(run.compiled).backward()
        raise ZeroDivisionError
    assert isinstance(run.model[0].weight.grad, CompactGrad)
    run.optimizer.zero_grad()
    for step in range(2, 7):
        before = run.model[0].weight.detach().clone()
        loss_on(step)(run.compiled).backward()
        assert not torch.equal(run.model[0].weight, before), "it does not move inside the backward any more"
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss_on(step)(run.twin).backward()
        run.oracle.step()
    assert run.difference() < 1e-12


class Fails(torch.autograd.Function):
    """The identity, with a backward that fails while `on` is set."""

    on = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Fails.on:
            raise ZeroDivisionError
        return grad


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("where", ["before", "between", "behind"])
def test_exception_inside_a_backward_leaves_the_optimizer_usable(where: str, deferred: bool) -> None:
    """The script drops the gradients, by ``model.zero_grad()``, and goes on."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh()

    def run_twice(model: Any, x: Tensor, *fails: str) -> Tensor:
        """The same weight in two calls, so that its gradient is complete only after both backwards."""
        x = Fails.apply(x) if "behind" in fails else x
        x = model(x)
        x = model(Fails.apply(x) if "between" in fails else x)
        return (Fails.apply(x) if "before" in fails else x).square().sum()

    torch.manual_seed(3)
    run = pair(Halves().double(), [x()], rank=5, axis="rows", step_in_backward=not deferred)
    for step in range(7):
        failing = run_twice(run.compiled, x(100 + step).requires_grad_(), where)
        before = run.model.layer.weight.detach().clone()
        with pytest.raises(ZeroDivisionError):
            failing.backward()
        del failing
        assert torch.equal(run.model.layer.weight, before)  # two calls: it waits for the step
        run.model.zero_grad()
        run_twice(run.compiled, x(step)).backward()
        oracle_backward(run, lambda a, b, step=step: b(a(x(step))).square().sum())
        close(run)
    assert updates(run.model, run.optimizer) == {7}


def test_nested_accumulate() -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows")
    with run.optimizer.accumulate():
        with run.optimizer.accumulate():
            loss_on(0)(run.compiled).backward()
        loss_on(1)(run.compiled).backward()
        before = run.model[0].weight.detach().clone()
    loss_on(2)(run.compiled).backward()
    assert torch.equal(run.model[0].weight, before)
    run.optimizer.step()
    for step in range(3):
        loss_on(step)(run.twin).backward()
        run.oracle.choose()
    run.oracle.step()
    assert run.difference() < 1e-12


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("on_refresh", ["reset", "carry"])
def test_zero_grad_drops_compact_gradients(on_refresh: str, deferred: bool) -> None:
    """Also between the backward that chose the rows of a refresh and the step: the next backward chooses anew, and what is
    carried are the moments from before."""
    run = pair(mlp(), [x()], rank=10, axis="rows", on_refresh=on_refresh, step_in_backward=not deferred)
    weight, state = run.model[0].weight, run.optimizer.state
    only_before: set[int] = set()
    for step in range(7):
        before = set(state[weight]["index"].tolist() if step else [])
        with run.optimizer.accumulate():
            loss_on(100 + step)(run.compiled).backward()
        dropped = set(weight.grad.rows.tolist())
        run.optimizer.zero_grad()
        assert all(p.grad is None for p in run.model.parameters()) and run.optimizer.compact_grad(weight) is None
        run.update(loss_on(step))
        indices(run)
        assert run.difference() < 1e-12
        only_before |= before & set(state[weight]["index"].tolist()) - dropped
    assert updates(run.model, run.optimizer) == {7}
    assert only_before, "no row stayed that the dropped gradient would have left out"


def test_zero_grad_that_keeps_tensors_drops_them_too() -> None:
    """``set_to_none=False`` fills the compact gradient with zeros: a step then is one by a gradient of zero."""
    run = pair(mlp(), [x()], rank=5, axis="rows", update_proj_gap=100)
    run.update(loss_on(0))
    with run.optimizer.accumulate():
        loss_on(100)(run.compiled).backward()
    run.optimizer.zero_grad(set_to_none=False)
    assert all(float(p.grad.norm()) == 0 for p in run.model.parameters())  # type: ignore[union-attr]
    run.update(loss_on(1))
    assert run.difference() < 1e-12


@pytest.mark.parametrize("deferred", [False, True])
def test_step_without_a_backward_moves_nothing(deferred: bool) -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows", step_in_backward=not deferred)
    run.update(loss_on(0))
    before = [p.detach().clone() for p in run.model.parameters()]
    run.optimizer.step()
    run.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
    assert updates(run.model, run.optimizer) == {1}


def test_step_twice_with_one_gradient_is_two_updates_as_in_torch() -> None:
    """Nobody called ``zero_grad``: torch applies the same gradient again, and so do we."""
    run = pair(mlp(), [x()], rank=5, axis="rows", step_in_backward=False, update_proj_gap=100)
    loss_on(0)(run.compiled).backward()
    loss_on(0)(run.twin).backward()
    gradients = [p.grad for p in run.twin.parameters()]
    for _ in range(2):
        run.optimizer.step()
        for p, gradient in zip(run.twin.parameters(), gradients, strict=True):
            p.grad = gradient
        run.oracle.step()
    assert updates(run.model, run.optimizer) == {2}
    assert run.difference() < 1e-12


def test_two_backwards_without_accumulate_are_refused_before_anything_moves_twice() -> None:
    run = pair(mlp(), [x()], rank=5, axis="rows")
    loss_on(0)(run.compiled).backward()
    before = [p.detach().clone() for p in run.model.parameters()]
    for _ in range(2):
        with pytest.raises(StateError, match=r"0\.weight: it was already updated .* under opt\.accumulate\(\)"):
            loss_on(1)(run.compiled).backward()
    with pytest.raises(StateError, match=r"0\.weight: it was already updated"), run.optimizer.accumulate():
        loss_on(1)(run.compiled).backward()
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
    run.optimizer.step()
    assert updates(run.model, run.optimizer) == {1}


def test_two_backwards_in_deferred_mode_add_up_without_accumulate() -> None:
    """As any torch optimizer would have it: ``accumulate()`` is for the mode in which backwards step."""
    run = pair(mlp(), [x()], rank=5, axis="rows", step_in_backward=False)
    for step in range(5):
        for micro in range(2):
            loss_on(2 * step + micro)(run.compiled).backward()
            loss_on(2 * step + micro)(run.twin).backward()
            run.oracle.choose()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.oracle.step()
        indices(run)
    assert updates(run.model, run.optimizer) == {5}
    assert run.difference() < 1e-12


def test_scaling_the_loss_scales_the_compact_gradient() -> None:
    """Sum over micro-batches of ``loss / k``, the usual idiom."""
    run = pair(mlp(), [x()], rank=5, axis="rows")
    for step in range(5):
        run.update(*(loss_on(MICRO * step + micro, 1 / MICRO) for micro in range(MICRO)))
    assert run.difference() < 1e-12

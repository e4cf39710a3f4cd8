"""Compact gradients in ``.grad``: what scripts do to gradients between ``backward()`` and ``step()``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass_compile import StateError
from grass_compile.runtime.gradient import CompactGrad

from .. import forms, paper
from ..harness import Pair, pair

ROWS, COLUMNS = 7, 5


def made(dim: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[CompactGrad, Tensor]:
    """A compact gradient, and the same as a plain tensor; `full` is not what makes it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([0, 3, 4])
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.randn((3, COLUMNS) if dim == 0 else (ROWS, 3), generator=generator, dtype=wide)
    weight = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    plain = torch.zeros(ROWS, COLUMNS, dtype=wide)
    for position, row in enumerate(rows.tolist()):
        plain.select(dim, row).copy_(values.select(dim, position))
    return CompactGrad(values, rows, dim, weight), plain.to(dtype)


def deferred(**keywords: Any) -> Pair:
    """Two layers, all of whose gradients wait for the step; biases are dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16)).double()
    return pair(model, [x()], **{"rank": 5, "axis": "rows", "step_in_backward": False, **keywords})


def x(seed: int = 0) -> Tensor:
    return forms.batch(torch.float64, seed)


def backwards(run: Pair, seed: int, scale: float | Tensor = 1.0) -> None:
    """One backward on both sides."""
    (forms.loss_of(run.compiled(x(seed))) * scale).backward()
    (forms.loss_of(run.twin(x(seed))) * scale).backward()
    run.oracle.choose()


def cut(run: Pair) -> None:
    """Zero what the compiled path does not compute in the oracle's full gradients, which changes none of its steps."""
    for name, (dim, _) in run.oracle.projected.items():
        gradient = run.twin.get_parameter(name).grad
        assert gradient is not None
        kept = torch.zeros_like(gradient)
        index = run.oracle.state[name].index
        gradient.copy_(kept.index_copy_(dim, index, gradient.index_select(dim, index)))


def steps(run: Pair) -> None:
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.oracle.step()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


# --------------------------------------------------------------------------------------------------------------- reads

READS: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda g: g + 1,
    "radd": lambda g: 2 - g,
    "product": lambda g: g @ torch.ones(COLUMNS, 2, dtype=g.dtype),
    "sum": lambda g: g.sum(),
    "mean": lambda g: g.mean(dim=1),
    "abs max": lambda g: g.abs().max(),
    "row": lambda g: g[3],
    "element": lambda g: g[4, 2].item(),
    "mask": lambda g: g[g != 0],
    "transposed": lambda g: g.t(),
    "flat": lambda g: g.view(-1),
    "finite": lambda g: g.isfinite().all(),
    "any nan": lambda g: torch.isnan(g).any(),
    "list": lambda g: g.tolist(),
    "numpy": lambda g: torch.from_numpy(g.double().numpy()),
    "float": lambda g: g.to(torch.float32),
    "zeros_like": torch.zeros_like,
    "cat": lambda g: torch.cat([g.flatten(), torch.ones(2, dtype=g.dtype)]),
    "stack": lambda g: torch.stack([g, g]),
    "into another": lambda g: torch.ones(ROWS, COLUMNS, dtype=g.dtype).add_(g),
    "copied into another": lambda g: torch.ones(ROWS, COLUMNS, dtype=g.dtype).copy_(g),
    "averaged into another": lambda g: torch.ones(ROWS, COLUMNS, dtype=g.dtype).lerp_(g, 0.1),
    "multiplied into another": lambda g: torch.full((ROWS, COLUMNS), 2.0, dtype=g.dtype).mul_(g),
    "foreach into others": lambda g: torch._foreach_add([torch.ones(ROWS, COLUMNS, dtype=g.dtype)], [g])[0],
    "cosine": lambda g: nn.functional.cosine_similarity(g.flatten(), torch.ones(ROWS * COLUMNS, dtype=g.dtype), dim=0),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", READS)
def test_reading_gives_what_the_full_gradient_would(name: str, dim: int) -> None:
    gradient, plain = made(dim)
    before = gradient.compact.clone()
    found, expected = READS[name](gradient), READS[name](plain)
    assert not isinstance(found, CompactGrad) and isinstance(found, type(expected))
    torch.testing.assert_close(found, expected)
    assert torch.equal(gradient.compact, before)


def test_reading_a_bf16_gradient_rounds_once() -> None:
    gradient, plain = made(dtype=torch.bfloat16)
    assert gradient.dtype is torch.bfloat16 and gradient.compact.dtype is torch.float32
    assert torch.equal(gradient + 0, plain)


def test_shape_dtype_and_words() -> None:
    gradient, plain = made()
    assert (gradient.shape, gradient.dtype, gradient.device) == (plain.shape, plain.dtype, plain.device)
    assert gradient.numel() == plain.numel() and gradient.dim() == 2 and not gradient.requires_grad
    assert repr(gradient) == str(gradient) == "CompactGrad(shape=(7, 5), 3 along dimension 0)"


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, float("inf"), 0.0, float("-inf"), -1.0])
def test_norms(order: float, dim: int) -> None:
    gradient, plain = made(dim)
    expected = plain.norm(order)
    for found in (
        gradient.norm(order),
        torch.norm(gradient, order),
        torch.linalg.vector_norm(gradient, order),
        torch._foreach_norm([gradient, plain], order)[0],
        torch._foreach_norm([plain, gradient], order)[1],
    ):
        assert type(found) is Tensor
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.linalg.vector_norm(gradient, order, dim=1), torch.linalg.vector_norm(plain, order, dim=1))
    torch.testing.assert_close(gradient.norm(order, dim=0, keepdim=True), plain.norm(order, dim=0, keepdim=True))


def test_norm_is_that_of_the_compact_values() -> None:
    """Not of the full tensor: at least fp32, and nothing of full size is formed."""
    gradient, _ = made(dtype=torch.bfloat16)
    assert gradient.norm().dtype is torch.float32
    torch.testing.assert_close(gradient.norm(), gradient.compact.norm(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- writes

SCALINGS: dict[str, Callable[[Tensor], Any]] = {
    "number": lambda g: g.mul_(0.5),
    "operator": lambda g: operator_mul(g, 3.0),
    "tensor": lambda g: g.mul_(torch.tensor(0.5, dtype=torch.float64)),
    "one element": lambda g: g.mul_(torch.tensor([[0.5]], dtype=torch.float64)),
    "div": lambda g: g.div_(3),
    "div tensor": lambda g: g.div_(torch.tensor(3.0)),
    "data": lambda g: g.data.mul_(0.5),
    "detached": lambda g: g.detach().div_(2),
    "zero": lambda g: g.zero_(),
    "clamp": lambda g: g.clamp_(-0.5, 0.25),
    "clamp keywords": lambda g: g.clamp_(max=0.25, min=-0.5),
    "clamp one side": lambda g: g.clamp_(max=0.25),
    "foreach mul": lambda g: torch._foreach_mul_([g], 0.5),
    "foreach mul tensor": lambda g: torch._foreach_mul_([g], torch.tensor(0.5)),
    "foreach mul numbers": lambda g: torch._foreach_mul_([g], [torch.tensor(0.5)]),
    "foreach div": lambda g: torch._foreach_div_([g], 3.0),
    "foreach zero": lambda g: torch._foreach_zero_([g]),
}


def operator_mul(gradient: Tensor, factor: float) -> None:
    gradient *= factor


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_in_place(name: str, dim: int) -> None:
    gradient, plain = made(dim)
    compact = gradient.compact
    SCALINGS[name](gradient)
    SCALINGS[name](plain)
    assert gradient.compact is compact
    torch.testing.assert_close(gradient + 0, plain)


def mask() -> Tensor:
    return torch.ones(ROWS, COLUMNS, dtype=torch.float64)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul by a mask": lambda g: g.mul_(mask()),
    "mul by a row": lambda g: g.mul_(mask()[0]),
    "div by a full tensor": lambda g: g.div_(mask()),
    "foreach mul by a mask": lambda g: torch._foreach_mul_([g], [mask()]),
    "fill": lambda g: g.fill_(1.0),
    "noise": lambda g: g.normal_(),
    "masked fill": lambda g: g.masked_fill_(mask() > 0, 0.0),
    "index put": lambda g: g.index_put_((torch.tensor([0]),), torch.tensor(0.0, dtype=g.dtype)),
    "clamp above zero": lambda g: g.clamp_(min=0.1),
    "clamp below zero": lambda g: g.clamp_(max=-0.1),
    "out": lambda g: torch.add(mask(), mask(), out=g),
    "set item": lambda g: g.__setitem__(0, 0.0),
    "set column": lambda g: g.__setitem__((slice(None), 1), 0.0),
    "set by mask": lambda g: g.__setitem__(mask() > 0, 0.0),
    "through a row": lambda g: g[0].zero_(),
    "through a view": lambda g: g.view(-1).mul_(2.0),
    "through its transpose": lambda g: g.t().add_(1.0),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", WRITES)
def test_other_writes_are_refused(name: str, dim: int) -> None:
    """Silently lost they must not be."""
    gradient, plain = made(dim)
    with pytest.raises(StateError, match="compact gradient"):
        WRITES[name](gradient)
    assert torch.equal(gradient + 0, plain)


FROM_FULL: dict[str, Any] = {
    "add": lambda g: g.add_(mask()),
    "add scaled": lambda g: g.add_(mask(), alpha=0.5),
    "add a number": lambda g: g.add_(1.0),
    "add itself": lambda g: g.add_(g),
    "subtract": lambda g: g.sub_(mask()),
    "copy": lambda g: g.copy_(mask()),
    "foreach add": lambda g: torch._foreach_add_([g], [mask()]),
    "foreach add scaled": lambda g: torch._foreach_add_([g], [mask()], alpha=2.0),
    "foreach copy": lambda g: torch._foreach_copy_([g], [mask()]),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", FROM_FULL)
def test_full_gradients_are_taken_where_the_compact_one_has_values(name: str, dim: int) -> None:
    """The compact gradient of the sum, or of what is copied: its rows are right, and it stays zero elsewhere."""
    gradient, plain = made(dim)
    selected = torch.zeros_like(plain).index_fill_(dim, gradient.rows, 1.0) > 0
    FROM_FULL[name](gradient)
    FROM_FULL[name](plain)
    assert isinstance(gradient, CompactGrad) and torch.allclose(gradient + 0, torch.where(selected, plain, 0.0))


def test_refused_foreach_changes_nothing() -> None:
    gradient, plain = made()
    other = mask() * 2
    with pytest.raises(StateError):
        torch._foreach_mul_([other, gradient], [mask() * 3, mask()])
    assert torch.equal(other, mask() * 2) and torch.equal(gradient + 0, plain)


def test_clone_and_deepcopy_are_compact_and_independent() -> None:
    gradient, plain = made()
    for other in (gradient.clone(), copy.deepcopy(gradient)):
        assert isinstance(other, CompactGrad) and torch.equal(other + 0, plain)
        other.mul_(2.0)
        assert torch.equal(gradient + 0, plain) and torch.equal(other + 0, 2 * plain)


def test_a_clone_keeps_its_rows_when_new_ones_are_chosen() -> None:
    run = deferred(update_proj_gap=1)
    weight = run.model[0].weight
    backwards(run, 0)
    kept = weight.grad.clone()
    expected = weight.grad + 0
    chosen = weight.grad.rows.tolist()
    steps(run)
    backwards(run, 1)
    assert weight.grad.rows.tolist() != chosen
    assert torch.equal(kept + 0, expected)


# ------------------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
def test_torch_clips_compact_and_dense_by_their_common_norm(order: float, foreach: bool | None) -> None:
    run = deferred()
    for step in range(5):
        backwards(run, step)
        cut(run)
        assert sum(isinstance(g, CompactGrad) for g in gradients(run.model)) == 2
        limit = 0.1 if step != 2 else 1e6
        found = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit, order, foreach=foreach)
        expected = torch.nn.utils.clip_grad_norm_(run.twin.parameters(), limit, order)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert float(expected) > 0.1
        torch.testing.assert_close(
            torch.nn.utils.get_total_norm(gradients(run.model), order), min(expected, expected * 0 + limit)
        )
        steps(run)
        assert run.difference() < 1e-12


@pytest.mark.parametrize("foreach", [None, True, False])
def test_torch_clips_by_value(foreach: bool | None) -> None:
    run = deferred()
    for step in range(5):
        backwards(run, step)
        cut(run)
        before = [gradient + 0 for gradient in gradients(run.model)]
        torch.nn.utils.clip_grad_value_(run.model.parameters(), 0.05, foreach=foreach)
        torch.nn.utils.clip_grad_value_(run.twin.parameters(), 0.05)
        assert any(not torch.equal(g + 0, b) for g, b in zip(gradients(run.model), before, strict=True))
        for found, expected in zip(gradients(run.model), gradients(run.twin), strict=True):
            torch.testing.assert_close(found + 0, expected, rtol=1e-12, atol=1e-14)
        steps(run)
        assert run.difference() < 1e-12


def test_own_clipping_says_the_norm_and_keeps_it() -> None:
    run = deferred()
    assert run.optimizer.grad_norm is None
    for step in range(4):
        backwards(run, step)
        cut(run)
        expected = torch.nn.utils.clip_grad_norm_(run.twin.parameters(), 0.1)
        found = run.optimizer.clip_grad_norm_(0.1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert run.optimizer.grad_norm is found and found.dim() == 0
        steps(run)
    assert run.difference() < 1e-12


@pytest.mark.parametrize("deferred_too", [False, True])
def test_max_grad_norm_clips_every_step(deferred_too: bool) -> None:
    run = deferred(max_grad_norm=0.1, step_in_backward=not deferred_too)
    for step in range(7):
        backwards(run, step)
        steps(run)
        assert float(run.optimizer.grad_norm) == pytest.approx(run.oracle.grad_norm, rel=1e-12)
        assert run.oracle.grad_norm > 0.1
    assert run.difference() < 1e-12


def test_clipping_after_the_weights_moved_is_refused() -> None:
    run = deferred(step_in_backward=True)
    backwards(run, 0)
    bias = run.model[0].bias.grad.clone()
    with pytest.raises(StateError, match=r"0\.weight: it has already moved inside the backward, .* max_grad_norm="):
        run.optimizer.clip_grad_norm_(0.1)
    assert torch.equal(run.model[0].bias.grad, bias)
    steps(run)
    assert run.difference() < 1e-12


def test_compact_grad() -> None:
    run = deferred()
    weight, bias = run.model[0].weight, run.model[0].bias
    assert run.optimizer.compact_grad(weight) is None
    backwards(run, 0)
    found = run.optimizer.compact_grad(weight)
    expected = run.twin[0].weight.grad[run.oracle.state["0.weight"].index]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert run.optimizer.compact_grad(bias) is None
    run.optimizer.zero_grad()
    assert run.optimizer.compact_grad(weight) is None


# ---------------------------------------------------------------------------------------------------------- GradScaler


def scaler(**keywords: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, **keywords)


@pytest.mark.parametrize("clip", [False, True])
def test_scaler_unscales_compact_gradients(clip: bool) -> None:
    """With ``unscale_`` for clipping, and without, where the scaler unscales in its step."""
    run, scale = deferred(), scaler()
    for step in range(5):
        scale.scale(forms.loss_of(run.compiled(x(step)))).backward()
        forms.loss_of(run.twin(x(step))).backward()
        run.oracle.choose()
        cut(run)
        if clip:
            scale.unscale_(run.optimizer)
            for found, expected in zip(gradients(run.model), gradients(run.twin), strict=True):
                torch.testing.assert_close(found + 0, expected, rtol=1e-6, atol=1e-8)  # the loss is fp32
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            torch.nn.utils.clip_grad_norm_(run.twin.parameters(), 0.1)
        scale.step(run.optimizer)
        scale.update()
        run.optimizer.zero_grad()
        run.oracle.step()
        assert run.difference() < 1e-12
    assert {run.optimizer.state[layer.weight]["updates"] for layer in (run.model[0], run.model[2])} == {5}


@pytest.mark.parametrize("where", ["compact", "dense"])
@pytest.mark.parametrize("on_refresh", ["reset", "carry"])
def test_scaler_skips_a_step_with_infinities_and_nothing_is_lost(on_refresh: str, where: str) -> None:
    """Steps are skipped in the regular course and where rows are due; training goes on as if they had not been."""
    run, scale = deferred(on_refresh=on_refresh, rank=10), scaler()
    taken = 0
    for step in range(10):
        loss, fails = forms.loss_of(run.compiled(x(step))), step in (1, 4, 5, 8)
        scale.scale(loss).backward()
        if fails and where == "compact":
            run.optimizer.compact_grad(run.model[2].weight)[0, 0] = float("inf")
        elif fails:
            run.model[0].bias.grad[3] = float("nan")
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        factor = scale.get_scale()
        scale.step(run.optimizer)
        scale.update()
        run.optimizer.zero_grad()
        if fails:
            assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
            assert scale.get_scale() == factor / 2
        else:
            forms.loss_of(run.twin(x(step))).backward()
            run.oracle.step()
            taken += 1
        assert run.optimizer.state[run.model[0].weight]["updates"] == taken
        assert run.difference() < 1e-12


def test_scaler_sees_an_overflow_of_the_scaled_loss() -> None:
    """The gradient that overflows chooses rows; the step that follows chooses them anew."""
    model = forms.LinearBias()
    optimizer = paper.AdamW(model.named_parameters(), rank=4, step_in_backward=False)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**125, growth_interval=1000, backoff_factor=2.0**-100)
    before = model.layer.weight.detach().clone()
    for step in range(2):
        scale.scale(forms.loss_of(compiled(forms.batch(torch.float32))) * 100).backward()
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
        assert torch.equal(model.layer.weight, before) == (step == 0)
    assert optimizer.state[model.layer.weight]["updates"] == 1
    assert model.layer.weight.isfinite().all()
    twin = forms.LinearBias()
    with torch.no_grad():
        twin.layer.weight.copy_(before)
    forms.loss_of(twin(forms.batch(torch.float32))).backward()
    index = optimizer.state[model.layer.weight]["index"]
    dim = optimizer.state[model.layer.weight]["dim"]
    assert index.tolist() == twin.layer.weight.grad.norm(dim=1 - dim).topk(4).indices.sort().values.tolist()  # type: ignore[union-attr]


def test_scaler_with_accumulation() -> None:
    run, scale = deferred(), scaler()
    for step in range(5):
        for micro in range(3):
            scale.scale(forms.loss_of(run.compiled(x(3 * step + micro)))).backward()
            forms.loss_of(run.twin(x(3 * step + micro))).backward()
            run.oracle.choose()
        scale.step(run.optimizer)
        scale.update()
        run.optimizer.zero_grad()
        run.oracle.step()
    assert run.difference() < 1e-12


@pytest.mark.parametrize("unscale", [False, True])
def test_scaler_is_refused_where_weights_move_inside_the_backward(unscale: bool) -> None:
    run, scale = deferred(step_in_backward=True), scaler()
    scale.scale(forms.loss_of(run.compiled(x()))).backward()
    if unscale:
        with pytest.raises(StateError, match=r"unscaled by GradScaler.* step_in_backward=False"):
            scale.unscale_(run.optimizer)
    with pytest.raises(StateError, match=r"GradScaler scales the loss, .* step_in_backward=False"):
        scale.step(run.optimizer)


def test_disabled_scaler_is_no_scaler() -> None:
    run, scale = deferred(step_in_backward=True), scaler(enabled=False)
    for step in range(3):
        scale.scale(forms.loss_of(run.compiled(x(step)))).backward()
        scale.step(run.optimizer)
        scale.update()
        run.optimizer.zero_grad()
        forms.loss_of(run.twin(x(step))).backward()
        run.oracle.step()
    assert run.difference() < 1e-12

"""``@train_step``, and functions that contain a whole step, against the loop written out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import ConfigError, StateError

from . import forms, paper

OPTIONS = {"compiler": "aot_eager"}
PROJECT = {"rank": 6, "axis": "rows", "update_proj_gap": 3}
STEPS = 8


def made(own: bool, **keywords: Any) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model, an optimizer of ours or torch's, and the backend's options that go with it."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = forms.LinearBias().double()
    if own:
        return model, paper.AdamW(model.named_parameters(), lr=1e-2, **PROJECT, **keywords), OPTIONS
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), {**OPTIONS, **PROJECT}


def written_out(own: bool, accumulate: int = 1, **keywords: Any) -> list[float]:
    """Losses of the loop as people write it."""
    model, optimizer, options = made(own, **keywords)
    compiled = torch.compile(model, backend="grass", options=options)
    losses = []
    for call in range(STEPS):
        last = (call + 1) % accumulate == 0
        with contextlib.nullcontext() if last or not own else optimizer.accumulate():
            loss = forms.loss_of(compiled(forms.batch(torch.float64, call)))
            (loss / accumulate).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_equals_the_loop_written_out(own: bool, accumulate: int) -> None:
    expected = written_out(own, accumulate)
    model, optimizer, options = made(own)

    @grass_compile.train_step(optimizer, accumulate=accumulate, options=options)
    def step(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What it does."""
        y = model(x)
        return forms.loss_of(y), {"y": y}

    losses = []
    for call in range(STEPS):
        loss, aux = step(forms.batch(torch.float64, call))
        assert not loss.requires_grad and not aux["y"].requires_grad
        losses.append(loss.item())
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert "index" in optimizer.state[model.layer.weight] and step.__doc__ == "What it does."
    assert all(p.grad is None for p in model.parameters()) == (STEPS % accumulate == 0)


@pytest.mark.parametrize(
    ("own", "keywords"), [(True, {}), (True, {"step_in_backward": False}), (True, {"max_grad_norm": 0.1}), (False, {})]
)
def test_compiled_function_that_contains_the_step(own: bool, keywords: dict[str, Any]) -> None:
    """``loss.backward()``, ``opt.step()`` and ``opt.zero_grad()`` inside the compiled function."""
    expected = written_out(own, **keywords)
    model, optimizer, options = made(own, **keywords)

    def step(x: Tensor) -> Tensor:
        loss: Tensor = forms.loss_of(model(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    compiled: Callable[[Tensor], Tensor] = torch.compile(step, backend="grass", options=options)
    losses = [compiled(forms.batch(torch.float64, call)).item() for call in range(STEPS)]
    # torch's own AdamW, when Dynamo traces it, counts the bias's steps in float32: dense training differs by 4e-4 too
    torch.testing.assert_close(losses, expected, rtol=1e-12 if own else 1e-3, atol=0)
    assert "index" in optimizer.state[model.layer.weight]


@pytest.mark.parametrize("returned", [None, torch.ones(3, requires_grad=True), torch.ones(()), ()])
def test_a_function_without_a_loss_is_refused(returned: Any) -> None:
    _, optimizer, options = made(True)
    step = grass_compile.train_step(optimizer, options=options)(lambda: returned)
    with pytest.raises(ConfigError, match="must return a scalar loss"):
        step()


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, True])
def test_bad_accumulate(accumulate: Any) -> None:
    _, optimizer, _ = made(True)
    with pytest.raises(ConfigError, match="accumulate must be a whole number"):
        grass_compile.train_step(optimizer, accumulate=accumulate)


def test_grad_scaler_is_refused_in_fused_mode_and_exact_in_deferred_mode() -> None:
    model, optimizer, options = made(True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    compiled = torch.compile(model, backend="grass", options=options)
    scaler.scale(forms.loss_of(compiled(forms.batch(torch.float64, 0)))).backward()
    with pytest.raises(StateError, match=r"GradScaler .* step_in_backward=False"):
        scaler.step(optimizer)

    expected = written_out(True)
    model, optimizer, options = made(True, step_in_backward=False)
    compiled = torch.compile(model, backend="grass", options=options)
    losses = []
    for call in range(STEPS):
        loss = forms.loss_of(compiled(forms.batch(torch.float64, call)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)

"""Every form of a linear layer against the eager oracle: rows and columns, fp32 and bf16, op by op and under Inductor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from grass_compile.math.reference import ReferenceAdamW

from . import forms, paper
from .harness import KEYWORDS, Pair, pair
from .pairs import every_value

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = 7  # with a refresh every 3 steps: the first, and two more


def projectable(name: str, axis: str) -> int:
    """How many weights of a form are projected."""
    return 3 if name in ("JoinedWeights", "ScaledJoined", "LowRank") else 1


def check_against_oracle(run: Pair, model64: nn.Module, dtype: torch.dtype) -> None:
    """Train; every parameter must be as near to an fp64 run as twice the eager oracle's own error."""
    exact = ReferenceAdamW(model64.named_parameters(), projected=run.oracle.projected, **KEYWORDS)
    for step in range(STEPS):
        x = forms.batch(dtype, seed=step)
        run.step(forms.loss_of, x)
        forms.loss_of(model64(x.double())).backward()
        exact.step()
    for name, p in run.model.named_parameters():
        target, eager = dict(model64.named_parameters())[name], dict(run.twin.named_parameters())[name]
        own = float((p.detach().double() - target.detach()).norm())
        theirs = float((eager.detach().double() - target.detach()).norm())
        floor = torch.finfo(dtype).eps * float(target.detach().norm())
        assert own <= 2 * theirs + floor, (name, own, theirs)
    for name, (_, rank) in run.oracle.projected.items():
        state = run.optimizer.state[dict(run.model.named_parameters())[name]]
        assert state["index"].tolist() == run.oracle.state[name].index.tolist() and len(state["index"]) == rank
        assert dict(run.model.named_parameters())[name].grad is None


@every_value(name=forms.FORMS, axis=["rows", "columns"], dtype=DTYPES)
def test_form_equals_oracle(name: str, axis: str, dtype: str) -> None:
    model = forms.FORMS[name]()
    model64 = copy.deepcopy(model).to(DTYPES[dtype]).double()
    run = pair(model.to(DTYPES[dtype]), [forms.batch(DTYPES[dtype])], rank=forms.RANK, axis=axis)
    assert len(run.oracle.projected) == projectable(name, axis)
    check_against_oracle(run, model64, DTYPES[dtype])


@pytest.mark.inductor
@pytest.mark.exhaustive
@pytest.mark.parametrize(("axis", "dtype"), [("rows", "bf16"), ("columns", "fp32")])
def test_all_forms_under_inductor(axis: str, dtype: str) -> None:
    without = ("Autocast",) if dtype == "bf16" else ()
    model = forms.Everything(without)
    model64 = copy.deepcopy(model).to(DTYPES[dtype]).double()
    run = pair(model.to(DTYPES[dtype]), [forms.batch(DTYPES[dtype])], rank=forms.RANK, axis=axis, compiler="inductor")
    assert len(run.oracle.projected) == sum(projectable(name, axis) for name in forms.FORMS if name not in without)
    check_against_oracle(run, model64, DTYPES[dtype])


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["Linear", "InOut"])
def test_only_selected_rows_move(name: str, axis: str) -> None:
    model = forms.FORMS[name]()
    optimizer = paper.AdamW(model.named_parameters(), rank=forms.RANK, axis=axis, update_proj_gap=100)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    before = model.w.detach().clone()
    for step in range(3):
        forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model.w.detach() != before).any(dim=0 if (axis == "columns") == (name == "Linear") else 1)
    assert sorted(moved.nonzero().flatten().tolist()) == optimizer.state[model.w]["index"].tolist()


def test_moments_have_the_compact_shape() -> None:
    shapes = {
        ("Linear", "rows"): (6, 24),
        ("Linear", "columns"): (32, 6),
        ("InOut", "rows"): (24, 6),
        ("InOut", "columns"): (6, 32),
    }
    for (name, axis), shape in shapes.items():
        run = pair(forms.FORMS[name](), [forms.batch(torch.float32)], rank=forms.RANK, axis=axis)
        run.step(forms.loss_of, forms.batch(torch.float32))
        state = run.optimizer.state[run.model.w]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == shape
        assert state["index"].dtype is torch.int64 and state["row_scale"].tolist() == [1.0] * forms.RANK
        assert float(state["step"]) == 1

"""Linear layers that torchao trains in float8: their weight gradients are products of float8 numbers, or of bf16 ones."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import grass_compile

from .pairs import every_value

logging.getLogger("torchao").setLevel(logging.ERROR)  # it lacks operators for this torch, none of which is needed
float8 = pytest.importorskip("torchao.float8")

RANK, TOKENS = 16, 128
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


def model_of(recipe: str) -> Any:
    torch.manual_seed(0)
    model = Model().bfloat16()
    float8.convert_to_float8_training(model, config=float8.Float8LinearConfig.from_recipe_name(recipe))
    return model


def optimizer_of(model: nn.Module, **keywords: Any) -> Any:
    defaults = {"lr": 1e-2, "rank": RANK, "step_in_backward": False, "seed": 1, "update_proj_gap": 3, "stagger": False}
    return grass_compile.AdamW(model.named_parameters(), **{**defaults, **keywords})


def inputs() -> Tensor:
    """Half of the tokens are a hundred times as long as the others, which one scale for all serves badly."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, 64, generator=generator)
    return (x * torch.where(torch.arange(TOKENS) % 2 == 0, 100.0, 1.0).unsqueeze(1)).bfloat16()


class Products(TorchDispatchMode):
    """The shapes of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._scaled_mm.default, torch.ops.aten.mm.default):
            self.shapes.append(tuple(result.shape))
        return result


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(x).float().square().mean()  # type: ignore[no-any-return]


@every_value(recipe=RECIPES, axis=["rows", "columns"], selection=["uniform", "top"])
def test_the_compact_gradient_is_that_of_the_dense_float8_product(recipe: str, axis: str, selection: str) -> None:
    """In the selected rows, to the rounding of bf16: the scales are those of the whole. Between refreshes nothing larger is
    computed."""
    model, x = model_of(recipe), inputs()
    optimizer = optimizer_of(model, axis=axis, selection=selection)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(4):
        eager = copy.deepcopy(model)
        loss_of(eager, x).backward()
        with Products() as products:
            loss_of(compiled, x).backward()
        for name, parameter in model.named_parameters():
            rows, dim = parameter.grad.rows, parameter.grad.along
            assert dim == (axis == "columns") and len(rows) == RANK
            dense = dict(eager.named_parameters())[name].grad
            expected = dense.index_select(dim, rows).float()
            assert (parameter.grad.compact - expected).norm() < 1e-3 * expected.norm(), (name, step)
        small = [shape for shape in products.shapes if RANK in shape]
        regular = selection == "uniform" or step % 3
        assert len(small) == (2 if regular else 0) and len(products.shapes) == 5
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_its_error_is_that_of_the_dense_one(recipe: str) -> None:
    """Against the product of the very same numbers in fp64."""
    model, x = model_of(recipe), inputs()
    optimizer = optimizer_of(model, selection="uniform")
    plain = Model().double()
    plain.load_state_dict(model.state_dict())
    loss_of(plain, x.double()).backward()
    eager = copy.deepcopy(model)
    loss_of(eager, x).backward()
    loss_of(torch.compile(model, backend="grass", options={"compiler": "aot_eager"}), x).backward()
    for name, parameter in model.named_parameters():
        exact, dense = (dict(m.named_parameters())[name].grad.double() for m in (plain, eager))
        rows, dim = parameter.grad.rows, parameter.grad.along
        errors = [
            (found - exact.index_select(dim, rows)).norm()
            for found in (parameter.grad.compact.double(), dense.index_select(dim, rows))
        ]
        assert errors[0] <= errors[1] < 0.2 * exact.norm()
    optimizer.zero_grad()


@pytest.mark.inductor
@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("rowwise", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("mode", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_inductor_trains_as_op_by_op(recipe: str, mode: bool) -> None:
    x, weights = inputs(), []
    for compiler in ("inductor", "aot_eager"):
        model = model_of(recipe)
        optimizer = optimizer_of(model, step_in_backward=mode, axis="rows" if mode else "columns", lr=1e-3)
        compiled = torch.compile(model, backend="grass", options={"compiler": compiler})
        losses = []
        for _ in range(5):
            loss = loss_of(compiled, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        torch._dynamo.reset()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0.02, atol=4e-3)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"projection": "galore"}, "float8 product, with which projection='galore' does not go"),
        ({"selection": "top", "scores": "estimate"}, "float8 product, with which scores='estimate' does not go"),
    ],
    ids=str,
)
def test_what_does_not_go_is_said(keywords: dict[str, Any], said: str) -> None:
    model = model_of("tensorwise")
    optimizer = optimizer_of(model, **keywords)
    report = grass_compile.explain(model, inputs(), optimizer=optimizer)
    assert all(said in report[f"{name}.weight"].reason for name in ("up", "down"))


class RowWise(torch.autograd.Function):
    """A linear layer whose weight gradient is one float8 product with a scale for each row and each column."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        first, scale_first = in_float8(grad_out)
        second, scale_second = in_float8(x)
        numbers = first.t().contiguous(), second.t().contiguous().t()
        gradient = torch._scaled_mm(*numbers, scale_first.reshape(-1, 1), scale_second, out_dtype=torch.bfloat16)
        return grad_out @ weight, gradient


def in_float8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column the largest is 448."""
    scale = tensor.abs().amax(0, keepdim=True).float().clamp(min=1e-12) / 448
    return (tensor.float() / scale).to(torch.float8_e4m3fn), scale


class RowWiseModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = RowWise.apply(x, self.up.weight)
        return RowWise.apply(up.relu(), self.down.weight)  # type: ignore[no-any-return]


@every_value(axis=["rows", "columns"], selection=["uniform", "top"])
def test_scales_of_the_selected_features(axis: str, selection: str) -> None:
    """Where the product itself takes a scale for each row and column, it gets those of the selected ones."""
    torch.manual_seed(0)
    model, x = RowWiseModel().bfloat16(), inputs()
    optimizer = optimizer_of(model, axis=axis, selection=selection)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(4):
        eager = copy.deepcopy(model)
        loss_of(eager, x).backward()
        loss_of(compiled, x).backward()
        for name, parameter in model.named_parameters():
            rows, dim = parameter.grad.rows, parameter.grad.along
            expected = dict(eager.named_parameters())[name].grad.index_select(dim, rows).float()
            assert (parameter.grad.compact - expected).norm() < 2e-3 * expected.norm(), (name, step)
        optimizer.step()
        optimizer.zero_grad()

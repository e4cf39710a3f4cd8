"""Inputs that AOTAutograd adds, takes apart or hides in graphs of their own: projected, or refused in words that are true."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import grass_compile

from .. import paper
from ..harness import joint_graph

WIDTH = 8


def weight(rows: int = WIDTH) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, WIDTH) / 3)


class Model(nn.Module):
    """A function of some tensors."""

    def __init__(self, function: Callable[..., Tensor], **tensors: Any) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def trained(model: nn.Module, *inputs: Tensor, loss: Callable[[Any], Tensor] = torch.sum) -> set[str]:
    """Train at full rank beside ``torch.optim.AdamW``, which must move every weight alike; the names of what is projected."""
    twin = copy.deepcopy(model)
    named, others = ([(n, p) for n, p in m.named_parameters() if p.requires_grad] for m in (model, twin))
    optimizer = paper.AdamW(named, lr=1e-2, eps=1e-3, weight_decay=0.0, rank=WIDTH)
    reference = torch.optim.AdamW([p for _, p in others], lr=1e-2, eps=1e-3, weight_decay=0.0)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for _ in range(3):
        for run, step in ((compiled, optimizer), (twin, reference)):
            loss(run(*inputs)).backward()
            step.step()
            step.zero_grad()
    for (name, own), (_, other) in zip(named, others, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6, msg=name)
    return {name for name, parameter in named if "index" in optimizer.state[parameter]}


def test_nested_region_is_left_alone_and_the_rest_is_projected() -> None:
    """AOTAutograd asks the partitioner for the inner graph too; what is used there is refused by name."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh()

    class Stack(nn.Sequential):
        pass

    model = Stack(*(Block() for _ in range(4)), nn.Linear(WIDTH, WIDTH))
    names = trained(model, torch.randn(5, WIDTH))
    assert "4.weight" in names and "3.layer.weight" not in names
    torch._dynamo.reset()
    optimizer = paper.AdamW(model.named_parameters(), rank=4)
    report = {row.name: row for row in grass_compile.explain(model, torch.randn(5, WIDTH), optimizer=optimizer)}
    assert "inside a torch.compiler.nested_compile_region" in report["3.layer.weight"].reason


def test_jagged_tensor_comes_in_pieces() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)], layout=torch.jagged)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    assert trained(model, nested, loss=lambda out: out.values().sum()) == {"0.weight", "2.weight"}


def test_frozen_subclass_beside_low_rank_weights() -> None:
    base = nn.Parameter(TwoTensor(torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)), requires_grad=False)
    model = Model(lambda s, x: F.linear(x, s.base.a) + F.linear(F.linear(x, s.down), s.up), base=base, down=weight(), up=weight())
    assert trained(model, torch.randn(5, WIDTH)) == {"down", "up"}


def test_gradient_that_is_a_subclass_is_refused() -> None:
    x = TwoTensor(torch.randn(5, WIDTH), torch.randn(5, WIDTH))
    _, analysis = joint_graph(Model(lambda s, x: F.linear(x, s.w), w=weight()), x).find()
    assert [refusal.reason for refusal in analysis.refusals] == [
        "its gradient is a tensor subclass, as an input or a tangent is one"
    ]


def test_effect_tokens() -> None:
    if not hasattr(torch.ops.grass_test, "effect"):
        operator = torch.library.custom_op("grass_test::effect", _effect, mutates_args=())
        operator.register_fake(torch.empty_like)
        operator.register_autograd(lambda ctx, grad: grad)
        torch.library._register_effectful_op("grass_test::effect", torch._library.effects.EffectType.ORDERED)
    model = Model(lambda s, x: F.linear(torch.ops.grass_test.effect(F.linear(x, s.a)), s.b), a=weight(), b=weight())
    assert trained(model, torch.randn(5, WIDTH)) == {"a", "b"}


def _effect(x: Tensor) -> Tensor:
    return x.clone()


def test_region_that_only_writes_to_its_input() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, out: Tensor) -> None:
            out.add_(self.layer(x))

    model, x = Adds(), torch.randn(5, WIDTH)
    expected = model.layer.weight.detach() - 1e-2 * torch.sign(x.sum(0)).expand(WIDTH, WIDTH)
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, eps=1e-12, weight_decay=0.0, rank=WIDTH)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    out = torch.zeros(5, WIDTH)
    compiled(x, out)
    out.sum().backward()
    optimizer.step()
    assert "index" in optimizer.state[model.layer.weight]
    torch.testing.assert_close(model.layer.weight.detach(), expected)


def test_compiled_autograd_is_refused_before_a_weight_moves() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    before = model.weight.detach().clone()
    optimizer = paper.AdamW(model.named_parameters(), rank=4)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(grass_compile.StateError, match="Compiled autograd"),
    ):
        compiled(torch.randn(5, WIDTH)).sum().backward()
    assert torch.equal(model.weight, before) and "exp_avg" in optimizer.state[model.weight]
    assert not optimizer.state[model.weight]["exp_avg"].any()


@pytest.mark.filterwarnings("error::grass_compile.GrassWarning")
def test_leaf_that_is_no_parameter_is_projected() -> None:
    w = torch.randn(WIDTH, WIDTH, requires_grad=True)
    optimizer = paper.AdamW([("w", w)], rank=4)
    compiled = torch.compile(lambda x: F.linear(x, w), backend="grass", options={"compiler": "aot_eager"})
    compiled(torch.randn(5, WIDTH)).sum().backward()
    optimizer.step()
    assert len(optimizer.state[w]["index"]) == 4


def test_recurrent_layer_is_said_to_run_uncompiled() -> None:
    model = nn.LSTM(WIDTH, WIDTH)
    optimizer = paper.AdamW(model.named_parameters(), rank=4)
    torch.compile(model, backend="grass", options={"compiler": "aot_eager"})(torch.randn(3, 2, WIDTH))[0].sum().backward()
    with pytest.warns(grass_compile.GrassWarning, match="weight_ih_l0 the first.*Dynamo runs the part that uses them uncompiled"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(1, WIDTH), (WIDTH,)])
def test_one_row(shape: tuple[int, ...]) -> None:
    assert trained(nn.Linear(WIDTH, WIDTH), torch.randn(shape)) == {"weight"}

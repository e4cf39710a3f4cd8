"""Products of weights that read the same activations become one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import grass_compile
from grass_compile import ops
from grass_compile.passes import pipeline
from tests.harness import Attention, batch

from .. import paper

aten = torch.ops.aten

RANK = 4


class Decoder(nn.Module):
    """Every layer reads one memory; each has two weights that do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, memory: Tensor) -> Tensor:
        x = memory
        for layer in self.layers:
            k, v = layer.k(memory), layer.v(memory)
            x = x + layer.o(torch.cat(((layer.q(x)[..., :8] @ k.transpose(-1, -2)).softmax(-1) @ v, x[..., 8:]), -1)).tanh()
        return x


class Chained(nn.Module):
    """Both weights read the same, and one gradient needs the other's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) * self.k(x).cos()).sin() + self.k(x)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The finished backwards, in the order in which they are made."""
    made: list[fx.GraphModule] = []
    finish = pipeline.finish_backward

    def watched(*args: Any) -> fx.GraphModule:
        made.append(finish(*args))
        return made[-1]

    monkeypatch.setattr(pipeline, "finish_backward", watched)
    return made


def train(model: nn.Module, steps: int = 5, disable: tuple[str, ...] = (), micro: int = 1, **own: Any) -> grass_compile.AdamW:
    keywords: dict[str, Any] = dict(rank=RANK, axis="rows", update_proj_gap=3, seed=5, lr=1e-2)
    optimizer = paper.AdamW(model.named_parameters(), **{**keywords, **own})
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", "disable_passes": disable})
    for step in range(steps):
        for part in range(micro - 1):
            with optimizer.accumulate():
                compiled(batch(100 + micro * step + part)).square().sum().backward()
        compiled(batch(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def gathers(gm: fx.GraphModule) -> list[int]:
    """Of how many tensors each gather is."""
    return sorted(len(node.args[0]) for node in gm.graph.find_nodes(op="call_function", target=ops.gather))  # type: ignore[arg-type]


def compact_products(gm: fx.GraphModule) -> list[int]:
    """The rows of each product of gathered features."""
    products = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    sources = {node: node.all_input_nodes[0].all_input_nodes for node in products}
    return sorted(node.meta["val"].shape[0] for node in products if [s for s in sources[node] if s.target is ops.gather])


def test_one_product_for_queries_keys_and_values(backwards: list[fx.GraphModule]) -> None:
    torch.manual_seed(0)
    train(Attention())
    refresh, regular = backwards
    assert gathers(refresh) == []
    assert gathers(regular) == [1, 3]
    assert compact_products(regular) == [RANK, 3 * RANK]


def test_disabled(backwards: list[fx.GraphModule]) -> None:
    torch.manual_seed(0)
    train(Attention(), disable=("batch_matmuls",))
    assert gathers(backwards[1]) == [1] * 4 and compact_products(backwards[1]) == [RANK] * 4


TRAINING: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "on_refresh": "carry"},
    {"stagger": True, "update_proj_gap": 4},
    {"selection": "uniform", "update_proj_gap": 2},
    {"scores": "sampled"},
    {"micro": 2},
    {"step_in_backward": False},
    {"max_grad_norm": 0.5},
]
ALL_AT_ONCE = {"weight_decay": 0.1, "on_refresh": "carry", "stagger": True, "update_proj_gap": 4, "micro": 2}


@pytest.mark.parametrize(
    ("network", "keywords"),
    [
        *zip(itertools.cycle([Attention, Chained]), TRAINING, strict=False),
        (Decoder, ALL_AT_ONCE),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [*zip(itertools.cycle([Chained, Attention]), TRAINING, strict=False), (Decoder, {})]
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_the_same_weights_come_out(network: type[nn.Module], keywords: dict[str, Any]) -> None:
    torch.manual_seed(0)
    joined = network()
    apart = network()
    apart.load_state_dict(joined.state_dict())
    optimizer = train(joined, steps=9, **keywords)
    torch._dynamo.reset()
    train(apart, steps=9, disable=("batch_matmuls",), **keywords)
    assert all("index" in optimizer.state[parameter] for parameter in joined.parameters())
    for (name, one), (_, other) in zip(joined.named_parameters(), apart.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_only_those_that_choose_no_rows_are_joined(backwards: list[fx.GraphModule]) -> None:
    """Of three weights one forms its full gradient in a staggered step."""
    torch.manual_seed(0)
    train(Attention(), steps=18, stagger=True, update_proj_gap=8)
    found = [gathers(gm) for gm in backwards]
    assert [1, 3] in found and [1, 2] in found  # a regular step; q, k or v refreshes


def test_layers_far_apart_do_not_wait_for_each_other(backwards: list[fx.GraphModule]) -> None:
    """In all layers k and v read the same, and only those of one layer are joined; the queries of the first layer too."""
    torch.manual_seed(0)
    train(Decoder())
    joined = gathers(backwards[1])
    assert sum(joined) == 12 and max(joined) <= 3 and joined.count(2) + joined.count(3) == 3


@pytest.mark.inductor
@pytest.mark.exhaustive
def test_with_inductor() -> None:
    """The steps read views of the joint product."""
    torch.manual_seed(0)
    compiled, eager = Attention(), Attention()
    eager.load_state_dict(compiled.state_dict())
    train(eager, disable=("batch_matmuls",))
    torch._dynamo.reset()
    optimizer = paper.AdamW(compiled.named_parameters(), rank=RANK, axis="rows", update_proj_gap=3, seed=5, lr=1e-2)
    run = torch.compile(compiled, backend="grass")
    for step in range(5):
        run(batch(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

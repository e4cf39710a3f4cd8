"""Recomputed forwards: right numbers, and never a weight that has already moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import grass_compile

from . import paper
from .pairs import every_pair

WIDTH, LAYERS, STEPS = 24, 3, 5


class Block(nn.Module):
    """An MLP with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Stack(nn.Module):
    """Blocks, each recomputed in the backward if asked; ``shared`` uses one block for all layers."""

    def __init__(self, checkpoint: bool, shared: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()] if shared else [Block() for _ in range(LAYERS)])
        self.checkpoint, self.repeat = checkpoint, LAYERS if shared else 1

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks] * self.repeat:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        return x


def train(model: Stack, compiled: Any, **keywords: Any) -> tuple[list[float], grass_compile.AdamW]:
    """Losses of a few steps."""
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, **{"rank": 6, "update_proj_gap": 2, **keywords})
    losses = []
    for step in range(STEPS):
        x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = (compiled(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def made(checkpoint: bool, shared: bool = False) -> Stack:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Stack(checkpoint, shared).double()


@every_pair(whole=[True, False], axis=["rows", "columns"], deferred=[False, True], shared=[False, True])
def test_checkpointing_changes_nothing(axis: str, whole: bool, deferred: bool, shared: bool) -> None:
    """The whole model compiled (recomputation in the graph), and blocks compiled one by one (recomputation around them)."""
    losses = []
    for checkpoint in (False, True):
        model = made(checkpoint, shared)
        if whole:
            compiled: Any = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
        else:
            compiled = model
            for block in model.blocks:
                block.compile(backend="grass", options={"compiler": "aot_eager"})
        found, optimizer = train(model, compiled, axis=axis, step_in_backward=not deferred)
        losses.append(found)
        state = optimizer.state[model.blocks[0].up.weight]
        assert state["updates"] == STEPS and state["axis"] == axis
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.inductor
@pytest.mark.exhaustive
def test_activation_memory_budget() -> None:
    """Inductor recomputes as much as it likes; the updates still come after the last reader."""
    from torch._functorch import config

    model = made(False)
    expected, _ = train(model, torch.compile(model, backend="grass", options={"compiler": "aot_eager"}), axis="columns")
    model = made(False)
    with config.patch(activation_memory_budget=0.5):
        found, _ = train(model, torch.compile(model, backend="grass"), axis="columns")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_hugging_face_gradient_checkpointing(whole: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = transformers.LlamaForCausalLM(config)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=8, update_proj_gap=2)
        if whole:
            compiled: Any = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
        else:
            compiled = model
            for layer in model.model.layers:
                layer.compile(backend="grass", options={"compiler": "aot_eager"})
        losses = []
        for _ in range(4):
            loss = compiled(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert "index" in optimizer.state[model.model.layers[0].mlp.up_proj.weight]
        runs.append(losses)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=0)
    assert runs[0][-1] < runs[0][0]

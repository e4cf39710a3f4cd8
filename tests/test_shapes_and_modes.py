"""Shapes that change, gradients switched on and off, adapters beside projected weights, and torch.compile's modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass_compile.backend import region as backend

from . import forms, paper


class Tokens(nn.Module):
    """Embeds nothing; two linear layers over a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def batch(tokens: int, rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 24, generator=torch.Generator().manual_seed(seed))


def step(compiled: Any, optimizer: Any, x: Tensor) -> float:
    loss = (compiled(x) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[backend.Region]:
    """Every region that is compiled."""
    made: list[backend.Region] = []
    original = backend.Region.__init__

    def init(self: backend.Region, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(backend.Region, "__init__", init)
    return made


@pytest.mark.parametrize("axis", ["rows", pytest.param("columns", marks=pytest.mark.exhaustive)])
def test_sequence_length_compiles_once_more(axis: str, regions: list[backend.Region]) -> None:
    """One static graph, then one dynamic one for every length and for a smaller last batch's length."""
    torch.manual_seed(0)
    model, twin = Tokens(), Tokens()
    twin.load_state_dict(model.state_dict())
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=48, axis="rows" if axis == "rows" else axis)
    oracle = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for seed, tokens in enumerate((7, 9, 12, 5, 30, 8)):
        x = batch(tokens, seed=seed)
        assert step(compiled, optimizer, x) == pytest.approx(step(twin, oracle, x), rel=1e-4)
    assert len(regions) == 2
    assert all(value["axis"] == axis for value in optimizer.state.values() if "axis" in value)


def test_smaller_last_batch_compiles_once_more(regions: list[backend.Region]) -> None:
    model = Tokens()
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=6, update_proj_gap=3)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for seed, rows in enumerate((8, 8, 3, 8, 8, 5, 8, 2)):
        step(compiled, optimizer, batch(6, rows, seed))
    assert len(regions) == 2
    assert optimizer.state[model.up.weight]["updates"] == 8


@pytest.mark.inductor
def test_dynamic_shapes_under_inductor(regions: list[backend.Region]) -> None:
    torch.manual_seed(0)
    model, twin = Tokens().double(), Tokens().double()
    twin.load_state_dict(model.state_dict())
    losses: list[list[float]] = [[], []]
    for index, (module, options) in enumerate(((model, {}), (twin, {"compiler": "aot_eager"}))):
        torch._dynamo.reset()
        optimizer = paper.AdamW(module.named_parameters(), lr=1e-2, rank=6, axis="columns", update_proj_gap=2)
        compiled = torch.compile(module, backend="grass", options=options, dynamic=True)
        for seed, tokens in enumerate((7, 9, 12, 5)):
            losses[index].append(step(compiled, optimizer, batch(tokens, seed=seed).double()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)


def test_requires_grad_toggled_keeps_the_state() -> None:
    """A weight frozen for a while stands still, keeps its moments, and goes on."""
    model = Tokens()
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=6, axis="rows", weight_decay=0.1)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    step(compiled, optimizer, batch(5))
    model.up.weight.requires_grad_(False)
    frozen, moment = model.up.weight.detach().clone(), optimizer.state[model.up.weight]["exp_avg"].clone()
    moved = model.down.weight.detach().clone()
    step(compiled, optimizer, batch(5))
    assert torch.equal(model.up.weight, frozen) and torch.equal(optimizer.state[model.up.weight]["exp_avg"], moment)
    assert not torch.equal(model.down.weight, moved)
    model.up.weight.requires_grad_(True)
    step(compiled, optimizer, batch(5))
    assert optimizer.state[model.up.weight]["updates"] == 2 and optimizer.state[model.down.weight]["updates"] == 3
    assert not torch.equal(model.up.weight, frozen)


def test_evaluation_between_steps_changes_nothing() -> None:
    runs = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Tokens()
        optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=6, update_proj_gap=2)
        compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
        losses = []
        for seed in range(5):
            losses.append(step(compiled, optimizer, batch(5, seed=seed)))
            if evaluates:
                model.eval()
                with torch.no_grad():
                    compiled(batch(5, seed=99))
                with torch.inference_mode():
                    compiled(batch(5, seed=98))
                model.train()
        runs.append(losses)
    assert runs[0] == runs[1]


def test_adapters_beside_projected_weights() -> None:
    """peft's LoRA on one layer, the other projected; the frozen base stands still."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Tokens(), peft.LoraConfig(r=2, target_modules=["up"]))
    model.base_model.model.down.weight.requires_grad_(True)
    base = model.base_model.model.up.base_layer.weight
    before = base.detach().clone()
    optimizer = paper.AdamW(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=1e-2, rank=6, exclude=("*lora*",)
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    losses = [step(compiled, optimizer, batch(5)) for _ in range(20)]
    assert losses[-1] < losses[0] and torch.equal(base, before)
    assert "index" in optimizer.state[model.base_model.model.down.weight]
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapters and all(optimizer.state[p]["exp_avg"].shape == p.shape for p in adapters)


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_are_handed_through(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor sees the mode's options, in the forward and in the backward; the numbers stay."""
    from torch._inductor import config, list_mode_options

    from grass_compile import _aot

    seen: list[dict[str, Any]] = []
    original = _aot.compile_fx_inner

    def spy(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        if "graph_id" in kwargs:  # a step by itself has none, and no CUDA graph of its own
            seen.append({key: _read(config, key) for key in list_mode_options(mode)})
        return original(gm, inputs, **kwargs)

    monkeypatch.setattr(_aot, "compile_fx_inner", spy)
    runs = []
    for options in ({"compiler": "aot_eager"}, {"mode": mode}):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = forms.LinearBias()
        optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=6, axis="rows", update_proj_gap=2)
        compiled = torch.compile(model, backend="grass", options=options)
        x = forms.batch(torch.float32, 0)
        runs.append([step(compiled, optimizer, x) for _ in range(3)])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-6)
    assert len(seen) >= 4 and all(found == list_mode_options(mode) for found in seen)


def _read(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.optim itself makes its counts on the default device there")
@pytest.mark.parametrize(
    "keywords",
    [
        pytest.param(dict(selection="uniform", stagger=True), marks=pytest.mark.exhaustive),
        dict(selection="norm", max_grad_norm=1.0),
        dict(scores="estimate"),
        dict(scores="sampled", axis="columns", step_in_backward=False),
        dict(projection="gaussian"),
        pytest.param(dict(projection="galore"), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_the_default_device_does_not_matter(keywords: dict[str, Any]) -> None:
    """What is made on the way is made where it is needed. The device ``meta`` holds no values: whatever went there is missed."""
    weights = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        batches = torch.randn(8, 4, 16).unbind()
        torch.set_default_device(default)
        try:
            optimizer = paper.AdamW(model.named_parameters(), rank=4, lr=1e-2, update_proj_gap=2, **keywords)
            compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
            for step, x in enumerate(batches):
                if step == 4:
                    optimizer.load_state_dict(optimizer.state_dict())
                compiled(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            torch.set_default_device(None)
        weights.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)

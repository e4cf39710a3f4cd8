"""What people do around ``loss.backward()``: right, or refused by name with nothing changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import ConfigError, GraphError, GrassWarning, StateError
from grass_compile.runtime.gradient import CompactGrad
from grass_compile.runtime.moved import MovedGrad

from . import forms, paper
from .harness import pair


def setup(model: nn.Module | None = None, options: dict[str, Any] | None = None, **keywords: Any) -> tuple[Any, Any, Any]:
    """A model, its optimizer, and the model compiled."""
    model = forms.LinearBias() if model is None else model
    optimizer = paper.AdamW(model.named_parameters(), **{"rank": 4, "axis": "rows", **keywords})
    return model, optimizer, torch.compile(model, backend="grass", options={"compiler": "aot_eager", **(options or {})})


def x(seed: int = 0) -> Tensor:
    return forms.batch(torch.float32, seed)


def x64(seed: int = 0) -> Tensor:
    return forms.batch(torch.float64, seed)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_two_forwards_before_a_backward() -> None:
    """The weight's compact gradients add up and wait for the step; the second forward's backward runs first."""
    run = pair(forms.LinearBias().double(), [x64()], rank=4, axis="rows")
    weight, twin = run.model.layer.weight, run.twin.layer.weight
    for step in range(5):
        losses = [forms.loss_of(run.compiled(x64(2 * step + i))) for i in range(2)]
        before = weight.detach().clone()
        torch.stack(losses).sum().backward()
        assert torch.equal(weight, before) and isinstance(weight.grad, CompactGrad) and weight.grad.compact.shape == (4, 24)
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.optimizer.state[weight]["updates"] == step + 1
        for i in (1, 0):
            forms.loss_of(run.twin(x64(2 * step + i))).backward()
            run.oracle.choose()
        run.oracle.step()
        assert run.optimizer.state[weight]["index"].tolist() == run.oracle.state["layer.weight"].index.tolist()
        torch.testing.assert_close(weight, twin, rtol=0, atol=1e-12)
    assert run.difference() < 1e-12


def test_a_dropped_forward_gives_up_its_claim() -> None:
    model, optimizer, compiled = setup()
    abandoned = forms.loss_of(compiled(x(0)))
    del abandoned
    before = weights(model)
    forms.loss_of(compiled(x(1))).backward()
    assert not torch.equal(model.layer.weight, before[0]) and isinstance(model.layer.weight.grad, MovedGrad)
    optimizer.step()
    assert optimizer.state[model.layer.weight]["updates"] == 1


def test_two_backwards_before_a_step_are_refused() -> None:
    model, optimizer, compiled = setup()
    forms.loss_of(compiled(x(0))).backward()
    before = weights(model)
    with pytest.raises(StateError, match=r"layer\.weight: it was already updated .* Call opt\.step\(\)"):
        forms.loss_of(compiled(x(1))).backward()
    assert same(model, before)
    optimizer.step()


@pytest.mark.parametrize("deferred", [False, True])
def test_backward_through_a_forward_before_the_last_step_is_refused(deferred: bool) -> None:
    """Its gradient would be that of weights which are gone; autograd's own version check need not be the one to notice."""
    model, optimizer, compiled = setup(step_in_backward=not deferred)
    loss = forms.loss_of(compiled(x(0)))
    loss.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    before = weights(model)
    with pytest.raises(StateError, match=r"layer\.weight: it has moved since the forward .* opt\.accumulate\(\)"):
        loss.backward(retain_graph=True)
    optimizer.step()
    assert same(model, before) and optimizer.state[model.layer.weight]["updates"] == 1
    forms.loss_of(compiled(x(1))).backward()  # what was refused leaves nothing behind
    optimizer.step()
    assert optimizer.state[model.layer.weight]["updates"] == 2


def test_second_backward_through_one_graph_is_refused_once_the_weight_has_moved() -> None:
    model, optimizer, compiled = setup()
    loss = forms.loss_of(compiled(x(0)))
    loss.backward(retain_graph=True)
    before = weights(model)
    with pytest.raises(StateError, match=r"layer\.weight: it has moved since the forward .* second backward through one graph"):
        loss.backward()
    assert same(model, before)
    optimizer.step()
    assert optimizer.state[model.layer.weight]["updates"] == 1


def test_second_backward_through_one_graph_adds_up_where_nothing_has_moved() -> None:
    run = pair(forms.LinearBias().double(), [x64()], rank=4, axis="rows", step_in_backward=False)
    for step in range(5):
        for model, optimizer in ((run.compiled, run.optimizer), (run.twin, run.oracle)):
            loss = forms.loss_of(model(x64(step)))
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
        run.optimizer.zero_grad()
        assert run.optimizer.state[run.model.layer.weight]["updates"] == step + 1
    assert run.difference() < 1e-12


def test_weight_in_two_regions() -> None:
    """It waits for the step, while a weight in one region moves inside the backward."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            x = self.other(self.layer(x))
            torch._dynamo.graph_break()
            return self.layer(x.tanh())

    run = pair(Broken().double(), [x64()], rank=4, axis="rows")
    model, twin = run.model, run.twin
    assert set(run.oracle.projected) == {"layer.weight", "other.weight"}
    for step in range(5):
        before = weights(model)
        loss = run.compiled(x64(step)).square().sum()
        loss.backward()
        assert torch.equal(model.layer.weight, before[0]) and isinstance(model.layer.weight.grad, CompactGrad)
        assert not torch.equal(model.other.weight, before[2]) and isinstance(model.other.weight.grad, MovedGrad)
        run.optimizer.step()
        run.optimizer.zero_grad()
        last = twin.layer.weight.detach().requires_grad_()  # the second region's use of it, whose backward runs first
        y = nn.functional.linear(twin.other(twin.layer(x64(step))).tanh(), last, twin.layer.bias)
        y.square().sum().backward()
        twin.layer.weight.grad += last.grad
        run.oracle.choose(**{"layer.weight": last.grad})
        run.oracle.step()
        for name in run.oracle.projected:
            state = run.optimizer.state[model.get_parameter(name)]
            assert state["updates"] == step + 1
            assert state["index"].tolist() == run.oracle.state[name].index.tolist()
        assert float(loss.detach()) == pytest.approx(float(y.detach().square().sum()), rel=1e-12)
        assert run.difference() < 1e-12


def test_inference_never_updates() -> None:
    model, optimizer, compiled = setup()
    before = weights(model)
    with torch.no_grad():
        expected = compiled(x())
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x()), expected)
    model.eval()
    compiled(x())
    assert same(model, before) and all(state.get("updates", 0) == 0 for state in optimizer.state.values())


def test_no_optimizer_warns_once_and_trains_dense() -> None:
    model = forms.LinearBias()
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            forms.loss_of(compiled(x(seed))).backward()
    told = [warning for warning in caught if issubclass(warning.category, GrassWarning)]
    assert len(told) == 1 and "grass_compile.AdamW(model.named_parameters()" in str(told[0].message)
    assert model.layer.weight.grad is not None


def test_optimizer_made_after_the_first_forward_is_found() -> None:
    model = forms.LinearBias()
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    with pytest.warns(GrassWarning):
        compiled(x())
    optimizer = paper.AdamW(model.named_parameters(), rank=4)
    forms.loss_of(compiled(x())).backward()
    optimizer.step()
    assert "index" in optimizer.state[model.layer.weight]


def test_forgotten_compile_warns() -> None:
    model = forms.LinearBias()
    optimizer = paper.AdamW(model.named_parameters(), rank=4)
    forms.loss_of(model(x())).backward()
    with pytest.warns(GrassWarning, match=r'torch\.compile\(model, backend="grass"\)') as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_optimizer_of_another_model() -> None:
    model, other = forms.LinearBias(), forms.LinearBias()
    optimizer = paper.AdamW(other.named_parameters(), rank=4)
    with pytest.raises(ConfigError, match="holds none of this model's parameters"):
        grass_compile.explain(model, x(), optimizer=optimizer)
    with pytest.warns(GrassWarning, match="no grass optimizer holds"):
        torch.compile(model, backend="grass", options={"compiler": "aot_eager"})(x())


def test_replaced_optimizer_must_not_be_used() -> None:
    model, old, compiled = setup()
    new = paper.AdamW(model.named_parameters(), rank=8)
    forms.loss_of(compiled(x())).backward()
    new.step()
    assert len(new.state[model.layer.weight]["index"]) == 8
    model.layer.bias.grad = torch.ones(forms.M)
    with pytest.raises(StateError, match="another optimizer has taken it over"):
        old.step()


def test_hook_on_a_parameter_keeps_it_dense() -> None:
    model = forms.LinearBias()
    seen: list[torch.Size] = []
    model.layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    model, optimizer, compiled = setup(model)
    forms.loss_of(compiled(x())).backward()
    optimizer.step()
    assert seen == [(forms.M, forms.N)] and "index" not in optimizer.state[model.layer.weight]
    report = grass_compile.explain(model, x(), optimizer=optimizer)
    assert "it has a hook" in report["layer.weight"].reason


def test_strict_raises_with_names_and_reasons() -> None:
    _, _, compiled = setup(options={"strict": True}, rank=64)
    with pytest.raises(GraphError, match=r"strict: 1 weights stay dense[\s\S]*layer\.weight: it is smaller than the rank"):
        compiled(x())


def test_strict_accepts_what_was_excluded() -> None:
    _, optimizer, compiled = setup(options={"strict": True}, exclude=["*layer*"])
    forms.loss_of(compiled(x())).backward()
    optimizer.step()


def test_rank_above_the_dimension_is_clamped_and_reported() -> None:
    model, optimizer, compiled = setup(rank=30, axis="columns")
    report = grass_compile.explain(model, x(), optimizer=optimizer)
    assert report["layer.weight"].rank == forms.N and "rank 30 clamped to 24" in report["layer.weight"].reason
    forms.loss_of(compiled(x())).backward()
    assert optimizer.state[model.layer.weight]["index"].tolist() == list(range(forms.N))


def test_explain_trains_nothing_and_keeps_the_random_state() -> None:
    model, optimizer, _ = setup()
    before, state = weights(model), torch.get_rng_state()
    grass_compile.explain(model, x(), optimizer=optimizer)
    assert same(model, before) and not optimizer.state and torch.equal(state, torch.get_rng_state())


def test_integer_inputs_need_no_gradient() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(16, 24), nn.Linear(24, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    model, optimizer, compiled = setup(Embedded())
    compiled(torch.randint(0, 16, (2, 5))).square().sum().backward()
    optimizer.step()
    assert "index" in optimizer.state[model.out.weight] and "index" not in optimizer.state[model.table.weight]


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_dynamic_batch_compiles_once_more(axis: str) -> None:
    run = pair(forms.LinearBias().double(), [torch.randn(4, 5, 24, dtype=torch.float64)], rank=4, axis=axis)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (3, 5, 2, 7, 4, 9, 6, 8):
        run.step(lambda y: y.square().sum(), torch.randn(size, 5, 24, dtype=torch.float64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2
    assert run.difference() < 1e-12


def test_fsdp1_is_refused(tmp_path: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for original in (False, True):
            model = FullyShardedDataParallel(forms.LinearBias(), device_id=torch.device("cpu"), use_orig_params=original)
            with pytest.raises(ConfigError, match=r"FullyShardedDataParallel \(FSDP1\), which is not supported yet"):
                paper.AdamW(model.named_parameters(), rank=4)
    finally:
        torch.distributed.destroy_process_group()

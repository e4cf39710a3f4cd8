"""Unmodified scripts: ``torch.compile(model, backend="grass", options={"rank": r})`` and the script's own ``torch.optim``."""

from __future__ import annotations

import copy
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from grass_compile import ConfigError, GrassWarning, StateError, _aot
from grass_compile.math.reference import ReferenceAdamW
from grass_compile.optim import adoption
from grass_compile.passes import pipeline

from . import paper
from .pairs import every_value

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
RANK, GAP, WIDTH = 6, 3, 32
NUMBERS = dict(lr=1e-2, eps=1e-3, weight_decay=0.1)
DIMS = {"rows": 0, "columns": 1}  # of the weight of an nn.Linear


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two linear layers, one with a bias; the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 24, bias=False)).to(dtype)


def x(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 24, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum()


def compiled(model: nn.Module, *, compiler: str = "aot_eager", **options: Any) -> Any:
    options = {**paper.OPTIONS, "rank": RANK, "axis": "rows", "update_proj_gap": GAP, **options}
    return torch.compile(model, backend="grass", options={"compiler": compiler, **options})


def difference(model: nn.Module, twin: nn.Module) -> float:
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2}


def adamw(parameters: Iterable[Any], **keywords: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **{**NUMBERS, **keywords})


def is_compact(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    return "index" in optimizer.state.get(parameter, {})


# ------------------------------------------------------------------------------------------------------------- oracles


class Twin:
    """A copy of the model, trained in eager mode by `ReferenceAdamW`."""

    def __init__(self, model: nn.Module, *, axis: str = "rows", **keywords: Any) -> None:
        self.model = copy.deepcopy(model)
        self.projected = dict.fromkeys(weights(self.model), (DIMS[axis], RANK))
        keywords = {**NUMBERS, "update_proj_gap": GAP, **keywords}
        self.oracle = ReferenceAdamW(self.model.named_parameters(), projected=self.projected, **keywords)

    def backward(self, batch: Tensor) -> float:
        loss = loss_of(self.model(batch))
        loss.backward()
        return float(loss.detach())

    def chosen(self) -> dict[str, Tensor]:
        """The rows that this step moves, if its gradients are those of its first backward."""
        if self.oracle.updates % GAP:
            return {name: self.oracle.state[name].index for name in self.projected}
        found = {}
        for name, (dim, rank) in self.projected.items():
            gradient = weights(self.model)[name].grad
            assert gradient is not None
            found[name] = gradient.norm(dim=1 - dim).argsort(descending=True)[:rank]
        return found

    def forget_all_but(self, chosen: dict[str, Tensor]) -> None:
        """Zero what the compiled backward never computes; its first one, before the take-over, computes everything."""
        for name, (dim, _) in self.projected.items():
            gradient = weights(self.model)[name].grad
            assert gradient is not None
            kept = torch.zeros_like(gradient).index_copy(dim, chosen[name], gradient.index_select(dim, chosen[name]))
            gradient.copy_(kept)


class CompactTorch:
    """Torch's own optimizer on the selected rows alone, made anew at each refresh; the rest under a second one."""

    def __init__(self, model: nn.Module, make: Make, *, axis: str = "rows") -> None:
        self.model, self.make, self.dim, self.updates = copy.deepcopy(model), make, DIMS[axis], 0
        dense = [parameter for parameter in self.model.parameters() if parameter.dim() != 2]
        self.dense = make(dense) if dense else None
        self.held: dict[str, tuple[Tensor, nn.Parameter, torch.optim.Optimizer]] = {}

    @torch.no_grad()
    def step(self) -> None:
        if self.dense is not None:
            self.dense.step()
        for name, weight in weights(self.model).items():
            assert weight.grad is not None
            if self.updates % GAP == 0:
                index = weight.grad.norm(dim=1 - self.dim).argsort(descending=True)[:RANK].sort().values
                rows = nn.Parameter(weight.index_select(self.dim, index))
                self.held[name] = index, rows, self.make([rows])
            index, rows, optimizer = self.held[name]
            rows.copy_(weight.index_select(self.dim, index))
            rows.grad = weight.grad.index_select(self.dim, index)
            optimizer.step()
            weight.index_copy_(self.dim, index, rows)
        self.model.zero_grad()
        self.updates += 1


# ---------------------------------------------------------------------------------------------------------- equivalence

OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW without decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2, dtype=torch.float64)),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "Adam decoupled": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1, momentum=0.9, dampening=0.3),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1, momentum=0.9, nesterov=True),
}


@every_value(name=OPTIMIZERS, axis=["rows", "columns", "auto"])
def test_full_rank_equals_torch(name: str, axis: str) -> None:
    model, twin = net(), net()
    optimizer, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    options = dict(update_proj_gap=100) if axis == "rows" else dict(update_proj_gap=4, on_refresh="carry")
    fast = compiled(model, rank=WIDTH, axis=axis, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GrassWarning)
        for step in range(20):
            for forward, own in ((fast, optimizer), (twin, plain)):
                own.zero_grad()
                loss_of(forward(x(step))).backward()
                own.step()
    assert difference(model, twin) < 1e-10
    assert all(is_compact(optimizer, weight) for weight in weights(model).values())


@pytest.mark.parametrize("on_refresh", ["reset", "carry"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_lower_rank_equals_oracle(axis: str, on_refresh: str) -> None:
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model, axis=axis, on_refresh=on_refresh)
    fast = compiled(model, axis=axis, on_refresh=on_refresh)
    for step in range(20):
        loss = loss_of(fast(x(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert float(loss.detach()) == pytest.approx(twin.backward(x(step)), rel=1e-10)
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10
        for name, weight in weights(model).items():  # of the first step as well
            assert optimizer.state[weight]["index"].tolist() == twin.oracle.state[name].index.tolist()
    shape = (RANK, 24) if axis == "rows" else (WIDTH, RANK)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == shape


@every_value(name=["Adam", "SGD", "SGD momentum", "SGD nesterov"], axis=["rows", "columns"])
def test_lower_rank_equals_torch_on_the_rows(name: str, axis: str) -> None:
    model = net()
    optimizer, oracle = OPTIMIZERS[name](model.parameters()), CompactTorch(model, OPTIMIZERS[name], axis=axis)
    fast = compiled(model, axis=axis)
    for step in range(11):
        optimizer.zero_grad()
        loss_of(fast(x(step))).backward()
        optimizer.step()
        loss_of(oracle.model(x(step))).backward()
        oracle.step()
        assert difference(model, oracle.model) < 1e-10
    assert all(is_compact(optimizer, weight) for weight in weights(model).values())


def test_scale_reaches_the_weights() -> None:
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model, scale=0.25)
    fast = compiled(model, scale=0.25)
    for step in range(7):
        loss_of(fast(x(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        twin.backward(x(step))
        twin.oracle.step()
    assert difference(model, twin.model) < 1e-10


class Named(nn.Module):
    """Its ``forward`` does not call itself ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList([nn.Linear(24, WIDTH), nn.Linear(WIDTH, WIDTH)]), nn.Linear(WIDTH, 24)

    def forward(module, x: Tensor) -> Tensor:  # noqa: N805 - the name is the point
        for block in module.blocks:
            x = block(x).tanh()
        return module.last(x)


@pytest.mark.parametrize("build", [net, lambda: Named().double()], ids=["Sequential", "Named"])
def test_exclude_matches_the_names_of_the_model(build: Callable[[], nn.Module]) -> None:
    model = build()
    names = list(weights(model))
    optimizer, fast = adamw(model.parameters()), compiled(model, exclude=[names[0], names[-1][:3] + "*"])
    loss_of(fast(x(0))).backward()
    optimizer.step()
    assert [is_compact(optimizer, weight) for weight in weights(model).values()] == [False, *[True] * (len(names) - 2), False]


@pytest.mark.parametrize("build", [net, lambda: Named().double()], ids=["Sequential", "Named"])
def test_messages_name_the_parameter_as_the_model_does(build: Callable[[], nn.Module]) -> None:
    model = build()
    optimizer, fast = adamw(model.parameters()), compiled(model)
    loss_of(fast(x(0))).backward()
    optimizer.step()
    names = "|".join(map(re.escape, weights(model)))
    with pytest.raises(StateError, match=rf"^({names}): .* would write into its compact gradient"):
        next(iter(weights(model).values())).grad.normal_()  # type: ignore[union-attr]
    optimizer.zero_grad()
    loss_of(model(x(0))).backward()
    with pytest.warns(GrassWarning, match=rf"^{re.escape(next(iter(weights(model))))}: it is projected, yet its gradient came"):
        optimizer.step()


@pytest.mark.inductor
@pytest.mark.exhaustive
def test_lower_rank_equals_oracle_under_inductor() -> None:
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model, on_refresh="carry")
    fast = compiled(model, compiler="inductor", on_refresh="carry")
    for step in range(8):
        loss_of(fast(x(step))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        optimizer.step()
        optimizer.zero_grad()
        twin.backward(x(step))
        if step:
            twin.forget_all_but(twin.chosen())
        nn.utils.clip_grad_norm_(twin.model.parameters(), 20.0)
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10
    assert all(is_compact(optimizer, weight) for weight in weights(model).values())


# ---------------------------------------------------------------------------------- between backward() and step()

CLIPS: dict[str, Callable[[list[Tensor]], Any]] = {
    "norm": lambda p: nn.utils.clip_grad_norm_(p, 20.0),
    "norm 1": lambda p: nn.utils.clip_grad_norm_(p, 100.0, norm_type=1.0),
    "norm inf": lambda p: nn.utils.clip_grad_norm_(p, 2.0, norm_type=float("inf")),
    "norm checked": lambda p: nn.utils.clip_grad_norm_(p, 20.0, error_if_nonfinite=True),
    "one by one": lambda p: [nn.utils.clip_grad_norm_(q, 5.0) for q in p],
    "in two steps": lambda p: nn.utils.clip_grads_with_norm_(p, 20.0, nn.utils.get_total_norm([q.grad for q in p])),
    "value": lambda p: nn.utils.clip_grad_value_(p, 0.5),
    "by hand": lambda p: [q.grad.mul_(0.5) for q in p],
    "by hand, data": lambda p: [q.grad.data.clamp_(-0.5, 0.5) for q in p],
}


@every_value(name=CLIPS, axis=["rows", "columns"])
def test_clipping_acts_on_compact_gradients(name: str, axis: str) -> None:
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model, axis=axis)
    fast, clip = compiled(model, axis=axis), CLIPS[name]
    for step in range(8):
        loss_of(fast(x(step))).backward()
        norm = clip(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        twin.backward(x(step))
        if step:
            twin.forget_all_but(twin.chosen())
        expected = clip(list(twin.model.parameters()))
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10
        if isinstance(norm, Tensor):
            torch.testing.assert_close(norm, expected)


def test_gradient_reads_like_the_full_one() -> None:
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model)
    fast = compiled(model)
    for step in range(3):
        loss_of(fast(x(step))).backward()
        twin.backward(x(step))
        if step:
            twin.forget_all_but(twin.chosen())
        for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
            assert p.grad.shape == q.grad.shape and p.grad.dtype == q.grad.dtype and p.grad.device == q.grad.device
            for read in (
                lambda g: g.norm(), lambda g: g.data.norm(2), lambda g: g.abs().max(), lambda g: g.isfinite().all(),
                lambda g: g.detach().clone().flatten(), lambda g: (g * 2).sum(),
                lambda g: torch.linalg.vector_norm(g, 2, dim=0), lambda g: g.norm(0),
            ):  # fmt: skip
                torch.testing.assert_close(torch.as_tensor(read(p.grad)), torch.as_tensor(read(q.grad)))
        optimizer.step()
        optimizer.zero_grad()
        twin.oracle.step()


@pytest.mark.parametrize("write", [lambda g: g.fill_(1.0), lambda g: g.normal_(), lambda g: g[0].zero_()])
def test_other_values_written_into_a_compact_gradient_are_refused(write: Callable[[Tensor], Any]) -> None:
    model = net()
    optimizer, fast = adamw(model.parameters()), compiled(model)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(fast(x(step))).backward()
        if not step:
            optimizer.step()
    gradient = model[0].weight.grad
    before = gradient.compact.clone()
    with pytest.raises(StateError, match="compact gradient"):
        write(gradient)
    assert torch.equal(gradient.compact, before)


@pytest.mark.parametrize("on_refresh", ["reset", "carry"])
@pytest.mark.parametrize("zero", [lambda o, m: o.zero_grad(set_to_none=False), lambda o, m: m.zero_grad(set_to_none=False)])
def test_gradients_set_to_zero_rather_than_none(zero: Callable[[Any, nn.Module], Any], on_refresh: str) -> None:
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model, on_refresh=on_refresh)
    fast = compiled(model, on_refresh=on_refresh)
    for step in range(8):
        zero(optimizer, model)
        loss_of(fast(x(step))).backward()
        optimizer.step()
        twin.backward(x(step))
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10, step


@pytest.mark.parametrize("on_refresh", ["reset", "carry"])
def test_accumulation_needs_no_context_manager(on_refresh: str) -> None:
    """On a later refresh it is the first micro-batch that chooses the rows."""
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model, on_refresh=on_refresh)
    fast = compiled(model, on_refresh=on_refresh)
    for step in range(8):
        for part in range(3):
            (loss_of(fast(x(3 * step + part))) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen = {}
        for part in range(3):
            (loss_of(twin.model(x(3 * step + part))) / 3).backward()
            chosen = chosen or twin.chosen()
        if step:
            twin.forget_all_but(chosen)
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10, step


def test_two_forwards_of_one_loss() -> None:
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model)
    fast = compiled(model)
    for step in range(8):
        (loss_of(fast(x(2 * step))) + loss_of(fast(x(2 * step + 1)))).backward()
        optimizer.step()
        optimizer.zero_grad()
        twin.backward(x(2 * step + 1))  # autograd runs the later forward's backward first, and it chooses
        chosen = twin.chosen()
        twin.backward(x(2 * step))
        if step:
            twin.forget_all_but(chosen)
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10, step


# ----------------------------------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("on_refresh", ["reset", "carry"])
@pytest.mark.parametrize("at", [0, 1, GAP], ids=["first", "regular", "refresh"])
@pytest.mark.parametrize(("fused", "bad"), [(False, float("inf")), (True, float("nan"))])
def test_grad_scaler_skips_a_step_and_nothing_is_lost(bad: float, fused: bool, at: int, on_refresh: str) -> None:
    model = net()
    optimizer, twin = adamw(model.parameters(), fused=fused), Twin(model, on_refresh=on_refresh)
    fast = compiled(model, on_refresh=on_refresh)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        factor = bad if step == at else 1.0
        optimizer.zero_grad()
        scaler.scale(loss_of(fast(x(step))) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != at:
            twin.backward(x(step))
            twin.oracle.step()
        assert difference(model, twin.model) < 1e-10, step
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_unscales_before_clipping(fused: bool) -> None:
    model = net()
    optimizer, twin = adamw(model.parameters(), fused=fused), Twin(model)
    fast, scaler = compiled(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(loss_of(fast(x(step)))).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        scaler.step(optimizer)
        scaler.update()
        twin.backward(x(step))
        if step:
            twin.forget_all_but(twin.chosen())
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twin.model.parameters(), 20.0))
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10, step


# --------------------------------------------------------------------------------------------------------------- script


class Compilations:
    """Counts what is compiled: Dynamo's graphs, our variants, their backwards, and steps by themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = 0
        for module, name in ((_aot, "compile_graph"), (_aot, "compile_kernel"), (pipeline, "finish_backward")):
            monkeypatch.setattr(module, name, self._counting(getattr(module, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **keywords: Any) -> Any:
            self.ours += 1
            return function(*args, **keywords)

        return counting

    def __call__(self) -> tuple[int, int]:
        return self.ours, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_live_hyper_parameters_and_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = Compilations(monkeypatch)
    model = net()
    optimizer, twin = adamw(model.parameters()), Twin(model)
    fast = compiled(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-4)
    settled = (0, 0)
    for step in range(16):
        group = optimizer.param_groups[0]
        if step == 8:
            group["betas"], group["eps"], group["weight_decay"] = (0.7, 0.99), 1e-2, 0.3
            twin.oracle.betas, twin.oracle.eps, twin.oracle.weight_decay = (0.7, 0.99), 1e-2, 0.3
        twin.oracle.lr = group["lr"]
        loss_of(fast(x(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        twin.backward(x(step))
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10, step
        if step == 5:  # a refresh has been seen
            settled = compilations()
            assert settled[0] > 0
    assert compilations() == settled


def test_momentum_changed_live() -> None:
    def make(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    model, twin = net(), net()
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    fast = compiled(model, rank=WIDTH, update_proj_gap=100)
    schedule, other = (
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=12, base_momentum=0.5) for o in (optimizer, plain)
    )
    for step in range(10):
        for forward, own, following in ((fast, optimizer, schedule), (twin, plain, other)):
            own.zero_grad()
            loss_of(forward(x(step))).backward()
            own.step()
            following.step()
    assert difference(model, twin) < 1e-10


def closure_of(optimizer: torch.optim.Optimizer, forward: Any, batch: Tensor) -> Callable[[], Tensor]:
    """What a script hands to ``step()``."""

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(forward(batch))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_closure(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the very first forward is the closure's, that step is torch's own: nobody knew of the weights when it began."""
    monkeypatch.setattr(adoption, "_wishes", WeakIdKeyDictionary())
    model, twin = net(), net()
    optimizer, plain = adamw(model.parameters()), adamw(twin.parameters())
    fast = compiled(model, rank=WIDTH, on_refresh="carry")
    for step in range(8):
        closure, other = closure_of(optimizer, fast, x(step)), closure_of(plain, twin, x(step))
        loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        assert float(loss.detach()) == pytest.approx(float(plain.step(other).detach()), rel=1e-10)
        assert difference(model, twin) < 1e-10, step
        assert all(is_compact(optimizer, weight) == (step > 0) for weight in weights(model).values())


def test_closure_at_a_lower_rank_keeps_the_moments_of_the_rows_that_it_goes_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "_wishes", WeakIdKeyDictionary())
    model = net()
    optimizer, fast, gradients = adamw(model.parameters()), compiled(model), []
    for step in range(2):
        twin = copy.deepcopy(model)
        loss_of(twin(x(step))).backward()
        gradients.append(weights(twin)["0.weight"].grad)
        optimizer.step(closure_of(optimizer, fast, x(step)))
    state, beta = optimizer.state[weights(model)["0.weight"]], optimizer.param_groups[0]["betas"][0]
    moment = (1 - beta) * (beta * gradients[0] + gradients[1])
    torch.testing.assert_close(state["exp_avg"], moment[state["index"]])
    assert state["updates"] == 2 and state["exp_avg"].shape == (RANK, 24)


def test_gradients_cleared_by_hand_and_groups_with_and_without_decay() -> None:
    model = net()
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.1},
        {"params": [model[2].weight], "weight_decay": 0.0, "lr": 3e-3},
        {"params": [model[0].bias], "weight_decay": 0.0},
    ]
    twin = copy.deepcopy(model)
    optimizer = adamw(groups)
    named = dict(twin.named_parameters())
    oracles = [
        ReferenceAdamW(
            [(name, named[name])], projected={name: (0, RANK)} if "weight" in name else {}, lr=lr, eps=1e-3, weight_decay=decay,
            update_proj_gap=GAP,
        )
        for name, lr, decay in (("0.weight", 1e-2, 0.1), ("2.weight", 3e-3, 0.0), ("0.bias", 1e-2, 0.0))
    ]  # fmt: skip
    fast = compiled(model)
    for step in range(8):
        loss_of(fast(x(step))).backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None
        loss_of(twin(x(step))).backward()
        for oracle in oracles:
            oracle.step()
        assert difference(model, twin) < 1e-10, step


def test_two_optimizers_over_halves_of_a_model() -> None:
    model = net()
    first = adamw(model[0].parameters())
    second = torch.optim.SGD(model[2].parameters(), lr=1e-3, momentum=0.9)
    twin = Twin(model[0])
    oracle = CompactTorch(model[2], lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    fast = compiled(model)
    for step in range(8):
        loss_of(fast(x(step))).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        loss_of(oracle.model(twin.model(x(step)).tanh())).backward()
        twin.oracle.step()
        oracle.step()
        assert difference(model[0], twin.model) < 1e-10 and difference(model[2], oracle.model) < 1e-10, step
    assert "exp_avg" in first.state[model[0].weight] and "momentum_buffer" in second.state[model[2].weight]
    assert is_compact(first, model[0].weight) and is_compact(second, model[2].weight)


def test_two_optimizers_in_turns() -> None:
    """One optimizer steps on even steps, the other on odd ones; the gradients of the idle half are thrown away."""
    model = net()
    optimizers = [adamw(model[0].parameters()), adamw(model[2].parameters())]
    halves = [Twin(model[0]), Twin(model[2])]
    fast = compiled(model)
    for step in range(12):
        loss_of(fast(x(step))).backward()
        optimizers[step % 2].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(halves[1].model(halves[0].model(x(step)).tanh())).backward()
        halves[step % 2].oracle.step()
        for half in halves:
            half.model.zero_grad()
        assert difference(model[0], halves[0].model) < 1e-10 and difference(model[2], halves[1].model) < 1e-10, step


def test_weight_that_gets_its_first_gradient_late() -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    optimizer = adamw(model.parameters())
    fast = compiled(model)
    for step in range(6):
        if step == 3:
            model[2].weight.requires_grad_(True)
        loss_of(fast(x(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert is_compact(optimizer, model[0].weight) and is_compact(optimizer, model[2].weight) == (step >= 3)
    assert optimizer.state[model[0].weight]["updates"] == 6 and optimizer.state[model[2].weight]["updates"] == 3


def test_group_added_during_training() -> None:
    model = net()
    optimizer, fast = adamw(model[0].parameters()), compiled(model)
    for step in range(5):
        if step == 2:
            optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 1e-3})
        loss_of(fast(x(step))).backward()
        optimizer.step()
        model.zero_grad()
    assert is_compact(optimizer, model[0].weight) and is_compact(optimizer, model[2].weight)
    assert optimizer.state[model[2].weight]["updates"] == 3


def test_optimizer_made_after_the_first_backward() -> None:
    model = net()
    fast, twin = compiled(model), Twin(model)
    loss_of(fast(x(0))).backward()
    optimizer = adamw(model.parameters())
    for step in range(5):
        if step:
            loss_of(fast(x(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        twin.backward(x(step))
        twin.oracle.step()
    assert difference(model, twin.model) < 1e-10


@pytest.mark.parametrize("kept", [False, True])
def test_optimizer_made_anew_takes_over(kept: bool) -> None:
    """A script that begins a second phase with a fresh optimizer, the old one gone or forgotten in some variable."""
    model = net()
    fast, old = compiled(model), [adamw(model.parameters())]
    for step in range(2):
        loss_of(fast(x(step))).backward()
        old[0].step()
        old[0].zero_grad()
    if not kept:
        old.clear()
    twin, optimizer = Twin(model), adamw(model.parameters())
    if kept:  # its compact state is still in use, as far as anybody can tell
        loss_of(fast(x(0))).backward()
        with pytest.raises(StateError, match=r"0\.weight: another optimizer has projected it"):
            optimizer.step()
        return
    for step in range(5):
        loss_of(fast(x(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        twin.backward(x(step))
        twin.oracle.step()
        assert difference(model, twin.model) < 1e-10, step


def test_evaluation_never_updates() -> None:
    model = net()
    optimizer, fast = adamw(model.parameters()), compiled(model)
    loss_of(fast(x(0))).backward()
    optimizer.step()
    optimizer.zero_grad()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        expected = fast(x(1))
    with torch.inference_mode():
        torch.testing.assert_close(fast(x(1)), expected)
    model.eval()
    torch.testing.assert_close(fast(x(1)).detach(), expected)
    model.train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert str(optimizer.state_dict()) == str(state) and all(parameter.grad is None for parameter in model.parameters())
    loss_of(fast(x(2))).backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["updates"] == 2


def test_step_without_gradients_changes_nothing() -> None:
    model = net()
    optimizer, fast = adamw(model.parameters()), compiled(model)
    loss_of(fast(x(0))).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert optimizer.state[model[0].weight]["updates"] == 1


# ----------------------------------------------------------------------------------------------------------- checkpoint

RESUMED: dict[str, tuple[Make, torch.dtype, dict[str, Any]]] = {
    "AdamW": (adamw, torch.float32, dict(on_refresh="carry")),
    "AdamW reset": (adamw, torch.float64, dict(on_refresh="reset", axis="columns")),
    "AdamW auto": (adamw, torch.float32, dict(on_refresh="carry", axis="auto")),
    "AdamW bf16": (
        adamw, torch.bfloat16, dict(on_refresh="carry", stochastic_rounding=True, state_dtype=torch.bfloat16, seed=3),
    ),
    "AdamW fused": (lambda p: adamw(p, fused=True), torch.float64, dict(on_refresh="carry")),
    "AdamW fused bf16": (
        lambda p: adamw(p, fused=True), torch.bfloat16, dict(on_refresh="carry", state_dtype=torch.bfloat16),
    ),
    "Adam": (OPTIMIZERS["Adam"], torch.float32, dict(on_refresh="carry")),
    "SGD": (OPTIMIZERS["SGD"], torch.float32, dict(on_refresh="carry")),
    "SGD momentum": (OPTIMIZERS["SGD momentum"], torch.float32, dict(on_refresh="carry")),
}  # fmt: skip


def train(model: nn.Module, fast: Any, optimizer: torch.optim.Optimizer, steps: Sequence[int], dtype: torch.dtype) -> list[str]:
    losses = []
    for step in steps:
        loss = loss_of(fast(x(step, dtype)).to(torch.promote_types(dtype, torch.float32)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()).hex())
    return losses


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return file


@every_value(name=RESUMED, split=[1, GAP])
def test_resumed_script_is_the_same_bit_for_bit(name: str, split: int) -> None:
    make, dtype, options = RESUMED[name]
    model = net(dtype)
    optimizer, fast = make(model.parameters()), compiled(model, **options)
    train(model, fast, optimizer, range(split), dtype)
    file = saved(model, optimizer)
    expected = train(model, fast, optimizer, range(split, split + 6), dtype)
    torch._dynamo.reset()
    other = net(dtype)
    loaded = torch.load(file, weights_only=True)
    other.load_state_dict(loaded["model"])
    resumed, fast = make(other.parameters()), compiled(other, **options)
    resumed.load_state_dict(loaded["optimizer"])
    assert train(other, fast, resumed, range(split, split + 6), dtype) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        own, theirs = optimizer.state.get(p, {}), resumed.state.get(q, {})
        assert own.keys() == theirs.keys()
        for key, value in own.items():
            same = value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]) if torch.is_tensor(value) else None
            assert value == theirs[key] if same is None else same, key


@pytest.mark.parametrize("size", [(64, 256, 512), (300, 513, 129)])
def test_resumed_larger_script_is_the_same_bit_for_bit(size: tuple[int, int, int]) -> None:
    """The first backward after a load is dense, and only its rows are used: they must come out as the compact product does."""
    batch, wide, narrow = size

    def start() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(narrow, wide), nn.Tanh(), nn.Linear(wide, narrow))
        return model, compiled(model, rank=24, update_proj_gap=10), torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run(fast: Any, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> list[str]:
        losses = []
        for step in steps:
            loss = fast(torch.randn(batch, narrow, generator=torch.Generator().manual_seed(step))).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()).hex())
        return losses

    model, fast, optimizer = start()
    run(fast, optimizer, range(2))
    file = saved(model, optimizer)
    expected = run(fast, optimizer, range(2, 6))
    torch._dynamo.reset()
    other, fast, resumed = start()
    loaded = torch.load(file, weights_only=True)
    other.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    assert run(fast, resumed, range(2, 6)) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_rolling_back_a_script_that_goes_on() -> None:
    model = net()
    optimizer, fast = adamw(model.parameters()), compiled(model, on_refresh="carry")
    train(model, fast, optimizer, range(2), torch.float64)
    weights_then, state_then = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, fast, optimizer, range(2, 8), torch.float64)
    model.load_state_dict(weights_then)
    optimizer.load_state_dict(state_then)
    assert train(model, fast, optimizer, range(2, 8), torch.float64) == expected


def test_loading_then_saving_gives_the_same_state() -> None:
    model = net()
    optimizer, fast = adamw(model.parameters()), compiled(model)
    train(model, fast, optimizer, range(2), torch.float64)
    state = copy.deepcopy(optimizer.state_dict())
    fresh = adamw(net().parameters())
    fresh.load_state_dict(copy.deepcopy(state))
    assert str(fresh.state_dict()) == str(state)


def test_state_dict_leaves_the_live_state_as_it_is() -> None:
    model = net()
    optimizer, fast = adamw(model.parameters()), compiled(model)
    expected = train(model, fast, optimizer, range(6), torch.float64)
    torch._dynamo.reset()
    model = net()
    optimizer, fast, losses = adamw(model.parameters()), compiled(model), []
    for step in range(6):
        losses += train(model, fast, optimizer, [step], torch.float64)
        optimizer.state_dict()
        assert torch.is_tensor(optimizer.state[model[0].weight]["exp_avg"])
    assert losses == expected


@pytest.mark.parametrize(("options", "match"), [({"rank": 8}, "rank 6"), ({"axis": "columns"}, "along rows")])
def test_state_of_other_options_is_refused_by_name(options: dict[str, Any], match: str) -> None:
    model = net()
    optimizer, fast = adamw(model.parameters()), compiled(model)
    train(model, fast, optimizer, range(2), torch.float64)
    state = copy.deepcopy(optimizer.state_dict())
    torch._dynamo.reset()
    other = net()
    resumed, fast = adamw(other.parameters()), compiled(other, **options)
    resumed.load_state_dict(state)
    loss_of(fast(x(2))).backward()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=rf"0\.weight: .*{match}"):
        resumed.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_state_of_another_state_dtype_is_converted_or_refused() -> None:
    """Generated code reads the moments in the dtype that it was compiled for, whatever they hold."""
    model = net(torch.bfloat16)
    optimizer, fast = adamw(model.parameters()), compiled(model, on_refresh="carry")
    train(model, fast, optimizer, range(2), torch.bfloat16)
    state = copy.deepcopy(optimizer.state_dict())
    torch._dynamo.reset()
    other = net(torch.bfloat16)
    resumed, fast = adamw(other.parameters()), compiled(other, on_refresh="carry", state_dtype=torch.bfloat16)
    resumed.load_state_dict(state)
    loss_of(fast(x(2, torch.bfloat16))).backward()
    try:
        resumed.step()
    except StateError:
        return
    assert resumed.state[other[0].weight]["exp_avg"].dtype == torch.bfloat16


def test_plain_checkpoint_keeps_its_weights_dense() -> None:
    model, twin = net(), net()
    optimizer, plain = adamw(model.parameters()), adamw(twin.parameters())
    for step in range(2):
        loss_of(twin(x(step))).backward()
        plain.step()
        plain.zero_grad()
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    fast = compiled(model)
    for step in range(2, 7):
        for forward, own in ((fast, optimizer), (twin, plain)):
            loss_of(forward(x(step))).backward()
            own.step()
            own.zero_grad()
    assert difference(model, twin) < 1e-10
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (WIDTH, 24)


# --------------------------------------------------------------------------------------------------- refused, or dense


class OwnAdamW(torch.optim.AdamW):
    """A user's subclass, which may do anything in its step."""


UNKNOWN: dict[str, tuple[Make, str]] = {
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-3), "RMSprop"),
    "amsgrad": (lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True), "amsgrad=True"),
    "maximize": (lambda p: torch.optim.SGD(p, lr=1e-4, maximize=True), "maximize=True"),
    "subclass": (lambda p: OwnAdamW(p, lr=1e-3), "OwnAdamW"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_optimizer_stays_dense_with_one_warning(name: str) -> None:
    make, what = UNKNOWN[name]
    model, twin = net(), net()
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            for forward, own in ((fast, optimizer), (twin, plain)):
                loss_of(forward(x(step))).backward()
                own.step()
                own.zero_grad()
    told = [warning for warning in caught if issubclass(warning.category, GrassWarning)]
    assert len(told) == 1 and what in str(told[0].message)
    assert difference(model, twin) < 1e-10
    assert not any(is_compact(optimizer, weight) for weight in weights(model).values())


def test_warning_points_at_the_script() -> None:
    model = net()
    optimizer, fast = torch.optim.RMSprop(model.parameters()), compiled(model)
    loss_of(fast(x(0))).backward()
    with pytest.warns(GrassWarning, match="RMSprop") as told:
        optimizer.step()
    assert told[0].filename == __file__


def test_one_unknown_group_leaves_the_others_projected() -> None:
    model = net()
    optimizer = adamw([{"params": [model[0].weight, model[0].bias]}, {"params": [model[2].weight], "amsgrad": True}])
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, fast, optimizer, range(4), torch.float64)
    assert len([warning for warning in caught if issubclass(warning.category, GrassWarning)]) == 1
    assert is_compact(optimizer, model[0].weight) and "max_exp_avg_sq" in optimizer.state[model[2].weight]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rnk": 6}, r"options\['rnk'\] is not known\. Did you mean 'rank'\?"),
        ({"rank": 6, "update_gap": 3}, r"options\['update_gap'\] is not known\. Did you mean 'update_proj_gap'\?"),
        ({"axis": "rows"}, r"options \['axis'\] say how to project weights, but options\['rank'\] is missing"),
        ({"rank": 6, "axis": "row"}, r"axis='row' is not known\. Did you mean 'rows'\?"),
        ({"rank": 0}, "rank must be a whole number of at least 1, a fraction of the width between 0 and 1, or None, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    model = net()
    fast = torch.compile(model, backend="grass", options={"compiler": "aot_eager", **options})
    with pytest.raises(ConfigError, match=match):
        fast(x(0))


def test_gradient_from_eager_code_is_reduced_and_told() -> None:
    """Its selected rows are what the compiled region would have delivered."""
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    pairs = [(m, adamw(m.parameters()), compiled(m)) for m in (model, other)]
    for m, optimizer, fast in pairs:
        train(m, fast, optimizer, range(1), torch.float64)
        optimizer.zero_grad()
    loss_of(model(x(1))).backward()
    with pytest.warns(GrassWarning, match=r"0\.weight: it is projected, yet its gradient came in full"):
        pairs[0][1].step()
    loss_of(pairs[1][2](x(1))).backward()
    pairs[1][1].step()
    assert difference(model, other) < 1e-12


# ----------------------------------------------------------------------------------------------------------- real models


def test_llama_trains() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=88, num_hidden_layers=1, num_attention_heads=2, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 256, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fast = compiled(model, rank=8, axis="auto", on_refresh="carry")
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", GrassWarning)
        for _ in range(12):
            loss = fast(ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3 and all(after < before for before, after in itertools.pairwise(losses))
    projections = [weight for name, weight in model.named_parameters() if "_proj" in name]
    assert len(projections) == 7 and all(is_compact(optimizer, weight) for weight in projections)
    assert optimizer.state[model.model.layers[0].self_attn.q_proj.weight]["exp_avg"].numel() == 8 * 32
    assert not is_compact(optimizer, model.model.embed_tokens.weight) and not is_compact(optimizer, model.lm_head.weight)

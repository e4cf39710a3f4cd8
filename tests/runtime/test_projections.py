"""Dense projections: training runs against galore-torch and against the formulas, and what is kept of them."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import grass_compile
from grass_compile import ops
from grass_compile.errors import ConfigError, StateError
from grass_compile.math import noise, projection
from grass_compile.runtime.moved import MovedGrad

from .. import forms, paper
from ..pairs import every_pair, every_value

RANK, GAP, SEED = 6, 3, 4
KEYWORDS: dict[str, Any] = dict(lr=1e-2, eps=1e-3, rank=RANK, update_proj_gap=GAP, seed=SEED, scale=0.25)
EAGER = {"compiler": "aot_eager"}
DENSE = ("galore", "gaussian")


class Layers(nn.Module):
    """Weights wider than tall, taller than wide, and square: of 24 x 48, 32 x 24 and 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall, self.square = nn.Linear(48, 24), nn.Linear(24, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(torch.tanh(self.tall(torch.tanh(self.wide(x)))))  # type: ignore[no-any-return]


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(out: Tensor) -> Tensor:
    return (out - 1.0).square().mean()


def layers(dtype: torch.dtype = torch.float64) -> Layers:
    torch.manual_seed(0)
    return Layers().to(dtype)


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="grass", options={**EAGER, **options})


class Formula:
    """``C = P^T G``, Adam on ``C``, ``W -= lr scale P u``, from full gradients; every other parameter likewise, with ``P`` one.

    Args:
        model: whose ``.grad`` are read.
        kind: ``galore`` or ``gaussian``.
        axis: as of the optimizer.
        on_refresh: ``reset`` or ``keep``.
        weight_decay: decoupled.
        max_grad_norm: of the compact gradients and the biases.
        numbers: which parameter of the optimizer each of the model's is.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        axis: str = "auto",
        on_refresh: str = "reset",
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> None:
        self.numbers = numbers
        self.parameters = list(model.parameters())
        self.kind, self.axis, self.on_refresh = kind, axis, on_refresh
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.bases: dict[int, Tensor] = {}
        self.moments: dict[int, list[Any]] = {}
        self.updates, self.chosen = 0, False

    def dim(self, weight: Tensor) -> int:
        return {"rows": 0, "columns": 1, "auto": int(weight.shape[0] >= weight.shape[1])}[self.axis]

    def choose(self) -> None:
        """New bases, from what ``.grad`` holds now, if a refresh is due and they are not chosen yet."""
        if self.updates % GAP or self.chosen:
            return
        self.chosen = True
        for number, weight in enumerate(self.parameters):
            if weight.dim() == 2:
                dim = self.dim(weight)
                if self.kind == "galore":
                    assert weight.grad is not None
                    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
                    self.bases[number] = right[:RANK].t() if dim else left[:, :RANK]
                else:
                    key = noise.new_key(SEED, number if self.numbers is None else self.numbers[number], self.updates)
                    self.bases[number] = noise.gaussian(key, weight.shape[dim], RANK, weight.dtype)
                if self.on_refresh == "reset":
                    self.moments.pop(number, None)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter, and clear ``.grad``."""
        self.choose()
        gradients = [self._compact(number, weight) for number, weight in enumerate(self.parameters)]
        if self.max_grad_norm is not None:
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            gradients = [gradient * min(1.0, self.max_grad_norm / (norm + 1e-6)) for gradient in gradients]
        for number, (weight, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            update = self._adam(number, gradient)
            if number in self.bases:
                basis = self.bases[number]
                update = KEYWORDS["scale"] * (update @ basis.t() if self.dim(weight) else basis @ update)
            weight.mul_(1 - KEYWORDS["lr"] * self.weight_decay)
            weight.sub_(KEYWORDS["lr"] * update)
            weight.grad = None
        self.updates, self.chosen = self.updates + 1, False

    def _compact(self, number: int, weight: Tensor) -> Tensor:
        assert weight.grad is not None
        if number not in self.bases:
            return weight.grad
        return weight.grad @ self.bases[number] if self.dim(weight) else self.bases[number].t() @ weight.grad

    def _adam(self, number: int, gradient: Tensor) -> Tensor:
        first, second, steps = self.moments.get(number, [torch.zeros_like(gradient), torch.zeros_like(gradient), 0])
        steps += 1
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        self.moments[number] = [first, second, steps]
        return first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + KEYWORDS["eps"])


# ------------------------------------------------------------------------------------------------------- whole training runs


LOOPS: dict[str, dict[str, Any]] = {
    "fused": {"weight_decay": 0.1},
    "deferred": {"step_in_backward": False},
    "clipped": {"max_grad_norm": 0.05},
    "clipped deferred": {"max_grad_norm": 0.05, "step_in_backward": False},
}


def train_both(model: nn.Module, call: Any, optimizer: torch.optim.Optimizer, twin: nn.Module, formula: Any, steps: int) -> None:
    """Train a model and a twin with its formula on the same batches; they must agree after every step."""
    for step in range(steps):
        loss_of(call(batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(twin(batch(step))).backward()
        formula.step()
        assert difference(model, twin) < 1e-10, step


@every_pair(kind=DENSE, axis=["auto", "rows", "columns"], on_refresh=["reset", "keep"], loop=LOOPS)
def test_training_equals_the_formula(kind: str, axis: str, on_refresh: str, loop: str) -> None:
    model, keywords = layers(), LOOPS[loop]
    twin = copy.deepcopy(model)
    shared = {"axis": axis, "on_refresh": on_refresh}
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, **KEYWORDS, **shared, **keywords)
    rest = {key: value for key, value in keywords.items() if key != "step_in_backward"}
    formula, call = Formula(twin, kind, **shared, **rest), compiled(model)  # type: ignore[arg-type]
    train_both(model, call, optimizer, twin, formula, 3 * GAP)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", DENSE)
def test_accumulation_equals_the_formula(kind: str, fused: bool) -> None:
    """The first of the micro-batches gives the basis; the gradients of all are projected onto it."""
    model = layers()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, step_in_backward=fused, **KEYWORDS)
    formula, call = Formula(twin, kind), compiled(model)
    for step in range(2 * GAP + 1):
        count = 1 + step % 3
        for micro in range(count):
            with contextlib.nullcontext() if micro == count - 1 else optimizer.accumulate():
                loss_of(call(batch(10 * step + micro))).backward()
            loss_of(twin(batch(10 * step + micro))).backward()
            formula.choose()
        optimizer.step()
        optimizer.zero_grad()
        formula.step()
        assert difference(model, twin) < 1e-10, step


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_several_forwards_equal_the_formula(kind: str, dropped: bool) -> None:
    """The backward that runs first gives the basis; if what it left is dropped, the next one does."""
    model = layers()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, **KEYWORDS)
    formula, call = Formula(twin, kind), compiled(model)
    for step in range(2 * GAP):
        first, second = loss_of(call(batch(10 * step))), loss_of(call(batch(10 * step + 1)))
        if dropped:
            second.backward()
            optimizer.zero_grad()
            first.backward()
        else:
            (first + second).backward()
            loss_of(twin(batch(10 * step + 1))).backward()
            formula.choose()
        loss_of(twin(batch(10 * step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        formula.step()
        assert difference(model, twin) < 1e-10, step


@every_value(kind=DENSE, axis=["rows", "columns"])
def test_blocks_of_any_batch_under_activation_checkpointing(kind: str, axis: str) -> None:
    """Compiled one by one, so that equal blocks share graphs, which bake in no basis and no key."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24, bias=False)

        def inner(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).double()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, axis=axis, **KEYWORDS)  # type: ignore[arg-type]
    for block in model:
        block.compile(backend="grass", options=EAGER)
    formula = Formula(twin, kind, axis)
    for step in range(GAP + 2):
        x = torch.randn(13 + step, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss_of(model(x)).backward()
        assert all(isinstance(weight.grad, MovedGrad) for weight in model.parameters() if weight.dim() == 2)
        optimizer.step()
        optimizer.zero_grad()
        loss_of(twin(x)).backward()
        formula.step()
        assert difference(model, twin) < 1e-10, step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_galore_equals_galore_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several refreshes, with the keywords that make ours theirs. In float64, theirs takes its basis in float32, which is
    replaced; ``eps`` stands in another place there, and is as good as none."""
    galore_torch = pytest.importorskip("galore_torch")
    from galore_torch.galore_projector import GaLoreProjector

    def basis(self: Any, gradient: Tensor, rank: int, type: str) -> Tensor:
        left, _, right = torch.linalg.svd(gradient.data, full_matrices=False)
        return right[:rank] if type == "right" else left[:, :rank]

    if dtype == torch.float64:
        monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", basis)
    model = layers(dtype)
    twin = copy.deepcopy(model)
    keywords = {**KEYWORDS, "eps": 1e-30}
    optimizer = paper.AdamW(model.named_parameters(), projection="galore", on_refresh="keep", **keywords)
    low_rank = {"rank": RANK, "update_proj_gap": GAP, "scale": KEYWORDS["scale"], "proj_type": "std"}
    linear = {"params": [weight for weight in twin.parameters() if weight.dim() == 2], **low_rank}
    rest = {"params": [weight for weight in twin.parameters() if weight.dim() == 1]}
    theirs = galore_torch.GaLoreAdamW([rest, linear], lr=KEYWORDS["lr"], eps=1e-30, no_deprecation_warning=True)
    call = compiled(model)
    start = [weight.detach().clone() for weight in model.parameters()]
    for step in range(3 * GAP + 1):
        loss_of(call(batch(step, dtype))).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(twin(batch(step, dtype))).backward()
        theirs.step()
        theirs.zero_grad()
        assert difference(model, twin) < (1e-12 if dtype == torch.float64 else 2e-5), step
    assert min(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), start, strict=True)) > 1e-2
    shapes = [tuple(theirs.state[weight]["exp_avg"].shape) for weight in linear["params"]]  # type: ignore[attr-defined]
    assert shapes == [tuple(optimizer.state[w]["exp_avg"].shape) for w in model.parameters() if w.dim() == 2]


@pytest.mark.parametrize("name", ["InOut", "EinsumHeads", "SplitWeight", "Twice", "Bmm"])
@pytest.mark.parametrize("kind", DENSE)
def test_forms_of_a_layer_equal_the_formula(kind: str, name: str) -> None:
    torch.manual_seed(0)
    model = forms.FORMS[name]().double()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, **KEYWORDS)
    formula, call = Formula(twin, kind), compiled(model)
    for step in range(GAP + 2):
        forms.loss_of(call(forms.batch(torch.float64, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        forms.loss_of(twin(forms.batch(torch.float64, step))).backward()
        formula.step()
        assert difference(model, twin) < 1e-10, step


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_full_rank_galore_is_sgd(axis: str, momentum: float) -> None:
    """``P P^T`` is one, so that a linear rule does not see the basis; its momentum is kept in that of the only refresh. Where the
    projected side is the longer one, the basis is completed."""
    model = layers()
    twin = copy.deepcopy(model)
    shared = dict(lr=0.1, momentum=momentum, weight_decay=0.1)
    groups = [{"params": [weight], "rank": max(weight.shape)} for weight in model.parameters()]
    optimizer = paper.SGD(groups, projection="galore", axis=axis, **shared)
    reference, call = torch.optim.SGD(twin.parameters(), **shared), compiled(model)  # type: ignore[arg-type]
    for step in range(5):
        for optim, run in ((optimizer, call), (reference, twin)):
            loss_of(run(batch(step))).backward()
            optim.step()
            optim.zero_grad()
        assert difference(model, twin) < 1e-12, step
    assert all("basis" in optimizer.state[weight] for weight in model.parameters() if weight.dim() == 2)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_rule_that_reads_the_weight_sees_its_projection(axis: str) -> None:
    """Adafactor on ``P^T W`` (of columns ``(W P)^T``), with torch's as the reference, and its change projected back."""
    torch.manual_seed(0)
    model = nn.Linear(24, 12, bias=False).double()
    optimizer = paper.Adafactor(model.named_parameters(), lr=0.1, rank=4, projection="galore", axis=axis)  # type: ignore[arg-type]
    before, x = model.weight.detach().clone(), torch.randn(7, 24, dtype=torch.float64)
    loss_of(compiled(model)(x)).backward()
    basis = optimizer.state[model.weight]["basis"]
    dim = int(axis == "columns")

    def compact(tensor: Tensor) -> Tensor:
        return (projection.compact(tensor, dim, basis).t() if dim else projection.compact(tensor, dim, basis)).contiguous()

    small = nn.Parameter(compact(before))
    gradient = torch.autograd.grad(loss_of(x @ (full := before.requires_grad_()).t()), full)[0]
    small.grad = compact(gradient)
    old = small.detach().clone()
    torch.optim.Adafactor([small], lr=0.1, foreach=False).step()
    change = small.detach() - old
    expected = before.detach() + projection.expanded(change.t() if dim else change, dim, basis)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["galore", pytest.param("gaussian", marks=pytest.mark.exhaustive)])
def test_inductor_equals_eager(kind: str) -> None:
    weights = []
    for compiler in ("inductor", "aot_eager"):
        model = layers(torch.float32)
        optimizer = paper.AdamW(model.named_parameters(), projection=kind, weight_decay=0.1, **KEYWORDS)
        call = compiled(model, compiler=compiler)
        for step in range(GAP + 2):
            loss_of(call(batch(step, torch.float32))).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model)
    assert difference(*weights) < 1e-5


# ---------------------------------------------------------------------------------------------------------- random numbers


def test_gaussian_numbers_are_normal_and_independent() -> None:
    """Mean, variance, fourth moment, and correlations of neighbours, of parameters, of seeds and of refreshes, all within four
    standard errors."""
    keys = [noise.new_key(*of) for of in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3))]
    draws = [noise.gaussian(key, 600, 64, torch.float64).mul(8.0) for key in keys]
    count = draws[0].numel()
    for draw in draws:
        assert abs(float(draw.mean())) < 4 / math.sqrt(count)
        assert abs(float(draw.square().mean()) - 1) < 4 * math.sqrt(2 / count)
        assert abs(float((draw**4).mean()) - 3) < 4 * math.sqrt(96 / count)
        for one, other in ((draw[1:], draw[:-1]), (draw[:, 1:], draw[:, :-1]), (draw[1:, 1:], draw[:-1, :-1])):
            assert abs(float((one * other).mean())) < 4 / math.sqrt(one.numel())
    for other in draws[1:]:
        assert abs(float((draws[0] * other).mean())) < 4 / math.sqrt(count)
        assert abs(float((draws[0].square() * other.square()).mean()) - 1) < 4 * math.sqrt(8 / count)


def test_gaussian_numbers_are_the_same_in_every_dtype() -> None:
    key = noise.new_key(0, 0, 0)
    exact = noise.gaussian(key, 50, 8, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(noise.gaussian(key, 50, 8, dtype), exact.to(dtype))
    assert key.tolist() == noise.new_key(0, 0, 0).tolist() and all(0 <= word < 2**31 for word in key.tolist())


def test_gaussian_projection_is_unbiased() -> None:
    """Of ``P P^T``, every element has the mean of the unit matrix, and the variance ``1/r`` (``2/r`` on the diagonal)."""
    length, rank, draws = 8, 4, 4000
    bases = torch.stack([noise.gaussian(noise.new_key(0, 0, i), length, rank, torch.float64) for i in range(draws)])
    products = bases @ bases.mT
    unit = torch.eye(length, dtype=torch.float64)
    error = (products.mean(0) - unit) / ((1 + unit) / rank / draws).sqrt()
    off = ~torch.eye(length, dtype=torch.bool).tril()
    values = torch.cat([error.diagonal(), error[off & ~torch.eye(length, dtype=torch.bool)]])
    assert abs(float(values.square().mean()) - 1) < 3 * math.sqrt(2 / len(values)) and float(values.abs().max()) < 4


def test_a_gaussian_sgd_step_is_unbiased() -> None:
    """Over seeds, the mean of what moves is the dense step, within three standard errors: along it, and in size across it."""
    torch.manual_seed(0)
    start, x = nn.Linear(10, 6, bias=False).double(), torch.randn(9, 10, dtype=torch.float64)
    loss_of(start(x)).backward()
    dense = -start.weight.grad.clone()  # type: ignore[union-attr, operator]
    model = copy.deepcopy(start)
    model.weight.grad = None
    call, moved = compiled(model), []
    for seed in range(150):
        with torch.no_grad():
            model.weight.copy_(start.weight)
        optimizer = paper.SGD(model.named_parameters(), lr=1.0, rank=3, projection="gaussian", seed=seed)
        loss_of(call(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append((model.weight - start.weight).detach())
    along = torch.stack([(move * dense).sum() / dense.square().sum() for move in moved])
    assert abs(float(along.mean()) - 1) < 3 * float(along.std()) / math.sqrt(len(along))
    across = torch.stack(moved).mean(0) - dense
    expected = torch.stack(moved).var(0).sum() / len(moved)
    assert float(across.square().sum()) < 2 * float(expected)


# -------------------------------------------------------------------------------------------------------- singular vectors


@pytest.mark.parametrize("dim", [0, 1])
def test_large_matrices_are_sketched(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthonormal, with nearly all that the best basis captures, the same every time, and no random state is touched."""
    torch.manual_seed(0)
    gradient = torch.randn(160, 12) @ torch.randn(12, 200) + 0.1 * torch.randn(160, 200)
    exact = projection.singular_vectors(gradient, dim, 8)
    monkeypatch.setattr(projection, "EXACT_SVD", 100)
    state = torch.get_rng_state()
    found = projection.singular_vectors(gradient, dim, 8)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(found, projection.singular_vectors(gradient, dim, 8))
    assert not torch.equal(found, exact) and found.shape == exact.shape
    torch.testing.assert_close(found.t() @ found, torch.eye(8), rtol=0, atol=1e-5)
    best, sketched = (float(projection.compact(gradient, dim, basis).norm()) for basis in (exact, found))
    assert sketched > best * (1 - 1e-4)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_basis_is_orthonormal_at_any_rank(shape: tuple[int, int], dim: int) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rank in range(1, shape[dim] + 1):
        basis = projection.singular_vectors(gradient, dim, rank)
        assert basis.shape == (shape[dim], rank)
        torch.testing.assert_close(basis.t() @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [pytest.param(math.inf, marks=pytest.mark.exhaustive), math.nan])
def test_a_gradient_that_is_not_finite_is_seen(bad: float) -> None:
    """By who looks at the gradient (`GradScaler`), not by an error; a step that is skipped leaves the next one as it would be."""
    model, untouched = layers(), layers()
    results = []
    for each, poisoned in ((model, True), (untouched, False)):
        optimizer = paper.AdamW(each.named_parameters(), projection="galore", step_in_backward=False, **KEYWORDS)
        call = compiled(each)
        if poisoned:
            (loss_of(call(batch(0))) * bad).backward()
            gradient: Any = each.tall.weight.grad
            assert not gradient.compact.isfinite().all()
            optimizer.zero_grad()
        for step in range(2):
            loss_of(call(batch(step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(each)
    assert difference(*results) == 0.0


@every_pair(kind=DENSE, on_refresh=["reset", "keep"], loop=["fused", "deferred", "clipped"])
def test_steps_that_are_skipped_equal_the_formula(kind: str, on_refresh: str, loop: str) -> None:
    """A refresh by singular vectors that is skipped is due again; one by random vectors, which no gradient chooses, and a regular
    step count."""
    model, keywords = layers(), LOOPS[loop]
    twin = copy.deepcopy(model)
    shared = {"on_refresh": on_refresh, "nonfinite": "skip"}
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, **KEYWORDS, **shared, **keywords)
    rest = {key: value for key, value in keywords.items() if key != "step_in_backward"}
    formula, call = Formula(twin, kind, on_refresh=on_refresh, **rest), compiled(model)
    for step, bad in enumerate([True, False, True, False, True, False, False, False]):
        (loss_of(call(batch(step))) * (math.nan if bad else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not bad:
            loss_of(twin(batch(step))).backward()
            formula.step()
        elif formula.updates % GAP or kind == "gaussian":
            formula.choose()
            formula.updates, formula.chosen = formula.updates + 1, False
        assert difference(model, twin) < 1e-10, step
        assert optimizer.state[model.tall.weight]["updates"] == formula.updates


def test_a_refresh_is_kept_out_of_cuda_graphs() -> None:
    """``torch.linalg.svd`` looks at its result on the host, which no CUDA graph can record."""
    assert torch.Tag.cudagraph_unsafe in ops.refresh_.tags


# ---------------------------------------------------------------------------------------------------- low-precision weights


@pytest.mark.parametrize("dim", [0, 1])
def test_bf16_weights_round_once(dim: int) -> None:
    """Ours is off the sum in float64 by half a unit in the last place of the weight, and what bf16 makes of the update."""
    torch.manual_seed(0)
    weight = torch.randn(40, 56).bfloat16()
    basis = torch.linalg.qr(torch.randn(weight.shape[dim], 8)).Q.bfloat16()
    update = 1e-2 * torch.randn((8, 56) if dim == 0 else (40, 8))
    exact = weight.double() + projection.expanded(update.double(), dim, basis.double())
    moved = weight.clone()
    ops.rank_update_(moved, dim, basis, update)
    size = projection.expanded(update.double().abs(), dim, basis.double().abs())
    assert ((moved.double() - exact).abs() <= spacing(exact) / 2 + size * 2.0**-8).all()


def spacing(values: Tensor) -> Tensor:
    """Units in the last place of bf16."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 8)


@pytest.mark.parametrize("dim", [0, 1])
def test_stochastic_rounding_is_unbiased_and_needs_no_whole_sum(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 10).bfloat16()
    basis = torch.randn(weight.shape[dim], 4).bfloat16()
    update = 1e-3 * torch.randn((4, 10) if dim == 0 else (12, 4))
    exact = weight.float() + projection.expanded(update, dim, basis.float())
    seeds = [torch.tensor(float(2 * seed)) for seed in range(2000)]
    whole = torch.stack([ops.rank_update(weight, dim, basis, update, seed) for seed in seeds])
    monkeypatch.setattr(sys.modules["grass_compile.ops.rank_update"], "ROUNDED_AT_A_TIME", 35)  # three rows
    parts = torch.stack([ops.rank_update(weight, dim, basis, update, seed) for seed in seeds[:50]])
    assert (parts != whole[:50]).float().mean() < 1e-3  # a sum may differ in its last bit
    unit = spacing(exact.double())
    part = (exact.double() / unit).frac().abs()
    error = (whole.double().mean(0) - exact.double()).abs() / unit - (2.0**-16 + 4 / len(seeds))
    assert (error < 4 * (part * (1 - part) / len(seeds)).sqrt()).all()
    assert (whole != weight).any(0).float().mean() > 0.9


@every_value(kind=DENSE, stochastic=[False, True])
def test_bf16_training_follows_fp32(kind: str, stochastic: bool) -> None:
    """Both from the same bf16 weights, with moments in float32: they part by what bf16 rounds off."""
    model = layers(torch.bfloat16)
    wide, losses = copy.deepcopy(model).float(), []
    for each, dtype in ((model, torch.bfloat16), (wide, torch.float32)):
        how = {"stochastic_rounding": stochastic} if dtype == torch.bfloat16 else {}
        optimizer = paper.AdamW(each.named_parameters(), projection=kind, **{**KEYWORDS, "scale": 1.0}, **how)
        call, run = compiled(each), []
        for step in range(12):
            loss = loss_of(call(batch(step % 2, dtype)).float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(float(loss.detach()))
        state = optimizer.state[each.tall.weight]
        assert state["exp_avg"].dtype is torch.float32 and state.get("basis", each.tall.weight).dtype is dtype
        losses.append(run)
    assert max(abs(one - other) for one, other in zip(*losses, strict=True)) < 0.05
    assert losses[0][-1] < losses[0][0] - 0.2


# ------------------------------------------------------------------------------------------------------------- checkpoints


def trained(model: nn.Module, steps: int, kind: str, **keywords: Any) -> tuple[Any, Callable[[int], None]]:
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, **{**KEYWORDS, "seed": 11, **keywords})
    call = compiled(model)

    def train(step: int) -> None:
        loss_of(call(batch(step, next(model.parameters()).dtype))).backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(steps):
        train(step)
    return optimizer, train


@every_value(kind=DENSE, steps=[GAP - 1, GAP], deferred=[False, True], dtype=[torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit(kind: str, steps: int, deferred: bool, dtype: torch.dtype) -> None:
    """Within an interval and right before a refresh; the state holds tensors and plain values only."""
    keywords = {"step_in_backward": not deferred, "stochastic_rounding": dtype == torch.bfloat16, "on_refresh": "keep"}
    model = layers(dtype)
    optimizer, train = trained(model, steps, kind, **keywords)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for step in range(steps, steps + GAP + 1):
        train(step)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = layers(dtype)
    other.load_state_dict(saved["model"])
    resumed, train_on = trained(other, 0, kind, **{**keywords, "seed": 12})
    resumed.load_state_dict(saved["optimizer"])
    for step in range(steps, steps + GAP + 1):
        train_on(step)
    assert difference(model, other) == 0.0


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "basis nan": ("galore", lambda entry: entry["basis"].__setitem__((0, 0), math.nan), "basis must hold orthonormal columns"),
    "basis scaled": ("galore", lambda entry: entry["basis"].mul_(2), "basis must hold orthonormal columns"),
    "basis short": ("galore", lambda entry: entry.update(basis=entry["basis"][:5]), "a basis of shape"),
    "basis of another rank": ("galore", lambda entry: entry.update(basis=entry["basis"][:, :3]), "has rank 3"),
    "no axis": ("galore", lambda entry: entry.pop("axis"), r"lacks \['axis'\]"),
    "basis dtype": ("galore", lambda entry: entry.update(basis=entry["basis"].half()), "a basis of torch.float16"),
    "key large": ("gaussian", lambda entry: entry["key"].__setitem__(0, 2**31), "key must hold numbers of 31 bits"),
    "key short": ("gaussian", lambda entry: entry.update(key=entry["key"][:1]), "a key of shape"),
    "another projection": ("galore", lambda entry: entry.update(key=entry.pop("basis")), "made with projection='gaussian'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    kind, damage, message = DAMAGE[name]
    model = layers()
    optimizer, _ = trained(model, 2, kind)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["state"][0])
    before = [tensor.clone() for tensor in optimizer.state[model.wide.weight].values() if isinstance(tensor, Tensor)]
    with pytest.raises(StateError, match=f"wide.weight: the loaded state .*{message}.*Nothing was changed"):
        optimizer.load_state_dict(state)
    after = [tensor for tensor in optimizer.state[model.wide.weight].values() if isinstance(tensor, Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_state_of_another_projection_is_refused() -> None:
    states = {kind: trained(layers(), 2, kind)[0].state_dict() for kind in ("grass", *DENSE)}
    for kind in states:
        optimizer, _ = trained(layers(), 0, kind)
        for other, state in states.items():
            if other != kind:
                with pytest.raises(StateError, match=f"made with projection='{other}', this optimizer with projection='{kind}'"):
                    optimizer.load_state_dict(copy.deepcopy(state))


# ------------------------------------------------------------------------------------------------------ gradients that wait


@pytest.mark.parametrize("kind", DENSE)
def test_a_waiting_gradient_stands_for_the_projected_one(kind: str) -> None:
    """What reads it gets ``P P^T G``; what scales it is exact; what would need its elements is refused."""
    model = layers()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, step_in_backward=False, **KEYWORDS)
    loss_of(compiled(model)(batch(0))).backward()
    loss_of(twin(batch(0))).backward()
    gradient: Any = model.tall.weight.grad
    basis = projection.basis_of(kind, gradient.rows, 24, RANK, torch.float64)
    expected = twin.tall.weight.grad @ basis @ basis.t()  # type: ignore[operator]
    torch.testing.assert_close(gradient.full(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient + 0.0, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient.norm(1), expected.abs().sum())
    torch.testing.assert_close(torch._foreach_norm([gradient], math.inf)[0], expected.abs().max())
    torch.testing.assert_close(gradient.norm(), (twin.tall.weight.grad @ basis).norm())  # type: ignore[operator]
    if kind == "galore":
        torch.testing.assert_close(gradient.norm(), expected.norm())
    assert optimizer.compact_grad(model.tall.weight) is gradient.compact
    for clamp in (lambda: gradient.clamp_(-1, 1), lambda: torch.nn.utils.clip_grad_value_([model.tall.weight], 1.0)):
        with pytest.raises(StateError, match=r"tall.weight: it is projected with .* cannot be clamped"):
            clamp()
    aside = gradient.clone()
    gradient.mul_(0.5)
    torch.testing.assert_close(gradient.full(), 0.5 * expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(aside.full(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DENSE)
def test_a_gradient_that_is_kept_stays_what_it_was(kind: str) -> None:
    """Beyond a refresh, though it shares the basis of the state rather than copying it at every step."""
    model = layers()
    optimizer, train = trained(model, 1, kind, step_in_backward=False)
    loss_of(compiled(model)(batch(1))).backward()
    gradient: Any = model.tall.weight.grad
    if kind == "galore":
        assert gradient.rows is optimizer.state[model.tall.weight]["basis"]
    before = gradient.full()
    optimizer.step()
    optimizer.zero_grad()
    for step in range(2, GAP + 2):
        train(step)
    assert torch.equal(gradient.full(), before)


@pytest.mark.parametrize("deferred", [False, True])
def test_no_second_basis_is_kept(deferred: bool) -> None:
    model = layers()
    optimizer, train = trained(model, 1, "galore", step_in_backward=not deferred)
    for step in range(1, GAP + 1):
        assert all(record._scratch is None for record in optimizer._manager.records.values())
        train(step)


@pytest.mark.parametrize("kind", DENSE)
def test_unmodified_scripts(kind: str) -> None:
    """The first step's gradients, full as they are, are projected by the optimizer that turns out to hold the weights."""
    model = layers()
    twin = copy.deepcopy(model)
    own = {**paper.OPTIONS, "rank": RANK, "projection": kind, "update_proj_gap": GAP, "scale": KEYWORDS["scale"], "seed": SEED}
    optimizer = torch.optim.AdamW(model.parameters(), lr=KEYWORDS["lr"], eps=KEYWORDS["eps"], weight_decay=0.0)
    linear = [number for number, weight in enumerate(twin.parameters()) if weight.dim() == 2]
    numbers = {number: position for position, number in enumerate(linear)}  # in the order in which they are taken over
    formula, call = Formula(twin, kind, numbers=numbers), compiled(model, **own)
    train_both(model, call, optimizer, twin, formula, GAP + 2)


@every_value(kind=DENSE, script=[True, False])
def test_autocast_around_the_step_changes_nothing(kind: str, script: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of a step, of a script's first refresh and of what reads a gradient stay in the weight's dtype."""
    monkeypatch.setattr(projection, "EXACT_SVD", 10)
    monkeypatch.setattr(projection, "OVERSAMPLING", 1)
    models = []
    for inside in (False, True):
        model = layers(torch.float32)
        shared = dict(lr=0.1, weight_decay=0.1)
        own = dict(rank=3, projection=kind, update_proj_gap=2, seed=SEED)
        if script:
            optimizer: Any = torch.optim.SGD(model.parameters(), **shared)  # type: ignore[arg-type]
        else:
            optimizer = paper.SGD(model.named_parameters(), step_in_backward=False, **shared, **own)  # type: ignore[arg-type]
        call = compiled(model, **(own if script else {}))
        for step in range(4):
            loss_of(call(batch(step, torch.float32))).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                if step or not script:
                    gradient: Any = model.tall.weight.grad
                    assert gradient.full().dtype is torch.float32
                optimizer.step()
            optimizer.zero_grad()
        assert not script or kind != "galore" or optimizer.state[model.tall.weight]["basis"].is_contiguous()
        models.append(model)
    assert difference(*models) == 0.0


@pytest.mark.parametrize("kind", DENSE)
def test_unmodified_scripts_resume(kind: str) -> None:
    """Through torch's own ``load_state_dict``, which casts what it finds; the first step after it is dense once more."""
    model = layers(torch.bfloat16)
    own = {**paper.OPTIONS, "rank": RANK, "projection": kind, "update_proj_gap": GAP, "seed": SEED}

    def script(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
        optimizer, call = torch.optim.AdamW(model.parameters(), lr=1e-2), compiled(model, **own)

        def train(step: int) -> None:
            loss_of(call(batch(step, torch.bfloat16))).backward()
            optimizer.step()
            optimizer.zero_grad()

        return optimizer, train

    optimizer, train = script(model)
    for step in range(2):
        train(step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = layers(torch.bfloat16)
    other.load_state_dict(saved[0])
    resumed, train_on = script(other)
    resumed.load_state_dict(saved[1])
    train_on(2)
    train(2)
    for weight, twin in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, twin, rtol=0, atol=2e-2)
        for key in ("basis", "key"):
            if key in optimizer.state[weight]:
                assert torch.equal(optimizer.state[weight][key], resumed.state[twin][key])
                assert optimizer.state[weight][key].dtype is resumed.state[twin][key].dtype


# ------------------------------------------------------------------------------------------------- keywords and the report


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"selection": "norm"}, "selection='norm' is about which rows are selected"),
        ({"selection": "uniform"}, "selection='uniform' is about"),
        ({"scores": "sampled"}, "scores='sampled' is about which rows are selected"),
        ({"on_refresh": "carry"}, "on_refresh='carry' lets rows that stay selected keep their moments"),
    ],
)
def test_keywords_about_rows_are_refused(kind: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paper.AdamW(layers().parameters(), projection=kind, **{**KEYWORDS, **keywords})


def test_an_unknown_projection_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"projection='galor' is not known. Did you mean 'galore'"):
        paper.AdamW(layers().parameters(), projection="galor")


@pytest.mark.parametrize("kind", ["grass", *DENSE])
def test_the_report_says_which_projection(kind: str) -> None:
    model = layers(torch.float32)
    optimizer = paper.AdamW(model.named_parameters(), projection=kind, **KEYWORDS)
    report = grass_compile.explain(model, batch(0, torch.float32), optimizer=optimizer)
    assert [row.projection for row in report] == [kind, None, kind, kind]
    if kind == "grass":
        assert "projection=" not in str(report)
        return
    assert str(report).count(f"projection={kind!r}; the shorter side") == 3
    assert [row.axis for row in report.projected] == ["rows", "columns", "columns"]
    row, tokens = report["tall.weight"], 15
    assert row.weight_grad_flops == 2 * tokens * RANK * (32 + 24)
    assert row.state_bytes == 4 * RANK * (2 * 32 + (24 if kind == "galore" else 0))


def test_groups_may_differ() -> None:
    """One optimizer, three projections in one graph."""
    model = layers()
    groups = [
        {"params": [("wide", model.wide.weight)]},
        {"params": [("tall", model.tall.weight)], "projection": "galore"},
        {"params": [("square", model.square.weight)], "projection": "gaussian"},
        {"params": [("bias", model.wide.bias)]},
    ]
    optimizer = paper.AdamW(groups, **KEYWORDS)
    call = compiled(model)
    losses = []
    for _ in range(2 * GAP + 1):
        loss = loss_of(call(batch(0)))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    names = [set(optimizer.state[layer.weight]) for layer in (model.wide, model.tall, model.square)]
    assert all(name in keys for name, keys in zip(("index", "basis", "key"), names, strict=True))
    assert losses[-1] < losses[0]

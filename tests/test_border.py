"""Where the compiled region meets the rest of a script: at full rank, whatever a script does around it ends where
``torch.optim.AdamW`` ends, or is refused by name before anything moved."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import grass_compile
from grass_compile import GrassWarning, StateError
from grass_compile.optim import adoption
from grass_compile.runtime import registry
from grass_compile.runtime.gradient import CompactGrad
from grass_compile.runtime.moved import MovedGrad

from .pairs import every_pair

WIDTH = 8
FULL: dict[str, Any] = dict(lr=1e-2, eps=1e-3, rank=WIDTH, on_refresh="carry", update_proj_gap=3)
MODES = [True, False, "auto"]
SELECTIONS = ["uniform", "top"]


class Net(nn.Module):
    """Two square weights, of which every column can be selected, and dense parameters beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh())  # type: ignore[no-any-return]


class Run:
    """A model trained by the compiled path, and a twin trained by torch."""

    def __init__(self, mode: Any = "auto", model: nn.Module | None = None, **keywords: Any) -> None:
        torch.manual_seed(0)
        self.model = (model or Net()).double()
        self.twin = copy.deepcopy(self.model)
        asked = {**FULL, "step_in_backward": mode, **keywords}
        self.optimizer = grass_compile.AdamW(self.model.named_parameters(), **asked)
        same = {key: asked[key] for key in ("lr", "eps", "weight_decay") if key in asked}
        self.reference = torch.optim.AdamW(self.twin.parameters(), **same)
        self.compiled = torch.compile(self.model, backend="grass", options={"compiler": "aot_eager"})

    @property
    def sides(self) -> Iterator[tuple[Callable[..., Tensor], nn.Module, torch.optim.Optimizer]]:
        yield self.compiled, self.model, self.optimizer
        yield self.twin, self.twin, self.reference

    def steps(self, loop: Callable[..., Any], count: int = 7) -> None:
        """``loop(forward, model, optimizer, number)`` is one step of either side; they must agree after each."""
        for number in range(count):
            for forward, model, optimizer in self.sides:
                loop(forward, model, optimizer, number)
            self.check()

    def check(self, tolerance: float = 1e-11) -> None:
        for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=tolerance), (name, float((p - q).abs().max()))


def batch(number: int, size: float = 1.0, rows: int = 5) -> Tensor:
    return size * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def lean(forward: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """The loop that everybody writes first."""
    (forward(batch(number)) - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------ proving the loop


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_lean_loop_is_fused_from_its_third_step_on(selection: str) -> None:
    run, fused = Run(selection=selection), []

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        if optimizer is run.optimizer:
            fused.append(isinstance(model.second.weight.grad, MovedGrad))
        optimizer.step()
        optimizer.zero_grad()

    run.steps(loop)
    assert fused == [False, False, True, True, True, True, True]
    assert run.optimizer.fused and "nobody touched" in run.optimizer.fused.reason
    report = str(grass_compile.explain(run.model, batch(0), optimizer=run.optimizer))
    assert "2 of 5 parameters projected; they move inside the backward: 2 steps have passed" in report


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)


def scale(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_(0.5)  # type: ignore[union-attr]


def scale_together(model: nn.Module) -> None:
    torch._foreach_mul_([parameter.grad for parameter in model.parameters()], 0.25)  # type: ignore[arg-type]


def zero(model: nn.Module) -> None:
    model.second.weight.grad.zero_()  # type: ignore[union-attr]


def replace(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 0.5  # type: ignore[operator]


def drop(model: nn.Module) -> None:
    model.second.weight.grad = None


def decay_by_hand(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.add_(parameter.detach(), alpha=0.1)  # type: ignore[union-attr]


def log_values(model: nn.Module) -> None:
    assert all(bool((parameter.grad.abs() >= 0).all()) for parameter in model.parameters())  # type: ignore[union-attr]


TOUCHES = [clip, clip_value, scale, scale_together, zero, replace, drop, decay_by_hand, log_values]


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
@pytest.mark.parametrize("mode", ["auto", False])
def test_gradients_are_the_scripts_own(mode: Any, touch: Callable[[nn.Module], None]) -> None:
    run = Run(mode)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        touch(model)
        optimizer.step()
        optimizer.zero_grad()

    run.steps(loop)
    assert not run.optimizer.fused
    assert ("between backward() and" in run.optimizer.fused.reason) == (mode == "auto")


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
def test_what_comes_too_late_is_refused_by_name(touch: Callable[[nn.Module], None]) -> None:
    run = Run(True)
    (run.compiled(batch(0)) - 1).square().mean().backward()
    with pytest.raises(StateError, match=r"\.weight: it has already moved inside the backward.*step_in_backward=False"):
        touch(run.model) if touch is not drop else (touch(run.model), run.optimizer.step())


def test_norms_and_finiteness_are_known_after_a_fused_backward() -> None:
    run = Run(True)
    for number in range(3):
        for forward, _, _ in run.sides:
            (forward(batch(number)) - 1).square().mean().backward()
        for p, q in zip(run.model.parameters(), run.twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and p.grad.shape == q.grad.shape and p.grad.dtype == q.grad.dtype
            for norm in (torch.norm, torch.linalg.vector_norm, Tensor.norm, lambda g: torch._foreach_norm([g])[0]):
                assert torch.allclose(norm(p.grad), norm(q.grad))
            assert torch.isfinite(p.grad).all() and not p.grad.isnan().any() and not p.grad.isinf().any()
        ours, theirs = ([p.grad for p in side.parameters()] for side in (run.model, run.twin))
        assert torch.allclose(nn.utils.get_total_norm(ours), nn.utils.get_total_norm(theirs))
        for _, _, optimizer in run.sides:
            optimizer.step()
            optimizer.zero_grad(set_to_none=number != 1)
    run.check()
    assert isinstance(run.model.second.weight.grad, (MovedGrad, type(None)))


def test_a_gradient_that_is_not_finite_says_so() -> None:
    run = Run(True, nonfinite="skip")
    (run.compiled(batch(0)) * float("nan")).square().mean().backward()
    gradient = run.model.second.weight.grad
    assert isinstance(gradient, MovedGrad) and not torch.isfinite(gradient).any() and torch.isnan(gradient).all()


# -------------------------------------------------------------------------------------------- other things between the two


@pytest.mark.parametrize("key", ["lr", "weight_decay", "betas"])
def test_hyper_parameters_written_between_backward_and_step(key: str) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        values = {"lr": 1e-2 / (number + 1), "weight_decay": 0.1 * number, "betas": (0.9 - 0.1 * number, 0.99)}
        optimizer.param_groups[0][key] = values[key]
        optimizer.step()
        optimizer.zero_grad()

    run = Run("auto", weight_decay=0.05)
    run.steps(loop, 4)
    assert "hyper-parameters are written" in run.optimizer.fused.reason
    fused = Run(True)
    (fused.compiled(batch(0)) - 1).square().mean().backward()
    fused.optimizer.param_groups[0][key] = {"lr": 1e-3, "weight_decay": 0.3, "betas": (0.5, 0.6)}[key]
    with pytest.raises(StateError, match=rf"{key} of group 0 was changed from .* after the backward"):
        fused.optimizer.step()


@pytest.mark.parametrize("mode", ["auto", False])
def test_a_dropped_step_is_as_if_it_had_not_been(mode: Any) -> None:
    run = Run(mode)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        if number % 2 == 1:
            forward(batch(100 + number)).square().mean().backward()
            optimizer.zero_grad()
        lean(forward, model, optimizer, number)

    run.steps(loop)


def test_a_step_that_is_dropped_too_late_is_told() -> None:
    run = Run(True)
    run.steps(lean, 2)
    before = run.model.second.weight.detach().clone()
    run.compiled(batch(5)).square().mean().backward()
    moved = run.model.second.weight.detach().clone()
    with pytest.warns(GrassWarning, match=r"zero_grad\(\) comes before opt.step\(\).*already moved 2 weights, first.weight"):
        run.optimizer.zero_grad()
    assert not torch.equal(before, moved) and torch.equal(run.model.second.weight, moved)
    run.compiled(batch(6)).square().mean().backward()  # and training goes on
    run.optimizer.step()


@pytest.mark.parametrize("mode", ["auto", False])
def test_gradients_that_are_never_cleared_add_up(mode: Any) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        optimizer.step()

    Run(mode).steps(loop, 4)
    fused = Run(True)
    loop(fused.compiled, fused.model, fused.optimizer, 0)
    with pytest.raises(StateError, match="was not cleared"):
        loop(fused.compiled, fused.model, fused.optimizer, 1)


def test_generator_before_discriminator() -> None:
    """Two losses that share weights, each with a backward of its own: several backwards before one step."""

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        forward(batch(number)).square().mean().backward()
        (forward(batch(50 + number)) - 1).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for mode in ("auto", False):
        Run(mode).steps(loop)
    fused = Run(True)
    with pytest.raises(StateError, match=r"first.weight: .*(several losses|another loss).*step_in_backward=False"):
        loop(fused.compiled, fused.model, fused.optimizer, 0)


# ------------------------------------------------------------------------------------------------- gradients from outside


def penalty_after(forward: Any, model: nn.Module, x: Tensor) -> Tensor:
    return (forward(x) - 1).square().mean() + 0.1 * model.second.weight.square().sum()  # type: ignore[no-any-return, operator, union-attr]


def penalty_before(forward: Any, model: nn.Module, x: Tensor) -> Tensor:
    penalty = 0.1 * model.second.weight.square().sum()  # type: ignore[operator, union-attr]
    return (forward(x) - 1).square().mean() + penalty  # type: ignore[no-any-return]


def orthogonality(forward: Any, model: nn.Module, x: Tensor) -> Tensor:
    weight: Any = model.first.weight
    return (forward(x) - 1).square().mean() + (weight @ weight.t() - torch.eye(WIDTH)).square().sum()  # type: ignore[no-any-return]


def eager_use(forward: Any, model: nn.Module, x: Tensor) -> Tensor:
    return (forward(x) - 1).square().mean() + model.second(x).square().mean()  # type: ignore[no-any-return, operator]


def on_dense_parameters(forward: Any, model: nn.Module, x: Tensor) -> Tensor:
    norm: Any = model.norm
    return (forward(x) - 1).square().mean() + norm.weight.square().sum() + norm.bias.abs().sum()  # type: ignore[no-any-return]


OUTSIDE = [penalty_after, penalty_before, orthogonality, eager_use, on_dense_parameters]


@every_pair(mode=MODES, selection=SELECTIONS, loss_of=OUTSIDE, max_norm=[None, 1e-2])
def test_gradients_from_outside_of_the_region_are_added(mode: Any, selection: str, loss_of: Any, max_norm: float | None) -> None:
    run = Run(mode, selection=selection, max_grad_norm=max_norm)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        loss_of(forward, model, batch(number)).backward()
        if max_norm is not None and optimizer is run.reference:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()

    run.steps(loop, 5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", ["auto", False])
def test_a_penalty_with_a_backward_of_its_own(mode: Any, first: bool) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        losses = [lambda: forward(batch(number)).square().mean(), lambda: 0.1 * model.second.weight.square().sum()]
        for loss in reversed(losses) if first else losses:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    Run(mode).steps(loop)


def test_a_penalty_that_comes_after_the_weight_has_moved_is_refused() -> None:
    run = Run(True)
    run.compiled(batch(0)).square().mean().backward()
    with pytest.raises(StateError, match=r"second\.weight: it has already moved"):
        run.model.second.weight.square().sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_partial_rank_takes_the_rows_of_the_sum(mode: Any) -> None:
    """The compact gradient of the sum: what is added at the selected rows is what the outside gradient has there."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH, bias=False).double()
    optimizer = grass_compile.SGD(model.named_parameters(), lr=1.0, rank=3, seed=5, step_in_backward=mode)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for number in range(4):
        before = model.weight.detach().clone()
        x = batch(number)
        (compiled(x).square().sum() + 0.5 * model.weight.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gradient = 2 * (x @ before.t()).t() @ x + before
        index = optimizer.state[model.weight]["index"]
        expected = before.clone()
        expected[:, index] -= gradient[:, index]
        assert torch.allclose(model.weight, expected)


# ----------------------------------------------------------------------------------------------------------------- hooks


@every_pair(kind=["tensor", "accumulated", "node", "node prehook"], late=[False, True], mode=MODES)
@pytest.mark.filterwarnings("ignore::grass_compile.GrassWarning")
def test_hooks_see_the_whole_gradient(kind: str, late: bool, mode: Any) -> None:
    run, kept = Run(mode), []
    seen: dict[int, list[Tensor]] = {id(run.model): [], id(run.twin): []}

    def hook(model: nn.Module) -> None:
        weight: Any = model.second.weight
        note = seen[id(model)]
        if kind == "tensor":
            weight.register_hook(lambda gradient: (note.append(gradient.clone()), gradient * 0.5)[1])
        elif kind == "accumulated":
            weight.register_post_accumulate_grad_hook(lambda p: (note.append(p.grad.clone()), p.grad.mul_(0.5))[0])
        else:
            node = weight.view_as(weight).grad_fn.next_functions[0][0]
            kept.append(node)
            if kind == "node":
                node.register_hook(lambda inputs, outputs: note.append(outputs[0].clone()))
            else:
                node.register_prehook(lambda outputs: (note.append(outputs[0].clone()), (outputs[0] * 0.5,))[1])

    if not late:
        hook(run.model), hook(run.twin)
    run.steps(lean, 3)
    if late:
        hook(run.model), hook(run.twin)
    run.steps(lean, 3)
    ours, theirs = seen[id(run.model)], seen[id(run.twin)]
    assert len(ours) == len(theirs) > 0
    assert all(torch.allclose(a, b) and type(a) is Tensor for a, b in zip(ours, theirs, strict=True))


def test_step_hooks_run_once() -> None:
    calls: list[str] = []
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from now on torch's own class is hooked
    run = Run(True)
    run.optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    run.optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    handle = register_optimizer_step_post_hook(lambda optimizer, *args: calls.append("every"))
    try:
        run.compiled(batch(0)).sum().backward()
        run.optimizer.step()
    finally:
        handle.remove()
    assert calls == ["pre", "post", "every"]


def test_importing_hooks_no_optimizer() -> None:
    from torch.optim import optimizer as module

    def hooks() -> int:
        return len(module._global_optimizer_pre_hooks) + len(module._global_optimizer_post_hooks)

    for handle in adoption._finder:
        handle.remove()
    adoption._finder.clear()
    before = hooks()
    torch.manual_seed(0)
    model = Net()
    mine, bystander = torch.optim.AdamW(model.parameters()), torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))])
    compiled = torch.compile(model, backend="grass", options={"rank": 4, "compiler": "aot_eager"})
    compiled(batch(0).float()).sum().backward()
    assert hooks() == before + 1
    mine.step()
    bystander.step()
    assert not bystander._optimizer_step_pre_hooks and mine._optimizer_step_pre_hooks
    assert "index" in mine.state[model.second.weight]


# ------------------------------------------------------------------------------------------------------- saved tensors


class Packed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.clone()


@every_pair(scores=["exact", "estimate"], selection=["uniform", "top", "norm"], mode=MODES)
def test_saved_tensor_hooks_that_return_copies(mode: Any, selection: str, scores: str) -> None:
    if selection == "uniform" and scores != "exact":
        pytest.skip("uniform goes by no scores")
    run, packed = Run(mode, selection=selection, scores=scores), []

    def pack(tensor: Tensor) -> Packed:
        packed.append(tensor)
        return Packed(tensor)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda p: p.tensor):
            loss = (forward(batch(number)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run.steps(loop)
    assert packed


# -------------------------------------------------------------------------------------------- falling out of the graph


@every_pair(way=["stance", "disabled"], selection=SELECTIONS, mode=MODES)
def test_a_call_that_falls_out_of_the_graph_trains_on(way: str, selection: str, mode: Any) -> None:
    run = Run(mode, selection=selection)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        outside = number in (2, 3, 5)
        if way == "disabled" and outside:
            forward = model
        with torch.compiler.set_stance("force_eager") if way == "stance" and outside else contextlib.nullcontext():
            (forward(batch(number)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.steps(loop)
    told = [str(w.message) for w in caught if issubclass(w.category, GrassWarning)]
    assert len(told) == 1 and "first.weight: it is projected, yet its gradient came in full" in told[0]


def test_a_shape_beyond_the_recompile_limit_trains_on() -> None:
    run = Run("auto")
    torch._dynamo.reset()
    run.compiled = torch.compile(run.model, backend="grass", dynamic=False, options={"compiler": "aot_eager"})

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number, rows=2 + number)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch._dynamo.config.patch(recompile_limit=3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.steps(loop)
    assert isinstance(registry.lookup(run.model.second.weight).assigned.rank, int)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------- breaking off, threads


def explode_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Have the ``number``-th compact step of a backward raise before it has begun."""
    from grass_compile.ops import step

    count, writing = 0, step.writing

    @contextlib.contextmanager
    def exploding(*arguments: Any) -> Iterator[None]:
        nonlocal count
        count += 1
        if count == number:
            raise error
        with writing(*arguments):
            yield

    monkeypatch.setattr(step, "writing", exploding)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["oom", "ctrl-c"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("when", [0, 3])
def test_a_backward_that_breaks_off(monkeypatch: pytest.MonkeyPatch, error: BaseException, selection: str, when: int) -> None:
    run = Run(True, selection=selection)
    run.steps(lean, when)
    names = dict(run.model.named_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    with monkeypatch.context() as patch:
        explode_at(patch, 2, error)
        with pytest.raises(type(error)):
            run.compiled(batch(50)).square().mean().backward()
    moved = [name for name, p in names.items() if not torch.equal(p, before[name])]
    assert len(moved) == 1, "the first step is complete, the second has not begun"
    for name in ("first.weight", "second.weight"):
        state = run.optimizer.state[names[name]]
        assert state["updates"] == when + (name in moved)
        assert len(state["index"].unique()) == WIDTH
    with pytest.raises(StateError, match=r"the last backward broke off when 1 of the 2 weights.*zero_grad\(\)"):
        run.compiled(batch(51)).square().mean().backward()
    with pytest.warns(GrassWarning, match="already moved 1 weights"):
        run.optimizer.zero_grad()
    for number in range(3):
        lean(run.compiled, run.model, run.optimizer, 60 + number)
    assert {run.optimizer.state[names[name]]["updates"] - when - (name in moved) for name in PROJECTED} == {3}


PROJECTED = ("first.weight", "second.weight")


@pytest.mark.parametrize("selection", SELECTIONS)
def test_skip_this_batch_loops_work_when_deferred(monkeypatch: pytest.MonkeyPatch, selection: str) -> None:
    """Under "auto" the loop proves nothing before its third step, and what breaks off then leaves no trace."""
    run = Run("auto", selection=selection)

    class Broken(Exception):
        pass

    def broken(gradient: Tensor) -> None:
        raise Broken

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        if number in (0, 2):
            with contextlib.suppress(Broken):
                x = batch(70 + number).requires_grad_()
                x.register_hook(broken)
                forward(x).square().mean().backward()
            optimizer.zero_grad()
        lean(forward, model, optimizer, number)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.steps(loop, 2)


def test_ctrl_c_waits_for_the_step_of_a_weight() -> None:
    import signal

    from grass_compile.ops.journal import recording, writing

    weight = torch.zeros(3)

    def interrupted() -> None:
        with writing(weight, "stepped"):
            signal.raise_signal(signal.SIGINT)
            weight.add_(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    try:
        with recording() as journal, pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert journal.stepped == {weight.data_ptr()} and weight.sum() == 3


def test_two_threads_and_two_models_of_one_class() -> None:
    """Both run one compiled graph, one of them a refresh while the other one does not. (Compiled before: while one thread traces,
    torch refuses to run compiled code in another.)"""
    runs = [Run(mode, update_proj_gap=gap, selection="top") for mode, gap in ((True, 2), (False, 3))]
    failures: list[BaseException] = []

    def train(run: Run) -> None:
        try:
            for number in range(6, 40):
                lean(run.compiled, run.model, run.optimizer, number)
        except BaseException as failure:
            failures.append(failure)

    for run in runs:
        for number in range(6):
            lean(run.compiled, run.model, run.optimizer, number)
    threads = [threading.Thread(target=train, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for run in runs:
        for number in range(40):
            lean(run.twin, run.twin, run.reference, number)
        run.check()


# ------------------------------------------------------------------------------------------------------------- lifetimes


@pytest.mark.parametrize("unmodified", [False, True])
def test_nothing_outlives_its_deletion(unmodified: bool) -> None:
    def train() -> list[weakref.ref[Any]]:
        torch.manual_seed(0)
        model, options = Net(), {"compiler": "aot_eager"}
        optimizer: Any
        if unmodified:
            optimizer, options = torch.optim.AdamW(model.parameters()), {**options, "rank": 4}  # type: ignore[dict-item]
        else:
            optimizer = grass_compile.AdamW(model.named_parameters(), **FULL)
        compiled = torch.compile(model, backend="grass", options=options)
        for number in range(4):
            lean(lambda x: compiled(x.float()), model, optimizer, number)
        records = [registry.lookup(p) for p in (model.first.weight, model.second.weight)]
        states = [optimizer.state[p]["exp_avg"] for p in (model.first.weight, model.second.weight)]
        assert all(record is not None for record in records)
        return [weakref.ref(thing) for thing in (model, optimizer, *model.parameters(), *records, *states)]

    references = train()
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in references if reference() is not None] == []


def test_an_optimizer_goes_without_a_reset_of_the_compiler() -> None:
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    gone = []
    for _ in range(2):
        optimizer = grass_compile.AdamW(model.named_parameters(), **FULL)
        lean(lambda x: compiled(x.float()), model, optimizer, 0)
        gone.append(weakref.ref(optimizer))
        del optimizer
        gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_copy_trains_on_as_the_original_does(how: str, selection: str) -> None:
    run = Run("auto", selection=selection, seed=3)
    run.steps(lean, 4)
    both = run.model, run.optimizer
    if how == "deepcopy":
        model, optimizer = copy.deepcopy(both)
    elif how == "pickle":
        model, optimizer = pickle.loads(pickle.dumps(both))
    else:
        file = io.BytesIO()
        torch.save(both, file)
        file.seek(0)
        model, optimizer = torch.load(file, weights_only=False)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for number in range(4, 9):
        lean(compiled, model, optimizer, number)
        lean(run.compiled, run.model, run.optimizer, number)
    for p, q in zip(model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_conversion_by_swapping_tensors() -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        run = Run("auto")
        run.model.float().double()
        run.twin.float().double()
        run.steps(lean, 3)
        gc.collect()
        run.model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    run.steps(lean, 3)


# --------------------------------------------------------------------------------------------------------- what remains


class ZeroHead(nn.Module):
    """An embedding, and a head that begins at zero, so that the embedding's first gradient is exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wte((x.abs() * 3).long() % 11))  # type: ignore[no-any-return]


def test_a_first_gradient_of_zero_counts() -> None:
    run = Run("auto", ZeroHead(), exclude=())
    run.steps(lean, 4)
    assert float(run.optimizer.state[run.model.wte.weight]["step"]) == 4  # type: ignore[index, union-attr]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_backward_under_a_guard(guard: Any, mode: Any) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        loss = (forward(batch(number)) - 1).square().mean()
        with guard():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if guard is torch.inference_mode:  # torch's own gradients are inference tensors then, which its optimizers take
        run = Run(mode)
        with contextlib.suppress(RuntimeError):
            run.steps(loop, 3)
        return
    Run(mode).steps(loop, 5)


def test_patterns_mean_the_same_everywhere() -> None:
    model = nn.ModuleDict({"head": nn.Linear(WIDTH, WIDTH), "body": nn.Linear(WIDTH, WIDTH)})
    patterns = ("*.head.weight",)
    *_, rest = grass_compile.param_groups(model, lr=1e-3, exclude=patterns)
    assert "head.weight" in {name for name, _ in rest["params"]}
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=4, exclude=patterns)
    compiled = torch.compile(lambda x: model["body"](model["head"](x)), backend="grass", options={"compiler": "aot_eager"})
    compiled(batch(0).float()).sum().backward()
    optimizer.step()
    assert "index" in optimizer.state[model["body"].weight] and "index" not in optimizer.state[model["head"].weight]


def test_a_loop_whose_gradients_nobody_can_reach_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=4)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    compiled(batch(0).float()).sum().backward(inputs=list(model.parameters()))
    with pytest.warns(GrassWarning, match=r"found no gradient at all.*backward\(inputs=\.\.\.\)"):
        optimizer.step()


def test_compact_gradients_that_are_full_are_what_they_stand_for() -> None:
    run = Run(False)
    for forward, _, _ in run.sides:
        forward(batch(0)).square().mean().backward()
    for p, q in zip(run.model.parameters(), run.twin.parameters(), strict=True):
        assert p.grad is not None and torch.allclose(p.grad + 0, q.grad)
    assert isinstance(run.model.second.weight.grad, CompactGrad)


def test_a_step_that_is_first_traced_under_autocast_keeps_its_precision() -> None:
    """Muon has products in its step, which autocast would compute in bf16."""

    def train(autocast: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(11, WIDTH, bias=False)  # a shape of its own, so that its step is traced here
        optimizer = grass_compile.Muon(model.named_parameters(), lr=1e-2, rank=4, seed=1, step_in_backward=False)
        compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
        for number in range(3):
            compiled(torch.randn(5, 11, generator=torch.Generator().manual_seed(number))).square().mean().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    assert torch.equal(train(True), train(False))


class Heads(Net):
    """Of two heads, only one is used at a time."""

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        hidden = self.norm(self.first(x)).tanh()
        return hidden if other else self.second(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_gradient_of_zeros_is_a_gradient(selection: str, mode: Any) -> None:
    """``zero_grad(set_to_none=False)``, and then a step in which a weight is not used: torch's moments move it on."""
    run = Run(mode, Heads(), selection=selection)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number), number % 2 == 1) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    run.steps(loop, 8)


@pytest.mark.parametrize("mode", ["auto", False])
def test_two_steps_for_one_backward(mode: Any) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        optimizer.step()
        if mode is False or number == 0:
            optimizer.step()
        optimizer.zero_grad()

    Run(mode).steps(loop, 5)
    fused = Run(True)
    fused.compiled(batch(0)).square().mean().backward()
    fused.optimizer.step()
    with pytest.raises(
        StateError, match=r"first\.weight: the gradient of its last step was not cleared.*cannot be applied again"
    ):
        fused.optimizer.step()


def clamp(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.clamp_(-0.1, 0.1)


def swap(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone().mul_(0.5)


@pytest.mark.parametrize("write", [clamp, swap], ids=lambda write: write.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_weights_written_between_backward_and_step(mode: Any, write: Callable[[nn.Parameter], None]) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        write(model.second.weight)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()

    run = Run(mode)
    if mode is True:
        with pytest.raises(
            StateError, match=r"second\.weight: it was written between the backward, in which it has already moved"
        ):
            loop(run.compiled, run.model, run.optimizer, 0)
        return
    run.steps(loop, 6)
    assert ("weights are written" in run.optimizer.fused.reason) == (mode == "auto")


@pytest.mark.parametrize("mode", MODES)
def test_weights_whose_storage_is_replaced_between_forward_and_backward(mode: Any) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        loss = (forward(batch(number)) - 1).square().mean()
        swap(model.second.weight)  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Run(mode).steps(loop, 5)


@pytest.mark.parametrize("mode", MODES)
def test_loading_a_state_between_backward_and_step(mode: Any) -> None:
    run = Run(mode)
    run.steps(lean, 4)
    states = [copy.deepcopy(optimizer.state_dict()) for _, _, optimizer in run.sides]
    run.steps(lean, 2)
    for forward, _, _ in run.sides:
        forward(batch(7)).square().mean().backward()
    if mode is not False:
        with pytest.raises(StateError, match=r"first\.weight: it has moved inside the backward.*Nothing was changed"):
            run.optimizer.load_state_dict(states[0])
        return
    for (_, _, optimizer), state in zip(run.sides, states, strict=True):
        optimizer.load_state_dict(state)
        optimizer.step()
        optimizer.zero_grad()
    run.check()


def test_loading_other_rows_than_those_of_a_gradient_that_waits_is_refused() -> None:
    run = Run(False, rank=3, update_proj_gap=1, seed=3)
    lean(run.compiled, run.model, run.optimizer, 0)
    state = copy.deepcopy(run.optimizer.state_dict())
    lean(run.compiled, run.model, run.optimizer, 1)
    run.optimizer.param_groups[0]["update_proj_gap"] = 50
    run.compiled(batch(2)).square().mean().backward()
    with pytest.raises(StateError, match=r"computed for other rows than those of the loaded state.*Nothing was changed"):
        run.optimizer.load_state_dict({**state, "param_groups": run.optimizer.state_dict()["param_groups"]})


def replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.data = parameter.grad * 0.5  # type: ignore[operator, union-attr]


def share(model: Any) -> None:
    model.first.weight.grad = model.second.weight.grad


def clone(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad.clone()  # type: ignore[union-attr]


@pytest.mark.parametrize("touch", [replace_data, share, clone], ids=lambda touch: touch.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_put_in_place_of_others(mode: Any, touch: Callable[[nn.Module], None]) -> None:
    run = Run(mode)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        touch(model)
        optimizer.step()
        optimizer.zero_grad()

    if mode is True:
        with pytest.raises(StateError, match="it has already moved inside the backward"):
            loop(run.compiled, run.model, run.optimizer, 0)
        return
    run.steps(loop, 5)


@pytest.mark.parametrize("mode", MODES)
def test_freezing_between_forward_and_backward(mode: Any) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        loss = (forward(batch(number)) - 1).square().mean()
        model.second.weight.requires_grad_(number % 2 == 0)  # type: ignore[operator, union-attr]
        loss.backward()
        model.second.weight.requires_grad_(True)  # type: ignore[operator, union-attr]
        optimizer.step()
        optimizer.zero_grad()

    Run(mode).steps(loop, 6)


@pytest.mark.parametrize("mode", MODES)
def test_a_rate_that_becomes_a_tensor(mode: Any) -> None:
    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        rate = 1e-2 / (number + 1)
        optimizer.param_groups[0]["lr"] = torch.tensor(rate, dtype=torch.float64) if number > 2 else rate
        lean(forward, model, optimizer, number)

    Run(mode).steps(loop, 6)


@pytest.mark.parametrize("mode", MODES)
def test_settings_that_change_between_forward_and_backward(mode: Any) -> None:
    """Whether weights decay at all is part of the compiled graph."""

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.0
        loss = (forward(batch(number)) - 1).square().mean()
        optimizer.param_groups[0]["weight_decay"] = 0.5
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Run(mode, weight_decay=0.0).steps(loop, 5)


def test_a_loop_that_reads_gradients_after_the_step_is_not_fused() -> None:
    """It clears them afterwards, so what it reads is there in the deferred mode alone."""

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        (forward(batch(number)) - 1).square().mean().backward()
        optimizer.step()
        assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())  # type: ignore[union-attr]
        optimizer.zero_grad()

    run = Run("auto")
    run.steps(loop, 5)
    assert "gradients are read" in run.optimizer.fused.reason


def test_a_refusal_is_the_last_one_under_auto() -> None:
    """A loop that begins to read gradients when it is fused is told once, and is deferred from then on."""
    run = Run("auto")
    run.steps(lean, 3)
    (run.compiled(batch(3)) - 1).square().mean().backward()
    with pytest.raises(StateError, match="already moved"):
        run.model.second.weight.grad.abs()  # type: ignore[union-attr]
    run.optimizer.step()
    run.optimizer.zero_grad()
    lean(run.twin, run.twin, run.reference, 3)
    assert not run.optimizer.fused
    run.steps(lean, 2)


@pytest.mark.parametrize("mode", [True, False])
def test_a_new_optimizer_between_backward_and_step_is_told(mode: bool) -> None:
    run = Run(mode)
    run.steps(lean, 2)
    run.compiled(batch(2)).square().mean().backward()
    new = grass_compile.AdamW(run.model.named_parameters(), **FULL)
    match = "another optimizer has already applied this gradient" if mode else "compact one of another optimizer"
    with pytest.raises(StateError, match=rf"first\.weight: .*{match}"):
        new.step()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_from_outside_after_zeros(mode: Any) -> None:
    """A stand-in that was set to zero has no room for what an outside gradient adds: refused where a step is fused for good."""
    run = Run(mode)

    def loop(forward: Any, model: nn.Module, optimizer: Any, number: int) -> None:
        loss_of = penalty_after if number == 3 else lambda forward, model, x: (forward(x) - 1).square().mean()
        loss_of(forward, model, batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    if mode is not True:
        run.steps(loop, 5)
        return
    with pytest.raises(StateError, match=r"second\.weight: its gradient was applied inside the backward and then set to zero"):
        run.steps(loop, 5)

"""``torch.distributed.checkpoint`` on one process: state by name, into a fresh optimizer of a fresh model."""

from __future__ import annotations

import copy
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import grass_compile
from grass_compile import GrassWarning, StateError

from . import forms, paper

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
NUMBERS = dict(lr=1e-2, weight_decay=0.1)
PROJECT = dict(rank=6, axis="rows", update_proj_gap=3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Torch says that it saves without a process group; our own warning about the step that it takes is tested by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", category=GrassWarning)
        yield


class Net(nn.Module):
    """Two linear layers, one with a bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)).tanh())


NAMES = ["up.weight", "up.bias", "norm.weight", "norm.bias", "down.weight"]


def ours(model: nn.Module, **keywords: Any) -> grass_compile.AdamW:
    return paper.AdamW(model.named_parameters(), **{**NUMBERS, **PROJECT, **keywords})


def reordered(model: nn.Module, **keywords: Any) -> grass_compile.AdamW:
    return paper.AdamW(list(model.named_parameters())[::-1], **{**NUMBERS, **PROJECT, **keywords})


def two_groups(model: nn.Module, swapped: bool = False) -> grass_compile.AdamW:
    """Weights with decay, vectors without."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    vectors = [(name, p) for name, p in model.named_parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    return paper.AdamW(groups[::-1] if swapped else groups, **{**NUMBERS, **PROJECT})


def torchs(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **NUMBERS)


class Run:
    """A model in training."""

    def __init__(self, make: MakeOptimizer = ours, **options: Any) -> None:
        self.model = Net()
        self.optimizer = make(self.model)
        self.compiled = torch.compile(self.model, backend="grass", options={"compiler": "aot_eager", **options})

    def train(self, begin: int, end: int) -> list[str]:
        losses = []
        for step in range(begin, end):
            loss = self.compiled(forms.batch(torch.float32, step)).square().sum()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()).hex())
        return losses

    def same_as(self, other: Run) -> bool:
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return all(torch.equal(p, q) for p, q in pairs)

    @property
    def projected(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if "index" in self.optimizer.state.get(p, {})]


def continued(first: Run, second: Run, load: Callable[[Any], None], state: Any, at: int = 4) -> None:
    """Load ``state`` into a fresh run; it must go on like the first."""
    second.model.load_state_dict(first.model.state_dict())
    expected = first.train(at, at + 6)
    torch._dynamo.reset()
    load(state)
    assert second.projected == ["up.weight", "down.weight"]
    assert second.train(at, at + 6) == expected and second.same_as(first)


VARIANTS: dict[str, MakeOptimizer] = {
    "reset": ours,
    "carry": lambda model: ours(model, on_refresh="carry"),
    "columns": lambda model: ours(model, axis="columns"),
    "auto": lambda model: ours(model, axis="auto"),
    "deferred": lambda model: ours(model, on_refresh="carry", step_in_backward=False),
    "groups": two_groups,
    "8 bits": lambda model: paper.AdamW8bit(model.named_parameters(), **NUMBERS, **PROJECT, on_refresh="carry"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_by_name_is_exact(variant: str) -> None:
    first = Run(VARIANTS[variant])
    first.train(0, 4)
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    assert set(state["state"]) == set(NAMES)
    assert sorted(name for group in state["param_groups"] for name in group["params"]) == sorted(NAMES)
    assert {"index", "exp_avg", "updates"} <= set(state["state"]["up.weight"])
    second = Run(VARIANTS[variant])
    continued(first, second, lambda state: set_optimizer_state_dict(second.model, second.optimizer, state), state)


def test_names_of_a_compiled_module_have_no_prefix() -> None:
    first, second = Run(), Run()
    first.train(0, 4)
    state = copy.deepcopy(get_optimizer_state_dict(first.compiled, first.optimizer))
    assert set(state["state"]) == set(NAMES)
    continued(first, second, lambda state: set_optimizer_state_dict(second.compiled, second.optimizer, state), state)


@pytest.mark.parametrize(
    ("make", "other"), [(ours, reordered), (reordered, ours), (two_groups, lambda model: two_groups(model, swapped=True))]
)
def test_parameters_and_groups_in_another_order(make: MakeOptimizer, other: MakeOptimizer) -> None:
    first, second = Run(make), Run(other)
    first.train(0, 4)
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    continued(first, second, lambda state: set_optimizer_state_dict(second.model, second.optimizer, state), state)
    again = get_optimizer_state_dict(second.model, second.optimizer)
    assert set(again["state"]["up.weight"]) == set(state["state"]["up.weight"])


FULL = StateDictOptions(full_state_dict=True)


@pytest.mark.parametrize(
    ("options", "begun"),
    [
        (FULL, True),
        (FULL, False),
        (StateDictOptions(cpu_offload=True), False),
        (StateDictOptions(cpu_offload=True), True),
    ],
)
def test_options(options: StateDictOptions, begun: bool) -> None:
    first, second = Run(), Run()
    first.train(0, 4)
    if begun:
        second.train(0, 1)
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer, options=options))
    continued(
        first, second, lambda state: set_optimizer_state_dict(second.model, second.optimizer, state, options=options), state
    )


def test_flattened_state_is_exact_or_refused_when_it_is_made() -> None:
    """A flattened state that could not be loaded again must not be written."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    first, second = Run(), Run()
    first.train(0, 4)
    try:
        state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer, options=options))
    except (NotImplementedError, StateError):
        assert first.train(4, 6)  # nothing was harmed
        return
    continued(
        first, second, lambda state: set_optimizer_state_dict(second.model, second.optimizer, state, options=options), state
    )


# ------------------------------------------------------- torch takes a step with zero gradients to initialise the state


def test_step_that_torch_takes_to_initialise_moves_nothing() -> None:
    run = Run()
    before = copy.deepcopy(run.model.state_dict())
    get_optimizer_state_dict(run.model, run.optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert run.optimizer.param_groups[0]["lr"] == NUMBERS["lr"]


@pytest.mark.parametrize("make", [ours, lambda model: ours(model, axis="auto")], ids=["rows", "auto"])
def test_asking_a_fresh_optimizer_for_its_state_keeps_nothing_dense(make: MakeOptimizer) -> None:
    """Torch's recipe for loading asks the fresh optimizer first, to know where to load to."""
    run = Run(make)
    get_optimizer_state_dict(run.model, run.optimizer)
    run.train(0, 5)
    assert run.projected == ["up.weight", "down.weight"]
    assert run.optimizer.state[run.model.up.weight]["updates"] == 5


def test_step_that_torch_takes_to_initialise_gives_no_warning() -> None:
    first = Run()
    first.train(0, 2)
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    second = Run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GrassWarning)
        set_optimizer_state_dict(second.model, second.optimizer, state)


def test_refused_state_leaves_a_fresh_optimizer_able_to_project() -> None:
    source, run = Run(lambda model: ours(model, rank=8)), Run()
    source.train(0, 2)
    state = copy.deepcopy(get_optimizer_state_dict(source.model, source.optimizer))
    with pytest.raises(StateError, match=r"up\.weight: .*rank=8.*rank=6"):
        set_optimizer_state_dict(run.model, run.optimizer, state)
    run.train(0, 2)
    assert run.projected == ["up.weight", "down.weight"]


def test_loading_into_a_run_that_goes_on() -> None:
    run = Run(VARIANTS["carry"])
    run.train(0, 4)
    model = copy.deepcopy(run.model.state_dict())
    state = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer))
    expected = run.train(4, 10)
    run.model.load_state_dict(model)
    set_optimizer_state_dict(run.model, run.optimizer, state)
    assert run.train(4, 10) == expected


# ---------------------------------------------------------------------------------------------------------------- files


def test_file_goes_through_torch_save(tmp_path: pathlib.Path) -> None:
    first, second = Run(), Run()
    first.train(0, 4)
    model, optimizer = get_state_dict(first.model, first.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)

    def load(state: Any) -> None:
        set_state_dict(second.model, second.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    continued(first, second, load, state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_file_by_torchs_recipe(variant: str, tmp_path: pathlib.Path) -> None:
    """``get_state_dict`` of the new run, which has taken no step, says where to load to; its state must have the saved shapes."""
    first, second = Run(VARIANTS[variant]), Run(VARIANTS[variant])
    first.train(0, 4)
    model, optimizer = get_state_dict(first.model, first.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path, no_dist=True)

    def load(state: Any) -> None:
        model, optimizer = get_state_dict(second.model, second.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        set_state_dict(second.model, second.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    continued(first, second, load, None)


class InOut(Net):
    """The first weight is stored in x out, which no optimizer knows before a region has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.up.weight = nn.Parameter(self.up.weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(x @ self.up.weight + self.up.bias).tanh())


def test_a_wrong_guess_is_told_by_torch_and_forgotten(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a region has read a weight, it is taken for that of an ``nn.Linear``. If it is none, torch tells the shapes apart,
    and the run goes on as if nothing had happened."""
    monkeypatch.setitem(globals(), "Net", InOut)
    first, second, untouched = Run(), Run(), Run()
    first.train(0, 4)
    untouched.model.load_state_dict(second.model.state_dict())
    get_optimizer_state_dict(untouched.model, untouched.optimizer)  # torch's step of zeros counts for the dense parameters
    dcp.save({"optimizer": get_optimizer_state_dict(first.model, first.optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    state = {"optimizer": get_optimizer_state_dict(second.model, second.optimizer)}
    with pytest.raises(CheckpointException, match=r"Size mismatch.* for optimizer\.state\.up\.weight\.exp_avg"):
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert second.train(0, 4) == untouched.train(0, 4) and second.projected == ["up.weight", "down.weight"]


def test_a_step_at_a_rate_of_zero_is_dense_where_nothing_is_compiled() -> None:
    """A warm-up may begin at zero; that is no wish to load something."""
    ours_, reference = Net(), Net()
    reference.load_state_dict(ours_.state_dict())
    optimizers = [ours(ours_, lr=0.0), torch.optim.AdamW(reference.parameters(), lr=0.0, weight_decay=0.1)]
    for model, optimizer in zip((ours_, reference), optimizers, strict=True):
        for step in range(3):
            model(forms.batch(torch.float32, step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 1e-2
    for found, expected in zip(ours_.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_guess_does_not_make_an_eager_run_compact() -> None:
    """Nor keep a weight from full moments which no region turns out to read."""
    run = Run()
    get_optimizer_state_dict(run.model, run.optimizer)
    run.model(forms.batch(torch.float32, 0)).square().sum().backward()
    run.optimizer.step()
    assert run.projected == [] and run.optimizer.state[run.model.up.weight]["exp_avg"].shape == (32, 24)


@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_a_guess_that_was_saved_before_the_first_step_stays_a_guess(how: str) -> None:
    first, second = Run(), Run()
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    assert "index" in state["state"]["up.weight"]
    if how == "loaded":
        set_optimizer_state_dict(second.model, second.optimizer, state)
    else:
        second.model, second.optimizer = copy.deepcopy((first.model, first.optimizer))
    second.model(forms.batch(torch.float32, 0)).square().sum().backward()  # nothing is compiled
    second.optimizer.step()
    assert second.projected == [] and second.optimizer.state[second.model.up.weight]["exp_avg"].shape == (32, 24)


# ---------------------------------------------------------------------------------------------------- unmodified scripts


def adopted() -> Run:
    return Run(torchs, **PROJECT, on_refresh="carry")


def test_adopted_round_trip_by_name_is_exact() -> None:
    first = adopted()
    first.train(0, 4)
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    assert set(state["state"]) == set(NAMES)
    second = adopted()
    continued(first, second, lambda state: set_optimizer_state_dict(second.model, second.optimizer, state), state)


def test_adopted_optimizer_that_was_asked_for_its_state_keeps_nothing_dense() -> None:
    run = adopted()
    get_optimizer_state_dict(run.model, run.optimizer)
    run.train(0, 2)
    assert run.projected == ["up.weight", "down.weight"]


def test_adopted_flattened_state_is_exact_or_refused_when_it_is_made() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    first, second = adopted(), adopted()
    first.train(0, 4)
    try:
        state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer, options=options))
    except (NotImplementedError, StateError):
        return
    continued(
        first, second, lambda state: set_optimizer_state_dict(second.model, second.optimizer, state, options=options), state
    )

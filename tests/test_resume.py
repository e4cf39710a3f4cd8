"""Checkpoints: a run that was killed goes on bit for bit; a state that does not fit is refused by name, with nothing changed."""

from __future__ import annotations

import copy
import io
import json
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import GrassWarning, StateError

from . import forms, paper
from .resume_script import KEYWORDS, STEPS

ROOT = pathlib.Path(__file__).parent.parent
KILLS = {"fused": 8, "deferred": 3, "accumulated": 3, "adopted": 3}  # each costs a compilation


# ---------------------------------------------------------------------------------------------------------------- killed


MARKS = {name: [pytest.mark.slow] if name == "fused" else [pytest.mark.exhaustive] for name in KEYWORDS}


@pytest.mark.parametrize("variant", [pytest.param(variant, marks=MARKS.get(variant, ())) for variant in KEYWORDS])
def test_killed_run_goes_on_bit_for_bit(variant: str, tmp_path: pathlib.Path) -> None:
    """``SIGKILL`` again and again while starting, stepping and saving: losses and final state are those of a run left alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.resume_script", variant, str(tmp_path), str(KILLS[variant])]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert (
        told["kills"] == KILLS[variant] and 0 < told["seen"][-1] < STEPS
    )  # it got somewhere, and was never done before the last kill
    whole = dict(line.split() for line in (tmp_path / "whole" / "losses").read_text().splitlines())
    killed = [line.split() for line in (tmp_path / "killed" / "losses").read_text().splitlines()]
    assert [int(step) for step in whole] == list(range(STEPS)) and {step for step, _ in killed} == set(whole)
    assert [(step, loss) for step, loss in killed if whole[step] != loss] == []  # steps that were repeated included
    ends = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed")]
    assert equal(*ends)


# ------------------------------------------------------------------------------------------------------------- helpers


def equal(first: Any, second: Any) -> bool:
    """Equality bit for bit of nested state."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second


class Net(nn.Module):
    """Two linear layers, one with a bias, and a norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(24, width), nn.LayerNorm(width), nn.Linear(width, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)).tanh())


class Run:
    """A model in training."""

    def __init__(self, model: nn.Module | None = None, *, dtype: torch.dtype = torch.float32, **keywords: Any) -> None:
        self.model = (Net() if model is None else model).to(dtype)
        keywords = {"lr": 1e-2, "weight_decay": 0.1, "rank": 6, "axis": "rows", "update_proj_gap": 3, **keywords}
        self.optimizer = paper.AdamW(self.model.named_parameters(), **keywords)
        self.compiled = torch.compile(self.model, backend="grass", options={"compiler": "aot_eager"})
        self.dtype = dtype

    def train(self, begin: int, end: int) -> list[str]:
        """Losses of some steps, exactly."""
        losses = []
        for step in range(begin, end):
            output = self.compiled(forms.batch(self.dtype, step))
            loss = output.to(torch.promote_types(self.dtype, torch.float32)).square().sum()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()).hex())
        return losses

    def everything(self) -> Any:
        """A deep copy of all that a refused load must leave alone."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        held = [[id(parameter) for parameter in group["params"]] for group in self.optimizer.param_groups]
        state = {name: dict(self.optimizer.state.get(p, {})) for name, p in self.model.named_parameters()}
        return copy.deepcopy([self.model.state_dict(), groups, held, state])


def saved(run: Run) -> io.BytesIO:
    """The state of a run in a file."""
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    return file


# ------------------------------------------------------------------------------------------------------------ resuming

VARIANTS: dict[str, dict[str, Any]] = {
    "reset": dict(on_refresh="reset"),
    "carry": dict(on_refresh="carry", axis="columns"),
    "auto": dict(on_refresh="carry", axis="auto"),
    "deferred": dict(on_refresh="carry", step_in_backward=False),
    "clipped": dict(max_grad_norm=0.5),
    "bf16": dict(on_refresh="carry", stochastic_rounding=True, state_dtype=torch.bfloat16, dtype=torch.bfloat16),
    "wide": dict(on_refresh="carry", state_dtype=torch.float64),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_is_the_same_bit_for_bit(variant: str) -> None:
    first = Run(**VARIANTS[variant])
    first.train(0, 4)
    file = saved(first)
    expected = first.train(4, 10)
    torch._dynamo.reset()
    second = Run(**VARIANTS[variant])
    loaded = torch.load(file, weights_only=True)
    second.model.load_state_dict(loaded["model"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    assert second.train(4, 10) == expected
    assert equal(second.everything()[0], first.everything()[0]) and equal(second.everything()[3], first.everything()[3])


def test_seed_is_part_of_the_state() -> None:
    first = Run(**VARIANTS["bf16"], seed=5)
    first.train(0, 1)
    second = Run(**VARIANTS["bf16"], seed=6)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert second.optimizer.param_groups[0]["seed"] == 5
    second.model.load_state_dict(first.model.state_dict())
    assert second.train(1, 5) == first.train(1, 5) and equal(second.everything()[0], first.everything()[0])


def test_rolling_back_a_run_that_goes_on() -> None:
    run = Run(on_refresh="carry")
    run.train(0, 4)
    model, optimizer = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    expected = run.train(4, 9)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    assert run.train(4, 9) == expected


def test_changed_learning_rate_after_a_load_is_used() -> None:
    first = Run()
    first.train(0, 2)
    file = saved(first)
    second = Run(lr=0.5)
    loaded = torch.load(file, weights_only=True)
    second.model.load_state_dict(loaded["model"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    for run in (first, second):
        assert run.optimizer.param_groups[0]["lr"] == 1e-2
        run.optimizer.param_groups[0]["lr"] = 3e-3
        run.train(2, 4)
    assert equal(second.everything()[0], first.everything()[0])


def test_loaded_compact_state_is_a_copy() -> None:
    first = Run()
    first.train(0, 2)
    state = first.optimizer.state_dict()
    before = copy.deepcopy(state)
    second = Run()
    second.optimizer.load_state_dict(state)  # of dense parameters torch keeps the very tensors
    second.train(2, 5)
    assert all(equal(state["state"][number], before["state"][number]) for number in (0, 4))
    assert {"index"} <= set(before["state"][0]) & set(before["state"][4])


# -------------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_then_saving_gives_the_same_state(variant: str) -> None:
    first = Run(**VARIANTS[variant])
    first.train(0, 4)
    before = copy.deepcopy(first.optimizer.state_dict())
    second = Run(**VARIANTS[variant])
    second.optimizer.load_state_dict(before)
    assert equal(second.optimizer.state_dict(), before)


def test_state_holds_tensors_and_plain_values_only() -> None:
    run = Run(**VARIANTS["bf16"])
    torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=10)
    run.train(0, 2)

    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, (dict, list, tuple)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from leaves(inner)
        else:
            yield value

    kinds = {type(leaf) for leaf in leaves(run.optimizer.state_dict())}
    assert kinds <= {Tensor, int, float, bool, str, type(None), torch.dtype}


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_file_is_no_larger_than_model_and_compact_state(axis: str, tmp_path: pathlib.Path) -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 512))
    rank = 64
    optimizer = paper.AdamW(model.named_parameters(), rank=rank, axis=axis)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for _ in range(2):
        compiled(torch.randn(8, 512)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}, tmp_path / "checkpoint.pt")
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    across = 1 if axis == "rows" else 0
    moments = sum(2 * 4 * (rank * p.shape[across] if p.dim() == 2 else p.numel()) for p in model.parameters())
    index = 2 * rank * (8 + 4)  # and the row scale
    assert weights > 2**22
    assert (tmp_path / "checkpoint.pt").stat().st_size <= 1.01 * (weights + moments + index)


# ------------------------------------------------------------------------------------------------------------- refused


def refused(run: Run, state: Any, match: str) -> None:
    """Loading raises `StateError`; the run stays as it was and goes on as if nothing had happened."""
    before = run.everything()
    with pytest.raises(StateError, match=match) as caught:
        run.optimizer.load_state_dict(state)
    assert "Nothing was changed" in str(caught.value)
    assert equal(run.everything(), before)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": (dict(rank=8), r"up\.weight: .*rank=8.*rank=6"),
    "axis": (dict(axis="columns"), r"up\.weight: .*axis='columns'.*axis='rows'"),
    "on_refresh": (dict(on_refresh="carry"), r"up\.weight: .*on_refresh"),
    "shape": (dict(model=40), r"up\.weight: .*shape .*\(32, 24\)"),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_state_of_another_optimizer_is_refused_by_name(other: str, trained: bool) -> None:
    keywords, match = OTHERS[other]
    model = Net(keywords["model"]) if "model" in keywords else None
    source = Run(model, **{key: value for key, value in keywords.items() if key != "model"})
    source.train(0, 2)
    run, undisturbed = Run(), Run()
    undisturbed.model.load_state_dict(run.model.state_dict())
    if trained:
        assert run.train(0, 2) == undisturbed.train(0, 2)
    refused(run, source.optimizer.state_dict(), match)
    assert run.train(2, 5) == undisturbed.train(2, 5)


def test_state_along_another_axis_is_refused_when_auto_chose_it() -> None:
    source = Run(axis="auto")
    source.train(0, 1)
    axis = source.optimizer.state[source.model.up.weight]["axis"]
    run = Run(axis="columns" if axis == "rows" else "rows")
    refused(run, source.optimizer.state_dict(), r"up\.weight: .*axis")


def test_state_of_another_number_of_parameters_is_refused() -> None:
    source = Run(nn.Sequential(nn.Linear(24, 32)))
    source.train(0, 1)
    run = Run()
    run.train(0, 1)
    refused(run, source.optimizer.state_dict(), r"groups of \[2\] parameters, this optimizer of \[5\]")


def test_state_with_another_number_of_groups_is_refused() -> None:
    source = Run()
    source.train(0, 1)
    state = source.optimizer.state_dict()
    state["param_groups"] = state["param_groups"] * 2
    refused(source, state, "another model")


def test_parameters_in_another_order_are_refused() -> None:
    model = Net()
    source = Run(model)
    source.train(0, 1)
    backwards = Run(Net())
    backwards.optimizer = paper.AdamW(list(backwards.model.named_parameters())[::-1], rank=6, axis="rows")
    refused(backwards, source.optimizer.state_dict(), r"(up|norm|down)\.(weight|bias): ")


@pytest.mark.parametrize("key", ["index", "row_scale", "step", "updates", "axis", "dim", "exp_avg", "exp_avg_sq"])
def test_state_that_lacks_a_key_is_refused_by_name(key: str) -> None:
    run = Run()
    run.train(0, 2)
    state = copy.deepcopy(run.optimizer.state_dict())
    del state["state"][4][key]
    refused(run, state, rf"down\.weight: .*{'shape' if key == 'index' else key}")


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_state_that_lacks_a_part_is_refused(key: str) -> None:
    run = Run()
    run.train(0, 2)
    state = run.optimizer.state_dict()
    del state[key]
    refused(run, state, "takes what state_dict")


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "index out of range": lambda entry: entry["index"].__setitem__(0, 32),
    "index negative": lambda entry: entry["index"].__setitem__(0, -1),
    "index twice": lambda entry: entry["index"].__setitem__(0, entry["index"][1].item()),
    "moment short": lambda entry: entry.update(exp_avg=entry["exp_avg"][:3]),
    "moment of another axis": lambda entry: entry.update(exp_avg_sq=torch.zeros(32, 6)),
    "row_scale short": lambda entry: entry.update(row_scale=entry["row_scale"][:3]),
    "step short": lambda entry: entry.update(step=entry["step"][:3]),
    "dim unknown": lambda entry: entry.update(dim=2),
    "axis unknown": lambda entry: entry.update(axis="diagonals"),
    "axis against dim": lambda entry: entry.update(axis="columns"),
    "updates negative": lambda entry: entry.update(updates=-1),
    "updates no number": lambda entry: entry.update(updates="many"),
    "moment no tensor": lambda entry: entry.update(exp_avg=0.0),
    "index no tensor": lambda entry: entry.update(index=[0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_refused_by_name(damage: str) -> None:
    run = Run(on_refresh="carry")
    run.train(0, 2)
    state = copy.deepcopy(run.optimizer.state_dict())
    DAMAGES[damage](state["state"][0])
    refused(run, state, r"up\.weight: ")


@pytest.mark.parametrize(("source", "target"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_moments_of_another_dtype_are_converted_or_refused(source: torch.dtype, target: torch.dtype) -> None:
    """Generated code reads the moments in the dtype that it was compiled for, whatever they hold."""
    first, second = Run(dtype=source), Run(dtype=target)
    first.train(0, 2)
    try:
        second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    except StateError:
        refused(second, first.optimizer.state_dict(), r"up\.weight: ")
        return
    assert second.optimizer.state[second.model.up.weight]["exp_avg"].dtype == target
    assert second.train(2, 4)


def test_unusable_keyword_in_saved_groups_is_refused() -> None:
    run = Run()
    run.train(0, 1)
    state = copy.deepcopy(run.optimizer.state_dict())
    state["param_groups"][0]["update_proj_gap"] = 0
    refused(run, state, "update_proj_gap must be a whole number")


def test_saved_groups_that_contradict_each_other_are_refused() -> None:
    model = Net()
    groups = [{"params": list(layer.named_parameters(prefix=name))} for name, layer in model.named_children()]
    run = Run(model)
    run.optimizer = paper.AdamW(groups, rank=6, axis="rows")
    run.train(0, 1)
    state = copy.deepcopy(run.optimizer.state_dict())
    state["param_groups"][1]["step_in_backward"] = False
    refused(run, state, "step_in_backward differs")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused_by_torch(share: float, tmp_path: pathlib.Path) -> None:
    run = Run()
    run.train(0, 2)
    whole = saved(run).getvalue()
    (tmp_path / "torn.pt").write_bytes(whole[: int(share * len(whole))])
    before = run.everything()
    with pytest.raises((RuntimeError, EOFError, OSError)):
        torch.load(tmp_path / "torn.pt", weights_only=True)
    assert equal(run.everything(), before)


# --------------------------------------------------------------------------------------------------- from and to torch


def dense_start() -> tuple[nn.Module, torch.optim.AdamW]:
    """A model that plain torch has trained for three steps."""
    model = Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        model(forms.batch(torch.float64, step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_plain_torch_state_keeps_weights_dense_and_goes_on_like_torch() -> None:
    model, optimizer = dense_start()
    run = Run(dtype=torch.float64, lr=0.5, weight_decay=0.0)
    run.model.load_state_dict(model.state_dict())
    run.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run.optimizer.param_groups[0]["lr"] == 1e-2 and run.optimizer.param_groups[0]["rank"] == 6
    report = grass_compile.explain(run.model, forms.batch(torch.float64), optimizer=run.optimizer)
    assert not report.projected
    for name in ("up.weight", "down.weight"):
        assert report[name].reason == "the optimizer has already trained it dense and holds its full moments"
    with warnings.catch_warnings():
        warnings.simplefilter("error", GrassWarning)
        run.train(3, 9)
    for step in range(3, 9):
        model(forms.batch(torch.float64, step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for own, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(run.optimizer.state[own][key], optimizer.state[theirs][key], rtol=1e-9, atol=1e-12)


def test_plain_torch_state_of_another_shape_is_refused_by_name() -> None:
    _, optimizer = dense_start()
    refused(Run(Net(40)), optimizer.state_dict(), r"up\.weight: .*\(32, 24\).*\(40, 24\)")


def test_compact_state_loaded_into_a_dense_group_is_refused_by_name() -> None:
    source = Run()
    source.train(0, 1)
    refused(Run(rank=None), source.optimizer.state_dict(), r"up\.weight: .*rank")


@pytest.mark.parametrize("names", [True, False])
def test_state_made_without_parameter_names(names: bool) -> None:
    """A file from ``AdamW(model.parameters())`` loads into an optimizer with names, and the other way round."""

    def run(named: bool) -> Run:
        made = Run(on_refresh="carry")
        keywords = dict(lr=1e-2, rank=6, axis="rows", update_proj_gap=3, on_refresh="carry")
        parameters = made.model.named_parameters() if named else made.model.parameters()
        made.optimizer = paper.AdamW(parameters, **keywords)
        return made

    first, second = run(names), run(not names)
    first.train(0, 4)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert second.train(4, 8) == first.train(4, 8)

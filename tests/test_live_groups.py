"""``optimizer.param_groups`` in mid-run: what is assigned takes effect at once, or is refused; and outlives a resume."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import ConfigError, StateError
from grass_compile.optim.live import ParamGroup

from . import paper
from .pairs import every_value


class Net(nn.Module):
    """Two linear layers and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 16), nn.Linear(16, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


class Run:
    """A model in training."""

    def __init__(self, groups: bool = False, **keywords: Any) -> None:
        torch.manual_seed(0)
        self.model = Net().double()
        params: Any = self.model.named_parameters()
        if groups:
            params = [{"params": [pair]} for pair in params]
        self.optimizer = grass_compile.AdamW(params, **{"lr": 1e-2, "rank": 4, "seed": 1, "update_proj_gap": 4, **keywords})
        self.compiled = torch.compile(self.model, backend="grass", options={"compiler": "aot_eager"})

    def loss(self, step: int) -> Tensor:
        x = torch.randn(7, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        return (self.compiled(x) - 1.0).square().mean()

    def train(self, begin: int, end: int) -> Run:
        for step in range(begin, end):
            self.loss(step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def assign(self, **values: Any) -> Run:
        for group in self.optimizer.param_groups:
            group.update(values)
        return self

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Run:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(one: Run, other: Run) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.weights, other.weights, strict=True))


MODES: dict[str, dict[str, Any]] = {
    "fused": dict(step_in_backward=True),
    "deferred": dict(step_in_backward=False),
    "paper": dict(preset="paper", update_proj_gap=4, step_in_backward=True, nonfinite="propagate"),
    "galore": dict(projection="galore", step_in_backward=True),
    "estimate": dict(selection="top", scores="estimate", step_in_backward=True),
}
CHANGES: dict[str, Any] = {
    "update_proj_gap": 3, "scale": 0.5, "stagger": False, "max_grad_norm": 0.01, "nonfinite": "skip", "step_in_backward": False,
}  # fmt: skip


@every_value(mode=MODES, key=CHANGES)
def test_what_changes_in_mid_run_outlives_a_resume(mode: str, key: str) -> None:
    """A run that was resumed equals the one that went on, and both equal one that had the other value by loading it."""
    change = {key: 2 if (mode, key) == ("paper", "stagger") else CHANGES[key]}
    went_on = Run(**MODES[mode]).train(0, 5).assign(**change).train(5, 7)
    file = went_on.saved()
    resumed = Run(**MODES[mode]).load(file)
    assert resumed.optimizer.param_groups[0][key] == change[key]
    went_on.train(7, 15)
    assert same(went_on, resumed.train(7, 15))
    loaded = Run(**{**MODES[mode], **change}).train(0, 0)
    state = Run(**MODES[mode]).train(0, 5)
    edited = torch.load(state.saved(), weights_only=True)
    for group in edited["optimizer"]["param_groups"]:
        group.update(change)
    loaded.model.load_state_dict(edited["model"])
    loaded.optimizer.load_state_dict(edited["optimizer"])
    assert same(went_on, loaded.train(5, 15))
    if key not in ("nonfinite", "step_in_backward"):
        assert not same(went_on, Run(**MODES[mode]).train(0, 15)), "the change did nothing"


def test_a_gap_takes_effect_at_once() -> None:
    run = Run(update_proj_gap=100).train(0, 6)
    state = run.optimizer.state[run.model.b.weight]
    before = state["index"].clone()
    run.assign(update_proj_gap=1).train(6, 7)
    assert not torch.equal(state["index"], before)


def test_scale_is_a_factor_from_the_next_step_on() -> None:
    moved = []
    for scale in (1.0, 0.25):
        run = Run(weight_decay=0.0).train(0, 3).assign(scale=scale)
        before = run.weights
        run.train(3, 4)
        moved.append(run.weights[2] - before[2])
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=0, atol=1e-12)


def test_what_is_the_optimizers_as_a_whole_goes_into_all_groups() -> None:
    run = Run(groups=True)
    run.optimizer.param_groups[1]["max_grad_norm"] = 0.5
    run.optimizer.param_groups[1]["scale"] = 0.5
    assert [group["max_grad_norm"] for group in run.optimizer.param_groups] == [0.5] * 3
    assert [group["scale"] for group in run.optimizer.param_groups] == [1.0, 0.5, 1.0]


FIXED: dict[str, Any] = {
    "rank": 8, "axis": "rows", "projection": "galore", "state_dtype": torch.float64, "on_refresh": "reset", "selection": "top",
    "exclude": ["*b*"], "seed": 7, "scores": "sampled", "share_index": True, "block": 2, "stochastic_rounding": True,
    "amsgrad": True, "maximize": True,
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED)
def test_what_shapes_the_state_is_refused(key: str) -> None:
    run = Run().train(0, 2)
    group = run.optimizer.param_groups[0]
    old = dict(group)
    for assign in (
        lambda: group.__setitem__(key, FIXED[key]),
        lambda: group.update({"lr": 0.5, key: FIXED[key]}),
        lambda: group.__ior__({key: FIXED[key]}),
        lambda: group.pop(key),
        lambda: group.__delitem__(key),
    ):
        with pytest.raises(ConfigError, match=f"^{key} cannot"):
            assign()
        assert dict(group) == old
    group[key] = old[key]
    assert same(run.train(2, 4), Run().train(0, 4))


@pytest.mark.parametrize(
    ("key", "value"),
    [("update_proj_gap", 0), ("scale", float("nan")), ("stagger", "yes"), ("nonfinite", "ignore"), ("max_grad_norm", -1.0)],
)
def test_invalid_values_change_nothing(key: str, value: Any) -> None:
    run = Run(groups=True)
    before = [dict(group) for group in run.optimizer.param_groups]
    with pytest.raises(ConfigError, match=key):
        run.optimizer.param_groups[0][key] = value
    assert [dict(group) for group in run.optimizer.param_groups] == before


def test_nothing_can_be_taken_out_but_what_others_put_in() -> None:
    run = Run()
    group = run.optimizer.param_groups[0]
    assert group.setdefault("initial_lr", 0.5) == 0.5 and group.setdefault("lr", 3.0) == 1e-2
    assert group.pop("initial_lr") == 0.5 and group.pop("initial_lr", None) is None
    for refused in (group.clear, group.popitem, lambda: group.pop("lr"), lambda: group.update(preset="paper")):
        with pytest.raises(ConfigError):
            refused()
    with pytest.raises(ConfigError, match="add_param_group"):
        group["params"] = []


@pytest.mark.parametrize(("key", "value"), [("scale", 0.5), ("nonfinite", "propagate")])
def test_a_forward_that_waits_for_its_backward_is_not_left_behind(key: str, value: Any) -> None:
    run = Run(step_in_backward=True).train(0, 2)
    loss = run.loss(2)
    with pytest.raises(StateError, match=rf"weight: {key} cannot change between a forward and its backward"):
        run.optimizer.param_groups[0][key] = value
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    assert same(run, Run(step_in_backward=True).train(0, 3))
    run.optimizer.param_groups[0][key] = value


def test_groups_are_plain_outside_of_the_optimizer() -> None:
    run = Run().train(0, 2)
    assert type(run.optimizer.param_groups[0]) is ParamGroup
    assert type(run.optimizer.state_dict()["param_groups"][0]) is dict
    group = run.optimizer.param_groups[0]
    assert type(copy.deepcopy(group)) is type(copy.copy(group)) is type(pickle.loads(pickle.dumps(group))) is dict
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert type(run.optimizer.param_groups[0]) is ParamGroup
    with pytest.raises(ConfigError, match="rank cannot change"):
        run.optimizer.param_groups[0]["rank"] = 5
    run.optimizer.add_param_group({"params": [("c", nn.Parameter(torch.ones(3)))]})
    assert type(run.optimizer.param_groups[-1]) is ParamGroup


def test_schedulers_write_what_they_like() -> None:
    run = Run(update_proj_gap=4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 2e-2, total_steps=20)
    for step in range(6):
        run.train(step, step + 1)
        schedule.step()
    resumed = Run(update_proj_gap=4)
    again = torch.optim.lr_scheduler.OneCycleLR(resumed.optimizer, 2e-2, total_steps=20)
    resumed.load(run.saved())
    again.load_state_dict(schedule.state_dict())
    for step in range(6, 10):
        run.train(step, step + 1)
        resumed.train(step, step + 1)
        schedule.step()
        again.step()
    assert same(run, resumed)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_has_its_nesterov_for_good(nesterov: bool) -> None:
    optimizer = paper.SGD(nn.Linear(4, 4).parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    with pytest.raises(ConfigError, match="nesterov cannot change in mid-run"):
        optimizer.param_groups[0]["nesterov"] = not nesterov

"""Keywords: one table, from which signatures, validation and docs come; defaults and presets; torch's own arguments."""

from __future__ import annotations

import inspect
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import ConfigError
from grass_compile.config import GroupOptions, parse_group
from grass_compile.keywords import KEYWORDS, PRESETS, STORED, completed, markdown
from grass_compile.optim.rules import MuonRule

DOCS = pathlib.Path(__file__).parent.parent / "docs"
OPTIMIZERS = ("AdamW", "AdamW8bit", "Adafactor", "Apollo", "Lion", "Muon", "SGD", "Sketchy")
PAPER = {"selection": "top", "on_refresh": "reset", "axis": "rows", "stagger": False, "update_proj_gap": 200}
RECOMMENDED = {"selection": "uniform", "on_refresh": "carry", "axis": "columns", "stagger": True, "update_proj_gap": 50}


class Net(nn.Module):
    """Weights of 16 x 24 and 40 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 16), nn.Linear(16, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def batch(step: int) -> Tensor:
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(step))


def group_of(**keywords: Any) -> dict[str, Any]:
    (group,) = grass_compile.AdamW(nn.Linear(4, 4).named_parameters(), **keywords).param_groups
    return dict(group)


def test_the_docs_hold_the_table() -> None:
    assert markdown() in (DOCS / "options.md").read_text()


def test_every_option_of_a_group_is_a_keyword() -> None:
    assert set(GroupOptions.__dataclass_fields__) <= {keyword.name for keyword in STORED}
    assert len({keyword.name for keyword in KEYWORDS}) == len(KEYWORDS)


@pytest.mark.parametrize("projection", ["grass", "galore", "gaussian"])
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_all_defaults_are_valid(projection: str, preset: str | None) -> None:
    parse_group(completed({"projection": projection, "preset": preset}))


def test_defaults() -> None:
    assert {key: group_of()[key] for key in RECOMMENDED} == RECOMMENDED
    assert (group_of()["rank"], group_of()["step_in_backward"]) == (128, "auto")
    dense = group_of(projection="galore")
    assert (dense["selection"], dense["on_refresh"], dense["axis"]) == ("top", "keep", "auto")
    assert "preset" not in group_of(preset="paper")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_paper_is_a_preset_of_every_optimizer(name: str) -> None:
    optimizer = getattr(grass_compile, name)(nn.Linear(4, 4).named_parameters(), preset="paper", update_proj_gap=7)
    assert {key: optimizer.param_groups[0][key] for key in PAPER} == {**PAPER, "update_proj_gap": 7}
    assert isinstance(optimizer, grass_compile.Optimizer)


def test_a_group_goes_before_its_optimizer_and_a_keyword_before_a_preset() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    groups: list[dict[str, Any]] = [
        {"params": list(one.parameters()), "preset": "paper", "selection": "norm"},
        {"params": list(other.parameters()), "projection": "galore"},
    ]
    first, second = grass_compile.AdamW(groups, axis="columns", update_proj_gap=9).param_groups
    assert {key: first[key] for key in PAPER} == {**PAPER, "selection": "norm"}
    assert (second["update_proj_gap"], second["axis"], second["selection"], second["on_refresh"]) == (9, "columns", "top", "keep")
    with pytest.raises(ConfigError, match="selection='norm' is about which rows are selected"):
        grass_compile.AdamW([groups[1]], selection="norm")


def test_a_rule_by_name_is_an_optimizer_too() -> None:
    optimizer = grass_compile.Optimizer(nn.Linear(4, 4).parameters(), rule="lion", lr=1e-3, preset="paper")
    assert optimizer.param_groups[0]["selection"] == "top" and isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "Muon"])
def test_arguments_are_those_of_torch(name: str) -> None:
    """Names, kinds, order and defaults; but Muon's steps always have AdamW's size, and its dense rest has numbers of its own."""

    def signature(made: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(made).parameters.values()
        return [(p.name, p.kind, p.default) for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD]

    ours, theirs = signature(getattr(grass_compile, name)), signature(getattr(torch.optim, name))
    if name == "Muon":
        ours = [entry for entry in ours if entry[0] not in ("betas", "dense_eps", "adjust_lr_fn")]
        theirs = [entry for entry in theirs if entry[0] != "adjust_lr_fn"]
    assert ours == theirs
    assert signature(grass_compile.AdamW8bit) == signature(torch.optim.AdamW)


@pytest.mark.parametrize("flag", ["maximize", "differentiable", "capturable", "amsgrad"])
def test_flags_that_the_step_does_not_know_are_refused(flag: str) -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=f"AdamW: {flag}=True is not available"):
        grass_compile.AdamW(layer.parameters(), **{flag: True})
    with pytest.raises(ConfigError, match=f"{flag}=True differs from the optimizer's"):
        grass_compile.AdamW([{"params": list(layer.parameters()), flag: True}])


@pytest.mark.parametrize("flags", [{"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_flags_of_the_dense_rest_reach_torch(name: str, flags: dict[str, Any]) -> None:
    models = []
    for own in ({}, flags):
        torch.manual_seed(0)
        models.append(Net())
        optimizer = getattr(grass_compile, name)(models[-1].named_parameters(), lr=1e-2, rank=4, seed=0, **own)
        compiled = torch.compile(models[-1], backend="grass", options={"compiler": "aot_eager"})
        for step in range(4):
            compiled(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(optimizer.param_groups[0][key] == value for key, value in own.items())
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_muon_takes_its_iteration() -> None:
    with pytest.raises(ConfigError, match="adjust_lr_fn='original' is not available"):
        grass_compile.Muon(nn.Linear(4, 4).parameters(), adjust_lr_fn="original")
    with pytest.raises(ConfigError, match="ns_coefficients must be three numbers"):
        grass_compile.Muon(nn.Linear(4, 4).parameters(), ns_coefficients=(1.0, 2.0))  # type: ignore[arg-type]
    made = grass_compile.Muon(nn.Linear(4, 4).parameters(), ns_coefficients=(3.0, -4.0, 2.0), eps=1e-5, ns_steps=3)
    assert made.rule == MuonRule(True, 3, (3.0, -4.0, 2.0), 1e-5) and made.param_groups[0]["eps"] == 1e-8


# ---------------------------------------------------------------------------------------------------- a share of the width


@pytest.mark.parametrize(
    ("axis", "ranks"), [("columns", {"a.weight": 6, "b.weight": 4}), ("rows", {"a.weight": 4, "b.weight": 10})]
)
def test_rank_as_a_fraction(axis: str, ranks: dict[str, int]) -> None:
    """Of each weight's size along the axis; training is that with the numbers that it stands for."""
    weights = []
    for fraction in (True, False):
        torch.manual_seed(0)
        model = Net()
        groups = [{"params": [(n, p)], "rank": 0.25 if fraction else ranks.get(n, 128)} for n, p in model.named_parameters()]
        optimizer = grass_compile.AdamW(groups, axis=axis, seed=1, update_proj_gap=3)  # type: ignore[arg-type]
        report = grass_compile.explain(model, batch(0), optimizer=optimizer)
        assert {row.name: row.rank for row in report if row.projected} == ranks
        compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
        for step in range(7):
            compiled(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {n: len(optimizer.state[p]["index"]) for n, p in model.named_parameters() if n in ranks} == ranks
        optimizer.load_state_dict(optimizer.state_dict())
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize(("fraction", "rank"), [(0.001, 1), (0.5, 8), (0.999, 16)])
def test_a_fraction_is_rounded_to_at_least_one(fraction: float, rank: int) -> None:
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=fraction)
    assert grass_compile.explain(model, torch.randn(3, 16), optimizer=optimizer)["0.weight"].rank == rank


def test_a_fraction_with_the_axis_left_to_the_cost_model() -> None:
    model = nn.Sequential(nn.Linear(16, 64, bias=False))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=0.25, axis="auto")
    row = grass_compile.explain(model, torch.randn(3, 16), optimizer=optimizer)["0.weight"]
    assert row.rank == {"rows": 16, "columns": 4}[str(row.axis)]


# ------------------------------------------------------------------------------------------------------ unmodified scripts


@pytest.mark.parametrize("options", [{"rank": 0.25}, {"rank": 4}, {"rank": 4, "preset": "paper"}], ids=str)
def test_unmodified_scripts_have_the_same_defaults(options: dict[str, Any]) -> None:
    """Columns, drawn blindly and anew within the gap, each weight at a step of its own; or the paper's."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", "update_proj_gap": 4, **options})
    seen: dict[str, list[tuple[int, ...]]] = {"a.weight": [], "b.weight": []}
    for step in range(14):
        before = {name: model.get_parameter(name).detach().clone() for name in seen}
        compiled(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, indices in seen.items():
            parameter = model.get_parameter(name)
            state = optimizer.state[parameter]
            assert state["axis"] == ("rows" if "preset" in options else "columns")
            indices.append(tuple(state["index"].tolist()))
            decayed = before[name] * (1 - 1e-2 * 1e-2)
            moved = ((parameter.detach() - decayed).abs() > 1e-6).any(dim=1 - state["dim"]).nonzero().flatten()
            assert set(moved.tolist()) <= set(indices[-1]) and len(moved) > 0
    if "preset" not in options:
        changes = {n: [step for step in range(1, 14) if found[step] != found[step - 1]] for n, found in seen.items()}
        assert changes == {"a.weight": [4, 8, 12], "b.weight": [2, 6, 10]}


def test_unmodified_blind_refreshes_are_those_of_our_own_optimizer() -> None:
    """From the first step on which takes the weights over, whose full gradient is cut to the columns that were drawn."""
    runs = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Net().double()
        options: dict[str, Any] = {"compiler": "aot_eager"}
        optimizer: torch.optim.Optimizer
        project: dict[str, Any] = dict(rank=4, update_proj_gap=3, stagger=False)
        if ours:
            optimizer = grass_compile.SGD(model.named_parameters(), lr=0.1, momentum=0.9, seed=0, **project)
            for number, record in enumerate(r for r in optimizer._manager.records.values() if r.parameter.dim() == 2):
                record.number = number  # a script's weights are numbered as they are taken over
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            options |= project
        compiled = torch.compile(model, backend="grass", options=options)
        for step in range(8):
            compiled(batch(step).double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(list(model.parameters()))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

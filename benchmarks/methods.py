"""The methods under measurement: how each prepares the model, makes its optimizer, and shows that it took part."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.model import LINEARS, Settings, Stack


@dataclass(frozen=True)
class Method:
    """One way to train the stack.

    Attributes:
        backend: The `torch.compile` backend of the model.
        prepare: Changes the model (freezing, adapters) and returns the optimizer.
        witness: Looks at one linear weight after training and returns facts that show the method at work;
            raises AssertionError if it was not.
        moves: Whether the blocks' own linear weights are to change.
        refreshes: Whether every `update_proj_gap`-th step, the first included, does more than the others.
    """

    backend: str
    prepare: Callable[[Stack, Settings], Optimizer]
    witness: Callable[[Optimizer, nn.Parameter, Settings], dict[str, Any]]
    moves: bool = True
    refreshes: bool = False

    def accumulate(self, optimizer: Any) -> contextlib.AbstractContextManager[None]:
        """What to put a micro-batch under that is not the last."""
        return optimizer.accumulate() if self.backend == "grass" else contextlib.nullcontext()


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)


def _dense(model: Stack, settings: Settings) -> Optimizer:
    return _adamw(list(model.parameters()), settings)


def _frozen(model: Stack, settings: Settings) -> Optimizer:
    for weight in model.linear_weights().values():
        weight.requires_grad_(False)
    return _adamw([p for p in model.parameters() if p.requires_grad], settings)


def _grass(
    axis: Literal["rows", "columns", "auto"], name: str = "AdamW", **keywords: Any
) -> Callable[[Stack, Settings], Optimizer]:
    def prepare(model: Stack, settings: Settings) -> Optimizer:
        import grass_compile

        optimizer: Optimizer = getattr(grass_compile, name)(
            model.named_parameters(),
            lr=settings.lr,
            weight_decay=0.0,
            rank=settings.rank,
            update_proj_gap=settings.update_proj_gap,
            axis=axis,
            on_refresh="reset",  # so that `refreshed` can tell a refresh by the restarted count
            **{"selection": "top", "stagger": False, "step_in_backward": True, **keywords},
        )
        return optimizer

    return prepare


def _projected_groups(model: Stack, low_rank: dict[str, Any]) -> list[dict[str, Any]]:
    """The two parameter groups that galore-torch and apollo-torch ask for: linear weights with a rank, the rest."""
    linear = list(model.linear_weights().values())
    known = {id(weight) for weight in linear}
    return [{"params": [p for p in model.parameters() if id(p) not in known]}, {"params": linear, **low_rank}]


def _galore(model: Stack, settings: Settings) -> Optimizer:
    from galore_torch import GaLoreAdamW

    low_rank = {"rank": settings.rank, "update_proj_gap": settings.update_proj_gap, "scale": 0.25, "proj_type": "std"}
    groups = _projected_groups(model, low_rank)
    optimizer: Optimizer = GaLoreAdamW(groups, lr=settings.lr, eps=1e-12, weight_decay=0.0, no_deprecation_warning=True)
    return optimizer


def _apollo(model: Stack, settings: Settings) -> Optimizer:
    from apollo_torch import APOLLOAdamW

    low_rank = {
        "rank": settings.rank,
        "proj": "random",
        "scale_type": "channel",
        "scale": 1.0,
        "update_proj_gap": settings.update_proj_gap,
        "proj_type": "std",
    }
    optimizer: Optimizer = APOLLOAdamW(_projected_groups(model, low_rank), lr=settings.lr, eps=1e-12, weight_decay=0.0)
    return optimizer


def _adamw8bit(model: Stack, settings: Settings) -> Optimizer:
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=settings.lr, weight_decay=0.0)
    return optimizer


class _MuonAndAdamW:
    """`torch.optim.Muon` for the linear weights and AdamW for the rest, as one."""

    def __init__(self, model: Stack, settings: Settings) -> None:
        linear = list(model.linear_weights().values())
        known = {id(weight) for weight in linear}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
        self.parts = (torch.optim.Muon(linear, lr=settings.lr, weight_decay=0.0), _adamw(rest, settings))

    @property
    def state(self) -> dict[Any, Any]:
        """That of both."""
        return {**self.parts[0].state, **self.parts[1].state}

    def step(self) -> None:
        """Both."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Both."""
        for part in self.parts:
            part.zero_grad()


def _witness_momentum(optimizer: Optimizer, weight: nn.Parameter, settings: Settings) -> dict[str, Any]:
    moment: Tensor = optimizer.state[weight]["momentum_buffer"]
    _check(moment.shape == weight.shape, f"the momentum is {tuple(moment.shape)}, the weight {tuple(weight.shape)}")
    return {"momentum_buffer": list(moment.shape)}


def _lora(model: Stack, settings: Settings) -> Optimizer:
    """Adapters on every linear layer, in the model's own type; nothing else trains, the norms included."""
    import peft

    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, lora_dropout=0.0, target_modules=list(LINEARS))
    dtype = next(model.parameters()).dtype
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.to(dtype)
    return _adamw([p for p in model.parameters() if p.requires_grad], settings)


def _check(condition: bool, what: str) -> None:
    """An assertion that `python -O` keeps."""
    if not condition:
        raise AssertionError(what)


def _witness_dense(optimizer: Optimizer, weight: nn.Parameter, settings: Settings) -> dict[str, Any]:
    moment = optimizer.state[weight]["exp_avg"]
    _check(moment.shape == weight.shape, f"the moments are {tuple(moment.shape)}, the weight {tuple(weight.shape)}")
    return {"exp_avg": list(moment.shape)}


def _witness_no_state(optimizer: Optimizer, weight: nn.Parameter, settings: Settings) -> dict[str, Any]:
    _check(weight not in optimizer.state, "a frozen weight has optimizer state")
    return {"states": len(optimizer.state)}


def _witness_grass(optimizer: Optimizer, weight: nn.Parameter, settings: Settings) -> dict[str, Any]:
    _check(weight.grad is None, "a projected weight has a gradient")
    _check(bool({"index", "basis"} & set(optimizer.state[weight])), "the weight is not projected")
    name = next(name for name in ("exp_avg", "momentum_buffer") if name in optimizer.state[weight])
    moment = optimizer.state[weight][name]
    rows, columns = weight.shape
    compact = {(min(settings.rank, rows), columns): "rows", (rows, min(settings.rank, columns)): "columns"}
    _check(tuple(moment.shape) in compact, f"the moments are {tuple(moment.shape)}, the weight {tuple(weight.shape)}")
    return {name: list(moment.shape), "axis": compact[tuple(moment.shape)]}


def refreshed(method: Method, optimizer: Optimizer, model: Stack) -> bool | None:
    """Whether the step just taken was a refresh; None where the optimizer's state does not tell."""
    if method.backend != "grass":
        return None
    weight = next(iter(model.linear_weights().values()))
    return bool(optimizer.state[weight]["step"].max() == 1)


def _witness_projector(optimizer: Optimizer, weight: nn.Parameter, settings: Settings) -> dict[str, Any]:
    state = optimizer.state[weight]
    moment, projection = state["exp_avg"], state["projector"].ortho_matrix
    _check(settings.rank in moment.shape, f"the moments are {tuple(moment.shape)}; none of it is the rank")
    _check(settings.rank in projection.shape, f"the projection is {tuple(projection.shape)}; none of it is the rank")
    return {"exp_avg": list(moment.shape), "projection": list(projection.shape)}


def _witness_8bit(optimizer: Optimizer, weight: nn.Parameter, settings: Settings) -> dict[str, Any]:
    moment: Tensor = optimizer.state[weight]["state1"]
    _check(moment.dtype == torch.uint8, f"the moments are {moment.dtype}, not 8-bit")
    return {"state1": str(moment.dtype)}


METHODS: dict[str, Method] = {
    "dense": Method("inductor", _dense, _witness_dense),
    "frozen": Method("inductor", _frozen, _witness_no_state, moves=False),
    "grass-rows": Method("grass", _grass("rows"), _witness_grass, refreshes=True),
    "grass-columns": Method("grass", _grass("columns"), _witness_grass, refreshes=True),
    "grass-auto": Method("grass", _grass("auto"), _witness_grass, refreshes=True),
    "grass-blind": Method("grass", _grass("columns", selection="uniform"), _witness_grass, refreshes=True),
    "grass-blind-watched": Method(
        "grass", _grass("columns", selection="uniform", step_in_backward="auto"), _witness_grass, refreshes=True
    ),
    "grass-shared": Method("grass", _grass("columns", selection="uniform", share_index=True), _witness_grass, refreshes=True),
    "grass-muon": Method("grass", _grass("columns", "Muon", selection="uniform"), _witness_grass, refreshes=True),
    "grass-adamw8bit": Method("grass", _grass("columns", "AdamW8bit", selection="uniform"), _witness_grass, refreshes=True),
    "grass-rows-deferred": Method("grass", _grass("rows", step_in_backward=False), _witness_grass, refreshes=True),
    "grass-columns-deferred": Method("grass", _grass("columns", step_in_backward=False), _witness_grass, refreshes=True),
    "grass-rows-clipped": Method("grass", _grass("rows", max_grad_norm=1.0), _witness_grass, refreshes=True),
    "grass-galore": Method("grass", _grass("auto", projection="galore", scale=0.25), _witness_grass, refreshes=True),
    "galore": Method("inductor", _galore, _witness_projector, refreshes=True),
    "apollo": Method("inductor", _apollo, _witness_projector, refreshes=True),
    "adamw8bit": Method("inductor", _adamw8bit, _witness_8bit),
    "muon": Method("inductor", cast(Any, _MuonAndAdamW), _witness_momentum),
    "lora": Method("inductor", _lora, _witness_no_state, moves=False),
}
"""Every method by the name it has on the command line and in the results."""


def import_all() -> None:
    """Import every peer there is, so that no method's resident memory carries fewer modules than another's."""
    for name in ("grass_compile", "galore_torch", "apollo_torch", "bitsandbytes", "peft"):
        with contextlib.suppress(ImportError):  # a peer that is not installed fails in its own run, by name
            importlib.import_module(name)


class Fingerprint:
    """A sparse sample of every parameter, to tell afterwards which ones moved without a copy of the model."""

    STRIDE = 61
    """Elements between two samples: a prime, so that every row and column of a weight is met."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {name: self._sample(parameter) for name, parameter in model.named_parameters()}

    def _sample(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().flatten()[:: self.STRIDE].clone()

    def moved(self, model: nn.Module) -> set[str]:
        """Names of the parameters that differ from what they were."""
        return {n for n, p in model.named_parameters() if not torch.equal(self._before[n], self._sample(p))}


def participation(method: Method, model: Stack, optimizer: Optimizer, settings: Settings, before: Fingerprint) -> dict[str, Any]:
    """Facts that show the method at work on every linear weight.

    Raises:
        AssertionError: A linear weight did not move though it should have (or did though it should not), a trained
            parameter stood still, or the method's own state is not what it claims to be.
    """
    moved = before.moved(model)
    linear = model.linear_weights()
    linear_names = {name for name, p in model.named_parameters() if any(p is w for w in linear.values())}
    still = {name for name, p in model.named_parameters() if p.requires_grad} - moved
    _check(not still, f"trained parameters that did not move: {sorted(still)[:4]}")
    _check((linear_names <= moved) == method.moves, f"{len(linear_names & moved)} of {len(linear)} linear moved")
    facts = [method.witness(optimizer, weight, settings) for weight in linear.values()]
    return {"linear": len(linear), "moved": len(moved), "first_linear": facts[0], "axes": _count_axes(facts)}


def _count_axes(facts: list[dict[str, Any]]) -> dict[str, int]:
    axes = [fact["axis"] for fact in facts if "axis" in fact]
    return {axis: axes.count(axis) for axis in sorted(set(axes))}

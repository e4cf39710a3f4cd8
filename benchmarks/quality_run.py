"""One run of the study: `python -m benchmarks.quality_run RUN_JSON` prints one JSON event a line, the result last."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pkgutil
import sys
from typing import Any

import torch
from torch.optim import Optimizer

import grass_compile
from benchmarks import measure
from benchmarks.record import ROOT
from grass_compile.keywords import PROJECT

sys.path.insert(0, str(ROOT / "examples"))  # the demo is a folder of scripts, which import each other by bare names

from training import Event, TrainConfig, train

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 128, "intermediate_size": 344, "layers": 4, "heads": 4, "steps": 500, "warmup_share": 0.2},
    "large": {"hidden_size": 256, "intermediate_size": 688, "layers": 4, "heads": 4, "steps": 500, "warmup_share": 0.2},
}
"""The demo's LLaMA at two sizes; both see the same batches of 8 x 256 bytes. A long warm-up does every method good, dense
training most. Much fewer steps end on the plateau of a bigram model, where methods rank otherwise than later."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: ``dense``, ``lora``, a peer's package, or the name of one of our optimizers.
        size: a key of `SIZES`.
        lr: of the blocks' linear weights (of LoRA's adapters).
        dense_lr: of everything else, which every method trains alike.
        rank: as a share of the width, ``d / rank_share``; 0 for dense training.
        keywords: of the optimizer.
        seed: of the model, the batches and the selection.
        steps: 0 for the size's own.
        queries: factor on the rate of the query and key projections.
    """

    method: str
    size: str
    lr: float
    dense_lr: float
    rank_share: float = 0
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    steps: int = 0
    queries: float = 1.0

    @property
    def label(self) -> str:
        words = [self.method, *([f"d/{self.rank_share:.3g}"] if self.rank_share else [])]
        words += [f"{value}" if isinstance(value, str) else f"{key}={value}" for key, value in self.keywords.items()]
        words += [f"queries x{self.queries:g}"] if self.queries != 1 else []
        words += [f"{self.steps} steps"] if self.steps else []
        return " ".join([*words, f"lr {self.lr:g}", *([f"seed {self.seed}"] if self.seed else [])])

    def training(self) -> TrainConfig:
        """The same as the demo's training has it; the optimizer is made here."""
        size = {**SIZES[self.size], **({"steps": self.steps} if self.steps else {})}
        return TrainConfig(lr=self.lr, seed=self.seed, **size)


PEERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "galore": ("galore_torch:GaLoreAdamW", {"scale": 0.25}, {"no_deprecation_warning": True}),
    "apollo": ("apollo_torch:APOLLOAdamW", {"proj": "random", "scale_type": "channel", "scale": 1.0}, {}),
    "fira": ("fira:FiraAdamW", {"alpha": 0.25}, {"no_deprecation_warning": True}),
}
"""The optimizer, the keywords of its low-rank groups, its own."""


def optimizer_of(run: Run, model: Any) -> tuple[Optimizer, str]:
    """The optimizer of a run, and the backend to compile with. LoRA changes the model."""
    rank = round(model.config.hidden_size / run.rank_share) if run.rank_share else None
    if run.method == "lora":
        return _lora(run, model, rank), "inductor"
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in run.keywords.items()}
    ours = run.method[0].isupper()
    project = {key: own.pop(key) for key in run.keywords if key in PROJECT} if ours else {}
    if "projection" in project:
        project["stagger"] = False
    groups = grass_compile.param_groups(model, lr=run.lr, dense_lr=run.dense_lr, query_key_factor=run.queries, **project)
    if ours:
        return getattr(grass_compile, run.method)(
            groups, lr=run.lr, rank=rank, seed=run.seed, step_in_backward=True, **{"weight_decay": 0.0, **own}
        ), "grass"
    *groups, plain = [{"params": [p for _, p in group["params"]], "lr": group["lr"]} for group in groups]
    if run.method == "dense":
        return torch.optim.AdamW([*groups, plain], lr=run.lr, weight_decay=0.0, fused=True), "inductor"
    name, keywords, quiet = PEERS[run.method]
    keywords = {"rank": rank, "update_proj_gap": 50, "proj_type": "std", **keywords, **own}
    low_rank = [{**group, **keywords} for group in groups]
    return pkgutil.resolve_name(name)([*low_rank, plain], lr=run.lr, weight_decay=0.0, **quiet), "inductor"


def _lora(run: Run, model: Any, rank: int | None) -> Optimizer:
    """Adapters on the linear layers of the blocks, whose own weights are frozen; everything else trains."""
    import peft

    *linear, rest = grass_compile.param_groups(model, lr=run.lr)
    names = {name.split(".")[-2] for group in linear for name, _ in group["params"]}
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=sorted(names))
    peft.inject_adapter_in_model(config, model)
    for _, parameter in rest["params"]:
        parameter.requires_grad_(True)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    groups = [{"params": adapters}, {"params": [p for _, p in rest["params"]], "lr": run.dense_lr}]
    return torch.optim.AdamW(groups, lr=run.lr, weight_decay=0.0, fused=True)


def main() -> None:
    """Train, print."""
    run, events = Run(**json.loads(sys.argv[1])), sys.stdout
    made: list[Optimizer] = []

    def emit(event: Event) -> None:
        print(json.dumps(event), file=events, flush=True)

    def prepare(model: Any, config: TrainConfig) -> tuple[Optimizer, str]:
        optimizer, backend = optimizer_of(run, model)
        made.append(optimizer)
        return optimizer, backend

    with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no event
        result = train(run.training(), emit, prepare)
        result["optimizer_state_bytes"] = measure.tensor_bytes(measure.state_tensors(made[0]))  # projections too
        emit({"event": "result", **result})


if __name__ == "__main__":
    main()

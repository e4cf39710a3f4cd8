"""One training run of the demo: a small LLaMA on bytes, dense or with grass, measured as it goes.

`train()` is what the demo and `benchmarks/sweep.py` share. As a program this file takes a `TrainConfig` as JSON and
prints one JSON event a line: each run has a process to itself, so that its peak memory and compile time are its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import grass_compile
from corpus import VOCABULARY, Corpus, bigram_loss, even_windows, load_corpus, sample_windows
from measure import PeakMemory, StepClock
from optimizers import build_optimizer

Event = dict[str, Any]
Prepare = Callable[[Any, "TrainConfig"], tuple[torch.optim.Optimizer, str]]

# Dense training compiles at its first step. Grass does too, and about its third once more, since only then weights begin to move
# inside the backward (`step_in_backward="auto"`): the loop has shown by then that nothing reads a gradient before `step()`.
COMPILING_STEPS = 4


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run. `rank=None` is dense training with `torch.optim`; with a rank the optimizer is one of ours."""

    lr: float
    rank: int | None = None
    optimizer: str = "AdamW"  # or "Muon"
    axis: str = "columns"
    update_proj_gap: int = 50
    on_refresh: str = "carry"
    selection: str = "uniform"
    stagger: bool = True
    dense_lr: float | None = None  # for what grass leaves dense, and dense Muon to AdamW; None: `lr`
    query_lr_factor: float = 2.0  # on the rate of the query and key projections, which have farther to go; but not of dense AdamW

    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4

    steps: int = 220
    batch_size: int = 8
    sequence_length: int = 256
    warmup_share: float = 0.2
    final_lr_share: float = 0.1
    validations: int = 11
    validation_windows: int = 64
    seed: int = 0
    device: str = "cpu"
    text: str | None = None  # a folder; None: the Python standard library


def prepare(model: LlamaForCausalLM, config: TrainConfig) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and the backend to compile with."""
    return build_optimizer(model, config), "inductor" if config.rank is None else "grass"


def train(config: TrainConfig, report: Callable[[Event], None], prepare: Prepare = prepare) -> Event:
    """Train as `config` says and return what was measured.

    Args:
        config: what to train, on what, for how long.
        report: gets an event for each step and validation.
        prepare: makes the optimizer, and may change the model; returns it and the backend to compile with.
    """
    corpus = load_corpus(config.text)
    validation = even_windows(corpus.held_out, config.validation_windows, config.sequence_length)
    model = build_model(config)
    optimizer, backend = prepare(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, config))
    compiled = torch.compile(model, backend=backend)
    memory, clock = PeakMemory(config.device), StepClock(COMPILING_STEPS)

    curve: list[Event] = []
    for step, ids in enumerate(batches(corpus, config)):
        if is_validation_step(step, config):
            with memory.paused():
                curve.append({"step": step, "val_loss": evaluate(model, validation.to(config.device))})
            report({"event": "validation", **curve[-1]})
        if step == config.steps:
            break
        if step == COMPILING_STEPS:
            memory.restart()
            print(f"after {step} steps, weights move {weights_move(optimizer)}")
        with clock.step():
            train_loss = train_step(compiled, optimizer, ids)
        scheduler.step()
        report({"event": "step", "train_loss": train_loss})

    measured = {
        "val_loss": curve[-1]["val_loss"],
        "tokens_per_second": ids.numel() / clock.mean_step_seconds(),
        "train_seconds": clock.train_seconds(),
        "compile_seconds": clock.compile_seconds(),
        "peak_memory_bytes": memory.peak(),
        "optimizer_state_bytes": state_bytes(optimizer),
        "curve": [{**point, "seconds": clock.train_seconds(point["step"])} for point in curve],
    }
    return measured | describe(model, optimizer, corpus, validation, ids)


def build_model(config: TrainConfig) -> LlamaForCausalLM:
    """Hugging Face's LLaMA as it is, with bytes for a vocabulary."""
    torch.manual_seed(config.seed)
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.sequence_length,
        use_cache=False,
    )
    return LlamaForCausalLM(llama).to(config.device)


def lr_share(step: int, config: TrainConfig) -> float:
    """The share of the learning rate at `step`: a linear warm-up, then a cosine down to `final_lr_share`."""
    warmup = max(1, round(config.warmup_share * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.final_lr_share + (1 - config.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2


def batches(corpus: Corpus, config: TrainConfig) -> Iterator[Tensor]:
    """Training batches without end, `int64[batch_size, sequence_length]`; the seed alone decides them."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        ids = sample_windows(corpus.train, config.batch_size, config.sequence_length, generator)
        yield ids.to(config.device)


def train_step(compiled: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def is_validation_step(step: int, config: TrainConfig) -> bool:
    return step == config.steps or step % max(1, config.steps // config.validations) == 0


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch_size: int = 8) -> float:
    """Mean loss in nats per byte over `windows` (`int64[n, length]`), run eagerly: nothing more to compile."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in windows.split(batch_size)]
    model.train()
    return sum(loss.item() for loss in losses) / len(windows)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps from one step to the next."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def weights_move(optimizer: torch.optim.Optimizer) -> str:
    """Where weights move, in the backward or in `optimizer.step()`, and why."""
    return str(getattr(optimizer, "fused", "in opt.step()"))


def describe(model: nn.Module, optimizer: torch.optim.Optimizer, corpus: Corpus, validation: Tensor, ids: Tensor) -> Event:
    """What was trained on what, and what grass made of it (`projection`; None for a dense run)."""
    grass = type(optimizer).__module__.startswith("grass_compile")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": str(corpus),
        "bigram_loss": bigram_loss(corpus.train, validation),
        "projection": str(grass_compile.explain(model, input_ids=ids, labels=ids, optimizer=optimizer)) if grass else None,
        "weights_move": weights_move(optimizer),
    }


def main() -> None:
    events = sys.stdout

    def emit(event: Event) -> None:
        print(json.dumps(event), file=events, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no event
        emit({"event": "result", **train(TrainConfig(**json.loads(sys.argv[1])), emit)})


if __name__ == "__main__":
    main()

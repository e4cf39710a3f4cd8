"""A training script that may be killed at any moment and goes on from its last file; run by ``test_resume.py``.

``python -m tests.resume_script VARIANT FOLDER KILLS`` trains once undisturbed (``FOLDER/whole``) and once killed ``KILLS`` times
(``FOLDER/killed``). Every training process is forked from this one after the imports and before anything is computed, which saves
the seconds that a start takes; each compiles anew.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.compile_fx  # what a first compilation imports, before the forks
from torch import Tensor, nn

from . import paper

STEPS = 90
KEYWORDS: dict[str, dict[str, Any]] = {
    "fused": dict(rank=6, axis="rows", on_refresh="carry", stochastic_rounding=True, state_dtype=torch.bfloat16),
    "deferred": dict(rank=6, axis="columns", on_refresh="reset", step_in_backward=False, max_grad_norm=1.0),
    "accumulated": dict(rank=6, axis="auto", on_refresh="carry"),
    "adopted": dict(rank=6, axis="rows", on_refresh="carry"),
}
BEGIN, SAVE = b"b", b"s"


def build(variant: str) -> tuple[nn.Module, torch.optim.Optimizer, Any, Callable[..., Tensor]]:
    """A model, its optimizer, a cosine schedule, and the model compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 16, bias=False))
    model.to(torch.bfloat16 if variant == "fused" else torch.float32)
    options: dict[str, Any] = {"compiler": "aot_eager"}
    numbers = dict(lr=1e-2, weight_decay=0.1)
    optimizer: torch.optim.Optimizer
    if variant == "adopted":
        optimizer = torch.optim.AdamW(model.parameters(), **numbers)
        options |= paper.OPTIONS | KEYWORDS[variant] | {"update_proj_gap": 4}
    else:
        optimizer = paper.AdamW(model.named_parameters(), **numbers, update_proj_gap=4, **KEYWORDS[variant])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    return model, optimizer, scheduler, torch.compile(model, backend="grass", options=options)


def loss_at(compiled: Callable[..., Tensor], step: int, dtype: torch.dtype) -> Tensor:
    """The loss of one batch; ``step`` seeds it."""
    x, y = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(step))
    return (compiled(x.to(dtype)).float() - y[:, :16]).square().mean()


def one_step(variant: str, model: nn.Module, optimizer: Any, compiled: Callable[..., Tensor], step: int) -> float:
    """Forward, backward and update; the loss."""
    dtype = next(model.parameters()).dtype
    if variant == "accumulated":
        with optimizer.accumulate():
            for part in range(2):
                loss_at(compiled, 10_000 + 2 * step + part, dtype).backward()
    loss = loss_at(compiled, step, dtype)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train(variant: str, folder: pathlib.Path, tell: Callable[[bytes], Any]) -> None:
    """Train from the last file on, or from the start."""
    torch.set_num_threads(1)
    model, optimizer, scheduler, compiled = build(variant)
    file, begin = folder / "checkpoint.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        begin = saved["step"]
    log = os.open(folder / "losses", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for step in range(begin, STEPS):
        tell(BEGIN)
        loss = one_step(variant, model, optimizer, compiled, step)
        scheduler.step()
        os.write(log, f"{step} {loss.hex()}\n".encode())
        tell(SAVE)
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), step=step + 1)
        torch.save(state, folder / "unfinished.pt")
        os.replace(folder / "unfinished.pt", file)


# ------------------------------------------------------------------------------------------------------- who kills it


def start(variant: str, folder: pathlib.Path, last: float = math.inf) -> tuple[int, int]:
    """Fork a training process; its id, and a pipe on which it tells what it is about to do. It waits once it has told ``last``
    times, so that a kill which comes late, on a busy machine, still finds it."""
    folder.mkdir(exist_ok=True)
    heard, said = os.pipe()
    child = os.fork()
    if child:
        os.close(said)
        return child, heard
    status = 1
    try:
        os.close(heard)
        told = itertools.count(1)

        def tell(what: bytes) -> None:
            os.write(said, what)
            if next(told) >= last:
                time.sleep(3600)

        train(variant, folder, tell)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait_for(heard: int, what: bytes, times: int) -> None:
    """Read until ``what`` was told ``times`` times."""
    while times:
        told = os.read(heard, 1)
        if not told:
            raise SystemExit("the training process ended before it was to be killed")
        times -= told == what


def kill_somewhere(variant: str, folder: pathlib.Path, chance: random.Random, moment: str, took: dict[str, float]) -> None:
    """Start a training process, and kill it while it starts, steps or saves."""
    told, times = {"start": (BEGIN, (0,)), "step": (BEGIN, (2, 3)), "save": (SAVE, (1, 2, 3))}[moment]
    number = chance.choice(times)
    child, heard = start(variant, folder, last=2 * number + 3)  # it tells two things a step
    wait_for(heard, told, number)
    time.sleep(chance.uniform(0, took[moment]))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(heard)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise SystemExit(f"the training process ended by itself with status {status}")


def to_the_end(variant: str, folder: pathlib.Path) -> dict[str, float]:
    """Train undisturbed; returns how many seconds a start (with its compilation), a step and a save took."""
    begun = time.perf_counter()
    child, heard = start(variant, folder)
    times: dict[bytes, list[float]] = {BEGIN: [], SAVE: []}
    while told := os.read(heard, 1):
        times[told].append(time.perf_counter())
    os.close(heard)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("the training process failed")
    steps = sorted(save - begin for begin, save in zip(times[BEGIN], times[SAVE], strict=True))
    saves = sorted(begin - save for begin, save in zip(times[BEGIN][1:], times[SAVE], strict=False))
    return {"start": times[SAVE][0] - begun, "step": steps[len(steps) // 2], "save": saves[len(saves) // 2]}


def main(variant: str, where: str, kills: str) -> None:
    """Train once whole and once in pieces."""
    whole, killed = pathlib.Path(where) / "whole", pathlib.Path(where) / "killed"
    took = to_the_end(variant, whole)
    chance, torn, seen = random.Random(variant), 0, []
    for number in range(int(kills)):
        kill_somewhere(variant, killed, chance, ("step", "save", "start", "step", "save")[number % 5], took)
        torn += (killed / "unfinished.pt").exists()
        log = killed / "losses"
        seen.append(len(log.read_text().splitlines()) if log.exists() else 0)
    to_the_end(variant, killed)
    print(json.dumps({"kills": len(seen), "torn": torn, "seen": seen, "took": took}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A training script for ``torchrun`` in which a rank kills itself; run by ``test_failures.py``.

``torchrun --nproc-per-node 2 --max-restarts N -m tests.distributed.restart_script FOLDER MOMENT...`` trains a decoder under
``DistributedDataParallel`` and another under ``fully_shard``, a step of each in turn, and saves both after every other step: the
one in a file of rank 0, the other by ``torch.distributed.checkpoint``. Rank 1 kills itself at the first ``MOMENT`` in the first
attempt, at the second one in the second: ``ddp:5`` and ``fsdp:5`` are the middle of the backward in step 5, ``save:5`` is between
the two saves after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .breaking import AtCollective, kill_this_process
from .training import Trained, Training, batches, step_of

STEPS, EVERY = 9, 2
HOW = (("selection", "top"), ("step_in_backward", True))
KINDS = {"ddp": Training(HOW, place="blocks"), "fsdp": Training(HOW, place="blocks", mesh=(2,))}
"""Refreshes are due at the steps 0, 3 and 6."""


def write(folder: pathlib.Path, name: str, content: Any) -> None:
    """Write a file, all of it or none."""
    torch.save(content, folder / "unfinished")
    os.replace(folder / "unfinished", folder / name)


def save(run: Trained, kind: str, step: int, folder: pathlib.Path) -> None:
    """Save a run after some steps."""
    if kind == "fsdp":
        weights, state = get_state_dict(run.model, run.optimizer)
        dcp.save({"weights": weights, "state": state}, checkpoint_id=folder / f"step {step}")
        content: Any = None
    else:
        content = run.model.state_dict(), run.optimizer.state_dict()
    if dist.get_rank() == 0:
        write(folder, kind, {"step": step, "content": content})


def load(run: Trained, kind: str, folder: pathlib.Path) -> int:
    """Go on from what was saved last; returns after how many steps that is."""
    if not (folder / kind).exists():
        return 0
    saved = torch.load(folder / kind, weights_only=True)
    if kind == "fsdp":
        step_of(run, batches(1)[0])  # so that there is state to load into
        weights, state = get_state_dict(run.model, run.optimizer)
        dcp.load({"weights": weights, "state": state}, checkpoint_id=folder / f"step {saved['step']}")
        set_state_dict(run.model, run.optimizer, model_state_dict=weights, optim_state_dict=state)
    else:
        run.model.load_state_dict(saved["content"][0])
        run.optimizer.load_state_dict(saved["content"][1])
    return int(saved["step"])


def undisturbed() -> dict[str, Tensor]:
    """The weights at the end of runs of which nothing is saved."""
    found = {}
    for kind, training in KINDS.items():
        run = Trained(training)
        for tokens in batches(STEPS):
            step_of(run, tokens)
        found |= {f"{kind} {name}": weight for name, weight in run.weights().items()}
    return found


def main(where: str, *moments: str) -> None:
    """Train from what was saved last on, to the end or to where this rank is to be killed."""
    folder, attempt = pathlib.Path(where), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    at = moments[attempt] if dist.get_rank() == 1 and attempt < len(moments) else ""
    runs = {kind: Trained(training) for kind, training in KINDS.items()}
    begins = {kind: load(run, kind, folder) for kind, run in runs.items()}
    with (folder / f"begun {dist.get_rank()}").open("a") as log:
        print(json.dumps(begins), file=log)
    for step, tokens in enumerate(batches(STEPS)):
        for kind, run in runs.items():
            if step >= begins[kind]:
                killed = at == f"{kind}:{step}"
                with AtCollective(2, kill_this_process) if killed else contextlib.nullcontext():
                    step_of(run, tokens)
                if (step + 1) % EVERY == 0:
                    if at == f"save:{step}" and kind == "fsdp":
                        kill_this_process()
                    save(run, kind, step + 1, folder)
    weights = {f"{kind} {name}": weight for kind, run in runs.items() for name, weight in run.weights().items()}
    for run in runs.values():
        run.optimizer.check_agreement()
    if dist.get_rank() == 0:
        write(folder, "end", weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(*sys.argv[1:])
    dist.destroy_process_group()

"""Loops that save, load and copy. A run that goes on must equal, bit for bit, the one that was never interrupted."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch

from grass_compile.conformance.loop import Evidence, Loop, weights
from grass_compile.conformance.sequences.groups import change
from grass_compile.conformance.sequences.registry import exact_sequence


def through_a_file(state: Any, weights_only: bool) -> Any:
    """``torch.save`` and ``torch.load``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@exact_sequence
def roll_back(loop: Loop, right: Loop) -> Evidence:
    """``state_dict`` of model and optimizer are kept, and loaded again after two bad batches. Right: as if these had not been."""
    first, bad, rest = list(loop.batches(3)), list(loop.batches(2)), list(loop.batches(3))
    loop.train(first)
    state = copy.deepcopy(loop.state_dict())
    loop.train(bad)
    loop.load_state_dict(state)
    loop.train(rest)
    right.train([*first, *rest])
    return weights(loop, right)


@exact_sequence
def reload_from_file(loop: Loop, right: Loop) -> Evidence:
    """The state goes through ``torch.save`` and ``torch.load(weights_only=True)``. Right: as if nothing had happened."""
    first, rest = list(loop.batches(3)), list(loop.batches(3))
    loop.train(first)
    loop.load_state_dict(through_a_file(loop.state_dict(), weights_only=True))
    loop.train(rest)
    right.train([*first, *rest])
    return weights(loop, right)


@exact_sequence
def kill_and_resume(loop: Loop, right: Loop) -> Evidence:
    """A new model and a new optimizer go on from a checkpoint file. Right: bit for bit the run that went on."""
    first, rest = list(loop.batches(3)), list(loop.batches(3))
    loop.train(first)
    resumed = loop.another(seed=loop.seed + 1)
    resumed.load_state_dict(through_a_file(loop.state_dict(), weights_only=False))
    resumed.train(rest)
    right.train([*first, *rest])
    return weights(resumed, right)


@exact_sequence
def change_then_resume(loop: Loop, right: Loop) -> Evidence:
    """Rates and hyper-parameters are changed in mid-run, before the checkpoint. Right: bit for bit the run that went on."""
    first, middle, rest = list(loop.batches(2)), list(loop.batches(2)), list(loop.batches(3))
    for run in (loop, right):
        run.train(first)
        change(run)
        run.set_rate(0.5)
        run.train(middle)
    resumed = loop.another(seed=loop.seed + 1)
    resumed.load_state_dict(through_a_file(loop.state_dict(), weights_only=False))
    resumed.train(rest)
    right.train(rest)
    return weights(resumed, right)


@exact_sequence
def deepcopy(loop: Loop, right: Loop) -> Evidence:
    """``copy.deepcopy`` of model and optimizer together. Right: the copy goes on as the original would, which stays as it is."""
    first, rest = list(loop.batches(3)), list(loop.batches(3))
    loop.train(first)
    copied = loop.over(*copy.deepcopy((loop.net, loop.optimizer)))
    return _play_copy(loop, copied, right, first, rest)


@exact_sequence
def pickled(loop: Loop, right: Loop) -> Evidence:
    """``pickle`` of model and optimizer together. Right: the copy goes on as the original would, which stays as it is."""
    first, rest = list(loop.batches(3)), list(loop.batches(3))
    loop.train(first)
    copied = loop.over(*pickle.loads(pickle.dumps((loop.net, loop.optimizer))))
    return _play_copy(loop, copied, right, first, rest)


def _play_copy(loop: Loop, copied: Loop, right: Loop, first: list[Any], rest: list[Any]) -> Evidence:
    before = loop.weights()
    copied.train(rest)
    original = {f"original's {name}": (p, before[name]) for name, p in loop.weights().items()}
    right.train([*first, *rest])
    return weights(copied, right) | original

"""Loops that change what the optimizer was told: rates, hyper-parameters, which weights are trained."""

from __future__ import annotations

import torch

from grass_compile.conformance.loop import Evidence, Loop, NotApplicable, weights
from grass_compile.conformance.sequences.registry import sequence


@sequence
def scheduler(loop: Loop, right: Loop) -> Evidence:
    """A scheduler's ``step()`` after the optimizer's. Right: each step takes the rate that was set before its forward."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
    for batch in loop.batches(4):
        loop.train([batch])
        schedule.step()
        right.train_on(right.gradients(batch))
        right.set_rate(0.5)
    return weights(loop, right)


@sequence
def scheduler_first(loop: Loop, right: Loop) -> Evidence:
    """A scheduler's ``step()`` between backward and step, torch's order of long ago. Right: the step takes the new rate."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
    for batch in loop.batches(4):
        loop.backward(loop.loss(batch))
        schedule.step()
        loop.step()
        loop.zero_grad()
        right.set_rate(0.5)
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def rate_before_step(loop: Loop, right: Loop) -> Evidence:
    """``group["lr"] = …`` between backward and step, as pretraining scripts do. Right: the step takes the rate written last."""
    first = [float(group["lr"]) for group in loop.optimizer.param_groups]
    for number, batch in enumerate(loop.batches(4), start=1):
        loop.backward(loop.loss(batch))
        for group, rate in zip(loop.optimizer.param_groups, first, strict=True):
            group["lr"] = rate / number
        loop.step()
        loop.zero_grad()
        right.set_rate((number - 1 or 1) / number)
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def rate_of_zero(loop: Loop, right: Loop) -> Evidence:
    """The rate is zero in the last step. Right: nothing moves in it."""
    *before, last = loop.batches(4)
    loop.train(before)
    loop.set_rate(0.0)
    loop.train([last])
    for batch in before:
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def change_hyperparameters(loop: Loop, right: Loop) -> Evidence:
    """Weight decay and betas or momentum are changed in the groups in mid-run. Right: the next step takes the new ones."""
    for number, batch in enumerate(loop.batches(5)):
        if number == 2:
            change(loop)
            change(right)
        loop.train([batch])
        right.train_on(right.gradients(batch))
    return weights(loop, right)


def change(loop: Loop) -> None:
    """Write other hyper-parameters into every group, whichever of them it has."""
    for group in loop.optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.8, 0.95)
        if "momentum" in group:
            group["momentum"] = 0.5
        if "weight_decay" in group:
            group["weight_decay"] = 0.2


@sequence
def freeze_and_unfreeze(loop: Loop, right: Loop) -> Evidence:
    """A weight is frozen for two steps. Right: meanwhile neither it nor its state moves, and the others go on."""
    frozen = dict(loop.net.named_parameters())["head.weight"]
    for number, batch in enumerate(loop.batches(6)):
        frozen.requires_grad_(number not in (2, 3))
        loop.train([batch])
        gradients = right.gradients(batch)
        right.train_on({name: g for name, g in gradients.items() if frozen.requires_grad or name != "head.weight"})
    return weights(loop, right)


@sequence
def add_a_group(loop: Loop, right: Loop) -> Evidence:
    """A frozen layer is released and handed to ``add_param_group``. Right: as if it had been there without gradients."""
    if not [p for name, p in loop.net.named_parameters() if p.requires_grad and not name.startswith("head.")]:
        raise NotApplicable("it trains one layer at a time")
    partial = loop.another(frozen="head.")
    for number, batch in enumerate(partial.batches(5)):
        if number == 2:
            _add_head(partial, {name for name, p in loop.net.named_parameters() if p.requires_grad})
        partial.train([batch])
        gradients = right.gradients(batch)
        right.train_on({name: g for name, g in gradients.items() if number >= 2 or not name.startswith("head.")})
    return weights(partial, right)


def _add_head(loop: Loop, trainable: set[str]) -> None:
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    head = {name: p for name, p in loop.net.named_parameters() if name.startswith("head.") and name in trainable}
    if held & {id(p) for p in head.values()}:
        raise NotApplicable("it takes all parameters of the model, frozen or not")
    for p in head.values():
        p.requires_grad_()
    loop.add_group(head)

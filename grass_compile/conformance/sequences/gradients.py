"""Loops that do something to the gradients between ``backward()`` and ``step()``, or add to them."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor, nn

from grass_compile.conformance.loop import Evidence, Gradients, Loop, NotApplicable, weights
from grass_compile.conformance.sequences.registry import sequence


def norm_of(gradients: Gradients) -> Tensor:
    """The common 2-norm."""
    return torch.nn.utils.get_total_norm(gradients.values())


def scaled(gradients: Gradients, factor: float | Tensor) -> Gradients:
    """Each gradient times ``factor``."""
    return {name: gradient * factor for name, gradient in gradients.items()}


def added(*several: Gradients) -> Gradients:
    """The sum of gradients, in their order, as autograd adds them."""
    return {name: functools.reduce(torch.add, [gradients[name] for gradients in several]) for name in several[0]}


@sequence
def plain(loop: Loop, right: Loop) -> Evidence:
    """Nothing special. Right: each step moves the weights by the gradient of its batch."""
    for batch in loop.batches(4):
        loop.train([batch])
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def accumulate(loop: Loop, right: Loop) -> Evidence:
    """Four backwards for a step. Right: a step on the sum of their gradients."""
    for _ in range(3):
        parts = list(loop.batches(4))
        for batch in parts:
            loop.backward(loop.loss(batch) / 4)
        loop.step()
        loop.zero_grad()
        right.train_on(scaled(added(*map(right.gradients, parts)), 1 / 4))
    return weights(loop, right)


@sequence
def accumulate_in_context(loop: Loop, right: Loop) -> Evidence:
    """All backwards but the last in the optimizer's ``accumulate()``, as in DDP's ``no_sync()``. Right: a step on the sum."""
    if not hasattr(loop.optimizer, "accumulate"):
        raise NotApplicable("it has no context for accumulation; see 'accumulate'")
    for _ in range(3):
        parts = list(loop.batches(4))
        for number, batch in enumerate(parts):
            with loop.optimizer.accumulate() if number < 3 else contextlib.nullcontext():
                loop.backward(loop.loss(batch) / 4)
        loop.step()
        loop.zero_grad()
        right.train_on(scaled(added(*map(right.gradients, parts)), 1 / 4))
    return weights(loop, right)


@sequence
def clip_by_norm(loop: Loop, right: Loop) -> Evidence:
    """``torch.nn.utils.clip_grad_norm_``, with a limit that differs from step to step. Right: a step on the clipped gradient.

    The norm that it returns must be that of all gradients.
    """
    evidence: Evidence = {}
    for number, batch in enumerate(loop.batches(4)):
        limit = (0.1, 0.001)[number % 2]
        loop.backward(loop.loss(batch))
        seen = torch.nn.utils.clip_grad_norm_(loop.net.parameters(), limit)
        loop.step()
        loop.zero_grad()
        gradients = right.gradients(batch)
        norm = norm_of(gradients)
        right.train_on(scaled(gradients, (limit / (norm + 1e-6)).clamp(max=1.0)))
        evidence[f"norm in step {number}"] = seen, norm
    return weights(loop, right) | evidence


@sequence
def clip_by_value(loop: Loop, right: Loop) -> Evidence:
    """``torch.nn.utils.clip_grad_value_``. Right: a step on the clamped gradient."""
    for number, batch in enumerate(loop.batches(4)):
        limit = (1e-3, 1e-5)[number % 2]
        loop.backward(loop.loss(batch))
        torch.nn.utils.clip_grad_value_(loop.net.parameters(), limit)
        loop.step()
        loop.zero_grad()
        right.train_on({name: gradient.clamp(-limit, limit) for name, gradient in right.gradients(batch).items()})
    return weights(loop, right)


@sequence
def scale_gradients(loop: Loop, right: Loop) -> Evidence:
    """The script scales ``.grad`` in place, then replaces it by a multiple. Right: a step on what it wrote."""
    for number, batch in enumerate(loop.batches(4)):
        loop.backward(loop.loss(batch))
        for p in loop.net.parameters():
            if p.grad is not None:
                if number % 2:
                    p.grad = p.grad * 0.01
                else:
                    p.grad.mul_(0.1)
        loop.step()
        loop.zero_grad()
        right.train_on(scaled(right.gradients(batch), (0.1, 0.01)[number % 2]))
    return weights(loop, right)


@sequence
def drop_a_gradient(loop: Loop, right: Loop) -> Evidence:
    """The script sets one weight's ``.grad`` to ``None`` before a step. Right: the step does not touch this weight."""
    for number, batch in enumerate(loop.batches(4)):
        dropped = "head.weight" if number == 2 else None
        loop.backward(loop.loss(batch))
        for name, p in loop.net.named_parameters():
            if name == dropped:
                p.grad = None
        loop.step()
        loop.zero_grad()
        right.train_on({name: gradient for name, gradient in right.gradients(batch).items() if name != dropped})
    return weights(loop, right)


@sequence
def log_the_norm(loop: Loop, right: Loop) -> Evidence:
    """The script reads the norm of every ``.grad`` and logs it. Right: that of all gradients, and weights as without it."""
    evidence: Evidence = {}
    for number, batch in enumerate(loop.batches(4)):
        loop.backward(loop.loss(batch))
        read = [p.grad.norm() for p in loop.net.parameters() if p.grad is not None]
        seen = torch.stack(read).norm() if read else torch.zeros((), dtype=loop.subject.dtype)
        loop.step()
        loop.zero_grad()
        gradients = right.gradients(batch)
        right.train_on(gradients)
        evidence[f"norm in step {number}"] = seen, norm_of(gradients)
    return weights(loop, right) | evidence


@sequence
def penalty_on_weights(loop: Loop, right: Loop) -> Evidence:
    """A squared penalty on all weights, computed outside the model, is added to the loss. Right: the gradient of the sum."""
    for batch in loop.batches(4):
        trained = {name: p for name, p in loop.net.named_parameters() if p.requires_grad}
        penalty = torch.stack([p.square().sum() for p in trained.values()]).sum()
        loop.backward(loop.loss(batch) + penalty / 64)
        loop.step()
        loop.zero_grad()
        own = {name: p / 32 for name, p in right.weights().items()}
        right.train_on({name: gradient + own[name] for name, gradient in right.gradients(batch).items()})
    return weights(loop, right)


@sequence
def tensor_hook(loop: Loop, right: Loop) -> Evidence:
    """``weight.register_hook`` scales a gradient. Right: a step on what the hook returns."""
    factor = [1.0]
    _hooked_weight(loop).register_hook(lambda gradient: factor[0] * gradient)
    return _play_hooked(loop, right, factor)


@sequence
def hook_after_accumulation(loop: Loop, right: Loop) -> Evidence:
    """``weight.register_post_accumulate_grad_hook`` scales ``.grad``. Right: a step on what the hook leaves there."""
    factor = [1.0]

    def scale(p: Tensor) -> None:
        if p.grad is not None:
            p.grad.mul_(factor[0])

    _hooked_weight(loop).register_post_accumulate_grad_hook(scale)
    return _play_hooked(loop, right, factor)


def _hooked_weight(loop: Loop) -> nn.Parameter:
    return dict(loop.net.named_parameters())["head.weight"]


def _play_hooked(loop: Loop, right: Loop, factor: list[float]) -> Evidence:
    for batch, factor[0] in zip(loop.batches(4), (1.0, 0.1, 1.0, 0.01), strict=True):
        loop.train([batch])
        gradients = right.gradients(batch)
        right.train_on({name: factor[0] * g if name == "head.weight" else g for name, g in gradients.items()})
    return weights(loop, right)

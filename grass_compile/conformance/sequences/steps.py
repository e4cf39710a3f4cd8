"""Loops in which a step is skipped, fails, is told in another way, or has something beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grass_compile.conformance.loop import Batch, Evidence, Loop, NotApplicable, weights
from grass_compile.conformance.sequences.registry import sequence

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


@sequence
def skip_a_step(loop: Loop, right: Loop) -> Evidence:
    """A batch is dropped: ``zero_grad()`` without ``step()``. Right: as if the batch had not been."""
    for number, batch in enumerate(loop.batches(5)):
        loop.backward(loop.loss(batch))
        if number != 2:
            loop.step()
            right.train_on(right.gradients(batch))
        loop.zero_grad()
    return weights(loop, right)


@sequence
def skip_nan(loop: Loop, right: Loop) -> Evidence:
    """A batch makes NaN; the script looks at the gradients and drops it. Right: as if the batch had not been."""
    for number, (x, y) in enumerate(loop.batches(5)):
        batch = (x.clone().fill_(torch.nan), y) if number == 2 else (x, y)
        loop.backward(loop.loss(batch))
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in loop.net.parameters()):
            loop.step()
        loop.zero_grad()
        if number != 2:
            right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def grad_scaler(loop: Loop, right: Loop) -> Evidence:
    """``torch.amp.GradScaler``, and one batch whose gradients overflow. Right: unscaled steps, and none for that batch."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for number, batch in enumerate(loop.batches(5)):
        loss = loop.loss(batch)
        loop.backward(scaler.scale(loss * float("inf") if number == 2 else loss))
        scaler.step(loop.optimizer)
        scaler.update()
        loop.completed()
        loop.zero_grad()
        if number != 2:
            right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def closure(loop: Loop, right: Loop) -> Evidence:
    """``optimizer.step(closure)``, where the closure runs forward and backward. Right: as without one."""
    for batch in loop.batches(4):

        def evaluate(batch: Batch = batch) -> Tensor:
            loop.zero_grad()
            loss = loop.loss(batch)
            loop.backward(loss)
            return loss

        loop.step(evaluate)
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def zero_grad_to_zeros(loop: Loop, right: Loop) -> Evidence:
    """``zero_grad(set_to_none=False)``. Right: as with ``None``, since every weight has a gradient in every step."""
    for batch in loop.batches(4):
        loop.zero_grad(set_to_none=False)
        loop.backward(loop.loss(batch))
        loop.step()
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def evaluate_in_between(loop: Loop, right: Loop) -> Evidence:
    """The model is evaluated between forward and backward, and between backward and step. Right: as if it had not been."""
    for batch in loop.batches(4):
        loss = loop.loss(batch)
        with torch.no_grad():
            loop.loss(batch)
        loop.backward(loss)
        with torch.no_grad():
            loop.loss(batch)
        loop.step()
        loop.zero_grad()
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def leftover_batch(loop: Loop, right: Loop) -> Evidence:
    """The last batch of an epoch has one row. Right: a step on its gradient."""
    for rows in (16, 16, 1, 16):
        batch = next(loop.batches(1, rows))
        loop.train([batch])
        right.train_on(right.gradients(batch))
    return weights(loop, right)


@sequence
def offload_activations(loop: Loop, right: Loop) -> Evidence:
    """``saved_tensors_hooks`` that give back copies, as offloading and compression do. Right: as without them."""
    for batch in loop.batches(4):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda copy: copy):
            loss = loop.loss(batch)
        loop.backward(loss)
        loop.step()
        loop.zero_grad()
        right.train_on(right.gradients(batch))
    return weights(loop, right)


class OutOfMemory(RuntimeError):
    """What the sequences raise in the middle of a backward."""


class Products(TorchDispatchMode):
    """Counts matrix products, and runs out of memory in the one numbered ``fail_at``."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.fail_at = 0, fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.count += 1
            if self.count == self.fail_at:
                raise OutOfMemory("no memory for a matrix product")
        return func(*args, **(kwargs or {}))


@sequence
def exception_then_retry(loop: Loop, right: Loop) -> Evidence:
    """A backward runs out of memory at its last product; the script clears the gradients and repeats the batch.
    Right: as if the failed attempt had not been.
    """
    return _play_exception(loop, right, retry=True)


@sequence
def exception_then_skip(loop: Loop, right: Loop) -> Evidence:
    """A backward runs out of memory at its last product; the script clears the gradients and takes the next batch.
    Right: as if the batch had not been.
    """
    return _play_exception(loop, right, retry=False)


def _play_exception(loop: Loop, right: Loop, retry: bool) -> Evidence:
    *before, counted, failing, after = loop.batches(6)
    loop.train(before)
    loss = loop.loss(counted)
    with Products() as products:
        loop.backward(loss)
    loop.step()
    loop.zero_grad()
    if not products.count:
        raise NotApplicable("its backward shows no matrix product in which it could fail")

    loss = loop.loss(failing)
    try:
        with Products(fail_at=products.count):
            loop.backward(loss)
    except OutOfMemory:
        loop.zero_grad()
    else:
        raise NotApplicable("its backward did fewer products than the one before")
    rest = [failing, after] if retry else [after]
    loop.train(rest)
    for batch in (*before, counted, *rest):
        right.train_on(right.gradients(batch))
    return weights(loop, right)

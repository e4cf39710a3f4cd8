"""Loops with several losses, models or threads."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from grass_compile.conformance.loop import Batch, Evidence, Loop, weights
from grass_compile.conformance.sequences.gradients import added
from grass_compile.conformance.sequences.registry import isolated_sequence, sequence

ROUNDS = 3


@sequence
def two_losses(loop: Loop, right: Loop) -> Evidence:
    """Two losses of one forward, each with a backward (``retain_graph=True``). Right: a step on the sum of the gradients."""
    for batch in loop.batches(4):
        x, y = batch
        out = loop.model(x)
        loop.backward(out.square().mean(), retain_graph=True)
        loop.backward((out - y).abs().mean())
        loop.step()
        loop.zero_grad()
        one = right.gradients_of(lambda model, x=x: model(x).square().mean())  # type: ignore[misc]
        two = right.gradients_of(lambda model, x=x, y=y: (model(x) - y).abs().mean())  # type: ignore[misc]
        right.train_on(added(one, two))
    return weights(loop, right)


@sequence
def two_forwards(loop: Loop, right: Loop) -> Evidence:
    """Two forwards, then one backward of both losses, as contrastive training does. Right: a step on the sum."""
    for _ in range(3):
        one, two = loop.batches(2)
        loop.backward(loop.loss(one) + loop.loss(two))
        loop.step()
        loop.zero_grad()
        right.train_on(added(right.gradients(one), right.gradients(two)))
    return weights(loop, right)


@sequence
def adversarial(loop: Loop, right: Loop) -> Evidence:
    """A GAN, generator first: its loss passes through the discriminator, whose stray gradients are cleared.
    Right: each moves by its own loss.

    The loop under test is the discriminator, and another of the same kind the generator.
    """
    generator, right_generator = loop.another(seed=loop.seed + 1), right.another(seed=right.seed + 1)

    for real, noise in loop.batches(4):
        fake = generator.model(noise)
        generator.backward((loop.model(fake) - 1).square().mean())
        generator.step()
        generator.zero_grad()
        loop.zero_grad()
        loop.backward(_discriminate(loop, real, fake.detach()))
        loop.step()
        loop.zero_grad()

        fake = right_generator.net(noise).detach()
        of_generator = right_generator.gradients_of(
            lambda model, noise=noise: (right.net(model(noise)) - 1).square().mean()  # type: ignore[misc]
        )
        right_generator.train_on(of_generator)
        right.train_on(
            right.gradients_of(
                lambda model, real=real, fake=fake: (model(real) - 1).square().mean() + model(fake).square().mean()  # type: ignore[misc]
            )
        )
    return weights(loop, right) | weights(generator, right_generator, "generator's ")


def _discriminate(loop: Loop, real: Tensor, fake: Tensor) -> Tensor:
    return (loop.model(real) - 1).square().mean() + loop.model(fake).square().mean()


@isolated_sequence
def two_threads(loop: Loop, right: Loop) -> Evidence:
    """Two models of one class, each trained in a thread of its own from the first step on. Right: each as if alone.

    Forwards, backwards and steps overlap with their like, and the interpreter changes threads as often as it can. What compiles
    does so inside the threads. A race is not lost every time, so there are several rounds.
    """
    sys.setswitchinterval(1e-5)
    evidence: Evidence = {}
    for number in range(ROUNDS):
        torch.compiler.reset()
        seeds = (loop.seed + 2 * number, loop.seed + 2 * number + 1)
        evidence |= _race([loop.another(seed) for seed in seeds], [right.another(seed) for seed in seeds])
    return evidence


def _race(loops: list[Loop], rights: list[Loop]) -> Evidence:
    batches = [list(loop.batches(4)) for loop in loops]
    together = threading.Barrier(len(loops), timeout=300)
    with ThreadPoolExecutor(len(loops)) as threads:
        done = [threads.submit(_train_in_lockstep, loop, own, together) for loop, own in zip(loops, batches, strict=True)]
    errors = [error for future in done if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error

    evidence: Evidence = {}
    for loop, right, own in zip(loops, rights, batches, strict=True):
        for batch in own:
            right.train_on(right.gradients(batch))
        evidence |= weights(loop, right, f"model {loop.seed}'s ")
    return evidence


def _train_in_lockstep(loop: Loop, batches: list[Batch], together: threading.Barrier) -> None:
    try:
        for batch in batches:
            loss = loop.loss(batch)
            together.wait()
            loop.backward(loss)
            together.wait()
            loop.step()
            loop.zero_grad()
            together.wait()
    except BaseException:
        together.abort()
        raise

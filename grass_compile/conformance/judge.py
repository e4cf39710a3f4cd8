"""What came of a sequence: right, refused, broken, silently wrong, or not applicable."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import io
import linecache
import logging
import math
import re
import time
import traceback
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from grass_compile.conformance.child import ChildError, in_child
from grass_compile.conformance.loop import Evidence, Loop, NotApplicable, Subject, weights
from grass_compile.conformance.sequences.registry import Sequence

ACCIDENTS = (AssertionError, AttributeError, LookupError, NameError, ArithmeticError, RecursionError)
"""Built-in exceptions that tell of a mistake in the code and not of one in the loop."""
SENTENCE = 5
"""Words that a refusal has at least."""
INTERNAL = re.compile(r"OpOverload|aten::|INTERNAL ASSERT|While executing %|symbolically trace")
"""What stands in messages for developers of a library."""
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
PATHS = re.compile(r"(?<![\w.])(/[\w.-]+)+/")
PLAIN_STEPS = 6
MARGIN = 10
FLOOR = 100
"""Units of rounding that are always allowed: other orders of summation."""


class Outcome(enum.Enum):
    """What a user of this loop gets."""

    RIGHT = "right"
    ROUNDED = "right to rounding"
    REFUSED = "refused"
    REFUSED_LATE = "refused late"
    BROKEN = "broken"
    TOLD = "wrong, with a warning"
    WRONG = "silently wrong"
    NOT_APPLICABLE = "not applicable"
    UNAVAILABLE = "unavailable"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One sequence on one optimizer.

    Attributes:
        subject: the optimizer's name.
        sequence: the sequence's name.
        outcome: see `Outcome`.
        note: the exception's type and first sentence, the reason, or which value is off.
        difference: the largest relative difference of a weight (or of a norm that the loop read), where there is one.
        tolerance: up to which difference the outcome is right.
        seconds: how long it took.
    """

    subject: str
    sequence: str
    outcome: Outcome
    note: str = ""
    difference: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0


def judge(subject: Subject, sequence: Sequence, seed: int = 0) -> Cell:
    """Run one sequence on one optimizer.

    Args:
        subject: the optimizer.
        sequence: the training loop.
        seed: of the model and its batches.

    Returns:
        The outcome; no exception of the optimizer's gets out.
    """
    begin = time.perf_counter()
    with quiet(), torch.compiler.set_stance(subject.stance):
        cell = _judge(subject, sequence, seed)
    return dataclasses.replace(cell, seconds=time.perf_counter() - begin)


def _judge(subject: Subject, sequence: Sequence, seed: int) -> Cell:
    cell = functools.partial(Cell, subject.name, sequence.name)
    oracle = subject if sequence.exact or subject.oracle is None else subject.oracle
    try:
        loop, right = subject.start(seed), oracle.start(seed)
        tolerance = rounding(subject.oracle or subject, seed)
    except ImportError as error:
        return cell(Outcome.UNAVAILABLE, f"not installed: pip install {subject.package} ({error})")
    except Exception as error:
        return cell(Outcome.UNAVAILABLE, f"cannot be set up here: {first_sentence(error)}")
    if reason := subject.not_applicable.get(sequence.name):
        return cell(Outcome.NOT_APPLICABLE, reason)
    if not sequence.isolated:
        return _play(sequence, loop, right, tolerance)
    try:
        return in_child(lambda: _play(sequence, loop, right, tolerance))
    except ChildError as error:
        return cell(Outcome.BROKEN, str(error))


def _play(sequence: Sequence, loop: Loop, right: Loop, tolerance: float) -> Cell:
    cell = functools.partial(Cell, loop.subject.name, sequence.name)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            evidence = sequence.play(loop, right)
    except NotApplicable as reason:
        return cell(Outcome.NOT_APPLICABLE, str(reason))
    except Exception as error:
        return cell(_outcome_of(error, loop), first_sentence(error))
    difference, where = largest_difference(evidence)
    if difference == 0.0 or (difference <= tolerance and not sequence.exact):
        return cell(Outcome.RIGHT, "", difference, tolerance)
    if difference <= tolerance:
        return cell(Outcome.ROUNDED, f"most in {where}", difference, tolerance)
    if own := [warning for warning in said if is_own(warning, loop)]:
        return cell(Outcome.TOLD, first_sentence(own[-1].message), difference, tolerance)  # type: ignore[arg-type]
    return cell(Outcome.WRONG, f"most in {where}", difference, tolerance)


def is_own(warning: warnings.WarningMessage, loop: Loop) -> bool:
    """Whether a warning is the optimizer's, rather than that of something else which the loop uses: it has a class of its own, or
    comes from the package that the optimizer is in."""
    package = type(loop.optimizer).__module__.partition(".")[0]
    of_class = warning.category.__module__.partition(".")[0]
    return of_class not in ("builtins", "torch") or (package != "torch" and f"/{package}/" in warning.filename)


def _outcome_of(error: Exception, loop: Loop) -> Outcome:
    if not is_refusal(error):
        return Outcome.BROKEN
    return Outcome.REFUSED_LATE if loop.has_moved() else Outcome.REFUSED


def is_refusal(error: Exception) -> bool:
    """Whether somebody meant to raise this and says why: a sentence, from a line that begins with ``raise``."""
    if len(str(error).split()) < SENTENCE or INTERNAL.search(str(error)):
        return False
    if isinstance(error, ACCIDENTS) and type(error).__module__ == "builtins":
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    return linecache.getline(last.filename, last.lineno or 0).lstrip().startswith("raise")


def first_sentence(error: BaseException, length: int = 200) -> str:
    """The exception's type and the beginning of its message, on one line, without where files lie on this machine."""
    message = " ".join(PATHS.sub("", ESCAPES.sub("", str(error))).split()).removesuffix(".")
    if len(message) > length:
        message = message[:length].rsplit(" ", 1)[0] + " …"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def largest_difference(evidence: Evidence) -> tuple[float, str]:
    """The largest of all relative differences, and the name of the value that it belongs to."""
    return max((relative_difference(*pair), name) for name, pair in evidence.items())


def relative_difference(got: Tensor, right: Tensor) -> float:
    """``max |got - right| / max |right|``; infinite where only one of them is finite."""
    got, right = got.detach().double(), right.detach().double()
    if torch.equal(got, right):
        return 0.0
    difference, scale = float((got - right).abs().max()), float(right.abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else math.inf


@functools.cache
def rounding(oracle: Subject, seed: int = 0) -> float:
    """The difference up to which two runs of an optimizer count as equal.

    The plain loop runs on gradients that are off by a unit in the last place of their largest element; what becomes of the
    weights, times `MARGIN`, is allowed, and at least `FLOOR` units. An optimizer that quantizes or decomposes makes more of a
    unit than one that only adds.
    """
    unit = torch.finfo(oracle.dtype).eps
    differences = [0.0]
    for noise in range(3):
        exact, noisy = oracle.start(seed), oracle.start(seed)
        generator = torch.Generator().manual_seed(noise)
        for batch in exact.batches(PLAIN_STEPS):
            gradients = exact.gradients(batch)
            exact.train_on(gradients)
            noisy.train_on({name: g + unit * g.abs().max() * _signs(g, generator) for name, g in noisy.gradients(batch).items()})
        differences.append(largest_difference(weights(noisy, exact))[0])
    return max(MARGIN * max(differences), FLOOR * unit)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what optimizers print, and without warnings but where they are looked for; one thread, and nothing compiled left
    behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            logging.disable()
            torch.manual_seed(0)
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.compiler.reset()
        torch.set_num_threads(threads)

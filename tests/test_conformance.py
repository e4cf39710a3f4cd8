"""The judge of the conformance suite, on optimizers that are wrong on purpose, and torch's own, which must be right."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass_compile.conformance.__main__ import main
from grass_compile.conformance.child import ChildError, in_child
from grass_compile.conformance.judge import Outcome, first_sentence, is_refusal, judge, relative_difference, rounding
from grass_compile.conformance.loop import Subject, trainable
from grass_compile.conformance.report import BEGIN, END
from grass_compile.conformance.sequences import SEQUENCES
from grass_compile.conformance.subjects import SUBJECTS, select

ADAMW = SUBJECTS["torch.optim.AdamW"]


class IgnoresClipping(torch.optim.SGD):
    """Steps on the gradients as the backward left them, whatever has become of them since."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.kept: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self.keep)

    def keep(self, p: Tensor) -> None:
        assert p.grad is not None
        self.kept[p] = p.grad.clone()

    def step(self, closure: Any = None) -> Any:
        for p, gradient in self.kept.items():
            p.grad = gradient
        self.kept.clear()
        return super().step(closure)


class Forgetful(torch.optim.SGD):
    """Loses its momentum when a state is loaded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})


class RoundsOnLoad(torch.optim.SGD):
    """Loses the last bit of its momentum when a state is loaded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum_buffer"].mul_(1 + 2**-52)


class MovesOn(torch.optim.SGD):
    """Takes no closure, and warns of it."""

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            warnings.warn("the closure was not called", Warned, stacklevel=2)
        return super().step()


class Warned(UserWarning):
    """A class of its own."""


class Refuses(torch.optim.SGD):
    """Takes no closure, and says so."""

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise ValueError("Refuses takes no closure; call backward() before step()")
        return super().step()


class RefusesLate(torch.optim.SGD):
    """The same, when the weights have moved."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if closure is not None:
            raise ValueError("RefusesLate takes no closure; call backward() before step()")


class Breaks(torch.optim.SGD):
    """Falls over a closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step() if closure is None else {}["closure"]


def of(optimizer: type[torch.optim.Optimizer], **keywords: Any) -> Subject:
    return Subject(optimizer.__name__, lambda net: optimizer(trainable(net), lr=0.1, momentum=0.9, **keywords))


def outcome(subject: Subject, sequence: str) -> Outcome:
    return judge(subject, SEQUENCES[sequence]).outcome


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_adamw_is_right_in_every_applicable_sequence(sequence: str) -> None:
    cell = judge(ADAMW, SEQUENCES[sequence])
    expected = Outcome.NOT_APPLICABLE if sequence == "accumulate in context" else Outcome.RIGHT
    assert cell.outcome is expected, cell


def test_an_optimizer_that_ignores_clipping_is_silently_wrong() -> None:
    subject = of(IgnoresClipping)
    cell = judge(subject, SEQUENCES["clip by norm"])
    assert cell.outcome is Outcome.WRONG
    assert cell.difference is not None and cell.difference > 1e-2
    assert outcome(subject, "clip by value") is Outcome.WRONG
    assert outcome(subject, "plain") is Outcome.RIGHT
    assert outcome(subject, "accumulate") is Outcome.RIGHT


@pytest.mark.parametrize("sequence", ["roll back", "reload from file", "kill and resume", "change then resume"])
def test_an_optimizer_that_loses_its_state_on_reload_is_silently_wrong(sequence: str) -> None:
    assert outcome(of(Forgetful), sequence) is Outcome.WRONG
    assert outcome(of(torch.optim.SGD), sequence) is Outcome.RIGHT


def test_a_last_bit_lost_on_reload_is_no_bit_for_bit() -> None:
    assert outcome(of(RoundsOnLoad), "kill and resume") is Outcome.ROUNDED


def test_a_warning_is_quoted() -> None:
    cell = judge(of(MovesOn), SEQUENCES["closure"])
    assert cell.outcome is Outcome.TOLD and cell.note == "Warned: the closure was not called"
    assert cell.difference is not None and cell.difference > 1e-2


def test_a_refusal_is_quoted() -> None:
    cell = judge(of(Refuses), SEQUENCES["closure"])
    assert cell.outcome is Outcome.REFUSED
    assert cell.note == "ValueError: Refuses takes no closure; call backward() before step()"
    assert outcome(of(Refuses), "plain") is Outcome.RIGHT


def test_a_refusal_of_what_has_moved_is_late() -> None:
    assert outcome(of(RefusesLate), "closure") is Outcome.REFUSED_LATE


def test_an_accident_is_no_refusal() -> None:
    cell = judge(of(Breaks), SEQUENCES["closure"])
    assert cell.outcome is Outcome.BROKEN
    assert cell.note == "KeyError: 'closure'"


def test_an_optimizer_that_is_not_installed_says_what_to_install() -> None:
    def build(net: nn.Module) -> Any:
        raise ImportError("No module named 'elsewhere'")

    cell = judge(Subject("elsewhere.Adam", build, package="elsewhere"), SEQUENCES["plain"])
    assert cell.outcome is Outcome.UNAVAILABLE
    assert "pip install elsewhere" in cell.note


def test_a_wrong_oracle_is_seen() -> None:
    """The oracle is the other subject's plain loop, and no run of the subject's own."""
    other = Subject("twice", lambda net: torch.optim.SGD(trainable(net), lr=0.2, momentum=0.9))
    subject = Subject("once", lambda net: torch.optim.SGD(trainable(net), lr=0.1, momentum=0.9), oracle=other)
    assert outcome(subject, "plain") is Outcome.WRONG
    assert outcome(subject, "kill and resume") is Outcome.RIGHT


def test_tolerance_is_of_the_size_of_rounding() -> None:
    assert 1e-14 < rounding(of(torch.optim.SGD)) < 1e-12


def raised(error: Callable[[], Any]) -> Exception:
    try:
        error()
    except Exception as caught:
        return caught
    raise AssertionError


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: raise_(ValueError("clip the gradients with max_grad_norm= instead")), True),
        (lambda: raise_(ValueError("no closure")), False),
        (lambda: raise_(AssertionError("the gradient of this weight is None")), False),
        (lambda: raise_(NotImplementedError("this tensor has no <OpOverload(op='aten.clone')> of its own")), False),
        (lambda: torch.zeros(1).backward(), False),
        (lambda: torch.zeros(1).no_such_attribute, False),
    ],
)
def test_what_counts_as_a_refusal(error: Callable[[], Any], expected: bool) -> None:
    assert is_refusal(raised(error)) is expected


def test_a_note_names_no_folder_of_this_machine() -> None:
    assert (
        first_sentence(ValueError("in /home/me/model.py, \x1b[1mline 3\x1b[0m:\n and/or"))
        == "ValueError: in model.py, line 3: and/or"
    )


@pytest.mark.parametrize(
    ("got", "right", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 0.5),
        ([0.0], [0.0], 0.0),
        ([1.0], [0.0], torch.inf),
        ([torch.nan, 1.0], [1.0, 1.0], torch.inf),
        ([1.0], [torch.nan], torch.inf),
    ],
)
def test_relative_difference(got: list[float], right: list[float], expected: float) -> None:
    assert relative_difference(torch.tensor(got), torch.tensor(right)) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork, nothing runs in a child")
def test_a_child_that_dies_or_hangs_is_reported() -> None:
    assert in_child(lambda: 3) == 3
    with pytest.raises(ChildError, match="exit code 5"):
        in_child(lambda: os._exit(5))
    with pytest.raises(ChildError, match="no end"):
        in_child(lambda: __import__("time").sleep(60), timeout=0.2)


def test_the_command_line_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torch.optim.SGD", "--sequence", "clip by *", "--json", "--seed", "1", "--check"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(cell["sequence"], cell["outcome"]) for cell in found["cells"]] == [
        ("clip by norm", "right"),
        ("clip by value", "right"),
    ]
    assert found["environment"]["torch"] == torch.__version__
    assert found["seed"] == 1


def test_an_optimizer_from_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    forgetful = f"{__name__}:Forgetful"
    assert main([forgetful, "--sequence", "plain", "--check"]) == 0
    assert "Right in every applicable sequence: " in capsys.readouterr().out
    assert main([f"{__name__}:ForgetfulWithMomentum", "--sequence", "kill and resume", "--check"]) == 1
    assert "| kill and resume | **wrong " in capsys.readouterr().out


class ForgetfulWithMomentum(Forgetful):
    """As ``module:Class`` is built: with a rate only."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)


def test_markdown_replaces_the_tables_and_nothing_else(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\nbefore\n\n{BEGIN}\nold tables\n{END}\n\nafter\n")
    main(["torch.optim.SGD", "--sequence", "plain", "--markdown", str(page)])
    text = page.read_text()
    assert text.startswith("# Title\n\nbefore\n\n") and text.endswith("\n\nafter\n")
    assert "old tables" not in text and "Right in every applicable sequence: SGD." in text


@pytest.mark.parametrize("arguments", [["no.such.optimizer"], ["torch.optim.SGD", "--sequence", "no such sequence"]])
def test_unknown_names_are_refused_with_those_that_there_are(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "there are: " in capsys.readouterr().err


def test_every_subject_has_a_name_of_its_own_and_every_sequence_says_what_is_right() -> None:
    assert len(select([])) == len(SUBJECTS)
    for sequence in SEQUENCES.values():
        assert "Right: " in sequence.right, sequence.name
    for subject in SUBJECTS.values():
        assert set(subject.not_applicable) <= set(SEQUENCES), subject.name

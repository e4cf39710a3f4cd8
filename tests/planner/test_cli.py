"""``python -m grass_compile``, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import grass_compile
from grass_compile import cli
from grass_compile.cli import doctor
from grass_compile.cli import plan as command
from grass_compile.planner import questions
from grass_compile.planner.ledger import KINDS
from grass_compile.planner.request import OTHERS, Request
from grass_compile.planner.result import SLACK, Plan

SIZES = {"AdamW": 3 * 10**9, "adamw": 9 * 10**9}


@pytest.fixture
def _invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that cost nothing: what is tested is what becomes of them."""

    def invented(request: Request) -> Plan:
        size = SIZES.get(str(request.optimizer), 5 * 10**9)
        kinds = {**dict.fromkeys((*KINDS, SLACK), 0), "parameters": size}
        layers = {"layers.0": {"parameters": size}}
        method = f"grass {request.optimizer}" if request.optimizer == "AdamW" else str(request.optimizer)
        return Plan(
            str(request.model), method, {"batch": request.batch}, 10**9, size, "the update of step 1", kinds, (), 0, layers
        )

    monkeypatch.setattr(command, "of_request", invented)
    monkeypatch.setattr(questions, "of_request", invented)


ARGUMENTS = ("plan", "llama-1b", "--rank", "128", "--device", "cpu")


@pytest.mark.usefixtures("_invented")
@pytest.mark.parametrize(
    ("memory", "code", "says"), [("4GB", 0, "It fits"), ("2GB", 1, "1.00 GB are missing"), (None, 0, "3.00 GB")]
)
def test_exit_codes(memory: str | None, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, *(["--memory", memory] if memory else [])]) == code
    assert says in capsys.readouterr().out


@pytest.mark.usefixtures("_invented")
def test_json_has_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, "--memory", "4GB", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["memory_bytes"] == 4 * 10**9
    assert set(found["methods"]) == {"grass", *OTHERS}
    for name, method in found["methods"].items():
        assert set(method["bytes"]) == {*KINDS, SLACK} and sum(method["bytes"].values()) == method["peak_bytes"]
        assert method["fits"] == (name == "grass")


@pytest.mark.usefixtures("_invented")
def test_a_comparison_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, "--memory", "4GB", "--compare", "adamw", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "grass AdamW  fits" in out and "adamw  does not fit" in out and "layers.0" in out


@pytest.mark.usefixtures("_invented")
@pytest.mark.parametrize("question", [("--best",), ("--largest", "batch")])
def test_nothing_fits(question: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, *question, "--memory", "1GB", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["methods"] == {} and "fits" in found["reason"]


def test_an_error_that_nobody_foresaw_is_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(request: Request) -> Plan:
        raise RuntimeError("a GPU is on fire\nin line 3")

    monkeypatch.setattr(command, "of_request", breaks)
    assert cli.main(ARGUMENTS) == 2
    err = capsys.readouterr().err
    assert "RuntimeError: a GPU is on fire" in err and "Traceback" not in err and "line 3" not in err


@pytest.mark.usefixtures("_invented")
def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main([*ARGUMENTS, "--memory", "4GB", "--png", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


BAD = {
    "no such model": (("plan", "nonsense", "--rank", "8", "--device", "cpu"), "neither a built-in name"),
    "no rank": (("plan", "llama-1b", "--device", "cpu"), "--rank is missing"),
    "no size": ((*ARGUMENTS, "--memory", "much"), "is no size"),
    "no memory": ((*ARGUMENTS, "--largest", "batch"), "need --memory"),
    "no value": ((*ARGUMENTS, "--set", "axis"), "is not NAME=VALUE"),
    "no optimizer": ((*ARGUMENTS, "--optimizer", "adam"), "must be one of"),
    "rank": (("plan", "llama-60m", "--rank", "4000", "--device", "cpu"), "above the width"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence_and_exit_code_two(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, says = BAD[name]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(("--debug", "plan", "nonsense", "--rank", "8", "--device", "cpu")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["doctor"]) == 0
    assert f"grass_compile {grass_compile.__version__}" in capsys.readouterr().out
    monkeypatch.setattr(doctor.torch, "__version__", "2.9.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "torch 2.9.0 is not supported. Install torch" in out and "no C++ compiler" in out


def test_a_reader_that_has_read_enough() -> None:
    """As ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "grass_compile", "doctor"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 141 and b"Broken" not in done.stderr


def test_as_a_module() -> None:
    """And by its own name, see pyproject.toml."""
    done = subprocess.run([sys.executable, "-m", "grass_compile", "--help"], capture_output=True, text=True, check=True)
    assert "plan" in done.stdout and "doctor" in done.stdout

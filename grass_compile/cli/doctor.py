"""``grass-compile doctor``: what is installed, what will be slow or refused, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .. import _aot
from .._version import __version__
from ..planner.sizes import in_words

Level = Literal["fine", "slow", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line: how it stands, what was found, and what to do."""

    level: Level
    what: str
    advice: str = ""


def add(commands: Any) -> None:
    """Add the subcommand."""
    description = "Look at this machine. Exits with 1 if training cannot work here."
    commands.add_parser("doctor", help="what this machine has and lacks", description=description).set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found."""
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        print(f"{finding.level:>7}  {finding.what}{f'. {finding.advice}' if finding.advice else ''}")
    return 1 if any(finding.level == "broken" for finding in findings) else 0


def versions() -> Iterator[Finding]:
    """This package, torch and Python."""
    yield Finding("fine", f"grass_compile {__version__}, Python {platform.python_version()}, {platform.platform()}")
    try:
        wanted = next(text for text in importlib.metadata.requires("grass-compile") or () if text.startswith("torch"))
    except importlib.metadata.PackageNotFoundError:
        wanted = "one that is"
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if (2, 11) <= found < (2, 14):
        yield Finding("fine", f"torch {torch.__version__}")
    else:
        yield Finding("broken", f"torch {torch.__version__} is not supported", f"Install {wanted}.")


def entry_point() -> Iterator[Finding]:
    """Whether ``backend="grass"`` is found."""
    if "grass" in torch.compiler.list_backends():
        yield Finding("fine", 'torch.compile knows backend="grass"')
    else:
        yield Finding(
            "broken", 'torch.compile does not know backend="grass"', "Install the package (pip install .), do not only import it."
        )


def compiler() -> Iterator[Finding]:
    """What Inductor needs on a CPU."""
    found = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    if found:
        yield Finding("fine", f"a C++ compiler, {found}")
    else:
        yield Finding("broken", "no C++ compiler, which Inductor needs for a CPU", "Install g++, or name one in CXX.")


def gpu() -> Iterator[Finding]:
    """The GPU and Triton."""
    triton = importlib.util.find_spec("triton") is not None
    if not torch.cuda.is_available():
        yield Finding("fine", "no GPU; code is generated in C++")
        if not triton:
            yield Finding("slow", "no Triton, so plans are for device='cpu' alone", "Install triton.")
        return
    if not triton:
        yield Finding("broken", "a GPU without Triton", "Install triton, or a build of torch that brings it.")
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield Finding("fine", f"{found.name}, {in_words(found.total_memory)}, sm_{found.major}{found.minor}")
        if found.major < 8:
            yield Finding("slow", f"{found.name} has no bf16 in hardware", "Train in fp16 with a GradScaler, or in fp32.")
    if torch.get_float32_matmul_precision() == "highest":
        yield Finding("slow", "fp32 products do not use TF32", "torch.set_float32_matmul_precision('high') if you train in fp32.")


def processor() -> Iterator[Finding]:
    """What a CPU can and cannot do."""
    yield Finding("fine", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if not torch.cuda.is_available() and not _aot.cpu_has_bf16():
        yield Finding("slow", "this CPU has no instructions for bf16", "Train in fp32 here.")
    if not torch.cuda.is_available() and sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        yield Finding(
            "slow",
            "glibc gives freed memory back at every step and asks for it anew",
            "Set MALLOC_TRIM_THRESHOLD_=-1 and MALLOC_MMAP_MAX_=0: up to a tenth of a step in bf16.",
        )


def extras() -> Iterator[Finding]:
    """What only some commands need."""
    for name, use in (("transformers", "built-in models of `plan`"), ("matplotlib", "pictures of `plan`")):
        if importlib.util.find_spec(name) is None:
            yield Finding("slow", f"no {name}, which {use} need", f"pip install {name}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (versions, entry_point, compiler, gpu, processor, extras)

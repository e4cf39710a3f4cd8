"""The measuring side's parent: starts fresh processes, and writes results that name machine, versions and commit."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.model import DTYPES, Settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "grass-compile", "galore-torch", "apollo-torch", "bitsandbytes", "peft", "transformers", "numpy")
MIB = 2**20

Sample = dict[str, Any]


class MeasurementError(RuntimeError):
    """A measured process failed; the message ends with what it wrote to stderr."""


def launch(settings: Settings, cache: Path, timeout: float) -> dict[str, Any]:
    """Run one measurement in a fresh process whose compile caches live in `cache`.

    Raises:
        MeasurementError: The process failed or took longer than `timeout` seconds.
    """
    cache.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(settings.threads),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(settings.as_dict()), str(output)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"no result within {timeout:.0f} s") from error
        if done.returncode or not output.exists():
            tail = "\n".join(done.stderr.strip().splitlines()[-25:])
            raise MeasurementError(f"exit code {done.returncode}\n{tail}")
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def attempt(settings: Settings, cache: Path, timeout: float, label: str, failures: list[str]) -> dict[str, Any] | None:
    """`launch`, or None with a line more in `failures`: one method's failure is not the end of the others."""
    try:
        return launch(settings, cache, timeout)
    except MeasurementError as error:
        failures.append(f"{label}: {error}")
        tqdm.write(failures[-1], file=sys.stderr)
        return None


def add_settings(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Give the parser an option for each measured quantity of `Settings` that a user may choose."""
    chosen = {f.name: f.default for f in fields(Settings)} | defaults
    for name in ("d", "layers", "ffn", "batch", "seq", "rank", "threads", "warmup", "steps"):
        parser.add_argument(f"--{name}", type=int, default=chosen[name], help=f"default {chosen[name]}")
    parser.add_argument("--micro-batches", type=int, default=chosen["micro_batches"], help="backwards per step (default 1)")
    parser.add_argument("--dtype", choices=list(DTYPES), default=chosen["dtype"], help=f"default {chosen['dtype']}")
    parser.add_argument("--device", default=chosen["device"], help=f"default {chosen['device']}")
    parser.add_argument("--gap", type=int, default=0, help="steps between refreshes; 0: warmup + steps (default)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds one process may take (default 1800)")
    parser.add_argument("--out", type=Path, help="JSON file (default: a name made of the settings, in results/)")


def settings_of(arguments: argparse.Namespace, method: str, **overrides: Any) -> Settings:
    """The parsed options as the settings of one method."""
    names = {f.name for f in fields(Settings)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return Settings(**(values | overrides | {"method": method}))


def default_output(benchmark: str, settings: Settings) -> Path:
    """A file name that says what was measured; the same measurement again replaces it."""
    size = f"d{settings.d}-l{settings.layers}-f{settings.ffn}-b{settings.batch}x{settings.seq}-r{settings.rank}"
    accumulated = f"-x{settings.micro_batches}" if settings.micro_batches > 1 else ""
    where = f"t{settings.threads}" if settings.device == "cpu" else settings.device
    return RESULTS / f"{benchmark}-{size}-{settings.dtype}-{where}{accumulated}.json"


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def circumstances() -> dict[str, Any]:
    """Date, commit, machine and versions of a result."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "grass_compile", "benchmarks", ":!benchmarks/results")),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "system": platform.platform(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def write(path: Path, benchmark: str, arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    """Write one result file."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    options.pop("out", None)
    result = {"benchmark": benchmark, **circumstances(), "options": options, **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {path}")


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least and greatest of the values that are there; None if none is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return {"median": statistics.median(there), "min": min(there), "max": max(there), "count": len(there)}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal, the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def number(value: dict[str, float] | float | None, form: str = ".2f", unit: float = 1.0) -> str:
    """A table cell: a value, or the median of a `spread`; a dash where there is none."""
    middle = value["median"] if isinstance(value, dict) else value
    return "-" if middle is None else format(middle / unit, form)


def span(value: dict[str, float] | None) -> str:
    """A table cell: the median of a `spread`, and its extremes if there was more than one value."""
    if value is None:
        return "-"
    return f"{value['median']:.1f}" + (f" ({value['min']:.1f}-{value['max']:.1f})" if value["count"] > 1 else "")

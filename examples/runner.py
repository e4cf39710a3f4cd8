"""Runs `training.py` in a fresh process, with a progress bar, and hands back what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from training import Event, TrainConfig


def run(config: TrainConfig, label: str, log: Path) -> Event:
    """Train as `config` says in a process of its own; what it says on standard error goes to the file `log`.

    Inductor's cache is a new folder each time, so that every run pays for its compilation and can report it.

    Raises:
        RuntimeError: the run failed; the message ends in the last lines of its log.
    """
    command = [sys.executable, str(Path(__file__).with_name("training.py")), json.dumps(asdict(config))]
    with tempfile.TemporaryDirectory() as cache:
        return run_command(command, config.steps, label, log, {"TORCHINDUCTOR_CACHE_DIR": cache})


def run_command(command: list[str], steps: int, label: str, log: Path, environment: dict[str, str]) -> Event:
    """Run a program that prints the events of a training run of so many steps, and return the last of them.

    Raises:
        RuntimeError: the program failed; the message ends in the last lines of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment})
        try:
            result = _follow(process, steps, label)
        finally:
            process.kill()
            process.wait()
        if result is None:
            errors.seek(0)
            tail = "".join(errors.readlines()[-15:])
            raise RuntimeError(f"the run '{label}' failed; the end of {log}:\n{tail}")
    return result


def _follow(process: subprocess.Popen[str], steps: int, label: str) -> Event | None:
    """Show the events of a run as they come; the last of them is its result, None if it ended without one."""
    assert process.stdout is not None
    shown = {"val": "?", "train": "compiling"}
    with tqdm(total=steps, desc=label, unit="step", dynamic_ncols=True) as bar:
        bar.set_postfix(shown)
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "result":
                return event
            if event["event"] == "step":
                shown["train"] = f"{event['train_loss']:.3f}"
            else:
                shown["val"] = f"{event['val_loss']:.3f}"
            bar.set_postfix(shown, refresh=False)
            bar.update(event["event"] == "step")
    return None

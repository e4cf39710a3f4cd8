"""Processes of a group that wait for functions to run, so that tests start them once."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = ["tests.distributed.training", "torch._inductor.compile_fx"]
"""Modules that a server of processes imports once, before anything is computed; each process is forked from it."""


class Ranks:
    """A group of processes over loopback. Calling it runs a function of a module on each of them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.size, self._pipes, self._processes = size, [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "store"), there), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Any, *args: Any, **keywords: Any) -> list[Any]:
        """The result of ``function(*args, **keywords)`` on each rank; where it raised, the exception, and the
        pipe's where the process has ended. It has to be one of a module, and its results have to be picklable."""
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, args, keywords))
        return [_received(pipe) for pipe in self._pipes]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError) as error:
        return error


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(size))
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120)
    )
    while (task := pipe.recv()) is not None:
        module, name, args, keywords = task
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            result = getattr(importlib.import_module(module), name)(*args, **keywords)
        except Exception as error:
            error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
            result = error
        try:
            pipe.send(result)
        except Exception as error:  # not everything can be pickled, some exceptions among it
            pipe.send(RuntimeError(f"{error!r} when sending {result!r}"))
    torch.distributed.destroy_process_group()


def result_of(results: list[Any]) -> list[Any]:
    """The results of all ranks.

    Raises:
        Exception: that of the first rank that raised.
    """
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results

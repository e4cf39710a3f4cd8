"""Steps are compiled along with the backward that calls them, while the C++ of both is built."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache

import grass_compile
from grass_compile import _aot, _inductor


def recorded(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, said: str, events: list[str]) -> None:
    plain: Callable[..., Any] = getattr(owner, name)

    def record(*args: Any, **keywords: Any) -> Any:
        result = plain(*args, **keywords)
        events.append(said)
        return result

    monkeypatch.setattr(owner, name, record)


@pytest.mark.inductor
def test_a_backward_waits_once_for_its_own_code_and_that_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    recorded(monkeypatch, _aot, "compile_fx_inner", "generated", events)
    recorded(monkeypatch, AsyncCompile, "_wait_futures", "built", events)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(19, 23, bias=False), nn.ReLU(), nn.Linear(23, 17, bias=False))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=4, selection="uniform", step_in_backward=True)
    compiled = torch.compile(model, backend="grass")
    with fresh_cache(), inductor_config.patch(compile_threads=2):
        loss = compiled(torch.ones(5, 19)).sum()
        assert events == ["generated", "built"]
        events.clear()
        loss.backward()
    assert events == 3 * ["generated"] + 3 * ["built"]
    optimizer.step()
    assert events == 3 * ["generated"] + 3 * ["built"]  # nothing is compiled later


def test_other_threads_wait_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(AsyncCompile, "_wait_futures", lambda builds, scope: events.append(scope["who"]))
    builds = AsyncCompile()
    with _inductor.built_in_background():
        builds._wait_futures({"who": "this"})
        other = threading.Thread(target=builds._wait_futures, args=({"who": "another"},))
        other.start()
        other.join()
        assert events == ["another"]
    assert events == ["another", "this"]


def test_what_was_generated_is_built_if_the_next_graph_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor keeps the module for the next graph like it, which would find calls of what is no function yet."""
    events: list[str] = []
    monkeypatch.setattr(AsyncCompile, "_wait_futures", lambda builds, scope: events.append(scope["who"]))

    def generate_and_fail() -> None:
        with _inductor.built_in_background():
            AsyncCompile()._wait_futures({"who": "this"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate_and_fail()
    assert events == ["this"]


@pytest.mark.inductor
def test_an_interrupted_build_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the C++ of a backward and of its steps is built: the next backward finds all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(21, 25, bias=False), nn.ReLU(), nn.Linear(25, 17, bias=False))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=4, selection="uniform", step_in_backward=True)
    compiled = torch.compile(model, backend="grass")
    plain, interrupts = AsyncCompile._wait_futures, [True]

    def interrupted(builds: AsyncCompile, scope: dict[str, Any]) -> None:
        if interrupts:
            interrupts.pop()
            raise KeyboardInterrupt
        plain(builds, scope)

    with fresh_cache(), inductor_config.patch(compile_threads=2):
        loss = compiled(torch.ones(5, 21)).sum()
        monkeypatch.setattr(AsyncCompile, "_wait_futures", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        optimizer.zero_grad()
        before = model[0].weight.detach().clone()
        compiled(torch.ones(5, 21)).sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)

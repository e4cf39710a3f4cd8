"""Groups of processes, started once for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two."""
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four."""
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()

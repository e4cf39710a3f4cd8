"""Tests over several settings: as many cases as it takes to have every pair of values together, and all of them if asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from allpairspy import AllPairs


def every_pair(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the product of some values. Cases that bring no new pair together only run with ``--exhaustive``."""
    kinds = [list(kind) for kind in values.values()]
    covering = {tuple(case) for case in AllPairs(kinds)}
    cases = [pytest.param(*case, marks=() if case in covering else pytest.mark.exhaustive) for case in itertools.product(*kinds)]
    return pytest.mark.parametrize(tuple(values), cases)

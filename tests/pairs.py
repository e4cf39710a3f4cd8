"""Tests over several settings: as many cases as it takes to have every value, or every pair of values together, and all of them
with ``--exhaustive``."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
from allpairspy import AllPairs


def every_pair(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the product of some values. Cases that bring no new pair together only run with ``--exhaustive``."""
    kinds = [list(kind) for kind in values.values()]
    return _product(values, {tuple(case) for case in AllPairs(kinds)})


def every_value(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the product of some values. Cases of which each value is in another one only run with
    ``--exhaustive``."""
    kinds = [list(kind) for kind in values.values()]
    return _product(values, {tuple(kind[number % len(kind)] for kind in kinds) for number in range(max(map(len, kinds)))})


def _product(values: Mapping[str, Iterable[Any]], covering: Collection[tuple[Any, ...]]) -> pytest.MarkDecorator:
    kinds = [list(kind) for kind in values.values()]
    cases = [pytest.param(*case, marks=() if case in covering else pytest.mark.exhaustive) for case in itertools.product(*kinds)]
    return pytest.mark.parametrize(tuple(values), cases)

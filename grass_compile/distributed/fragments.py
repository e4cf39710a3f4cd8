"""Which parameters are synchronised together, and when: pure functions of names and whole numbers.

Streaming DiLoCo (arXiv 2501.18512) synchronises the parts of a model in turn, so that little is sent at a time, and takes every
n-th layer for a part rather than neighbours.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from ..errors import ConfigError

LAYERS_EACH = 3
"""Layers of a fragment unless it is said otherwise."""

_LAYER = re.compile(r"(.*?\.|)\d+\.")


def layers(names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters of each layer: those whose names begin alike up to the first number, such as ``model.layers.3.``."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _LAYER.match(name):
            found.setdefault(match.group(), []).append(name)
    return found


def split(sizes: Mapping[str, int], fragments: int | Sequence[Sequence[str]] | None) -> list[list[str]]:
    """The names of each fragment, in the order of the parameters.

    Args:
        sizes: how many numbers each parameter has.
        fragments: how many fragments; or patterns (``fnmatch``) for the names of each; or None for one for each three layers.

    Raises:
        ConfigError: there are fewer layers and other parameters than fragments; a parameter is in none or in two; or a pattern
            fits none.
    """
    if isinstance(fragments, Sequence):
        return _listed(list(sizes), fragments)
    found = layers(list(sizes))
    count = fragments if fragments is not None else max(1, -(-len(found) // LAYERS_EACH))
    units = len(found) + len(sizes) - sum(map(len, found.values()))
    if count > units:
        raise ConfigError(f"fragments={count} is more than the model has layers and single parameters beside them, {units}.")
    place = {name: number % count for number, names in enumerate(found.values()) for name in names}
    filled = [sum(size for name, size in sizes.items() if place.get(name) == at) for at in range(count)]
    for name in sorted(sizes.keys() - place.keys(), key=lambda name: (-sizes[name], name)):  # embeddings, norms, the head
        place[name] = min(range(count), key=filled.__getitem__)
        filled[place[name]] += sizes[name]
    return [[name for name in sizes if place[name] == at] for at in range(count)]


def _listed(names: Sequence[str], fragments: Sequence[Sequence[str]]) -> list[list[str]]:
    """Fragments by patterns."""
    found = [[name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in part)] for part in fragments]
    for part in fragments:
        for pattern in part:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"fragments: {pattern!r} fits no parameter that trains.")
    for name in names:
        if (times := sum(name in part for part in found)) != 1:
            where = f"{times} fragments" if times else "no fragment"
            raise ConfigError(f"fragments: {name} is in {where}; each parameter that trains has to be in one.")
    return found


def is_due(step: int, number: int, count: int, every: int) -> bool:
    """Whether a fragment is sent after a step.

    Args:
        step: counted from 1.
        number: of the fragment; the last one is sent after ``every`` steps, the others in equal intervals before.
        count: of the fragments.
        every: steps from one message of a fragment to the next.
    """
    return (step - (number + 1) * every // count) % every == 0

"""What lives when: every storage of a simulated run, from which peaks and what they are made of follow."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

TEMPORARY = "temporary"

KINDS = ("parameters", "compact state", "dense state", "compact gradients", "dense gradients", "saved activations", TEMPORARY)
"""What a storage may be. A buffer that a forward leaves for a backward is a saved activation, any other that is neither a weight,
state nor a gradient is temporary."""


@dataclasses.dataclass
class Storage:
    """One allocation.

    Attributes:
        bytes: as asked for.
        born: when, counted in allocations and releases.
        died: when, or None while it lives.
        kind: see `KINDS`.
        owner: the parameter, or the part of the model, that it belongs to.
    """

    bytes: int
    born: int
    died: int | None = None
    kind: str = TEMPORARY
    owner: str = ""


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment at which most bytes live.

    Attributes:
        bytes: how many, as asked for.
        kinds: bytes by kind.
        owners: bytes by kind for each owner.
        slack: bytes that an allocator adds by rounding each of them up.
        at: when it is.
    """

    bytes: int
    kinds: dict[str, int]
    owners: dict[str, dict[str, int]]
    slack: int
    at: int


class Ledger:
    """Keeps every storage that an operator makes while it is given to a `SimulationMode` as ``watch``."""

    def __init__(self, rounding: int) -> None:
        """Begin at nothing.

        Args:
            rounding: bytes to a multiple of which the device's allocator rounds up.
        """
        self.now, self.rounding = 0, rounding
        self.storages: list[Storage] = []
        self.owner = ""
        self._living: dict[int, tuple[Storage, Any]] = {}

    def see(self, tensor: Tensor, kind: str | None = None, owner: str | None = None) -> None:
        """Note the storage of ``tensor``, or note of a known one what it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living:
            entry = self._living[key][0]
        else:
            entry = Storage(storage.nbytes(), self.now, owner=self.owner)
            self.now += 1
            self.storages.append(entry)
            self._living[key] = entry, weakref.ref(storage, lambda _: self._release(key))
        entry.kind = kind if kind is not None else entry.kind
        entry.owner = owner if owner is not None else entry.owner

    def _release(self, key: int) -> None:
        self._living.pop(key)[0].died = self.now
        self.now += 1

    def owner_of(self, tensor: Tensor) -> str:
        """Whom a storage belongs to; nobody if it is not known."""
        found = self._living.get(tensor.untyped_storage()._cdata)
        return found[0].owner if found is not None else ""

    def kind_of(self, tensor: Tensor) -> str | None:
        """What a storage is, or None if it is not known."""
        found = self._living.get(tensor.untyped_storage()._cdata)
        return found[0].kind if found is not None else None

    @contextlib.contextmanager
    def owned_by(self, owner: str) -> Iterator[None]:
        """Inside, what is new belongs to ``owner``."""
        self.owner, before = owner, self.owner
        try:
            yield
        finally:
            self.owner = before

    def saved(self) -> int:
        """Call what is temporary and lives now a saved activation; how many bytes these are in all."""
        for storage, _ in self._living.values():
            if storage.kind == TEMPORARY:
                storage.kind = "saved activations"
        return sum(storage.bytes for storage, _ in self._living.values() if storage.kind == "saved activations")

    def living(self) -> int:
        """Bytes that live now."""
        return sum(storage.bytes for storage, _ in self._living.values())

    def peak(self, start: int, end: int) -> Peak:
        """The peak between two moments, both counted in."""
        change: Counter[int] = Counter()
        for storage in self.storages:
            if storage.born <= end and (storage.died is None or storage.died >= start):
                change[max(storage.born, start - 1)] += self._rounded(storage)  # what lives before counts before
                if storage.died is not None and storage.died <= end:
                    change[storage.died] -= self._rounded(storage)
        moments = sorted(change)
        totals = list(itertools.accumulate(change[moment] for moment in moments))
        at = moments[totals.index(max(totals))] if totals else start - 1
        alive = [s for s in self.storages if s.born <= at and (s.died is None or s.died > at)]
        kinds: Counter[str] = Counter()
        owners: dict[str, Counter[str]] = {}
        for storage in alive:
            kinds[storage.kind] += storage.bytes
            owners.setdefault(storage.owner, Counter())[storage.kind] += storage.bytes
        total = sum(storage.bytes for storage in alive)
        slack = sum(self._rounded(storage) for storage in alive) - total
        return Peak(total, {kind: kinds[kind] for kind in KINDS}, {name: dict(of) for name, of in owners.items()}, slack, at)

    def _rounded(self, storage: Storage) -> int:
        return -(-storage.bytes // self.rounding) * self.rounding

"""What the ranks that train the parameters of one optimizer have to have in common: compared when they first meet, and later."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autograd
from .._version import __version__
from ..distributed.agreement import check_settings, check_tensors
from ..distributed.collectives import members
from ..distributed.layout import MeshDim, is_sharded, local_part, mesh_of
from .parameter import ProjectedParameter

COMPARED_EVERY = 500
"""Updates of a weight between two looks at whether all ranks train the same rows."""


class RankAgreement:
    """The comparisons between the ranks.

    Attributes:
        seed_drawn: whether the seed was drawn rather than given; then all take that of the first.
    """

    def __init__(self, records: Mapping[Tensor, ProjectedParameter]) -> None:
        """Know of no other rank yet.

        Args:
            records: of the optimizer's parameters; live.
        """
        self._records = records
        self.seed_drawn = False
        self._met: tuple[MeshDim, ...] = ()
        self._members: dict[str, tuple[int, ...]] = {}
        self._looked_at = 0

    def meet_owners(self) -> None:
        """Compare settings with all ranks that own parts of any parameter, see `meet`. What is no ``DTensor`` is the same on all
        of these."""
        if self._looked_at != len(self._records):
            self.meet([dim for parameter, record in self._records.items() if record.sharded for dim in mesh_of(parameter)])
            self._looked_at = len(self._records)  # if they differ, all ranks come here again: an error while tracing is repeated

    def compare_parameters(self) -> None:
        """Compare names, shapes and dtypes with all ranks that own parts of any parameter, before any of these is gathered: in
        parts of unequal shapes that would hang, or end the process.

        Raises:
            ConfigError: on all ranks, with what differs.
        """
        mesh = [dim for parameter, record in self._records.items() if record.sharded for dim in mesh_of(parameter)]
        mesh = list(dict.fromkeys(MeshDim(dim.group, dim.size) for dim in mesh))
        check_settings(mesh, self._parameters(), (), True)

    def _parameters(self) -> dict[str, Any]:
        facts = {"the torch version": torch.__version__, "the version of grass_compile": __version__}
        for number, record in enumerate(self._records.values()):
            facts[f"parameter {number}"] = f"{record.name} {list(record.parameter.shape)} {record.parameter.dtype}"
        return facts

    def meet(self, mesh: Sequence[MeshDim]) -> None:
        """Compare settings with the other ranks, once, and take their seed if it was drawn; all of them have to call this.

        Args:
            mesh: the dimensions of the mesh of ranks.

        Raises:
            ConfigError: on all ranks, with what differs.
        """
        mesh = tuple(dict.fromkeys(MeshDim(dim.group, dim.size) for dim in mesh))
        new = [dim for dim in mesh if dim.group not in self._members]
        if new and not {members(dim.group) for dim in new} <= set(self._members.values()):
            self.agree(mesh)
            self._met = tuple(dict.fromkeys((*self._met, *mesh)))  # in an order that all ranks share
        self._members |= {dim.group: members(dim.group) for dim in new}

    def agree(self, mesh: Sequence[MeshDim]) -> None:
        """Compare settings with other ranks, and take their seed if it was drawn; all of them have to call this.

        Args:
            mesh: the dimensions of the mesh of ranks.

        Raises:
            ConfigError: on all ranks, with what differs.
        """
        hooked = _autograd.have_hooks([record.parameter for record in self._records.values()])
        facts = self._parameters()
        for number, record in enumerate(self._records.values()):
            facts |= {f"{record.label}: {name}": value for name, value in _settings(record).items()}
            facts[f"why {record.label} stays dense"] = record.refusal(record.name, hooked[number])
        seeds = tuple(record.options.seed for record in self._records.values())
        common = check_settings(mesh, facts, seeds, self.seed_drawn)
        if seeds != common:
            for record, seed in zip(self._records.values(), common, strict=True):
                dict.__setitem__(record.group, "seed", seed)
                record.change(dataclasses.replace(record.options, seed=seed))

    def check(self) -> None:
        """Compare projected weights and their state on all ranks; all of them have to call this.

        Raises:
            StateError: on all ranks, with what differs.
        """
        compared: dict[MeshDim, dict[str, Tensor]] = {dim: {} for dim in self._met}
        for record in self._records.values():
            mesh = mesh_of(record.parameter) if record.sharded else ()
            over = {members(dim.group) for dim in mesh if dim.shards is not None}
            tensors = {name: value for name, value in record.optimizer_state().items() if isinstance(value, Tensor)}
            of_parts = {name for name, value in tensors.items() if record.owns_part_of(name) or is_sharded(value)}
            for dim, found in compared.items():
                has_all = members(dim.group) not in over
                if has_all:
                    found[record.label] = record.weight
                for name, value in tensors.items():
                    if has_all or name not in of_parts:
                        found[f"{record.label}: {name}"] = local_part(value)
        check_tensors(compared)

    def compare_now_and_then(self) -> None:
        """At every `COMPARED_EVERY`-th update, compare which rows the ranks train; all of them are at the same one.

        Raises:
            StateError: on all ranks, with what differs.
        """
        if not self._met:
            return
        spread = [record for record in self._records.values() if record.layout is not None and record.assigned is not None]
        if not spread or spread[0].state["updates"] % COMPARED_EVERY or not (spread[0].moved or spread[0].chosen is not None):
            return
        rows = {f"{record.label}: {record.selector}": record.state[record.selector] for record in spread}
        check_tensors(dict.fromkeys(self._met, rows))


def _settings(record: ProjectedParameter) -> dict[str, str]:
    """What all ranks have to have in common of what one weight is asked, by keyword; but for the seed. (Torch's own optimizers
    have no keywords of ours in their groups.)"""
    own = {**vars(record.options), **record.group}
    own = {name: value for name, value in own.items() if name not in ("params", "param_names", "seed")}
    return {"the rule": repr(record.rule), **{name: repr(value) for name, value in own.items()}}

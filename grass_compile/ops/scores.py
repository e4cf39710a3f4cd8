"""The operators behind ``scores="sampled"`` and ``"estimate"``: they rank the rows of a weight gradient without forming it.

The exact score of row ``j`` of ``G = dY^T X`` is its norm. Its square, the row's *energy*, is also the expectation of

- ``s |(dY_s^T X_s)_j|^2`` up to the tokens' cross terms, for every ``s``-th token (``sampled``): an ``s`` times cheaper product;
- ``|(dY^T (X S))_j|^2 / k`` for random signs ``S [n, k]`` (``estimate`` of rows): exact in expectation over ``S``, with a
  relative standard deviation of at most ``sqrt(2 / k)``, at the cost of ``k`` rows.

With columns, the backward has only the selected ``X_j``. ``sampled`` keeps every ``s``-th token of ``X`` for it on the steps that
choose; ``estimate`` takes ``|X_j|^2``, which the forward knows: up to a common factor a bound, blind to ``dY``.

With several ranks, energies are those of the joined batch. A product and a sketch are linear in the tokens, so they are added up
over the ranks before they are squared. What an operator returns is this rank's summand: `propose_` adds these, last of all.

Factors that all rows share are left out, since no selection depends on them. The chosen rows serve from the next step on: a step
that chooses is an ordinary step of the old rows, and `propose_` leaves the new ones for `grass_compile.runtime.parameter`.

With ``estimate``, which keeps nothing for it, every step's graph can choose: ``due``, a truth value on the host, says whether it
does. Where it does not, nothing is computed, at the price of a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _inductor
from ..distributed.collectives import process_group, summed, summed_part
from ..math import selection
from ..math.noise import rounding_noise
from .library import library

STRIDE = 8
"""``sampled`` takes every eighth token."""

SKETCH = 16
"""Random directions of an ``estimate``."""

DUE = torch.tensor(False, device="cpu"), torch.tensor(True, device="cpu")
"""The two values of ``due``, on the host, so that nobody waits for a device to learn it."""

BRANCHES = (torch.Tag.cudagraph_unsafe,)
"""The tags of an operator that asks ``due``: a CUDA graph would repeat whatever it did when it was recorded."""

library.define("sample(Tensor features, int stride, int group=0) -> Tensor")
library.define("energy(Tensor features, Tensor due) -> Tensor", tags=BRANCHES)
library.define("product_energy(Tensor own, Tensor other, int own_stride, int other_stride, str[] groups) -> Tensor")
library.define(
    "sketched_energy(Tensor own, Tensor other, Tensor hyper, Tensor due, str[] groups, str? parts=None, int widest=0) -> Tensor",
    tags=BRANCHES,
)
library.define(
    "propose_(Tensor energy, Tensor? noise, Tensor(a!) proposed, Tensor? due, str selection, str[] groups) -> ()",
    tags=BRANCHES,
)


def _energy(features: Tensor, dim: int = 0) -> Tensor:
    wide = torch.promote_types(features.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(features, dim=dim, dtype=wide)
    return norms.square()


def _product_energy(own: Tensor, other: Tensor, own_stride: int, other_stride: int, groups: Sequence[str] = ()) -> Tensor:
    own, other = own[::own_stride], other[::other_stride]
    if not groups:
        return _energy(own.t() @ other, 1)
    first, *rest = groups
    part = summed(summed_part(other.t() @ own, first), rest)
    return _energy(part) / _ranks(rest)


def _input_energy(features: Tensor, due: Tensor) -> Tensor:
    return _energy(features) if due else _like_energy(features).fill_(0)


def _sketched_energy(
    own: Tensor,
    other: Tensor,
    hyper: Tensor,
    due: Tensor,
    groups: Sequence[str] = (),
    parts: str | None = None,
    widest: int = 0,
) -> Tensor:
    if not due:
        return _like_energy(own).fill_(0)
    first = 0 if parts is None else process_group(parts).rank() * widest
    signs = (rounding_noise((other.shape[1], SKETCH), hyper[-2], first) & 2).to(other.dtype) - 1
    sketch = own.t() @ (other @ signs)
    if not groups:
        return _energy(sketch, 1)
    wide = torch.promote_types(sketch.dtype, torch.float32)
    return _energy(summed(sketch.to(wide), groups), 1) / _ranks(groups)


def _ranks(groups: Sequence[str]) -> int:
    return math.prod(process_group(name).size() for name in groups)


def _propose_(
    energy: Tensor, noise: Tensor | None, proposed: Tensor, due: Tensor | None, chosen_by: str, groups: Sequence[str] = ()
) -> None:
    if due is not None and not due:
        return
    energy = summed(energy, groups)
    chosen = selection.select(chosen_by, energy.sqrt(), noise, len(proposed))
    proposed.copy_(torch.where(energy.isfinite().all(), chosen, proposed))


def _like_energy(features: Tensor, *rest: object) -> Tensor:
    return features.new_empty(features.shape[1], dtype=torch.promote_types(features.dtype, torch.float32))


library.impl("sample", lambda features, stride, group=0: features[::stride].clone(), "CompositeExplicitAutograd")
library.impl("energy", _input_energy, "CompositeExplicitAutograd")
library.impl("product_energy", _product_energy, "CompositeExplicitAutograd")
library.impl("sketched_energy", _sketched_energy, "CompositeExplicitAutograd")
library.impl("propose_", _propose_, "CompositeExplicitAutograd")
torch.library.register_fake(
    "grass_compile::sample",
    lambda features, stride, group=0: features.new_empty(((features.shape[0] + stride - 1) // stride, features.shape[1])),
)
torch.library.register_fake("grass_compile::energy", _like_energy)
torch.library.register_fake("grass_compile::product_energy", _like_energy)
torch.library.register_fake("grass_compile::sketched_energy", _like_energy)
torch.library.register_fake("grass_compile::propose_", lambda *args: None)

sample = torch.ops.grass_compile.sample.default
"""``sample(features [b, n], stride, group=0) -> [ceil(b / stride), n]``, a copy. Equal expressions of different
groups are computed by themselves, see `grass_compile.passes.joint.score`."""

energy = torch.ops.grass_compile.energy.default
"""``energy(features [b, n], due) -> [n]``, at least fp32."""

product_energy = torch.ops.grass_compile.product_energy.default
"""``product_energy(own [b, m], other [b, n], own_stride, other_stride, groups) -> [m]``: of the rows of ``own^T other``, over
the tokens that the strides leave, on all ranks of ``groups``, which have other tokens each."""

sketched_energy = torch.ops.grass_compile.sketched_energy.default
"""``sketched_energy(own [b, m], other [b, n], hyper, due, groups, parts=None, widest=0) -> [m]``: an estimate of it; the
seed of the signs is in ``hyper``. ``other`` may be this rank's part of wider features, which the ranks of the group ``parts``
have together, at most ``widest`` each; that group is one of ``groups`` then."""

propose_ = torch.ops.grass_compile.propose_.default
"""``propose_(energy [m], noise, proposed int64[r], due, selection, groups)`` writes the rows to take next by the sum of the
energies over the ranks of ``groups``, if ``due`` does not say otherwise; those that stand there stay if it is not finite."""

_inductor.lower_as_write(propose_)

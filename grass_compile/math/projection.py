"""Ways to take a gradient into its compact space: a selection of rows, or a dense projection.

With ``P`` of ``[m, r]`` the compact gradient is ``P^T G = (P^T dY^T) X`` and the update ``W -= P u``, so that between refreshes
``G`` is never formed. (With columns: ``G P`` with ``P`` of ``[n, r]``, and ``W -= u P^T``.)

* ``galore`` (arXiv 2403.03507): the first ``r`` singular vectors of the gradient at the last refresh, kept in the state.
* ``gaussian`` (Flora, arXiv 2402.03293): independent normal numbers of variance ``1/r``, so that ``E[P P^T]`` is one. They are a
  function of a key of two numbers, which is all that is kept, and are computed again wherever they are needed.
* ``grass`` fits in with ``P`` the ``r`` unit vectors of the selected rows, which is never formed; `selection` has the rules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _autograd
from .noise import gaussian

SELECTORS = {"grass": "index", "galore": "basis", "gaussian": "key"}
"""For each projection, the state tensor that says where the compact gradient lies: ``int64[r]``, ``[m, r]`` and ``int64[2]``."""

EXACT_SVD = 1024
"""Up to this many singular vectors, all are computed; see `singular_vectors`."""

OVERSAMPLING, POWER_ITERATIONS = 16, 2
"""Further columns of a sketch, and products with the gradient and its transpose that sharpen it."""


def selected(projection: str, dim: int, rank: int, tensor: Tensor, selector: Tensor) -> Tensor:
    """The compact form of a tensor of the weight's shape.

    Args:
        projection: one of `SELECTORS`.
        dim: the stored dimension that is projected.
        rank: r.
        tensor: ``[m, n]``.
        selector: the tensor that `SELECTORS` names.

    Returns:
        ``[r, n]`` or ``[m, r]``, in the tensor's dtype.
    """
    if projection == "grass":
        return tensor.index_select(dim, selector)
    return compact(tensor, dim, basis_of(projection, selector, tensor.shape[dim], rank, tensor.dtype))


def basis_of(projection: str, selector: Tensor, length: int, rank: int, dtype: torch.dtype) -> Tensor:
    """``P`` of a dense projection, ``[length, rank]``."""
    return gaussian(selector, length, rank, dtype) if projection == "gaussian" else selector.to(dtype)


def compact(tensor: Tensor, dim: int, basis: Tensor) -> Tensor:
    """``P^T T``, or ``T P`` for ``dim=1``."""
    with _autograd.without_autocast():
        return tensor @ basis if dim else basis.t() @ tensor


def expanded(values: Tensor, dim: int, basis: Tensor) -> Tensor:
    """``P C``, or ``C P^T`` for ``dim=1``: the tensor of the weight's shape that a compact one stands for."""
    with _autograd.without_autocast():
        return values @ basis.t() if dim else basis @ values


def singular_vectors(gradient: Tensor, dim: int, rank: int) -> Tensor:
    """The ``rank`` left singular vectors (right ones for ``dim=1``) of largest singular value, ``[gradient.shape[dim], rank]``.

    ``torch.linalg.svd`` of the gradient as it stands, which is what galore-torch does, while the gradient has at most `EXACT_SVD`
    singular values, and where a good part of them is asked for. It computes all of them, in cubic time; the sketch (`_leading`)
    is a few products with ``rank + 16`` columns. One thread of a CPU, fp32, rank 128: 0.4 s against 0.05 s for 1024 x 1024, 3.1 s
    against 0.16 s for 2048 x 2048.

    A gradient with infinities or NaN (of a loss that was scaled too high) gives some basis; the compact gradient tells.
    """
    matrix = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
    values = min(matrix.shape)
    if values > EXACT_SVD and 4 * (rank + OVERSAMPLING) < values:
        with _autograd.without_autocast():
            vectors = _leading(matrix.t() if dim else matrix, rank)
    else:
        left, _, right = torch.linalg.svd(matrix, full_matrices=rank > values)
        vectors = right[:rank].t() if dim else left[:, :rank]
    return vectors.to(gradient.dtype).contiguous()


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors from a random sketch of the range (Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithms 4.4 and
    5.1), the same in every run: the random numbers are always those of one key."""
    key = torch.tensor([20090928, 4061], device=matrix.device)
    sketch = gaussian(key, matrix.shape[1], rank + OVERSAMPLING, matrix.dtype)
    range_of: Tensor = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        range_of = torch.linalg.qr(matrix.t() @ range_of).Q
        range_of = torch.linalg.qr(matrix @ range_of).Q
    inner: Tensor = torch.linalg.svd(range_of.t() @ matrix, full_matrices=False).U
    return range_of @ inner[:, :rank]

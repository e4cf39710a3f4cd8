"""The gather of a CPU, in C++: what Inductor would generate for ``features[:, index]``, for all shapes at once.

ATen's ``gather`` wants an index for each element and expands ours to ``int64[b, r]``, four times the bytes of what it gathers in
bf16; its ``index_select`` runs on one thread. Compiled once, when it is first called; Inductor's cache keeps it.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .. import _inductor

SOURCE = r"""
#include <cstdint>

template <typename T>
static void gather(const T* features, const int64_t* index, T* out, int64_t b, int64_t r, int64_t row, int64_t column,
                   int threads) {
    #pragma omp parallel for num_threads(threads) if(b * r > 16384)
    for (int64_t i = 0; i < b; ++i) {
        const T* from = features + i * row;
        T* to = out + i * r;
        if (column == 1)
            for (int64_t j = 0; j < r; ++j) to[j] = from[index[j]];
        else
            for (int64_t j = 0; j < r; ++j) to[j] = from[index[j] * column];
    }
}

#define GATHER(SIZE, T) \
    extern "C" void gather_##SIZE(const T* features, const int64_t* index, T* out, int64_t b, int64_t r, int64_t row, \
                                  int64_t column, int64_t threads) { \
        gather(features, index, out, b, r, row, column, (int)threads); \
    }
GATHER(2, uint16_t)
GATHER(4, uint32_t)
GATHER(8, uint64_t)
"""


def gather(features: Tensor, index: Tensor) -> Tensor:
    """``features[:, index]``.

    Args:
        features: ``[b, m]`` of 2, 4 or 8 bytes an element, in any strides.
        index: ``int64[r]``, contiguous, in range.

    Returns:
        ``[b, r]``, contiguous.
    """
    tokens, rank = features.shape[0], index.shape[0]
    out = features.new_empty((tokens, rank))
    addresses = features.data_ptr(), index.data_ptr(), out.data_ptr()
    _gather(features.element_size())(*addresses, tokens, rank, *features.stride(), torch.get_num_threads())
    return out


@functools.cache
def _gather(element_size: int) -> ctypes._NamedFuncPointer:
    function = getattr(_inductor.cpp_library(SOURCE), f"gather_{element_size}")
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 5
    function.restype = None
    return function  # type: ignore[no-any-return]

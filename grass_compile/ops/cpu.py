"""Gathers and transpositions of a CPU, in C++: what Inductor would generate, for all shapes at once.

ATen's ``gather`` wants an index for each element and expands ours to ``int64[b, r]``, four times the bytes of what it gathers in
bf16; its ``index_select`` and its transposing copy run on one thread. Compiled when first called; Inductor's cache keeps it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _inductor

SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <cstring>

// out[j, i] = in[i, index ? index[j] : j]. A cache line of out at a time, and of in a few lines: where rows are a power of two
// apart they fall into one set of the cache, which holds no more.
template <typename T>
static void gather(const T* in, const int64_t* index, T* out, int64_t b, int64_t r, int64_t row, int64_t column, int threads) {
    constexpr int64_t line = 64 / sizeof(T), some = 64, few = 8;
    #pragma omp parallel for collapse(2) num_threads(threads) if(b * r > 16384)
    for (int64_t first = 0; first < b; first += line)
        for (int64_t start = 0; start < r; start += some) {
            const int64_t last = std::min(first + line, b), end = std::min(start + some, r);
            for (int64_t i = first; i < last; i += few) {
                const int64_t length = std::min(few, last - i);
                for (int64_t j = start; j < end; ++j) {
                    const T* from = in + i * row + (index ? index[j] : j) * column;
                    T* to = out + j * b + i;
                    if (length == few) {  // read all, then store at once
                        T values[few];
                        for (int64_t k = 0; k < few; ++k) values[k] = from[k * row];
                        std::memcpy(to, values, sizeof(values));
                    } else
                        for (int64_t k = 0; k < length; ++k) to[k] = from[k * row];
                }
            }
        }
}

#define GATHER(SIZE, T) \
    extern "C" void gather_##SIZE(const T* in, const int64_t* index, T* out, int64_t b, int64_t r, int64_t row, int64_t column, \
                                  int64_t threads) { \
        gather(in, index, out, b, r, row, column, (int)threads); \
    }
GATHER(1, uint8_t)
GATHER(2, uint16_t)
GATHER(4, uint32_t)
GATHER(8, uint64_t)
"""


def gather(features: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    """``features[0][:, index[0]]``, and those of further tensors beside.

    Args:
        features: each ``[b, m]`` of 1, 2, 4 or 8 bytes an element, in any strides; all of one dtype.
        index: for each ``int64[r]``, contiguous, in range.

    Returns:
        ``[b, r + ...]``, feature after feature: transposed, it is contiguous.
    """
    ranks = [rows.shape[0] for rows in index]
    out = features[0].new_empty((sum(ranks), features[0].shape[0]))
    for part, source, rows in zip(out.split(ranks), features, index, strict=True):
        _transpose(source, rows, part)
    return out.t()


def contiguous(matrix: Tensor) -> Tensor:
    """A copy in row-major order.

    Args:
        matrix: 2-d, of 1, 2, 4 or 8 bytes an element, in any strides.
    """
    out = matrix.new_empty(matrix.shape)
    _transpose(matrix.t(), None, out)
    return out


def _transpose(features: Tensor, index: Tensor | None, out: Tensor) -> None:
    """Write ``features[:, index]^T`` into ``out``, which is contiguous; all features if ``index`` is None."""
    rank, tokens = out.shape
    addresses = features.data_ptr(), None if index is None else index.data_ptr(), out.data_ptr()
    _gather(features.element_size())(*addresses, tokens, rank, *features.stride(), torch.get_num_threads())


@functools.cache
def _gather(element_size: int) -> ctypes._NamedFuncPointer:
    function = getattr(_inductor.cpp_library(SOURCE), f"gather_{element_size}")
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 5
    function.restype = None
    return function  # type: ignore[no-any-return]

"""Tiles of a matrix in memory, zero outside it.

BULK: through a descriptor, by the copy engine of sm_90 and later. One instruction moves a tile, where addresses take
a register or two for every 16 bytes: at tiles of 128 x 256 the difference between spilling and not. Making a descriptor
takes about a microsecond, so programs that read only a little go by addresses.

The matrix begins at a multiple of 16 bytes, and so does each of its rows.
"""

import triton
import triton.language as tl

from .tables import row_start


@triton.jit
def window(p, rows, columns, BR: tl.constexpr, BC: tl.constexpr, BULK: tl.constexpr):
    """The matrix [rows, columns] at p, to be read or written in tiles [BR, BC]."""
    if BULK:
        return tl.make_tensor_descriptor(p, [rows, columns], [columns, 1], [BR, BC])
    else:
        return p, rows, columns


@triton.jit
def place(matrix, row, column, BR: tl.constexpr, BC: tl.constexpr):
    """Addresses of a tile, and which of them lie in the matrix; 64 bits for its start, 32 inside it."""
    p, rows, columns = matrix
    i_r, i_c = tl.arange(0, BR), tl.arange(0, BC)
    inside = (row + i_r < rows)[:, None] & (column + i_c < columns)[None, :]
    return p + row_start(row, columns) + column + (i_r[:, None] * columns + i_c[None, :]), inside


@triton.jit
def read(matrix, row, column, BR: tl.constexpr, BC: tl.constexpr, BULK: tl.constexpr):
    """The tile [BR, BC] of a window that begins at (row, column)."""
    if BULK:
        return matrix.load([row, column])
    else:
        p_tile, inside = place(matrix, row, column, BR, BC)
        return tl.load(p_tile, mask=inside, other=0.0)


@triton.jit
def write(matrix, row, column, tile, BR: tl.constexpr, BC: tl.constexpr, BULK: tl.constexpr):
    """Store a tile [BR, BC], as far as it lies in the matrix."""
    if BULK:
        matrix.store([row, column], tile)
    else:
        p_tile, inside = place(matrix, row, column, BR, BC)
        tl.store(p_tile, tile, mask=inside)

"""A program's chunk of a tensor, found in the tables of `chunk_table.py`, and loads and stores of its blocks."""

import triton
import triton.language as tl

from kernels.lamb import chunk_table

PARAM = tl.constexpr(chunk_table.PARAM)
GRAD = tl.constexpr(chunk_table.GRAD)
EXP_AVG = tl.constexpr(chunk_table.EXP_AVG)
EXP_AVG_SQ = tl.constexpr(chunk_table.EXP_AVG_SQ)
STEP = tl.constexpr(chunk_table.STEP)
AVERAGE = tl.constexpr(chunk_table.AVERAGE)
COPY = tl.constexpr(chunk_table.COPY)
SIZE = tl.constexpr(chunk_table.SIZE)
CHUNK_SIZE = tl.constexpr(chunk_table.CHUNK_SIZE)
FIRST_CHUNK = tl.constexpr(chunk_table.FIRST_CHUNK)
COLUMNS = tl.constexpr(chunk_table.COLUMNS)


@triton.jit
def find(table_ptr, owners_ptr):
    """This program's tensor, its row in the table, and the chunk's first element (int64) and length (int32)."""
    # 1. Tensor of this chunk, and its row of int64 columns.
    program = tl.program_id(0)
    tensor = tl.load(owners_ptr + program)
    row_ptr = table_ptr + tensor * COLUMNS
    # 2. Offset of the chunk in the tensor; the last chunk may be shorter.
    chunk_size = tl.load(row_ptr + CHUNK_SIZE)
    start = (program - tl.load(row_ptr + FIRST_CHUNK)) * chunk_size  # int64
    length = tl.minimum(tl.load(row_ptr + SIZE) - start, chunk_size).to(tl.int32)
    return tensor, row_ptr, start, length


@triton.jit
def pointer(row_ptr, COLUMN: tl.constexpr, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to this program's chunk of a tensor whose address is in the table."""
    first = tl.load(row_ptr + COLUMN).to(tl.pointer_type(TYPE)) + start
    if ALIGNED:  # the compiler cannot infer it for an address loaded from memory
        first = tl.multiple_of(first, 16)
    return first


@triton.jit
def load(pointer, lanes, length, MASKED: tl.constexpr):
    """A block in fp32, zeros past the end. Whole blocks need no mask, so that loads can be wide."""
    values = tl.load(pointer + lanes, mask=lanes < length, other=0.0) if MASKED else tl.load(pointer + lanes)
    return values.to(tl.float32)


@triton.jit
def store(pointer, lanes, values, length, MASKED: tl.constexpr):
    """Store a block; with a mask, nothing past the end."""
    if MASKED:
        tl.store(pointer + lanes, values, mask=lanes < length)
    else:
        tl.store(pointer + lanes, values)

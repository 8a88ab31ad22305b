"""What the templates share: tiles of the inputs and of the scores, and which blocks meet a tile.

source.py puts it before each template. `score_of`, `mask_of`, `some_keys`, `every_key` and the
arguments OPERANDS are written there.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# A way for a block to be cut.
BY_MASK: tl.constexpr = tl.constexpr(2)


@triton.jit
def load_at(places, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of rows of DIM elements that begin at `places`, 0 beyond them.

    inside: which rows are there; None: all.
    """
    dims = tl.arange(0, BLOCK)
    places = places[:, None] + dims[None, :]
    if inside is None:
        if BLOCK == DIM:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=(dims < DIM)[None, :], other=0.0)
    elif BLOCK == DIM:
        tile = tl.load(places, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(places, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_rows(ptr, rows, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a matrix of DIM columns, 0 beyond it."""
    return load_at(ptr + rows.to(tl.int64) * stride, inside, DIM, BLOCK)


@triton.jit
def load_next(ptr, first, rows, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The rows from `first` on: what moves from block to block is one address, and places within a
    block stay, where there are registers for them."""
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        if BLOCK == DIM and BLOCK <= 128:
            start = ptr + tl.cast(first, tl.int64) * stride
            tile = load_rows(start, tl.arange(0, rows.shape[0]), stride, inside, DIM, BLOCK)
        else:
            tile = load_rows(ptr, rows, stride, inside, DIM, BLOCK)
    else:
        tile = load_rows(ptr, rows, stride, inside, DIM, BLOCK)
    return tile


@triton.jit
def load_block(source, first, rows, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The rows from `first` on (None: any): by the tensor memory accelerator where source is a
    descriptor."""
    if isinstance(source, tl.tensor_descriptor):
        tile = source.load([first, 0])
    elif first is None:
        tile = load_rows(source, rows, stride, inside, DIM, BLOCK)
    else:
        tile = load_next(source, first, rows, stride, inside, DIM, BLOCK)
    return tile


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a b (+ acc) in float32.

    PRECISION: of float32 factors, "ieee", "tf32" or "tf32x3"; or what factors of any type are
    rounded to, "bf16" or "fp16".
    """
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "fp16":
        acc = tl.dot(a.to(tl.float16), b.to(tl.float16), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def scores_of_block(
    q_tile,
    k_tile,
    b,
    h,
    q,
    k,
    q_inside,
    k_inside,
    M,
    N,
    OPERANDS,
    CUT: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S and the score of a block, each [rows, keys]; -inf outside the mask.

    q_tile: [rows, BLOCK_D], k_tile: [keys, BLOCK_D]; q and q_inside: [rows, 1], k and k_inside:
    [1, keys]; h: a number, or [rows, 1]. CUT: the mask, or the end of the keys, goes through it;
    BY_MASK: all of its keys are there.
    """
    S = product(q_tile, tl.trans(k_tile), None, PRECISION) * SCALE
    score = score_of(S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    if CUT:
        keep = mask_of(b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
        if CUT != BY_MASK:
            keep = k_inside & keep
        score = tl.where(keep, score, float("-inf"))
    return S, score


@triton.jit
def listed_blocks(table_ptr):
    """(full_first, full_count, cut_first, cut_count) of a line of a table."""
    full_first, full_count = tl.load(table_ptr), tl.load(table_ptr + 1)
    return full_first, full_count, tl.load(table_ptr + 2), tl.load(table_ptr + 3)


@triton.jit
def blocks_between(low, high, full_low, full_high, length, BLOCK: tl.constexpr):
    """The same of positions: some are attended from low to high, every one from full_low to
    full_high. What is cut lies before and after what is full, counted as if that were not there."""
    start = tl.maximum(low, 0) // BLOCK
    stop = tl.maximum(tl.cdiv(tl.maximum(tl.minimum(high + 1, length), 0), BLOCK), start)
    full_first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK), start), stop)
    full_stop = tl.maximum(tl.minimum(full_high + 1, length), 0) // BLOCK
    full_count = tl.maximum(tl.minimum(full_stop, stop) - full_first, 0)
    return full_first, full_count, start, stop - start - full_count


@triton.jit
def blocks_of_keys(
    table_ptr,
    row_block,
    b,
    h,
    M,
    N,
    OPERANDS,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Those that a block of rows meets."""
    if LISTED:
        return listed_blocks(table_ptr)
    first = row_block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, M) - 1
    low, high = some_keys(b, h, first, last, M, N, OPERANDS)
    full_low, full_high = every_key(b, h, first, last, M, N, OPERANDS)
    return blocks_between(low, high, full_low, full_high, N, BLOCK_N)


@triton.jit
def cut_block(i, blocks_ptr, full_first, full_count, LISTED: tl.constexpr):
    """The i-th of those that are cut."""
    return tl.load(blocks_ptr + i) if LISTED else tl.where(i < full_first, i, i + full_count)

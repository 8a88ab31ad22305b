"""What the templates share: tiles of the inputs and of the scores.

source.py puts it before each template. `score_of`, `mask_of` and the arguments OPERANDS are written
there.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_at(places, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of rows of DIM elements that begin at `places`, 0 beyond them."""
    dims = tl.arange(0, BLOCK)
    places = places[:, None] + dims[None, :]
    if BLOCK == DIM:
        return tl.load(places, mask=inside[:, None], other=0.0)
    return tl.load(places, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def load_rows(ptr, rows, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a matrix of DIM columns, 0 beyond it."""
    return load_at(ptr + rows.to(tl.int64) * stride, inside, DIM, BLOCK)


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
    [1, keys]; h: a number, or [rows, 1]. CUT: the mask, or the end of the keys, goes through it.
    """
    S = product(q_tile, tl.trans(k_tile), None, PRECISION) * SCALE
    score = score_of(S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    if CUT:
        keep = k_inside & mask_of(b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
        score = tl.where(keep, score, float("-inf"))
    return S, score

"""The template of products of rows: P P^T of some rows of a head, in one pass over the keys.

With the weights w of each row taken from its largest score so far, m,

    w_ik = exp(score_ik - m_i)      l_i = sum_k w_ik      products_ij = sum_k w_ik w_jk

where a growing maximum shrinks a row's sum by a factor and the products by those of both their
rows. So far softmax divides by nothing: keys are divided among `splits` programs, the same for all
rows, whose sums are put together and divided in torch (launch_rowproducts.py). No weight goes to
memory.

Grid: splits * pairs of blocks of rows * B * H; the scores of both blocks are computed, and those of
a pair whose second block is the later one are left to its mirror image. Rows as in statistics.py.
Products of weights are of float32, by three of tf32.
"""

import triton
import triton.language as tl


@triton.jit
def weighed(score, m_i, l_i, UNIT: tl.constexpr):
    """(weights, factor of what was weighed before, m_i, l_i) with the scores of a block of keys."""
    m_new = tl.maximum(m_i, tl.max(score, 1))
    # Where a row has seen no key yet, -inf beside -inf would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    w = tl.exp2((score - m_safe[:, None]) * UNIT)
    alpha = tl.exp2((m_i - m_safe) * UNIT)
    return w, alpha, m_new, l_i * alpha + tl.sum(w, 1)


@triton.jit
def keys_of_rows(b, h, q, M, N, OPERANDS, BLOCK_M: tl.constexpr):
    """The first key that any of the rows attends to, and one beyond the last."""
    low, high = some_keys(b, h, q, q, M, N, OPERANDS)
    # Numbers of run time may be of 64 bits: within the keys first.
    nothing = tl.zeros([BLOCK_M], tl.int64)
    low = tl.min(tl.minimum(tl.maximum(nothing + low, 0), N), 0)
    high = tl.max(tl.maximum(tl.minimum(nothing + high, N - 1), -1), 0)
    return low.to(tl.int32), (high + 1).to(tl.int32)


@triton.jit
def fused_row_products(
    q_ptr,  # [B,H,R,D]
    k_ptr,  # [B,G,N,D]
    at_ptr,  # int64 [R], where the rows stand among the M
    products_ptr,  # float32 [splits,B,H,R,R]
    sums_ptr,  # float32 [2,splits,B,H,R]: m, l
    sink_ptr,  # float32 [B,H,R], where HAS_SINK
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kg,
    stride_kn,
    B,
    H,
    R,
    M,
    N,
    splits,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
    QK: tl.constexpr,  # the precision of products with keys, see `product`
    WW: tl.constexpr,  # of products of weights
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split, place = tl.program_id(0) % splits, tl.program_id(0) // splits
    blocks = tl.cdiv(R, BLOCK_M)
    row_block, place = place % blocks, place // blocks
    other_block, place = place % blocks, place // blocks
    b, h = place // H, place % H
    batch, head = b.to(tl.int64), h.to(tl.int64)
    k_ptr += batch * stride_kb + head // GROUP * stride_kg
    q_ptr += batch * stride_qb + head * stride_qh
    offs_i = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = other_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_i, inside_j = offs_i < R, offs_j < R
    q_i = tl.load(at_ptr + tl.minimum(offs_i, R - 1)).to(tl.int32)
    q_j = tl.load(at_ptr + tl.minimum(offs_j, R - 1)).to(tl.int32)
    tile_i = load_rows(q_ptr, offs_i, stride_qm, inside_i, HEAD_DIM, BLOCK_D)
    tile_j = load_rows(q_ptr, offs_j, stride_qm, inside_j, HEAD_DIM, BLOCK_D)
    first = (split == 0) & (other_block == 0)
    if HAS_SINK:
        sink = tl.cast(sink_of(b, h, q_i, q_i < M, M, N, OPERANDS), tl.float32)
        sink_rows = sink_ptr + place.to(tl.int64) * R + offs_i
        tl.store(sink_rows, sink + tl.zeros([BLOCK_M], tl.float32), mask=inside_i & first)

    low_i, stop_i = keys_of_rows(b, h, q_i, M, N, OPERANDS, BLOCK_M)
    low_j, stop_j = keys_of_rows(b, h, q_j, M, N, OPERANDS, BLOCK_M)
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits)
    start = tl.maximum(split * share, tl.minimum(low_i, low_j) // BLOCK_N)
    stop = tl.minimum(split * share + share, tl.cdiv(tl.maximum(stop_i, stop_j), BLOCK_N))
    stop = tl.where(other_block > row_block, start, stop)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_j = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    l_j = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for step in range(start, stop):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        k_inside = offs_n < N
        k_tile = load_rows(k_ptr, offs_n, stride_kn, k_inside, HEAD_DIM, BLOCK_D)
        # fmt: off
        _, score_i = scores_of_block(
            tile_i, k_tile, b, h, q_i[:, None], offs_n[None, :], (q_i < M)[:, None],
            k_inside[None, :], M, N, OPERANDS,
            True, SCALE, QK,
        )
        _, score_j = scores_of_block(
            tile_j, k_tile, b, h, q_j[:, None], offs_n[None, :], (q_j < M)[:, None],
            k_inside[None, :], M, N, OPERANDS,
            True, SCALE, QK,
        )
        # fmt: on
        w_i, alpha_i, m_i, l_i = weighed(score_i, m_i, l_i, UNIT)
        w_j, alpha_j, m_j, l_j = weighed(score_j, m_j, l_j, UNIT)
        acc = product(w_i, tl.trans(w_j), acc * alpha_i[:, None] * alpha_j[None, :], WW)
    heads = tl.cast(B, tl.int64) * H
    row = (split * heads + place) * R + offs_i
    tl.store(sums_ptr + row, m_i, mask=inside_i & (other_block == 0))
    tl.store(sums_ptr + splits * heads * R + row, l_i, mask=inside_i & (other_block == 0))
    places = products_ptr + (row * R)[:, None] + offs_j[None, :]
    tl.store(places, acc, mask=inside_i[:, None] & inside_j[None, :])

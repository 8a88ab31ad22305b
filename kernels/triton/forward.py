"""The forward template: a tile of query rows on its way through the blocks of keys it attends to.

For each query row, over the keys in blocks, with the running maximum m_i, sum l_i and output acc:

    score = score_of(scale * q k^T)        m = max(m_i, max(score))
    acc   = acc * exp(m_i - m) + exp(score - m) v        l_i likewise        out = acc / l_i

Blocks wholly inside the mask come first and are not masked; those that it cuts follow. Exponentials
are of base 2: exp(x) = exp2(UNIT * x). Where the score is S itself, that factor is in SCALE, and
UNIT is 1; elsewhere differences are taken first, so that what is near the largest float stays
finite.

Grid: (blocks of rows, B * H). q_BHMD, k_BGND, v_BGNE and out_BHME lie with their last axis
contiguous. Source: Dao et al., "FlashAttention-2", 2023, algorithm 1; Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018.

`score_of`, `mask_of`, `sink_of` and the arguments OPERANDS are written by source.py.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, rows, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a matrix of DIM columns, 0 beyond it."""
    dims = tl.arange(0, BLOCK)
    places = ptr + rows[:, None].to(tl.int64) * stride + dims[None, :]
    if BLOCK == DIM:
        return tl.load(places, mask=inside[:, None], other=0.0)
    return tl.load(places, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def visit_block(
    acc,
    l_i,
    m_i,
    q_tile,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    first,
    b,
    h,
    offs_m,
    M,
    N,
    OPERANDS,
    CUT: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A block of keys, from `first` on; CUT: the mask, or the end of the keys, goes through it."""
    offs_n = first + tl.arange(0, BLOCK_N)
    inside = offs_n < N
    k_tile = load_rows(k_ptr, offs_n, stride_kn, inside, HEAD_DIM, BLOCK_D)
    S = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * SCALE
    q, k = offs_m[:, None], offs_n[None, :]
    q_inside, k_inside = q < M, inside[None, :]
    score = score_of(S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    if CUT:
        keep = k_inside & mask_of(b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
        score = tl.where(keep, score, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(score, 1))
    # Where a row has seen no key yet, -inf beside -inf would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2((score - m_safe[:, None]) * UNIT)
    alpha = tl.exp2((m_i - m_safe) * UNIT)
    l_i = l_i * alpha + tl.sum(p, 1)
    v_tile = load_rows(v_ptr, offs_n, stride_vn, inside, VALUE_DIM, BLOCK_E)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, l_i, m_new


@triton.jit
def with_sink(acc, l_i, m_i, logit, UNIT: tl.constexpr):
    """A logit that takes its share of each row's weights, and has no value."""
    sink = logit * (LOG2_E / UNIT)
    m_new = tl.maximum(m_i, sink)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m_i - m_safe) * UNIT)
    l_i = l_i * alpha + tl.exp2((sink - m_safe) * UNIT)
    return acc * alpha[:, None], l_i, m_new


@triton.jit
def mean_of_values(
    v_ptr, stride_vn, N, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):
    """[BLOCK_E], over all N keys."""
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        v_tile = load_rows(v_ptr, offs_n, stride_vn, offs_n < N, VALUE_DIM, BLOCK_E)
        total += tl.sum(v_tile.to(tl.float32), 0)
    return total / N


@triton.jit
def fused_qk_softmax_av(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    out_ptr,  # [B,H,M,E]
    lse_ptr,  # float32 [B,H,M], where HAS_LSE
    statistics_ptr,  # float32 [B,H,M,2], m_i and l_i, where HAS_STATISTICS
    table_ptr,  # int32 [B|1,H|1, blocks of rows, 4], see tables.py
    blocks_ptr,  # int32, likewise
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_vb,
    stride_vg,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_tb,
    stride_th,
    H,
    M,
    N,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
    EMPTY_ROW: tl.constexpr,  # "nan", "zero" or "uniform"
    HAS_LSE: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32
    FULL_RUN: tl.constexpr,  # full blocks follow each other
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Last rows first: under a causal mask they take longest.
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    batch, head, group = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + group * stride_kg
    v_ptr += batch * stride_vb + group * stride_vg
    out_ptr += batch * stride_ob + head * stride_oh
    table_ptr += b * stride_tb + h * stride_th + row_block * 4

    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_inside = offs_m < M
    q_tile = load_rows(q_ptr, offs_m, stride_qm, rows_inside, HEAD_DIM, BLOCK_D)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    full_first, full_count = tl.load(table_ptr), tl.load(table_ptr + 1)
    for i in range(full_first, full_first + full_count):
        block = i if FULL_RUN else tl.load(blocks_ptr + i)
        # fmt: off
        acc, l_i, m_i = visit_block(
            acc, l_i, m_i, q_tile, k_ptr, v_ptr, stride_kn, stride_vn, block * BLOCK_N,
            b, h, offs_m, M, N, OPERANDS,
            False, SCALE, UNIT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    cut_first, cut_count = tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    for i in range(cut_first, cut_first + cut_count):
        block = tl.load(blocks_ptr + i)
        # fmt: off
        acc, l_i, m_i = visit_block(
            acc, l_i, m_i, q_tile, k_ptr, v_ptr, stride_kn, stride_vn, block * BLOCK_N,
            b, h, offs_m, M, N, OPERANDS,
            True, SCALE, UNIT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    if HAS_SINK:
        sink = sink_of(b, h, offs_m, rows_inside, M, N, OPERANDS)
        acc, l_i, m_i = with_sink(acc, l_i, m_i, tl.cast(sink, tl.float32), UNIT)

    empty = (m_i == float("-inf"))[:, None]
    out = acc / l_i[:, None]
    if EMPTY_ROW == "zero":
        out = tl.where(empty, 0.0, out)
    elif EMPTY_ROW == "uniform":
        mean = mean_of_values(v_ptr, stride_vn, N, VALUE_DIM, BLOCK_N, BLOCK_E)
        out = tl.where(empty, mean[None, :], out)
    else:
        out = tl.where(empty, float("nan"), out)
    offs_e = tl.arange(0, BLOCK_E)
    places = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_e[None, :]
    inside = rows_inside[:, None] & (offs_e < VALUE_DIM)[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=inside)
    row = (batch * H + head) * M + offs_m
    if HAS_LSE:
        tl.store(lse_ptr + row, (m_i * UNIT + tl.log2(l_i)) / LOG2_E, mask=rows_inside)
    if HAS_STATISTICS:
        tl.store(statistics_ptr + 2 * row, m_i, mask=rows_inside)
        tl.store(statistics_ptr + 2 * row + 1, l_i, mask=rows_inside)

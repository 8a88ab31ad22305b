"""The template for few query rows: keys and values are read once for the heads that share them.

The rows of a tile are the pairs of a query head and a query row of one key head, in that order, at
least 16 for the tensor cores; those beyond the last are copies of it. The keys that rows may attend
to (the closed form `some_keys`, within what the caller says) are divided among `splits` programs,
whole blocks each. With one split a program writes the result; with more each writes, in float32,
the output before division beside the maximum and the sum that belong to it, and `combine_splits`
adds up, always in the same order:

    m = max_s m_s        l = sum_s l_s exp(m_s - m)        out = sum_s acc_s exp(m_s - m) / l

A split that meets no key has m_s = -inf, l_s = 0, acc_s = 0. The sink comes in once, at the end.

Grid of fused_decode: splits * tiles of rows * B * G; of combine_splits: B * H * M. Layouts as in
forward.py. Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import triton
import triton.language as tl


@triton.jit
def fused_decode(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    out_ptr,  # [B,H,M,E]
    lse_ptr,  # float32 [B,H,M], where HAS_LSE
    partial_ptr,  # float32 [B,H,M,splits,E], where SPLIT
    sums_ptr,  # float32 [B,H,M,splits,2], m_i and l_i, where SPLIT
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
    H,
    M,
    N,
    first_key,
    last_key,  # one beyond
    splits,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
    EMPTY_ROW: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SPLIT: tl.constexpr,  # more than one
    QK: tl.constexpr,
    PV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    split, place = tl.program_id(0) % splits, tl.program_id(0) // splits
    tiles = tl.cdiv(GROUP * M, BLOCK_M)
    tile, place = place % tiles, place // tiles
    groups = H // GROUP
    b, g = place // groups, place % groups
    batch, group = b.to(tl.int64), g.to(tl.int64)
    k_ptr += batch * stride_kb + group * stride_kg
    v_ptr += batch * stride_vb + group * stride_vg

    pairs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pairs < GROUP * M
    pairs = tl.minimum(pairs, GROUP * M - 1)
    h, q = g * GROUP + pairs // M, pairs % M
    heads, rows = h.to(tl.int64), q.to(tl.int64)
    q_rows = q_ptr + batch * stride_qb + heads * stride_qh + rows * stride_qm
    q_tile = load_at(q_rows, inside, HEAD_DIM, BLOCK_D)

    low, high = some_keys(b, h, q, q, M, N, OPERANDS)
    # Numbers of run time may be of 64 bits: within the keys first.
    nothing = tl.zeros_like(rows)
    low = tl.minimum(tl.maximum(low, nothing + first_key), nothing + last_key)
    high = tl.maximum(tl.minimum(high, nothing + last_key - 1), nothing - 1)
    low, high = tl.min(low, 0).to(tl.int32), tl.max(high, 0).to(tl.int32)
    first_block = low // BLOCK_N
    beyond = tl.maximum(tl.cdiv(tl.maximum(high + 1, 0), BLOCK_N), first_block)
    share = tl.cdiv(beyond - first_block, splits)
    start = first_block + split * share
    stop = tl.minimum(start + share, beyond)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    t_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for block in range(start, stop):
        # fmt: off
        acc, l_i, m_i, t_i = visit_block(
            acc, l_i, m_i, t_i, q_tile, k_ptr, v_ptr, stride_kn, stride_vn, block * BLOCK_N,
            b, h[:, None], q, M, N, OPERANDS,
            True, 0.0, False, SCALE, UNIT, QK, PV, False, False, True,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    row = (batch * H + heads) * M + rows
    if SPLIT:
        dims = tl.arange(0, BLOCK_E)
        part = row * splits + split
        wanted = inside[:, None] & (dims < VALUE_DIM)[None, :]
        tl.store(partial_ptr + (part * VALUE_DIM)[:, None] + dims[None, :], acc, mask=wanted)
        tl.store(sums_ptr + 2 * part, m_i, mask=inside)
        tl.store(sums_ptr + 2 * part + 1, l_i, mask=inside)
    else:
        out_rows = batch * stride_ob + heads * stride_oh + rows * stride_om
        # fmt: off
        store_rows(
            out_ptr, lse_ptr, out_rows, row, inside, acc, l_i, m_i, v_ptr, stride_vn,
            b, h, q, M, N, OPERANDS,
            UNIT, VALUE_DIM, HAS_SINK, EMPTY_ROW, HAS_LSE, BLOCK_N, BLOCK_E,
        )
        # fmt: on


@triton.jit
def combine_splits(
    v_ptr,  # [B,G,N,E]
    out_ptr,  # [B,H,M,E]
    lse_ptr,  # float32 [B,H,M], where HAS_LSE
    partial_ptr,  # float32 [B,H,M,splits,E]
    sums_ptr,  # float32 [B,H,M,splits,2]
    stride_vb,
    stride_vg,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    H,
    M,
    N,
    splits,
    OPERANDS,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
    EMPTY_ROW: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits at a time
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, batch = row // M % H, row // M // H
    # A tile of one row: what ends rows takes tiles.
    q = (row % M).to(tl.int32) + tl.arange(0, 1)
    offs_s = tl.arange(0, BLOCK_S)
    m_i = tl.full([1], float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        places = sums_ptr + 2 * (row * splits + first + offs_s)
        m_s = tl.load(places, mask=first + offs_s < splits, other=float("-inf"))
        m_i = tl.maximum(m_i, tl.max(m_s, 0))
    m_safe, _ = shifted(m_i, m_i, UNIT)

    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_E], tl.float32)
    for first in range(0, splits, BLOCK_S):
        part, inside = row * splits + first + offs_s, first + offs_s < splits
        m_s = tl.load(sums_ptr + 2 * part, mask=inside, other=float("-inf"))
        l_s = tl.load(sums_ptr + 2 * part + 1, mask=inside, other=0.0)
        alpha = tl.exp2((m_s - m_safe) * UNIT)
        l_i += tl.sum(l_s * alpha, 0)
        acc_s = load_rows(partial_ptr, part, VALUE_DIM, inside, VALUE_DIM, BLOCK_E)
        acc += tl.sum(acc_s * alpha[:, None], 0)[None, :]

    v_ptr += batch * stride_vb + head // GROUP * stride_vg
    out_rows = batch * stride_ob + head * stride_oh + q.to(tl.int64) * stride_om
    # fmt: off
    store_rows(
        out_ptr, lse_ptr, out_rows, row + tl.arange(0, 1), q < M, acc, l_i, m_i, v_ptr, stride_vn,
        batch.to(tl.int32), head.to(tl.int32), q, M, N, OPERANDS,
        UNIT, VALUE_DIM, HAS_SINK, EMPTY_ROW, HAS_LSE, BLOCK_N, BLOCK_E,
    )
    # fmt: on

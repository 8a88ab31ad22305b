"""The forward template: a tile of query rows on its way through the blocks of keys it attends to.

Blocks wholly inside the mask come first and are not masked; those that it cuts follow: by a table
where LISTED (tables.py), otherwise by the closed form of the mask (ranges.py), whatever the sizes.
Last rows are first: under a causal mask they take longest. What is done in a block is in
softmax.py.

With HAS_FLAGS each head's flag says by which of two ways it goes: 0 as without flags, above 0
through the blocks of another table, and with products of another precision (ALTERNATIVE_QK,
ALTERNATIVE_PV), where there is one (HAS_ALTERNATIVE). Below 0 it is absent: nothing of it is read,
and its output stays as it is.
Without HAS_VALUES no value is read and there is no output, only what is known of the rows.

With BY_DESCRIPTOR tiles of keys and values come through descriptors made in the kernel: for sm_90
and later, and rows of keys and values that begin at multiples of 16 bytes.

Grid: blocks of rows * B * H; with PERSISTENT as many programs as the device runs at a time, each of
which takes tiles in turn. q_BHMD, k_BGND, v_BGNE and out_BHME lie with their last axis contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def visit_blocks(
    acc,
    l_i,
    m_i,
    t_i,
    q_tile,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    table_ptr,
    blocks_ptr,
    taken,
    skip,
    HAS_SKIP: tl.constexpr,
    row_block,
    b,
    h,
    offs_m,
    M,
    N,
    OPERANDS,
    LISTED: tl.constexpr,
    FULL_RUN: tl.constexpr,
    CUT: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    LAZY: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """All blocks of keys that the tile meets; none where taken is 0."""
    full_first, full_count, cut_first, cut_count = blocks_of_keys(
        table_ptr, row_block, b, h, M, N, OPERANDS, LISTED, BLOCK_M, BLOCK_N
    )
    for i in range(full_first, full_first + full_count * taken):
        block = i if FULL_RUN else tl.load(blocks_ptr + i)
        # fmt: off
        acc, l_i, m_i, t_i = visit_block(
            acc, l_i, m_i, t_i, q_tile, k_ptr, v_ptr, stride_kn, stride_vn, block * BLOCK_N,
            b, h, offs_m, M, N, OPERANDS,
            False, skip, HAS_SKIP, SCALE, UNIT, QK, PV, LAZY, HAS_ENTROPY, HAS_VALUES,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    for i in range(cut_first, cut_first + cut_count * taken):
        block = cut_block(i, blocks_ptr, full_first, full_count, LISTED)
        # fmt: off
        acc, l_i, m_i, t_i = visit_block(
            acc, l_i, m_i, t_i, q_tile, k_ptr, v_ptr, stride_kn, stride_vn, block * BLOCK_N,
            b, h, offs_m, M, N, OPERANDS,
            CUT, skip, HAS_SKIP, SCALE, UNIT, QK, PV, LAZY, HAS_ENTROPY, HAS_VALUES,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    return acc, l_i, m_i, t_i


@triton.jit
def attend(
    tile,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    statistics_ptr,
    entropy_ptr,
    maximum_ptr,
    table_ptr,
    blocks_ptr,
    flags_ptr,
    skip_ptr,
    alternative_table_ptr,
    alternative_blocks_ptr,
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
    stride_fb,
    stride_fh,
    stride_ab,
    stride_ah,
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
    EMPTY_ROW: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MAXIMUM: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    HAS_ALTERNATIVE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    ALTERNATIVE_QK: tl.constexpr,
    ALTERNATIVE_PV: tl.constexpr,
    LAZY: tl.constexpr,
    LISTED: tl.constexpr,
    FULL_RUN: tl.constexpr,
    ALTERNATIVE_LISTED: tl.constexpr,
    ALTERNATIVE_FULL_RUN: tl.constexpr,
    CUT: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A block of query rows of one head, by its number."""
    tl.static_assert(not (LAZY and HAS_MAXIMUM), "LAZY does not keep the maximum")
    row_blocks = tl.cdiv(M, BLOCK_M)
    row_block = row_blocks - 1 - tile % row_blocks
    b, h = tile // row_blocks // H, tile // row_blocks % H
    batch, head, group = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + group * stride_kg
    if LISTED:
        table_ptr += b * stride_tb + h * stride_th + row_block * 4
    if HAS_VALUES:
        v_ptr += batch * stride_vb + group * stride_vg

    keys, values = k_ptr, v_ptr
    if BY_DESCRIPTOR:
        keys = tl.make_tensor_descriptor(k_ptr, [N, HEAD_DIM], [stride_kn, 1], [BLOCK_N, BLOCK_D])
        if HAS_VALUES:
            values = tl.make_tensor_descriptor(
                v_ptr, [N, VALUE_DIM], [stride_vn, 1], [BLOCK_N, BLOCK_E]
            )

    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_inside = offs_m < M
    taken = 1
    if HAS_FLAGS:
        flag = tl.load(flags_ptr + b * stride_fb + h * stride_fh)
        rows_inside = rows_inside & (flag >= 0)
        taken = tl.where(flag == 0 if HAS_ALTERNATIVE else flag >= 0, 1, 0)
    q_tile = load_rows(q_ptr, offs_m, stride_qm, rows_inside, HEAD_DIM, BLOCK_D)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    t_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    if HAS_ALTERNATIVE:
        if ALTERNATIVE_LISTED:
            alternative_table_ptr += b * stride_ab + h * stride_ah + row_block * 4
        skip = 0.0
        if HAS_SKIP:
            skip = tl.load(skip_ptr + h) * (LOG2_E / UNIT)
            skip = tl.where(rows_inside, skip, float("-inf"))  # other rows do not count
        # fmt: off
        acc, l_i, m_i, t_i = visit_blocks(
            acc, l_i, m_i, t_i, q_tile, keys, values, stride_kn, stride_vn,
            alternative_table_ptr, alternative_blocks_ptr, tl.where(flag > 0, 1, 0), skip, HAS_SKIP,
            row_block, b, h, offs_m, M, N, OPERANDS,
            ALTERNATIVE_LISTED, ALTERNATIVE_FULL_RUN, CUT,
            SCALE, UNIT, ALTERNATIVE_QK, ALTERNATIVE_PV,
            LAZY, HAS_ENTROPY, HAS_VALUES, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    # fmt: off
    acc, l_i, m_i, t_i = visit_blocks(
        acc, l_i, m_i, t_i, q_tile, keys, values, stride_kn, stride_vn,
        table_ptr, blocks_ptr, taken, 0.0, False, row_block, b, h, offs_m, M, N, OPERANDS,
        LISTED, FULL_RUN, CUT, SCALE, UNIT, QK, PV,
        LAZY, HAS_ENTROPY, HAS_VALUES, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )
    # fmt: on
    if HAS_FLAGS:
        l_i = tl.where(flag < 0, 1.0, l_i)  # no row of an absent head counts as empty
    row = (batch * H + head) * M + offs_m
    if HAS_MAXIMUM:
        tl.store(maximum_ptr + row, largest_score(l_i, m_i, UNIT), mask=rows_inside)
    if HAS_SINK:
        sink = sink_of(b, h, offs_m, rows_inside, M, N, OPERANDS)
        acc, l_i, m_i, t_i = with_sink(acc, l_i, m_i, t_i, tl.cast(sink, tl.float32), UNIT)
    if HAS_VALUES:
        out = finished(acc, l_i, m_i, v_ptr, stride_vn, N, EMPTY_ROW, VALUE_DIM, BLOCK_N, BLOCK_E)
        out_ptr += batch * stride_ob + head * stride_oh
        offs_e = tl.arange(0, BLOCK_E)
        places = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_e[None, :]
        inside = rows_inside[:, None] & (offs_e < VALUE_DIM)[None, :]
        tl.store(places, out.to(out_ptr.dtype.element_ty), mask=inside)
    if HAS_LSE:
        tl.store(lse_ptr + row, log_sum_exp(l_i, m_i, UNIT), mask=rows_inside)
    if HAS_STATISTICS:
        tl.store(statistics_ptr + 2 * row, m_i, mask=rows_inside)
        tl.store(statistics_ptr + 2 * row + 1, l_i, mask=rows_inside)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, entropy_of(l_i, m_i, t_i, N, EMPTY_ROW), mask=rows_inside)


@triton.jit
def fused_qk_softmax_av(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E], where HAS_VALUES
    out_ptr,  # [B,H,M,E], where HAS_VALUES
    lse_ptr,  # float32 [B,H,M], where HAS_LSE
    statistics_ptr,  # float32 [B,H,M,2], m_i and l_i, where HAS_STATISTICS
    entropy_ptr,  # float32 [B,H,M], where HAS_ENTROPY
    maximum_ptr,  # float32 [B,H,M], where HAS_MAXIMUM
    table_ptr,  # int32 [B|1,H|1, blocks of rows, 4], where LISTED, see tables.py
    blocks_ptr,  # int32, likewise
    flags_ptr,  # int32 [B|1,H|1], where HAS_FLAGS
    skip_ptr,  # float32 [H], of the alternative, where HAS_SKIP: see softmax.py
    alternative_table_ptr,  # where ALTERNATIVE_LISTED, as table_ptr
    alternative_blocks_ptr,
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
    stride_fb,
    stride_fh,
    stride_ab,
    stride_ah,
    tiles,  # blocks of rows * H * B
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
    HAS_VALUES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MAXIMUM: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    HAS_ALTERNATIVE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    QK: tl.constexpr,  # the precision of products, see `product`
    PV: tl.constexpr,
    ALTERNATIVE_QK: tl.constexpr,
    ALTERNATIVE_PV: tl.constexpr,
    LAZY: tl.constexpr,
    LISTED: tl.constexpr,  # in a table
    FULL_RUN: tl.constexpr,  # full blocks follow each other
    ALTERNATIVE_LISTED: tl.constexpr,
    ALTERNATIVE_FULL_RUN: tl.constexpr,
    CUT: tl.constexpr,  # of blocks that are, see `scores_of_block`
    BY_DESCRIPTOR: tl.constexpr,  # keys and values, by the tensor memory accelerator
    PERSISTENT: tl.constexpr,  # each program takes tiles in turn, of `tiles`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # fmt: off
    if PERSISTENT:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            attend(
                tile, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, statistics_ptr, entropy_ptr,
                maximum_ptr, table_ptr, blocks_ptr, flags_ptr, skip_ptr, alternative_table_ptr,
                alternative_blocks_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kg,
                stride_kn, stride_vb, stride_vg, stride_vn, stride_ob, stride_oh, stride_om,
                stride_tb, stride_th, stride_fb, stride_fh, stride_ab, stride_ah, H, M, N,
                OPERANDS, SCALE, UNIT, GROUP, HEAD_DIM, VALUE_DIM, HAS_SINK, EMPTY_ROW,
                HAS_VALUES, HAS_LSE, HAS_STATISTICS, HAS_ENTROPY, HAS_MAXIMUM, HAS_FLAGS,
                HAS_ALTERNATIVE, HAS_SKIP, QK, PV, ALTERNATIVE_QK, ALTERNATIVE_PV, LAZY, LISTED,
                FULL_RUN, ALTERNATIVE_LISTED, ALTERNATIVE_FULL_RUN, CUT, BY_DESCRIPTOR, BLOCK_M,
                BLOCK_N, BLOCK_D, BLOCK_E,
            )
    else:
        attend(
            tl.program_id(0), q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, statistics_ptr, entropy_ptr,
            maximum_ptr, table_ptr, blocks_ptr, flags_ptr, skip_ptr, alternative_table_ptr,
            alternative_blocks_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kg,
            stride_kn, stride_vb, stride_vg, stride_vn, stride_ob, stride_oh, stride_om,
            stride_tb, stride_th, stride_fb, stride_fh, stride_ab, stride_ah, H, M, N, OPERANDS,
            SCALE, UNIT, GROUP, HEAD_DIM, VALUE_DIM, HAS_SINK, EMPTY_ROW, HAS_VALUES, HAS_LSE,
            HAS_STATISTICS, HAS_ENTROPY, HAS_MAXIMUM, HAS_FLAGS, HAS_ALTERNATIVE, HAS_SKIP, QK, PV,
            ALTERNATIVE_QK, ALTERNATIVE_PV, LAZY, LISTED, FULL_RUN, ALTERNATIVE_LISTED,
            ALTERNATIVE_FULL_RUN, CUT, BY_DESCRIPTOR, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )
    # fmt: on

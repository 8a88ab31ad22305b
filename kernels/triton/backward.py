"""The backward template: gradients of queries by tiles of rows, of keys and values by their own.

With P the weights, recomputed from the statistics m_i and l_i that the forward pass has left, and
delta = sum_e dO O, for each row:

    dV = P^T dO     dP = dO V^T     dscore = P (dP - delta)     dS = dscore * d score / d S
    dQ = scale * dS K     dK = scale * dS^T Q     d sink = -P(sink) * delta

`attention_row_terms` writes delta, from which the others start. Each element of a result has one
program that sums it, in one order: nothing is atomic, and the same inputs give the same bits. What
a number that the score reads receives is the sum of dscore * d score / d number wherever it is
read: by rows in `attention_grad_q`, by columns in `attention_grad_kv`, otherwise in the template
that follows.

Blocks of keys or rows that meet a tile stand in a table where LISTED (tables.py), otherwise they
follow from the closed form of the mask (ranges.py). Grids: B * H * blocks of rows, B * G * blocks
of keys. q_BHMD, k_BGND, v_BGNE, grad_out_BHME and the results lie with their last axis contiguous.
Source: Dao et al., "FlashAttention", 2022, algorithm 4, and its section B.4 for delta.

`to_product`, `some_rows`, `every_row`, `*_sums_of` and `zero_*_sums` are written by
gradient_source.py; the rest as in tile.py.
"""

import triton
import triton.language as tl


@triton.jit
def head_and_block(heads, blocks):
    """(batch item, head, block) of a program."""
    item = tl.program_id(0) // blocks
    return item // heads, item % heads, tl.program_id(0) % blocks


@triton.jit
def blocks_of_rows(
    table_ptr,
    key_block,
    b,
    h,
    M,
    N,
    OPERANDS,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Those that a block of keys meets."""
    if LISTED:
        return listed_blocks(table_ptr)
    first = key_block * BLOCK_N
    last = tl.minimum(first + BLOCK_N, N) - 1
    low, high = some_rows(b, h, first, last, M, N, OPERANDS)
    full_low, full_high = every_row(b, h, first, last, M, N, OPERANDS)
    return blocks_between(low, high, full_low, full_high, M, BLOCK_M)


@triton.jit
def head_of(ptr, b, h, stride_b, stride_h):
    """Where a head's matrix begins."""
    return ptr + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h


@triton.jit
def load_statistics(ptr, rows, inside, MAY_BE_EMPTY: tl.constexpr):
    """m_i and 1 / l_i of rows; of a row without a key no weight comes, unless there can be none."""
    m_i = tl.load(ptr + 2 * rows, mask=inside, other=0.0)
    l_i = tl.load(ptr + 2 * rows + 1, mask=inside, other=1.0)
    inverse = 1.0 / l_i
    if MAY_BE_EMPTY:
        inverse = tl.where(l_i == 0.0, 0.0, inverse)
    return tl.where(m_i == float("-inf"), 0.0, m_i), inverse


@triton.jit
def store_terms(ptr, step, rows, inside, m_i, inverse, delta):
    """What the kernels that follow read of rows, each `step` behind the one before."""
    step = tl.cast(step, tl.int64)
    tl.store(ptr + rows, m_i, mask=inside)
    tl.store(ptr + step + rows, inverse, mask=inside)
    tl.store(ptr + 2 * step + rows, delta, mask=inside)


@triton.jit
def load_terms(ptr, step, rows, inside):
    """m_i, inverse and delta of rows; beyond them no weight."""
    step = tl.cast(step, tl.int64)
    m_i = tl.load(ptr + rows, mask=inside, other=0.0)
    inverse = tl.load(ptr + step + rows, mask=inside, other=0.0)
    return m_i, inverse, tl.load(ptr + 2 * step + rows, mask=inside, other=0.0)


@triton.jit
def weights_of_block(
    x_tile,
    y_tile,
    b,
    h,
    q,
    k,
    q_inside,
    k_inside,
    m_i,
    inverse,
    M,
    N,
    OPERANDS,
    CUT: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S and P of a block: queries by keys, or keys by queries, as q and k lie.

    m_i, inverse: likewise. CUT: the mask, or the end of what is multiplied, goes through it.
    """
    # fmt: off
    S, score = scores_of_block(
        x_tile, y_tile, b, h, q, k, q_inside, k_inside, M, N, OPERANDS,
        CUT, SCALE, PRECISION,
    )
    # fmt: on
    if CUT:
        score = tl.where(q_inside, score, float("-inf"))
    return S, tl.exp2((score * FOLD - m_i) * UNIT) * inverse


@triton.jit
def store_sums(ptr, step, sums, places, inside, COUNT: tl.constexpr):
    """COUNT vectors, each `step` behind the one before."""
    for i in tl.static_range(COUNT):
        tl.store(ptr + step * i + places, sums[i], mask=inside)


@triton.jit
def add_delta(
    delta,
    q_tile,
    grad_tile,
    m_i,
    inverse,
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
    """The sum of P dP over a block of keys."""
    offs_n = first + tl.arange(0, BLOCK_N)
    inside = offs_n < N
    read = inside if CUT else None
    k_tile = load_rows(k_ptr, offs_n, stride_kn, read, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(v_ptr, offs_n, stride_vn, read, VALUE_DIM, BLOCK_E)
    q, k = offs_m[:, None], offs_n[None, :]
    # fmt: off
    _, p = weights_of_block(
        q_tile, k_tile, b, h, q, k, q < M, inside[None, :], m_i[:, None], inverse[:, None],
        M, N, OPERANDS,
        CUT, SCALE, UNIT, PRECISION,
    )
    # fmt: on
    dP = product(grad_tile, tl.trans(v_tile), None, PRECISION)
    return delta + tl.sum(p * dP, 1)


@triton.jit
def attention_row_terms(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    grad_out_ptr,  # [B,H,M,E]
    out_ptr,  # [B,H,M,E]
    statistics_ptr,  # float32 [B,H,M,2], m_i and l_i
    terms_ptr,  # float32 [3,B,H,M], written: m_i, 1 / l_i and delta
    sink_sums_ptr,  # float32 [SINK_SUMS,B,H,M], written
    table_ptr,  # int32 [B|1,H|1, blocks of rows, 4], where LISTED, see tables.py
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
    stride_gob,
    stride_goh,
    stride_gom,
    stride_ob,
    stride_oh,
    stride_om,
    stride_tb,
    stride_th,
    terms_step,  # B * H * M
    sums_step,  # likewise
    H,
    M,
    N,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SINK_SUMS: tl.constexpr,  # how many numbers the sink reads that want a gradient
    REFINED: tl.constexpr,  # delta as the sum of P dP
    MAY_BE_EMPTY: tl.constexpr,  # some row may have no key
    PRECISION: tl.constexpr,
    LISTED: tl.constexpr,  # blocks stand in a table
    FULL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What the kernels that follow read of rows, once for all: m_i, 1 / l_i and delta.

    delta is the sum of P dP instead of dO O where the two should cancel: in rows of few keys,
    and for what the score reads, whose gradient is the sum of many of either sign. They differ by
    the rounding of O."""
    b, h, row_block = head_and_block(H, tl.cdiv(M, BLOCK_M))
    row = (b.to(tl.int64) * H + h) * M
    statistics_ptr += 2 * row
    if LISTED:
        table_ptr += b * stride_tb + h * stride_th + row_block * 4

    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < M
    grad_out_ptr = head_of(grad_out_ptr, b, h, stride_gob, stride_goh)
    grad_tile = load_rows(grad_out_ptr, offs_m, stride_gom, inside, VALUE_DIM, BLOCK_E)
    m_i, inverse = load_statistics(statistics_ptr, offs_m, inside, MAY_BE_EMPTY)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if not REFINED:
        out_ptr = head_of(out_ptr, b, h, stride_ob, stride_oh)
        out_tile = load_rows(out_ptr, offs_m, stride_om, inside, VALUE_DIM, BLOCK_E)
        delta += tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    full_first, full_count, cut_first, cut_count = blocks_of_keys(
        table_ptr, row_block, b, h, M, N, OPERANDS, LISTED, BLOCK_M, BLOCK_N
    )
    if (full_count + cut_count < 2) | REFINED:
        q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh)
        k_ptr = head_of(k_ptr, b, h // GROUP, stride_kb, stride_kg)
        v_ptr = head_of(v_ptr, b, h // GROUP, stride_vb, stride_vg)
        q_tile = load_rows(q_ptr, offs_m, stride_qm, inside, HEAD_DIM, BLOCK_D)
        delta = tl.zeros([BLOCK_M], tl.float32)
        for i in range(full_first, full_first + full_count):
            block = i if FULL_RUN else tl.load(blocks_ptr + i)
            # fmt: off
            delta = add_delta(
                delta, q_tile, grad_tile, m_i, inverse, k_ptr, v_ptr, stride_kn, stride_vn,
                block * BLOCK_N, b, h, offs_m, M, N, OPERANDS,
                False, SCALE, UNIT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
            )
            # fmt: on
        for i in range(cut_first, cut_first + cut_count):
            block = cut_block(i, blocks_ptr, full_first, full_count, LISTED)
            # fmt: off
            delta = add_delta(
                delta, q_tile, grad_tile, m_i, inverse, k_ptr, v_ptr, stride_kn, stride_vn,
                block * BLOCK_N, b, h, offs_m, M, N, OPERANDS,
                True, SCALE, UNIT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
            )
            # fmt: on
    # A row without a key has no gradient, whatever it yields.
    delta = tl.where(inverse == 0.0, 0.0, delta)
    store_terms(terms_ptr + row, terms_step, offs_m, inside, m_i, inverse, delta)
    if SINK_SUMS > 0:
        sink = tl.cast(sink_of(b, h, offs_m, inside, M, N, OPERANDS), tl.float32) * (LOG2_E / UNIT)
        gradient = -tl.exp2((sink - m_i) * UNIT) * inverse * delta
        sums = sink_sums_of(gradient, b, h, offs_m, inside, M, N, OPERANDS)
        store_sums(sink_sums_ptr + row, sums_step, sums, offs_m, inside, SINK_SUMS)


@triton.jit
def visit_keys(
    acc,
    sums,
    q_tile,
    grad_tile,
    m_i,
    inverse,
    delta,
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
    ROW_SUMS: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What a block of keys, from `first` on, adds to dQ / scale and to the sums by rows."""
    offs_n = first + tl.arange(0, BLOCK_N)
    inside = offs_n < N
    read = inside if CUT else None
    k_tile = load_rows(k_ptr, offs_n, stride_kn, read, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(v_ptr, offs_n, stride_vn, read, VALUE_DIM, BLOCK_E)
    q, k = offs_m[:, None], offs_n[None, :]
    q_inside, k_inside = q < M, inside[None, :]
    # fmt: off
    S, p = weights_of_block(
        q_tile, k_tile, b, h, q, k, q_inside, k_inside, m_i[:, None], inverse[:, None],
        M, N, OPERANDS,
        CUT, SCALE, UNIT, PRECISION,
    )
    # fmt: on
    dP = product(grad_tile, tl.trans(v_tile), None, PRECISION)
    dscore = p * (dP - delta[:, None])
    if ROW_SUMS > 0:
        sums = row_sums_of(sums, dscore, S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    dS = to_product(dscore, S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    acc = product(dS.to(k_tile.dtype), k_tile, acc, PRECISION)
    return acc, sums


@triton.jit
def attention_grad_q(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    grad_out_ptr,  # [B,H,M,E]
    terms_ptr,  # float32 [3,B,H,M]
    grad_q_ptr,  # [B,H,M,D], written
    row_sums_ptr,  # float32 [ROW_SUMS,B,H,M], written
    table_ptr,  # int32 [B|1,H|1, blocks of rows, 4], where LISTED
    blocks_ptr,  # int32
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_vb,
    stride_vg,
    stride_vn,
    stride_gob,
    stride_goh,
    stride_gom,
    stride_gqb,
    stride_gqh,
    stride_gqm,
    stride_tb,
    stride_th,
    terms_step,  # B * H * M
    sums_step,  # likewise
    H,
    M,
    N,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    PRODUCT_SCALE: tl.constexpr,  # of S
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROW_SUMS: tl.constexpr,  # how many numbers the score reads by rows that want a gradient
    PRECISION: tl.constexpr,
    LISTED: tl.constexpr,  # blocks stand in a table
    FULL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    b, h, block = head_and_block(H, tl.cdiv(M, BLOCK_M))
    # Last rows first: under a causal mask they take longest.
    row_block = tl.cdiv(M, BLOCK_M) - 1 - block
    q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh)
    k_ptr = head_of(k_ptr, b, h // GROUP, stride_kb, stride_kg)
    v_ptr = head_of(v_ptr, b, h // GROUP, stride_vb, stride_vg)
    grad_out_ptr = head_of(grad_out_ptr, b, h, stride_gob, stride_goh)
    row = (b.to(tl.int64) * H + h) * M
    if LISTED:
        table_ptr += b * stride_tb + h * stride_th + row_block * 4

    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < M
    q_tile = load_rows(q_ptr, offs_m, stride_qm, inside, HEAD_DIM, BLOCK_D)
    grad_tile = load_rows(grad_out_ptr, offs_m, stride_gom, inside, VALUE_DIM, BLOCK_E)
    m_i, inverse, delta = load_terms(terms_ptr + row, terms_step, offs_m, inside)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = zero_row_sums(BLOCK_M)

    full_first, full_count, cut_first, cut_count = blocks_of_keys(
        table_ptr, row_block, b, h, M, N, OPERANDS, LISTED, BLOCK_M, BLOCK_N
    )
    for i in range(full_first, full_first + full_count):
        block = i if FULL_RUN else tl.load(blocks_ptr + i)
        # fmt: off
        acc, sums = visit_keys(
            acc, sums, q_tile, grad_tile, m_i, inverse, delta, k_ptr, v_ptr, stride_kn, stride_vn,
            block * BLOCK_N, b, h, offs_m, M, N, OPERANDS,
            False, ROW_SUMS, SCALE, UNIT, PRECISION,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    for i in range(cut_first, cut_first + cut_count):
        block = cut_block(i, blocks_ptr, full_first, full_count, LISTED)
        # fmt: off
        acc, sums = visit_keys(
            acc, sums, q_tile, grad_tile, m_i, inverse, delta, k_ptr, v_ptr, stride_kn, stride_vn,
            block * BLOCK_N, b, h, offs_m, M, N, OPERANDS,
            True, ROW_SUMS, SCALE, UNIT, PRECISION,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    grad_q_ptr = head_of(grad_q_ptr, b, h, stride_gqb, stride_gqh)
    store_rows(grad_q_ptr, acc * PRODUCT_SCALE, offs_m, stride_gqm, inside, HEAD_DIM, BLOCK_D)
    if ROW_SUMS > 0:
        store_sums(row_sums_ptr + row, sums_step, sums, offs_m, inside, ROW_SUMS)


@triton.jit
def store_rows(ptr, tile, rows, stride, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] to a matrix of DIM columns, rounded to what it holds."""
    dims = tl.arange(0, BLOCK)
    places = ptr + rows[:, None].to(tl.int64) * stride + dims[None, :]
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(places, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visit_rows(
    grad_k,
    grad_v,
    sums,
    k_tile,
    v_tile,
    q_ptr,
    grad_out_ptr,
    terms_ptr,
    terms_step,
    stride_qm,
    stride_gom,
    first,
    b,
    h,
    offs_n,
    M,
    N,
    OPERANDS,
    CUT: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What a block of rows, from `first` on, adds to dK / scale, to dV and to sums by columns.

    Its scores lie as [keys, rows], so that they are left factors as they are.
    """
    offs_m = first + tl.arange(0, BLOCK_M)
    inside = offs_m < M
    read = inside if CUT else None
    q_tile = load_rows(q_ptr, offs_m, stride_qm, read, HEAD_DIM, BLOCK_D)
    grad_tile = load_rows(grad_out_ptr, offs_m, stride_gom, read, VALUE_DIM, BLOCK_E)
    m_i, inverse, delta = load_terms(terms_ptr, terms_step, offs_m, inside)
    q, k = offs_m[None, :], offs_n[:, None]
    q_inside, k_inside = inside[None, :], k < N
    # fmt: off
    S, p = weights_of_block(
        k_tile, q_tile, b, h, q, k, q_inside, k_inside, m_i[None, :], inverse[None, :],
        M, N, OPERANDS,
        CUT, SCALE, UNIT, PRECISION,
    )
    # fmt: on
    grad_v = product(p.to(grad_tile.dtype), grad_tile, grad_v, PRECISION)
    dP = product(v_tile, tl.trans(grad_tile), None, PRECISION)
    dscore = p * (dP - delta[None, :])
    if COLUMN_SUMS > 0:
        sums = column_sums_of(sums, dscore, S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    dS = to_product(dscore, S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    grad_k = product(dS.to(q_tile.dtype), q_tile, grad_k, PRECISION)
    return grad_k, grad_v, sums


@triton.jit
def attention_grad_kv(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    grad_out_ptr,  # [B,H,M,E]
    terms_ptr,  # float32 [3,B,H,M]
    grad_k_ptr,  # [B,G,N,D], written
    grad_v_ptr,  # [B,G,N,E], written
    column_sums_ptr,  # float32 [COLUMN_SUMS,B,H,N], written
    table_ptr,  # int32 [B|1,H|1, blocks of keys, 4], of blocks of rows, where LISTED
    blocks_ptr,  # int32
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_vb,
    stride_vg,
    stride_vn,
    stride_gob,
    stride_goh,
    stride_gom,
    stride_gkb,
    stride_gkg,
    stride_gkn,
    stride_gvb,
    stride_gvg,
    stride_gvn,
    stride_tb,
    stride_th,
    terms_step,  # B * H * M
    sums_step,  # B * H * N
    H,
    M,
    N,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    PRODUCT_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,  # how many numbers the score reads by columns that want a gradient
    PRECISION: tl.constexpr,
    LISTED: tl.constexpr,  # blocks stand in a table
    FULL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The heads of a group one after the other; sums by columns are each head's own."""
    b, group, key_block = head_and_block(H // GROUP, tl.cdiv(N, BLOCK_N))
    k_ptr = head_of(k_ptr, b, group, stride_kb, stride_kg)
    v_ptr = head_of(v_ptr, b, group, stride_vb, stride_vg)

    offs_n = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < N
    k_tile = load_rows(k_ptr, offs_n, stride_kn, inside, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(v_ptr, offs_n, stride_vn, inside, VALUE_DIM, BLOCK_E)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)

    # Else what the first blocks read by is kept in registers from head to head.
    for member in tl.range(GROUP, disable_licm=True):
        h = group * GROUP + member
        head = b.to(tl.int64) * H + h
        q_of_head = head_of(q_ptr, b, h, stride_qb, stride_qh)
        grad_of_head = head_of(grad_out_ptr, b, h, stride_gob, stride_goh)
        terms_of_head = terms_ptr + head * M
        table_of_head = table_ptr
        if LISTED:
            table_of_head += b * stride_tb + h * stride_th + key_block * 4
        sums = zero_column_sums(BLOCK_N)
        full_first, full_count, cut_first, cut_count = blocks_of_rows(
            table_of_head, key_block, b, h, M, N, OPERANDS, LISTED, BLOCK_M, BLOCK_N
        )
        for i in range(full_first, full_first + full_count):
            block = i if FULL_RUN else tl.load(blocks_ptr + i)
            # fmt: off
            grad_k, grad_v, sums = visit_rows(
                grad_k, grad_v, sums, k_tile, v_tile,
                q_of_head, grad_of_head, terms_of_head, terms_step, stride_qm, stride_gom,
                block * BLOCK_M, b, h, offs_n, M, N, OPERANDS,
                False, COLUMN_SUMS, SCALE, UNIT, PRECISION,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_E,
            )
            # fmt: on
        for i in range(cut_first, cut_first + cut_count):
            block = cut_block(i, blocks_ptr, full_first, full_count, LISTED)
            # fmt: off
            grad_k, grad_v, sums = visit_rows(
                grad_k, grad_v, sums, k_tile, v_tile,
                q_of_head, grad_of_head, terms_of_head, terms_step, stride_qm, stride_gom,
                block * BLOCK_M, b, h, offs_n, M, N, OPERANDS,
                True, COLUMN_SUMS, SCALE, UNIT, PRECISION,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_E,
            )
            # fmt: on
        if COLUMN_SUMS > 0:
            store_sums(column_sums_ptr + head * N, sums_step, sums, offs_n, inside, COLUMN_SUMS)
    grad_k_ptr = head_of(grad_k_ptr, b, group, stride_gkb, stride_gkg)
    grad_v_ptr = head_of(grad_v_ptr, b, group, stride_gvb, stride_gvg)
    store_rows(grad_k_ptr, grad_k * PRODUCT_SCALE, offs_n, stride_gkn, inside, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr, grad_v, offs_n, stride_gvn, inside, VALUE_DIM, BLOCK_E)

"""The template of gradients that no sum by rows or columns gives: dense biases, and by distance.

With dscore as in backward.py, a number that the score reads at (b, h, q, k) receives dscore *
d score / d number, summed over all the places that read it:

    attention_grad_bias      one for each query and key: a tile of them, over the batch items and
                             heads that share it; grid: B|1 * H|1 * tiles
    attention_grad_distance  one for each k - q: the blocks of a diagonal are added up, then the
                             diagonals of that sum; grid: B|1 * H|1 * diagonals of blocks

LOAD says which of the numbers: `gradient_of_load` is written by gradient_source.py.
"""

import triton
import triton.language as tl


@triton.jit
def add_block(
    total,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    terms_ptr,
    terms_step,
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
    b,
    h,
    row_block,
    key_block,
    H,
    M,
    N,
    OPERANDS,
    LOAD: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """total and what a block of one head adds; nothing is multiplied where the mask is false."""
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_inside, keys_inside = offs_m < M, offs_n < N
    q, k = offs_m[:, None], offs_n[None, :]
    q_inside, k_inside = rows_inside[:, None], keys_inside[None, :]
    inside = q_inside & k_inside
    keep = inside & mask_of(b, h, q, k, q_inside, k_inside, M, N, OPERANDS)
    if tl.max(keep.to(tl.int32)) > 0:
        q_ptr = head_of(q_ptr, b, h, stride_qb, stride_qh)
        k_ptr = head_of(k_ptr, b, h // GROUP, stride_kb, stride_kg)
        v_ptr = head_of(v_ptr, b, h // GROUP, stride_vb, stride_vg)
        grad_out_ptr = head_of(grad_out_ptr, b, h, stride_gob, stride_goh)
        row = (tl.cast(b, tl.int64) * H + h) * M
        q_tile = load_rows(q_ptr, offs_m, stride_qm, rows_inside, HEAD_DIM, BLOCK_D)
        k_tile = load_rows(k_ptr, offs_n, stride_kn, keys_inside, HEAD_DIM, BLOCK_D)
        m_i, inverse, delta = load_terms(terms_ptr + row, terms_step, offs_m, rows_inside)
        # fmt: off
        S, p = weights_of_block(
            q_tile, k_tile, b, h, q, k, q_inside, k_inside, m_i[:, None], inverse[:, None],
            M, N, OPERANDS,
            True, SCALE, UNIT, PRECISION,
        )
        # fmt: on
        grad_tile = load_rows(grad_out_ptr, offs_m, stride_gom, rows_inside, VALUE_DIM, BLOCK_E)
        v_tile = load_rows(v_ptr, offs_n, stride_vn, keys_inside, VALUE_DIM, BLOCK_E)
        dP = product(grad_tile, tl.trans(v_tile), None, PRECISION)
        dscore = p * (dP - delta[:, None])
        # fmt: off
        total += gradient_of_load(
            LOAD, dscore, S, b, h, q, k, q_inside, k_inside, M, N, OPERANDS
        )
        # fmt: on
    return total


@triton.jit
def attention_grad_bias(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    grad_out_ptr,  # [B,H,M,E]
    terms_ptr,  # float32 [3,B,H,M], see backward.py
    bias_ptr,  # written, where q and k lie inside it
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
    terms_step,  # B * H * M
    bias_from,  # the place of what b, h, and the axes of q and k count from
    stride_bias_b,
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    q_from,  # q lies at q_from + Q_SIGN * q of its axis
    k_from,
    q_size,
    k_size,
    items,  # batch items and heads that share a number
    H,
    M,
    N,
    OPERANDS,
    LOAD: tl.constexpr,
    PER_HEAD: tl.constexpr,
    Q_SIGN: tl.constexpr,
    K_SIGN: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    key_blocks = tl.cdiv(N, BLOCK_N)
    heads, shared = (H, 1) if PER_HEAD else (1, H)
    first_b, first_h, tile = head_and_block(heads, tl.cdiv(M, BLOCK_M) * key_blocks)
    row_block, key_block = tile // key_blocks, tile % key_blocks
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in range(items):
        # fmt: off
        total = add_block(
            total, q_ptr, k_ptr, v_ptr, grad_out_ptr, terms_ptr, terms_step,
            stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_kn,
            stride_vb, stride_vg, stride_vn, stride_gob, stride_goh, stride_gom,
            first_b + item // shared, first_h + item % shared, row_block, key_block,
            H, M, N, OPERANDS,
            LOAD, SCALE, UNIT, GROUP, HEAD_DIM, VALUE_DIM, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )
        # fmt: on
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    q_place, k_place = q_from + Q_SIGN * offs_m, k_from + K_SIGN * offs_n
    # Under a condition some are never read, and need not be there.
    q_inside = (offs_m < M) & (q_place >= 0) & (q_place < q_size)
    k_inside = (offs_n < N) & (k_place >= 0) & (k_place < k_size)
    bias_ptr = head_of(bias_ptr + bias_from, first_b, first_h, stride_bias_b, stride_bias_h)
    rows = q_place.to(tl.int64) * stride_bias_q
    places = bias_ptr + rows[:, None] + (k_place.to(tl.int64) * stride_bias_k)[None, :]
    mask = q_inside[:, None] & k_inside[None, :]
    tl.store(places, total.to(bias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_grad_distance(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    grad_out_ptr,  # [B,H,M,E]
    terms_ptr,  # float32 [3,B,H,M], see backward.py
    sums_ptr,  # float32 [B|1 * H|1, diagonals, 2, BLOCK_N], written
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
    terms_step,  # B * H * M
    items,  # batch items and heads that share a number
    H,
    M,
    N,
    OPERANDS,
    LOAD: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Of the diagonal of blocks whose key block is `ahead` of its row block: the sums for k - q =
    ahead * BLOCK_N + i, then those for (ahead - 1) * BLOCK_N + i, i in 0..BLOCK_N."""
    tl.static_assert(BLOCK_M == BLOCK_N, "diagonals are those of square blocks")
    row_blocks, key_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    heads, shared = (H, 1) if PER_HEAD else (1, H)
    first_b, first_h, diagonal = head_and_block(heads, row_blocks + key_blocks - 1)
    ahead = diagonal - (row_blocks - 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.maximum(0, -ahead)
    last = tl.minimum(row_blocks, key_blocks - ahead)
    for item in range(items):
        for row_block in range(first, last):
            # fmt: off
            total = add_block(
                total, q_ptr, k_ptr, v_ptr, grad_out_ptr, terms_ptr, terms_step,
                stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_kn,
                stride_vb, stride_vg, stride_vn, stride_gob, stride_goh, stride_gom,
                first_b + item // shared, first_h + item % shared, row_block, row_block + ahead,
                H, M, N, OPERANDS,
                LOAD, SCALE, UNIT, GROUP, HEAD_DIM, VALUE_DIM, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
            )
            # fmt: on
    # Rows are turned, so that a column holds what lies on one diagonal or on the one BLOCK_N below.
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    turned = tl.gather(total, (row + column) % BLOCK_N, 1)
    above = tl.sum(tl.where(row + column < BLOCK_N, turned, 0.0), 0)
    below = tl.sum(tl.where(row + column < BLOCK_N, 0.0, turned), 0)
    places = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(places, above)
    tl.store(places + BLOCK_N, below)

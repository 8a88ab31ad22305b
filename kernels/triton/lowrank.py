"""The template of attention with a near and a far field: near keys exactly, far ones by centroids.

Each block of BLOCK_N keys j has CENTROIDS pairs (k_jc, v_jc), each standing for n_jc of its keys
(their means, say). A block of rows has two lists of blocks of keys. With Near the keys of the
first that the mask attends to, and Far those of the second,

    score(k)    = score_of(scale * q k^T)                       of a key in Near
    score(j, c) = score_of(scale * q k_jc^T) + log(n_jc)        of a centroid of a block in Far
    out         = (sum exp(score(k)) v_k + sum exp(score(j, c)) v_jc) / l
    l           = sum exp(score(k)) + sum exp(score(j, c)) + the sink's share

in one online softmax, so that the only error is that a key of Far has its centroid's score and
value. Every row of the block attends to every key of Far: centroids are not masked, and what the
mask cuts is Near. score_of is of S alone: a centroid has no position.

Near is visited as in forward.py, by its table. Of Far a tile takes the centroids of
BLOCK_N / CENTROIDS blocks, by their indices, so that products are of the size that Near's are.

With HAS_FLAGS heads whose flag is below 0 are absent, as in forward.py.

Grid: blocks of rows * B * H. Layouts as in forward.py; k_far, v_far and log_count lie by J (blocks
of keys) and C (CENTROIDS) together, J * C rows. Source: the far field's expansion about centers,
of one term, as in Greengard and Rokhlin, "A fast algorithm for particle simulations", 1987.
"""

import triton
import triton.language as tl


@triton.jit
def visit_centroids(
    acc,
    l_i,
    m_i,
    t_i,
    q_tile,
    k_ptr,
    v_ptr,
    log_count_ptr,
    stride_kc,
    stride_vc,
    blocks_ptr,
    first,
    stop,
    b,
    h,
    q,
    M,
    N,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    LAZY: tl.constexpr,
    CENTROIDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The centroids of BLOCK_N / CENTROIDS listed blocks from `first` on, before `stop`."""
    columns = tl.arange(0, BLOCK_N)
    listed = first + columns // CENTROIDS
    inside = listed < stop
    centroids = tl.load(blocks_ptr + listed, mask=inside, other=0) * CENTROIDS + columns % CENTROIDS
    k_tile = load_rows(k_ptr, centroids, stride_kc, inside, HEAD_DIM, BLOCK_D)
    # -inf where nothing is: what is not inside, and centroids of no keys.
    log_count = tl.load(log_count_ptr + centroids, mask=inside, other=float("-inf"))
    # fmt: off
    _, score = scores_of_block(
        q_tile, k_tile, b, h, q[:, None], centroids[None, :], (q < M)[:, None], inside[None, :],
        M, N, OPERANDS,
        False, SCALE, QK,
    )
    score += (log_count * (LOG2_E / (UNIT * FOLD)))[None, :]
    return weigh_block(
        acc, l_i, m_i, t_i, score, v_ptr, stride_vc, None, centroids, inside, 0.0, False,
        UNIT, PV, LAZY, False, True, VALUE_DIM, BLOCK_E,
    )
    # fmt: on


@triton.jit
def fused_lowrank_attention(
    q_ptr,  # [B,H,M,D]
    k_ptr,  # [B,G,N,D]
    v_ptr,  # [B,G,N,E]
    out_ptr,  # [B,H,M,E]
    lse_ptr,  # float32 [B,H,M], where HAS_LSE
    near_ptr,  # int32 [B|1,H|1, blocks of rows, 4], see tables.py
    near_blocks_ptr,  # int32, likewise
    far_ptr,  # int32 [B|1,H|1, blocks of rows, 2]: the first in the list, and how many
    far_blocks_ptr,  # int32, indices of blocks of keys
    k_far_ptr,  # [B,G,J*C,D]
    v_far_ptr,  # [B,G,J*C,E]
    log_count_ptr,  # float32 [B,G,J*C]
    flags_ptr,  # int32 [B|1,H|1], where HAS_FLAGS
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
    stride_nb,
    stride_nh,
    stride_fb,
    stride_fh,
    stride_kfb,
    stride_kfg,
    stride_kfn,
    stride_vfb,
    stride_vfg,
    stride_vfn,
    stride_cb,
    stride_cg,
    stride_pb,
    stride_ph,
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
    HAS_FLAGS: tl.constexpr,
    QK: tl.constexpr,  # the precision of products, see `product`
    PV: tl.constexpr,
    LAZY: tl.constexpr,
    FULL_RUN: tl.constexpr,  # of Near: full blocks follow each other
    CENTROIDS: tl.constexpr,  # of a block of keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tl.static_assert(BLOCK_N % CENTROIDS == 0, "a tile holds the centroids of whole blocks")
    row_blocks = tl.cdiv(M, BLOCK_M)
    row_block = row_blocks - 1 - tl.program_id(0) % row_blocks
    b, h = tl.program_id(0) // row_blocks // H, tl.program_id(0) // row_blocks % H
    batch, head, group = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + group * stride_kg
    v_ptr += batch * stride_vb + group * stride_vg
    near_ptr += b * stride_nb + h * stride_nh + row_block * 4

    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_inside = offs_m < M
    taken = 1
    if HAS_FLAGS:
        taken = tl.where(tl.load(flags_ptr + b * stride_pb + h * stride_ph) >= 0, 1, 0)
        rows_inside = rows_inside & (taken == 1)
    q_tile = load_rows(q_ptr, offs_m, stride_qm, rows_inside, HEAD_DIM, BLOCK_D)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    t_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    # fmt: off
    acc, l_i, m_i, t_i = visit_blocks(
        acc, l_i, m_i, t_i, q_tile, k_ptr, v_ptr, stride_kn, stride_vn,
        near_ptr, near_blocks_ptr, taken, 0.0, False, row_block, b, h, offs_m, M, N, OPERANDS,
        True, FULL_RUN, True, SCALE, UNIT, QK, PV,
        LAZY, False, True, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )
    # fmt: on
    # Only here: registers are few.
    k_far_ptr += batch * stride_kfb + group * stride_kfg
    v_far_ptr += batch * stride_vfb + group * stride_vfg
    log_count_ptr += batch * stride_cb + group * stride_cg
    far_ptr += b * stride_fb + h * stride_fh + row_block * 2
    far_first, far_count = tl.load(far_ptr), tl.load(far_ptr + 1) * taken
    # fmt: off
    for first in range(far_first, far_first + far_count, BLOCK_N // CENTROIDS):
        acc, l_i, m_i, t_i = visit_centroids(
            acc, l_i, m_i, t_i, q_tile, k_far_ptr, v_far_ptr, log_count_ptr, stride_kfn, stride_vfn,
            far_blocks_ptr, first, far_first + far_count, b, h, offs_m, M, N, OPERANDS,
            SCALE, UNIT, QK, PV, LAZY,
            CENTROIDS, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_E,
        )
    if HAS_FLAGS:
        l_i = tl.where(taken == 0, 1.0, l_i)  # no row of an absent head counts as empty
    row = (batch * H + head) * M + offs_m
    out_rows = batch * stride_ob + head * stride_oh + offs_m.to(tl.int64) * stride_om
    store_rows(
        out_ptr, lse_ptr, out_rows, row, rows_inside, acc, l_i, m_i, v_ptr, stride_vn,
        b, h, offs_m, M, N, OPERANDS,
        UNIT, VALUE_DIM, HAS_SINK, EMPTY_ROW, HAS_LSE, BLOCK_N, BLOCK_E,
    )
    # fmt: on

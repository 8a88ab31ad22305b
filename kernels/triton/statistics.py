"""The template of statistics: what is known of the scores of some rows, in one pass over the keys.

The rows stand anywhere: `at` says where. A tile's rows are pairs of a query head and a row of one
key head, as in decode.py. Of each row and each BLOCK_N keys (a step), with x = score - m,

    m        the largest score, NaN where one is
    total    sum exp(x)            product   sum x exp(x)            least   the least score
    count    how many keys are attended to, and which: a bit each

A step has a reference m of its own, so that no step waits for another: they are divided among
`splits` programs, and whoever adds them up rescales, always in the same order. All terms of a
product are of one sign, and stay so when rescaled: nothing cancels. In memory it is six numbers for
BLOCK_N scores. A step that no row of a tile attends to is not read.

Beside these, the scores of keys less than NEAR from a row's position, the sink, and by a second
kernel those of a few keys that are known only once all are counted: the rank-th attended key of a
step, of which the bits tell the place and one product the score.

Grid of fused_row_statistics: splits * tiles of rows * B * G; of sampled_scores: B * H * R. Scores
are in natural units. q_BHRD and k_BGND lie with their last axis contiguous. Source of sums by
parts: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.1.
"""

import triton
import triton.language as tl


@triton.jit
def facts_of_step(score, keep, UNIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """(m, total, product, least, count, bits) of scores [rows, keys], of the keys to be kept."""
    attended = tl.where(keep, score, float("-inf"))
    # A maximum may leave NaN out.
    unknown = tl.max((attended != attended).to(tl.int32), 1) > 0
    m = tl.max(attended, 1)
    x = attended - tl.where(m == float("-inf"), 0.0, m)[:, None]
    p = tl.exp2(x * UNIT)
    product = tl.sum(tl.where(p == 0.0, 0.0, p * x), 1)
    least = tl.min(tl.where(keep, score, float("inf")), 1)
    bits = tl.sum(keep.to(tl.int64) << tl.arange(0, BLOCK_N).to(tl.int64)[None, :], 1)
    m = tl.where(unknown, float("nan"), m)
    return m, tl.sum(p, 1), product, least, tl.sum(keep.to(tl.int32), 1), bits


@triton.jit
def fused_row_statistics(
    q_ptr,  # [B,H,R,D]
    k_ptr,  # [B,G,N,D]
    at_ptr,  # int64 [R], where the rows stand among the M
    sums_ptr,  # float32 [4,steps,B,H,R]: m, total, product, least
    count_ptr,  # int32 [steps,B,H,R]
    bits_ptr,  # int64 [steps,B,H,R]
    near_ptr,  # float32 [B,H,R,2*NEAR-1], all -inf: written where a row attends
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
    steps,
    splits,
    OPERANDS,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
    SHUTS_OUT: tl.constexpr,  # whether a score of -inf is of a key that is not attended to
    NEAR: tl.constexpr,
    QK: tl.constexpr,  # the precision of products, see `product`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split, place = tl.program_id(0) % splits, tl.program_id(0) // splits
    tiles = tl.cdiv(GROUP * R, BLOCK_M)
    tile, place = place % tiles, place // tiles
    groups = H // GROUP
    b, g = place // groups, place % groups
    batch, group = b.to(tl.int64), g.to(tl.int64)
    k_ptr += batch * stride_kb + group * stride_kg

    pairs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pairs < GROUP * R
    pairs = tl.minimum(pairs, GROUP * R - 1)
    h, of_rows = g * GROUP + pairs // R, pairs % R
    heads = h.to(tl.int64)
    q = tl.load(at_ptr + of_rows).to(tl.int32)
    q_rows = q_ptr + batch * stride_qb + heads * stride_qh + of_rows.to(tl.int64) * stride_qm
    q_tile = load_at(q_rows, inside, HEAD_DIM, BLOCK_D)
    row = (batch * H + heads) * R + of_rows
    all_rows = tl.cast(B, tl.int64) * H * R

    if HAS_SINK:
        sink = tl.cast(sink_of(b, h, q, q < M, M, N, OPERANDS), tl.float32)
        tl.store(sink_ptr + row, sink + tl.zeros([BLOCK_M], tl.float32), mask=inside & (split == 0))
    low, high = some_keys(b, h, q, q, M, N, OPERANDS)
    # Numbers of run time may be of 64 bits: within the keys first.
    nothing = tl.zeros_like(row)
    low = tl.minimum(tl.maximum(nothing + low, 0), N).to(tl.int32)
    high = tl.maximum(tl.minimum(nothing + high, N - 1), -1).to(tl.int32)
    diagonal = q + (N - M)

    share = tl.cdiv(steps, splits)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        first = step * BLOCK_N
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        product_ = tl.zeros([BLOCK_M], tl.float32)
        least = tl.full([BLOCK_M], float("inf"), tl.float32)
        count = tl.zeros([BLOCK_M], tl.int32)
        bits = tl.zeros([BLOCK_M], tl.int64)
        meets = inside & (low < first + BLOCK_N) & (high >= first)
        if tl.max(meets.to(tl.int32), 0) > 0:
            offs_n = first + tl.arange(0, BLOCK_N)
            k_inside = offs_n < N
            k_tile = load_rows(k_ptr, offs_n, stride_kn, k_inside, HEAD_DIM, BLOCK_D)
            # fmt: off
            _, score = scores_of_block(
                q_tile, k_tile, b, h[:, None], q[:, None], offs_n[None, :],
                (q < M)[:, None], k_inside[None, :], M, N, OPERANDS,
                False, SCALE, QK,
            )
            keep = inside[:, None] & k_inside[None, :] & mask_of(
                b, h[:, None], q[:, None], offs_n[None, :],
                (q < M)[:, None], k_inside[None, :], M, N, OPERANDS
            )
            # fmt: on
            if SHUTS_OUT:
                keep = keep & (score != float("-inf"))
            m, total, product_, least, count, bits = facts_of_step(score, keep, UNIT, BLOCK_N)
            away = offs_n[None, :] - diagonal[:, None] + (NEAR - 1)
            is_near = keep & (away >= 0) & (away < 2 * NEAR - 1)
            if tl.max(tl.max(is_near.to(tl.int32), 1), 0) > 0:
                places = near_ptr + (row * (2 * NEAR - 1))[:, None] + away
                tl.store(places, score, mask=is_near)
        found = step * all_rows + row
        part = steps * all_rows
        tl.store(sums_ptr + found, m, mask=inside)
        tl.store(sums_ptr + part + found, total, mask=inside)
        tl.store(sums_ptr + 2 * part + found, product_, mask=inside)
        tl.store(sums_ptr + 3 * part + found, least, mask=inside)
        tl.store(count_ptr + found, count, mask=inside)
        tl.store(bits_ptr + found, bits, mask=inside)


@triton.jit
def sampled_scores(
    q_ptr,  # [B,H,R,D]
    k_ptr,  # [B,G,N,D]
    at_ptr,  # int64 [R]
    bits_ptr,  # int64 [steps,B,H,R]
    step_ptr,  # int32 [B,H,R,SAMPLES]
    rank_ptr,  # int32 [B,H,R,SAMPLES]: which of the step's attended keys, from 1
    out_ptr,  # float32 [B,H,R,SAMPLES]
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
    OPERANDS,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SAMPLES: tl.constexpr,  # of each row, a power of two
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place, h = tl.program_id(0) % R, tl.program_id(0) // R % H
    b = tl.program_id(0) // R // H
    batch, head = b.to(tl.int64), h.to(tl.int64)
    k_ptr += batch * stride_kb + head // GROUP * stride_kg
    q_ptr += batch * stride_qb + head * stride_qh + place.to(tl.int64) * stride_qm

    samples = row * SAMPLES + tl.arange(0, SAMPLES)
    step, rank = tl.load(step_ptr + samples), tl.load(rank_ptr + samples)
    word = tl.load(bits_ptr + step.to(tl.int64) * B * H * R + row)
    bits = (word[:, None] >> tl.arange(0, BLOCK_N).to(tl.int64)[None, :]) & 1
    before = tl.cumsum(bits.to(tl.int32), 1) < rank[:, None]
    # In a row without a key there is none: any will do.
    k = tl.minimum(step * BLOCK_N + tl.sum(before.to(tl.int32), 1), N - 1)

    one = tl.arange(0, 1)
    q = tl.load(at_ptr + place + one).to(tl.int32)
    q_row = load_at(q_ptr + one, one == 0, HEAD_DIM, BLOCK_D).to(tl.float32)
    k_tile = load_rows(k_ptr, k, stride_kn, k < N, HEAD_DIM, BLOCK_D).to(tl.float32)
    S = tl.sum(q_row * k_tile, 1)[None, :] * SCALE
    # fmt: off
    score = score_of(
        S, b, h, q[:, None], k[None, :], (q < M)[:, None], (k < N)[None, :], M, N, OPERANDS
    )
    # fmt: on
    tl.store(out_ptr + samples[None, :], score)

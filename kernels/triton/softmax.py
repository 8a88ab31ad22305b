"""The online softmax: rows on their way through blocks of keys, and how they end.

For each query row, over the keys in blocks, with a reference m_i that the scores are taken from
(the largest score so far), the sum l_i of the weights and the output acc:

    score = score_of(scale * q k^T)        m = max(m_i, max(score))
    acc   = acc * exp(m_i - m) + exp(score - m) v        l_i likewise        out = acc / l_i

Exponentials are of base 2: exp(x) = exp2(UNIT * x). Where FOLD is not 1 (source.py), it is that
factor, and the scale of S if that is the score: UNIT is 1 then, the reference is of scores times
FOLD, and the difference takes one instruction. Elsewhere differences are taken first, so that those
of large numbers are exact.

LAZY: m stays m_i, and acc is left as it is, until some row of the tile has grown by more than
LARGEST_GROWTH: the result is the same, as weights, sum and output have one reference, whichever.

With skip a row leaves a block out if all its scores there lie by more than that below the row's
reference; where all rows of a tile do, its weights are no power of two and its values are not read.
Of n keys left out none weighs more than exp(-skip) of the largest of its row. Each row for itself:
what comes later changes nothing before.

The entropy of a row's weights w = p / l, where p = exp2(x), is log(l) - sum(p x) / l, of terms that
are all positive: t_i is the sum of p x, with x taken from the reference as p is. A sink's share is
one outcome more.

Source: Dao et al., "FlashAttention-2", 2023, algorithm 1; Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018; for LAZY, Zadouri et al., "FlashAttention-4", 2026.
"""

import triton
import triton.language as tl

# In powers of two: weights stay below 256, which float16 holds.
LARGEST_GROWTH: tl.constexpr = tl.constexpr(8.0)


@triton.jit
def has_grown(m_i, m_new, UNIT: tl.constexpr):
    """Whether the maximum of some row has, by more than its weights may."""
    growth = tl.where(m_new == m_i, 0.0, (m_new - m_i) * UNIT)  # of -inf and -inf: 0
    return tl.max(growth, 0) > LARGEST_GROWTH


@triton.jit
def shifted(m_i, m_new, UNIT: tl.constexpr):
    """A reference to subtract, and by which power of two sums shrink that were taken from m_i."""
    # Where a row has seen no key yet, -inf beside -inf would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_safe, (m_i - m_safe) * UNIT


@triton.jit
def weighted(p, x):
    """p x, and 0 where a weight is."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def weigh_block(
    acc,
    l_i,
    m_i,
    t_i,
    score,
    v_ptr,
    stride_vn,
    first,
    offs_n,
    inside,
    skip,
    HAS_SKIP: tl.constexpr,
    UNIT: tl.constexpr,
    PV: tl.constexpr,
    LAZY: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A block whose scores are known, unless it is skipped; skip: of each row, in units of m_i."""
    # fmt: off
    if HAS_SKIP:
        counts = tl.max(score, 1) * FOLD >= m_i - skip
        score = tl.where(counts[:, None], score, float("-inf"))
        if tl.max(counts.to(tl.int32), 0) > 0:
            acc, l_i, m_i, t_i = add_block(
                acc, l_i, m_i, t_i, score, v_ptr, stride_vn, first, offs_n, inside,
                UNIT, PV, LAZY, HAS_ENTROPY, HAS_VALUES, VALUE_DIM, BLOCK_E,
            )
    else:
        acc, l_i, m_i, t_i = add_block(
            acc, l_i, m_i, t_i, score, v_ptr, stride_vn, first, offs_n, inside,
            UNIT, PV, LAZY, HAS_ENTROPY, HAS_VALUES, VALUE_DIM, BLOCK_E,
        )
    # fmt: on
    return acc, l_i, m_i, t_i


@triton.jit
def add_block(
    acc,
    l_i,
    m_i,
    t_i,
    score,
    v_ptr,
    stride_vn,
    first,
    offs_n,
    inside,
    UNIT: tl.constexpr,
    PV: tl.constexpr,
    LAZY: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A block whose scores are known, with the values of the rows offs_n; inside: see `load_at`."""
    m_new = tl.maximum(m_i, tl.max(score, 1) * FOLD)
    if LAZY:
        grown = has_grown(m_i, m_new, UNIT)
        m_new = tl.where(grown, m_new, m_i)
    m_safe, shift = shifted(m_i, m_new, UNIT)
    x = (score * FOLD - m_safe[:, None]) * UNIT
    p = tl.exp2(x)
    alpha = tl.exp2(shift)
    if HAS_ENTROPY:
        t_i = weighted(alpha, t_i + l_i * shift) + tl.sum(weighted(p, x), 1)
    l_i = l_i * alpha + tl.sum(p, 1)
    if HAS_VALUES:
        v_tile = load_block(v_ptr, first, offs_n, stride_vn, inside, VALUE_DIM, BLOCK_E)
        if LAZY:
            if grown:
                acc = acc * alpha[:, None]
        else:
            acc = acc * alpha[:, None]
        acc = product(p.to(v_tile.dtype), v_tile, acc, PV)
    return acc, l_i, m_new, t_i


@triton.jit
def visit_block(
    acc,
    l_i,
    m_i,
    t_i,
    q_tile,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    first,
    b,
    h,
    q,
    M,
    N,
    OPERANDS,
    CUT: tl.constexpr,
    skip,
    HAS_SKIP: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    LAZY: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A block of keys, from `first` on; CUT: as in `scores_of_block`.

    q: positions of the tile's rows; h: a number, or that of each row, as a column.
    """
    offs_n = first + tl.arange(0, BLOCK_N)
    inside = offs_n < N
    read = inside if CUT else None
    read = None if CUT == BY_MASK else read
    k_tile = load_block(k_ptr, first, offs_n, stride_kn, read, HEAD_DIM, BLOCK_D)
    # fmt: off
    _, score = scores_of_block(
        q_tile, k_tile, b, h, q[:, None], offs_n[None, :], (q < M)[:, None], inside[None, :],
        M, N, OPERANDS,
        CUT, SCALE, QK,
    )
    # fmt: on
    # fmt: off
    return weigh_block(
        acc, l_i, m_i, t_i, score, v_ptr, stride_vn, first, offs_n, read, skip, HAS_SKIP,
        UNIT, PV, LAZY, HAS_ENTROPY, HAS_VALUES, VALUE_DIM, BLOCK_E,
    )
    # fmt: on


@triton.jit
def with_sink(acc, l_i, m_i, t_i, logit, UNIT: tl.constexpr):
    """A logit that takes its share of each row's weights, and has no value."""
    sink = logit * (LOG2_E / UNIT)
    m_new = tl.maximum(m_i, sink)
    m_safe, shift = shifted(m_i, m_new, UNIT)
    x = (sink - m_safe) * UNIT
    p = tl.exp2(x)
    alpha = tl.exp2(shift)
    t_i = weighted(alpha, t_i + l_i * shift) + weighted(p, x)
    return acc * alpha[:, None], l_i * alpha + p, m_new, t_i


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
def finished(
    acc,
    l_i,
    m_i,
    v_ptr,
    stride_vn,
    N,
    EMPTY_ROW: tl.constexpr,  # "nan", "zero" or "uniform"
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The rows' results; of those without a key, whose sum is 0, what EMPTY_ROW says.

    Not by the maximum: that of scores that are all NaN is -inf as well.
    """
    empty = l_i == 0.0
    out = acc / l_i[:, None]
    if EMPTY_ROW == "zero":
        out = tl.where(empty[:, None], 0.0, out)
    elif EMPTY_ROW == "nan":
        out = tl.where(empty[:, None], float("nan"), out)
    else:
        mean = tl.zeros([BLOCK_E], tl.float32)
        if tl.max(empty.to(tl.int32), 0) > 0:
            mean = mean_of_values(v_ptr, stride_vn, N, VALUE_DIM, BLOCK_N, BLOCK_E)
        out = tl.where(empty[:, None], mean[None, :], out)
    return out


@triton.jit
def log_sum_exp(l_i, m_i, UNIT: tl.constexpr):
    """In natural units."""
    return (m_i * UNIT + tl.log2(l_i)) / LOG2_E


@triton.jit
def entropy_of(l_i, m_i, t_i, N, EMPTY_ROW: tl.constexpr):
    """In nats: log(N) where values are averaged, 0 where nothing is attended to."""
    entropy = (tl.log2(l_i) - t_i / l_i) / LOG2_E
    empty = l_i == 0.0
    if EMPTY_ROW == "zero":
        entropy = tl.where(empty, 0.0, entropy)
    elif EMPTY_ROW == "nan":
        entropy = tl.where(empty, float("nan"), entropy)
    else:
        entropy = tl.where(empty, tl.log2(tl.cast(N, tl.float32)) / LOG2_E, entropy)
    return entropy


@triton.jit
def largest_score(l_i, m_i, UNIT: tl.constexpr):
    """In natural units; NaN where a score is, which maxima leave out and sums do not."""
    unknown = (l_i != l_i) & (m_i != float("inf"))
    return tl.where(unknown, float("nan"), m_i * (UNIT / LOG2_E))


@triton.jit
def store_rows(
    out_ptr,
    lse_ptr,
    out_rows,
    row,
    inside,
    acc,
    l_i,
    m_i,
    v_ptr,
    stride_vn,
    b,
    h,
    q,
    M,
    N,
    OPERANDS,
    UNIT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
    EMPTY_ROW: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows whose keys have all been met; out_rows: where they begin in the output."""
    if HAS_SINK:
        sink = tl.cast(sink_of(b, h, q, q < M, M, N, OPERANDS), tl.float32)
        acc, l_i, m_i, _ = with_sink(acc, l_i, m_i, tl.zeros_like(l_i), sink, UNIT)
    out = finished(acc, l_i, m_i, v_ptr, stride_vn, N, EMPTY_ROW, VALUE_DIM, BLOCK_N, BLOCK_E)
    dims = tl.arange(0, BLOCK_E)
    places = out_ptr + out_rows[:, None] + dims[None, :]
    wanted = inside[:, None] & (dims < VALUE_DIM)[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=wanted)
    if HAS_LSE:
        tl.store(lse_ptr + row, log_sum_exp(l_i, m_i, UNIT), mask=inside)

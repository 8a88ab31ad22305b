"""Bounds of kernels/bounds.py against what kernels really do, on 1,000 random heads of each kind.

Each test also asks that the bound is not idle: that some error comes near it, so that a bound with
a factor forgotten would be broken.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sympy
import torch
from decided_plans import plan_for

from adaattn_compiler.decision import (
    BLOCK,
    HeadDecision,
    KeyBasis,
    Pattern,
    Pooling,
    Precision,
    Selection,
)
from adaattn_compiler.kernels import bounds
from adaattn_compiler.kernels.cpu.decided import AS_DECIDED, DecidedRunner
from adaattn_compiler.kernels.patterns import kept_blocks, pattern_blocks
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import lowrank_attention, reference_attention
from adaattn_compiler.runtime.state import new_state
from adaattn_compiler.spec import AttentionSpec, M, N, k, q

BATCH, HEADS, GROUP = 5, 4, 2
CALLS = 1000 // (BATCH * HEADS)
# Relative error of exponentials of heads with values in bfloat16 (kernels/cpu/vectors.h).
EXPONENTIAL = 2.0**-13.3

PLAIN = AttentionSpec(0.25, group=GROUP)
CAUSAL = dataclasses.replace(PLAIN, mask=sympy.Ge(q + N - M - k, 0))
KINDS = ((PLAIN, 16, 16), (CAUSAL, 64, 64), (PLAIN, 33, 40))


@dataclass(frozen=True)
class Case:
    """BATCH x HEADS random heads. rounding: what a kernel of float32 may be off by."""

    spec: AttentionSpec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    random: torch.Generator

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q.shape[2], self.k.shape[2]

    def wide(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In float64, K and V for each query head."""
        k, v = (t.double().repeat_interleave(GROUP, 1) for t in (self.k, self.v))
        return self.q.double(), k, v

    def attended(self) -> torch.Tensor:
        """bool [M, N]."""
        rows, columns = self.lengths
        if self.spec.mask == sympy.true:
            return torch.ones(rows, columns, dtype=torch.bool)
        return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)

    def weights(self) -> torch.Tensor:
        q, k, _ = self.wide()
        scores = (q @ k.mT * self.spec.scale).masked_fill(~self.attended(), -math.inf)
        return scores.softmax(-1)

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        return self.computed_in(torch.float64)

    def computed_in(self, dtype: torch.dtype) -> torch.Tensor:
        tensors = [t.to(dtype) for t in (self.q, self.k, self.v)]
        return reference_attention(*tensors, (), (), self.spec)

    def rounding(self) -> torch.Tensor:
        wrong = (self.computed_in(torch.float32).double() - self.exact).abs().max()
        return 2 * wrong + 4 * torch.finfo(torch.float32).eps * self.v.abs().max()

    def spread(self) -> torch.Tensor:
        """[B,H,1,E]."""
        v = self.wide()[2]
        return v.amax(2, keepdim=True) - v.amin(2, keepdim=True)

    def problem(self) -> Problem:
        sizes = self.q.shape[3], self.v.shape[3]
        hints = (BATCH, *self.lengths)
        shape = Shape(None, HEADS, HEADS // GROUP, None, None, *sizes, hints)
        return Problem(self.spec, shape, torch.float32, "cpu", False)

    def decided(
        self, heads: tuple[HeadDecision, ...], v: torch.Tensor | None = None
    ) -> torch.Tensor:
        """By the CPU kernel; v: other values than the case's."""
        runner = DecidedRunner(plan_for(self.problem(), heads, rows=0))
        flags = torch.full((BATCH, HEADS), AS_DECIDED, dtype=torch.int32)
        values = self.v if v is None else v
        return runner(self.q, self.k, values, (), (), flags, new_state(HEADS)).double()


def cases(kinds: tuple[tuple[AttentionSpec, int, int], ...] = KINDS) -> Iterator[Case]:
    """1,000 heads, flat and peaked ones, rows of each differing."""
    for seed, (spec, dim, value_dim) in zip(range(CALLS), itertools.cycle(kinds), strict=False):
        random = torch.Generator().manual_seed(seed)
        rows = int(torch.randint(64, 200, (), generator=random))
        columns = int(torch.randint(rows, 200, (), generator=random))

        def normal(heads: int, length: int, size: int, random=random) -> torch.Tensor:
            return torch.randn(BATCH, heads, length, size, generator=random)

        peaked = 8 * torch.rand(BATCH, HEADS, 1, 1, generator=random)
        peaked = peaked * torch.rand(BATCH, HEADS, rows, 1, generator=random) / dim**0.5
        q = 4 * peaked * normal(HEADS, rows, dim)
        k, v = (normal(HEADS // GROUP, columns, size) for size in (dim, value_dim))
        yield Case(spec, q, k, v + torch.randn(value_dim, generator=random), random)


class Nearest:
    """How near errors came to their bounds."""

    def __init__(self) -> None:
        self.share = 0.0

    def see(self, error: torch.Tensor, bound: torch.Tensor, rounding: torch.Tensor | float) -> None:
        assert bool((error <= bound + rounding).all())
        share = torch.where(bound > 100 * rounding, error / bound, 0.0)
        self.share = max(self.share, float(share.max()))


def in_keys(blocks: torch.Tensor, lengths: tuple[int, int]) -> torch.Tensor:
    """[..., row blocks, key blocks] by row and key."""
    wide = blocks.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return wide[..., : lengths[0], : lengths[1]]


def drawn(random: torch.Generator, most: int) -> int:
    return int(torch.randint(0, most, (), generator=random))


# -- keys left out ---------------------------------------------------------------------------------


def some_pattern(random: torch.Generator) -> Pattern:
    stripes = (drawn(random, 4),) if drawn(random, 2) else ()
    return Pattern((0, 30, 64)[drawn(random, 3)], drawn(random, 80), stripes, drawn(random, 4))


def test_patterns_stay_within_the_bound() -> None:
    nearest = Nearest()
    for case in cases():
        heads = tuple(HeadDecision(pattern=some_pattern(case.random)) for _ in range(HEADS))
        kept = torch.stack([kept_blocks(head, *case.lengths) for head in heads])
        left = torch.where(in_keys(kept, case.lengths), 0.0, case.weights()).sum(-1, keepdim=True)
        error = (case.decided(heads) - case.exact).abs()
        nearest.see(error, bounds.left_out(left, case.spread()), case.rounding())
    assert nearest.share > 0.6


def met_blocks(case: Case, heads: tuple[HeadDecision, ...]) -> torch.Tensor:
    """bool [B,H,M,key blocks] that have weight in a call: values that tell blocks apart show it."""
    shares = torch.zeros_like(case.v)
    block = torch.arange(case.lengths[1]) // BLOCK
    shares[:, :, torch.arange(len(block)), block] = 1
    return case.decided(heads, shares)[..., : int(block[-1]) + 1] > 0


@pytest.mark.parametrize("by", ["pooled", "antidiagonal"])
def test_chosen_blocks_stay_within_the_bound(by: str) -> None:
    nearest = Nearest()
    for case in cases():
        masses = torch.rand(HEADS, generator=case.random).mul(0.8).add(0.1).tolist()
        heads = tuple(HeadDecision(selection=Selection(mass, by, 0, 0)) for mass in masses)
        met = met_blocks(case, heads).repeat_interleave(BLOCK, -1)[..., : case.lengths[1]]
        left = torch.where(met, 0.0, case.weights()).sum(-1, keepdim=True)
        error = (case.decided(heads) - case.exact).abs()
        nearest.see(error, bounds.left_out(left, case.spread()), case.rounding())
    assert nearest.share > 0.6


def test_bound_of_keys_left_out_is_attained() -> None:
    values = torch.tensor([1.0, -1.0], dtype=torch.float64)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    error = (values[0] - weights @ values).abs()
    torch.testing.assert_close(error, bounds.left_out(weights[1], torch.tensor(2.0).double()))


def test_weight_of_skipped_keys_is_attained() -> None:
    keys, threshold = torch.tensor(7.0).double(), torch.tensor(2.5).double()
    scores = torch.cat([torch.zeros(1), torch.full((7,), -2.5)]).double()
    share = scores.softmax(0)[1:].sum()
    torch.testing.assert_close(share, bounds.skipped_mass(keys, threshold))


# -- fewer bits ------------------------------------------------------------------------------------

STAGES = [
    (Precision.BF16, Precision.FP32),
    (Precision.FP32, Precision.BF16),
    (Precision.BF16, Precision.BF16),
]


def width_of(case: Case, scores: Precision, values: Precision) -> torch.Tensor:
    """Within which scores are off as a head in these precisions computes them, [B,H,M,1]."""
    q, k, _ = case.wide()
    width = torch.zeros_like(q[..., :1])
    if scores == Precision.BF16:
        magnitude = (q.abs() @ k.abs().mT).amax(-1, keepdim=True) * case.spec.scale
        width = width + 2 * bounds.rounded_products(magnitude, q.shape[-1], scores)
    return width + 2.1 * EXPONENTIAL * (values == Precision.BF16)


def precision_bound(case: Case, scores: Precision, values: Precision) -> torch.Tensor:
    width, v = width_of(case, scores, values), case.wide()[2].abs()
    bound = bounds.reweighed(width, case.spread())
    if values == Precision.BF16:
        largest = v.amax(2, keepdim=True)
        magnitude = bounds.moved_magnitude(case.weights() @ v, width, largest)
        bound = bound + bounds.rounded_values(magnitude, values)
    return bound


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 is not rounded to")
@pytest.mark.parametrize(("scores", "values"), STAGES)
def test_fewer_bits_stay_within_the_bound(scores: Precision, values: Precision) -> None:
    nearest = Nearest()
    for case in cases():
        error = (
            case.decided((HeadDecision(scores=scores, values=values),) * HEADS) - case.exact
        ).abs()
        nearest.see(error, precision_bound(case, scores, values), case.rounding())
    assert nearest.share > 0.1


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 is not rounded to")
def test_fewer_bits_of_fewer_keys_stay_within_the_sum() -> None:
    """Scores that are off move weight among kept keys and those left out alike."""
    nearest, both = Nearest(), (Precision.BF16, Precision.BF16)
    for case in cases():
        pattern = some_pattern(case.random)
        head = HeadDecision(pattern=pattern, scores=both[0], values=both[1])
        kept = in_keys(kept_blocks(head, *case.lengths), case.lengths)
        left = torch.where(kept, 0.0, case.weights()).sum(-1, keepdim=True)
        width, spread = width_of(case, *both), case.spread()
        left = (left + bounds.reweighed(width, torch.ones(()))).clamp(max=1)
        largest = case.wide()[2].abs().amax(2, keepdim=True)
        bound = bounds.reweighed(width, spread) + bounds.left_out(left, spread)
        bound = bound + bounds.rounded_values(largest, both[1])
        error = (case.decided((head,) * HEADS) - case.exact).abs()
        nearest.see(error, bound, case.rounding())
    assert nearest.share > 0.4


def test_bound_of_moved_scores_is_attained() -> None:
    width = torch.tensor(0.8).double()
    odds = torch.tensor([-width / 2, 0.0]).double()  # of the key that gains, as the proof has it
    moved = torch.tensor([width / 2, 0.0]).double()
    error = (moved.softmax(0) - odds.softmax(0))[0]
    torch.testing.assert_close(error, bounds.reweighed(width, torch.ones(()).double()))


@pytest.mark.parametrize("scores", [Precision.BF16, Precision.FP16])
def test_products_of_rounded_numbers_stay_within_the_bound(scores: Precision) -> None:
    dtype = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}[scores]
    random, nearest = torch.Generator().manual_seed(0), 0.0
    for terms in (1, 2, 16, 64, 256):
        x, y = torch.rand(2, 1000, terms, generator=random, dtype=torch.float64) + 1
        given = (x.to(dtype).float() * y.to(dtype).float()).cumsum(-1)[:, -1].double()
        error = (given - (x * y).sum(-1)).abs()
        bound = bounds.rounded_products((x * y).sum(-1), terms, scores)
        assert bool((error <= bound).all())
        nearest = max(nearest, float((error / bound).max()))
    assert nearest > 0.7


# -- means of keys ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clusters:
    """Neighbouring keys together, per query head. members: [N], the cluster of each key."""

    members: torch.Tensor
    count: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def of(self, keys: torch.Tensor) -> torch.Tensor:
        """Sums [..., N] by cluster."""
        sums = keys.new_zeros(*keys.shape[:-1], len(self.count))
        return sums.index_add(-1, self.members, keys)

    def largest(self, keys: torch.Tensor) -> torch.Tensor:
        """Maxima of [..., N] by cluster."""
        every = torch.full((*keys.shape[:-1], len(self.count)), -math.inf, dtype=keys.dtype)
        index = self.members.expand(keys.shape)
        return every.scatter_reduce(-1, index, keys, "amax")


def clusters_of(k: torch.Tensor, v: torch.Tensor, size: int) -> Clusters:
    members = torch.arange(k.shape[2]) // size
    count = torch.bincount(members).double()

    def means(tensor: torch.Tensor) -> torch.Tensor:
        sums = tensor.new_zeros(*tensor.shape[:2], len(count), tensor.shape[3])
        return sums.index_add(2, members, tensor) / count[:, None]

    return Clusters(members, count, means(k), means(v))


def in_clusters(case: Case, size: int) -> Case:
    """With keys that lie close to those of their cluster: how close differs by head."""
    centers = case.k[:, :, ::size].repeat_interleave(size, 2)[:, :, : case.lengths[1]]
    tightness = torch.rand(BATCH, HEADS // GROUP, 1, 1, generator=case.random)
    return dataclasses.replace(case, k=centers + 0.3 * tightness * (case.k - centers))


def pooled_bound(case: Case, size: int, near: torch.Tensor, by_radius: bool) -> torch.Tensor:
    """near: bool [M, N], keys that rows meet themselves. by_radius: from how far keys lie from
    their mean, not from their scores."""
    q, k, v = case.wide()
    clusters = clusters_of(k, v, size)
    center = clusters.k[:, :, clusters.members]
    if by_radius:
        distance = (k - center).square().sum(-1).sqrt()
        off = q.square().sum(-1).sqrt()[..., None] * distance[:, :, None] * case.spec.scale
    else:
        off = (q @ (k - center).mT * case.spec.scale).abs()
    radius = clusters.largest(torch.where(near, 0.0, off))
    mass = clusters.of(torch.where(near, 0.0, case.weights()))
    columns = v.mT  # [B,H,E,N]
    inside = (clusters.largest(columns) + clusters.largest(-columns)).mT  # [B,H,C,E]
    return bounds.by_means(radius, mass, inside[:, :, None], case.spread())


def by_definition(case: Case, size: int, near: torch.Tensor) -> torch.Tensor:
    """The oracle in float64, blocks of BLOCK keys being near or far as a whole."""
    _, columns = case.lengths
    k, v = case.k.double(), case.v.double()
    blocks, each = -(-columns // BLOCK), BLOCK // size
    clusters = clusters_of(k, v, size)
    missing = blocks * each - len(clusters.count)
    pad = torch.nn.functional.pad
    k_far = pad(clusters.k, (0, 0, 0, missing)).unflatten(2, (blocks, each))
    v_far = pad(clusters.v, (0, 0, 0, missing)).unflatten(2, (blocks, each))
    count = pad(clusters.count, (0, missing)).log().unflatten(0, (blocks, each))
    log_count = count.expand(*k.shape[:2], blocks, each)
    far = ~near[:, ::BLOCK] & case.attended()[:, ::BLOCK]
    means = (k_far, v_far, log_count)
    return lowrank_attention((case.q.double(), k, v), means, (), (), case.spec, near, far)


def near_of(case: Case, pattern: Pattern) -> torch.Tensor:
    """bool [M, N]: the pattern's blocks, and those that the mask cuts through."""
    kept = in_keys(pattern_blocks(pattern, *case.lengths), case.lengths)
    attended = in_blocks_of(case.attended(), torch.any)
    whole = in_blocks_of(case.attended(), torch.all)
    return kept | in_keys(attended & ~whole, case.lengths)


def in_blocks_of(mask: torch.Tensor, join: object) -> torch.Tensor:
    rows = mask.split(BLOCK, 0)
    return torch.stack([torch.stack([join(b) for b in r.split(BLOCK, 1)]) for r in rows])


def test_means_of_keys_stay_within_the_bound() -> None:
    nearest = Nearest()
    for number, case in enumerate(cases()):
        size = (8, 16, 32, 64)[number % 4]
        case = in_clusters(case, size)
        near = near_of(case, Pattern(0, drawn(case.random, 2)))
        error = (by_definition(case, size, near) - case.exact).abs()
        rounding = torch.tensor(1e-12)
        close = pooled_bound(case, size, near, by_radius=False)
        nearest.see(error, close, rounding)
        Nearest().see(close, pooled_bound(case, size, near, by_radius=True), rounding)
    assert nearest.share > 0.5


def test_pooled_heads_stay_within_the_bound() -> None:
    """The same by the kernel."""
    nearest = Nearest()
    for number, case in enumerate(cases()):
        size = (8, 16, 32, 64)[number % 4]
        case, pattern = in_clusters(case, size), Pattern(0)
        head = HeadDecision(pooling=Pooling(pattern, size))
        near = near_of(case, pattern)
        error = (case.decided((head,) * HEADS) - case.exact).abs()
        nearest.see(error, pooled_bound(case, size, near, by_radius=False), case.rounding())
    assert nearest.share > 0.05


# -- a basis of keys -------------------------------------------------------------------------------


def test_projected_scores_stay_within_the_bound() -> None:
    nearest, of_result = Nearest(), Nearest()
    for number, case in enumerate(cases(((PLAIN, 16, 16), (PLAIN, 64, 64)))):
        q, k, v = case.wide()
        # Directions that the last of the head's dimensions have little of.
        k = k * torch.linspace(1, 0, k.shape[-1]) ** (number % 5)
        _, _, directions = torch.linalg.svd(k, full_matrices=False)
        basis = directions[:, :, : k.shape[-1] // 2].mT
        inside = (q @ basis) @ (k @ basis).mT * case.spec.scale
        scores = q @ k.mT * case.spec.scale
        away = [(t - t @ basis @ basis.mT).square().sum(-1).sqrt() for t in (q, k)]
        off = bounds.projected(away[0][..., None], away[1][:, :, None], case.spec.scale)
        nearest.see((inside - scores).abs(), off, 1e-12)
        error = (inside.softmax(-1) @ v - scores.softmax(-1) @ v).abs()
        width = 2 * off.amax(-1, keepdim=True)
        of_result.see(error, bounds.reweighed(width, case.spread()), 1e-12)
    assert nearest.share > 0.8
    assert of_result.share > 0.1


def test_scores_in_a_basis_stay_within_the_bound() -> None:
    """By the kernel: heads that share keys have the main directions of some of them."""
    nearest = Nearest()
    for case in cases(((PLAIN, 16, 16), (CAUSAL, 16, 16))):
        k = case.k * torch.linspace(1, 0.1, 16)
        case = dataclasses.replace(case, k=k)
        directions = torch.linalg.svd(k[0, :, ::3], full_matrices=False)[2]  # [G, D, D]
        bases = [KeyBasis.of(of_group[:8].mT) for of_group in directions]
        heads = tuple(HeadDecision(basis=bases[head // GROUP]) for head in range(HEADS))
        matrices = torch.stack([head.basis.tensor().double() for head in heads])
        q, k, _ = case.wide()
        away = [(t - t @ matrices @ matrices.mT).square().sum(-1).sqrt() for t in (q, k)]
        off = bounds.projected(away[0][..., None], away[1][:, :, None], case.spec.scale)
        width = 2 * off.amax(-1, keepdim=True)
        error = (case.decided(heads) - case.exact).abs()
        nearest.see(error, bounds.reweighed(width, case.spread()), case.rounding())
    assert nearest.share > 0.1

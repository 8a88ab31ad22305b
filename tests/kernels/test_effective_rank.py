"""Ranks of matrices and attentions whose spectrum is known."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import sympy
import torch
from specs import SPECS, problem_of, random_inputs

from adaattn_compiler.decision import Representation
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.effective_rank import (
    PROXIES,
    attention_spectrum,
    attention_svd,
    chosen_representation,
    effective_rank,
    effective_ranks,
    literal_rank,
    one_head_spec,
    rank_proxy,
    row_products,
    sampled_spectrum,
    select_rank,
)
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.randomized_svd import Factors, randomized_svd
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, S, h, k, q

PLAIN = AttentionSpec(1.0)


# -- matrices --------------------------------------------------------------------------------------

DECAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exponential": lambda j: 0.8**j,
    "inverse": lambda j: 1 / (j + 1),
    "inverse square": lambda j: (j + 1) ** -2.0,
    "gap after 20": lambda j: torch.where(j < 20, 1.0, 1e-3),
    "slow": lambda j: (j + 1) ** -0.5,
    "flat": lambda j: torch.ones_like(j),
}


@functools.cache
def matrix(decay: str, rows: int = 120, columns: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (matrix, its singular values), of a known decay."""
    generator = torch.Generator().manual_seed(5)
    values = DECAYS[decay](torch.arange(columns, dtype=torch.float64))
    u, v = (
        torch.linalg.qr(torch.randn(n, columns, generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return u * values @ v.mT, values


def svd(of: torch.Tensor, rank: int, **how: int) -> Factors:
    return randomized_svd(
        lambda x: of @ x, lambda y: of.mT @ y, *of.shape[-2:], rank, **how, like=of
    )


def product(factors: Factors) -> torch.Tensor:
    u, s, v = factors
    return u * s[..., None, :] @ v.mT


@pytest.mark.parametrize("rank", [1, 5, 20, 60])
@pytest.mark.parametrize("decay", DECAYS)
def test_error_is_near_that_of_the_best_approximation(decay: str, rank: int) -> None:
    """U S V^T beside the truncated SVD, in the Frobenius norm."""
    of, values = matrix(decay)
    best = values[rank:].square().sum().sqrt()
    error = torch.linalg.matrix_norm(of - product(svd(of, rank)))
    assert error <= 1.1 * best + 1e-12


@pytest.mark.parametrize("decay", DECAYS)
def test_errors_of_draws_keep_to_the_bounds_of_halko_and_others(decay: str) -> None:
    """Spectral norm, no power iteration, l = k + p columns kept: corollary 10.9, whose failure
    probability is at most 3 e^-p, in 99 of 100 draws; theorem 10.6, of the mean, by the mean."""
    of, values = matrix(decay)
    rank, oversampling = 12, 8
    tail = values[rank:].square().sum().sqrt()
    sigma, total = values[rank], rank + oversampling
    deviation = (1 + 16 * math.sqrt(1 + rank / (oversampling + 1))) * sigma
    deviation += 8 * math.sqrt(total) / (oversampling + 1) * tail
    expected = (1 + math.sqrt(rank / (oversampling - 1))) * sigma
    expected += math.e * math.sqrt(total) / oversampling * tail
    errors = []
    for seed in range(200):
        factors = svd(of, total, oversampling=0, power=0, seed=seed)
        errors.append(torch.linalg.matrix_norm(of - product(factors), 2))
    assert sum(bool(e <= deviation) for e in errors) >= 198
    assert torch.stack(errors).mean() <= expected
    # The bound of the mean holds for nearly each draw as well.
    assert sum(bool(e <= expected) for e in errors) >= 198


def test_power_iterations_bring_slow_decay_nearer() -> None:
    of, values = matrix("slow")
    errors = [(svd(of, 20, power=p, oversampling=4)[1] - values[:20]).norm() for p in (0, 1, 2)]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_seeds_give_the_same_again_and_others_differ() -> None:
    of, _ = matrix("slow")
    first, again, other = (svd(of, 10, seed=seed, power=0) for seed in (7, 7, 8))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_factors_are_orthonormal_and_of_all_matrices_at_once() -> None:
    both = torch.stack([matrix("slow")[0], matrix("inverse")[0]])
    u, s, v = svd(both, 9)
    assert u.shape == (2, 120, 9)
    assert v.shape == (2, 90, 9)
    eye = torch.eye(9, dtype=torch.float64).expand(2, 9, 9)
    torch.testing.assert_close(u.mT @ u, eye)
    torch.testing.assert_close(v.mT @ v, eye)
    assert (s.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("rank", [0, 91, -1])
def test_ranks_that_a_matrix_cannot_have_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of a 120 x 90 matrix"):
        svd(matrix("slow")[0], rank)


def test_numbers_that_are_not_finite_and_negative_counts_are_refused() -> None:
    of = matrix("slow")[0].clone()
    with pytest.raises(ValueError, match="must be 0 or more"):
        svd(of, 3, power=-1)
    of[3, 4] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        svd(of, 3)


# -- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([1.0, 0.0, 0.0], 0.99, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.75, 3),
        ([1.0, 1.0, 1.0, 1.0], 0.76, 4),
        ([1.0] * 100, 0.95, 95),
        ([1.0, 1.0, 1.0], 1.0, 3),
        ([3.0, 1.0], 0.9, 1),
        ([3.0, 1.0], 0.91, 2),
        ([0.0, 0.0], 0.95, 0),
    ],
)
def test_effective_rank_counts_shares_of_squares(
    values: list[float], energy: float, rank: int
) -> None:
    assert effective_rank(values, energy) == rank


def test_energy_that_the_known_values_lack_counts_as_beyond() -> None:
    values, total = torch.ones(2, 10), torch.tensor([10.0, 20.0])
    assert effective_ranks(values, 0.95, total, beyond=50).tolist() == [10, 50]
    assert effective_ranks(values, 0.5, total, beyond=50).tolist() == [5, 10]


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.01, float("nan")])
def test_energies_outside_their_range_are_refused(energy: float) -> None:
    with pytest.raises(ValueError, match="energy is"):
        effective_rank([1.0], energy)


def test_spectra_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        effective_rank([1.0, float("nan")], 0.9)


def test_literal_rule_never_reaches_its_threshold() -> None:
    for decay in DECAYS:
        assert literal_rank(matrix(decay)[1]) == 0
    assert literal_rank([1.0, 0.0]) == 1
    assert literal_rank([1.0, 1.0]) == 0
    assert effective_rank(matrix("exponential")[1], 0.95) == 7


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, "low-rank"), (49, "low-rank"), (50, "dense"), (100, "dense")],
)
def test_below_half_the_keys_is_low_rank(rank: int, expected: str) -> None:
    assert chosen_representation(rank, 100) == Representation(expected)


# -- attention -------------------------------------------------------------------------------------


def dense_weights(problem: Problem) -> torch.Tensor:
    """[B,H,M,N], float64, as the oracle has them: its result for the identity as V."""
    (query, key, _), operands = random_inputs(problem)
    spec = one_head_spec(problem.spec)
    wide = [o.double() if o.is_floating_point() else o for o in operands]
    keys = key.double().repeat_interleave(problem.spec.group, 1)
    one = torch.eye(key.shape[2], dtype=torch.float64).expand(*keys.shape[:2], -1, -1)
    return reference_attention(query.double(), keys, one, wide, problem.param_hints, spec)


@pytest.mark.parametrize("name", SPECS)
def test_spectra_of_attentions_are_those_of_their_weights(name: str) -> None:
    problem = problem_of(name, torch.float64)
    (query, key, _), operands = random_inputs(problem)
    exact = torch.linalg.svdvals(dense_weights(problem))
    given = (query, key, problem.spec, operands, problem.param_hints)
    found = attention_spectrum(*given, rank=20, power=3)
    torch.testing.assert_close(found.total, exact.square().sum(-1))
    torch.testing.assert_close(found.values, exact[..., :20], rtol=2e-2, atol=1e-6)
    # More rows are asked for than there are: all of them.
    torch.testing.assert_close(
        sampled_spectrum(*given, rows=200).values, exact, rtol=1e-6, atol=1e-6
    )


def test_factors_of_an_attention_are_near_its_best_approximation() -> None:
    problem = problem_of("causal")
    (query, key, _), operands = random_inputs(problem)
    weights = dense_weights(problem)
    factors = attention_svd(query, key, problem.spec, operands, rank=16)
    error = torch.linalg.matrix_norm(weights - product(factors))
    best = torch.linalg.svdvals(weights)[..., 16:].square().sum(-1).sqrt()
    assert (error <= 1.1 * best).all()


def test_the_compiled_kernel_can_apply_it() -> None:
    spec = AttentionSpec(0.3, mask=sympy.Ge(q - k, 0))
    query, key = torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    runner = cpp_runner(
        plan_of(Problem(spec, Shape(1, 2, 2, 90, 90, 16, 24), torch.float32, "cpu", False))
    )
    ours = attention_spectrum(query, key, spec, rank=14, exact=runner)
    torch.testing.assert_close(ours.values, attention_spectrum(query, key, spec, rank=14).values)


@pytest.fixture
def uniform_then_identity() -> tuple[torch.Tensor, torch.Tensor, AttentionSpec]:
    """Two heads of 192 rows: one attends to all keys alike, one to its own alone."""
    query = torch.zeros(1, 2, 192, 192)
    query[0, 1] = 40 * torch.eye(192)
    return query, torch.eye(192).expand(1, 2, -1, -1), PLAIN


Inputs = tuple[torch.Tensor, torch.Tensor, AttentionSpec]


def test_uniform_attention_has_rank_one_and_its_own_key_full(uniform_then_identity: Inputs) -> None:
    query, key, spec = uniform_then_identity
    assert select_rank(query, key, spec=spec).tolist() == [[1, 192]]
    found = attention_spectrum(query, key, spec, rank=190)
    assert found.effective_rank(0.95).tolist() == [[1, 183]]
    torch.testing.assert_close(found.norm, torch.ones(1, 2))
    torch.testing.assert_close(found.total, torch.tensor([[1.0, 192.0]]))


def test_heads_have_ranks_of_their_own() -> None:
    """Attention uniform in each of n blocks has rank n."""
    counts = torch.tensor([3.0, 24.0])
    spec = AttentionSpec(
        1.0,
        mask=sympy.Eq(sympy.floor(q / Load(0, h)), sympy.floor(k / Load(0, h))),
        empty_row=EmptyRow.ZERO,
        operands=(OperandSpec("int", 1),),
    )
    zero = torch.zeros(1, 2, 240, 4)
    sizes = (240 / counts).long()
    ranks = select_rank(zero, zero, 0.999, spec=spec, operands=(sizes,))
    assert ranks.tolist() == [[3, 24]]


@pytest.mark.parametrize("threshold", [0.9, 0.95, 0.99])
def test_select_rank_is_the_effective_rank_of_the_weights(threshold: float) -> None:
    torch.manual_seed(4)
    query, key = 3 * torch.randn(1, 4, 96, 8), torch.randn(1, 2, 96, 8)
    keys = key.repeat_interleave(2, 1)
    weights = (query.double() @ keys.double().mT * 8**-0.5).softmax(-1)
    exact = effective_ranks(torch.linalg.svdvals(weights), threshold)
    found = select_rank(query, key, threshold)
    expected = torch.where(exact <= 48, exact, 96)
    # A randomized spectrum lies a little below: it may take one rank more.
    assert ((found - expected >= 0) & (found - expected <= 1)).all()


def test_sampled_spectrum_says_low_but_cannot_say_how_high(uniform_then_identity: Inputs) -> None:
    found = sampled_spectrum(*uniform_then_identity, rows=32)
    torch.testing.assert_close(found.total, torch.tensor([[1.0, 192.0]]))
    ranks = found.effective_rank(0.95)
    assert ranks.tolist() == [[1, 31]]
    torch.testing.assert_close(found.norm[0, 0], torch.tensor(1.0))


def test_sampled_spectrum_is_near_the_true_one_where_few_directions_hold_it() -> None:
    torch.manual_seed(1)
    query, key = torch.randn(1, 3, 1024, 2), torch.randn(1, 3, 1024, 2)
    spec = AttentionSpec(0.7)
    exact = attention_spectrum(query, key, spec, rank=40)
    found = sampled_spectrum(query, key, spec, rows=128)
    assert (found.total / exact.total - 1).abs().max() < 0.25
    ranks, estimates = exact.effective_rank(0.95), found.effective_rank(0.95)
    assert ranks.max() < 20
    assert (estimates - ranks).abs().max() <= 3


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_order_heads_as_their_ranks_do(name: str, uniform_then_identity: Inputs) -> None:
    low, high = rank_proxy(name, *uniform_then_identity)[0].tolist()
    assert low == pytest.approx(1, abs=1e-3)
    assert high > 30


def test_entropy_and_norm_are_the_rank_of_uniform_blocks() -> None:
    spec = dataclasses.replace(PLAIN, mask=sympy.Eq(sympy.floor(q / 30), sympy.floor(k / 30)))
    zero = torch.zeros(1, 1, 240, 4)
    for name in PROXIES:
        assert rank_proxy(name, zero, zero, spec, rows=240).item() == pytest.approx(8, abs=1e-3)


def test_other_proxies_are_refused(uniform_then_identity: Inputs) -> None:
    with pytest.raises(ValueError, match="no rank proxy 'trace'"):
        rank_proxy("trace", *uniform_then_identity)


@pytest.mark.parametrize("name", ["plain", "sink", "alibi", "causal padding uniform"])
def test_products_of_rows_need_no_value_on_the_host(name: str) -> None:
    """Meta tensors have none; they are taken for those of a GPU."""
    problem = problem_of(name)
    (query, key, _), operands = random_inputs(problem)
    given = [tensor.to("meta") for tensor in (query, key, *operands)]
    found = row_products(*given[:2], problem.spec, given[2:], problem.param_hints, rows=32)
    assert found.device.type == "meta"
    assert found.shape == (2, 4, 32, 32)
    here = row_products(query, key, problem.spec, operands, problem.param_hints, rows=32)
    trace = here.diagonal(dim1=-2, dim2=-1).sum(-1) * (90 / 32)
    spectrum = sampled_spectrum(query, key, problem.spec, operands, problem.param_hints, rows=32)
    torch.testing.assert_close(spectrum.total, trace)


def test_nan_in_the_input_is_refused() -> None:
    query, key = torch.randn(1, 1, 32, 4), torch.randn(1, 1, 32, 4)
    key[0, 0, 3, 1] = float("nan")
    for call in (select_rank, functools.partial(sampled_spectrum, spec=PLAIN)):
        with pytest.raises(ValueError, match="not finite"):
            call(query, key)


def test_rows_without_a_key_are_zero_rows() -> None:
    spec = AttentionSpec(1.0, S, sympy.Ge(q - k - 16, 0), empty_row=EmptyRow.NAN)
    query, key = torch.randn(1, 1, 32, 4), torch.randn(1, 1, 32, 4)
    found = attention_spectrum(query, key, spec, rank=16)
    assert found.effective_rank(0.9999).item() <= 16
    assert found.values.isfinite().all()

"""Head statistics against the same from dense weights in float64, and where the answer is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import sympy
import torch
from rows import row_statistics
from specs import SPECS, problem_of, random_inputs

from adaattn_compiler.kernels import scored_rows
from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.statistics import (
    HeadStatistics,
    compensated_sum,
    head_statistics,
)
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, S, k, q

PLAIN = AttentionSpec(1.0)
BLOCK = 64


def statistics(problem: Problem, dtype: torch.dtype = torch.float64, **how: int) -> HeadStatistics:
    tensors, operands = random_inputs(problem)
    tensors = [t.to(dtype) for t in tensors]
    operands = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    return head_statistics(*tensors, operands, problem.param_hints, problem.spec, **how)


@dataclasses.dataclass
class Dense:
    """float64 [B,H,M,N]: scores, -inf where not attended, and softmax without the sink's column."""

    scores: torch.Tensor
    weights: torch.Tensor
    sinks: int

    @property
    def attended(self) -> torch.Tensor:
        return self.scores > float("-inf")

    def rows(self, b: int, h: int) -> list[int]:
        return [i for i in range(self.scores.shape[2]) if self.attended[b, h, i].any()]


def dense(problem: Problem) -> Dense:
    tensors, operands = random_inputs(problem)
    query, key = (t.double() for t in tensors[:2])
    operands = [o.double() if o.is_floating_point() else o for o in operands]
    spec, sizes = problem.spec, (*query.shape[:3], key.shape[2])
    values = positions((spec.score, spec.mask, spec.sink), query, sizes)
    values[S] = query @ key.repeat_interleave(spec.group, 1).mT * spec.scale
    given = (values, operands, problem.param_hints)
    scores = evaluate_dense(spec.score, *given).expand(sizes)
    keep = torch.as_tensor(evaluate_dense(spec.mask, *given)).expand(sizes)
    scores = scores.masked_fill(~keep, float("-inf"))
    if spec.empty_row is EmptyRow.UNIFORM:
        scores = scores.masked_fill(~keep.any(-1, keepdim=True), 0)
    if spec.sink is None:
        return Dense(scores, scores.softmax(-1), 0)
    sink = evaluate_dense(spec.sink, *given).expand(*sizes[:3], 1)
    return Dense(scores, torch.cat([scores, sink], -1).softmax(-1)[..., :-1], 1)


def entropy(masses: torch.Tensor) -> float:
    return float(torch.special.entr(masses / masses.sum()).sum())


def top_block_mass(attended: torch.Tensor, weights: torch.Tensor) -> float:
    blocks = zip(attended.split(BLOCK), weights.split(BLOCK), strict=True)
    masses = sorted((float(w.sum()) for a, w in blocks if a.any()), reverse=True)
    return sum(masses[: math.ceil(len(masses) / 8)]) / sum(masses)


def local_entropy(scores: torch.Tensor, place: int) -> float | None:
    near = scores[max(place - BLOCK + 1, 0) : place + BLOCK]
    return entropy(near.softmax(-1)) if (near > float("-inf")).any() else None


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


# Operands are of 90 keys, but for those that have none.
SIZED = [(name, 90) for name in SPECS]
SIZED += [(name, 150) for name in SPECS if name == "alibi" or not SPECS[name][1]]


@pytest.mark.parametrize(("name", "columns"), SIZED)
def test_of_all_rows_statistics_are_those_of_dense_weights(name: str, columns: int) -> None:
    problem = problem_of(name, torch.float64, columns=columns)
    found, whole = statistics(problem, rows=1000), dense(problem)
    shift = columns - 90
    for b in range(2):
        for h in range(4):
            rows = whole.rows(b, h)
            weights = [whole.weights[b, h, i] for i in rows]
            scores = [whole.scores[b, h, i] for i in rows]
            counts = [int(whole.attended[b, h, i].sum()) + whole.sinks for i in rows]
            every = [torch.cat([w, 1 - w.sum(-1, keepdim=True)]) for w in weights]
            entropies = [entropy(w.clamp(min=0)) for w in every]
            local = [local_entropy(s, i + shift) for s, i in zip(scores, rows, strict=True)]
            expected = {
                "score_max": max(float(s[s > float("-inf")].abs().max()) for s in scores),
                "entropy": mean(entropies),
                "entropy_variance": mean([(e - mean(entropies)) ** 2 for e in entropies]),
                "entropy_normalized": mean(
                    [
                        e / math.log(n) if n > 1 else 0
                        for e, n in zip(entropies, counts, strict=True)
                    ]
                ),
                "saturation": mean([float(w.max()) for w in weights]),
                "top_block_mass": mean(
                    [
                        top_block_mass(s > float("-inf"), w)
                        for s, w in zip(scores, weights, strict=True)
                    ]
                ),
                "local_entropy": mean([e for e in local if e is not None]),
                "global_entropy": mean(
                    [entropy(torch.stack([p.sum() for p in w.split(BLOCK)])) for w in weights]
                ),
            }
            for field, value in expected.items():
                ours = getattr(found, field)[b, h].item()
                assert ours == pytest.approx(value, rel=1e-9, abs=1e-9), field


@pytest.mark.parametrize("name", ["causal", "sink", "causal padding uniform"])
def test_float32_entropy_is_that_of_rows_in_float64(name: str) -> None:
    problem = problem_of(name)
    found = statistics(problem, torch.float32, rows=1000)
    exact = row_statistics(problem, torch.float64)
    torch.testing.assert_close(found.entropy.double(), exact.entropy.mean(-1), atol=2e-6, rtol=0)


def test_magnitudes_are_of_whole_tensors() -> None:
    problem = problem_of("gqa")
    (query, key, value), _ = random_inputs(problem)
    found = statistics(problem, torch.float32, rows=3)
    assert torch.equal(found.q_max, query.abs().amax((-2, -1)))
    assert torch.equal(found.k_max, key.abs().amax((-2, -1)).repeat_interleave(2, 1))
    assert torch.equal(found.v_max, value.abs().amax((-2, -1)).repeat_interleave(2, 1))


@pytest.mark.parametrize("keys", [7, 64, 1000, 4096])
def test_uniform_attention_has_the_entropy_log_n(keys: int) -> None:
    query, key = torch.zeros(1, 2, keys, 8), torch.randn(1, 2, keys, 8)
    found = head_statistics(query, key, key, (), (), PLAIN)
    torch.testing.assert_close(found.entropy, torch.full((1, 2), math.log(keys)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy_normalized, torch.ones(1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.importance, torch.zeros(1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.saturation, torch.full((1, 2), 1 / keys))
    assert found.entropy_variance.max() < 1e-9


def test_one_hot_attention_is_certain() -> None:
    key = torch.eye(200).expand(1, 1, 200, 200)
    found = head_statistics(key * 300, key, key, (), (), PLAIN)
    assert found.saturation.item() == found.top_block_mass.item() == found.importance.item() == 1
    # The least weights are 1e-38, not 0.
    assert 0 <= found.entropy.item() < 1e-30
    assert 0 <= found.local_entropy.item() < 1e-30


def test_scales_tell_local_from_global_attention() -> None:
    place = torch.arange(1024)
    near = -(place[:, None] - place).abs() / 8.0
    bias = torch.stack([near, torch.where(place % 64 == 0, 4.0, 0.0).expand(1024, 1024)])
    spec = AttentionSpec(1.0, S + Load(0, sympy.Symbol("h", integer=True, nonnegative=True), q, k))
    spec = dataclasses.replace(spec, operands=(OperandSpec("float", 3),))
    zero = torch.zeros(1, 2, 1024, 4)
    found = head_statistics(zero, zero, zero, (bias,), (), spec)
    assert found.global_entropy[0, 0] < 1 < found.global_entropy[0, 1]
    assert found.top_block_mass[0, 0] > 0.95 > found.top_block_mass[0, 1]


def test_score_quantiles_are_near_those_of_all_scores() -> None:
    query, key = torch.randn(1, 2, 512, 16), torch.randn(1, 2, 512, 16)
    found = head_statistics(query, key, key, (), (), dataclasses.replace(PLAIN, scale=0.25))
    every = (query @ key.mT * 0.25).abs().log2().flatten(2)
    exact = torch.quantile(every, torch.tensor([0.01, 0.5, 0.99]), dim=-1).permute(1, 2, 0)
    assert (found.score_quantiles - exact).abs().amax((0, 1)).tolist() < [2.0, 0.15, 0.25]
    assert (found.score_quantiles.diff(dim=-1) > 0).all()


def test_score_quantiles_are_of_attended_keys_alone() -> None:
    """Those outside a window of one key have other scores."""
    query = torch.ones(1, 1, 300, 1)
    key = torch.full((1, 1, 300, 1), 2.0)
    operand = OperandSpec("float", 2)
    bias = torch.full((300, 300), 98.0).fill_diagonal_(0)
    spec = AttentionSpec(1.0, S + Load(0, q, k), sympy.Eq(q, k), operands=(operand,))
    found = head_statistics(query, key, key, (bias,), (), spec)
    assert found.score_quantiles.flatten().tolist() == [1.0, 1.0, 1.0]
    assert found.score_max.item() == 2
    assert found.entropy_normalized.item() == 0


def test_zero_scores_have_a_finite_range() -> None:
    zero = torch.zeros(1, 1, 64, 4)
    found = head_statistics(zero, zero, zero, (), (), PLAIN)
    assert found.score_quantiles.flatten().tolist() == [-126.0] * 3


@pytest.mark.parametrize("name", SPECS)
def test_tiles_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics(problem_of(name), rows=50)
    monkeypatch.setattr(scored_rows, "_TILE", 90 * 30)
    small = statistics(problem_of(name), rows=50)
    for field in dataclasses.fields(HeadStatistics):
        one, other = getattr(whole, field.name), getattr(small, field.name)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_keys_that_no_row_attends_to_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a causal mask about a quarter, where rows make several tiles."""
    query, key = torch.randn(2, 4, 1024, 8), torch.randn(2, 4, 1024, 8)
    at = scored_rows.sampled_rows(1024, 32, 0)
    spec = dataclasses.replace(PLAIN, mask=sympy.Ge(q - k, 0))
    monkeypatch.setattr(scored_rows, "_TILE", 1024 * 64)
    tiles = list(scored_rows.scored_rows(query, key, (), (), spec, at))
    scores = sum(scored.finite.numel() for _, scored in tiles)
    assert scores <= 0.78 * 2 * 4 * 32 * 1024
    for (batch, heads, rows), scored in tiles:
        whole = torch.zeros((*scored.finite.shape[:3], 1024))
        whole[..., : scored.finite.shape[-1]] = scored.weights()
        places = torch.tensor(at)[rows]
        scored_exactly = query[batch, heads][:, :, places] @ key[batch, heads].mT
        keep = places[:, None] >= torch.arange(1024)
        exact = scored_exactly.masked_fill(~keep, float("-inf")).softmax(-1)
        torch.testing.assert_close(whole, exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("first", [1, 90])
def test_rows_without_a_key_are_uniform_in_every_head(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each tile, where its heads share a mask; first: the row that has a key."""
    monkeypatch.setattr(scored_rows, "_TILE", 90 * 4)
    mask = sympy.Ge(q - k - first, 0)
    spec = AttentionSpec(1.0, mask=mask, empty_row=EmptyRow.UNIFORM)
    query = torch.randn(1, 3, 90, 4).double() * 3
    found = head_statistics(query, query, query, (), (), spec, rows=90)
    scores = (query @ query.mT).masked_fill(torch.ones(90, 90).triu(1 - first) > 0, float("-inf"))
    weights = scores.masked_fill(scores.amax(-1, keepdim=True) == float("-inf"), 0).softmax(-1)
    expected = torch.special.entr(weights).sum(-1).mean(-1)
    torch.testing.assert_close(found.entropy, expected, rtol=1e-9, atol=1e-9)


def test_no_tile_holds_more_than_its_rows_of_a_head() -> None:
    query, key = torch.randn(3, 8, 5000, 4), torch.randn(3, 2, 5000, 4)
    at = range(0, 5000, 60)
    spec = dataclasses.replace(PLAIN, group=4)
    seen = torch.zeros(3, 8, len(at))
    for tile, scored in scored_rows.scored_rows(query, key, (), (), spec, at):
        assert scored.finite.numel() <= scored_rows._TILE
        seen[tile] += 1
    assert (seen == 1).all()


def test_a_sample_is_near_the_whole() -> None:
    torch.manual_seed(3)
    query, key = torch.randn(1, 4, 2048, 32), torch.randn(1, 4, 2048, 32)
    spec = AttentionSpec(32**-0.5, mask=sympy.Ge(q - k, 0))
    some = head_statistics(query, key, key, (), (), spec)
    every = head_statistics(query, key, key, (), (), spec, rows=2048)
    # Stratified: the mean over rows is known far better than from rows drawn freely.
    assert (some.entropy - every.entropy).abs().max() < 0.05
    assert (some.saturation - every.saturation).abs().max() < 0.02


def test_turns_take_other_rows_and_the_same_turn_the_same() -> None:
    problem = problem_of("plain")
    first, again = statistics(problem, rows=5), statistics(problem, rows=5)
    other = statistics(problem, rows=5, turn=1)
    assert torch.equal(first.entropy, again.entropy)
    assert not torch.equal(first.entropy, other.entropy)


def test_rows_without_a_key_do_not_count() -> None:
    spec = AttentionSpec(1.0, mask=sympy.Ge(q - k - 32, 0), empty_row=EmptyRow.NAN)
    zero = torch.zeros(1, 1, 64, 4)
    found = head_statistics(zero, zero, zero, (), (), spec, rows=64)
    expected = mean([math.log(n) for n in range(1, 33)])
    assert found.entropy.item() == pytest.approx(expected, abs=1e-5)
    none = head_statistics(zero[:, :, :8], zero, zero, (), (), spec)
    values = [v for values in none.by_head().values() for v in values]
    assert values == [0.0] * len(values)


def test_by_head_is_plain_numbers_by_name() -> None:
    found = statistics(problem_of("plain"), torch.float32)
    by_head = found.by_head()
    assert by_head["q_max"] == found.q_max.amax(0).tolist()
    assert by_head["entropy"] == found.entropy.mean(0).tolist()
    assert by_head["score_0.5"] == found.score_quantiles[..., 1].mean(0).tolist()
    assert by_head["entropy_0.9"] == found.entropy_quantiles[..., 2].mean(0).tolist()
    assert all(len(values) == 4 for values in by_head.values())


def test_nan_in_the_input_is_nan_in_the_statistics() -> None:
    query = torch.randn(1, 2, 16, 4)
    key = query.clone()
    key[0, 1, 3, 0] = float("nan")
    found = head_statistics(query, key, query, (), (), PLAIN)
    assert found.entropy.isnan().tolist() == [[False, True]]
    assert found.k_max.isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(("length", "rows"), [(0, 4), (4, 0)])
def test_nothing_to_look_at_is_refused(length: int, rows: int) -> None:
    tensor = torch.zeros(1, 1, length, 4)
    with pytest.raises(ValueError, match="rows of"):
        head_statistics(tensor, tensor, tensor, (), (), PLAIN, rows=rows)


# -- compensated sums ------------------------------------------------------------------------------


def ill_conditioned(count: int, seed: int) -> torch.Tensor:
    """float32 numbers of both signs whose sum is thousands of times less than they add up to."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(count // 2, generator=generator) * 1000
    other = -half + torch.rand(count // 2, generator=generator)
    return torch.cat([half, other])[torch.randperm(count, generator=generator)]


@pytest.mark.parametrize("seed", range(5))
def test_compensated_sum_of_a_million_terms_is_within_two_ulp(seed: int) -> None:
    values = ill_conditioned(2**20, seed)
    exact = math.fsum(values.tolist())
    ulp = math.ldexp(1, math.frexp(exact)[1] - 24)
    ours = abs(compensated_sum(values).item() - exact) / ulp
    # torch's cumsum would add in float64.
    one_by_one = abs(float(values.numpy().cumsum(dtype="float32")[-1]) - exact) / ulp
    assert ours <= 2
    assert one_by_one > 20, "plain summation is good enough here: no test of anything"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 63, 65])
def test_compensated_sum_takes_any_length_and_leading_axes(count: int) -> None:
    values = torch.randn(2, 3, count)
    expected = values.double().sum(-1).float()
    torch.testing.assert_close(compensated_sum(values), expected, rtol=1e-6, atol=1e-6)

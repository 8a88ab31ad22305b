"""Statistics of heads in calibration: of every sample, averaged, in the policy and not in its key.

That they are the same when gone on with, and from several processes, is in test_resume.py: policies
are compared there by their text.
"""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import tiny_model
import torch

from adaattn_compiler.calibrate.board import Board, Tensors, exactly
from adaattn_compiler.calibrate.gather import RANK_ROWS, ROWS, gathered, rank_name
from adaattn_compiler.calibrate.given import batches_of
from adaattn_compiler.calibrate.run import Calibration, calibration
from adaattn_compiler.kernels.effective_rank import ENERGIES
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.statistics import head_statistics
from adaattn_compiler.options import parse_options
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import Budget, Policy
from adaattn_compiler.runtime.averages import MovingAverages
from adaattn_compiler.spec import AttentionSpec, k, q

SAMPLES = 3
CAUSAL = AttentionSpec(0.25, mask=sympy.Ge(q - k, 0))
RANK_NAMES = tuple(map(rank_name, ENERGIES))


@pytest.fixture(scope="module")
def found() -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.fixed_times(patch)
        torch.compiler.reset()
        batches = batches_of(tiny_model.batches(SAMPLES))
        return calibration(tiny_model.build(), batches, Budget("budget", 0.05))


class Watching:
    """The handler that keeps every site's tensors."""

    def __init__(self) -> None:
        self.seen: dict[SiteKey, list[tuple[Problem, Tensors]]] = {}

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        self.seen.setdefault(key, []).append((problem, tensors))
        return exactly(key, problem, tensors)


def test_policy_has_the_moving_averages_of_all_samples(found: Calibration) -> None:
    board, watching = Board(tiny_model.build(), parse_options({"measure": False})[0]), Watching()
    for args, kwargs in batches_of(tiny_model.batches(SAMPLES)):
        board.run(args, kwargs, watching)
    assert len(watching.seen) == len(tiny_model.SITES)
    for key, calls in watching.seen.items():
        averages = MovingAverages()
        for turn, (problem, (q_, k_, v_, operands, params)) in enumerate(calls):
            each = head_statistics(q_, k_, v_, operands, params, problem.spec, rows=ROWS, turn=turn)
            averages = averages.updated(each.by_head())
        site = found.policy.site(key.name, key.ordinal)
        assert site is not None
        assert site.statistics is not None
        for name, means in averages.means().items():
            assert site.statistics[name] == pytest.approx(means, rel=1e-4, abs=1e-5), name
        assert set(site.statistics) == {*averages.means(), *RANK_NAMES}


def test_ranks_are_of_the_first_sample_alone(found: Calibration) -> None:
    for site in found.sites.values():
        averages = site.statistics.averages
        assert averages["entropy"].count == SAMPLES
        assert all(averages[name].count == 1 for name in RANK_NAMES)


def test_statistics_survive_the_file_and_are_not_in_the_key(found: Calibration) -> None:
    read = Policy.from_json(found.policy.to_json())
    assert read == found.policy
    bare = tuple(dataclasses.replace(site, statistics=None) for site in read.sites)
    assert dataclasses.replace(read, sites=bare).key() == read.key()


def _tensors(key: torch.Tensor, gain: float = 1.0) -> Tensors:
    """Queries that look at one key each, if gain is large."""
    return key * gain, key, torch.randn_like(key), [], []


def test_ranks_tell_few_directions_from_many() -> None:
    torch.manual_seed(0)
    length = 4 * RANK_ROWS
    few = torch.nn.functional.one_hot(torch.arange(length) // RANK_ROWS, 64).float()
    many = torch.randn(length, 64)
    tensors = _tensors(torch.stack([few, many])[None], 40.0)
    plain = AttentionSpec(1.0)
    numbers = gathered(tensors, plain, 0, ranks=True)
    for name in RANK_NAMES:
        four, full = numbers[name]
        assert four == 4.0
        assert 0.9 * RANK_ROWS < full <= RANK_ROWS
    assert not set(RANK_NAMES) & set(gathered(tensors, plain, 0, ranks=False))


def test_what_is_not_finite_is_left_out() -> None:
    key = torch.randn(1, 2, 128, 16)
    whole = gathered(_tensors(key), CAUSAL, 0, ranks=True)
    key[0, 1, 5, 3] = float("nan")
    some = gathered(_tensors(key), CAUSAL, 0, ranks=True)
    assert {"entropy", "k_max", *RANK_NAMES} <= set(whole)
    assert not {"entropy", "k_max", *RANK_NAMES} & set(some)
    assert "v_max" in some


def test_turns_look_at_other_rows() -> None:
    tensors = _tensors(torch.randn(1, 2, 512, 16))
    one, same, other = (gathered(tensors, CAUSAL, turn, ranks=False) for turn in (1, 1, 2))
    assert one == same
    assert one["entropy"] != other["entropy"]
    assert one["q_max"] == other["q_max"]

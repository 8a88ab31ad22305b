"""calibrate(heuristic="seed"): what fixed thresholds propose, held to the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decided import inputs, stack

import adaattn_compiler
from adaattn_compiler.calibrate import cli
from adaattn_compiler.calibrate.given import asked_for, batches_of
from adaattn_compiler.calibrate.run import Calibration, calibration
from adaattn_compiler.decision import EXACT, HeadDecision, Precision

BF16 = HeadDecision(scores=Precision.BF16, values=Precision.BF16)


def found(**budget: float) -> Calibration:
    budgets = {"budget": None, "output_budget": None, "max_perplexity_change": None, **budget}
    batches = batches_of([(inputs(),), (inputs(seed=2),)])
    return calibration(stack(), batches, asked_for(**budgets), heuristic="seed")


@pytest.mark.parametrize("kind", ["budget", "output_budget"])
def test_nothing_is_taken_over_the_budget(kind: str) -> None:
    calibrated = found(**{kind: 1e-9})
    assert all(site.decision.is_exact for site in calibrated.policy.sites)
    assert "proposed less than exact for" in calibrated.said


def test_what_is_proposed_is_taken_within_the_budget() -> None:
    calibrated = found(budget=0.05)
    heads = [head for site in calibrated.policy.sites for head in site.decision.heads]
    assert BF16 in heads or any(head.pooling for head in heads)
    # Windows, selections and skipping are no part of the rules.
    assert not any(head.pattern or head.selection or head.skip for head in heads)
    for site in calibrated.policy.sites:
        for head, error in zip(site.decision.heads, site.error, strict=True):
            assert error is not None
            assert head == EXACT or error.p99 <= 0.8 * 0.05


def test_another_heuristic_is_refused() -> None:
    with pytest.raises(ValueError, match="heuristic is 'sead'; it must be seed, or None"):
        adaattn_compiler.calibrate(stack(), [(inputs(),)], budget=0.1, heuristic="sead")


def test_the_command_says_what_became_of_proposals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_for_seed.py").write_text(
        "from decided import inputs, stack\ndef build():\n    return stack(depth=1), (inputs(),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "policy.json"
    given = ["made_for_seed:build", "--budget", "0.01", "--heuristic", "seed", "--no-report"]
    assert cli.main([*given, "-o", str(path)]) == 0
    assert "the heuristic proposed" in capsys.readouterr().out
    assert len(adaattn_compiler.Policy.load(path).sites) == 1
    assert torch.is_grad_enabled()

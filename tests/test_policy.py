"""A policy in Python: looked up, edited, merged, named and shown."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import expecttest
import pytest
from policies import BF16, HEADS, POLICY, PROVENANCE, site

from adaattn_compiler.decision import EXACT, HeadDecision, Pattern, SiteDecision
from adaattn_compiler.policy import (
    Envelope,
    FrozenMap,
    MeasuredError,
    Policy,
    PolicyError,
    Provenance,
    Range,
    SitePolicy,
)
from adaattn_compiler.policy.table import table

_PRESENT: dict[str, Any] = {
    "spec": "0123456789ab",
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 64,
    "value_dim": 64,
    "dtype": "bfloat16",
    "training": False,
}


def _the(policy: Policy, name: str = "layers.0.self_attn", ordinal: int = 0) -> SitePolicy:
    found = policy.site(name, ordinal)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------ lookups


def test_site_is_found_by_name_and_ordinal() -> None:
    assert _the(POLICY) is POLICY.sites[0]
    assert _the(POLICY, ordinal=1) is POLICY.sites[1]
    assert POLICY.site("layers.7.self_attn") is None
    assert POLICY.site("layers.1.self_attn", 1) is None


def test_site_that_is_as_calibrated_matches() -> None:
    assert POLICY.sites[0].mismatch(**_PRESENT) is None


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("spec", "ba9876543210"),
        ("heads", 12),
        ("kv_heads", 6),
        ("head_dim", 128),
        ("value_dim", 32),
        ("dtype", "float16"),
    ],
)
def test_site_that_is_otherwise_is_refused_with_both_values(what: str, value: Any) -> None:
    reason = POLICY.sites[0].mismatch(**(_PRESENT | {what: value}))
    assert reason is not None
    assert f"{what} {getattr(POLICY.sites[0], what)}" in reason
    assert str(value) in reason


def test_another_spec_is_refused_in_words() -> None:
    calibrated = {"mask": "causal", "score": "S", "scale": "0.125"}
    own = dataclasses.replace(POLICY.sites[0], computes=calibrated)
    here = _PRESENT | {"spec": "ba9876543210", "computes": {**calibrated, "mask": "none"}}
    says = own.mismatch(**here, lengths=(1, 64)) or ""
    assert "mask is none, was causal; query length is 1, was from 16 to 4096" in says
    assert "scale" not in says
    assert "key length" not in says
    assert "(spec 0123456789ab, here ba9876543210)" in says
    assert says.endswith("; calibrate on inputs such as these, or leave it exact")
    assert own.mismatch(**_PRESENT, computes=calibrated, lengths=(1, 1)) is None  # only words
    assert ": here" not in (own.mismatch(**(here | {"computes": calibrated})) or ": here")


def test_a_file_without_words_is_answered_with_what_is_here() -> None:
    here = _PRESENT | {"spec": "ba9876543210", "computes": {"mask": "none", "score": "S"}}
    says = POLICY.sites[0].mismatch(**here, lengths=(64, 9999)) or ""
    assert "which its file does not describe (spec 0123456789ab, here ba9876543210)" in says
    assert "mask is none; score is S; key length is 9999, was from 16 to 4096; calibrate" in says


def test_where_gradients_are_on_a_policy_says_so() -> None:
    assert "torch.no_grad()" in (POLICY.sites[0].mismatch(**(_PRESENT | {"training": True})) or "")


def test_other_weights_are_refused_with_a_remedy() -> None:
    assert POLICY.mismatch("0" * 32) is None
    reason = POLICY.mismatch("1" * 32)
    assert reason is not None
    assert "0" * 32 in reason
    assert "1" * 32 in reason
    assert "calibrate this model" in reason


def test_differences_of_versions_and_device_are_told() -> None:
    same = dict(PROVENANCE.versions)
    assert PROVENANCE.differences(same, "NVIDIA H200") == ()
    assert PROVENANCE.differences(same | {"torch": "2.14", "numpy": "2"}, "NVIDIA A100") == (
        "torch was 2.13.0, here it is 2.14",
        "device was NVIDIA H200, here it is NVIDIA A100",
    )


def test_envelope_admits_lengths_inside_both_ranges() -> None:
    envelope = Envelope(Range(1, 16), Range(32, 64))
    assert envelope.admits(1, 64)
    assert not envelope.admits(0, 64)
    assert not envelope.admits(16, 65)


# -------------------------------------------------------------------------------------------- edits


def test_one_head_is_edited_and_its_measurements_are_forgotten() -> None:
    edited = POLICY.replaced("layers.0.self_attn", 1, head=2, decision=EXACT, budget=0.5)
    before, after = _the(POLICY, ordinal=1), _the(edited, ordinal=1)
    assert after.decision.heads == (*HEADS[:2], EXACT, *HEADS[3:])
    assert after.budget == (*before.budget[:2], 0.5, *before.budget[3:])
    assert after.error == (*before.error[:2], None, *before.error[3:])
    assert after.seconds is None
    assert edited.provenance == dataclasses.replace(PROVENANCE, results={})
    assert [edited.sites[0], edited.sites[2]] == [POLICY.sites[0], POLICY.sites[2]]
    assert POLICY.provenance.results  # the original is as it was


def test_all_heads_are_edited_alike() -> None:
    after = _the(POLICY.replaced("layers.0.self_attn", decision=BF16))
    assert after.decision.heads == (BF16,) * 6
    # What was BF16 before was measured.
    assert [error is None for error in after.error] == [True, False, True, True, True, False]


def test_decision_of_a_site_is_replaced_whole() -> None:
    decision = SiteDecision(HEADS[::-1])
    assert _the(POLICY.replaced("layers.0.self_attn", decision=decision)).decision == decision


def test_budget_alone_is_edited() -> None:
    after = _the(POLICY.replaced("layers.0.self_attn", budget=0.25))
    assert after.budget == (0.25,) * 6
    assert after.decision == _the(POLICY).decision
    assert after.seconds == _the(POLICY).seconds


def test_edit_that_changes_nothing_keeps_what_was_measured() -> None:
    assert POLICY.replaced("layers.0.self_attn", decision=SiteDecision(HEADS)) == POLICY
    assert POLICY.with_site(POLICY.sites[1]) is POLICY


def test_site_is_removed_and_added() -> None:
    less = POLICY.without("layers.0.self_attn", 1)
    assert less.sites == (POLICY.sites[0], POLICY.sites[2])
    assert not less.provenance.results
    assert less.with_site(POLICY.sites[1]).sites == (*less.sites, POLICY.sites[1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: POLICY.replaced("layers.0.sef_attn", decision=EXACT), "did you mean 'layers.0"),
        (lambda: POLICY.without("layers.0.self_attn", 9), "ordinal 9"),
        (lambda: POLICY.replaced("layers.0.self_attn", head=6, decision=EXACT), "heads 0 to 5"),
        (lambda: POLICY.replaced("layers.0.self_attn", head=-1, decision=EXACT), "heads 0 to 5"),
        (
            lambda: POLICY.replaced("layers.0.self_attn", decision=SiteDecision((EXACT,))),
            "has 6 heads; give as many",
        ),
        (
            lambda: POLICY.replaced("layers.0.self_attn", head=1, decision=SiteDecision(HEADS)),
            "give as many, or a HeadDecision",
        ),
        (lambda: Policy((site(), site()), PROVENANCE), r"sites\[1\] is layers.0.self_attn again"),
        (lambda: site(budget=(0.1,)), "budget has 1 entries; it must have one for each of 6"),
        (
            lambda: POLICY.replaced("layers.0.self_attn", head=2, budget=5),
            r"heads\[2\].budget is 5; it must be a relative error from 0 to 1 \(write 5% as 0.05",
        ),
        (lambda: POLICY.replaced("layers.0.self_attn", budget=-1.0), "budget is -1.0; it must be"),
        (lambda: site(budget=(float("nan"),) * 6), r"heads\[0\].budget is nan; it must be"),
        (lambda: site(error=()), "error has 0 entries"),
        (lambda: site(kv_heads=4), "kv_heads is 4; it must divide 6 heads"),
        (lambda: site(kv_heads=0), "kv_heads is 0; it must divide 6 heads"),
        (
            lambda: site(envelope=Envelope(Range(0, 1), Range(0, 1), {"q": (Range(0, 1),) * 3})),
            "envelope.statistics.q has 3 entries",
        ),
        (lambda: Range(2, 1), "low is 2; it must be at most high, 1"),
        (lambda: Range(0, float("nan")), "must be finite"),
    ],
)
def test_edit_that_makes_no_policy_is_refused(edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit()


def test_values_that_no_file_holds_are_refused_when_written() -> None:
    huge = HeadDecision(pattern=Pattern(2**40))
    with pytest.raises(
        PolicyError, match=r"^sites\[0\].heads\[0\].pattern.window is 1099511627776"
    ):
        POLICY.replaced("layers.0.self_attn", decision=huge).to_json()
    with pytest.raises(PolicyError, match=r"^sites\[0\].dtype is \"int8\"; it must be one of"):
        POLICY.with_site(site(dtype="int8")).to_json()


# ------------------------------------------------------------------------------------------- merges


def _provenance(**changes: Any) -> Provenance:
    return dataclasses.replace(PROVENANCE, **changes)


def test_merged_policies_have_the_others_sites_where_both_have_one() -> None:
    better = site("layers.0.self_attn", 1, budget=(0.5,) * 6)
    new = site("layers.9.self_attn")
    other = Policy((better, new), _provenance(created="2026-02-01"))
    merged = POLICY.merged(other)
    assert merged.sites == (POLICY.sites[0], better, POLICY.sites[2], new)
    assert merged.provenance == _provenance(created="2026-02-01", results={})


def test_merging_with_a_part_of_itself_gives_the_same_sites() -> None:
    assert POLICY.merged(Policy(POLICY.sites[:1], PROVENANCE)).sites == POLICY.sites
    assert POLICY.merged(POLICY) == POLICY


def test_policies_for_other_weights_are_not_merged() -> None:
    other = Policy(POLICY.sites, _provenance(weights="1" * 32))
    with pytest.raises(PolicyError, match=r"provenance.weights is 1{32} in the one and 0{32}"):
        POLICY.merged(other)


# --------------------------------------------------------------------------------------------- keys


def _measured_anew() -> SitePolicy:
    return site(error=(MeasuredError(0.5, 1.0),) * 6, seconds=None)


def test_key_is_that_of_what_is_computed_alone() -> None:
    assert len(POLICY.key()) == 12
    same = [
        Policy(POLICY.sites[::-1], PROVENANCE),
        Policy(POLICY.sites, _provenance(created="2027-01-01", device="A100", results={})),
        POLICY.with_site(_measured_anew()),
    ]
    assert {policy.key() for policy in same} == {POLICY.key()}


@pytest.mark.parametrize(
    "changed",
    [
        POLICY.replaced("layers.0.self_attn", head=0, decision=BF16),
        POLICY.replaced("layers.0.self_attn", head=0, budget=0.011),
        POLICY.without("layers.1.self_attn"),
        POLICY.with_site(site(envelope=Envelope(Range(16, 4097), Range(16, 4096)))),
        POLICY.with_site(site(spec="ba9876543210")),
        POLICY.with_site(site(training=True)),
        POLICY.with_site(site(dtype="float16")),
    ],
)
def test_key_differs_where_something_else_is_computed(changed: Policy) -> None:
    assert changed.key() != POLICY.key()


def test_key_is_the_same_in_every_process() -> None:
    assert POLICY.key() == "57bc685b4967"


def test_policy_is_a_value() -> None:
    for again in (copy.deepcopy(POLICY), pickle.loads(pickle.dumps(POLICY))):
        assert again == POLICY
        assert hash(again) == hash(POLICY)
    with pytest.raises(TypeError):
        POLICY.sites[0].envelope.statistics["q_rms"] = ()  # type: ignore[index]


def test_frozen_map_is_equal_to_any_mapping_of_its_entries() -> None:
    assert FrozenMap({"a": 1, "b": 2}) == {"b": 2, "a": 1}
    assert hash(FrozenMap({"a": 1, "b": 2})) == hash(FrozenMap({"b": 2, "a": 1}))
    assert repr(FrozenMap({"a": 1})) == "FrozenMap({'a': 1})"


# -------------------------------------------------------------------------------------------- shown


class TestShown(expecttest.TestCase):
    def test_summary_shows_heads_that_are_alike_together(self) -> None:
        decision = SiteDecision((BF16, BF16, EXACT, HEADS[2], HEADS[2], HEADS[2]))
        exact = site("b", 2, decision=SiteDecision((EXACT,) * 6), error=(None,) * 6)
        policy = Policy((site("", decision=decision), exact), PROVENANCE)
        self.assertExpectedInline(
            policy.summary(),
            """\
policy 0cac1a2b6190: 2 sites, 5 of 12 heads not exact
calibrated within max_perplexity_change 0.005 on NVIDIA H200, 2026-01-31T12:00:00Z
perplexity: 12.5
perplexity exact: 12.48
site    heads  decision                    mean error  p99 error  budget
(root)  0-1    dense bf16                  -           -          0.01
        2      exact                       0.002       0.004      0.02
        3-5    window 256 + 64 sinks bf16  0.005       0.01       0.01
b#2     0-5    exact                       -           -          0.01""",
        )


def test_heads_that_share_a_line_are_summed_up_by_the_one_nearest_to_its_budget() -> None:
    # Each within its budget; the largest error beside the smallest budget would read as over it.
    error = tuple(MeasuredError(e / 2, e) for e in (0.05, 0.002, 0.004, 0.0, 0.0, 0.0))
    alike = SiteDecision((BF16,) * 6)
    own = site(decision=alike, error=error, budget=(0.1, 0.003, 0.01, 0.2, 0.2, 0.2))
    assert table([own])[1].split()[-3:] == ["0.001", "0.002", "0.003"]
    evenly = dataclasses.replace(own, budget=(0.1, 0.004, 0.008, 0.2, 0.2, 0.2))
    assert table([evenly])[1].split()[-3:] == ["0.025", "0.05", "0.1"]
    none_allowed = dataclasses.replace(own, budget=(0.1, 0.003, 0.0, 0.0, 0.2, 0.2))
    assert table([none_allowed])[1].split()[-3:] == ["0.002", "0.004", "0"]
    unmeasured = dataclasses.replace(own, error=(None, *error[1:]))
    assert table([unmeasured])[1].split()[-3:] == ["-", "-", "0.003"]


def test_error_is_pickled_with_its_place() -> None:
    error = pickle.loads(pickle.dumps(PolicyError(("sites", 3, "q rms"), "is -1", "a.json")))
    assert str(error) == 'a.json: sites[3]["q rms"] is -1'


def test_site_of_other_weights_is_refused() -> None:
    site = dataclasses.replace(POLICY.sites[0], weights="0" * 32)
    assert site.mismatch(**_PRESENT, weights="0" * 32) is None
    for other in ("1" * 32, None):
        assert "other weights" in (site.mismatch(**_PRESENT, weights=other) or "")
    assert POLICY.sites[0].mismatch(**_PRESENT, weights="1" * 32) is None  # not looked at

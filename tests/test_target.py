"""Targets by name, and their rates."""

from __future__ import annotations

import pytest

from adaattn_compiler.target import TARGETS, cpu_target, target_named


def test_targets_have_names_and_capabilities() -> None:
    assert target_named("h200") is TARGETS["H200"]
    assert target_named("RTX4090") is TARGETS["RTX 4090"]
    assert target_named("sm_80").name == "A100"
    assert target_named("sm_90").name == "H100"
    assert target_named("sm_89").capability == (8, 9)
    with pytest.raises(ValueError, match=r"no target 'sm_75': one of A100, .*sm_90"):
        target_named("sm_75")


def test_rates_are_those_of_the_device() -> None:
    h100, a100 = TARGETS["H100"], TARGETS["A100"]
    assert h100.rate("float8_e4m3fn") == pytest.approx(2 * h100.rate("bfloat16"), rel=1e-3)
    with pytest.raises(ValueError, match="A100 multiplies no float8_e4m3fn; it has float32, tf32"):
        a100.rate("float8_e4m3fn")
    # As published for FlashAttention-3 on H100.
    assert h100.exponentials == pytest.approx(3.9e12, rel=0.01)
    assert TARGETS["H200"].bandwidth > h100.bandwidth
    assert cpu_target(4).rate("float32") == 2 * cpu_target(2).rate("float32")

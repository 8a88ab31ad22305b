"""The policy: how each attention of a model is computed, as calibrated, in a versioned JSON file.

policy = Policy.load("policy.json")
print(policy.summary())
policy.replaced("layers.0.self_attn", head=2, decision=EXACT).save("policy.json")
"""

from adaattn_compiler.policy.error import PolicyError
from adaattn_compiler.policy.parts import (
    LARGEST_BUDGET,
    Budget,
    Envelope,
    FrozenMap,
    MeasuredError,
    Provenance,
    Range,
    Seconds,
    SitePolicy,
)
from adaattn_compiler.policy.policy import Policy, schema

__all__ = [
    "LARGEST_BUDGET",
    "Budget",
    "Envelope",
    "FrozenMap",
    "MeasuredError",
    "Policy",
    "PolicyError",
    "Provenance",
    "Range",
    "Seconds",
    "SitePolicy",
    "schema",
]

"""Every attention of the transformers families is lowered, and the model stays as accurate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from check import assert_as_accurate, run
from families import FAMILIES, Family, attended, exact_output, output

from adaattn_compiler import explain
from adaattn_compiler.kernels.choose import kernels


def _cases() -> list[Any]:
    return [
        pytest.param(
            family,
            implementation,
            id="-".join(filter(None, (family.name, implementation, family.padded))),
        )
        for family in FAMILIES
        for implementation in family.implementations
    ]


def _skip_without_kernel(family: Family, implementation: str) -> None:
    needed = family.kernel_needed(implementation)
    if needed is not None and needed not in {kernel.name for kernel in kernels()}:
        pytest.skip(f"needs the kernel {needed!r}, which is not there yet")


def _reported(family: Family, values: torch.Tensor) -> torch.Tensor:
    """The rows that are tokens: what a padded position yields is of no use to anyone."""
    return values[attended(family.padded).bool()] if family.padded else values


@pytest.mark.parametrize(("family", "implementation"), _cases())
def test_family_is_lowered_and_as_accurate_as_eager(family: Family, implementation: str) -> None:
    _skip_without_kernel(family, implementation)
    model, inputs = family.model(implementation), family.inputs()
    outcome = run(lambda **given: output(model, given), **inputs)
    assert [site.reason for site in outcome.sites] == [None] * len(family.masks)
    exact = exact_output(model, inputs)
    assert not (outcome.result.isnan() & ~outcome.eager.isnan()).any()
    assert_as_accurate(
        _reported(family, outcome.result),
        _reported(family, outcome.eager),
        _reported(family, exact),
    )
    masks = tuple(site.mask for site in outcome.sites)
    assert masks == family.masks


@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5"])
def test_backend_with_inductor_is_as_accurate_as_eager(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model, inputs = family.model("eager"), family.inputs()
    with torch.no_grad():
        eager = output(model, inputs)
        compiled = torch.compile(model, backend="adaattn")
        ours = output(compiled, inputs)
        exact = exact_output(model, inputs)
    assert_as_accurate(ours, eager, exact)


def test_sites_are_named_after_their_modules() -> None:
    family = next(family for family in FAMILIES if family.name == "llama")
    with torch.no_grad():
        explanation = explain(family.model("sdpa"), **family.inputs())
    assert [site.name for site in explanation.sites] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]


def test_copies_of_a_compiled_model_are_independent() -> None:
    family = next(family for family in FAMILIES if family.name == "gpt2")
    model, inputs = family.model("eager"), family.inputs()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        first = run(lambda **given: output(model, given), **inputs)
        second = run(lambda **given: output(other, given), **inputs)
        torch.testing.assert_close(first.result, first.eager)
        torch.testing.assert_close(second.result, second.eager)

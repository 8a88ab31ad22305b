"""What AOTAutograd takes for parameters in a rewritten graph: CUDA graphs copy all other inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decided import Seen, inputs, policy_for, stack
from torch import fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext

from adaattn_compiler.backend import states_of
from adaattn_compiler.options import Options
from adaattn_compiler.passes.decide import chooser_of
from adaattn_compiler.passes.pipeline import rewrite


class ByHand(nn.Module):
    """Attention by hand, with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / 4).masked_fill(~self.mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class InOneCall(nn.Module):
    """Attention inside a composite call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def static_inputs(model: nn.Module, x: torch.Tensor, options: Options | None) -> list[str]:
    """The names of the inputs that Inductor would be told are static; options: None, of the graph
    as it was captured."""
    found: list[str] = []

    def backend(module: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        states: Sequence[torch.Tensor] = ()
        if options is not None:
            analysis = rewrite(module, given, options, chooser_of(options, module, given))
            assert analysis.graph_module is not None
            states = states_of(analysis, module, given, options.policy).of(given)
            module = analysis.graph_module
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]

        def inductor(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            metadata = TracingContext.get().fw_metadata
            assert metadata is not None
            if not found:
                found.extend(names[i] for i in metadata.static_input_indices)
            forward: Callable[..., Any] = graph.forward
            return forward

        run = aot_module_simplified(module, [*given, *states], fw_compiler=inductor)
        return lambda *now: run(*now, *states)

    torch.compiler.reset()
    torch.compile(model, backend=backend)(x)
    return found


@pytest.mark.parametrize("model", [ByHand, InOneCall])
@pytest.mark.parametrize("gradients", [False, True])
def test_parameters_and_buffers_are_as_in_the_graph_that_was_captured(
    model: Callable[[], nn.Module], gradients: bool
) -> None:
    made, x = model(), torch.randn(2, 64, 32)
    with torch.set_grad_enabled(gradients):
        captured = static_inputs(made, x, None)
        assert len(captured) == len([*made.parameters(), *made.buffers()])
        assert static_inputs(made, x, Options(measure=False)) == captured


def test_state_of_a_policy_is_static_and_the_users_input_is_not() -> None:
    model, x = stack(), inputs()
    with torch.no_grad():
        policy = policy_for(Seen(model, x))
        captured = static_inputs(model, x, None)
        found = static_inputs(model, x, Options(measure=False, policy=policy))
    assert found[: len(captured)] == captured
    assert len(found) == len(captured) + 2
    assert all(name.startswith("adaattn_state") for name in found[len(captured) :])
    assert not any("x" in name.split("_") for name in found)

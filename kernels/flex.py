"""flex_attention as a kernel: block-sparse, with the score computed as it goes.

A spec's mask gives the block lists (blocks without a key cost nothing, full ones no masking), its
score becomes the score_mod. Nothing of size M x N exists. A sink is one more key of zeros, with a
zero value, whose score is the sink's. Inference only: the CPU kernel has no backward.

On GPUs it is torch's Triton template (flex_gpu.py has what only they need).

Source: Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention
Kernels", 2024.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass

import torch

from adaattn_compiler.kernels.blocks import block_structure, density
from adaattn_compiler.kernels.flex_gpu import BLOCK, gpu_refusal, has_whole_blocks
from adaattn_compiler.kernels.flex_inductor import FlexConfig
from adaattn_compiler.kernels.flex_runner import FlexRunner
from adaattn_compiler.kernels.problem import Attention, Problem
from adaattn_compiler.kernels.through_op import op_call, op_refusal, training_refusal
from adaattn_compiler.spec import AttentionSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Time per unit of work beside SDPA's own, where nothing was measured: the template's products are
# slower than SDPA's, most of all in half precision.
_SLOWER = {torch.float32: 1.6, torch.bfloat16: 1.4, torch.float16: 3.0}
# As the generated kernel has it.
_SLOWER_ON_GPUS = 1.2


@dataclass(frozen=True)
class FlexKernel:
    """See the module's docstring; on one type of device."""

    name: str = "flex"
    label: str = "flex"
    device: str = "cpu"
    only_measured: bool = False
    seconds_to_build: float = 8.0

    @staticmethod
    def on_gpus() -> FlexKernel:
        """No estimate is good enough to choose it there, nor to keep it from being measured beside
        the generated kernel: building takes as long, about."""
        return FlexKernel(device="cuda", only_measured=True, seconds_to_build=3.0)

    def refusal(self, problem: Problem) -> str | None:
        if problem.dtype not in _DTYPES:
            return f"not for {problem.dtype}"
        if self.device == "cpu":
            return training_refusal(problem) or op_refusal(problem)
        return gpu_refusal(problem)

    def cost(self, problem: Problem) -> float:
        """Attended blocks only."""
        _, rows, columns = problem.shape.hints
        mask = problem.spec.mask
        attended = density(block_structure(mask, rows, columns, *BLOCK, problem.param_hints))
        slower = _SLOWER[problem.dtype] if self.device == "cpu" else _SLOWER_ON_GPUS
        return problem.work(attended) * slower

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return None

    def build(self, problem: Problem) -> Attention:
        plan = plan_of(problem)
        flex_runner(plan)  # compiled now: a failure must be known before the graph is written
        return op_call(plan)


def plan_of(problem: Problem) -> str:
    """A problem as text from which its runner can be made anew in any process."""
    shape = problem.shape
    return repr(
        {
            "kernel": "flex",
            "spec": problem.spec.serialize(),
            "dtype": str(problem.dtype).removeprefix("torch."),
            "sizes": (shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim),
            "block": BLOCK,
            "device": problem.device,
            "whole": problem.device == "cuda" and has_whole_blocks(problem),
        }
    )


@functools.cache
def flex_runner(plan: str) -> FlexRunner:
    """The runner of a plan, compiled once for a process. Raises what the compilation raises."""
    fields = ast.literal_eval(plan)
    heads, kv_heads, head_dim, value_dim = fields["sizes"]
    spec = AttentionSpec.deserialize(fields["spec"])
    dtype = getattr(torch, fields["dtype"])
    block = tuple(fields["block"])
    config = FlexConfig(
        dtype, heads, kv_heads, head_dim, value_dim, spec.scale, block, fields["whole"]
    )
    return FlexRunner(spec, config, fields["device"])

"""CUDA graphs up to Inductor's door: captured, rewritten, and every kernel in them compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_capture import Captured, Launch, captured, cuda, fake_gpu, training_launches
from families import FAMILIES, output
from torch.testing import FileCheck

from adaattn_compiler.kernels import choose
from adaattn_compiler.options import Options
from adaattn_compiler.target import TARGETS

OURS = Options(kernels=("triton",))
# Bytes of shared memory that a program may have, and what multiplies tiles.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
PRODUCTS = {80: "mma.sync", 90: "wgmma"}


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * 0.125).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)
    keep = (rows >= keys) & (rows - keys < 100)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = 30 * torch.tanh(q @ k.mT * 0.125 / 30)
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return torch.where(keep, scores, float("-inf")).softmax(-1) @ v


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    scores = q @ k.mT * 0.125
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~keep, float("-inf"))
    sink = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def first_keys_and_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)
    keep = (rows >= keys) & ((rows - keys < 100) | (keys < 4))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def inputs(dim: int = 64, groups: int = 4, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    return tuple(cuda(2, heads, 512, dim, dtype=dtype) for heads in (4, groups, groups))


CASES: dict[str, tuple[Any, Any]] = {
    "causal": (causal, lambda: inputs()),
    "causal d128": (causal, lambda: inputs(128)),
    "causal d80": (causal, lambda: inputs(80)),
    "causal fp16": (causal, lambda: inputs(dtype=torch.float16)),
    "causal fp32": (causal, lambda: inputs(dtype=torch.float32)),
    "window": (window, lambda: inputs()),
    "softcap": (softcap, lambda: inputs(128)),
    "grouped": (grouped, lambda: inputs(128, 1)),
    "padded": (padded, lambda: (*inputs(), torch.ones(2, 512, device="cuda") > 0)),
    "biased": (biased, lambda: (*inputs(), cuda(4, 512, 512))),
    "sinks": (with_sinks, lambda: (*inputs(), cuda(4))),
    "listed": (first_keys_and_window, lambda: inputs()),
}


def assert_launches_once(found: Captured, name: str = "fused_qk_softmax_av") -> None:
    assert [launch.name for launch in found.launches] == [name]
    assert found.launches[0].written == ("out_ptr",)


@pytest.mark.parametrize("name", CASES)
def test_site_becomes_one_launch_that_compiles(name: str) -> None:
    function, make = CASES[name]
    with fake_gpu(), torch.no_grad():
        found = captured(function, *make(), options=OURS)
    assert [site.reason for site in found.sites] == [None]
    assert found.sites[0].kernel == "triton"
    FileCheck().check_count("adaattn.triton_attention", 1, exactly=True).run(found.rewritten)
    FileCheck().check_not("softmax").check_not("scaled_dot_product").run(found.rewritten)
    assert_launches_once(found)
    assert_good_code(found.launches[0], 90, tensor_cores="fp32" not in name)


@pytest.mark.parametrize("name", ["causal d128", "sinks", "causal fp32"])
def test_site_compiles_for_an_a100(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "target_here", lambda: TARGETS["A100"])
    function, make = CASES[name]
    with fake_gpu(), torch.no_grad():
        found = captured(function, *make(), options=OURS)
    assert_launches_once(found)
    assert_good_code(found.launches[0], 80, tensor_cores="fp32" not in name)


def assert_good_code(launch: Launch, capability: int, tensor_cores: bool = True) -> None:
    compiled = launch.compiled(capability)
    assert compiled.spills == 0
    assert compiled.shared_memory <= SHARED[capability]
    if tensor_cores:
        assert PRODUCTS[capability] in compiled.ptx


@pytest.mark.parametrize("name", ["causal", "window", "padded", "sinks"])
def test_lengths_at_run_time_take_the_same_kernel(name: str) -> None:
    function, make = CASES[name]
    with fake_gpu(), torch.no_grad():
        found = captured(function, *make(), options=OURS, dynamic=True)
    assert [site.reason for site in found.sites] == [None]
    assert_launches_once(found)
    grid = found.launches[0].arguments
    assert grid["M"] is not None


TRAINING_OP = "ops.adaattn.triton_attention_training"
TRAINED = ["causal", "window", "softcap", "grouped", "biased", "sinks", "listed"]


def wanting_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.requires_grad_() if a.is_floating_point() else a for a in args)


@pytest.mark.parametrize("name", TRAINED)
def test_training_becomes_launches_that_compile(name: str) -> None:
    function, make = CASES[name]
    with fake_gpu():
        found = captured(function, *wanting_gradients(make()), options=OURS)
        forward, backward = training_launches(found)
    assert [site.reason for site in found.sites] == [None]
    FileCheck().check_count(TRAINING_OP, 1, exactly=True).run(found.rewritten)
    assert [launch.name for launch in forward] == ["fused_qk_softmax_av"]
    assert forward[0].written == ("out_ptr", "statistics_ptr")
    names = [launch.name for launch in backward]
    assert names[:3] == ["attention_row_terms", "attention_grad_q", "attention_grad_kv"]
    assert ("attention_grad_bias" in names) == (name == "biased")
    for launch in (*forward, *backward):
        assert_good_code(launch, 90, tensor_cores=launch.name != "attention_row_terms")


def test_training_with_lengths_at_run_time_takes_the_same_kernels() -> None:
    with fake_gpu():
        found = captured(window, *wanting_gradients(inputs()), options=OURS, dynamic=True)
    assert [site.reason for site in found.sites] == [None]
    FileCheck().check_count(TRAINING_OP, 1, exactly=True).run(found.rewritten)


@pytest.mark.parametrize(("groups", "keys"), [(4, 512), (1, 512), (4, 65536), (1, 65536)])
def test_few_rows_have_a_kernel_of_their_own(groups: int, keys: int) -> None:
    def decoding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with fake_gpu(), torch.no_grad():
        q, k, v = (cuda(1, heads, length, 128) for heads, length in ((4, 1), *[(groups, keys)] * 2))
        found = captured(decoding, q, k, v, options=OURS)
    assert [site.reason for site in found.sites] == [None]
    names = [launch.name for launch in found.launches]
    assert names == ["fused_decode", "combine_splits"]
    for launch in found.launches:
        assert_good_code(launch, 90, tensor_cores=False)


def test_table_of_blocks_is_made_once_for_all_layers() -> None:
    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return first_keys_and_window(first_keys_and_window(q, k, v), k, v)

    with fake_gpu(), torch.no_grad():
        found = captured(layers, *inputs(), options=OURS)
    FileCheck().check_count("adaattn.triton_tables", 1, exactly=True).run(found.rewritten)
    assert len(found.launches) == 2


def test_without_a_gpu_torch_chooses_where_ours_is_no_better() -> None:
    with fake_gpu(), torch.no_grad():
        found = captured(causal, *inputs())
    assert found.sites[0].kernel == "sdpa"
    FileCheck().check("scaled_dot_product_attention").check("is_causal: True").run(found.rewritten)


def test_window_is_ours_where_sdpa_would_want_a_mask() -> None:
    def narrow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return window(q, k, v)

    with fake_gpu(), torch.no_grad():
        found = captured(narrow, *(cuda(1, 4, 4096, 64) for _ in range(3)))
    assert found.sites[0].kernel == "triton"


def test_what_no_kernel_takes_is_left_to_inductor() -> None:
    with fake_gpu(), torch.no_grad():
        found = captured(causal, *inputs(320), options=OURS)
    assert found.sites[0].reason is not None
    assert "not for head dimensions above 256" in found.sites[0].reason
    assert not found.launches


# -- what users write ------------------------------------------------------------------------------


def test_number_on_the_cpu_is_brought_to_the_gpu() -> None:
    def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        keys = torch.arange(k.shape[2], device=k.device)
        return (q @ k.mT * 0.125).masked_fill(keys >= n, float("-inf")).softmax(-1) @ v

    with fake_gpu(), torch.no_grad():
        found = captured(scaled, *inputs(), torch.tensor(100), options=OURS)
    assert [site.reason for site in found.sites] == [None]
    operand = found.launches[0].arguments["operand0_ptr"]
    assert operand.meta["val"].device.type == "cuda"


def test_site_that_cannot_be_written_leaves_the_others() -> None:
    def two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (q @ k.mT + n).softmax(-1) @ first

    with fake_gpu(), torch.no_grad():
        found = captured(two, *inputs(), torch.zeros(()), options=Options(kernels=("sdpa",)))
    assert len(found.sites) == 2
    assert found.sites[0].lowered


def test_autocast_is_kept() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = (torch.randn(1, 2, 64, 32) for _ in range(3))
    with torch.no_grad():
        found = captured(attention, q, k, v, options=Options(kernels=("sdpa",)))
    assert [site.reason for site in found.sites] == [None]
    assert found.result.dtype == torch.bfloat16
    FileCheck().check_count("call_method[target=to]", 3, exactly=True).run(found.rewritten)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5", "gpt_oss", "gemma2"])
def test_family_is_lowered(name: str, implementation: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    if implementation not in family.implementations:
        pytest.skip("the family does not have it")
    given = family.inputs()
    with fake_gpu(), torch.no_grad():
        with torch.device("cuda"):
            model = family.model(implementation)
        tensors = (isinstance(value, torch.Tensor) for value in given.values())
        moved = {
            key: value.cuda() if is_tensor else value
            for (key, value), is_tensor in zip(given.items(), tensors, strict=True)
        }
        run = lambda **inputs: output(model, inputs)  # noqa: E731
        found = captured(run, **moved, options=OURS, launching=False)
    assert [site.reason for site in found.sites] == [None] * len(family.masks)
    assert tuple(site.mask for site in found.sites) == family.masks
    ops = FileCheck().check_count("adaattn.triton_attention](", len(family.masks), exactly=True)
    ops.run(found.rewritten)

"""What `explain` says of a device that is not there, and what it counts: against arithmetic."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adaattn_compiler import Explanation, explain
from adaattn_compiler.kernels.predict import Prediction
from adaattn_compiler.kernels.triton.compile import compiled_forward
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.report import predictions
from adaattn_compiler.spec import AttentionSpec
from adaattn_compiler.target import TARGETS, cpu_target

H200 = TARGETS["H200"]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def tensors(
    length: int,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (8, 2),
    **settings: Any,
) -> list[torch.Tensor]:
    counts = (heads[0], heads[1], heads[1])
    return [torch.empty(1, n, length, head_dim, dtype=dtype, **settings) for n in counts]


def explained(*inputs: torch.Tensor, grad: bool = False, **settings: Any) -> Explanation:
    """Without running anything: the tensors have no values."""
    options = {"kernels": "sdpa", "measure": False}
    with torch.set_grad_enabled(grad):
        return explain(causal, *inputs, options=options, run=False, **settings)


def predicted(*inputs: torch.Tensor, **settings: Any) -> Prediction:
    (site,) = explained(*inputs, **settings).sites
    assert site.prediction is not None
    return site.prediction


# -- counted ---------------------------------------------------------------------------------------

HEADS, GROUPS, DIM = 8, 2, 64


def test_bytes_are_those_of_the_tensors() -> None:
    length = 1024
    found = predicted(*tensors(length))
    q_and_out, k_and_v = 2 * HEADS * length * DIM * 2, 2 * GROUPS * length * DIM * 2
    assert found.least_bytes == found.memory_bytes == q_and_out + k_and_v
    # Eager: scores written by the product, read and written by scale, mask and softmax, and read.
    scores = HEADS * length * length * 2
    assert found.eager_bytes == 8 * scores + q_and_out + k_and_v
    assert found.saving == pytest.approx(found.eager_bytes / found.memory_bytes)


def test_operations_are_those_of_the_blocks_that_the_mask_leaves() -> None:
    length, blocks = 1024, 1024 // 64
    found = predicted(*tensors(length))
    left = blocks * (blocks + 1) // 2
    assert found.density == left / blocks**2
    assert found.operations == 4 * HEADS * DIM * left * 64 * 64


def test_traffic_grows_with_length_where_eager_grows_with_its_square() -> None:
    short, long = predicted(*tensors(1024)), predicted(*tensors(8192))
    assert long.memory_bytes == 8 * short.memory_bytes
    assert long.eager_bytes > 0.9 * 64 * short.eager_bytes
    assert long.saving > 7 * short.saving > 5


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("length", [1024, 8192])
def test_eager_takes_more_than_a_128th_of_the_length_times_as_much(
    head_dim: int, length: int
) -> None:
    found = predicted(*tensors(length, head_dim, heads=(8, 8)))
    assert found.saving == pytest.approx(2 * length / head_dim + 1)
    assert found.saving > max(length / 128, 8)


def test_without_a_target_the_figures_are_of_this_machine() -> None:
    explanation = explained(*tensors(512, dtype=torch.float32))
    found = explanation.sites[0].prediction
    here = cpu_target(torch.get_num_threads())
    assert found is not None
    assert (found.device, found.tiles, found.refusal) == (here.name, None, None)
    assert found.bound == "products"
    assert found.seconds == pytest.approx(found.operations / here.rate("float32"))
    assert len(str(explanation).splitlines()) == 3  # the one table


def test_numbers_that_a_device_does_not_multiply_have_no_time() -> None:
    found = predicted(*tensors(128, dtype=torch.float64))
    assert (found.seconds, found.bound) == (None, None)
    assert found.least_bytes == 2 * (HEADS + GROUPS) * 128 * DIM * 8


def test_layers_alike_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaattn_compiler.kernels import predict

    seen: list[Any] = []

    def count(*arguments: Any) -> Any:
        seen.append(arguments)
        return work_of(*arguments)

    work_of = predict.work_of
    monkeypatch.setattr(predict, "work_of", count)

    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            q = causal(q, k, v)
        return q

    with torch.no_grad():
        explanation = explain(layers, *tensors(328), run=False, options={"kernels": "sdpa"})
    assert len(explanation.sites) == 8
    assert len({site.prediction for site in explanation.sites}) == 1
    assert len(seen) == 1


def test_what_is_not_lowered_has_no_figures() -> None:
    def squared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1).square() @ v

    explanation = explain(squared, *torch.randn(3, 1, 2, 8, 4), target="sm_90")
    assert explanation.sites[0].prediction is None
    assert "nothing ran there" not in str(explanation)


# -- on a target -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_h200() -> Explanation:
    pytest.importorskip("triton")
    return explained(*tensors(8192, heads=(32, 8), head_dim=128), target="H200", source=True)


def test_the_kernel_is_compiled_for_the_target(on_h200: Explanation) -> None:
    found = on_h200.sites[0].prediction
    assert found is not None
    assert (found.device, on_h200.target) == ("H200 (sm_90)", "H200")
    assert (found.refusal, found.note, found.tensor_cores) == (None, None, "wgmma")
    assert found.registers is not None
    assert 64 <= found.registers <= 255
    assert found.shared_memory is not None
    assert 0 < found.shared_memory <= H200.shared_memory
    assert found.spilled == 0


def test_time_is_the_longest_at_the_rates_of_the_target(on_h200: Explanation) -> None:
    found = on_h200.sites[0].prediction
    assert found is not None
    assert found.bound == "products"
    assert found.seconds == pytest.approx(found.operations / H200.rate("bfloat16"))
    assert found.seconds > found.memory_bytes / H200.bandwidth


def test_traffic_of_tiles_is_theirs(on_h200: Explanation) -> None:
    found = on_h200.sites[0].prediction
    assert found is not None
    assert found.tiles is not None
    rows = int(found.tiles.split("x")[0])
    q_and_out, keys = 2 * 32 * 8192 * 128 * 2, 2 * 32 * 8192 * 128 * 2
    assert found.tile_bytes == q_and_out + 8192 // rows * found.density * keys


def test_it_is_shown_as_a_second_table(on_h200: Explanation) -> None:
    lines = str(on_h200).splitlines()
    at = lines.index("on H200 (sm_90), by counting and compiling; nothing ran there:")
    header, row = lines[at + 1 : at + 3]
    for name in ("tiles", "registers", "shared", "spilled", "time", "bound", "density", "bytes"):
        assert name in header
    assert row.startswith("(root)  triton  ")
    for figure in ("wgmma", "0 B", ">= ", " us", "products", "168 MB", "34.5 GB"):
        assert figure in row
    assert "reason" not in header  # there is none


def test_the_source_is_the_module_for_the_target(on_h200: Explanation) -> None:
    source = on_h200.sites[0].source
    assert source is not None
    assert "import triton.language as tl" in source
    assert "mask: causal" in source
    assert source in str(on_h200)


def test_json_holds_the_figures(on_h200: Explanation) -> None:
    read = json.loads(on_h200.to_json())
    assert read["target"] == "H200"
    assert Prediction(**read["sites"][0]["prediction"]) == on_h200.sites[0].prediction


@needs_triton
def test_other_lengths_do_not_compile_again(
    on_h200: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaattn_compiler.kernels import predict

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(predict, "compiled_forward", never)
    found = predicted(*tensors(4096, heads=(32, 8), head_dim=128), target=H200)
    assert found.registers == on_h200.sites[0].prediction.registers  # type: ignore[union-attr]


def test_a_kernel_that_does_not_compile_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from adaattn_compiler.kernels import predict

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(predict, "compiled_forward", broken)
    explanation = explained(*tensors(640, head_dim=40), target="A100")
    found = explanation.sites[0].prediction
    assert found is not None
    assert found.note == "not compiled: RuntimeError: out of luck"
    assert (found.registers, found.seconds is None) == (None, False)
    assert str(explanation).endswith("not compiled: RuntimeError: out of luck")


@needs_triton
def test_float32_has_the_rate_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaattn_compiler.kernels import predict

    monkeypatch.setattr(predict, "compiled_forward", lambda *_, **__: _COMPILED)
    inputs = tensors(2048, dtype=torch.float32)
    exact = predicted(*inputs, target="sm_80")
    assert exact.bound == "products"
    assert exact.seconds == pytest.approx(exact.operations / TARGETS["A100"].rate("float32"))
    plan_of = predict.plan_of
    for precision, times in (("tf32", 1), ("tf32x3", 3)):
        predict.predicted.cache_clear()
        monkeypatch.setattr(
            predict,
            "plan_of",
            lambda *of, chosen=precision: dataclasses.replace(plan_of(*of), precision=chosen),
        )
        found = predicted(*inputs, target="sm_80")
        products = times * found.operations / TARGETS["A100"].rate("tf32")
        assert found.seconds == pytest.approx(max(products, _exponentials(found)))
    predict.predicted.cache_clear()


def _exponentials(found: Prediction) -> float:
    return found.operations / (4 * DIM) / TARGETS["A100"].exponentials


_COMPILED = type("Compiled", (), {"ptx": "", "registers": 1, "shared_memory": 1, "spills": 0})()


# -- near misses -----------------------------------------------------------------------------------


def test_unknown_target_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no target 'sm_70': one of A100, .* sm_90"):
        explained(*tensors(64), target="sm_70")


def test_what_the_kernel_does_not_take_is_counted_all_the_same() -> None:
    explanation = explained(*tensors(256, head_dim=512), target="sm_90")
    found = explanation.sites[0].prediction
    assert found is not None
    assert found.refusal is not None
    assert (found.tiles, found.registers) == (None, None)
    assert found.least_bytes == 2 * (HEADS + GROUPS) * 256 * 512 * 2
    assert str(explanation).endswith(found.refusal)


def test_source_of_what_is_refused_is_none() -> None:
    site = explained(*tensors(256, head_dim=512), target="sm_90", source=True).sites[0]
    assert site.source is None


def test_training_says_what_the_figures_are_of() -> None:
    inputs = tensors(272, head_dim=512, requires_grad=True)
    explanation = explained(*inputs, grad=True, target="sm_90")
    assert explanation.sites[0].training
    assert "figures for the target are of the forward pass" in explanation.notes


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )
    explanation = explained(*tensors(344), target="sm_90")
    found = explanation.sites[0].prediction
    assert found is not None
    assert found.refusal == "Triton is not installed"
    assert found.seconds is not None
    assert any("pip install triton" in note for note in explanation.notes)


def test_target_without_capability_is_counted() -> None:
    found = predicted(*tensors(512), target=cpu_target(64))
    assert (found.device, found.refusal) == ("CPU of 64 cores", None)


# -- what a program takes --------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(("capability", "head_dim"), [(80, 64), (90, 128)])
def test_there_are_tiles_within_48_kib(capability: int, head_dim: int) -> None:
    tiles = Tiles(128, 64, 4, 3) if capability == 80 else Tiles(64, 32, 4, 2)
    made_for = Configuration(AttentionSpec(0.1))
    found = compiled_forward(made_for, "bfloat16", (head_dim, head_dim), tiles, capability)
    assert found.shared_memory <= 48 * 1024
    assert found.spills == 0


# -- without running -------------------------------------------------------------------------------


def test_a_model_that_is_not_run_says_what_it_leaves_out() -> None:
    ran: list[int] = []

    def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = causal(q, k, v)
        torch._dynamo.graph_break()
        ran.append(1)
        return causal(q, k, v)

    with torch.no_grad():
        explanation = explain(twice, *tensors(64), run=False, options={"kernels": "sdpa"})
    assert len(explanation.sites) == 1
    assert not ran
    assert any("run=True" in note for note in explanation.notes)
    assert explained(*tensors(64)).notes == ()


def test_figures_say_whether_they_are_of_what_was_decided() -> None:
    (site,) = explained(*tensors(1024), target="sm_90").sites
    heads = dataclasses.replace(site, decision="4 x window 64")
    assert "not as decided" not in "".join(predictions([site]))
    assert "of attention computed exactly, not as decided" in "".join(predictions([heads]))

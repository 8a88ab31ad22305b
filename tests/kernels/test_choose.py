"""Which kernel is chosen, what is said of it, and what is kept on disk."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

from adaattn_compiler.kernels import choose as module
from adaattn_compiler.kernels import device, measure, table
from adaattn_compiler.kernels.choose import choose
from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.measure import Measured
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.sdpa import SdpaKernel
from adaattn_compiler.kernels.torch_backends import Window, window_of
from adaattn_compiler.options import Options
from adaattn_compiler.spec import AttentionSpec, Load, M, N, OperandSpec, Refusal, S, h, k, q

WINDOW = sympy.And(sympy.Ge(q - k, 0), sympy.Ge(k - q + 511, 0))


def problem(rows: int = 4096) -> Problem:
    """A window long enough that kernels compete."""
    shape = Shape(1, 8, 8, rows, rows, 64, 64, hints=(1, rows, rows))
    return Problem(AttentionSpec(0.125, mask=WINDOW), shape, torch.float32, "cpu", False)


@dataclasses.dataclass
class Clock:
    """Stands in for running kernels: what it says, and how often it was asked."""

    times: dict[str, float]
    steady: bool = True
    asked: int = 0

    def __call__(self, kernels: Any, problem: Problem) -> Measured:
        self.asked += 1
        named = {kernel.label for kernel in kernels}
        times = {name: t for name, t in self.times.items() if name in named}
        return Measured(times, self.steady)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock({"sdpa": 3.0, "strips": 2.0})
    monkeypatch.setattr(module, "measured", clock)
    return clock


def options(folder: Path) -> Options:
    return Options(cache_dir=folder, kernels=("sdpa", "strips"))


def test_fastest_is_chosen_and_its_time_kept(clock: Clock, tmp_path: Path) -> None:
    first, again = (choose(problem(), options(tmp_path)) for _ in range(2))
    assert first.kernel.name == "strips"
    assert first.why == "measured: strips 2000.00 ms, sdpa 3000.00 ms"
    assert again == first
    assert clock.asked == 1


def test_times_of_a_busy_machine_are_not_kept(clock: Clock, tmp_path: Path) -> None:
    clock.steady = False
    assert choose(problem(), options(tmp_path)).kernel.name == "strips"
    assert list(tmp_path.rglob("*.json")) == []
    clock.times, clock.steady = {"sdpa": 1.0, "strips": 2.0}, True
    assert choose(problem(), options(tmp_path)).kernel.name == "sdpa"
    assert clock.asked == 2


def test_times_that_are_all_far_too_long_choose_nothing(clock: Clock, tmp_path: Path) -> None:
    clock.times = {"sdpa": 30e-3, "strips": 40e-3}
    small = problem(256)  # some tenths of a millisecond, if nobody else wants the cores
    choice = choose(small, options(tmp_path))
    assert choice.kernel == min(module.kernels()[:2], key=lambda kernel: kernel.cost(small))
    assert choice.why == "least cost by estimate: other work disturbed the measurement"
    assert list(tmp_path.rglob("*.json")) == []
    clock.times = {"sdpa": 8e-4, "strips": 16e-4}
    assert choose(small, options(tmp_path)).why.startswith("measured")


def test_other_lengths_are_measured_for_themselves(clock: Clock, tmp_path: Path) -> None:
    for rows in (4096, 2048, 4096):
        choose(problem(rows), options(tmp_path))
    assert clock.asked == 2


def test_small_problems_are_not_measured(clock: Clock, tmp_path: Path) -> None:
    assert choose(problem(64), options(tmp_path)).why.endswith("too small to measure")
    assert clock.asked == 0


def test_measuring_can_be_turned_off(clock: Clock, tmp_path: Path) -> None:
    trusting = dataclasses.replace(options(tmp_path), measure=False)
    assert choose(problem(), trusting).why == "least cost by estimate"
    assert clock.asked == 0


@pytest.mark.parametrize(("rounds", "steady"), [((1.0, 1.1, 1.2), True), ((1.0, 9.0, 9.0), False)])
def test_rounds_that_differ_are_not_steady(
    rounds: tuple[float, ...], steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "_in_turns", lambda calls, *_: {name: list(rounds) for name in calls}
    )
    found = measure.measured(module.kernels()[:2], problem(64))
    assert found.times == {"sdpa": 1.0, "strips": 1.0}
    assert found.steady is steady


def test_kernel_that_fails_on_random_data_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure._first_call
    monkeypatch.setattr(
        measure, "_first_call", lambda name, call: None if name == "sdpa" else first(name, call)
    )
    assert set(measure.measured(module.kernels()[:2], problem(64)).times) == {"strips"}


def test_kernels_are_given_the_same_tensors_of_the_types_that_were_seen() -> None:
    given: list[list[torch.Tensor]] = []

    class Noting(Stub):
        def build(self, problem: Problem) -> Any:
            def attention(q: Any, k: Any, v: Any, operands: Any, sizes: Any) -> Any:
                given.append([q, k, v, *operands])
                return q

            return attention

    sizes = (1, 8, 64, 64)
    slopes, keep = OperandSpec("float", 1), OperandSpec("int", 2)
    biased = dataclasses.replace(
        problem(64),
        dtype=torch.bfloat16,
        spec=AttentionSpec(
            0.125, S + Load(0, h), sympy.Ne(Load(1, q, k), 0), operands=(slopes, keep)
        ),
        operand_shapes=((8,), (64, 64)),
        operand_dtypes=(torch.bfloat16, torch.int32),
    )
    found = measure.measured((Noting("sdpa", 1.0), Noting("cpp", 1.0)), biased)
    assert set(found.times) == {"sdpa", "cpp"}
    assert {tuple(map(id, tensors)) for tensors in given} == {tuple(map(id, given[0]))}
    assert [tuple(t.shape) for t in given[0]] == [sizes, sizes, sizes, (8,), (64, 64)]
    assert [t.dtype for t in given[0]] == [torch.bfloat16] * 4 + [torch.int32]


def test_without_room_for_random_data_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "randn", full)
    assert measure.measured(module.kernels()[:2], problem(64)) == Measured({}, False)


class FakeCuda:
    """A device whose clock moves by what is enqueued, while the host goes on."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, list[float]()

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda later: 1e3 * (later.at - event.at)
        return event

    def _sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles / 2e9)
        self.now += cycles / 2e9

    def synchronize(self) -> None:
        pass


def test_on_a_gpu_what_the_host_takes_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(device, "torch", SimpleNamespace(cuda=cuda))

    def call() -> None:
        time.sleep(1e-3)
        cuda.now += 2e-5

    timer = device.timer_of(call, "cuda")
    assert timer() == pytest.approx(2e-5)
    (waited,) = cuda.sleeps
    assert 2e-3 <= waited <= 5e-3
    assert device.timer_of(call, "cpu")() >= 1e-3


@pytest.mark.parametrize("text", ['{"sdpa": NaN}', '{"sdpa": -1, "strips": 1}', '{"sdpa": 1e999}'])
def test_times_that_are_none_are_measured_again(text: str, clock: Clock, tmp_path: Path) -> None:
    choose(problem(), options(tmp_path))
    (file,) = tmp_path.rglob("*.json")
    file.write_text(text)
    assert choose(problem(), options(tmp_path)).kernel.name == "strips"
    assert clock.asked == 2


@dataclasses.dataclass(frozen=True)
class Stub:
    """A kernel that can take anything, for as much as it says."""

    name: str
    estimate: float
    seconds_to_build: float = 0.0
    fails: bool = False
    only_measured: bool = False

    @property
    def label(self) -> str:
        return self.name

    def refusal(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return self.estimate

    def build(self, problem: Problem) -> Any:
        if self.fails:
            raise RuntimeError("not on this machine")

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return None


def chosen(monkeypatch: pytest.MonkeyPatch, *stubs: Stub) -> module.Choice:
    """The choice among them by their estimates."""
    monkeypatch.setattr(module, "kernels", lambda device: stubs)
    return choose(problem(), Options(kernels=("sdpa", "flex", "cpp"), measure=False))


@pytest.mark.parametrize(("estimate", "name"), [(0.95e9, "sdpa"), (0.5e9, "cpp")])
def test_what_takes_longer_to_build_has_to_promise_more(
    estimate: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = chosen(monkeypatch, Stub("sdpa", 1e9), Stub("cpp", estimate, 2.0))
    assert (choice.kernel.name, choice.why) == (name, "least cost by estimate")


def test_what_takes_longest_to_build_is_compared_with_what_takes_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = Stub("sdpa", 2e9), Stub("cpp", 1e9, 2.0)
    assert chosen(monkeypatch, *others, Stub("flex", 0.95e9, 20.0)).kernel.name == "cpp"
    assert chosen(monkeypatch, *others, Stub("flex", 0.5e9, 20.0)).kernel.name == "flex"


def test_small_problem_takes_what_need_not_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, Stub("cpp", 1.0, 2.0), Stub("sdpa", 1e6))
    assert choice.kernel.name == "sdpa"
    assert choice.why == "least cost by estimate, and too small to measure"


def test_what_has_to_be_run_is_not_chosen_by_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = Stub("sdpa", 1e9), Stub("flex", 0.5e9, only_measured=True)
    choice = chosen(monkeypatch, *stubs)
    assert choice.kernel.name == "sdpa"
    assert "flex: chosen by measurement only" in choice.why


@pytest.mark.parametrize("estimate", [2e9, 1e12])
def test_kernel_that_cannot_be_built_gives_way(
    estimate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = chosen(monkeypatch, Stub("cpp", 1e9, 2.0, fails=True), Stub("sdpa", estimate))
    assert choice.kernel.name == "sdpa"
    assert choice.why == "cpp could not be built: RuntimeError: not on this machine"


# -- on a GPU --------------------------------------------------------------------------------------


def on_a_gpu(**changes: Any) -> Problem:
    return dataclasses.replace(problem(), device="cuda", dtype=torch.bfloat16, **changes)


def test_without_a_gpu_kernels_for_it_are_chosen_by_estimate(clock: Clock) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    window = choose(on_a_gpu(), Options())
    assert (window.kernel.name, window.why) == ("triton", "least cost by estimate")
    causal = on_a_gpu(spec=AttentionSpec(0.125, mask=sympy.Ge(q - k, 0)))
    assert choose(causal, Options()).kernel.name == "sdpa"
    assert clock.asked == 0


def test_every_kernel_for_a_gpu_has_a_label_of_its_own() -> None:
    labels = [kernel.label for kernel in module.kernels("cuda")]
    assert len(set(labels)) == len(labels)
    assert {"sdpa", "cudnn", "flash", "efficient", "triton", "triton:1"} <= set(labels)


def test_gpu_of_another_maker_gets_what_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert [kernel.name for kernel in module.kernels("cuda")] == ["sdpa"]


def test_on_a_gpu_all_that_may_be_fastest_compete(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_present", lambda device: True)
    monkeypatch.setattr(table, "facts_of_device", lambda: ("a GPU",))
    clock.times = {"flash": 1e-3, "triton": 2e-3, "triton:1": 0.9e-3, "cpp": 0.0}
    choice = choose(on_a_gpu(), Options(cache_dir=tmp_path))
    assert choice.kernel.label == "triton:1"
    assert choice.why == "measured: triton:1 0.90 ms, flash 1.00 ms, triton 2.00 ms"
    assert choose(on_a_gpu(), Options(cache_dir=tmp_path)) == choice
    assert clock.asked == 1


@pytest.mark.parametrize(
    ("mask", "rows", "window"),
    [
        (sympy.true, 8, Window(None, None)),
        (sympy.Ge(q - k, 0), 8, Window(None, 0)),
        (WINDOW, 8, Window(511, 0)),
        (sympy.And(sympy.Ge(q - k + 3, 0), sympy.Ge(k - q + 5, 0)), 8, Window(5, 3)),
        (sympy.Ge(q + N - M - k, 0), 5, Window(None, 0)),
        (sympy.And(sympy.Ge(q + N - M - k, 0), sympy.Ge(k - q - N + M + 2, 0)), 5, Window(2, 0)),
    ],
    ids=str,
)
def test_window_is_what_flash_attention_calls_so(mask: Any, rows: int, window: Window) -> None:
    shape = Shape(1, 1, 1, rows, 8, 64, 64, (1, rows, 8))
    assert window_of(mask, shape) == window
    at = torch.arange(8) - torch.arange(rows)[:, None] - (8 - rows)
    low, high = (-window.left if window.left is not None else -9), window.right
    meant = (at >= low) & (at <= (9 if high is None else high))
    found = evaluate_dense(mask, positions((mask,), meant, (1, 1, rows, 8)), [], ())
    assert torch.equal(torch.as_tensor(found).expand(rows, 8), meant)


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (sympy.Ge(q - k, 0), 5),  # not the last rows
        (sympy.Ge(q + N - M - k, 0), None),  # as many as keys, or not: only a run knows
        (sympy.Gt(q, k), 8),
        (sympy.Or(sympy.Ge(q - k, 0), sympy.Lt(k, 2)), 8),
        (sympy.And(sympy.Ge(q - k, 0), sympy.Ge(k - 2, 0)), 8),
        (sympy.Ge(2 * q - k, 0), 8),
    ],
    ids=str,
)
def test_other_masks_are_no_windows(mask: Any, rows: int | None) -> None:
    shape = Shape(1, 1, 1, rows, 8, 64, 64, (1, 8, 8))
    if rows is None:  # the diagonal that ends at the last row is one, whatever the lengths
        assert window_of(mask, shape) == Window(None, 0)
        mask = sympy.Ge(q - k, 0)
    assert window_of(mask, shape) is None


@pytest.mark.parametrize("rows", [1024, 4096, 32768])
def test_flash_attention_and_ours_compete_for_a_window(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_present", lambda device: True)
    shape = Shape(1, 8, 8, rows, rows, 64, 64, hints=(1, rows, rows))
    near = module._candidates(on_a_gpu(shape=shape), Options()).kernels
    assert {"flash", "triton"} <= {kernel.label for kernel in near}


@pytest.mark.parametrize("rows", [1, 32])
def test_small_problem_on_a_gpu_takes_no_kernel_that_has_to_be_run_first(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_present", lambda device: True)
    shape = Shape(1, 1, 1, rows, 32, 64, 64, (1, rows, 32))
    choice = choose(on_a_gpu(shape=shape, spec=AttentionSpec(0.125)), Options())
    assert choice.kernel.name == "sdpa"


def test_what_failed_when_it_was_run_is_not_chosen(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_present", lambda device: True)
    monkeypatch.setattr(table, "facts_of_device", lambda: ("a GPU",))
    clock.times = {}
    assert choose(on_a_gpu(), Options(cache_dir=tmp_path)).kernel.name in ("triton", "sdpa")
    with pytest.raises(Refusal, match="none of the kernels that can take it runs here"):
        choose(on_a_gpu(), Options(cache_dir=tmp_path, kernels=("flash",)))
    clock.times = {"flash": 1e-3}
    assert (
        choose(on_a_gpu(), Options(cache_dir=tmp_path, kernels=("flash",))).kernel.name == "flash"
    )


def test_mask_of_sdpa_on_a_gpu_keeps_the_digits_of_a_bias() -> None:
    bias = AttentionSpec(0.125, S + Load(0, 0, h, q, k), operands=(OperandSpec("float", 4),))
    given = {"spec": bias, "operand_shapes": ((1, 8, 4096, 4096),)}
    sdpa = SdpaKernel()
    assert sdpa.refusal(on_a_gpu(**given, operand_dtypes=(torch.bfloat16,))) is None
    refused = sdpa.refusal(on_a_gpu(**given, operand_dtypes=(torch.float32,)))
    assert refused == "its mask on cuda is torch.bfloat16, the bias is not"
    assert sdpa.refusal(dataclasses.replace(on_a_gpu(**given), device="cpu")) is None

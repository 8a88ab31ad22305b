"""The GPU benchmark's own code, without a GPU: cases, timing, budgets, isolation, the report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmarks_here
import pytest
import torch

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.reference import reference_attention
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, device, forms, memory, plan, supervisor, timed, timing
from benchmarks.gpu.cases import Case, Inputs, Shape, Tiling
from benchmarks.gpu.ours import our_backward, our_forward
from benchmarks.gpu.plan import Section
from benchmarks.gpu.report import Report, lines_of
from benchmarks.gpu.subjects import Subject, call_of, subjects
from benchmarks.gpu.timed import DeviceLost, Settings
from benchmarks.gpu.timing import HostStopwatch, Sample, in_turns, ratios, spread
from benchmarks.gpu.torchs import flex
from benchmarks.gpu.worker import run_cases

ROOT = benchmarks_here.ROOT
DIM, LENGTH = 16, 24


def settings(seconds: float = 60.0) -> Settings:
    return Settings(HostStopwatch(), time.monotonic() + seconds, "cpu", dry=True)


# -- cases -----------------------------------------------------------------------------------------

FORMS = {
    "plain": (forms.plain(DIM), 1),
    "grouped": (forms.plain(DIM, 4), 4),
    "causal": (forms.causal(DIM), 1),
    "window": (forms.windowed(DIM, 7), 1),
    "sinks": (forms.sinks(DIM, 4, 7), 4),
    "softcap": (forms.softcap(DIM, 2, 5.0), 2),
    "softcap window": (forms.softcap(DIM, 2, 5.0, 7), 2),
    "alibi": (forms.alibi(DIM), 1),
}


def case_of(name: str) -> Case:
    form, group = FORMS[name]
    shape = Shape(2, 4, 4 // group, LENGTH, LENGTH, DIM)
    return Case(name, form, shape, (), dtype=torch.float64)


@pytest.mark.parametrize("name", FORMS)
def test_all_of_a_form_say_the_same(name: str) -> None:
    case = case_of(name)
    inputs = Inputs.of(case, "cpu")
    given = (*inputs.qkv, *inputs.operands)
    exact = reference_attention(*inputs.qkv, inputs.operands, (), case.form.spec)
    assert torch.allclose(case.form.spelling(*given), exact, atol=1e-6)
    assert torch.allclose(flex(compiled=False)(case, inputs)(*given), exact, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_attended_share_is_that_of_the_mask(name: str) -> None:
    case = case_of(name)
    q = Inputs.of(case, "cpu").qkv[0]
    values = positions((case.form.spec.mask,), q, (2, 4, LENGTH, LENGTH))
    keep = torch.as_tensor(evaluate_dense(case.form.spec.mask, values, (), ()))
    share = float(keep.expand(LENGTH, LENGTH).double().mean()) if keep.dim() < 3 else None
    assert share == pytest.approx(case.form.attended(LENGTH, LENGTH))


def test_operations_are_counted() -> None:
    shape = Shape(2, 16, 16, 1024, 1024, 128)
    plain = Case("plain", forms.plain(128), shape, ())
    assert plain.flop == 4.0 * 2 * 16 * 1024 * 1024 * 128
    causal = replace(plain, form=forms.causal(128))
    assert causal.flop == pytest.approx(plain.flop * 1025 / 2048)
    assert replace(plain, training=True).flop == 3.5 * plain.flop


def test_every_section_has_cases_of_their_own_names() -> None:
    names = [section.name for section in plan.sections()]
    assert len(set(names)) == len(names)
    assert all(section.cases and section.seconds > 0 for section in plan.sections())
    dense = cases.dense()
    assert {case.shape.batch * case.shape.rows for case in dense} == {32 << 10}
    assert {case.shape.dim for case in dense} == {64, 128, 256}
    assert {case.shape.rows for case in dense} == {1 << n for n in range(10, 15)}
    assert all(case.tilings for case in dense)


def test_sections_are_chosen_by_name() -> None:
    assert [s.name for s in plan.chosen(["decode", "dense"])] == ["dense", "decode"]
    with pytest.raises(SystemExit, match="no section speed"):
        plan.chosen(["speed"])


def test_users_kernel_has_about_as_many_arguments_as_ours() -> None:
    pytest.importorskip("triton")
    from adaattn_compiler.kernels.triton.launch import loaded
    from adaattn_compiler.kernels.triton.source import Configuration, forward_source
    from benchmarks.gpu.bystander import copy_rows

    ours = loaded(forward_source(Configuration(forms.causal(64).spec))).fused_qk_softmax_av
    counts = [sum(not p.is_constexpr for p in kernel.params) for kernel in (ours, copy_rows)]
    assert abs(counts[0] - counts[1]) <= 10


# -- timing ----------------------------------------------------------------------------------------


class Scripted:
    """A stopwatch for calls that say how long they took."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def samples(self, calls: Sequence[Callable[[], Any]], waits: Sequence[float]) -> list[Sample]:
        found = []
        for call in calls:
            name, seconds = call()
            self.order.append(name)
            found.append(Sample(seconds, seconds / 10))
        return found

    def synchronize(self) -> None:
        pass


def taking(name: str, seconds: float) -> Callable[[], tuple[str, float]]:
    return lambda: (name, seconds)


def test_rounds_begin_with_each_in_turn() -> None:
    stopwatch = Scripted()
    calls = {name: taking(name, 1.0) for name in "abc"}
    turns = in_turns(calls, stopwatch, 0.0, most=3)
    assert "".join(stopwatch.order) == "aabbcc" + "abcbcacab"
    assert {name: len(found) for name, found in turns.samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_what_is_far_slower_leaves_after_the_least_rounds() -> None:
    calls = {"fast": taking("fast", 1.0), "slow": taking("slow", 50.0)}
    turns = in_turns(calls, Scripted(), 60.0, most=12)
    assert (len(turns.samples["fast"]), len(turns.samples["slow"])) == (12, 7)
    assert ratios(turns.samples["slow"], turns.samples["fast"])["median"] == 50.0


def test_time_ends_the_rounds() -> None:
    turns = in_turns({"a": lambda: time.sleep(0.01)}, HostStopwatch(), 0.05)
    assert 7 <= len(turns.samples["a"]) < 20


def test_what_fails_is_left_out_and_said() -> None:
    left = [3]

    def tiring() -> tuple[str, float]:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("tired")
        return "tiring", 1.0

    turns = in_turns({"a": taking("a", 1.0), "b": tiring}, Scripted(), 0.0, most=5)
    assert list(turns.samples) == ["a"]
    assert len(turns.samples["a"]) == 5
    assert str(turns.failures["b"]) == "tired"


class FakeCuda:
    """As much of torch.cuda as is asked for; its clock moves by what is enqueued."""

    def __init__(self) -> None:
        self.milliseconds, self.enqueued = 0.0, []
        self.allocated, self.highest = 100, 100

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.milliseconds)
        event.elapsed_time = lambda later: later.at - event.at
        return event

    def spend(self, what: str, milliseconds: float) -> None:
        self.enqueued.append(what)
        self.milliseconds += milliseconds

    def _sleep(self, cycles: int) -> None:
        self.spend("sleep", cycles / 2e6)

    def synchronize(self) -> None:
        self.enqueued.append("synchronize")

    def reset_peak_memory_stats(self) -> None:
        self.highest = self.allocated

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.highest


def test_events_hold_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    flush = SimpleNamespace(zero_=lambda: cuda.spend("flush", 7.0))
    fake = SimpleNamespace(cuda=cuda, int8=None, empty=lambda *_, **__: flush)
    monkeypatch.setattr(timing, "torch", fake)
    calls = [lambda: cuda.spend("call", 2.0), lambda: cuda.spend("call", 3.0)]
    samples = timing.CudaStopwatch().samples(calls, [1e-4, 1.0])
    assert [round(sample.device, 9) for sample in samples] == [2e-3, 3e-3]
    assert cuda.enqueued == ["flush", "sleep", "call", "flush", "sleep", "call", "synchronize"]
    assert cuda.milliseconds == pytest.approx(7 + 0.2 + 2 + 7 + 5.0 + 3)  # waits have bounds


def test_peak_is_beyond_inputs_and_result(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()

    def call() -> Any:
        cuda.highest = cuda.allocated + 70
        return SimpleNamespace(nbytes=30)

    monkeypatch.setattr(memory, "torch", SimpleNamespace(cuda=cuda))
    assert memory.peak(call, replace(settings(), dry=False)) == 40


def test_spread_is_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found == {
        "median": 3.0,
        "least": 1.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
        "greatest": 5.0,
    }
    assert spread([2.0])["upper_quartile"] == 2.0


# -- one case --------------------------------------------------------------------------------------


def named(case: Case, makers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(Subject(name, make) for name, make in makers.items())
    monkeypatch.setattr(timed, "subjects", lambda *_: found)
    monkeypatch.setattr(timed, "explained", lambda *_: [])


def right(case: Case, inputs: Inputs) -> Callable[..., Any]:
    return case.form.spelling


def wrong(case: Case, inputs: Inputs) -> Callable[..., Any]:
    return lambda q, k, v: v * float("nan")


def broken(case: Case, inputs: Inputs) -> Callable[..., Any]:
    raise ImportError("no such kernel")


def test_a_subject_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("causal")
    named(case, {"ours x": broken, "sdpa": right, "adaattn": wrong}, monkeypatch)
    found = timed.measure(case, settings())
    assert found["subjects"]["ours x"] == {"error": "ImportError: no such kernel"}
    assert found["subjects"]["sdpa"]["accurate"]
    assert found["subjects"]["adaattn"]["accurate"] is False
    assert found["subjects"]["adaattn"]["error_from_float64"] is None
    assert found["best_baseline"] == "sdpa"
    assert list(found["ratios"]) == ["adaattn"]
    json.dumps(found, allow_nan=False)


def test_what_compiles_is_shared_out_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def maker(name: str) -> Callable[..., Any]:
        def make(case: Case, inputs: Inputs) -> Callable[..., Any]:
            made.append(name)
            return case.form.spelling

        return make

    compiled = ["ours x", "ours y", "adaattn", "adaattn triton", "flex"]
    named(case_of("causal"), {name: maker(name) for name in [*compiled, "sdpa"]}, monkeypatch)
    for number in range(3):
        warming = replace(settings(), warm=True, part=(number, 3))
        assert timed.measure(case_of("causal"), warming)["subjects"].keys() <= set(compiled)
    assert sorted(made) == sorted(compiled)


def test_our_launches_are_not_seen_by_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is takes the host a millisecond: a backward pass would not be hidden."""
    pytest.importorskip("triton")
    from torch._library.triton import is_wrap_triton_enabled

    from adaattn_compiler.kernels.triton import launch, launch_backward

    seen: list[bool] = []

    def forward(made_for: Any, q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(is_wrap_triton_enabled())
        return q.clone()

    def backward(made_for: Any, grad: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
        seen.append(is_wrap_triton_enabled())
        return [grad, grad, grad]

    monkeypatch.setattr(launch, "forward", forward)
    monkeypatch.setattr(launch_backward, "backward", backward)
    case = replace(case_of("causal"), training=True)
    inputs = Inputs.of(case, "cpu")
    call_of(case, our_backward(Tiling(16, 16, 4, 2))(case, inputs), inputs)()
    our_forward(Tiling(16, 16, 4, 2))(case, inputs)(*inputs.qkv)
    assert seen == [False, False, False]
    assert is_wrap_triton_enabled()


def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = case_of("causal")
    named(case, {"sdpa": right, "ours x": broken, "flex": right}, monkeypatch)
    monkeypatch.setattr(timed, "is_lost", lambda: True)
    with pytest.raises(DeviceLost) as caught:
        timed.measure(case, settings())
    assert list(caught.value.found["subjects"]) == ["sdpa", "ours x"]


def test_nothing_begins_after_its_time(tmp_path: Path) -> None:
    section = Section("s", "", 1, {"a": lambda _: {}})
    file = tmp_path / "events"
    assert run_cases(section, ["a"], settings(-1.0), file) == 0
    assert json.loads(file.read_text()) == {"case": "a", "found": {"skipped": "out of time"}}
    found = timed.measure(case_of("causal"), settings(-1.0))
    assert found["subjects"] == {}


def test_a_case_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def fails(_: Settings) -> dict[str, Any]:
        raise ValueError("not today")

    section = Section("s", "", 1, {"a": fails, "b": lambda _: {"fine": 1}})
    file = tmp_path / "events"
    assert run_cases(section, ["a", "b"], settings(), file) == 0
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert [event.get("begun", event.get("case")) for event in events] == ["a", "a", "b", "b"]
    assert events[1]["found"]["error"] == "ValueError: not today"
    assert events[3]["found"]["fine"] == 1


def test_stand_ins_run_every_subject() -> None:
    (case,) = cases.window()
    found = timed.measure(case, settings())
    names = {subject.name for subject in subjects(case.tiny(), dry=True)}
    assert set(found["subjects"]) == names
    assert found["best_kernel"] == f"ours {case.tilings[0]}"
    assert found["explained"][0]["lowered"]
    assert found["subjects"]["flex"]["accurate"]


def test_training_compares_gradients() -> None:
    form, _ = FORMS["causal"]
    shape = Shape(2, 4, 4, LENGTH, LENGTH, DIM)
    case = Case("t", form, shape, ("sdpa",), (Tiling(16, 16, 4, 2),), training=True)
    found = timed.measure(case, settings())
    assert found["subjects"]["sdpa"]["accurate"]
    assert found["subjects"]["ours 16x16 w4 s2"]["accurate"]


# -- sections in processes -------------------------------------------------------------------------


def test_budget_is_a_share_of_what_is_left() -> None:
    following = (Section("b", "", 30, {}), Section("c", "", 60, {}))
    assert plan.budget(10, following, 200) == pytest.approx(20)
    assert plan.budget(30, following[1:], 45) == pytest.approx(15)
    assert plan.budget(60, (), 7) == 7
    assert plan.budget(60, (), -1) == 0


WORKER = """
import json, os, sys, time
word = json.loads(sys.stdin.readline())
def tell(**event):
    with open(sys.argv[1], "a") as out:
        out.write(json.dumps(event) + chr(10))
for name in word["cases"]:
    if name == "lost":
        tell(case=name, found={"error": "lost"})
        sys.exit(3)
    tell(begun=name)
    if name == "dies":
        print("last words")
        os._exit(9)
    if name == "hangs":
        time.sleep(60)
    tell(case=name, found={"subjects": {}})
"""


@pytest.fixture
def conducted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Sections of such cases, run by processes that do as their cases are named."""

    def started(arguments: list[str], folder: Path, log: Path, _: Path) -> subprocess.Popen[str]:
        with log.open("w") as out:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "import sys" if "mute" in arguments[1] else WORKER,
                    *arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def conduct(seconds: float = 30.0, **sections: list[str]) -> dict[str, Any]:
        made = tuple(
            Section(name, name, 10, {case: lambda _: {} for case in names})
            for name, names in sections.items()
        )
        report = Report(tmp_path / "found.json", head())
        supervisor.conduct(supervisor.Run(made, seconds), report, lambda *_: None)
        written = json.loads((tmp_path / "found.json").read_text())
        assert written == report.found
        return dict(written["sections"])

    monkeypatch.setattr(supervisor, "started", started)
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    monkeypatch.setattr(supervisor, "LEAST", 0.2)
    return conduct


def head() -> dict[str, Any]:
    return {
        "device": {"name": "a device", "nvidia-smi": {"driver_version": "1.2"}},
        "versions": {"torch": "2.11.0"},
        "revision": "abc",
        "sources": "123",
        "dry_run": False,
    }


def test_a_process_that_dies_costs_its_case(conducted: Callable[..., dict[str, Any]]) -> None:
    found = conducted(first=["a", "dies", "b"], second=["c"])
    assert list(found["first"]["cases"]) == ["a", "dies", "b"]
    assert "last words" in found["first"]["cases"]["dies"]["error"]
    assert found["first"]["cases"]["b"] == {"subjects": {}}
    assert found["first"]["status"] == "incomplete"
    assert found["second"]["status"] == "done"


def test_a_lost_device_costs_its_case(conducted: Callable[..., dict[str, Any]]) -> None:
    found = conducted(first=["lost", "a"])
    assert found["first"]["cases"] == {"lost": {"error": "lost"}, "a": {"subjects": {}}}


def test_a_case_that_hangs_costs_its_section(conducted: Callable[..., dict[str, Any]]) -> None:
    begin = time.monotonic()
    found = conducted(4.0, first=["a", "hangs", "b"], second=["c"])
    assert time.monotonic() - begin < 20
    assert found["first"]["cases"]["a"] == {"subjects": {}}
    assert "out of time" in found["first"]["cases"]["hangs"]["error"]
    assert found["first"]["cases"]["b"] == {"skipped": "out of time"}
    assert found["second"]["cases"]["c"] == {"subjects": {}}


def test_a_process_that_does_nothing_costs_its_section(
    conducted: Callable[..., dict[str, Any]],
) -> None:
    found = conducted(mute=["a", "b"], second=["c"])
    assert found["mute"]["status"] == "incomplete"
    assert "its process ended" in found["mute"]["error"]
    assert found["second"]["status"] == "done"


# -- the report ------------------------------------------------------------------------------------


def test_tables_say_what_was_found_and_what_was_not(tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json", head())
    figures = {"device_ms": spread([1.0, 2.0]), "tflops": 500.0, "accurate": True}
    case = {
        "subjects": {
            "ours": figures,
            "adaattn": {**figures, "accurate": False},
            "flex": {"error": "no"},
            "sdpa cudnn": {"unavailable": "not here"},
        },
        "best_baseline": "sdpa",
        "best_kernel": "ours",
        "ratios": {"adaattn": spread([0.80, 0.84])},
    }
    report.section("dense", "what")["cases"] = {"causal": case, "plain": {"skipped": "out of time"}}
    report.section("decode", "what")
    report.write()
    for markdown in (False, True):
        text = "\n".join(lines_of(json.loads(report.path.read_text()), markdown))
        assert "1.5000 ms" in text
        assert "500 TFLOPS" in text
        assert "0.82x (0.81-0.83)" in text
        assert "best kernel" in text
        assert "unavailable: not here" in text
        assert "skipped: out of time" in text
        assert "below it dense/causal 0.82x (of 1 cases)" in text
        assert "less accurate than eager: dense/causal adaattn" in text
        assert "errors: dense/causal flex" in text
        assert "sections not done: dense, decode" in text


def test_growth_of_memory_is_a_power_of_the_length() -> None:
    found = [
        {"length": n, "subjects": {"a": {"bytes": 4 * n}, "b": {"bytes": n * n}, "c": {}}}
        for n in (1024, 8192)
    ]
    assert memory.exponents(found) == {"a": pytest.approx(1.0), "b": pytest.approx(2.0)}


def test_result_is_named_by_device_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(device, "version", lambda _: "3.6.0")
    assert device.result_name() == f"h200_torch{torch.__version__.split('+')[0]}_triton3.6.0"


def test_sources_have_one_name_wherever_they_lie(tmp_path: Path) -> None:
    for root, folder in (("a", "kernels"), ("b", "adaattn_compiler/kernels")):
        (tmp_path / root / folder).mkdir(parents=True)
        (tmp_path / root / folder / "x.py").write_text("1")
    assert device.sources(tmp_path / "a") == device.sources(tmp_path / "b")
    (tmp_path / "b/adaattn_compiler/kernels/x.py").write_text("2")
    assert device.sources(tmp_path / "a") != device.sources(tmp_path / "b")


# -- the command -----------------------------------------------------------------------------------


def test_sections_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--list"])
    listed = capsys.readouterr().out
    assert all(section.name in listed for section in plan.sections())


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        command.main(["--only", "dense"])


@pytest.mark.slow
def test_dry_run_writes_its_file(tmp_path: Path) -> None:
    file = tmp_path / "dry.json"
    arguments = ["--dry-run", "--only", "ceilings", "overhead", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments, "--jobs", "1", "--seconds", "240"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["schema"] == 1
    assert found["dry_run"]
    assert {name: s["status"] for name, s in found["sections"].items()} == {
        "ceilings": "done",
        "overhead": "done",
    }
    assert f"written: {file}" in done.stdout
    command.main(["--show", str(file)])

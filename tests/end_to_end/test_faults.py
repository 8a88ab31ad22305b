"""What goes wrong: ours falls back to Inductor's own graph, says so once, and is never wrong."""

from __future__ import annotations

import copy
import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import adaattn_compiler.backend as backend
from adaattn_compiler import adaattn, explain
from adaattn_compiler.passes import deadline, pipeline

STAGES = ("expand", "canonicalize", "match", "check_uses", "validate", "lower")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    above = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(above, float("-inf"))
    return scores.softmax(-1) @ v


def inputs(length: int = 16) -> list[torch.Tensor]:
    return [torch.randn(2, 4, length, 8) for _ in range(3)]


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Inductor's place is taken by running the graph; the graphs that it got, and its settings."""
    given: list[Any] = []

    def run(graph_module: Any, inputs: Any, mode: Any, options: Any) -> Callable[..., Any]:
        given.append(graph_module)
        forward: Callable[..., Any] = graph_module.forward
        return forward

    monkeypatch.setattr(backend, "_inductor", run)
    return given


def _calls_sdpa(graph_module: torch.fx.GraphModule) -> bool:
    return any("scaled_dot_product" in str(node.target) for node in graph_module.graph.nodes)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# -- our own faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_failing_pass_leaves_the_graph_to_inductor(
    stage: str,
    without_inductor: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(pipeline, stage, fails)
    tensors = inputs()
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        compiled = torch.compile(attention, backend="adaattn")
        for _ in range(3):
            torch.testing.assert_close(compiled(*tensors), attention(*tensors))
    assert not _calls_sdpa(without_inductor[0])
    (message,) = _said(caplog)
    assert "a fault of ours" in message


def test_analysis_out_of_time_leaves_the_graph_to_inductor(
    without_inductor: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    tensors = inputs()
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        compiled = torch.compile(attention, backend="adaattn", options={"analysis_seconds": 1e-9})
        for _ in range(3):
            torch.testing.assert_close(compiled(*tensors), attention(*tensors))
    assert not _calls_sdpa(without_inductor[0])
    (message,) = _said(caplog)
    assert message == (
        "the graph goes to Inductor as it is: analysis took longer than 1e-09 s (option "
        "analysis_seconds); raise analysis_seconds to go on for longer"
    )


@pytest.mark.parametrize("stage", ["canonicalize", "match", "validate", "prove_masks"])
def test_every_long_stage_watches_the_time(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = getattr(pipeline, stage)

    def late(*args: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(deadline.time, "monotonic", lambda: float("inf"))
            return whole(*args)

    monkeypatch.setattr(pipeline, stage, late)
    explanation = explain(attention, *inputs())
    assert explanation.sites == ()
    assert "analysis took longer than 120 s" in explanation.notes[0]


def test_explain_tells_of_a_failing_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(pipeline, "match", fails)
    explanation = explain(attention, *inputs())
    assert explanation.sites == ()
    assert "a fault of ours" in explanation.notes[0]
    assert "a fault of ours" in str(explanation)


def test_inductor_failing_on_our_graph_gets_the_original(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[Any] = []

    def fails_on_ours(graph_module: Any, inputs: Any, mode: Any, options: Any) -> Any:
        given.append(graph_module)
        if _calls_sdpa(graph_module):
            raise RuntimeError("not this graph")
        return graph_module.forward

    monkeypatch.setattr(backend, "_inductor", fails_on_ours)
    tensors = inputs()
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        ours = torch.compile(attention, backend="adaattn")(*tensors)
    torch.testing.assert_close(ours, attention(*tensors))
    assert [_calls_sdpa(graph_module) for graph_module in given] == [True, False]
    (message,) = _said(caplog)
    assert "not this graph" in message


def test_inductor_failing_on_the_original_too_is_its_own_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(backend, "_inductor", fails)
    with pytest.raises(RuntimeError, match="not on this machine"):
        torch.compile(attention, backend="adaattn")(*inputs())


@torch.library.custom_op("adaattn_test::negated", mutates_args=())
def negated(x: torch.Tensor) -> torch.Tensor:
    return -x


@negated.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_unknown_op_inside_an_attention_refuses_it(without_inductor: list[Any]) -> None:
    def with_unknown(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return negated((q @ k.transpose(-1, -2)).softmax(-1)) @ v

    tensors = inputs()
    ours = torch.compile(with_unknown, backend="adaattn")(*tensors)
    torch.testing.assert_close(ours, with_unknown(*tensors))
    (site,) = explain(with_unknown, *tensors).sites
    assert not site.lowered
    assert site.reason is not None
    assert "negated" in site.reason


def test_unknown_op_beside_an_attention_does_no_harm(without_inductor: list[Any]) -> None:
    def beside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return negated(attention(negated(q), k, v))

    tensors = inputs()
    ours = torch.compile(beside, backend="adaattn")(*tensors)
    torch.testing.assert_close(ours, beside(*tensors))
    assert _calls_sdpa(without_inductor[0])


# -- Inductor's own fusion -------------------------------------------------------------------------


def test_inductor_does_not_fuse_a_softmax_over_queries() -> None:
    """torch 2.11 and 2.13 take this for attention, by an error of theirs."""

    def over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 0.125).softmax(-2) @ v

    tensors = inputs()
    with torch.no_grad():
        ours = torch.compile(over_queries, backend="adaattn")(*tensors)
    torch.testing.assert_close(ours, over_queries(*tensors))


# -- settings --------------------------------------------------------------------------------------


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    patches: list[Any] = []

    def record(graph_module: Any, inputs: Any, config_patches: Any = None, **rest: Any) -> Any:
        patches.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(inductor, "compile_fx", record)
    tensors = inputs()
    torch.compile(attention, backend="adaattn", mode="max-autotune-no-cudagraphs")(*tensors)
    assert patches[-1]["max_autotune"]
    torch.compiler.reset()
    torch.compile(
        attention, backend="adaattn", options={"epilogue_fusion": False, "validate": False}
    )(*tensors)
    assert patches[-1]["epilogue_fusion"] is False
    assert "validate" not in patches[-1]

    def backend_with_both(graph_module: Any, inputs: Any) -> Any:
        return adaattn(
            graph_module,
            inputs,
            mode="max-autotune-no-cudagraphs",
            options={"epilogue_fusion": False},
        )

    torch.compiler.reset()
    torch.compile(attention, backend=backend_with_both)(*tensors)
    assert patches[-1]["max_autotune"]
    assert patches[-1]["epilogue_fusion"] is False


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"options": {"max_autotune": "yes"}}, "max_autotune"),
        ({"mode": "foo"}, "foo"),
        ({"options": {"enabled": False, "max_autotune": "yes"}}, "max_autotune"),
    ],
)
def test_bad_setting_of_inductors_is_not_blamed_on_our_graph(
    settings: dict[str, Any],
    named: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.WARNING, "adaattn_compiler"),
        pytest.raises(Exception, match=named),
    ):
        torch.compile(attention, backend="adaattn", **settings)(*inputs())
    assert not _said(caplog)


def test_graphs_are_written_before_and_after(tmp_path: Path, without_inductor: list[Any]) -> None:
    folder = tmp_path / "not" / "there yet"
    compiled = torch.compile(attention, backend="adaattn", options={"dump_dir": folder})
    compiled(*inputs())
    torch.compiler.reset()
    compiled(*inputs(24))
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"graph_{i}_{when}.txt" for i in (0, 1) for when in ("after", "before")]
    assert "softmax" in (folder / "graph_0_before.txt").read_text()
    after = (folder / "graph_0_after.txt").read_text()
    assert after.splitlines()[1].startswith("# (root)  softmax   causal ")
    assert "scaled_dot_product_attention" in after


def test_graph_that_cannot_be_annotated_is_written_all_the_same(
    tmp_path: Path, without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, **settings: Any) -> str:
        if settings == {"print_output": False}:  # Dynamo prints graphs too, otherwise
            raise RuntimeError("no annotation for this")
        return ""

    monkeypatch.setattr(torch.fx.GraphModule, "print_readable", fails)
    torch.compile(attention, backend="adaattn", options={"dump_dir": tmp_path})(*inputs())
    assert "softmax" in (tmp_path / "graph_0_before.txt").read_text()


def test_folder_that_cannot_be_written_is_said_and_does_no_harm(
    tmp_path: Path, without_inductor: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    options = {"dump_dir": blocker / "dumps", "cache_dir": blocker / "cache"}
    tensors = inputs()
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        ours = torch.compile(attention, backend="adaattn", options=options)(*tensors)
    torch.testing.assert_close(ours, attention(*tensors))
    assert _calls_sdpa(without_inductor[0])
    assert any("dumps" in message for message in _said(caplog))


def test_full_disk_does_no_harm(
    tmp_path: Path, without_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_text", "write_bytes", "mkdir"):
        monkeypatch.setattr(Path, name, full)
    monkeypatch.setattr(os, "replace", full)
    tensors = inputs()
    options = {"dump_dir": tmp_path / "dumps"}
    ours = torch.compile(attention, backend="adaattn", options=options)(*tensors)
    torch.testing.assert_close(ours, attention(*tensors))
    assert _calls_sdpa(without_inductor[0])


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


_SCRIPT = """
import torch
def attention(q, k, v):
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
with torch.no_grad():
    ours = torch.compile(attention, backend="adaattn")(q, k, v)
    torch.testing.assert_close(ours, attention(q, k, v))
"""


def test_decisions_are_logged_where_the_environment_asks() -> None:
    done = _python(_SCRIPT, TORCH_LOGS="+adaattn_compiler")
    assert done.returncode == 0, done.stderr
    assert "softmax, mask none -> " in done.stderr
    assert "pass match" in done.stderr


# -- several at once -------------------------------------------------------------------------------


def test_two_threads_compile_at_once() -> None:
    results: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []
    tensors = {scale: inputs(16 + scale) for scale in (1, 2)}
    start = threading.Barrier(2)

    def work(scale: int) -> None:
        def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.transpose(-1, -2) * (0.1 * scale)).softmax(-1) @ v

        try:
            start.wait()
            with torch.no_grad():
                results[scale] = torch.compile(scaled, backend="adaattn")(*tensors[scale])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for scale, (q, k, v) in tensors.items():
        wanted = (q @ k.transpose(-1, -2) * (0.1 * scale)).softmax(-1) @ v
        torch.testing.assert_close(results[scale], wanted)


@pytest.mark.slow
def test_two_processes_share_a_cache_folder(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "ADAATTN_CACHE_DIR": str(tmp_path / "ours"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductors"),
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", _SCRIPT], env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()


# -- masks that change -----------------------------------------------------------------------------


class WithMask(torch.nn.Module):
    """Attention whose causal mask is a buffer."""

    mask: torch.Tensor

    def __init__(self, length: int = 32) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(length, length).tril())

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length = q.shape[-2]
        scores = q @ k.transpose(-1, -2) * 0.3
        scores = scores.masked_fill(self.mask[:length, :length] == 0, float("-inf"))
        return scores.softmax(-1) @ v


def _filled(model: WithMask) -> None:
    model.mask.fill_(1)


def _replaced(model: WithMask) -> None:
    model.mask = torch.ones_like(model.mask)


def _replaced_twice(model: WithMask) -> None:
    size = len(model.mask)
    for _ in range(8):  # until a new tensor takes an old one's place in memory
        del model.mask
        model.register_buffer("mask", torch.ones(size, size))


def _loaded(model: WithMask) -> None:
    model.load_state_dict({"mask": torch.ones_like(model.mask).triu()})


def _one_element(model: WithMask) -> None:
    model.mask[0, 1] = 1


def _under_no_grad(model: WithMask) -> None:
    with torch.no_grad():
        model.mask.mul_(0).add_(1)


CHANGES = (_filled, _replaced, _replaced_twice, _loaded, _one_element, _under_no_grad)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_changed_mask_is_heeded(
    change: Callable[[WithMask], None],
    grad: bool,
    without_inductor: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tensors = WithMask(), inputs()
    compiled = torch.compile(model, backend="adaattn")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(*tensors), model(*tensors))
        assert _calls_sdpa(without_inductor[0])
        change(model)
        with caplog.at_level(logging.WARNING, "adaattn_compiler"):
            for _ in range(3):
                torch.testing.assert_close(compiled(*tensors), model(*tensors))
    assert len(_said(caplog)) <= 1


def test_mask_changed_back_is_ours_again(without_inductor: list[Any]) -> None:
    model, tensors = WithMask(), inputs()
    compiled = torch.compile(model, backend="adaattn")
    before = compiled(*tensors)
    original = copy.deepcopy(model.state_dict())
    model.mask.fill_(1)
    torch.testing.assert_close(compiled(*tensors), model(*tensors))
    model.load_state_dict(original)
    assert torch.equal(compiled(*tensors), before)


def test_equal_values_loaded_change_nothing(
    without_inductor: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tensors = WithMask(), inputs()
    compiled = torch.compile(model, backend="adaattn")
    before = compiled(*tensors)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        assert torch.equal(compiled(*tensors), before)
    assert len(without_inductor) == 1
    assert not _said(caplog)


def test_changed_mask_with_inductor_at_several_lengths() -> None:
    model, tensors = WithMask(), inputs()
    compiled = torch.compile(model, backend="adaattn")
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), model(*tensors))
        model.mask.fill_(1)
        for length in (12, 24, 31):
            tensors = inputs(length)
            torch.testing.assert_close(compiled(*tensors), model(*tensors))


def test_mask_changed_inside_the_model(without_inductor: list[Any]) -> None:
    class Opening(WithMask):
        """Lets everything be seen from its second call on."""

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = super().forward(q, k, v)
            self.mask.fill_(1)
            return out

    model, twin, tensors = Opening(), Opening(), inputs()
    compiled = torch.compile(model, backend="adaattn")
    for _ in range(3):
        torch.testing.assert_close(compiled(*tensors), twin(*tensors))


# -- uses of a compiled model ----------------------------------------------------------------------


def test_model_compiled_twice_and_copied(without_inductor: list[Any]) -> None:
    model, tensors = WithMask(), inputs()
    wanted = model(*tensors)
    compiled = torch.compile(model, backend="adaattn")
    torch.testing.assert_close(compiled(*tensors), wanted)
    torch.testing.assert_close(torch.compile(compiled, backend="adaattn")(*tensors), wanted)
    torch.testing.assert_close(copy.deepcopy(compiled)(*tensors), wanted)
    q, k, v = tensors
    torch.testing.assert_close(compiled(q=q, v=v, k=k), wanted)


def test_two_models_of_one_class_keep_their_own_masks(without_inductor: list[Any]) -> None:
    causal, open_ = WithMask(), WithMask()
    open_.mask.fill_(1)
    tensors = inputs()
    for model in (causal, open_):
        compiled = torch.compile(model, backend="adaattn")
        torch.testing.assert_close(compiled(*tensors), model(*tensors))


def test_input_changed_in_place_after_use(without_inductor: list[Any]) -> None:
    def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k.mul_(0.5)
        out = F.scaled_dot_product_attention(q, k, v)
        v.add_(1)
        return out

    tensors = inputs()
    ours, eagers = [x.clone() for x in tensors], [x.clone() for x in tensors]
    torch.testing.assert_close(torch.compile(in_place, backend="adaattn")(*ours), in_place(*eagers))
    for mine, eager in zip(ours, eagers, strict=True):
        torch.testing.assert_close(mine, eager)

"""Options: ours are checked, Inductor's pass through, the environment sets defaults."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import POLICY

from adaattn_compiler import Options
from adaattn_compiler.options import parse_options

_SWITCHES = ("enabled", "validate", "measure")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def _inputs() -> list[torch.Tensor]:
    return [torch.randn(1, 2, 8, 4) for _ in range(3)]


def test_nothing_given_yields_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAATTN_CACHE_DIR")
    ours, inductors = parse_options(None)
    assert ours == Options()
    assert inductors == {}
    assert ours.enabled
    assert ours.validate


def test_default_cache_folder_is_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAATTN_CACHE_DIR")
    ours, _ = parse_options({})
    assert ours.cache_dir.expanduser().is_absolute()


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().enabled = False  # type: ignore[misc]


def test_given_values_reach_their_fields(tmp_path: Path) -> None:
    ours, inductors = parse_options(
        {
            "validate": False,
            "kernels": ["sdpa"],
            "cache_dir": str(tmp_path / "cache"),
            "dump_dir": tmp_path,
            "max_autotune": True,
            "epilogue-fusion": False,
        }
    )
    assert not ours.validate
    assert ours.kernels == ("sdpa",)
    assert ours.cache_dir == tmp_path / "cache"
    assert ours.dump_dir == tmp_path
    assert inductors == {"max_autotune": True, "epilogue-fusion": False}


def test_paths_may_name_the_home() -> None:
    ours, _ = parse_options({"cache_dir": "~/somewhere", "dump_dir": "~/dumps"})
    assert ours.cache_dir == Path.home() / "somewhere"
    assert ours.dump_dir == Path.home() / "dumps"


def test_unknown_option_is_named_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown option 'validat'") as caught:
        parse_options({"validat": True})
    for name in Options.names():
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("validat", "validate"), ("kernel", "kernels"), ("max_autotun", "max_autotune")],
)
def test_unknown_option_comes_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"'{wrong}' \(did you mean '{right}'\?\)"):
        parse_options({wrong: True})


def test_unknown_option_far_from_all_comes_with_no_guess() -> None:
    with pytest.raises(ValueError, match="unknown option 'xyzzy': AdaAttn's are"):
        parse_options({"xyzzy": True})


@pytest.mark.parametrize("key", [3, None, ("validate",)])
def test_name_of_another_type_is_refused(key: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"option {key!r}: ") + ".*must be a string"):
        parse_options({key: True})


@pytest.mark.parametrize("name", _SWITCHES)
@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_switch_takes_only_booleans(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"option {name}={value!r}: .*True or False"):
        parse_options({name: value})


@pytest.mark.parametrize("value", [["sdpa", "flax"], "flax", ("flax",), "sdpa,flax"])
def test_unknown_kernel_is_named_with_the_known_ones(value: Any) -> None:
    wanted = "unknown kernel 'flax', known are sdpa, strips, flex"
    with pytest.raises(ValueError, match=wanted):
        parse_options({"kernels": value})


@pytest.mark.parametrize("value", [["sdpa", "strips"], "sdpa,strips", "sdpa, strips,"])
def test_kernels_may_be_one_text(value: Any) -> None:
    assert parse_options({"kernels": value})[0].kernels == ("sdpa", "strips")


@pytest.mark.parametrize("value", [3, None, [3], {"sdpa": 1}.items()])
def test_kernels_of_another_type_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="option kernels="):
        parse_options({"kernels": value})


@pytest.mark.parametrize("value", [[], "", " , "])
def test_no_kernels_at_all_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="option kernels="):
        parse_options({"kernels": value})


@pytest.mark.parametrize("name", ["cache_dir", "dump_dir"])
@pytest.mark.parametrize("value", [3, True, ["a"], b"folder"])
def test_path_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"option {name}=.*must be a path"):
        parse_options({name: value})


def test_only_the_dump_folder_may_be_none() -> None:
    assert parse_options({"dump_dir": None})[0].dump_dir is None
    with pytest.raises(ValueError, match="cache_dir=None"):
        parse_options({"cache_dir": None})


# -- the environment -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _SWITCHES)
@pytest.mark.parametrize(
    ("text", "value"), [("0", False), ("1", True), ("false", False), ("True", True)]
)
def test_environment_sets_a_switch(
    name: str, text: str, value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ADAATTN_{name.upper()}", text)
    assert getattr(parse_options(None)[0], name) is value


def test_environment_sets_kernels_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAATTN_KERNELS", "sdpa, flex")
    monkeypatch.setenv("ADAATTN_CACHE_DIR", str(tmp_path / "c"))
    monkeypatch.setenv("ADAATTN_DUMP_DIR", str(tmp_path / "d"))
    ours, _ = parse_options(None)
    assert ours.kernels == ("sdpa", "flex")
    assert (ours.cache_dir, ours.dump_dir) == (tmp_path / "c", tmp_path / "d")


def test_an_empty_dump_folder_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_DUMP_DIR", "")
    assert parse_options(None)[0].dump_dir is None


def test_given_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_VALIDATE", "0")
    assert parse_options({"validate": True})[0].validate


def test_bad_value_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_MEASURE", "maybe")
    with pytest.raises(ValueError, match="ADAATTN_MEASURE='maybe'"):
        parse_options(None)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("ADAATTN_ENABLED", "no", "it must be 1 or true, 0 or false"),
        ("ADAATTN_ANALYSIS_SECONDS", "abc", "it must be a number of seconds above 0"),
        ("ADAATTN_ANALYSIS_SECONDS", "-1", "it must be a number of seconds above 0"),
    ],
)
def test_bad_value_in_the_environment_says_what_is_valid(
    variable: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{variable}='{text}' in the environment: .*{message}"):
        parse_options(None)


def test_unknown_variable_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ADAATTN_KERNAL", "sdpa")
    monkeypatch.setenv("ADAATTN_BENCH_ANYTHING", "1")
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        for _ in range(3):
            assert parse_options(None)[0].kernels == Options().kernels
    (message,) = (record.getMessage() for record in caplog.records)
    assert "ADAATTN_KERNAL " in message
    assert "did you mean 'ADAATTN_KERNELS'?" in message
    for name in Options.names():
        assert f"ADAATTN_{name.upper()}" in message


def test_bad_kernel_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_KERNELS", "flax")
    with pytest.raises(ValueError, match="ADAATTN_KERNELS='flax' in the environment"):
        parse_options(None)


# -- through torch.compile -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validat": True}, "unknown option 'validat'"),
        ({"validate": "yes"}, "option validate='yes'"),
        ({"kernels": ["flax"]}, "flax"),
    ],
)
def test_bad_options_fail_the_first_call(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(_attention, backend="adaattn", options=options)
    with pytest.raises(Exception, match=message) as caught:
        compiled(*_inputs())
    chain: list[BaseException] = [caught.value]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    inner = [getattr(error, "inner_exception", error) for error in chain]
    assert any(isinstance(error, ValueError) for error in inner)


def test_disabled_backend_hands_over_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    import adaattn_compiler.backend as backend

    def never(*args: Any) -> Any:
        raise AssertionError("the passes ran")

    given: list[Any] = []

    def inductor(graph_module: Any, inputs: Any, mode: Any, options: Any) -> Any:
        given.append((mode, options))
        return graph_module.forward

    monkeypatch.setattr(backend, "rewrite", never)
    monkeypatch.setattr(backend, "_inductor", inductor)
    compiled = torch.compile(
        _attention, backend="adaattn", options={"enabled": False, "max_autotune": True}
    )
    inputs = _inputs()
    torch.testing.assert_close(compiled(*inputs), _attention(*inputs))
    assert given == [(None, {"max_autotune": True})]


@pytest.mark.parametrize("value", [0, -1.5, True, "soon", None, float("nan")])
def test_time_for_the_analysis_must_be_positive_seconds(value: Any) -> None:
    with pytest.raises(ValueError, match=r"option analysis_seconds=.*seconds above 0"):
        parse_options({"analysis_seconds": value})


def test_time_for_the_analysis_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parse_options({"analysis_seconds": 5})[0].analysis_seconds == 5.0
    monkeypatch.setenv("ADAATTN_ANALYSIS_SECONDS", "2.5")
    assert parse_options(None)[0].analysis_seconds == 2.5
    monkeypatch.setenv("ADAATTN_ANALYSIS_SECONDS", "long")
    with pytest.raises(ValueError, match="ADAATTN_ANALYSIS_SECONDS='long' in the environment"):
        parse_options(None)


def test_the_file_of_a_policy_is_read_once_for_the_graphs_of_one_compilation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "policy.json"
    other = POLICY.without("layers.1.self_attn")
    options, alike = {"policy": str(path)}, {"policy": str(path)}
    POLICY.save(path)
    assert parse_options(options)[0].policy == POLICY
    assert parse_options(options)[0].policy == POLICY
    assert not caplog.records
    other.save(path)
    assert parse_options(options)[0].policy == POLICY
    assert f"go by what it was (policy {POLICY.key()})" in caplog.text
    assert parse_options(alike)[0].policy == other  # another call of torch.compile
    path.write_text("{")
    assert parse_options(options)[0].policy == POLICY
    with pytest.raises(ValueError, match="policy"):
        parse_options({"policy": path})


def test_the_file_of_a_policy_in_the_environment_is_read_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "policy.json"
    other = POLICY.without("layers.1.self_attn")
    options: dict[str, Any] = {"measure": False}
    monkeypatch.setenv("ADAATTN_POLICY", str(path))
    POLICY.save(path)
    assert parse_options(None)[0].policy == POLICY
    assert parse_options(options)[0].policy == POLICY
    assert not caplog.records
    other.save(path)
    assert parse_options(None)[0].policy == POLICY
    assert f"go by what it was (policy {POLICY.key()})" in caplog.text
    assert parse_options(options)[0].policy == POLICY
    assert parse_options(dict(options))[0].policy == other  # another call of torch.compile
    path.write_text("{")
    assert parse_options(options)[0].policy == POLICY
    with pytest.raises(ValueError, match=r"ADAATTN_POLICY='.*policy\.json' in the environment: "):
        parse_options(dict(options))


def test_a_model_is_of_one_policy_though_its_file_in_the_environment_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "policy.json", []

    def backend(graph_module: Any, inputs: Any, *, options: Any = None) -> Any:
        seen.append(parse_options(options)[0].policy)
        POLICY.without("layers.1.self_attn").save(path)  # between the graphs of one model
        return graph_module.forward

    POLICY.save(path)
    monkeypatch.setenv("ADAATTN_POLICY", str(path))
    torch.compiler.reset()
    compiled = torch.compile(_attention, backend=backend, dynamic=False)
    for length in (8, 9):
        compiled(*(torch.randn(1, 2, length, 4) for _ in range(3)))
    assert seen == [POLICY, POLICY]


def test_torch_hands_the_same_options_over_with_each_graph() -> None:
    # What the last test relies on.
    seen: list[Any] = []

    def backend(graph_module: Any, inputs: Any, *, options: Any) -> Any:
        seen.append(options)
        return graph_module.forward

    given = {"policy": "policy.json"}
    torch.compiler.reset()
    compiled = torch.compile(_attention, backend=backend, options=given, dynamic=False)
    for length in (8, 9):
        compiled(*(torch.randn(1, 2, length, 4) for _ in range(3)))
    assert len(seen) == 2
    assert seen[0] is seen[1]

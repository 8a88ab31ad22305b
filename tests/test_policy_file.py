"""Policy files: written whole or not at all; what is no policy is refused, and where."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from policies import POLICY

from adaattn_compiler.decision import EXACT, HeadDecision, Pattern
from adaattn_compiler.policy import Policy, PolicyError

_TEXT = POLICY.to_json()


def _refusal(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        Policy.from_json(text)
    return str(caught.value)


def _edited(edit: Callable[[Any], Any]) -> str:
    value = json.loads(_TEXT)
    edit(value)
    return json.dumps(value)


def test_example_of_the_documentation_is_a_policy() -> None:
    page = Path(__file__).parents[1] / "docs" / "policy.md"
    example = page.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    assert Policy.from_json(example).to_json() == example


def test_statistics_are_kept_and_files_without_them_are_read() -> None:
    statistics = {"entropy": (0.5, 1 / 3, 0.0, -1e-9, 7.0, 2.0), "q_max": (1.0,) * 6}
    bare = POLICY.sites[0]
    site = dataclasses.replace(bare, statistics=statistics)
    policy = POLICY.with_site(site)
    read = Policy.from_json(policy.to_json())
    assert read.sites[0].statistics == statistics
    assert "statistics" not in json.loads(_TEXT)["sites"][0]
    assert Policy.from_json(_TEXT).sites[0].statistics is None
    # They decide nothing.
    assert policy.key() == POLICY.key()
    assert read.replaced(site.name, decision=EXACT).sites[0].statistics == statistics


def test_words_are_kept_and_files_without_them_are_read() -> None:
    policy = POLICY.with_site(dataclasses.replace(POLICY.sites[0], computes={"mask": "causal"}))
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.key() == POLICY.key()  # the key of the spec says the same
    assert hash(policy) == hash(Policy.from_json(policy.to_json()))
    assert Policy.from_json(_TEXT).sites[0].computes is None


def test_policy_of_an_earlier_version_is_read() -> None:
    """One that was written before sites had statistics."""
    policy = Policy.load(Path(__file__).parent / "data" / "bytes_lm" / "policy.json")
    assert len(policy.sites) == 6


# ------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda p: p["sites"][2]["heads"][2]["pattern"].update(window=-5),
            "sites[2].heads[2].pattern.window is -5; it must be a number of keys from 0",
        ),
        (
            lambda p: p["sites"][0]["heads"][3]["selection"].update(mass=1.5),
            "sites[0].heads[3].selection.mass is 1.5; it must be above 0, at most 1",
        ),
        (
            lambda p: p["sites"][0]["heads"][4]["pooling"].update(keys=12),
            "sites[0].heads[4].pooling.keys is 12; it must be one of 8, 16, 32, 64",
        ),
        (
            lambda p: p["sites"][0]["heads"][0].update(scores="fp8"),
            'sites[0].heads[0].scores is "fp8"; it must be one of "fp32", "tf32", "bf16", "fp16"',
        ),
        (
            lambda p: p["sites"][0]["heads"][0].update(skip=None),
            "sites[0].heads[0].skip is null; it must be above 0",
        ),
        (
            lambda p: p["sites"][0].update(statistics={"entropy": [1.0, 2.0]}),
            "sites[0].statistics.entropy has 2 entries; it must have one for each of 6 heads",
        ),
        (
            lambda p: p["sites"][0].update(statistics={"entropy": [None] * 6}),
            "sites[0].statistics.entropy[0] is null; it must be a finite number",
        ),
        (
            lambda p: p["sites"][0]["heads"][2].update(p["sites"][0]["heads"][3]),
            "sites[0].heads[2].selection is given beside pattern; at most one may be of pattern",
        ),
        (
            lambda p: p["sites"][1]["heads"][0].pop("budget"),
            "sites[1].heads[0].budget is missing; it must be given",
        ),
        (
            lambda p: p["sites"][0]["heads"][2].update(budget=5),
            "sites[0].heads[2].budget is 5; it must be a relative error from 0 to 1 (write 5% as",
        ),
        (
            lambda p: p["provenance"]["budget"].update(value=1.5),
            "provenance.budget.value is 1.5; it must be a share from 0 to 1 (write 5% as 0.05)",
        ),
        (
            lambda p: p["sites"][1].update(envelop=p["sites"][1].pop("envelope")),
            "sites[1].envelop is not a known field (did you mean 'envelope'?); known are name,",
        ),
        (
            lambda p: p["sites"][0].update(heads=[]),
            "sites[0].heads has length 0; it must be a list of heads, at least one",
        ),
        (
            lambda p: p["sites"][0].update(kv_heads=4),
            "sites[0].kv_heads is 4; it must divide 6 heads",
        ),
        (
            lambda p: p["sites"][0].update(training=0),
            "sites[0].training is 0; it must be true or false",
        ),
        (
            lambda p: p["sites"][0]["envelope"].update(rows=[8, 4]),
            "sites[0].envelope.rows is refused: low is 8; it must be at most high, 4",
        ),
        (
            lambda p: p["sites"][0]["envelope"].update(rows=[1]),
            "sites[0].envelope.rows has length 1; it must be two numbers, [low, high]",
        ),
        (
            lambda p: p["sites"][0]["envelope"]["statistics"]["q_rms"].pop(),
            "sites[0].envelope.statistics.q_rms has 5 entries; it must have one for each of 6",
        ),
        (
            lambda p: p["sites"][0]["envelope"]["statistics"].update({"": []}),
            'sites[0].envelope.statistics[""] is named so; names must be 1 to 500 characters',
        ),
        (
            lambda p: p["sites"][2].update(name="layers.0.self_attn"),
            "sites[2] is layers.0.self_attn again, as sites[0] is; a site must be there once",
        ),
        (
            lambda p: p["sites"][0].update(spec="0" * 12 + "\n"),
            'sites[0].spec is "000000000000\\n"; it must be 12 hexadecimal digits',
        ),
        (
            lambda p: p["provenance"].update(created="yesterday"),
            'provenance.created is "yesterday"; it must be a date as "2026-01-31"',
        ),
        (
            lambda p: p["provenance"]["versions"].pop("torch"),
            "provenance.versions.torch is missing",
        ),
        (lambda p: p["provenance"].update(seed=True), "provenance.seed is true; it must be"),
        (
            lambda p: p["provenance"]["results"].update(x=10**400),
            "provenance.results.x is an integer of many digits; it must be a finite number",
        ),
        (lambda p: p.update(sites={}), "sites is an object; it must be a list of sites"),
        (lambda p: p.update(provenance=[1]), "provenance is a list of 1; it must be an object"),
        (lambda p: p.pop("version"), "version is missing"),
        (lambda p: p.update(version="1"), 'version is "1"; it must be 1'),
        (lambda p: p.update(version=True), "version is true; it must be 1"),
        (
            lambda p: p.update(version=2, more={}),
            "version is 2; this AdaAttn reads version 1: calibrate the model anew",
        ),
    ],
)
def test_bad_field_is_named_with_what_is_valid(edit: Callable[[Any], Any], message: str) -> None:
    assert _refusal(_edited(edit)).startswith(message)


def test_whole_numbers_may_be_written_with_a_point() -> None:
    text = _edited(lambda p: p["sites"][0]["heads"][2]["pattern"].update(window=256.0))
    assert Policy.from_json(text) == POLICY


def test_long_values_are_cut_in_messages() -> None:
    assert len(_refusal(_edited(lambda p: p.update(version="x" * 10**6)))) < 200
    assert len(_refusal(_edited(lambda p: p.update({"x" * 10**6: 1})))) < 300


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the policy is empty; it must be one JSON object"),
        (" \n", "the policy is empty"),
        ("null", "the policy is null; it must be an object, {...}"),
        ("[]", "the policy is a list of 0; it must be an object"),
        ("{", "the policy is not JSON: Expecting property name"),
        (_TEXT + "}", "the policy is not JSON: Extra data, at line"),
        ("[" * 10**6, "the policy is nested too deeply"),
        ("[" * 500 + "]" * 500, "the policy is a list of 1"),
        (_TEXT.replace('"seed": 7', '"seed": NaN'), "the policy has the number NaN"),
        (_TEXT.replace('"seed": 7', '"seed": -Infinity'), "the policy has the number -Infinity"),
        (_TEXT.replace('"seed": 7', '"seed": 1e999'), "provenance.seed is inf; it must be"),
        (_TEXT.replace('"seed": 7', '"seed": 7' + "0" * 9999), "the policy is not JSON that can"),
        (
            _TEXT.replace('"seed": 7', '"seed": 7, "device": "A100", "seed": 8'),
            "provenance.device is given more than once; it must be given once",
        ),
    ],
)
def test_text_that_is_no_policy_is_refused(text: str, message: str) -> None:
    assert _refusal(text).startswith(message)


# -------------------------------------------------------------------------------------------- files


def test_saved_policy_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)
    assert Policy.load(str(path)) == POLICY
    POLICY.without("layers.1.self_attn").save(str(path))
    assert len(Policy.load(path).sites) == 2
    assert os.listdir(tmp_path) == ["policy.json"]


def test_file_with_a_byte_order_mark_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(_TEXT, encoding="utf-8-sig")
    assert Policy.load(path) == POLICY


def test_refusal_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(_edited(lambda p: p.update(version=3)))
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert str(caught.value).startswith(f"{path}: version is 3;")
    assert caught.value.path == ("version",)
    assert caught.value.source == str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (lambda path: path.mkdir(), "is not a file; give the path of a policy's JSON file"),
        (lambda path: os.mkfifo(path), "is not a file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b'{"a": "\xff"}'), "is not UTF-8 at byte 7"),
        (lambda path: path.write_bytes(bytes(65 << 20)), "is larger than 64 MiB"),
        (lambda path: path.symlink_to(path), "cannot be read: "),
    ],
)
def test_file_that_holds_no_policy_is_refused(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "policy.json"
    make(path)
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert str(caught.value).startswith(f"{path}: the policy {message}")


def test_path_with_a_null_character_is_refused() -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load("a\0b")


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        POLICY.without("layers.1.self_attn").save(path)
    assert os.listdir(tmp_path) == ["policy.json"]
    assert Policy.load(path) == POLICY


def test_policy_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)
    huge = HeadDecision(pattern=Pattern(2**40))
    with pytest.raises(PolicyError, match="window is 1099511627776"):
        POLICY.replaced("layers.1.self_attn", decision=huge).save(path)
    assert Policy.load(path) == POLICY


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    path, link = tmp_path / "policy.json", tmp_path / "link.json"
    link.symlink_to(path)
    POLICY.save(link)
    assert link.is_symlink()
    assert Policy.load(path) == POLICY


def test_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    POLICY.save(tmp_path / "policy.json")
    assert (tmp_path / "policy.json").stat().st_mode == (tmp_path / "other").stat().st_mode

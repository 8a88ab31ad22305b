"""Policies survive their files; broken files are refused where they are; the schema agrees."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schema import is_valid
from policies import PROVENANCE, policies, site

from adaattn_compiler.policy import Policy, PolicyError, schema
from adaattn_compiler.policy.file import written
from adaattn_compiler.policy.policy import FORM

_SCHEMA = schema()
_POLICY = Policy((site(), site(ordinal=1, seconds=None)), PROVENANCE)
# What a person, a program or a broken disk might put in a field's place.
_STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 64.0, 2**31, 2**64, 10**400, 1e308, -0.0, 0.5, 1e-320]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["", "bf16", "pooled", "0" * 12, "0" * 12 + "\n", "\ud800", "x" * 600, "2026"]),
    st.sampled_from([[], {}, [[]], [1, 2], [2, 1], {"window": 1}]),
)


@settings(max_examples=80, deadline=None)
@given(policies())
def test_policy_survives_its_file(policy: Policy) -> None:
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert hash(again) == hash(policy)
    assert again.key() == policy.key()
    assert again.to_json() == policy.to_json()
    assert is_valid(json.loads(policy.to_json()), _SCHEMA)
    assert str(policy) in policy.summary()


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for step, member in members:
        yield (*path, step)
        if isinstance(member, (dict, list)):
            yield from _nodes(member, (*path, step))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _mutate(draw: Any, value: Any) -> None:
    """Change one place of a JSON value."""
    path = draw(st.sampled_from(list(_nodes(value))))
    parent, step = _at(value, path[:-1]), path[-1]
    how = draw(st.sampled_from(["delete", "replace", "reorder", "add", "rename", "move"]))
    if how == "delete":
        del parent[step]
    elif how == "replace":
        parent[step] = draw(_STRANGE)
    elif how == "move":
        parent[step] = copy.deepcopy(_at(value, draw(st.sampled_from(list(_nodes(value))))))
    elif isinstance(parent, list):
        if how == "reorder":
            random.Random(draw(st.integers(0, 9))).shuffle(parent)
        else:
            parent.insert(step, copy.deepcopy(parent[step]))
    elif how == "reorder":
        entries = list(parent.items())[::-1]
        parent.clear()
        parent.update(entries)
    else:
        name = draw(
            st.sampled_from(["skip", "pattern", "Window", "", "a b", "version"]) | st.text()
        )
        parent[name] = parent.pop(step) if how == "rename" else draw(_STRANGE)


@st.composite
def _mutated(draw: st.DrawFn) -> Any:
    value = json.loads(_POLICY.to_json())
    for _ in range(draw(st.integers(1, 3))):
        if value:
            _mutate(draw, value)
    return value


def _means(value: Any) -> Any:
    """A JSON value, such that those of one meaning are equal: true is not 1, but 1.0 is."""
    if isinstance(value, dict):
        return {name: _means(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_means(member) for member in value]
    return (isinstance(value, bool), float(value) if isinstance(value, (int, float)) else value)


@settings(max_examples=600, deadline=None)
@given(_mutated())
def test_mutated_file_means_what_it_says_or_is_refused_where_it_is_wrong(value: Any) -> None:
    found = _read(json.dumps(value))
    if isinstance(found, Policy):
        assert _means(json.loads(found.to_json())) == _means(value)
    else:
        assert _names_a_place(found, value), str(found)


def _read(text: str) -> Policy | PolicyError:
    """The policy of a text, or why there is none, which can be printed."""
    try:
        return Policy.from_json(text)
    except PolicyError as error:
        str(error).encode()
        return error


def _names_a_place(error: PolicyError, value: Any) -> bool:
    """Whether the path exists, but for the last step where that is what is missing."""
    if not error.path:
        return value == {} or not isinstance(value, dict)
    parent, last = _at(value, error.path[:-1]), error.path[-1]
    if error.reason.startswith("is missing"):
        return last not in parent
    return last in parent if isinstance(parent, dict) else 0 <= last < len(parent)


@settings(max_examples=600, deadline=None)
@given(_mutated())
def test_schema_and_reader_refuse_the_same(value: Any) -> None:
    assert _reader_accepts(value) == is_valid(value, _SCHEMA)


def _reader_accepts(value: Any) -> bool:
    try:
        FORM.check(value, ())
    except PolicyError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_text_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(_POLICY.to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["cut", "drop", "set", "double"]))
        if how == "cut":
            raw = raw[: at + 1]
        elif how == "drop":
            del raw[at : at + data.draw(st.integers(1, 40))]
            raw = raw or bytearray(b" ")
        elif how == "set":
            raw[at] = data.draw(st.integers(0, 127))
        else:
            raw[at:at] = raw[at : at + 200]
    found = _read(raw.decode())
    if isinstance(found, Policy):
        assert Policy.from_json(found.to_json()) == found


def test_published_schema_is_the_readers() -> None:
    published = (files("adaattn_compiler.policy") / "schema.json").read_text(encoding="utf-8")
    assert published == written(schema()) + "\n", (
        "the fields changed: write `written(schema())` into adaattn_compiler/policy/schema.json, "
        "and raise VERSION in fields.py where files of before cannot be read any more"
    )


def test_schema_is_valid_to_a_validator() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(_SCHEMA)
    jsonschema.Draft202012Validator(_SCHEMA).validate(json.loads(_POLICY.to_json()))

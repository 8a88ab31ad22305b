"""Warnings that are said once."""

from __future__ import annotations

import pytest

from adaattn_compiler.said import warn_once


def test_the_same_warning_is_said_once_and_another_again(caplog: pytest.LogCaptureFixture) -> None:
    for message in ("100% of it", "100% of it", "another"):
        warn_once(message)
    assert [record.getMessage() for record in caplog.records] == ["100% of it", "another"]

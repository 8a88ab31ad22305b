"""What runs in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`, or `make test`.

Triton looks at the variable when it is imported, so that one process cannot have both.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Coverage of the first case of each test: tracing makes the interpreter 2.5 times slower, and
    further cases run the same lines but for what tests/kernels covers (compiling, not running)."""
    if not config.pluginmanager.hasplugin("pytest_cov"):
        return
    seen = set()
    for item in items:
        test = item.nodeid.split("[")[0]
        if test in seen and test.startswith("tests/interpreted/"):
            item.add_marker("no_cover")
        seen.add(test)

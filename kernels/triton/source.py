"""The Triton source of one kernel, from its spec."""

from __future__ import annotations

from pathlib import Path

# The functions that expressions call, with the imports of a generated module.
FUNCTIONS = (Path(__file__).parent / "functions.py").read_text()

"""Why a policy is refused: the field at fault, and what it must be."""

from __future__ import annotations

import json
import re
from typing import Any

Path = tuple[str | int, ...]


class PolicyError(ValueError):
    """Why a policy is refused.

    path: the steps to the field at fault, ("sites", 3, "budget"); empty for the whole policy.
    reason: what follows the field's name in a sentence: "is -5; it must be ...".
    source: the file, where there is one.
    """

    def __init__(self, path: Path, reason: str, source: str | None = None) -> None:
        super().__init__(path, reason, source)
        self.path, self.reason, self.source = path, reason, source

    def __str__(self) -> str:
        start = "" if self.source is None else f"{self.source}: "
        return f"{start}{_where(self.path)} {self.reason}"

    def under(self, path: Path) -> PolicyError:
        """The same, of a value that lies at a path in a larger one."""
        return PolicyError((*path, *self.path), self.reason, self.source)


def _where(path: Path) -> str:
    """Steps as one writes them: sites[3].envelope.statistics["q rms"]."""
    words = ""
    for step in path:
        if isinstance(step, int):
            words += f"[{step}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]{0,59}", step):
            words += f".{step}" if words else step
        else:
            words += f"[{shown(step)}]"
    return words or "the policy"


def shown(value: Any) -> str:
    """A JSON value in a message: short, and in JSON's spelling."""
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (str, bool)) or value is None:
        # Cut first: a text may be megabytes.
        return json.dumps(value[:60] + "..." if isinstance(value, str) and value[60:] else value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 200 else "an integer of many digits"
    return repr(value)[:60]

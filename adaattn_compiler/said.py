"""What is said once: the same fault is met again with every graph, and once is enough."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("adaattn_compiler")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the same one once in a process."""
    log.warning("%s", message)

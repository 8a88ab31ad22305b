"""The kernels under compute-sanitizer: no access outside of what was allocated.

Each case is run as a script (tests/support/sanitized.py), with every tensor allocated by itself, so
that what lies beyond its end is nobody's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sanitized import CASES

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parents[1] / "support" / "sanitized.py"
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
FOUND = 77
# What the tool says where a machine does not let it look.
NOT_HERE = ("Device not supported", "not supported on this", "Unable to find injection library")
SECONDS = 110


@pytest.fixture(scope="module")
def tool() -> str:
    path = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(PLACES)
    )
    if path is None:
        pytest.skip(f"compute-sanitizer is neither on PATH nor in {', '.join(PLACES)}")
    return path


@pytest.mark.parametrize("case", CASES)
def test_kernel_stays_within_its_tensors(case: str, tool: str) -> None:
    # Calls that torch makes to see whether they fail are no errors.
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no"]
    command += ["--error-exitcode", str(FOUND)]
    command += [sys.executable, str(SCRIPT), case]
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer takes more than {SECONDS} s here")
    said = done.stdout + done.stderr
    for reason in NOT_HERE:
        if reason in said:
            pytest.skip(f"compute-sanitizer: {reason}")
    assert done.returncode == 0, said[-4000:]
    assert "ERROR SUMMARY: 0 errors" in said, said[-2000:]

"""A file system that fills up: the error is clear, no record is lost, and with more space the result is the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import errno
import subprocess
import sys

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

from curvop import JournaledLinearOperator
from curvop.spectrum import density

folder, kind = sys.argv[1:]
N = 2000
entries = np.linspace(1, 2, N)
A = LinearOperator((N, N), matvec=lambda x: entries * x.ravel(), matmat=lambda X: entries[:, None] * X, dtype=float)

def run(directory):
    if kind == "density":
        return density(A, num_probes=2, num_steps=30, progress=False, checkpoint=directory).nodes
    if directory is None:
        return cg(A, np.ones(N), rtol=1e-12)[0]
    with JournaledLinearOperator(A, directory, max_bytes=1e9) as J:
        return cg(J, np.ones(N), rtol=1e-12)[0]

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], check=True)
expected = run(None)
try:
    run(f"{folder}/records")
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    assert "the record was not written" in str(error), error
    assert f"{folder}/records" in str(error), error
else:
    raise AssertionError("the file system did not fill up")
subprocess.run(["mount", "-o", "remount,size=10m", folder], check=True)
np.testing.assert_array_equal(run(f"{folder}/records"), expected)
"""


def may_mount() -> bool:
    """Return whether this machine allows processes to have private mounts."""
    command = ["unshare", "--mount", "--map-root-user", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs unshare, and the right to mount")
@pytest.mark.parametrize("kind", ["density", "journal"])
def test_recorded_products_are_kept(tmp_path: Path, kind: str) -> None:
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", SCRIPT, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

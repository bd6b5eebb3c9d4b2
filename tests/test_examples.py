"""The tutorials run, and what they assert holds."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, capsys) -> None:
    with torch.random.fork_rng():
        runpy.run_path(str(path))
    printed = capsys.readouterr().out
    assert "differ" not in printed
    if path.stem == "submatrices":
        assert re.search(r"sliced from H: .* ms a product", printed)

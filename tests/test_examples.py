"""The tutorials run, and what they assert holds."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))


@pytest.fixture
def shown(monkeypatch) -> list[int]:
    """Draw without a screen; return what was shown."""
    figures: list[int] = []

    def show() -> None:
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
            figures.append(number)
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    plt.switch_backend("agg")
    return figures


@pytest.mark.nightly  # the gallery, which is built with the documentation, runs them too
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, shown, capsys) -> None:
    with torch.random.fork_rng():
        runpy.run_path(str(path))
    assert shown or path.stem == "submatrices"
    printed = capsys.readouterr().out
    if path.stem == "submatrices":
        assert "differ" not in printed
        assert re.search(r"sliced from H: .* ms per product", printed)

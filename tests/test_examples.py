"""The tutorials run, and what they assert holds."""

from __future__ import annotations

import re
import runpy
import shutil
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


@pytest.mark.peers  # their environment has sphinx-gallery, which writes the notebooks
@pytest.mark.filterwarnings("default")  # warnings of Jupyter do not matter here
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem == "outliers"], ids=lambda path: path.stem)
def test_it_runs_as_a_notebook(path: Path, tmp_path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    convert = pytest.importorskip("sphinx_gallery.notebook").python_to_jupyter_cli
    copy = shutil.copy(path, tmp_path)
    convert([str(copy)])
    notebook = nbformat.read(Path(copy).with_suffix(".ipynb"), as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("10 classes" in output.get("text", "") for output in outputs)

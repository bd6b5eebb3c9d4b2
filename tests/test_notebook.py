"""A real notebook shows tables, pictures and progress bars, and no warnings."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.slow

SETTING_UP = """
    import sys

    if not {widgets}:
        sys.modules["ipywidgets"] = None  # as if it were not installed
    import time
    import numpy as np
    import torch
    from scipy.sparse.linalg import LinearOperator
    from torch import nn
    from curvop import HessianLinearOperator, check, solve, spectrum

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(torch.randn(64, 4).double(), torch.randint(0, 3, (64,)))]
    loss_function = nn.CrossEntropyLoss()


    def multiply(X):
        time.sleep(0.1)
        return (np.linspace(1, 2, 200) * X.T).T


    slow = LinearOperator((200, 200), matvec=multiply, matmat=multiply, dtype=float)
    H = HessianLinearOperator(model, loss_function, dict(model.named_parameters()), data)
    H
"""
CELLS = {
    "operator": SETTING_UP,
    "density": "spectrum.density(slow, num_steps=16, rng=0)",
    "interrupted": "spectrum.density(slow, num_steps=40, seconds=1.5, rng=0)",
    "eigenvalues": "spectrum.eigsh(H, 3)",
    "solution": "solve(H, H.gradient_and_loss()[0], damping=1.0)",
    "check": "check(H)",
    "blocks": "spectrum.blocks(H)",
    "figures": """
        import matplotlib.pyplot as plt

        assert not plt.get_fignums()
    """,
}


@pytest.fixture(scope="module", params=[False, True], ids=["text", "widgets"])
def notebook(request: pytest.FixtureRequest) -> Any:
    if request.param:
        pytest.importorskip("ipywidgets")
    pytest.importorskip("matplotlib")
    sources = [textwrap.dedent(source).replace("{widgets}", str(request.param)).strip() for source in CELLS.values()]
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(executed, timeout=300, kernel_name="python3").execute()
    executed.has_widgets = request.param
    return executed


def outputs(notebook: Any, name: str, kind: str) -> list[Any]:
    cell = notebook.cells[list(CELLS).index(name)]
    return [output for output in cell.outputs if output.output_type == kind]


def test_nothing_is_written_to_stderr(notebook: Any) -> None:
    streams = {output.name for name in CELLS for output in outputs(notebook, name, "stream")}
    assert streams <= {"stdout"}


def test_an_operator_is_one_line(notebook: Any) -> None:
    [output] = outputs(notebook, "operator", "execute_result")
    assert set(output.data) == {"text/plain"}
    assert output.data["text/plain"].startswith("<67x67 HessianLinearOperator with dtype=float64: 4 parameters (")


@pytest.mark.parametrize("name", ["density", "interrupted", "eigenvalues", "solution", "check", "blocks"])
def test_a_result_is_a_table(notebook: Any, name: str) -> None:
    [output] = outputs(notebook, name, "execute_result")
    assert "<table" in output.data["text/html"]
    assert len(output.data["text/plain"]) < 2000


@pytest.mark.parametrize("name", ["density", "interrupted", "blocks"])
def test_a_picture_belongs_to_it(notebook: Any, name: str) -> None:
    [output] = outputs(notebook, name, "execute_result")
    assert '<img alt="plot of ' in output.data["text/html"]


@pytest.mark.parametrize(("name", "share"), [("density", "100%"), ("interrupted", "")])
def test_the_bar_of_a_long_computation_ends_well(notebook: Any, name: str, share: str) -> None:
    if not notebook.has_widgets:
        text = "".join(output.text for output in outputs(notebook, name, "stream"))
        assert f"density: {share}" in text.split("\r")[-1]
        assert text.endswith("\n")
        return
    [bar] = outputs(notebook, name, "display_data")
    media = "application/vnd.jupyter.widget-view+json"
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    children = states[bar.data[media]["model_id"]]["state"]["children"]
    label, shape, numbers = (states[child.removeprefix("IPY_MODEL_")]["state"] for child in children)
    assert label["value"].startswith("density:")
    assert shape["bar_style"] == "success"
    assert (shape["value"] == shape["max"]) == bool(share)
    assert "products" in numbers["value"]

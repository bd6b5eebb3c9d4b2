"""Where results cannot be saved: the error names the folder and the remedy, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curvop import HessianLinearOperator, KFACLinearOperator, spectrum
from curvop.storage.result_files import appearing

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
DATA = [(torch.randn(6, 2).double(), torch.randint(2, (6,)))]
ARGUMENTS = (MODEL, nn.CrossEntropyLoss(), dict(MODEL.named_parameters()), DATA)
H = HessianLinearOperator(*ARGUMENTS)
RESULTS: dict[str, Any] = {
    "eigenvalues": spectrum.eigsh(H, 2, progress=False),
    "density": spectrum.density(H, 2, 5, progress=False),
    "block study": spectrum.blocks(H, progress=False),
    "KFAC": KFACLinearOperator(*ARGUMENTS),
}


@pytest.mark.parametrize("name", RESULTS)
class TestSave:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_folder_that_does_not_exist(self, name: str, kind: type, tmp_path: Path) -> None:
        folder = tmp_path / "runs" / "today"
        with pytest.raises(FileNotFoundError) as caught:
            RESULTS[name].save(kind(folder / "result.npz"))
        assert f"the folder {str(folder)!r} does not exist: create it" in str(caught.value)
        assert f"os.makedirs({str(folder)!r})" in str(caught.value)
        assert not list(tmp_path.iterdir())
        folder.mkdir(parents=True)
        RESULTS[name].save(kind(folder / "result.npz"))  # the result is still there
        assert [path.name for path in folder.iterdir()] == ["result.npz"]

    def test_a_folder_in_place_of_the_file(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match=r"a folder: pass a file in it, such as '.*x\.npz'"):
            RESULTS[name].save(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_file_in_place_of_the_folder(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        with pytest.raises(NotADirectoryError, match="file' is a file: pass a path in a folder"):
            RESULTS[name].save(tmp_path / "file" / "result.npz")
        assert (tmp_path / "file").read_text() == "kept"


def test_a_relative_path_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RESULTS["density"].save("density.npz")
    np.testing.assert_array_equal(spectrum.SpectralDensity.load("density.npz").nodes, RESULTS["density"].nodes)
    with pytest.raises(FileNotFoundError, match="the folder 'missing' does not exist"):
        RESULTS["density"].save("missing/density.npz")


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with appearing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]

"""Reading a file executes nothing, only code that the user names runs, and nothing uses the network."""

from __future__ import annotations

import ast
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator
from test_cli import PROBLEMS

import curvop
from curvop import JournaledLinearOperator, spectrum
from curvop.cli.main import main
from curvop.storage import result_files
from curvop.storage.records import RecordFileError

SOURCES = sorted(Path(curvop.__file__).parent.rglob("*.py"))
A = aslinearoperator(np.diag(np.arange(1.0, 9.0)))


class Payload:
    """Create a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return Path.touch, (self._mark,)


class TestSources:
    """The source code has no line that reads a pickle or executes data."""

    @pytest.fixture(params=SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
    def tree(self, request) -> ast.AST:
        return ast.parse(request.param.read_text())

    def test_no_module_that_executes_or_asks_the_network_is_imported(self, tree) -> None:
        imported = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        refused = {
            "pickle",
            "marshal",
            "shelve",
            "dill",
            "joblib",
            "subprocess",
            "urllib",
            "http",
            "requests",
            "ftplib",
        }
        assert not imported & refused

    def test_nothing_is_called_that_executes_what_it_reads(self, tree) -> None:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "compile", "__import__", "os.system", "torch.load", "torch.hub.load")
            if name in ("np.load", "np.save"):
                assert any(key.arg == "allow_pickle" and not ast.literal_eval(key.value) for key in node.keywords)

    def test_archives_are_written_in_one_place_only_which_refuses_objects(self) -> None:
        """`np.savez` of NumPy 2.0 treats `allow_pickle` as the name of an array, and pickles."""
        named = {path.stem: path.read_text().count("savez") for path in SOURCES}
        [function] = [
            node
            for node in ast.walk(ast.parse(Path(result_files.__file__).read_text()))
            if isinstance(node, ast.FunctionDef) and node.name == "save_arrays"
        ]
        calls = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Call)]
        assert [call for call in calls if "savez" in call] == ["np.savez(file, **checked)"]
        # The call and a comment on it.
        assert {name: count for name, count in named.items() if count} == {"result_files": 2}

    @pytest.mark.parametrize("kind", ["object", [("number", "f8"), ("any", "O")]], ids=["objects", "a field of them"])
    def test_objects_are_not_pickled_into_archives(self, tmp_path, kind) -> None:
        with pytest.raises(
            TypeError, match=r"^wrong, too cannot be saved in .*: pass arrays of numbers, or of strings"
        ):
            result_files.save_arrays(
                tmp_path / "a.npz", right=np.ones(2), wrong=np.empty(2, kind), too=np.empty((), kind)
            )
        assert not list(tmp_path.iterdir())

    def test_archives_hold_what_they_are_given_and_the_number_of_their_format(self, tmp_path) -> None:
        arrays = {"numbers": np.arange(3.0), "words": np.array(["a", "b"], dtype=np.str_), "none": np.ones((0, 2))}
        result_files.save_arrays(tmp_path / "a.npz", **arrays)
        with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
            assert file.files == ["format", *arrays]
            assert file["format"] == result_files.FORMAT
            for name, array in arrays.items():
                np.testing.assert_array_equal(file[name], array)


class TestFilesThatWouldExecute:
    @pytest.fixture
    def mark(self, tmp_path) -> Path:
        return tmp_path / "executed"

    def test_the_payload_does_execute_where_it_is_unpickled(self, mark) -> None:
        pickle.loads(pickle.dumps(Payload(mark)))
        assert mark.exists()

    @pytest.mark.parametrize("kind", [spectrum.SpectralDensity, spectrum.EigenResult, spectrum.BlockStudy])
    @pytest.mark.parametrize("form", ["a pickle", "an array", "an archive", "a field of a result"])
    def test_results(self, tmp_path, mark, kind, form: str) -> None:
        path, payload = tmp_path / "result.npz", np.array([Payload(mark)], dtype=object)
        if form == "a pickle":
            path.write_bytes(pickle.dumps(Payload(mark)))
        elif form == "an array":
            with path.open("wb") as file:
                np.save(file, payload, allow_pickle=True)
        elif form == "an archive":
            np.savez(path, x=payload)
        else:
            names = {
                "SpectralDensity": (
                    "size",
                    "nodes",
                    "weights",
                    "atoms",
                    "num_products",
                    "complete",
                    "recurrences",
                    "resolution",
                ),
                "EigenResult": ("values", "vectors", "wanted"),
                "BlockStudy": ("names", "unfinished", "sizes", "norms", "norm_errors", "num_products"),
            }
            np.savez(path, **dict.fromkeys(names[kind.__name__], payload))
        with pytest.raises(ValueError, match="was not written by"):
            kind.load(path)
        assert not mark.exists()

    @pytest.mark.parametrize("name", ["products.records", "fingerprint.json"])
    def test_journals(self, tmp_path, mark, name: str) -> None:
        folder = tmp_path / "journal"
        with JournaledLinearOperator(A, folder) as J:
            J @ np.ones(8)
        assert name in {path.name for path in folder.iterdir()}
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
        with pytest.raises((ValueError, RecordFileError)):
            JournaledLinearOperator(A, folder)
        assert not mark.exists()

    def test_checkpoints(self, tmp_path, mark) -> None:
        spectrum.density(A, num_steps=4, checkpoint=tmp_path / "kept", progress=False)
        for path in (tmp_path / "kept").iterdir():
            path.write_bytes(pickle.dumps(Payload(mark)))
        with pytest.raises((ValueError, RecordFileError)):
            spectrum.density(A, num_steps=4, checkpoint=tmp_path / "kept", progress=False)
        assert not mark.exists()


WITHOUT_NETWORK = """
import sys

def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib", "http.client")):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
from curvop.cli.main import main
from curvop.storage import result_files
sys.exit(main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(curvop.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eigs", "check", "spectrum"])
def test_no_command_asks_the_network(tmp_path, command: str) -> None:
    (tmp_path / "problems.py").write_text(PROBLEMS)
    more = {
        "eigs": ["problems.py:small", "--k", "2"],
        "check": ["digits"],
        "spectrum": ["problems.py:small", "--k", "2", "--out", "study", "--steps", "5"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, command, *more],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_report_fetches_nothing(tmp_path) -> None:
    (tmp_path / "problems.py").write_text(PROBLEMS)
    argv = ["spectrum", f"{tmp_path / 'problems.py'}:small", "--k", "1", "--out", str(tmp_path / "study")]
    assert main(argv) == 0
    page = (tmp_path / "study" / "report.html").read_text()
    assert re.findall(r"src=", page)
    assert not re.findall(r"""src\s*=\s*(?!["']data:)""", page)
    links = re.findall(r'<(\w+) href="([^"]*)">', page)
    assert len(links) == len(re.findall(r"href", page)) > 0
    assert all(tag == "a" and (tmp_path / "study" / name).is_file() for tag, name in links)  # fetched only by a click
    assert "url(" not in page


@pytest.mark.slow
def test_code_that_lies_around_is_not_run(tmp_path) -> None:
    """The working directory has modules with the names of all modules that the command imports."""
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n"
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("digits", "numpy", "sklearn", "matplotlib", "json", "curvop", "sitecustomize", "problem"):
        (folder / f"{name}.py").write_text(trap)
    (tmp_path / "problems.py").write_text(PROBLEMS)
    problem = f"{tmp_path / 'problems.py'}:small"
    script = "import sys; from curvop.cli.main import main; sys.exit(main(['check', 'digits']) or main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "spectrum", problem, "--k", "1", "--out", str(tmp_path / "study")],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()

"""The house: three floors, imports go down only, files that can be read in one sitting."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvop

SOURCE = Path(curvop.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
STUDIES = {
    *(
        "__main__",
        "arguments",
        "cli",
        "dense",
        "eigs",
        "matrices",
        "problems",
        "preconditioner",
        "report",
        "results",
        "singular",
    ),
    *("check", "check_report", "model_check", "solvers"),
    *("spectrum", "journal", "products", "fingerprint", "records", "exclusive", "distributed"),
    *("serving", "ranks", "launch", "pulse"),
}


def floor(module: str) -> int:
    """Return 1 for kernels, 2 for operators, 3 for studies and the references to compare with, 4 for the face."""
    if module == "curvop":
        return 4
    first = module.split(".")[1]
    if first == "kernels":
        return 1
    return 3 if first in {*STUDIES, "examples"} else 2


def module_of(path: Path) -> str:
    return ".".join(["curvop", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down_only(path: Path) -> None:
    here = module_of(path)
    for name in imports(path):
        if name == "curvop":
            assert floor(here) >= 3, f"{here} imports the package's face"
        elif name.startswith("curvop."):
            assert floor(name) <= floor(here), f"{here} imports {name}, which lies above it"
            if floor(here) == 3:
                assert floor(name) != 1, f"{here} reaches into {name}"


@pytest.mark.parametrize("path", [path for path in FILES if "kernels" in path.parts], ids=module_of)
def test_kernels_know_torch_and_the_standard_library_only(path: Path) -> None:
    for name in imports(path):
        first = name.split(".")[0]
        assert first in {"torch", "curvop"} or first in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_the_reference_shares_no_code_with_the_kernels() -> None:
    for path in (SOURCE / "examples").glob("*.py"):
        own = [name for name in imports(path) if name.startswith("curvop")]
        assert all(name.startswith("curvop.examples.") for name in own)


def test_public_names() -> None:
    for name in curvop.__all__:
        assert getattr(curvop, name).__doc__

"""The house: wings on three floors, imports that go down only, no circle, no name twice."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvop

SOURCE = Path(curvop.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

#: From the ground up. A wing imports itself and wings before it.
WINGS = (
    "kernels",
    "operators",
    "storage",
    "spectrum",
    "callbacks",
    "solvers",
    "distributed",
    "testing",
    "checks",
    "cli",
)

#: What scripts import by path. These modules hold names of other modules only.
REEXPORTS = {"submatrix", "utils", "problems", "preconditioner", "huggingface", "examples", "examples.functorch"}


def module_of(path: Path) -> str:
    return ".".join(["curvop", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def wing_of(module: str) -> str:
    """Return the wing of a module, '' if it lies in the root."""
    first = module.split(".")[1] if "." in module else ""
    return first if first in WINGS else ""


def for_typing_only(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes below ``if TYPE_CHECKING:``."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports when it runs, those within functions included."""
    tree = ast.parse(path.read_text())
    typing = for_typing_only(tree)
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in MODULES else str(node.module)


GRAPH = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    wing = wing_of(module)
    for name in GRAPH[module]:
        if not wing:  # the root, which hands out what the wings have
            continue
        below = WINGS[: WINGS.index(wing) + 1]
        assert wing_of(name) in below, f"{module} imports {name}, which lies above it"
        if below[2:] and wing_of(name) == "kernels":
            pytest.fail(f"{module} reaches into {name} past the operators")


def test_there_is_no_circle() -> None:
    """Remove modules that import nothing that is left, until none is left."""
    left = {module: set(names) for module, names in GRAPH.items()}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert not left


def test_no_basename_exists_twice() -> None:
    stems = [path.stem for path in FILES if path.stem not in ("__init__", "__main__")]
    assert sorted(stems) == sorted(set(stems))


def test_the_root_holds_re_exports_only() -> None:
    for module, path in MODULES.items():
        if wing_of(module) or module in ("curvop", "curvop.__main__"):
            continue
        assert module.removeprefix("curvop.") in REEXPORTS
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, ast.ImportFrom | ast.Assign | ast.Expr), f"{module} defines something of its own"


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module) == "kernels"])
def test_kernels_know_torch_and_the_standard_library_only(module: str) -> None:
    for name in imports(MODULES[module]):
        first = name.split(".")[0]
        assert first in {"torch", "curvop"} or first in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 900


def test_the_reference_shares_no_code_with_the_kernels() -> None:
    for module, names in GRAPH.items():
        if wing_of(module) == "testing":
            assert {wing_of(name) for name in names} <= {"testing"}


class TestPublicNames:
    def test_all_of_them_are_documented(self) -> None:
        for name in curvop.__all__:
            assert getattr(curvop, name).__doc__

    def test_tab_completion_shows_nothing_else(self) -> None:
        assert sorted(dir(curvop)) == sorted([*curvop.__all__, "__version__"])

    def test_modules_that_scripts_import_by_path(self) -> None:
        from curvop import preconditioner, problems, submatrix, utils
        from curvop.examples import functorch

        assert utils.allclose_report is curvop.allclose_report
        assert submatrix.SubmatrixLinearOperator is curvop.SubmatrixLinearOperator
        assert functorch.functorch_hessian is curvop.functorch_hessian
        assert preconditioner is curvop.preconditioner
        assert {"digits", "load", "ProblemError"} <= set(problems.__all__)

"""Every block of code in the documentation runs, and prints what the page says.

The Python blocks of a page run in their order in one namespace; a block of ``text`` is what the one before it printed.
What differs from one machine to the next is not compared: sizes of errors (in units of epsilon, or with an exponent),
numbers of products, times and bytes. A ``bash`` block is commands: those of ``curvop`` run, on problems that are there;
what else there is has to be a step of ``.ci``, where it runs as it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from pages import ROOT, Block, blocks

import curvop.utils
from curvop.cli.main import main
from curvop.examples import functorch

PAGES = [ROOT / "README.rst", ROOT / "CONTRIBUTING.rst", *sorted((ROOT / "docs").glob("*.rst"))]
LANGUAGES = {"python", "text", "bash"}
VARYING = re.compile(r"-?\d[\d.,]*e[+-]\d+|\d[\d.,]*(?= (?:products|times epsilon|s|ms|gradients|MB|GB)\b)")


def of(path: Path, *languages: str) -> list[Block]:
    return [block for block in blocks(path) if block.language in languages]


def commands(path: Path) -> list[str]:
    return [line for block in of(path, "bash") for line in block.code.splitlines() if line.startswith("curvop ")]


def pages(where: Callable[[Path], object] = lambda path: True) -> Any:
    return pytest.mark.parametrize("path", [path for path in PAGES if where(path)], ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path) -> Iterator[None]:
    """Run in an empty folder, and draw without a screen."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pages()
def test_blocks_are_of_kinds_that_run(path: Path) -> None:
    before = None
    for block in blocks(path):
        assert block.language in LANGUAGES, f"{path.name}:{block.line}"
        assert block.language != "text" or before == "python", f"{path.name}:{block.line}: nothing printed this"
        before = block.language


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # of Lightning, as the next two
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.slow_cases("density", "solves", "eigenvalues", "layers", "start", "sharpness", "second_order")
@pages(lambda path: of(path, "python"))
def test_python_runs_and_prints_what_the_page_says(path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")  # as a launcher says it of the only process
    monkeypatch.setenv("WORLD_SIZE", "1")
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = ""
    with torch.random.fork_rng():
        for block in of(path, "python", "text"):
            where = f"{path.name}:{block.line}"
            if block.language == "text":
                checked(block.code, printed, where)
                continue
            code = block.code if torch.cuda.is_available() else without_cuda(block.code)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * (block.line - 1) + code, str(path), "exec"), namespace)
            printed = out.getvalue()


def without_cuda(code: str) -> str:
    return "\n".join(line for line in code.split("\n") if 'device="cuda"' not in line)


def checked(expected: str, printed: str, where: str) -> None:
    said, found = (VARYING.sub("#", text).split() for text in (expected, printed))
    if said != found:
        pytest.fail(f"{where}: the page says\n\n{expected}\nbut it printed\n\n{printed}", pytrace=False)


PROBLEM = """
import torch

def function():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    X, y = torch.randn(30, 20).double(), torch.randint(0, 3, (30,))
    params = dict(model.named_parameters())
    return dict(model=model, loss_function=torch.nn.CrossEntropyLoss(), params=params, data=[(X, y)])
"""


@pytest.mark.slow
@pages(commands)
def test_commands_run(path: Path, tmp_path, monkeypatch, capsys) -> None:
    for name in ("path/to/file.py", "package/module.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PROBLEM)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in commands(path):
        assert main(shlex.split(command)[1:]) == 0, f"{path.name}: {command}: {capsys.readouterr().err}"


@pages()
def test_other_commands_are_those_of_ci(path: Path) -> None:
    steps = "".join(script.read_text() for script in sorted((ROOT / ".ci").iterdir()))
    taken = re.findall(r"readme_line '(.+)'", steps)  # lines of the README that run as they stand
    installed = {extra for some in re.findall(r"\.\[([a-z,]+)\]", steps) for extra in some.split(",")}
    lines = [line for block in of(path, "bash") for line in block.code.splitlines()]
    for line in lines:
        if any(f"pip install {one} " in line for one in taken):
            assert line.strip() in (ROOT / "README.rst").read_text()
            continue
        for command in line.split(" && "):
            if command.startswith("python -m pip install"):
                assert set(re.findall("[a-z]+", command.split()[-1])) <= installed
                continue
            if command.startswith(".ci/"):
                assert (ROOT / command.split()[0]).exists(), f"{path.name}: {command}"
                continue
            if command.startswith(("curvop ", "torchrun ")) or not command:
                continue  # by tests here, and in test_distributed.py
            assert command in steps, f"{path.name}: nothing in .ci runs {command!r}"


def in_reference() -> set[str]:
    """Return the full names of what the reference lists."""
    module, names = "", set()
    for line in (ROOT / "docs" / "api" / "index.rst").read_text().splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif re.fullmatch(r"   [A-Za-z_.]+", line):
            names.add(f"{module}.{line.strip()}")
    return names


@pytest.mark.parametrize(
    "module",
    [curvop, curvop.callbacks, curvop.distributed, curvop.preconditioner, curvop.spectrum, curvop.utils, functorch],
    ids=lambda module: module.__name__,
)
def test_every_public_name_is_in_the_reference(module: Any) -> None:
    elsewhere = {"functorch_hessian": "curvop.examples.functorch", "allclose_report": "curvop"}
    listed = in_reference()
    for name in module.__all__:
        public = getattr(module, name)
        if not isinstance(public, ModuleType):
            owner = elsewhere.get(name, module.__name__)
            assert f"{owner}.{name}" in listed


def extension(name: str) -> Any:
    """Return an extension of the site as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_ext" / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured() -> Any:
    return extension("measured")


def toctree(name: str) -> list[str]:
    """Return the pages that the last table of contents of a page lists."""
    listed = (ROOT / "docs" / f"{name}.rst").read_text().rpartition(".. toctree::")[2].split("\n\n", 1)[1]
    return [line.split()[-1].strip("<>") for line in listed.split("\n") if line.strip()]


QUESTIONS = {
    "sharpness": "How sharp is my minimum?",
    "indefinite": "Is my Hessian indefinite, and how much?",
    "harmful_examples": "Which training examples hurt?",
    "second_order": "How do I train with second order?",
    "large_model": "My model is too large",
}


class TestTasks:
    @pytest.mark.parametrize("name", QUESTIONS)
    def test_a_page_has_a_question_code_a_figure_pitfalls_and_links(self, name: str) -> None:
        page = (ROOT / "docs" / f"{name}.rst").read_text()
        parts = QUESTIONS[name], ".. code-block:: python", ".. drawn::", "What can go wrong\n", "Where to go on\n"
        places = [page.index(part) for part in parts]
        assert places == sorted(places)
        assert page.startswith(QUESTIONS[name])

    def test_the_start_page_leads_to_the_questions(self) -> None:
        page = (ROOT / "docs" / "index.rst").read_text()
        assert [name for name in re.findall(":doc:`(.+?)`", page) if name in QUESTIONS] == list(QUESTIONS)

    def test_the_pages_are_a_path(self) -> None:
        path = ["start", "tasks", "topics", "gallery/index", "api/index", "coming_from", "project"]
        assert toctree("index") == path
        assert toctree("tasks") == list(QUESTIONS)
        assert toctree("coming_from") == ["curvlinops", "pyhessian", "eigenthings"]

    def test_a_figure_is_that_of_the_code_above_it(self, tmp_path) -> None:
        page = tmp_path / "page.rst"
        above = ".. code-block:: python\n\n    import matplotlib.pyplot as plt\n    plt.figure(figsize=(2, 1))\n\n"
        page.write_text(above + ".. drawn::\n\n.. code-block:: python\n\n    raise ValueError\n")
        extension("drawn").draw(page, 7, tmp_path / "drawn" / "page.svg")
        assert "<svg" in (tmp_path / "drawn" / "page.svg").read_text()


class TestFigures:
    @pytest.mark.parametrize("name", ["choices", "comparison", "memory"])
    def test_none_is_typed(self, name: str) -> None:
        page = (ROOT / "docs" / f"{name}.rst").read_text()
        for block in blocks(ROOT / "docs" / f"{name}.rst"):
            page = page.replace(textwrap.indent(block.code, "    "), "")
        assert not re.findall(r"\b\d[\d.,]*(?: times| ?ms\b| ?s\b| ?[MG]i?B\b| ?%)", page)

    def test_tables_hold_what_was_measured(self) -> None:
        rows = json.loads((ROOT / "benchmarks" / "results" / "fastest.json").read_text())["rows"]
        table = measured().TABLES["product"]()
        for row in rows:
            if row["work"] == "product":
                assert f"{row['P']:,}" in table
                for name in ("curvop", "PyHessian loader"):
                    if name in row["by"]:
                        shown = row["by"][name]["ms"]
                        assert f"{shown / 1e3 if shown >= 1e3 else shown:.3g}\N{NO-BREAK SPACE}" in table

    def test_the_gain_of_ranks_stands_beside_how_far_their_products_differ(self, tmp_path, monkeypatch) -> None:
        module = measured()
        product = {"seconds alone": 0.25, "seconds shared": 0.125, "gain": 2.0, "relative difference": 3e-16}
        (tmp_path / "distributed.json").write_text(json.dumps({"ranks": 2, "products": {"a model, ggn": product}}))
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        cells = re.findall(r"- (.*)", module.distributed().replace("\N{NO-BREAK SPACE}", " "))
        assert cells[:5] == ["product", "one rank", "2 ranks", "gain", "difference"]
        assert cells[5:] == ["a model, ggn", "250 ms", "125 ms", "2.00", "3e-16"]

    def test_ratios_are_those_of_the_fastest_peer(self) -> None:
        rows = json.loads((ROOT / "benchmarks" / "results" / "fastest.json").read_text())["rows"]
        peers = ["curvlinops to_scipy", "curvlinops compiled", "eigenthings", "PyHessian loader"]
        found = []
        for row in rows:
            if row["work"] == "product" and row["model"] != "GPT-2 124M":  # its only batch is one that PyHessian keeps
                times = [row["by"][peer]["ms"] for peer in peers if "ms" in row["by"].get(peer, {})]
                found.append(min(times) / row["by"]["curvop"]["ms"])
        assert measured().FIGURES["product ratio"]() == f"{statistics.geometric_mean(found):.1f}"

    def test_who_is_faster_is_named(self, tmp_path, monkeypatch) -> None:
        module = measured()
        by = {"curvop": 4.0, "curvop compiled": 2.0, "curvlinops compiled": 1.0, "eigenthings": 3.0, "gradient": 0.5}
        wrong = {"PyHessian loader": {"error": 0.1}}
        slower = {"curvop": {"ms": 1.0}, "curvop, one batch": {"ms": 0.5}, "PyHessian single": {"ms": 0.75}}
        rows = [
            {"model": "a", "work": "product", "P": 3, "by": {name: {"ms": ms} for name, ms in by.items()} | wrong},
            {"model": "b", "work": "product", "P": 3, "by": slower},
        ]
        older = [row | {"by": {"curvop": {"ms": 9.0}, "eigenthings": {"ms": 1.0}}} for row in rows]
        (tmp_path / "peers.json").write_text(json.dumps({"rows": older}))  # other times of the same work
        (tmp_path / "fastest.json").write_text(json.dumps({"rows": rows}))
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        cells = re.findall(r"- (.*)", module.faster().replace("\N{NO-BREAK SPACE}", " "))
        assert cells[7:] == ["product", "a", "curvlinops, compiled by hand", "1 ms", "4 ms", "2 ms", "4.00"]

    def test_every_table_and_figure_has_its_place(self) -> None:
        text = "".join(path.read_text() for path in PAGES)
        module = measured()
        for name, make in module.TABLES.items():
            assert f".. measured:: {name}\n" in text
            assert make().count("   * - ") > 1
        for name, make in module.FIGURES.items():
            assert f"|{name}|" in text
            assert make()


@pytest.mark.peers
def test_every_name_of_curvlinops_has_its_counterpart() -> None:
    page = (ROOT / "docs" / "curvlinops.rst").read_text()
    for name in pytest.importorskip("curvlinops").__all__:
        assert f"``{name}" in page

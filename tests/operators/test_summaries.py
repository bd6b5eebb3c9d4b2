"""Results show what ``print`` shows, and a table with a picture in a notebook. Operators say what they are."""

from __future__ import annotations

import base64
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn

from curvop import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    InverseLinearOperator,
    JacobianLinearOperator,
    JournaledLinearOperator,
    KFACLinearOperator,
    PerExampleGradientLinearOperator,
    SubmatrixLinearOperator,
    check,
    compare,
    distributed,
    preconditioner,
    solve,
    spectrum,
)
from curvop.checks.check_report import Finding
from curvop.operators.kronecker_spectrum import LayerEigenvalues
from curvop.operators.summaries import Summary, abridged, text_lines
from curvop.spectrum import BoundedEstimate, Estimate, Tracker

ODD = "<lambda> & co"  # a name that must be escaped


def problem(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    X, y = torch.randn(64, 4).to(dtype), torch.randint(0, 3, (64,))
    return (
        model,
        nn.CrossEntropyLoss(),
        dict(model.named_parameters()),
        list(zip(X.split(24), y.split(24), strict=True)),
    )


@functools.cache
def hessian() -> HessianLinearOperator:
    return HessianLinearOperator(*problem())


def tracker(steps: int, **settings: Any) -> Tracker:
    model, loss, params, data = problem()
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    tracked = spectrum.track(
        HessianLinearOperator(model, loss, params, data),
        every=2,
        **{name: optimizer if value == "sgd" else value for name, value in settings.items()},
    )
    for _ in range(steps):
        tracked.step()
    return tracked


def blocks() -> spectrum.BlockStudy:
    return spectrum.blocks(hessian(), groups={ODD: ["0.weight"], "b": ["0.bias"]}, rng=0)


def eigsh(k: int = 3) -> spectrum.EigenResult:
    return dataclasses.replace(spectrum.eigsh(hessian(), k, progress=False), note=ODD)


def columns(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((67, count))


RESULTS: dict[str, Callable[[], Summary]] = {
    "density": lambda: spectrum.density(hessian(), num_steps=8, rng=0, progress=False),
    "exact density": lambda: spectrum.density(np.diag(np.arange(5.0)), progress=False),
    "eigenvalues": eigsh,
    "eigenvalues without certificate": lambda: dataclasses.replace(eigsh(), certificate=None),
    "many eigenvalues": lambda: spectrum.eigsh(hessian(), 60, method="dense", progress=False),
    "no eigenvalues": lambda: dataclasses.replace(
        eigsh(), values=np.zeros(0), vectors=np.zeros((67, 0)), certificate=None
    ),
    "certificate": lambda: spectrum.certify(hessian(), *eigsh(), progress=False),
    "solution": lambda: dataclasses.replace(solve(hessian(), columns(1)[:, 0], damping=1.0), preconditioner=ODD),
    "solutions": lambda: solve(hessian(), columns(30), damping=1.0),
    "check": lambda: check(hessian(), rng=0),
    "failed check": lambda: check(aslinearoperator(np.triu(np.ones((4, 4)))), rng=0),
    "finding": lambda: Finding("name", "warning", ODD, 1e-3, 1e-6, "do this"),
    "blocks": blocks,
    "unfinished blocks": lambda: dataclasses.replace(blocks(), unfinished=["c"]),
    "comparison": lambda: compare(hessian().block_diagonal({ODD: ["0.weight", "0.bias"]}), hessian(), rng=0),
    "layers": lambda: LayerEigenvalues.of_layers({ODD: np.array([3.0, 1.0]), "fc": np.array([2.0])}),
    "function": lambda: spectrum.apply(hessian(), np.exp, columns(1)[:, 0]),
    "functions": lambda: spectrum.apply(hessian(), np.exp, columns(2)),
    "cost": lambda: dataclasses.replace(hessian().cost(1), reduced_precision=ODD),
    "new tracker": lambda: tracker(0),
    "tracker": lambda: tracker(60, k=2),
    "tracker with optimizer": lambda: tracker(3, optimizer="sgd"),
}
WITHOUT_TABLE = {"no eigenvalues", "new tracker"}
SAME_TABLE = {
    *("eigenvalues", "eigenvalues without certificate", "many eigenvalues", "check", "failed check"),
    *("blocks", "unfinished blocks", "comparison", "layers"),
}


@functools.cache
def result(name: str) -> Summary:
    return RESULTS[name]()


class Page(HTMLParser):
    """The cells, texts and pictures of an HTML text, whose tags must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.pictures: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.texts.append(data)


def picture_of(name: str) -> tuple[str, bytes]:
    [source] = Page(result(name)._repr_html_()).pictures
    media, _, data = source.partition(";base64,")
    return media, base64.b64decode(data)


@pytest.mark.parametrize("name", RESULTS)
class TestResults:
    def test_the_repr_is_what_print_shows(self, name: str) -> None:
        text = repr(result(name))
        assert text == str(result(name))
        assert 0 < len(text) < 2000
        assert "array(" not in text
        assert "tensor(" not in text

    def test_a_notebook_shows_a_table(self, name: str) -> None:
        rows = Page(result(name)._repr_html_()).rows
        if name in WITHOUT_TABLE:
            assert not rows
            return
        assert len({len(row) for row in rows}) == 1
        assert 2 <= len(rows) <= 22

    def test_a_notebook_shows_the_printed_words(self, name: str) -> None:
        def words(text: str) -> set[str]:
            return set(text.replace("to do: ", "").split())

        page = Page(result(name)._repr_html_())
        shown = words(" ".join(page.texts))
        if name != "finding":  # its status is abbreviated in the table
            assert words(str(result(name))) <= shown
        if name in SAME_TABLE:
            printed = words(str(result(name)))
            assert all(words(cell) <= printed for row in page.rows[name.endswith("check") :] for cell in row)

    def test_names_are_escaped(self, name: str) -> None:
        html = result(name)._repr_html_()
        assert "<lambda>" not in html
        assert ("&lt;lambda&gt; &amp; co" in html) == (ODD in str(result(name)))

    def test_there_is_a_picture_if_there_is_a_plot(self, name: str) -> None:
        pytest.importorskip("matplotlib")
        if name in WITHOUT_TABLE or not hasattr(result(name), "plot"):
            assert not Page(result(name)._repr_html_()).pictures
            return
        media, content = picture_of(name)
        assert media == "data:image/svg+xml"
        assert ElementTree.fromstring(content).tag.endswith("svg")

    def test_matplotlib_is_not_needed(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        page = Page(result(name)._repr_html_())
        assert not page.pictures
        assert bool(page.rows) == (name not in WITHOUT_TABLE)

    def test_figures_of_the_user_are_left_alone(self, name: str) -> None:
        plt = pytest.importorskip("matplotlib.pyplot")
        own = plt.figure()
        before = plt.get_fignums()
        result(name)._repr_html_()
        assert plt.get_fignums() == before
        assert plt.gcf() is own
        assert not own.axes
        plt.close(own)


class TestTables:
    def test_the_middle_of_a_long_table_is_left_out(self) -> None:
        table = [("n", "square"), *((str(n), str(n * n)) for n in range(100))]
        head, *rows = abridged(table)
        assert head == table[0]
        assert rows == [*table[1:11], ["...", "..."], *table[-10:]]
        assert abridged(table[:21]) == table[:21]

    def test_columns_are_aligned(self) -> None:
        assert text_lines([("", "value"), ("first", "1"), ("b", "1,000")]) == [
            "       value",
            "first      1",
            "b      1,000",
        ]

    def test_the_table_of_eigenvalues(self) -> None:
        found = dataclasses.replace(eigsh(), values=np.array([-2.0, 0.5, 12345.678]), certificate=None)
        assert str(found).splitlines()[1:5] == [
            "   eigenvalue",
            "1          -2",
            "2         0.5",
            "3   12345.678",
        ]

    def test_a_large_picture_consists_of_pixels(self) -> None:
        pytest.importorskip("matplotlib")

        class Noise(Summary):
            def __str__(self) -> str:
                return "noise"

            def plot(self, ax: Any) -> None:
                ax.plot(columns(100).ravel(), ".")

        [source] = Page(Noise()._repr_html_()).pictures
        assert source.startswith("data:image/png;base64,")
        assert len(source) < 300_000

    def test_a_study_of_many_blocks_has_no_picture(self) -> None:
        study = blocks()
        count = 40
        many = dataclasses.replace(
            study,
            names=[f"layer {n}" for n in range(count)],
            sizes=np.full(count, study.sizes[1]),
            densities=[study.densities[1]] * count,
            norms=np.ones((count, count)),
            norm_errors=np.zeros((count, count)),
        )
        page = Page(many._repr_html_())
        assert len(page.rows) == 1 + count
        assert not page.pictures

    def test_the_picture_of_blocks_does_not_repeat_the_table(self) -> None:
        pytest.importorskip("matplotlib")
        figure = __import__("matplotlib.figure").figure.Figure()
        assert blocks()._draw_summary(figure)
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == ["block", ODD, "b"]


def test_estimates_are_short() -> None:
    assert repr(Estimate(np.float64(1.5), np.float64(0.5))) == "Estimate(value=1.5, error=0.5)"
    values = np.arange(900.0)
    text = repr(BoundedEstimate(values, values, values, values))
    assert len(text) < 500
    assert "low=array([" in text


@pytest.mark.parametrize("compute", [blocks, lambda: compare(hessian().block_diagonal(), hessian(), rng=0)])
def test_a_short_computation_shows_no_bar(
    compute: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("curvop.operators.progress._DELAY", 1000.0)
    compute()
    assert capfd.readouterr().err == ""


OPERATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "sum": (
        lambda: hessian() + GGNLinearOperator(*problem()),
        "_SumLinearOperator with dtype=float64: HessianLinearOperator + GGNLinearOperator, 4 parameters",
    ),
    "difference": (
        lambda: hessian() - 0.5 * GGNLinearOperator(*problem()),
        ": HessianLinearOperator - 0.5 * GGNLinearOperator, 4 parameters",
    ),
    "multiple of a sum": (
        lambda: -(hessian() + DiagonalLinearOperator(np.ones(67))),
        ": -(HessianLinearOperator + DiagonalLinearOperator), 4 parameters",
    ),
    "product": (
        lambda: hessian() @ hessian().damped(2),
        ": HessianLinearOperator @ (HessianLinearOperator + 2 * I), 4 parameters",
    ),
    "sum with an operator of SciPy": (
        lambda: hessian() + aslinearoperator(np.eye(67)),
        ": HessianLinearOperator + MatrixLinearOperator, 4 parameters",
    ),
    "long product": (lambda: hessian() ** 40, ": HessianLinearOperator @ HessianLinearOperator @ HessianLinear"),
    "damped": (
        lambda: hessian().damped(-1e-3),
        "DampedLinearOperator with dtype=float64: HessianLinearOperator - 0.001",
    ),
    "inverse": (lambda: InverseLinearOperator(hessian(), 0.1), ": inv(HessianLinearOperator + 0.1 * I), 4 parameters"),
    "block": (lambda: hessian().block("0.bias"), "<8x8 HessianLinearOperator with dtype=float64: 1 parameter (0.bias)"),
    "rectangular block": (
        lambda: hessian().block("0.bias", ["2.bias", "0.bias"]),
        "<8x11 HessianLinearOperator with dtype=float64: rows of 1 parameter (0.bias) and columns of 2 parameters "
        "(2.bias, 0.bias) in float64 on cpu, 3 batches",
    ),
    "diagonal blocks": (lambda: hessian().block_diagonal(), "BlockDiagonalLinearOperator with dtype=float64: diag(4 "),
    "blocks without names": (
        lambda: BlockDiagonalLinearOperator([aslinearoperator(np.eye(2))]),
        "<2x2 BlockDiagonalLinearOperator with dtype=float64: diag(1 block)>",
    ),
    "submatrix": (
        lambda: hessian()[:3, :][:, 5:7],
        "<3x2 SubmatrixLinearOperator with dtype=float64: of a 32x32 HessianLinearOperator, 1 parameter (0.weight) in "
        "float64 on cpu, 3 batches, autograd engine>",
    ),
    "submatrix of SciPy": (
        lambda: SubmatrixLinearOperator(aslinearoperator(np.eye(5)), [1], [2, 3]),
        "<1x2 SubmatrixLinearOperator with dtype=float64: of a 5x5 MatrixLinearOperator>",
    ),
    "KFAC": (lambda: KFACLinearOperator(*problem()), "<67x67 KFACLinearOperator with dtype=float64: 4 parameters"),
    "inverse of EKFAC": (lambda: EKFACLinearOperator(*problem()).inverse(0.1), " in float64 on cpu, 2 blocks>"),
    "Gram matrix": (
        lambda: EFLinearOperator(*problem()).damped(2).gram(),
        ": S @ S.T + 2 * I with S a 64x67 FactorLinearOperator, 4 parameters",
    ),
    "Jacobian": (
        lambda: JacobianLinearOperator(problem()[0], *problem()[2:]),
        "<192x67 JacobianLinearOperator with dtype=float64: 4 parameters",
    ),
    "transposed Jacobian": (
        lambda: JacobianLinearOperator(problem()[0], *problem()[2:]).T,
        "<67x192 TransposedJacobianLinearOperator with dtype=float64: 4 parameters",
    ),
    "gradients": (
        lambda: PerExampleGradientLinearOperator(*problem()),
        "<64x67 PerExampleGradientLinearOperator with dtype=float64: 4 parameters",
    ),
    "preconditioner": (
        lambda: preconditioner.nystrom(GGNLinearOperator(*problem()), damping=2.0, rank=5),
        "<67x67 NystromPreconditioner with dtype=float64: rank 5, damping 2, on cpu>",
    ),
    "diagonal": (
        lambda: DiagonalLinearOperator({"a": torch.ones(3)}),
        "<3x3 DiagonalLinearOperator with dtype=float32: 1 parameter (a) in float32 on cpu>",
    ),
}


class Unread:
    """Data that cannot be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the data were read")


class Sized(Unread):
    def __len__(self) -> int:
        return 1_000


class Broken(Unread):
    def __len__(self) -> int:
        raise RuntimeError("the length is unknown")


class TestOperators:
    def test_an_operator_names_its_parts(self) -> None:
        model, loss, params, data = problem(torch.float32)
        H = HessianLinearOperator(model, loss, params, data, engine="compiled")
        assert repr(H) == (
            "<67x67 HessianLinearOperator with dtype=float64: 4 parameters (0.weight, 0.bias, 2.weight, 2.bias) in "
            "float32 on cpu, 3 batches, compiled engine>"
        )
        assert str(H) == repr(H)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_every_operator_says_what_it_is(self, name: str) -> None:
        build, part = OPERATORS[name]
        text = repr(build())
        assert part in text
        assert len(text) < 300
        assert text.startswith("<")
        assert text.endswith(">")
        assert "\n" not in text

    def test_complex_factors_are_in_parentheses(self) -> None:
        H = hessian()
        assert ": HessianLinearOperator + (-1+2j) * HessianLinearOperator, " in repr(H + (-1 + 2j) * H)

    @pytest.mark.parametrize(("data", "part"), [(Unread(), ""), (Sized(), " 1,000 batches,"), (Broken(), "")])
    def test_no_data_are_read(self, data: Any, part: str) -> None:
        model, loss, params, _ = problem()
        H = GGNLinearOperator(model, loss, params, data)
        assert repr(H).endswith(f"(0.weight, 0.bias, 2.weight, 2.bias) in float64 on cpu,{part} autograd engine>")
        assert H.num_products == 0

    def test_many_names_are_counted(self) -> None:
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(torch.ones(1, 2),) * 2])
        assert ": 60 parameters in float32 on cpu, 1 batch, autograd engine>" in repr(H)

    def test_a_journal_names_the_operator(self, tmp_path: Any) -> None:
        with JournaledLinearOperator(hessian(), tmp_path) as J:
            assert repr(J).startswith("<67x67 JournaledLinearOperator with dtype=float64: of a 67x67 HessianLinearOper")
            assert str(J).startswith("journal in ")

    def test_an_operator_of_several_ranks(self) -> None:
        with distributed.serve(hessian()) as A:
            assert repr(A).startswith("<67x67 DistributedLinearOperator with dtype=float64: 4 parameters (0.weight, 0")
            assert repr(A).endswith(" in float64 on cpu, data of 1 rank>")

    def test_a_view_of_many_factors_is_short(self) -> None:
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
        X = torch.randn(5, 2)
        K = KFACLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, X)])
        assert len(repr(K.factors)) < 250
        assert repr(K.factors).endswith(" ...>")

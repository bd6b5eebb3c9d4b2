"""SciPy's solvers on the Hessian of a small network on handwritten digits agree with dense solutions."""

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.testing import assert_allclose
from scipy.sparse.linalg import (
    aslinearoperator,
    cg,
    eigsh,
    expm_multiply,
    gmres,
    lobpcg,
    lsmr,
    lsqr,
    minres,
    onenormest,
    svds,
)
from sklearn.datasets import load_digits
from torch import nn

from curvop import HessianLinearOperator

IMAGES, CLASSES = 120, 10


def digits_hessian():
    """The Hessian of a 64-3-10 network after a few training steps, and its dense matrix by double backward."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    X, y = torch.from_numpy(pixels[:IMAGES] / 16), torch.from_numpy(labels[:IMAGES])
    model = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, CLASSES)).double()
    params, loss = dict(model.named_parameters()), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(params.values(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    parts = torch.autograd.functional.hessian(
        lambda *values: loss(torch.func.functional_call(model, dict(zip(params, values, strict=True)), X), y),
        tuple(params.values()),
    )
    sizes = [value.numel() for value in params.values()]
    rows = [torch.cat([part.reshape(size, -1) for part in row], 1) for row, size in zip(parts, sizes, strict=True)]
    data = [(X[:50], y[:50]), (X[50:], y[50:])]
    return HessianLinearOperator(model, loss, params, data), torch.cat(rows).detach().numpy()


H, DENSE = digits_hessian()
P = len(DENSE)
EIGENVALUES = np.linalg.eigvalsh(DENSE)
WHERE = {name: np.arange(P)[where] for name, where in H.params_slices.items()}
LAST = np.concatenate([WHERE["2.weight"], WHERE["2.bias"]])
LAST_BLOCK = H.block(["2.weight", "2.bias"])
DENSE_LAST = DENSE[LAST, :][:, LAST]


def vector(length, columns=None, seed=0):
    return np.random.default_rng(seed).standard_normal((length,) if columns is None else (length, columns))


def relative_residual(dense, x, b):
    return np.linalg.norm(dense @ x - b) / np.linalg.norm(b)


def rectangles():
    """Blocks and submatrices that are not square, and their dense matrices."""
    generator = np.random.default_rng(1)
    rows, cols = generator.permutation(P)[:60], generator.permutation(P)[:25]
    yield "block", H.block("0.weight", "2.weight"), DENSE[WHERE["0.weight"], :][:, WHERE["2.weight"]]
    yield "adjoint of a block", H.block("0.weight", "2.weight").H, DENSE[WHERE["2.weight"], :][:, WHERE["0.weight"]]
    yield "submatrix", H.submatrix(rows, cols), DENSE[rows, :][:, cols]
    yield "damped submatrix", H.damped(0.1).submatrix(cols, rows), (DENSE + 0.1 * np.eye(P))[cols, :][:, rows]


LIMIT = {lsmr: {"maxiter": 3000}, lsqr: {"iter_lim": 3000}}
RECTANGLES = [pytest.param(A, dense, id=name) for name, A, dense in rectangles()]


def test_the_problem_is_what_these_tests_need():
    assert 200 < P < 400
    assert EIGENVALUES[0] < -1e-3 < 1e-3 < EIGENVALUES[-1]
    assert_allclose(H @ np.eye(P), DENSE, rtol=1e-10, atol=1e-13)


class TestEigenvalues:
    @pytest.mark.parametrize(("which", "wanted"), [("LA", EIGENVALUES[-6:]), ("SA", EIGENVALUES[:6])])
    def test_eigsh_at_either_end(self, which, wanted):
        values, vectors = eigsh(H, k=6, which=which, v0=vector(P))
        assert_allclose(np.sort(values), wanted, rtol=1e-9)
        assert np.linalg.norm(DENSE @ vectors - vectors * values, axis=0).max() < 1e-10
        assert_allclose(vectors.T @ vectors, np.eye(6), atol=1e-10)

    @pytest.mark.parametrize(
        ("A", "dense"),
        [
            pytest.param(H, DENSE, id="operator"),
            pytest.param(H.damped(-0.5), DENSE - 0.5 * np.eye(P), id="damped"),
            pytest.param(LAST_BLOCK, DENSE_LAST, id="block"),
            pytest.param(H.submatrix(slice(1, None, 2)), DENSE[1::2, 1::2], id="submatrix"),
        ],
    )
    def test_eigsh_at_both_ends(self, A, dense):
        values, vectors = eigsh(A, k=5, which="LM", v0=vector(len(dense)))
        wanted = np.linalg.eigvalsh(dense)
        assert_allclose(np.sort(values), np.sort(wanted[np.argsort(-np.abs(wanted))[:5]]), rtol=1e-9)
        assert np.linalg.norm(dense @ vectors - vectors * values, axis=0).max() < 1e-10

    @pytest.mark.parametrize("largest", [True, False])
    def test_lobpcg(self, largest):
        values, vectors = lobpcg(H, vector(P, 4), largest=largest, tol=1e-8, maxiter=400)
        wanted = EIGENVALUES[::-1][:4] if largest else EIGENVALUES[:4]
        assert_allclose(values, wanted, rtol=1e-9)
        assert np.linalg.norm(DENSE @ vectors - vectors * values, axis=0).max() < 1e-7

    def test_lobpcg_where_it_makes_a_dense_matrix_of_a_small_block(self):
        bias = H.block("2.bias")
        with pytest.warns(UserWarning, match="dense eigensolver"):
            values, _ = lobpcg(bias, vector(CLASSES, 3))
        assert_allclose(values, np.linalg.eigvalsh(DENSE[WHERE["2.bias"], :][:, WHERE["2.bias"]])[::-1][:3], rtol=1e-9)


class TestSquareSystems:
    def test_cg_where_damping_makes_it_positive_definite(self):
        damping, b = 0.1 - EIGENVALUES[0], vector(P)
        x, info = cg(H.damped(damping), b, rtol=1e-12)
        assert info == 0
        assert relative_residual(DENSE + damping * np.eye(P), x, b) < 1e-11
        assert_allclose(x, np.linalg.solve(DENSE + damping * np.eye(P), b), rtol=1e-8, atol=1e-9)

    def test_cg_on_the_last_layers_block_which_is_convex(self):
        b = DENSE_LAST @ vector(len(LAST))  # in the range; a common shift of all logits is in the null space
        x, info = cg(LAST_BLOCK, b, rtol=1e-10)
        assert info == 0
        assert relative_residual(DENSE_LAST, x, b) < 1e-9

    def test_cg_takes_a_newton_step(self):
        gradient, _ = LAST_BLOCK.gradient_and_loss()
        x, info = cg(LAST_BLOCK.damped(1e-3), gradient, rtol=1e-10)
        assert info == 0
        assert_allclose(x, np.linalg.solve(DENSE_LAST + 1e-3 * np.eye(len(LAST)), gradient), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("make", [lambda A: A, lambda A: A.submatrix(range(P))], ids=["operator", "submatrix"])
    def test_minres_on_an_indefinite_matrix(self, make):
        damping = -(EIGENVALUES[0] + EIGENVALUES[1]) / 2  # between the two lowest eigenvalues
        shifted, b = DENSE + damping * np.eye(P), vector(P)
        assert np.sum(np.linalg.eigvalsh(shifted) < 0) == 1
        x, info = minres(make(H.damped(damping)), b, rtol=1e-13, maxiter=2000)
        assert info == 0
        assert relative_residual(shifted, x, b) < 1e-9
        assert_allclose(x, np.linalg.solve(shifted, b), rtol=1e-5, atol=1e-6)

    def test_gmres_on_a_matrix_that_is_not_symmetric(self):
        damping, order = 0.1 - EIGENVALUES[0], np.roll(LAST, 1)
        A, dense = H.damped(damping).submatrix(order, LAST), (DENSE + damping * np.eye(P))[order, :][:, LAST]
        assert np.abs(dense - dense.T).max() > 0.1
        x, info = gmres(A, vector(len(LAST)), rtol=1e-11, restart=len(LAST))
        assert info == 0
        assert relative_residual(dense, x, vector(len(LAST))) < 1e-10
        assert_allclose(x, np.linalg.solve(dense, vector(len(LAST))), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("A", "dense"), RECTANGLES)
class TestRectangles:
    @pytest.mark.parametrize(("solver", "tol"), [("arpack", 0), ("lobpcg", 1e-7), ("propack", 0)])
    def test_svds(self, A, dense, solver, tol):
        u, s, vt = svds(A, k=3, solver=solver, tol=tol, rng=np.random.default_rng(0), maxiter=500)
        assert_allclose(np.sort(s), np.sort(np.linalg.svd(dense, compute_uv=False)[:3]), rtol=1e-8)
        assert np.linalg.norm(dense @ vt.T - u * s) < 1e-6
        assert np.linalg.norm(dense.T @ u - vt.T * s) < 1e-6

    @pytest.mark.parametrize("solver", [lsmr, lsqr])
    def test_damped_least_squares(self, A, dense, solver):
        b = vector(len(dense))
        x = solver(A, b, damp=0.1, atol=1e-13, btol=1e-13, **LIMIT[solver])[0]
        normal = dense.T @ dense + 0.01 * np.eye(dense.shape[1])
        assert relative_residual(normal, x, dense.T @ b) < 1e-9
        assert_allclose(x, np.linalg.solve(normal, dense.T @ b), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("solver", [lsmr, lsqr])
    def test_a_system_that_has_a_solution(self, A, dense, solver):
        b = dense @ vector(dense.shape[1])
        x = solver(A, b, atol=1e-13, btol=1e-13, conlim=0, **LIMIT[solver])[0]
        assert relative_residual(dense, x, b) < 1e-6

    def test_onenormest(self, A, dense):
        estimates = []
        for seed in range(4):  # a lower bound, whose start comes from NumPy's global generator
            np.random.seed(seed)  # noqa: NPY002
            estimates.append(onenormest(A.H @ A, t=4))
        exact = np.abs(dense.T @ dense).sum(0).max()
        assert_allclose(max(estimates), exact, rtol=1e-10)


class TestFunctionsOfTheMatrix:
    @pytest.mark.parametrize("columns", [None, 2])
    def test_expm_multiply(self, columns):
        x = vector(P, columns)
        actual = expm_multiply(-1.0 * H, x, traceA=-np.trace(DENSE))
        assert_allclose(actual, scipy.linalg.expm(-DENSE) @ x, rtol=1e-10, atol=1e-10)

    def test_expm_multiply_over_a_time_span(self):
        x = vector(len(LAST))
        flow = expm_multiply(-LAST_BLOCK, x, start=0, stop=2, num=3, traceA=-np.trace(DENSE_LAST))
        for time, actual in zip((0, 1, 2), flow, strict=True):
            assert_allclose(actual, scipy.linalg.expm(-time * DENSE_LAST) @ x, rtol=1e-10, atol=1e-10)

    def test_onenormest(self):
        norm, v, w = onenormest(H, t=5, compute_v=True, compute_w=True)
        exact = np.abs(DENSE).sum(0).max()
        assert 0.9 * exact < norm < (1 + 1e-10) * exact
        assert_allclose(w, DENSE @ v, rtol=1e-9, atol=1e-12)
        assert_allclose(np.abs(w).sum(), norm)


COMPOSITES = {
    "H @ H": (H @ H, DENSE @ DENSE),
    "2 * H - H": (2 * H - H, DENSE),
    "H.T": (H.T, DENSE.T),
    "H.H": (H.H, DENSE.T),
    "-H": (-H, -DENSE),
    "H / 4": (H / 4, DENSE / 4),
    "H ** 3": (H**3, DENSE @ DENSE @ DENSE),
    "H + (1 + 2j) * H": (H + (1 + 2j) * H, (2 + 2j) * DENSE),
    "H @ matrix": (H @ aslinearoperator(DENSE), DENSE @ DENSE),
    "matrix @ H": (aslinearoperator(DENSE) @ H, DENSE @ DENSE),
    "damped - H": (H.damped(0.5) - H, 0.5 * np.eye(P)),
    "a Gram matrix of a block": (
        H.block("2.bias", "0.bias").H @ H.block("2.bias", "0.bias"),
        DENSE[WHERE["0.bias"], :][:, WHERE["2.bias"]] @ DENSE[WHERE["2.bias"], :][:, WHERE["0.bias"]],
    ),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name):
    A, dense = COMPOSITES[name]
    x, X = vector(dense.shape[1]), vector(dense.shape[1], 3)
    for actual, wanted in (
        (A @ x, dense @ x),
        (A @ X, dense @ X),
        (A @ X[:, :1], dense @ X[:, :1]),
        (x @ A, x @ dense),
        (X.T @ A, X.T @ dense),
        (A.H @ X, dense.conj().T @ X),
        (A.T @ x, dense.T @ x),
    ):
        assert actual.shape == wanted.shape
        assert_allclose(actual, wanted, rtol=1e-9, atol=1e-10)

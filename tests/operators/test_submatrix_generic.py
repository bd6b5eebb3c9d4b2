"""Submatrices of any SciPy operator agree with NumPy's ``dense[rows, :][:, cols]``."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from submatrix_cases import numpys, selections

from curvop import SubmatrixLinearOperator

M, N = 5, 7


class OnlyMatvec(LinearOperator):
    """A matrix that multiplies one vector at a time."""

    def __init__(self, matrix, dtype):
        super().__init__(dtype, matrix.shape)
        self.matrix = matrix

    def _matvec(self, x):
        return self.matrix @ x

    def _rmatvec(self, x):
        return self.matrix.conj().T @ x


class OnlyMatmat(LinearOperator):
    """A matrix that multiplies matrices."""

    def __init__(self, matrix, dtype):
        super().__init__(dtype, matrix.shape)
        self.matrix = matrix

    def _matmat(self, X):
        return self.matrix @ X

    def _rmatmat(self, X):
        return self.matrix.conj().T @ X


class Identity(LinearOperator):
    """Returns its input itself, not a copy."""

    def __init__(self, length, dtype=None):
        super().__init__(dtype, (length, length))

    def _matvec(self, x):
        return x

    def _matmat(self, X):
        return X

    def _adjoint(self):
        return self


class Counting(OnlyMatmat):
    """Records the number of columns of each product, as seen by ``_matvec`` and ``_matmat``."""

    def __init__(self, matrix):
        super().__init__(matrix, matrix.dtype)
        self.matvecs, self.matmats, self.rmatmats = 0, [], []

    def _matvec(self, x):
        self.matvecs += 1
        return self.matrix @ x

    def _matmat(self, X):
        self.matmats.append(X.shape[1])
        return super()._matmat(X)

    def _rmatmat(self, X):
        self.rmatmats.append(X.shape[1])
        return super()._rmatmat(X)


def random(shape, dtype=np.float64):
    generator = np.random.default_rng(0)
    if np.issubdtype(dtype, np.complexfloating):
        return (generator.standard_normal(shape) + 1j * generator.standard_normal(shape)).astype(dtype)
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2 if dtype == np.bool_ else 5, shape).astype(dtype)


REAL, SQUARE, COMPLEX, TALL = random((M, N)), random((N, N)), random((M, N), np.complex128), random((N, M))
SPARSE = random((M, N)) * (random((M, N), np.int64) > 2)
MATRICES = {
    np.dtype(dtype).name: random((M, N), dtype)
    for dtype in (np.float64, np.float32, np.int64, np.int8, np.uint8, np.bool_, np.complex128, np.complex64)
}
OPERATORS = {name: (aslinearoperator(matrix), matrix) for name, matrix in MATRICES.items()} | {
    "square": (aslinearoperator(SQUARE), SQUARE),
    "Fortran order": (aslinearoperator(np.asfortranarray(TALL)), TALL),
    "csr": (aslinearoperator(sparse.csr_array(SPARSE)), SPARSE),
    "csc": (aslinearoperator(sparse.csc_array(SPARSE)), SPARSE),
    "complex csr": (aslinearoperator(sparse.csr_array(SPARSE * 1j)), SPARSE * 1j),
    "integer csc matrix": (aslinearoperator(sparse.csc_matrix(MATRICES["int64"])), MATRICES["int64"]),
    "sum": (aslinearoperator(REAL) + aslinearoperator(COMPLEX), REAL + COMPLEX),
    "difference": (aslinearoperator(sparse.csr_array(SPARSE)) - aslinearoperator(REAL), SPARSE - REAL),
    "product": (aslinearoperator(TALL) @ aslinearoperator(COMPLEX), TALL @ COMPLEX),
    "scaled": (3 * aslinearoperator(REAL), 3 * REAL),
    "scaled by a complex number": ((2 - 1j) * aslinearoperator(REAL), (2 - 1j) * REAL),
    "negative": (-aslinearoperator(SQUARE), -SQUARE),
    "power": (aslinearoperator(SQUARE) ** 3, np.linalg.matrix_power(SQUARE, 3)),
    "transpose": (aslinearoperator(COMPLEX).T, COMPLEX.T),
    "adjoint": (aslinearoperator(COMPLEX).H, COMPLEX.conj().T),
    "identity": (Identity(N), np.eye(N)),
    "only matvec": (OnlyMatvec(COMPLEX, COMPLEX.dtype), COMPLEX),
    "only matmat": (OnlyMatmat(COMPLEX, COMPLEX.dtype), COMPLEX),
    "no dtype, only matvec": (OnlyMatvec(COMPLEX, None), COMPLEX),
    "no dtype, only matmat": (OnlyMatmat(REAL, None), REAL),
    "functions": (
        LinearOperator((M, N), lambda x: COMPLEX @ x, rmatvec=lambda x: COMPLEX.conj().T @ x, dtype=COMPLEX.dtype),
        COMPLEX,
    ),
}


def inputs(length):
    """All kinds of vectors and matrices that SciPy's solvers and users pass."""
    generator = np.random.default_rng(1)
    real = generator.standard_normal((length, 4))
    yield from (real[:, 0], real, real[:, :1], real[:, :0], real[::-1, ::-2], np.asfortranarray(real))
    yield real[:, 0] + 1j * real[:, 1]
    yield real.astype(np.float32)
    yield (real > 0).astype(np.int8)


def assert_is(operator, expected):
    assert operator.shape == expected.shape
    tolerance = 1e-5 if np.result_type(expected.dtype, np.float32) != np.result_type(expected.dtype, np.float64) else 0
    for x in inputs(expected.shape[1]):
        before = x.copy()
        actual, wanted = operator @ x, expected @ x
        rough = max(tolerance, 1e-5 if x.dtype == np.float32 else 1e-12)
        assert isinstance(actual, np.ndarray)
        assert actual.shape == wanted.shape
        assert_allclose(actual, wanted, rtol=rough, atol=50 * rough)
        assert_array_equal(x, before)
        assert not np.shares_memory(actual, x)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(list(OPERATORS)), st.data())
def test_rows_and_columns_are_those_of_the_dense_matrix(name, data):
    A, dense = OPERATORS[name]
    rows, cols = (data.draw(selections(length)) for length in A.shape)
    S, expected = SubmatrixLinearOperator(A, rows, cols), dense[numpys(rows), :][:, numpys(cols)]
    assert_is(S, expected)
    assert_is(S.H, expected.conj().T)
    assert_is(S.T, expected.T)
    assert_is(S.H.H, expected)
    assert_is(S.T.H, expected.conj())


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(OPERATORS)), st.data())
def test_a_submatrix_of_a_submatrix_stays_one_level_deep(name, data):
    A, dense = OPERATORS[name]
    S = A
    for _ in range(3):
        rows, cols = (data.draw(selections(length)) for length in S.shape)
        S, dense = SubmatrixLinearOperator(S, rows, cols), dense[numpys(rows), :][:, numpys(cols)]
        assert S._A is A
    assert_is(S, dense)
    assert_is(S[:, ::-1][[], :], dense[:, ::-1][[], :])


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(OPERATORS)), st.data())
def test_inner_products_with_the_adjoint(name, data):
    A, dense = OPERATORS[name]
    S = SubmatrixLinearOperator(A, *(data.draw(selections(length)) for length in A.shape))
    u, v = (random((length,), np.complex128) for length in S.shape)
    tolerance = 1e-4 if dense.dtype.itemsize <= 8 and dense.dtype.kind in "fc" and dense.dtype != float else 1e-10
    assert_allclose(np.vdot(u, S @ v), np.vdot(S.H @ u, v), rtol=tolerance, atol=tolerance)
    assert_allclose(u @ (S @ v), (S.T @ u) @ v, rtol=tolerance, atol=tolerance)
    assert_allclose(u @ (S @ v), (u @ S) @ v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MATRICES)
def test_products_have_the_dtype_that_numpy_gives_them(name):
    S, expected = SubmatrixLinearOperator(aslinearoperator(MATRICES[name]), [1, 1, 3], [0, 6, 6]), MATRICES[name]
    assert S.dtype == expected.dtype
    for dtype in (np.int8, np.uint8, np.int64, np.float32, np.float64, np.complex64, np.complex128):
        for shape in ((3,), (3, 2), (3, 0)):
            assert (S @ np.ones(shape, dtype)).dtype == (expected[:3, :3] @ np.ones(shape, dtype)).dtype


@pytest.mark.parametrize("dtype", [None, np.float64])
def test_a_repeated_column_does_not_overflow_in_small_integers(dtype):
    S = SubmatrixLinearOperator(OnlyMatmat(SQUARE, dtype), [0, 1], [3] * 200)
    assert_allclose(S @ np.ones(200, np.int8), 200 * SQUARE[:2, 3])


def test_a_selection_that_is_self_adjoint_in_a_self_adjoint_operator_is_its_own_adjoint():
    class Symmetric(OnlyMatmat):
        def _adjoint(self):
            return self

    for dense in (SQUARE + SQUARE.T, SQUARE + SQUARE.T + 1j * (SQUARE - SQUARE.T)):
        S = SubmatrixLinearOperator(Symmetric(dense, dense.dtype), [4, 1, 1], [4, 1, 1])
        assert S.H is S
        assert_is(S.T, dense[[4, 1, 1], :][:, [4, 1, 1]].T)


@pytest.mark.parametrize("cols", [[0, 3], [3, 3, -1], slice(None), slice(2, 5)])
def test_a_matrix_product_is_one_matmat_and_a_vector_product_one_matvec(cols):
    A = Counting(REAL)
    S = SubmatrixLinearOperator(A, [4, 0, 0], cols)
    S @ np.ones((S.shape[1], 6))
    assert (A.matvecs, A.matmats) == (0, [6])
    S @ np.ones(S.shape[1])
    assert A.matvecs + len(A.matmats) == 2
    S.H @ np.ones((3, 5))
    assert A.rmatmats == [5]
    assert S.num_products == S.H.num_products == 12


@pytest.mark.parametrize(("rows", "cols"), [([], [0, 1]), ([0, 1], []), ([], []), (slice(3, 3), slice(None))])
def test_empty_selections_have_empty_or_zero_products_and_cost_nothing(rows, cols):
    A = Counting(REAL)
    S, expected = SubmatrixLinearOperator(A, rows, cols), REAL[rows, :][:, cols]
    assert_is(S, expected)
    assert_is(S.H, expected.T)
    assert (A.matvecs, A.matmats, A.rmatmats, S.num_products) == (0, [], [], 0)


class TestWhatGoesInAndWhatComesOut:
    def test_the_result_is_fresh(self):
        class Buffered(Identity):
            """Returns the same array every time."""

            buffer = np.zeros((N, 2))

            def _matmat(self, X):
                self.buffer[:] = X
                return self.buffer

        for A in (Identity(N), Identity(N, np.float64), Buffered(N, np.float64)):
            for rows in (slice(None), [1, 2, 3, 4, 5, 6, 0], slice(0, 3)):
                S, X = SubmatrixLinearOperator(A, rows, slice(None)), random((N, 2))
                product = S @ X
                again = S @ (2 * X)
                assert_array_equal(product, np.eye(N)[rows] @ X)
                product[:] = np.nan
                assert_array_equal(again, np.eye(N)[rows] @ (2 * X))
                assert_array_equal(X, random((N, 2)))

    def test_an_operator_that_overwrites_its_input_cannot_reach_it(self):
        class InPlace(Identity):
            def _matvec(self, x):
                x *= 2
                return x

            _matmat = _matvec

        S = SubmatrixLinearOperator(InPlace(N, np.float64), slice(None), slice(None))
        for x in (np.ones(N), np.ones((N, 3)), np.ones((3, N)).T):
            assert_array_equal(S @ x, 2 * np.ones(x.shape))
            assert_array_equal(x, np.ones(x.shape))

    def test_inputs_may_be_read_only(self):
        x = random((3, 2))
        x.flags.writeable = False
        S = SubmatrixLinearOperator(aslinearoperator(REAL), [0, 1], [2, 2, 3])
        assert_allclose(S @ x, REAL[:2][:, [2, 2, 3]] @ x)
        assert_allclose(S @ x[::-1, 0], REAL[:2][:, [2, 2, 3]] @ x[::-1, 0])

    def test_lists_are_vectors_too(self):
        S = SubmatrixLinearOperator(aslinearoperator(REAL), [0, 1], [2, 2, 3])
        assert_allclose(S @ [1, 2, 3], REAL[:2][:, [2, 2, 3]] @ [1, 2, 3])
        assert_allclose([1.0, 2.0] @ S, [1.0, 2.0] @ REAL[:2][:, [2, 2, 3]])

    @pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2), (3, 0)])
    def test_a_tensor_is_refused_where_the_operator_takes_none(self, shape):
        for rows in ([0, 1], []):
            S = SubmatrixLinearOperator(aslinearoperator(REAL), rows, [2, 2, 3])
            with pytest.raises(TypeError, match="NumPy arrays only"):
                S @ torch.ones(shape)

    @pytest.mark.parametrize("not_an_operator", [REAL, sparse.csr_array(REAL), None, "A"])
    def test_what_is_no_operator_is_refused(self, not_an_operator):
        with pytest.raises(TypeError, match="LinearOperator"):
            SubmatrixLinearOperator(not_an_operator, [0], [0])

"""Submatrices of a Hessian multiply tensors like arrays, count products, and have no side effects."""

import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from submatrix_cases import DAMPED, DAMPING, DENSE, H, P, hessian, mlp, part

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
ROWS, COLS = [0, 13, -1, 13], [21, 2, 2]


class TestTensors:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_come_out_with_the_dtype_and_the_device_they_went_in_with(self, device, dtype):
        A = hessian(mlp(device=device))
        tolerance = 8 * torch.finfo(dtype).eps
        for operator, dense in ((A, DENSE), (A.damped(DAMPING), DAMPED)):
            S = operator.submatrix(ROWS, COLS)
            expected = torch.from_numpy(part(dense, ROWS, COLS)).to(device)
            for x in (torch.ones(3), torch.eye(3), torch.ones(3, 1), torch.eye(3).T[:, ::2], torch.ones(3, 0)):
                x = x.to(device, dtype)
                before, product = x.clone(), S @ x
                assert (product.dtype, product.device) == (x.dtype, x.device)
                torch.testing.assert_close(product.double(), expected @ x.double(), rtol=tolerance, atol=tolerance)
                assert torch.equal(x, before)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float16])
    def test_columns_that_repeat_add_in_the_operators_precision(self, dtype):
        S, dense = H[:, [0, 0, 1]], DENSE[:, [0, 0, 1]]
        x = torch.tensor([100, 100, 3]).to(dtype)
        assert_allclose(S @ x.numpy(), dense @ x.double().numpy(), rtol=1e-12, atol=1e-14)
        product = S @ x
        rtol = 8 * torch.finfo(product.dtype).eps
        assert_allclose(product.double(), dense @ x.double().numpy(), rtol=rtol, atol=rtol)

    def test_a_sum_of_columns_beyond_the_vectors_range(self):
        x = np.full(50, 2000, np.float16)
        assert_allclose(H[:, [0] * 50] @ x, 100_000 * DENSE[:, 0], rtol=1e-12)

    def test_from_the_left_and_through_the_adjoint(self):
        S, expected = H.submatrix(ROWS, COLS), torch.from_numpy(part(DENSE, ROWS, COLS))
        y, Y = torch.randn(4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
        for actual, wanted in (
            (y @ S, y @ expected),
            (Y @ S, Y @ expected),
            (S.H @ Y.T, expected.T @ Y.T),
            (S.rmatvec(y), expected.T @ y),
            (S.matmat(torch.eye(3)), expected.float()),
        ):
            torch.testing.assert_close(actual, wanted)

    def test_empty_selections(self):
        x = torch.ones(5, 2)
        assert torch.equal(H.submatrix([], range(5)) @ x, torch.ones(0, 2))
        assert torch.equal(H.submatrix(range(5), []) @ x[:0], torch.zeros(5, 2))

    def test_gradients_do_not_flow_through(self):
        assert not (H.submatrix([0, 1]) @ torch.ones(2, requires_grad=True)).requires_grad

    @pytest.mark.parametrize("shape", [(3, 3), (2, 3), (1, 3), (5, 3)])
    def test_matvec_takes_a_stack_of_rows_for_what_scipy_takes_it(self, shape):
        S = H.submatrix(ROWS, COLS)

        def outcome(X):
            try:
                return S.matvec(X)
            except ValueError:  # SciPy 1.17 multiplies one vector only
                return np.nan

        X = np.random.default_rng(3).standard_normal(shape)
        assert_allclose(outcome(torch.from_numpy(X)), outcome(X), rtol=1e-12)

    @pytest.mark.parametrize("shape", [(4,), (4, 2), (2, 4)])
    def test_a_wrong_shape_is_told_with_both(self, shape):
        S = H.submatrix(ROWS, COLS)
        for x in (torch.ones(shape), np.ones(shape)):
            with pytest.raises(ValueError, match=r"x has shape .*but A has shape \(4, 3\)"):
                S @ x


class TestTheOperatorItself:
    def test_num_products_counts_the_columns_of_products_with_it_and_its_adjoint(self):
        S = H.submatrix([0, 13, 29], [1, 2])
        assert S.num_products == 0
        S @ np.ones(2)
        S @ np.ones((2, 5))
        S @ np.ones((2, 0))
        S.H @ np.ones((3, 4))
        S @ torch.ones(2, 3)
        assert S.num_products == S.H.num_products == 13

    def test_a_product_that_is_refused_is_not_counted(self):
        S = H.submatrix([0, 13, 29], [1, 2])
        for x in (np.ones(2, complex), torch.ones(2, dtype=torch.complex64)):
            with pytest.raises(TypeError, match="complex"):
                S @ x
        assert S.num_products == 0

    @pytest.mark.parametrize("rows", [[], [0, 13, 29]])
    def test_iterating_over_it_is_an_error(self, rows):
        for A in (H, H.damped(DAMPING), H.submatrix(rows)):
            with pytest.raises(TypeError, match="iter"):
                list(A)

    def test_pickling(self):
        for S in (H.submatrix([0, 13, 29], [1, 2, 2]), H.damped(DAMPING).submatrix([3, 4]).H):
            assert_allclose(pickle.loads(pickle.dumps(S)) @ np.eye(S.shape[1]), S @ np.eye(S.shape[1]))

    def test_it_is_freed_without_the_garbage_collector(self):
        gc.collect()
        gc.disable()
        try:
            S = hessian(mlp()).submatrix([0, 13, 29], [1, 2])
            S @ np.ones(2)
            S.H @ np.ones(3)
            S.T @ torch.ones(3, 2)
            alive = weakref.ref(S._A)
            del S
            assert alive() is None
        finally:
            gc.enable()

    def test_one_column_of_everything(self):
        columns = np.stack([H[:, [j]] @ [1.0] for j in range(P)], axis=1)
        np.testing.assert_allclose(columns, H @ np.eye(P), rtol=1e-12, atol=1e-15)

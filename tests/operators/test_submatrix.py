"""Submatrices of a Hessian agree with NumPy's, and cost as much as the parameters that they touch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from submatrix_cases import (
    DAMPED,
    DAMPING,
    DENSE,
    LAYERS,
    H,
    P,
    dense_hessian,
    entries,
    hessian,
    mlp,
    numpys,
    part,
    selections,
)
from torch import nn
from torch.autograd.function import once_differentiable

import curvop
import curvop.submatrix
from curvop import SubmatrixLinearOperator

TWO, THREE = ("0.bias", "2.weight"), ("2.weight", "4.bias", "0.bias")
OPERATORS = {
    "hessian": (H, DENSE),
    "damped": (H.damped(DAMPING), DAMPED),
    "block": (H.block(TWO), part(DENSE, entries(*TWO), entries(*TWO))),
    "damped block": (H.damped(DAMPING).block(THREE), part(DAMPED, entries(*THREE), entries(*THREE))),
    "off-diagonal block": (H.block("4.weight", "0.bias"), part(DENSE, entries("4.weight"), entries("0.bias"))),
    "overlapping block": (H.block(TWO, THREE), part(DENSE, entries(*TWO), entries(*THREE))),
    "damped overlapping block": (H.damped(DAMPING).block(TWO, THREE), part(DAMPED, entries(*TWO), entries(*THREE))),
    "adjoint of a block": (H.block(TWO, THREE).H, part(DENSE, entries(*THREE), entries(*TWO))),
    "block of an adjoint": (
        H.damped(DAMPING).block(TWO, THREE).H.block("2.weight", "0.bias"),
        part(DAMPED, entries("2.weight"), entries("0.bias")),
    ),
}


def assert_is(operator, expected):
    """Assert that all kinds of products with ``operator`` agree with the matrix ``expected``."""
    assert operator.shape == expected.shape
    generator = np.random.default_rng(0)
    for X in (generator.standard_normal(expected.shape[1:]), generator.standard_normal((expected.shape[1], 3))):
        assert_same(operator @ X, expected @ X)
    for Y in (generator.standard_normal(expected.shape[:1]), generator.standard_normal((2, expected.shape[0]))):
        assert_same(Y @ operator, Y @ expected)
    assert_same(operator.H @ np.eye(len(expected)), expected.T)
    assert_same(operator @ np.eye(expected.shape[1])[:, :1], expected[:, :1])


def assert_same(actual, expected):
    assert isinstance(actual, np.ndarray)
    assert actual.shape == expected.shape
    assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_it_is_imported_from_the_package_and_from_its_module():
    assert curvop.SubmatrixLinearOperator is curvop.submatrix.SubmatrixLinearOperator


class TestIsWhatNumPyIndexes:
    @settings(deadline=None, max_examples=100)
    @given(st.sampled_from(list(OPERATORS)), st.data())
    def test_rows_and_columns(self, name, data):
        A, dense = OPERATORS[name]
        rows, cols = (data.draw(selections(length)) for length in A.shape)
        assert_is(SubmatrixLinearOperator(A, rows, cols), part(dense, numpys(rows), numpys(cols)))

    @pytest.mark.slow
    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from(list(OPERATORS)), st.data())
    def test_every_way_to_write_it(self, name, data):
        A, dense = OPERATORS[name]
        rows, cols = (numpys(data.draw(selections(length))) for length in A.shape)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, A.shape[1])] * 2)))
        assert_is(A[rows, :], dense[rows, :])
        assert_is(A[rows], dense[rows])
        assert_is(A[:, cols], dense[:, cols])
        assert_is(A[rows, :][:, cols], dense[rows, :][:, cols])
        assert_is(A[:, cols][rows, :], dense[:, cols][rows, :])
        assert_is(A[rows, start:stop], dense[rows, start:stop])
        assert_is(A[start:stop:2, ::-1], dense[start:stop:2, ::-1])
        assert_is(A.submatrix(rows, cols), part(dense, rows, cols))

    @settings(deadline=None, max_examples=40)
    @given(selections(P))
    def test_rows_alone_give_a_principal_submatrix(self, rows):
        assert_is(H.submatrix(rows), part(DENSE, numpys(rows), numpys(rows)))
        assert_is(H.damped(DAMPING).submatrix(rows), part(DAMPED, numpys(rows), numpys(rows)))

    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from(list(OPERATORS)), st.data())
    def test_a_submatrix_of_a_submatrix_of_a_submatrix(self, name, data):
        A, dense = OPERATORS[name]
        for _ in range(3):
            rows, cols = (data.draw(selections(length)) for length in A.shape)
            A, dense = A.submatrix(rows, cols), part(dense, numpys(rows), numpys(cols))
            assert not isinstance(A._A, SubmatrixLinearOperator)
        assert_is(A, dense)

    def test_the_off_diagonal_block_of_two_parameters(self):
        rows, cols = range(3, 15), range(21, 25)
        assert (H.params_slices["0.weight"], H.params_slices["0.bias"]) == (slice(3, 15), slice(21, 25))
        assert_is(SubmatrixLinearOperator(H, list(rows), list(cols)), DENSE[3:15, 21:25])

    def test_a_composite_of_hessians(self):
        rows, cols = [0, 13, 29], [1, 2, 2, -1]
        assert_is(SubmatrixLinearOperator(H @ H, rows, cols), part(DENSE @ DENSE, rows, cols))
        assert_is(SubmatrixLinearOperator(2 * H - H.T, rows, cols), part(DENSE, rows, cols))

    def test_it_follows_parameters_that_change_in_place(self):
        model = mlp()
        S = hessian(model).submatrix([0, 13, 29], [1, 2, 3])
        assert_is(S, part(DENSE, [0, 13, 29], [1, 2, 3]))
        with torch.no_grad():
            model[2].weight.mul_(1.5)
        assert_is(S, part(dense_hessian(model), [0, 13, 29], [1, 2, 3]))


class TestOnlyTheParametersTouchedTakePart:
    @pytest.mark.parametrize(
        ("rows", "cols"), [(["0.bias"], ["2.weight"]), (["4.bias", "2.bias"], ["0.bias"]), (["4.weight"], ["4.weight"])]
    )
    def test_the_submatrix_is_taken_inside_their_block(self, rows, cols):
        S = H.submatrix(entries(*rows)[::-2], entries(*cols)[1:])
        assert S._A.shape == (sum(LAYERS[name] for name in rows), sum(LAYERS[name] for name in cols))
        assert_is(S, part(DENSE, entries(*rows)[::-2], entries(*cols)[1:]))

    def test_a_submatrix_of_a_submatrix_narrows_the_block_further(self):
        wide = H.submatrix(entries("0.weight", "4.bias"), entries("0.weight", "2.bias"))
        narrow = wide.submatrix([-1, -2], [0, 1])
        assert (wide._A.shape, narrow._A.shape) == ((14, 15), (2, 12))
        assert_is(narrow, part(DENSE, entries("4.bias")[::-1], entries("0.weight")[:2]))

    def test_layers_below_need_no_second_derivative(self):
        class Sine(torch.autograd.Function):
            forward = staticmethod(lambda x: x.sin())
            setup_context = staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
            backward = staticmethod(once_differentiable(lambda ctx, along: along * ctx.saved_tensors[0].cos()))

        class Layer(nn.Module):
            def __init__(self, function):
                super().__init__()
                self.forward = function

        A, dense = hessian(mlp(lambda: Layer(Sine.apply))), dense_hessian(mlp(lambda: Layer(torch.sin)))
        last = entries("4.weight", "4.bias")
        assert_is(A.submatrix(last[::-1]), part(dense, last[::-1], last[::-1]))
        with pytest.raises(RuntimeError, match="once_differentiable"):
            A.submatrix(entries("0.bias")) @ np.ones(4)

    def test_layers_below_are_not_run_again(self):
        model, calls = mlp(), []
        model[0].register_forward_hook(lambda *_: calls.append(1))
        S = hessian(model).submatrix(entries("4.weight"))
        S @ np.ones(6)
        first = len(calls)
        S @ np.ones((6, 3))
        S @ np.ones(6)
        assert len(calls) == first > 0


class TestAdjoint:
    def test_a_principal_submatrix_of_a_symmetric_operator_is_its_own(self):
        for A in (H, H.damped(DAMPING), H.block(TWO), H.submatrix(range(4, 20))):
            S = A.submatrix([3, 0, 0, 2])
            assert S.H is S
            assert S.T is S
            S = A.submatrix([3, 0], [0, 3])
            assert S.H is not S

    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from(list(OPERATORS)), st.data())
    def test_inner_products(self, name, data):
        A, _ = OPERATORS[name]
        S = A.submatrix(*(data.draw(selections(length)) for length in A.shape))
        generator = np.random.default_rng(2)
        u, v = (generator.standard_normal(length) for length in S.shape)
        for adjoint in (S.H, S.T, S.H.H.H):
            assert adjoint.shape == S.shape[::-1]
            assert_allclose(np.vdot(u, S @ v), np.vdot(adjoint @ u, v), rtol=1e-9, atol=1e-12)
        assert_same(S.H.H @ v, S @ v)
        assert_same(S.rmatvec(u), S.H @ u)
        assert_same(S.rmatmat(u[:, None]), (S.H @ u)[:, None])

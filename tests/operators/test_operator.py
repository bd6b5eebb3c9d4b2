"""Products with all kinds of vectors that SciPy or a user passes, and the types of the results."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from cases import Problem, loss_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from tqdm import tqdm

from curvop import DampedLinearOperator, GradientCovarianceLinearOperator, HessianLinearOperator

P = 43
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def hessian(problem: Problem, **options) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return loss_problem("ce")


@pytest.fixture(scope="module")
def H(problem: Problem) -> HessianLinearOperator:
    return hessian(problem)


@pytest.fixture(scope="module")
def dense(H: HessianLinearOperator) -> np.ndarray:
    return H @ np.eye(P)


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


class TestArrays:
    def test_it_is_a_linear_operator(self, H) -> None:
        assert isinstance(H, LinearOperator)
        assert H.shape == (P, P)
        assert H.dtype == np.float64

    @pytest.mark.parametrize("shape", [(P,), (P, 1), (P, 2), (P, P), (P, 0)])
    def test_shapes(self, H, dense, shape) -> None:
        x = np.random.default_rng(0).normal(size=shape)
        product = H @ x
        assert product.shape == shape
        assert type(product) is np.ndarray
        close(product, dense @ x)
        close(H.matmat(x) if x.ndim == 2 else H.matvec(x), dense @ x)
        close(x.T @ H, x.T @ dense)
        close(H.rmatmat(x) if x.ndim == 2 else H.rmatvec(x), dense @ x)

    @pytest.mark.parametrize(
        "dtype", [np.int8, np.int64, np.uint16, bool, np.float16, np.float32, np.float64, np.longdouble]
    )
    def test_dtypes(self, H, dense, dtype) -> None:
        x = np.arange(P).astype(dtype)
        product = H @ x
        assert product.dtype == np.float64
        close(product, dense @ x.astype(np.float64))

    @pytest.mark.parametrize("layout", ["fortran", "reversed", "strided", "read-only", "transposed", "list"])
    def test_memory_layouts(self, H, dense, layout) -> None:
        X = np.random.default_rng(0).normal(size=(P, 3))
        if layout == "fortran":
            X = np.asfortranarray(X)
        elif layout == "reversed":
            X = X[::-1, ::-1]
        elif layout == "strided":
            X = np.random.default_rng(0).normal(size=(2 * P, 6))[::2, ::2]
        elif layout == "read-only":
            X.flags.writeable = False
        elif layout == "transposed":
            X = np.ascontiguousarray(X.T).T
        expected = dense @ X
        before = X.copy()
        for x, column in zip(X.T, expected.T, strict=True):
            close(H @ (x.tolist() if layout == "list" else x), column)
        close(H @ (X.tolist() if layout == "list" else X), expected)
        assert (before == X).all()

    def test_what_is_returned_is_fresh_and_what_is_given_is_not_kept(self, H, dense) -> None:
        x = np.ones(P)
        product = H @ x
        x[:] = 7
        close(product, dense @ np.ones(P))
        product[:] = 0
        close(H @ np.ones(P), dense @ np.ones(P))

    def test_float32_vectors(self, problem, dense) -> None:
        H = hessian(problem, dtype=np.float32)
        assert H.dtype == np.float32
        assert (H @ np.ones(P, np.float32)).dtype == np.float32
        np.testing.assert_allclose(H @ np.ones(P, np.float32), dense @ np.ones(P), rtol=1e-5, atol=1e-6)
        assert (H @ np.ones(P)).dtype == np.float64  # NumPy's type promotion
        close(H @ np.ones(P), dense @ np.ones(P))

    def test_a_matrix_object(self, H, dense) -> None:
        with pytest.warns(PendingDeprecationWarning):
            X = np.matrix(np.ones((P, 2)))
        close(np.asarray(H.matmat(X)), dense @ np.ones((P, 2)))

    def test_stacks_of_vectors_where_scipy_knows_them(self, H, dense) -> None:
        X = np.random.default_rng(0).normal(size=(2, P, 3))
        close(H._matmat(X), dense @ X)
        close(H._matvec(X.swapaxes(1, 2)), (dense @ X).swapaxes(1, 2))
        square = np.random.default_rng(0).normal(size=(P, P))
        close(H._matvec(square), square @ dense)  # a stack of rows, although the shape fits columns, too

    def test_sums_multiples_powers_and_transposes(self, H, dense) -> None:
        x = np.arange(P) / P
        close((2.0 * H - H @ H) @ x, 2 * dense @ x - dense @ (dense @ x))
        close((H**2) @ x, dense @ (dense @ x))
        close((-H / 2) @ x, -dense @ x / 2)
        assert H.T is H
        assert H.H is H


class TestTensors:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_dtype_and_device_are_the_tensors_own(self, dense, dtype, device) -> None:
        problem = loss_problem("ce")
        problem.model.to(device)
        H = hessian(problem)
        for there in {device, "cpu"}:
            X = torch.eye(P, dtype=dtype, device=there)
            product = H @ X
            assert (product.dtype, product.device.type, product.shape) == (dtype, there, (P, P))
            bound = 10 * torch.finfo(dtype).eps
            assert np.abs(product.cpu().double().numpy() - dense).max() <= bound
            close((H @ np.eye(P)), dense)

    def test_shapes(self, H, dense) -> None:
        X = torch.randn(P, 6, dtype=torch.float64)
        for x in (X[:, 0], X[:, 1:2], X, X[:, ::2], X[:, :0], X.T.contiguous().T):
            product = H @ x
            assert isinstance(product, torch.Tensor)
            assert product.shape == x.shape
            close(product, dense @ x.numpy())
            close(x.T @ H if x.ndim == 2 else x @ H, x.numpy().T @ dense)
        close(H.matvec(X[:, 0]), dense @ X[:, 0].numpy())
        close(H.rmatvec(X[:, 0]), dense @ X[:, 0].numpy())
        close(H.matmat(X), dense @ X.numpy())
        close(H.rmatmat(X), dense @ X.numpy())

    def test_integers_give_the_operators_dtype(self, H, dense) -> None:
        product = H @ torch.arange(P)
        assert product.dtype == torch.float64
        close(product, dense @ np.arange(P))

    def test_gradients_do_not_flow_and_the_input_stays(self, H, dense) -> None:
        x = torch.ones(P, dtype=torch.float64, requires_grad=True)
        product = H @ x
        assert not product.requires_grad
        close(product, dense @ np.ones(P))
        close(H @ x, dense @ np.ones(P))


class TestBlocks:
    @pytest.mark.parametrize(
        ("rows", "cols"),
        [
            ("0.weight", None),
            ("0.bias", "2.weight"),
            (["2.bias", "0.bias"], None),
            (["0.weight", "0.bias"], ["0.bias", "2.bias"]),
            (["2.bias", "0.bias"], ["0.bias", "2.bias"]),
        ],
    )
    def test_they_are_the_dense_blocks(self, H, dense, rows, cols) -> None:
        A = H.block(rows, cols)
        where = [
            np.concatenate(
                [np.arange(P)[H.params_slices[name]] for name in ([names] if isinstance(names, str) else names)]
            )
            for names in (rows, rows if cols is None else cols)
        ]
        expected = dense[np.ix_(*where)]
        assert A.shape == expected.shape
        close(A @ np.eye(A.shape[1]), expected)
        close(A.H @ np.eye(A.shape[0]), expected.T)
        close(A.T @ np.eye(A.shape[0]), expected.T)
        close(np.eye(A.shape[0]) @ A, expected)
        close(A.H.H @ np.eye(A.shape[1]), expected)
        rng = np.random.default_rng(0)
        u, v = rng.normal(size=A.shape[0]), rng.normal(size=A.shape[1])
        assert u @ (A @ v) == pytest.approx(A.rmatvec(u) @ v, rel=1e-12)
        close(A @ torch.eye(A.shape[1], dtype=torch.float64), expected)

    def test_diagonal_blocks_one_a_parameter(self, H, dense) -> None:
        for block, where in zip(H.blocks(), H.params_slices.values(), strict=True):
            close(block @ np.eye(block.shape[1]), dense[where, where])

    def test_blocks_of_blocks(self, H, dense) -> None:
        inner = H.block(["2.weight", "0.bias"]).block("0.bias", "2.weight")
        where = H.params_slices
        close(inner @ np.eye(15), dense[where["0.bias"], where["2.weight"]])

    def test_products_of_the_adjoint_count_and_keep_what_they_linearize(self, problem) -> None:
        runs = []
        handle = problem.model.register_forward_hook(lambda *_: runs.append(1))
        A = hessian(problem).block("0.weight", "2.weight")
        A @ np.ones(15)
        A.rmatvec(np.ones(20))
        count = len(runs)
        A.rmatvec(np.ones(20))
        A.H @ np.ones((20, 3))
        handle.remove()
        assert len(runs) == count
        assert A.num_products == A.H.num_products == 1 + 1 + 1 + 3


class TestUnknownAttributes:
    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("trace", "curvop.spectrum.trace(A)"),
            ("norm", "curvop.spectrum.frobenius_norm(A)"),
            ("eigs", "curvop.spectrum.eigsh(A, k)"),
            ("solve", "curvop.solve(A, b, damping=...)"),
        ],
    )
    def test_the_error_names_the_function(self, H, name, function) -> None:
        for A in (H, H.damped(1.0), 2 * H):
            assert not hasattr(A, name)
            assert name not in dir(A)
            with pytest.raises(AttributeError) as error:
                getattr(A, name)
            assert str(error.value) == f"a {type(A).__name__} has no attribute {name!r}: call {function}"

    def test_other_errors_are_those_of_python(self, H) -> None:
        with pytest.raises(AttributeError, match="'HessianLinearOperator' object has no attribute 'tracee'"):
            H.tracee  # noqa: B018

    def test_an_error_in_a_property_is_not_hidden(self, problem) -> None:
        class Broken(HessianLinearOperator):
            @property
            def device(self):
                return None.type  # type: ignore[attr-defined]

        A = Broken(problem.model, problem.loss_function, problem.params, problem.data)
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'type'"):
            A.device  # noqa: B018

    @pytest.mark.parametrize("again", [lambda A: pickle.loads(pickle.dumps(A)), copy.copy, copy.deepcopy])
    def test_copies(self, H, again) -> None:
        np.testing.assert_array_equal(again(H) @ np.ones(P), H @ np.ones(P))


class TestDamped:
    def test_it_is_the_sum_with_all_that_the_operator_has(self, H, dense) -> None:
        A, sum_ = H.damped(0.3), dense + 0.3 * np.eye(P)
        close(A @ np.eye(P), sum_)
        close(A @ torch.eye(P, dtype=torch.float64), sum_)
        assert A.H is A
        assert A.T is A
        assert A.params_slices == H.params_slices
        where = A.params_slices
        close(A.block("0.bias") @ np.eye(5), sum_[where["0.bias"], where["0.bias"]])
        close(A.block("0.bias", "2.bias") @ np.eye(3), sum_[where["0.bias"], where["2.bias"]])
        mixed = A.block(["0.bias", "2.bias"], ["2.bias", "0.weight"])
        rows, cols = np.r_[20:25, 40:43], np.r_[40:43, 0:20]
        close(mixed @ np.eye(23), sum_[np.ix_(rows, cols)])
        close(mixed.H @ np.eye(8), sum_[np.ix_(rows, cols)].T)
        close(A[[0, 41], :][:, [41, 7]] @ np.eye(2), sum_[np.ix_([0, 41], [41, 7])])
        close(A.damped(0.2) @ np.eye(P), dense + 0.5 * np.eye(P))
        assert [block.shape for block in A.blocks()] == [block.shape for block in H.blocks()]
        close(A.gradient_and_loss()[0], H.gradient_and_loss()[0])

    @pytest.mark.parametrize("damping", [np.nan, np.inf])
    def test_damping_is_finite(self, H, damping) -> None:
        with pytest.raises(ValueError, match="damping"):
            H.damped(damping)

    def test_only_of_operators_of_parameters(self) -> None:
        with pytest.raises(TypeError, match=r"A is a MatrixLinearOperator: .* A \+ damping \* identity"):
            DampedLinearOperator(aslinearoperator(np.eye(3)), 1.0)


class TestParameterDicts:
    def test_arrays_of_any_layout(self, H, problem) -> None:
        arrays = {name: value.detach().numpy() for name, value in problem.params.items()}
        reversed_twice = {name: np.flip(np.flip(value).copy()) for name, value in arrays.items()}
        for value in reversed_twice.values():
            value.flags.writeable = False
        close(H.ravel(reversed_twice), H.ravel(arrays))

    def test_complex_vectors_have_no_parameters(self, H) -> None:
        with pytest.raises(TypeError, match="vector is complex"):
            H.unravel(1j * np.ones(P))

    def test_ravel_and_unravel_are_inverse(self, H, problem) -> None:
        vector = np.arange(float(P))
        tree = H.unravel(vector)
        assert {name: value.shape for name, value in tree.items()} == {n: p.shape for n, p in problem.params.items()}
        close(H.ravel(tree), vector)
        close(H.ravel(problem.params), np.concatenate([p.detach().numpy().ravel() for p in problem.params.values()]))
        tree["0.weight"].zero_()
        assert vector[1] == 1
        close(tree["0.bias"], vector[H.params_slices["0.bias"]])

    def test_of_a_rectangular_block_columns_and_rows(self, H) -> None:
        A = H.block("0.bias", "2.bias")
        assert A.params_slices == {"2.bias": slice(0, 3)}
        assert A.H.params_slices == {"0.bias": slice(0, 5)}
        assert list(A.unravel(np.ones(3))) == ["2.bias"]
        assert list(A.H.unravel(A @ np.ones(3))) == ["0.bias"]

    def test_vectors_that_are_reversed_read_only_or_lists(self, H) -> None:
        close(H.ravel(H.unravel(np.arange(float(P))[::-1])), np.arange(float(P))[::-1])
        close(H.ravel(H.unravel([1.0] * P)), np.ones(P))
        close(H.ravel(H.unravel(torch.ones(P))), np.ones(P))

    def test_bad_dicts_and_vectors(self, H, problem) -> None:
        with pytest.raises(ValueError, match=r"no parameter is named '0.weigth'; did you mean '0.weight'"):
            H.ravel({"0.weigth": 1})
        with pytest.raises(ValueError, match=r"lacks '2.bias'"):
            H.ravel({name: value for name, value in problem.params.items() if name != "2.bias"})
        with pytest.raises(ValueError, match=r"'0.bias'.*shape \(1,\)"):
            H.ravel({**problem.params, "0.bias": torch.ones(1)})
        with pytest.raises(ValueError, match=r"shape \(3,\).*43 columns"):
            H.unravel(np.ones(3))


class TestInvariants:
    vectors = hnp.arrays(np.float64, P, elements=st.floats(-1e3, 1e3, width=32))

    @settings(max_examples=30, deadline=None)
    @given(u=vectors, v=vectors, a=st.floats(-10, 10))
    def test_linear_and_symmetric(self, H, dense, u, v, a) -> None:
        scale = 1e-12 * np.linalg.norm(dense) * (np.linalg.norm(u) + 1) * (np.linalg.norm(v) + 1) * (abs(a) + 1)
        np.testing.assert_allclose(H @ (u + a * v), H @ u + a * (H @ v), rtol=0, atol=scale)
        assert u @ (H @ v) == pytest.approx(v @ (H @ u), abs=scale)

    @settings(max_examples=20, deadline=None)
    @given(X=hnp.arrays(np.float64, (P, 4), elements=st.floats(-1e3, 1e3, width=32)))
    def test_matmat_is_the_stacked_matvecs(self, H, dense, X) -> None:
        """Columns that are multiplied at once differ from single products by rounding errors."""
        scale = 1e-12 * np.linalg.norm(dense) * (np.linalg.norm(X) + 1)
        np.testing.assert_allclose(H @ X, np.stack([H @ x for x in X.T], axis=1), rtol=0, atol=scale)


class TestBookkeeping:
    def test_products_are_counted_by_columns(self, problem) -> None:
        H = hessian(problem)
        H @ np.ones(P)
        H @ np.ones((P, 3))
        H @ np.ones((P, 0))
        H @ torch.ones(P, 2)
        assert H.num_products == 6
        damped = H.damped(1.0)
        damped @ np.ones(P)
        assert H.num_products == damped.num_products == 7

    def test_pickles(self, problem, dense) -> None:
        for A, expected in (
            (hessian(problem, progress=True), dense),
            (hessian(problem).damped(1.0), dense + np.eye(P)),
        ):
            A @ np.ones(P)
            again = pickle.loads(pickle.dumps(A))
            close(again @ np.eye(P), expected)
            close(A @ np.eye(P), expected)

    @pytest.mark.parametrize(
        "loss", ["mse", "mse-sum", "ce-everything", "bce-weights", "f-partial", "f-partial-sum", "callable", "subclass"]
    )
    def test_pickles_with_every_kind_of_loss(self, loss) -> None:
        H = hessian(loss_problem(loss))
        expected = H @ np.ones(P)
        close(pickle.loads(pickle.dumps(H)) @ np.ones(P), expected)

    @pytest.mark.parametrize("cache", [0, "auto"])
    def test_progress_counts_products(self, problem, cache) -> None:
        stream = io.StringIO()
        with tqdm(file=stream, mininterval=0) as bar:
            H = hessian(problem, progress=bar, cache=cache)
            H @ np.ones(P)
            H @ np.ones((P, 5))
            assert bar.n == 6
            H.block("0.bias") @ np.ones(5)
            H.damped(1.0)[[1, 2], :] @ np.ones(P)
            assert bar.n == 8
        assert "8it" in stream.getvalue()

    @pytest.mark.parametrize("cache", [0, "auto"])
    def test_progress_grows_batch_by_batch_and_never_beyond(self, problem, cache) -> None:
        shown = []

        class Bar(tqdm):
            def update(self, n=1):
                super().update(n)
                shown.append(self.n)

        with Bar(file=io.StringIO()) as bar:
            hessian(problem, progress=bar, cache=cache, columns=4) @ np.ones((P, 8))
        assert shown == sorted(shown)
        assert len(set(shown)) > 2
        assert shown[-1] == 8

    def test_progress_of_its_own(self, problem, capsys) -> None:
        H = hessian(problem, progress=True)
        eigsh(H, k=2)
        H._settings.progress._bar.close()
        assert "products" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("matrix", [HessianLinearOperator, GradientCovarianceLinearOperator])
def test_the_bits_do_not_depend_on_where_a_vector_lies(matrix, kind) -> None:
    """MKL sums in a different order if memory is aligned differently, here in a matrix-vector product."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1)).double()
    data = [(torch.randn(50, 20).double(), torch.randn(50, 1).double())]
    A = matrix(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
    for v in np.random.default_rng(0).normal(size=(20, A.shape[0])):
        memory = np.empty(v.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64
        products = set()
        for offset in range(0, 64, 8):
            moved = memory[start + offset :][: v.nbytes].view(np.float64)
            moved[:] = v
            products.add(np.asarray(A @ kind(moved)).tobytes())
        assert len(products) == 1

"""Indices of all types have NumPy's meaning, and their validation is fast."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_array_equal
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from submatrix_cases import numpys

from curvop import HessianLinearOperator, SubmatrixLinearOperator

M, N = 300, 200  # larger than 8-bit integers
DENSE = np.arange(1, M * N + 1, dtype=np.float64).reshape(M, N)
A = aslinearoperator(DENSE)
EYE = np.eye(N)
COUNT, LENGTH = 10**7, 2 * 10**7


class Diagonal(LinearOperator):
    def __init__(self, diagonal):
        super().__init__(diagonal.dtype, (diagonal.size, diagonal.size))
        self.diagonal = diagonal

    def _matvec(self, x):
        return self.diagonal * x.ravel()


@pytest.fixture(scope="module")
def H():
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    X, y = torch.eye(3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    return HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, y)])


@pytest.fixture(scope="module")
def long():
    return Diagonal(np.arange(LENGTH, dtype=np.float32))


def assert_selects(selection, expected):
    """Assert that ``selection`` selects the entries ``expected`` of either axis."""
    assert_array_equal(SubmatrixLinearOperator(A, selection, slice(None)) @ EYE, DENSE[expected])
    square = aslinearoperator(DENSE[:N])
    assert_array_equal((SubmatrixLinearOperator(square, slice(None), selection).T @ EYE).T, DENSE[:N][:, expected])


class TestKinds:
    @pytest.mark.parametrize(
        "selection",
        [
            [5, 0, 199],
            (5, 0, 199),
            [-1, -200, 7, 7],
            [],
            (),
            [True, 2],
            [False, -1, True],
            [np.int8(3), np.uint8(4), 5],
            range(200),
            range(10, 20),
            range(20, 10, -3),
            range(-5, 5),
            range(3, 3),
            range(0, 199, 198),
        ],
        ids=repr,
    )
    def test_sequences(self, selection):
        assert_selects(selection, list(selection))

    @pytest.mark.parametrize(
        "selection",
        [
            slice(None),
            slice(3, 9),
            slice(-9, -3),
            slice(None, None, -1),
            slice(90, 3, -7),
            slice(3, 9, 100),
            slice(9, 3),
            slice(0, 0),
            slice(500, 900),
            slice(-900, 900, 3),
            slice(np.int64(2), np.uint8(4)),
        ],
        ids=repr,
    )
    def test_slices(self, selection):
        assert_selects(selection, selection)

    @pytest.mark.parametrize("dtype", [*np.typecodes["AllInteger"], ">i4", "<u2"])
    @pytest.mark.parametrize("selection", [[0, 100, 100, 3], [-1, -100, 5], []], ids=repr)
    def test_integer_arrays(self, dtype, selection):
        selection = [abs(i) for i in selection] if np.dtype(dtype).kind == "u" else selection
        array = np.array(selection, dtype)
        assert_selects(array, selection)
        assert_selects(np.repeat(array, 2)[::-2], selection[::-1])
        array.flags.writeable = False
        assert_selects(array, selection)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
    @pytest.mark.parametrize("selection", [[0, 100, 100, 3], [-1, -100, 5], []], ids=repr)
    def test_integer_tensors(self, dtype, selection):
        selection = [abs(i) for i in selection] if dtype == torch.uint8 else selection
        assert_selects(torch.tensor(selection, dtype=dtype), selection)
        assert_selects(torch.tensor(selection, dtype=dtype).repeat_interleave(2)[::2], selection)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_tensors_on_a_gpu(self):
        assert_selects(torch.tensor([-1, 5, 5], device="cuda"), [-1, 5, 5])
        mask = torch.arange(N, device="cuda") % 3 == 0
        assert_array_equal(SubmatrixLinearOperator(A, slice(None), mask) @ np.eye(67), DENSE[:, ::3])

    @pytest.mark.parametrize("wrap", [np.array, list, tuple, torch.tensor])
    @pytest.mark.parametrize("step", [1, 3, 1000])
    def test_masks(self, wrap, step):
        rows, cols = np.arange(M) % step == 0, np.arange(N) % step == 1
        S = SubmatrixLinearOperator(A, wrap(rows.tolist()), wrap(cols.tolist()))
        assert_array_equal(S @ np.eye(S.shape[1]), DENSE[rows, :][:, cols])

    def test_a_repeated_row_repeats_and_a_repeated_column_adds(self):
        S = SubmatrixLinearOperator(A, [2, 2], [1, -199, 0])
        assert_array_equal(S @ [1, 10, 100], [11 * DENSE[2, 1] + 100 * DENSE[2, 0]] * 2)

    def test_indices_that_change_afterwards_change_nothing(self):
        for wrap in (np.array, torch.tensor, list):
            rows, cols = wrap([0, 5, 7]), wrap([True] * 2 + [False] * 198)
            S = SubmatrixLinearOperator(A, rows, cols)
            rows[0], cols[0] = 9, False
            assert_array_equal(S @ np.eye(2), DENSE[[0, 5, 7], :2])


class TestBadIndices:
    @pytest.mark.parametrize(
        ("selection", "worst", "length"),
        [
            ([0, 200], 200, 200),
            ((0, -201), -201, 200),
            (range(190, 201), 200, 200),
            (range(5, -300, -1), -201, 200),
            (np.array([3, 255], np.uint8), 255, 200),
            (np.array([2**64 - 1], np.uint64), 2**64 - 1, 200),
            (np.array([-(2**63)]), -(2**63), 200),
            (torch.tensor([0, 1000]), 1000, 200),
            ([10**30], 10**30, 200),
            (range(2**70, 2**70 + 2), 2**70, 200),
            (range(10**15), 200, 200),
            (range(0, 2**80, 2**70), 2**70, 200),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_out_of_range_names_the_index_and_the_bound(self, selection, worst, length):
        with pytest.raises(IndexError, match=rf"col_idxs.* {worst}\b.* {length}\b"):
            SubmatrixLinearOperator(A, [0], selection)

    def test_rows_and_columns_are_told_apart(self):
        SubmatrixLinearOperator(A, [299], [199])
        with pytest.raises(IndexError, match=r"row_idxs.* 300\b.* 300\b"):
            SubmatrixLinearOperator(A, [300], [200])

    def test_an_axis_without_entries_has_no_index(self):
        empty = SubmatrixLinearOperator(A, [], [0])
        assert SubmatrixLinearOperator(empty, [], [0, 0]).shape == (0, 2)
        for index in (0, -1):
            with pytest.raises(IndexError, match=f"row_idxs.* {index}"):
                SubmatrixLinearOperator(empty, [index], [0])

    @pytest.mark.parametrize(
        "selection",
        [
            [0.0, 1.0],
            np.array([1.5]),
            np.array([]),
            torch.tensor([1.0]),
            torch.tensor([1.0], dtype=torch.bfloat16),
            torch.tensor([]),
            torch.tensor([0]).to_sparse(),
            torch.tensor([0], device="meta"),
            [1j],
            ["0"],
            np.array(["2020-01-01"], "datetime64[D]"),
            np.array([1], "timedelta64[D]"),
            [None],
        ],
        ids=repr,
    )
    def test_what_is_no_integer_is_a_type_error(self, selection):
        with pytest.raises(TypeError, match=r"row_idxs.*(integers|a dense one with values)"):
            SubmatrixLinearOperator(A, selection, [0])

    @pytest.mark.parametrize("selection", [{0, 1}, (index for index in (0, 1)), "01"])
    def test_what_is_no_sequence_is_a_type_error(self, selection):
        with pytest.raises(TypeError, match=f"row_idxs is a {type(selection).__name__}: pass a list"):
            SubmatrixLinearOperator(A, selection, [0])

    def test_a_range_of_one_index_and_a_huge_step(self):
        assert_array_equal(SubmatrixLinearOperator(A, range(1, 2, 2**70), [0]) @ [1.0], (A @ np.eye(200)[0])[1:2])

    @pytest.mark.parametrize("wrap", [np.array, list, torch.tensor])
    @pytest.mark.parametrize("length", [1, 199, 201, 300])
    def test_a_mask_must_be_as_long_as_the_axis(self, wrap, length):
        with pytest.raises(IndexError, match=rf"col_idxs.*mask.* {length}\b.* 200\b"):
            SubmatrixLinearOperator(A, [0], wrap([True] * length))

    @pytest.mark.parametrize(
        "selection",
        [
            *([[0, 1]], [[]], np.zeros((2, 2), int), np.ones((300, 200), bool), torch.zeros(1, 1, dtype=torch.int64)),
            *(3, np.int64(3), np.array(3), torch.tensor(3), np.array(3, object), True, np.bool_(True), None, Ellipsis),
        ],
    )
    def test_indices_have_one_dimension(self, selection):
        with pytest.raises(IndexError, match=r"row_idxs.*one-dimensional"):
            SubmatrixLinearOperator(A, selection, [0])


def objects(values):
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # array[:] = values would convert tensors
        array[index] = value
    return array


class TestArraysOfObjects:
    @pytest.mark.parametrize("mask", [[True] * 299 + [False], [np.bool_(True)] * 300, [False, np.bool_(True)]])
    def test_booleans_are_refused_as_numpy_refuses_them(self, mask):
        for A_or_H in (A, SubmatrixLinearOperator(A, slice(None), slice(None))):
            with pytest.raises(IndexError, match=r"row_idxs holds booleans.*mask\.astype\(bool\)"):
                SubmatrixLinearOperator(A_or_H, objects(mask), [0])
        with pytest.raises(IndexError):
            DENSE[objects(mask)]

    @pytest.mark.parametrize(
        "values", [[True, 2], [2, np.bool_(False)], [None], [True, None], [1.0], ["0"], [torch.tensor(1)], []], ids=repr
    )
    def test_what_is_no_integer_is_refused(self, values):
        with pytest.raises(TypeError, match="row_idxs has dtype object"):
            SubmatrixLinearOperator(A, objects(values), [0])

    def test_integers_are_taken(self):
        assert_selects(objects([3, -1, np.int8(5), np.uint64(7)]), [3, -1, 5, 7])
        with pytest.raises(IndexError, match="row_idxs holds 300"):
            SubmatrixLinearOperator(A, objects([300]), [0])


class TestLikeNumPy:
    """Any selection selects the same entries of a dense array, or both refuse it."""

    integers = st.integers(-12, 11)
    entries = st.one_of(
        integers, st.booleans(), st.floats(-2, 2), st.none(), st.booleans().map(np.bool_), integers.map(np.int16)
    )
    dtypes = st.one_of(
        hnp.integer_dtypes(),
        hnp.boolean_dtypes(),
        hnp.unsigned_integer_dtypes(),
        hnp.floating_dtypes(),
        st.just(np.dtype("U1")),
    )
    arrays = dtypes.flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=11),
            # Small values, because NumPy wraps large uint64 indices around to negative ones.
            elements=None if dtype.kind in "Ub" else {"min_value": 0 if dtype.kind == "u" else -12, "max_value": 12},
        )
    )
    tensors = st.one_of(
        st.lists(integers, max_size=9).map(lambda values: torch.tensor(values, dtype=torch.int32)),
        st.lists(st.booleans(), max_size=11).map(lambda values: torch.tensor(values, dtype=torch.bool)),
        st.lists(st.integers(0, 12), max_size=9).map(lambda values: torch.tensor(values, dtype=torch.uint16)),
    )
    sequences = st.one_of(
        st.lists(integers, max_size=9),
        st.lists(st.booleans(), max_size=11),
        st.lists(entries, max_size=4),
        st.lists(st.lists(integers, max_size=2), max_size=3),
        st.builds(range, integers, integers, integers.filter(bool)),
        st.slices(15),
    )

    @settings(max_examples=400, deadline=None)
    @given(
        selection=st.one_of(sequences, sequences.map(lambda s: tuple(s) if isinstance(s, list) else s), arrays, tensors)
    )
    def test_the_same_or_refused_by_both(self, selection):
        square = DENSE[:11, :11]
        operator = aslinearoperator(square)
        try:
            expected = square[numpys(selection), :]
        except (IndexError, ValueError):
            expected = None
        try:
            found = SubmatrixLinearOperator(operator, selection, slice(None)) @ np.eye(11)
        except (IndexError, TypeError):
            assert expected is None or expected.ndim != 2  # an operator has two dimensions
        else:
            assert_array_equal(found, expected)
            S = SubmatrixLinearOperator(operator, slice(None), selection)
            assert_array_equal((S.T @ np.eye(11)).T, square[:, numpys(selection)])


class TestSubscripts:
    def test_two_index_arrays_mean_single_entries_to_numpy(self, H):
        for S in (H, H[1:, :]):
            for key in (([0], [1]), (np.array([0, 1]), torch.tensor([1, 0])), (range(2), (0, 1))):
                with pytest.raises(IndexError, match=r"A\[rows, :\]\[:, cols\]"):
                    S[key]

    def test_numpys_open_mesh_means_the_submatrix(self, H):
        mesh = np.ix_([0, 3, 3], [1, -1])
        assert_array_equal(H[mesh] @ np.eye(2), (H @ np.eye(8))[mesh])

    def test_arrays_that_broadcast_to_one_do_too(self, H):
        dense, rows, cols = H @ np.eye(8), np.array([[0], [3], [3]]), np.array([1, -1])
        for key in ((rows, cols), (rows, cols[None]), (rows.astype(np.uint8), torch.from_numpy(cols))):
            assert_array_equal(H[key] @ np.eye(2), dense[rows, cols])
        assert_array_equal(H[torch.from_numpy(rows), cols] @ np.eye(2), dense[rows, cols])

    def test_masks_of_two_dimensions_mean_single_entries_to_numpy(self, H):
        with pytest.raises(IndexError, match="two index arrays"):
            H[np.ones((8, 1), bool), np.ones((1, 8), bool)]
        with pytest.raises(IndexError, match="two index arrays"):
            H[torch.ones(8, 1, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)]

    def test_one_index_is_for_the_rows(self, H):
        dense = H @ np.eye(8)
        for rows in ([0, 3], slice(1, 5), np.array([-1, 2]), torch.tensor([1, 1]), np.arange(8) > 5):
            assert_array_equal(H[rows] @ np.eye(8), dense[rows])
            assert_array_equal(H[rows,] @ np.eye(8), dense[rows])

    @pytest.mark.parametrize(
        "key", [0, (0, 0), (slice(None), 0), (slice(None),) * 3, ([0], [1], [2]), (None, slice(None)), (8, slice(None))]
    )
    def test_what_leaves_no_matrix_is_an_index_error(self, H, key):
        with pytest.raises(IndexError):
            H[key]

    def test_an_ellipsis_stands_for_the_other_axes(self, H):
        dense = H @ np.eye(8)
        assert_array_equal(H[..., [0, 3]] @ np.eye(2), dense[..., [0, 3]])
        assert_array_equal(H[[0, 3], ...] @ np.eye(8), dense[[0, 3], ...])
        assert_array_equal(H[...] @ np.eye(8), dense)


class TestMillionsOfIndices:
    def kinds(self):
        generator = np.random.default_rng(0)
        yield generator.integers(-LENGTH, LENGTH, COUNT)
        yield torch.from_numpy(generator.integers(0, LENGTH, COUNT, dtype=np.int32))
        yield np.arange(LENGTH) % 2 == 0
        yield range(COUNT)
        yield slice(None, None, -2)

    def test_are_checked_in_less_than_a_second(self, long):
        for selection in self.kinds():
            start = time.process_time()  # not wall time: other processes may use the cores
            S = SubmatrixLinearOperator(long, selection, [1])
            took = time.process_time() - start
            assert S.shape == (COUNT, 1)
            assert took < 1, type(selection)

    def test_a_bad_one_among_them_is_found_as_fast(self, long):
        selection = np.arange(COUNT)
        selection[-1] = LENGTH
        start = time.process_time()
        with pytest.raises(IndexError, match=f"{LENGTH}.*{LENGTH}"):
            SubmatrixLinearOperator(long, selection, [1])
        assert time.process_time() - start < 1

    def test_products_are_those_of_the_few_entries_that_count(self, long):
        S = SubmatrixLinearOperator(long, range(LENGTH - COUNT, LENGTH), [-1, -COUNT])
        product = S @ [2.0, 3.0]
        assert np.count_nonzero(product) == 2
        assert (product[-1], product[0]) == (2.0 * long.diagonal[-1], 3.0 * long.diagonal[-COUNT])

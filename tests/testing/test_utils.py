"""`allclose_report` agrees with `numpy.allclose`, and prints where two arrays differ."""

import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from curvop.utils import allclose_report

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0 + 1e-9, 1e-9, 1e300, -1e300, np.inf, -np.inf, np.nan]


def positions(rows):
    return [tuple(int(index) for index in re.findall(r"\d+", row.split(")")[0])) for row in rows]


class TestAgreement:
    @pytest.mark.parametrize(
        "other",
        [
            [[1.0, 2.0], [3.0, 4.0]],
            ((1, 2), (3, 4)),
            np.array([[1, 2], [3, 4]], dtype=np.uint8),
            np.array([[1, 2], [3, 4]], dtype=np.longdouble),
            np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]),
            np.array([[4.0, 3.0], [2.0, 1.0]])[::-1, ::-1],
            torch.tensor([[1, 2], [3, 4]]),
            torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16),
            torch.tensor([[1, 2], [3, 4]], dtype=torch.float16),
            torch.tensor([[1, 2], [3, 4]], dtype=torch.float64, requires_grad=True),
            torch.tensor([[1, 3], [2, 4]], dtype=torch.complex64).T.conj(),
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to_sparse(),
            torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
            [torch.tensor([1.0, 2.0], requires_grad=True), [torch.tensor(3.0), 4]],
        ],
        ids=lambda other: f"{type(other).__name__} {getattr(other, 'dtype', '')}",
    )
    def test_any_kind_agrees_silently_with_any_other(self, other, capsys):
        for reference in (np.array([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])):
            assert allclose_report(reference, other) is True
            assert allclose_report(other, reference) is True
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
    def test_empty_arrays_agree(self, shape, capsys):
        assert allclose_report(np.empty(shape), torch.empty(shape))
        assert capsys.readouterr().out == ""

    @given(
        hnp.arrays(np.float64, (2, 3), elements=st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))),
        hnp.arrays(np.float64, (2, 3), elements=st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))),
        st.sampled_from([0.0, 1e-8, 1e-5, 0.5]),
        st.sampled_from([0.0, 1e-8, 1.0]),
    )
    def test_the_meaning_is_numpys(self, a, b, rtol, atol):
        with np.errstate(all="ignore"):
            assert allclose_report(a, b, rtol, atol) == np.allclose(a, b, rtol, atol)

    @pytest.mark.parametrize("a", SPECIAL)
    @pytest.mark.parametrize("b", SPECIAL)
    def test_special_values_and_complex_parts(self, a, b):
        with np.errstate(all="ignore"):
            assert allclose_report(a, b) == np.allclose(a, b)
            assert allclose_report(complex(1, a), complex(1, b)) == np.allclose(complex(1, a), complex(1, b))

    def test_the_tolerance_is_relative_to_the_second(self):
        assert allclose_report(1.0, 2.0, rtol=0.5, atol=0)
        assert not allclose_report(2.0, 1.0, rtol=0.5, atol=0)

    def test_single_precision_is_compared_in_double(self):
        assert not allclose_report(np.float32(1), np.nextafter(np.float32(1), np.float32(2)), rtol=1e-8, atol=0)

    def test_unsigned_integers_and_booleans_do_not_wrap_around(self, capsys):
        assert not allclose_report(np.array([1], np.uint8), np.array([2], np.uint8))
        assert not allclose_report([True], [False])
        assert capsys.readouterr().out.count("largest absolute difference: 1\n") == 2

    @pytest.mark.parametrize("text", ["1", ["1", "2"], [None], {}])
    def test_what_is_not_a_number(self, text):
        with pytest.raises(TypeError, match="numbers"):
            allclose_report(text, text)


class TestReport:
    @pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 2)), ((3,), (1, 3)), ((), (1,)), ((0, 2), (0, 3))])
    def test_shapes_that_differ_are_printed_and_nothing_is_broadcast(self, a, b, capsys):
        assert allclose_report(np.ones(a), torch.ones(b)) is False
        assert capsys.readouterr().out == f"shapes differ: {a} and {b}\n"

    def test_says_how_many_by_how_much_and_where(self, capsys):
        b = torch.arange(12.0).reshape(3, 4)
        a = b.double().numpy().copy()
        a[0, 1] += 0.25
        a[2, 3] -= 1.1
        assert allclose_report(a, b) is False
        assert capsys.readouterr().out.splitlines() == [
            "2 of 12 entries differ (rtol = 1e-05, atol = 1e-08)",
            "largest absolute difference: 1.1",
            "largest relative difference: 0.25",
            "position     a     b  |a - b|",
            "  (2, 3)   9.9  11.0      1.1",
            "  (0, 1)  1.25   1.0     0.25",
        ]

    def test_differences_within_the_tolerance_count_for_nothing(self, capsys):
        allclose_report([1e-12, 2.0], [1e-15, 1.0])
        assert "largest relative difference: 1\n" in capsys.readouterr().out

    def test_a_zero_reference_has_no_relative_difference(self, capsys):
        allclose_report([1.0], [0.0])
        assert "largest relative difference: none is finite\n" in capsys.readouterr().out

    def test_nan_and_infinity_come_first_and_are_counted(self, capsys):
        a, b = [5.0, np.nan, np.inf, np.inf, np.nan], [2.0, 1.0, 1.0, np.inf, np.nan]
        assert not allclose_report(a, b)
        out = capsys.readouterr().out
        assert "4 of 5 entries differ" in out
        assert "3 because of NaN or infinity" in out
        assert "largest absolute difference: 3\n" in out
        assert positions(out.splitlines()[4:]) == [(1,), (2,), (4,), (0,)]

    def test_no_more_than_the_ten_worst_of_many(self, capsys):
        # More entries than one block, not contiguous in memory, with the largest differences scattered over all blocks.
        b = np.zeros((400, 500)).T
        a = np.full((400, 500), 1e-3).T
        flat = np.random.default_rng(0).choice(b.size, 12, replace=False)
        for rank, position in enumerate(flat):
            a[np.unravel_index(position, a.shape)] = 12 - rank
        assert not allclose_report(a, b)
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith("200000 of 200000 entries differ")
        expected = [tuple(int(i) for i in np.unravel_index(position, a.shape)) for position in flat[:10]]
        assert positions(out[4:]) == expected

    def test_positions_of_equal_differences_are_in_order(self, capsys):
        allclose_report(np.ones((3, 5)), np.zeros((3, 5)))
        assert positions(capsys.readouterr().out.splitlines()[4:]) == [(i // 5, i % 5) for i in range(10)]

    def test_the_table_is_aligned(self, capsys):
        allclose_report(np.array([1e-30, -123456.789, 1 + 2j]), np.zeros(3))
        assert len({len(line) for line in capsys.readouterr().out.splitlines()[3:]}) == 1

    def test_a_scalar_has_the_empty_position(self, capsys):
        assert not allclose_report(torch.tensor(2, dtype=torch.bfloat16), 3)
        assert capsys.readouterr().out.splitlines()[-1].split() == ["()", "2.0", "3", "1"]

    def test_memory_does_not_grow_with_the_arrays(self):
        a, b = np.zeros((2000, 2000), np.float32), np.ones((2000, 2000), np.float32).T
        tracemalloc.start()
        try:
            assert not allclose_report(a, b)
            assert tracemalloc.get_traced_memory()[1] < a.nbytes / 2
        finally:
            tracemalloc.stop()

"""Bad input ends in one clear error that names the argument and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from bad_inputs import ROWS, Row, table, told
from bad_inputs.rows import DATA, MODEL, ONES, PARAMS, H, X, Y, cubes
from cases import cut
from torch import nn

from curvop import HessianLinearOperator

#: A message says what to do, or what would be right.
REMEDY = re.compile(
    r"\b(must|pass|use|call|make|take|give|leave|load|write|wrap|delete|close|open|cast|multiply|unravel|add|name|look|"
    r"change|precondition|did you mean|known are|they are|such as|needs|at most|does not end in|a problem is|"
    # Of the command's own arguments, what is wrong is enough.
    r"not an integer|no file|no folder|unrecognized arguments)\b"
)


def everything() -> list[Any]:
    """Return what no attempt may change."""
    model = [(name, value.tolist(), value.requires_grad, value.grad) for name, value in MODEL.named_parameters()]
    settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    generators = torch.get_rng_state().tolist()
    return [model, MODEL.training, [part.tolist() for part in DATA[0]], settings, generators, (H @ ONES).tolist()]


class TestEveryRow:
    @pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.area}: {row.tried}")
    def test_it_names_the_argument_and_the_remedy_in_one_line(self, row: Row) -> None:
        before = everything()
        error, message = told(row)
        assert error is row.error
        assert row.message in message
        assert "\n" not in message
        assert len(message) < 400
        assert REMEDY.search(message)
        assert told(row) == (error, message)  # and no failure is taken for a result
        assert everything() == before

    def test_no_two_are_one(self) -> None:
        names = [(row.area, row.tried) for row in ROWS]
        assert len(set(names)) == len(names) >= 80

    def test_the_page_that_lists_them_is_theirs(self) -> None:
        page = Path(__file__).parent.parent / "docs" / "bad_input.rst"
        assert page.read_text() == table(), "python tests/bad_inputs > docs/bad_input.rst"


def test_an_unlimited_cache() -> None:
    H = HessianLinearOperator(MODEL, nn.MSELoss(), PARAMS, DATA, cache=np.inf)
    assert (H @ np.ones(43)).any()


def test_an_only_batch_needs_no_batch_size() -> None:
    def model(params, tree):
        return torch.func.functional_call(MODEL, params, (tree[0],))

    H = HessianLinearOperator(model, cubes, PARAMS, [((X, X[:2]), 0 * Y)])
    plain = HessianLinearOperator(MODEL, cubes, PARAMS, [(X, 0 * Y)])
    np.testing.assert_allclose(H @ np.ones(43), plain @ np.ones(43), rtol=1e-12)


class TestVectors:
    @pytest.mark.parametrize("kind", [np.ones, torch.ones])
    @pytest.mark.parametrize("shape", [(42,), (44, 1), (44, 3), (1, 42), (42, 43)])
    def test_of_the_wrong_length(self, kind, shape) -> None:
        with pytest.raises(ValueError, match=r"x has shape .* but A has shape \(43, 43\).*\(43,\) or \(43, K\)"):
            H @ kind(shape)
        with pytest.raises(ValueError, match=r"\(43, 43\)"):
            H.matmat(kind(shape))

    @pytest.mark.parametrize("x", [1j * np.ones(43), torch.ones(43, dtype=torch.cfloat), np.ones((43, 2), complex)])
    def test_complex(self, x) -> None:
        for A in (H, H.damped(1.0), H[:40, :]):
            with pytest.raises(TypeError, match=r"complex.*but A is real"):
                A @ x

    def test_sparse_matrices(self) -> None:
        with pytest.raises(TypeError):  # as SciPy says
            H @ scipy.sparse.eye_array(43).tocsr()


class TestBlockNames:
    @pytest.mark.parametrize(
        ("rows", "cols", "message"),
        [
            ("0.wight", None, "rows: no parameter or module is named '0.wight'; did you mean '0.weight'"),
            ("0.bias", ["2.bais"], "cols: no parameter or module is named '2.bais'; did you mean '2.bias'"),
            ("zzz", None, r"known are '0.weight'"),
            ([], None, "rows names no parameter"),
            (["0.bias", "0.bias"], None, "rows names '0.bias' twice"),
        ],
    )
    def test_unknown_none_or_twice(self, rows, cols, message) -> None:
        with pytest.raises(ValueError, match=message):
            H.block(rows, cols)
        with pytest.raises(ValueError, match=message):
            H.damped(1.0).block(rows, cols)


def test_batches_of_one_pair_of_rows_are_not_mistaken_for_a_pair() -> None:
    H = HessianLinearOperator(MODEL, nn.MSELoss(), PARAMS, (X[:2], Y[:2]))
    with pytest.raises(TypeError, match="pairs"):
        H @ np.ones(43)
    good = HessianLinearOperator(MODEL, nn.MSELoss(), PARAMS, cut(X, Y, (2, 2)))
    assert (good @ np.ones(43)).any()

"""The error of an approximation, block by block, against dense matrices."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from cases import Problem, cut, seeded
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

from curvop import (
    BlockDiagonalLinearOperator,
    Comparison,
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    compare,
)
from curvop.checks.compare import PartError
from curvop.kernels.kronecker_factors import BlockLayout
from curvop.operators.kronecker import KroneckerFactoredLinearOperator
from curvop.operators.kronecker_blocks import KroneckerBlock

LAYERS = {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]}


@seeded
def problem() -> Problem:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return Problem(model, nn.CrossEntropyLoss(), cut(torch.randn(20, 6), torch.randint(0, 3, (20,)), (12, 8)))


@pytest.fixture(scope="module")
def G() -> GGNLinearOperator:
    own = problem()
    return GGNLinearOperator(own.model, own.loss_function, own.params, own.data)


@pytest.fixture(scope="module")
def dense(G: GGNLinearOperator) -> np.ndarray:
    return G @ np.eye(G.shape[0])


def random_blocks(G: GGNLinearOperator, dense: np.ndarray, noise: float = 0.3) -> tuple[LinearOperator, np.ndarray]:
    """Return disturbed blocks of the layers as an operator without names, and the dense matrix."""
    rng, approximation, blocks = np.random.default_rng(1), np.zeros_like(dense), []
    for names in LAYERS.values():
        place = slice(G.params_slices[names[0]].start, G.params_slices[names[-1]].stop)
        block = dense[place, place]
        error = rng.normal(size=block.shape) * noise * np.linalg.norm(block) / len(block)
        approximation[place, place] = block + (error + error.T) / 2
        blocks.append(aslinearoperator(approximation[place, place]))
    return BlockDiagonalLinearOperator(blocks), approximation


def norms_of(parts: list[tuple[Any, Any]], *matrices: np.ndarray) -> list[float]:
    return [np.linalg.norm([np.linalg.norm(matrix[rows, cols]) for rows, cols in parts]) for matrix in matrices]


def expected(G: GGNLinearOperator, dense: np.ndarray, approximation: np.ndarray) -> dict[str, list[float]]:
    """Return the norms of the exact matrix, the approximation and the difference, for each part."""
    a, b = (slice(G.params_slices[names[0]].start, G.params_slices[names[-1]].stop) for names in LAYERS.values())
    parts = {
        "0": [(a, a)],
        "2": [(b, b)],
        "diagonal blocks": [(a, a), (b, b)],
        "off-diagonal blocks": [(a, b), (b, a)],
        "whole matrix": [(a, a), (b, b), (a, b), (b, a)],
    }
    return {name: norms_of(pairs, dense, approximation, approximation - dense) for name, pairs in parts.items()}


def parts_of(comparison: Comparison) -> dict[str, PartError]:
    parts = [*comparison.blocks, comparison.diagonal, comparison.off_diagonal, comparison.whole]
    return {part.name: part for part in parts}


def test_small_blocks_are_compared_exactly(G: GGNLinearOperator, dense: np.ndarray) -> None:
    K, approximation = random_blocks(G, dense)
    comparison = compare(K, G, groups="layers", num_probes=100, progress=False)
    true = expected(G, dense, approximation)
    whole = true["whole matrix"][2]
    for name, part in parts_of(comparison).items():
        norm, approximate, difference = true[name]
        np.testing.assert_allclose(
            [part.norm.value, part.approximate_norm.value, part.error.value, part.share],
            [norm, approximate, difference / norm, (difference / whole) ** 2],
            rtol=1e-12,
        )
        assert 0 < part.error.error < 1e-12
    assert comparison.num_products == len(dense)
    assert comparison["2"].size == 27


def test_estimates_lie_within_their_errors(G: GGNLinearOperator, dense: np.ndarray) -> None:
    """Compare the root mean square of errors in units of the standard errors with that of Student's t, 1.15 for 8."""
    K, approximation = random_blocks(G, dense)
    true, deviations = expected(G, dense, approximation), []
    for seed in range(60):
        parts = parts_of(compare(K, G, groups="layers", num_probes=8, rng=seed, progress=False))
        deviations.append(
            [
                (estimate.value - value) / estimate.error
                for name, part in parts.items()
                for estimate, value in ((part.norm, true[name][0]), (part.error, true[name][2] / true[name][0]))
                if name != "off-diagonal blocks" or estimate is part.norm
            ]
        )
    sizes = np.mean(np.square(deviations), axis=0) ** 0.5
    assert (sizes > 0.5).all()
    assert (sizes < 2.2).all()


def test_what_a_block_diagonal_matrix_leaves_out_is_known_to_be_lost(G: GGNLinearOperator) -> None:
    comparison = compare(G.block_diagonal("layers"), G, num_probes=4, progress=False)
    assert [block.name for block in comparison.blocks] == ["0", "2"]
    assert comparison.diagonal.error.value < 1e-13
    assert comparison.off_diagonal.error.value == pytest.approx(1, abs=1e-13)
    assert comparison.off_diagonal.error.error < 1e-13
    assert comparison.off_diagonal.approximate_norm == (0, 0)
    assert comparison.off_diagonal.share == pytest.approx(1, abs=1e-13)
    share = comparison.off_diagonal.norm.value / comparison.whole.norm.value
    assert comparison.whole.error.value == pytest.approx(share, abs=1e-13)


def test_any_approximation_may_have_off_diagonal_blocks(G: GGNLinearOperator, dense: np.ndarray) -> None:
    own = problem()
    H = HessianLinearOperator(own.model, own.loss_function, own.params, own.data)
    exact = H @ np.eye(len(dense))
    comparison = compare(G, H, groups="layers", num_probes=100, progress=False)
    for name, (norm, _, difference) in expected(G, exact, dense).items():
        assert parts_of(comparison)[name].error.value == pytest.approx(difference / norm, rel=1e-10)


def test_parameters_are_matched_by_name(G: GGNLinearOperator, dense: np.ndarray) -> None:
    own = problem()
    names = list(reversed(own.params))
    other = GGNLinearOperator(own.model, own.loss_function, {name: own.params[name] for name in names}, own.data)
    assert compare(other, G, num_probes=3, progress=False).whole.error.value < 1e-12
    # Without names, positions are those of the exact matrix, or of the approximation if only that one has names.
    assert compare(aslinearoperator(dense), G, num_probes=3, progress=False).whole.error.value < 1e-12
    assert compare(G, aslinearoperator(dense), num_probes=3, progress=False).whole.error.value < 1e-12


def test_each_parameter_is_a_block_unless_the_approximation_has_blocks(G: GGNLinearOperator) -> None:
    D = DiagonalLinearOperator(G.diagonal(), G._params)
    assert [block.name for block in compare(D, G, num_probes=2, progress=False).blocks] == list(G.params_slices)
    blocks = G.block_diagonal({"a": ["0.weight", "2.bias"], "b": ["0.bias", "2.weight"]})
    names = [block.name for block in compare(blocks, G, num_probes=2, progress=False).blocks]
    assert names == ["0.weight, 2.bias", "0.bias, 2.weight"]
    part = compare(D, G, groups={"last": ["2.weight", "2.bias"]}, num_probes=2, progress=False)
    assert (part["last"].size, part.whole.size) == (27, 27)


def kronecker(params: dict[str, torch.Tensor]) -> KroneckerFactoredLinearOperator:
    """Return a matrix with random factors: one block for the first layer, and two for the rows of the second."""
    generator, blocks = torch.Generator().manual_seed(0), []

    def factor(size: int) -> torch.Tensor:
        root = torch.randn(1, size, size, generator=generator, dtype=torch.float64)
        return root @ root.mT / size

    for names, (outputs, inputs), rows in (
        (LAYERS["0"], (8, 6), None),
        (LAYERS["2"], (1, 8), (0, 1)),
        (LAYERS["2"], (2, 8), (1, 3)),
    ):
        shapes = tuple(params[name].shape for name in names)
        layout = BlockLayout(tuple(names), shapes, 1, outputs, inputs, bias=True, rows=rows)
        blocks.append(KroneckerBlock(layout, factor(outputs), factor(inputs + 1)))
    return KroneckerFactoredLinearOperator(blocks, params)


def test_the_blocks_of_a_kronecker_factored_matrix_are_its_layers(G: GGNLinearOperator, dense: np.ndarray) -> None:
    K = kronecker(problem().params)
    comparison = compare(K, G, num_probes=100, progress=False)
    assert [block.name for block in comparison.blocks] == ["0", "2"]
    for name, (norm, approximate, difference) in expected(G, dense, K @ np.eye(len(dense))).items():
        part = parts_of(comparison)[name]
        assert part.error.value == pytest.approx(difference / norm, rel=1e-10)
        assert part.approximate_norm.value == pytest.approx(approximate, rel=1e-10)
    assert comparison.whole.approximate_norm.value == pytest.approx(K.frobenius_norm(), rel=1e-10)


def test_zero_matrices() -> None:
    params = {"a": torch.zeros(3), "b": torch.zeros(2)}
    zero, one = (DiagonalLinearOperator(np.full(5, value), params) for value in (0.0, 1.0))
    assert compare(zero, zero, progress=False).whole.error == (0, 0)
    assert compare(one, zero, progress=False).whole.error.value == np.inf
    assert compare(zero, one, progress=False).whole.error.value == 1
    json.dumps(compare(one, zero, progress=False).json(), allow_nan=False)


def test_the_table_shows_every_part(G: GGNLinearOperator, dense: np.ndarray) -> None:
    K, _ = random_blocks(G, dense)
    comparison = compare(K, G, groups="layers", num_probes=30, progress=False)
    lines = str(comparison).splitlines()
    assert lines[0].split("  ")[0] == "block"
    assert [line.split("  ")[0] for line in lines[1:]] == list(parts_of(comparison))
    assert "+-" not in lines[2]  # 27 columns: exact
    assert "+-" in lines[1]
    assert len({len(line) for line in lines}) == 1
    found = json.loads(json.dumps(comparison.json()))
    assert found["blocks"][0]["error"] == list(comparison["0"].error)
    with pytest.raises(KeyError, match="no block is named '1'; there are 0, 2"):
        comparison["1"]


def test_seeds(G: GGNLinearOperator, dense: np.ndarray) -> None:
    K, _ = random_blocks(G, dense)
    first, again, other = (
        compare(K, G, groups="layers", num_probes=3, rng=seed, progress=False).whole.error.value for seed in (0, 0, 1)
    )
    assert first == again != other


def test_wrong_arguments(G: GGNLinearOperator, dense: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pass two square matrices of the same shape"):
        compare(aslinearoperator(np.eye(3)), G)
    with pytest.raises(TypeError, match="neither approximation nor exact has parameters"):
        compare(aslinearoperator(dense), aslinearoperator(dense))
    with pytest.raises(ValueError, match="num_probes is 1, but must be an integer >= 2"):
        compare(G, G, num_probes=1)
    with pytest.raises(ValueError, match="differ in the parameter 'other'"):
        compare(DiagonalLinearOperator(np.ones(len(dense)), {"other": torch.zeros(len(dense))}), G)
    with pytest.raises(ValueError, match="a product with approximation is not finite"):
        compare(aslinearoperator(np.full_like(dense, np.nan)), G, progress=False)

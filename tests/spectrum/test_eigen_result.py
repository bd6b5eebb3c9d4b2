"""Results of `eigsh` unpack, are in ascending order, and name the ends of the spectrum that they contain."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from matrices import matrix
from scipy.sparse.linalg import aslinearoperator

from curvop.spectrum import Certificate, EigenResult, certify, eigsh

SPECTRA = {
    "indefinite": np.linspace(-2, 3, 60) ** 3,
    "positive": np.linspace(1, 2, 60) ** 8,
    "negative": -(np.linspace(1, 2, 60) ** 8),
    "singular": np.r_[np.zeros(57), 1.0, 2.0, 3.0],
    "balanced": np.r_[-5.0, np.linspace(-1, 1, 58), 5.0],
}
WHICH = ["LA", "SA", "LM", "SM", "BE"]


def quietly(*args, **options) -> EigenResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return eigsh(*args, progress=False, **options)


def result_of(values, which: str = "LA", size: int = 60, **fields) -> EigenResult:
    """Return a result with these eigenvalues of a diagonal matrix, as a solver would return it."""
    values = np.asarray(values, dtype=float)
    settings = {"converged": True, "products": 7, "method": "lanczos", "wanted": len(values), **fields}
    return EigenResult(
        values, np.eye(size)[:, : len(values)], settings.pop("certificate", None), which=which, **settings
    )


def certificate_of(residuals) -> Certificate:
    residuals = np.asarray(residuals, dtype=float)
    return Certificate(residuals, 2 * residuals, 3 * residuals, *np.zeros(5), 0, None, None, 9, "LA", 1e-4)


class TestUnpacking:
    @pytest.mark.parametrize("method", ["arpack", "lobpcg", "lanczos", "dense"])
    def test_values_and_vectors(self, method: str) -> None:
        A = matrix(SPECTRA["indefinite"])
        result = eigsh(A, 3, method=method, progress=False)
        values, vectors = result
        assert values is result.values
        assert vectors is result.vectors
        np.testing.assert_allclose(A @ vectors, vectors * values, atol=1e-10 * np.abs(values).max())

    def test_in_place_of_the_function_of_scipy(self) -> None:
        from scipy.sparse.linalg import eigsh as scipy_eigsh

        A = matrix(np.r_[0.1, -0.2, 0.3, -0.4, np.linspace(1, 2, 50), np.linspace(-3, -1, 40)])
        for which in WHICH:
            expected, _ = scipy_eigsh(A, 4, which=which, rng=0)
            values, _ = eigsh(A, 4, which, progress=False)
            np.testing.assert_allclose(values, expected, atol=1e-12 * np.abs(expected).max())

    def test_a_certificate_takes_the_pair(self) -> None:
        A = matrix(SPECTRA["indefinite"])
        assert certify(A, *eigsh(A, 4, "LM", progress=False), which="LM", progress=False).ok


class TestOrder:
    @pytest.mark.parametrize(
        ("method", "which"),
        [
            *((method, which) for method in ("arpack", "dense") for which in WHICH),
            *(("lanczos", which) for which in WHICH if which != "SM"),
            *(("lobpcg", which) for which in ("LA", "SA")),
        ],
    )
    def test_pairs_that_did_not_converge_keep_their_vectors_and_certificates(self, method: str, which: str) -> None:
        """The residuals differ by a factor of 5 or more, so that a wrong order cannot pass."""
        A = matrix(np.r_[-40.0, np.linspace(-1, 1, 298) ** 3, 50.0])
        result = quietly(A, 5, which, method=method, maxiter=1, tol=1e-3, side="parameters")
        assert (np.diff(result.values) >= 0).all()
        residuals = np.linalg.norm(A @ result.vectors - result.vectors * result.values, axis=0)
        certificate = result.certificate
        np.testing.assert_allclose(certificate.residuals, residuals, rtol=1e-6, atol=1e-13)
        assert (certificate.residuals <= certificate.bounds).all()
        assert (certificate.estimates <= certificate.bounds).all()
        if len(residuals) == 5 and method != "dense":
            assert residuals.max() > 5 * residuals.min()

    @pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
    def test_a_result_may_be_made_in_any_order(self, order: list[int]) -> None:
        values, residuals = np.array([-3.0, 1.0, 2.0, 8.0]), np.array([1e-3, 1e-5, 1e-7, 1e-9])
        result = EigenResult(
            values[order],
            np.eye(6)[:, order],
            certificate_of(residuals[order]),
            *(True, 7, "lanczos", "LM", 4),
        )
        np.testing.assert_array_equal(result.values, values)
        np.testing.assert_array_equal(result.vectors, np.eye(6)[:, :4])
        np.testing.assert_array_equal(result.certificate.residuals, residuals)
        np.testing.assert_array_equal(result.certificate.bounds, 2 * residuals)
        np.testing.assert_array_equal(result.certificate.estimates, 3 * residuals)
        assert result.certificate.products == 9
        rows = [line.split() for line in str(result).splitlines()[2:6]]
        assert rows == [
            [str(i + 1), f"{v:.8g}", f"{r:.1e}", f"{2 * r:.1e}"]
            for i, (v, r) in enumerate(zip(values, residuals, strict=True))
        ]

    def test_equal_values_keep_their_vectors(self) -> None:
        result = result_of([2.0, 1.0, 2.0, 1.0])
        np.testing.assert_array_equal(result.vectors, np.eye(60)[:, [1, 3, 0, 2]])

    def test_arrays_that_are_in_order_are_not_copied(self) -> None:
        values, vectors = np.arange(3.0), np.eye(9)[:, :3]
        result = EigenResult(values, vectors, None, True, 7, "dense", "LA", 3)
        assert result.values is values
        assert result.vectors is vectors

    @pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
    def test_copies(self, again) -> None:
        result = eigsh(matrix(SPECTRA["indefinite"]), 5, "LM", progress=False)
        other = again(result)
        assert str(other) == str(result)
        np.testing.assert_array_equal(other.vectors, result.vectors)

    def test_files_say_their_format(self, tmp_path: Path) -> None:
        result = eigsh(matrix(SPECTRA["indefinite"]), 5, "LM", progress=False)
        result.save(tmp_path / "pairs.npz")
        with np.load(tmp_path / "pairs.npz", allow_pickle=False) as file:
            assert file["format"] == 2
            np.testing.assert_array_equal(file["values"], result.values)
        assert str(EigenResult.load(tmp_path / "pairs.npz")) == str(result)

    def test_certify_keeps_the_order_of_its_arguments(self) -> None:
        A = matrix(SPECTRA["indefinite"])
        values, vectors = eigsh(A, 5, "LM", tol=1e-2, progress=False)
        vectors = vectors + 1e-3 * np.random.default_rng(0).normal(size=vectors.shape) * np.arange(5)
        order = [2, 0, 4, 1, 3]
        one, other = (certify(A, values[o], vectors[:, o], progress=False) for o in ([0, 1, 2, 3, 4], order))
        for name in ("residuals", "bounds", "estimates"):
            np.testing.assert_allclose(getattr(other, name), getattr(one, name)[order], rtol=1e-6)


class TestEnds:
    @staticmethod
    def promised(end: str, which: str, values: np.ndarray) -> bool:
        if which == "LM":
            return bool((values >= 0).any() if end == "largest" else (values <= 0).any())
        return which in {"largest": ("LA", "BE"), "smallest": ("SA", "BE")}[end]

    @pytest.mark.parametrize("which", WHICH)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_they_are_those_of_the_matrix_or_an_error(self, name: str, which: str) -> None:
        """For all numbers of eigenvalues; with all of them, both ends are known."""
        exact = np.sort(SPECTRA[name])
        A = matrix(exact)
        for k in (2, 3, 7, 60):
            result = quietly(A, k, which, method="dense", certificate=False)
            for end, true in (("largest", exact[-1]), ("smallest", exact[0])):
                if k == 60 or self.promised(end, which, result.values):
                    found = getattr(result, end)
                    assert type(found) is float
                    assert found == pytest.approx(true, abs=1e-10 * np.abs(exact).max())
                else:
                    with pytest.raises(ValueError, match=f"which is '{which}'.* the {end} eigenvalue .*: pass which="):
                        getattr(result, end)

    @pytest.mark.parametrize(
        ("which", "values", "largest", "smallest"),
        [
            ("LA", [1.0, 2.0, 3.0], 3.0, None),
            ("SA", [1.0, 2.0, 3.0], None, 1.0),
            ("BE", [-1.0, 3.0], 3.0, -1.0),
            ("BE", [3.0], 3.0, None),  # when time was up, one basis vector was there
            ("LM", [-3.0, 2.0], 2.0, -3.0),  # all others lie between -2 and 2
            ("LM", [2.0, 3.0], 3.0, None),
            ("LM", [-3.0, -2.0], None, -3.0),
            ("LM", [0.0, 3.0], 3.0, 0.0),  # all others are 0
            ("LM", [-3.0, 0.0], 0.0, -3.0),
            ("SM", [-0.1, 0.2], None, None),
        ],
    )
    def test_what_which_promises(self, which: str, values, largest: float | None, smallest: float | None) -> None:
        result = result_of(values, which)
        for end, expected in (("largest", largest), ("smallest", smallest)):
            if expected is None:
                with pytest.raises(ValueError, match=f"so the {end} eigenvalue of A need not be in the result: pass"):
                    getattr(result, end)
            else:
                assert getattr(result, end) == expected

    @pytest.mark.parametrize(
        ("which", "end", "message"),
        [
            ("SA", "largest", "which is 'SA', so the largest .* pass which='LA' or 'BE'$"),
            ("LA", "smallest", "which is 'LA', so the smallest .* pass which='SA' or 'BE'$"),
            (
                "LM",
                "smallest",
                "which is 'LM' and all values are positive, so the smallest .* pass which='SA' or 'BE'$",
            ),
        ],
    )
    def test_errors_say_what_to_pass(self, which: str, end: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            getattr(result_of([1.0, 2.0], which), end)

    def test_all_eigenvalues_contain_both_ends(self) -> None:
        for which in WHICH:
            result = result_of([1.0, 2.0], which, size=2)
            assert (result.largest, result.smallest) == (2.0, 1.0)

    def test_no_time_for_any(self) -> None:
        with pytest.warns(RuntimeWarning, match="time was up"):
            result = eigsh(np.diag(np.arange(100.0)), 3, method="lanczos", seconds=0, progress=False)
        values, vectors = result
        assert (values.shape, vectors.shape) == ((0,), (100, 0))
        for end in ("largest", "smallest"):
            with pytest.raises(ValueError, match="contains no eigenvalues, as time was up: allow more seconds"):
                getattr(result, end)

    def test_none_converged(self) -> None:
        result = quietly(matrix(SPECTRA["indefinite"]), 3, "SM", maxiter=1, ncv=5)
        assert not len(result.values)
        with pytest.raises(ValueError, match="contains no eigenvalues, as none converged: increase maxiter or ncv"):
            _ = result.smallest

    @pytest.mark.parametrize("which", ["LA", "LM", "BE"])
    def test_what_arpack_leaves_out_may_be_the_largest(self, which: str) -> None:
        """ARPACK returns the converged eigenpairs, which need not be the outermost ones."""
        result = quietly(matrix(np.r_[10.0, 9.0, np.linspace(0, 1, 298)]), 6, which, maxiter=1, ncv=20)
        assert 0 < len(result.values) < 6
        with pytest.raises(ValueError, match=r"found only \d of 6 eigenvalues, so the largest .*: increase maxiter"):
            _ = result.largest

    @pytest.mark.parametrize("method", ["lobpcg", "lanczos"])
    def test_current_eigenpairs_approximate_the_end(self, method: str) -> None:
        A = matrix(np.linspace(-1, 1, 300) ** 3)
        result = quietly(A, 3, method=method, maxiter=1, tol=1e-12)
        assert not result.converged
        assert result.largest == pytest.approx(1, abs=0.2)

    def test_the_smaller_side(self) -> None:
        import torch
        from torch import nn

        from curvop import EFLinearOperator

        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        X, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
        F = EFLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
        exact = np.linalg.eigvalsh(F @ np.eye(F.shape[0]))
        result = eigsh(F, 4, progress=False)
        assert "rows of its factor" in result.note
        np.testing.assert_allclose(result.values, exact[-4:], rtol=1e-10)
        assert result.largest == pytest.approx(exact[-1], rel=1e-12)
        with pytest.raises(ValueError, match="which is 'LA'"):  # the matrix is singular, but the result does not say so
            _ = result.smallest


def test_the_certificate_can_be_replaced() -> None:
    A = aslinearoperator(matrix(SPECTRA["indefinite"]))
    result = eigsh(A, 4, "LM", certificate=False, progress=False)
    assert dataclasses.replace(result, certificate=certify(A, *result, which="LM", progress=False)).ok

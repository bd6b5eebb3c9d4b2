"""Files written by an earlier version of the package load, and their results are not computed again.

They are in `old_files`; `old_files/make.py` wrote them with the sources of commit 8eb6f66, for the problems in
`old_problem`.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import old_problem
import pytest
import torch
from old_problem import SIZE, vectors

import curvop
from curvop.spectrum import BlockStudy, EigenResult, SpectralDensity, blocks, density

OLD = Path(__file__).parent / "old_files"
VERSIONS = json.loads((OLD / "versions.json").read_text())
THE_PYTHON = sys.version_info[:2] == tuple(map(int, VERSIONS["python"].split(".")[:2]))
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # rounding differs between machines
CLOSE_SINGLE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def old(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a folder or file, because opening modifies it."""

    def copied(name: str) -> Path:
        source, copy = OLD / name, tmp_path / "old"
        return Path(shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy))

    return copied


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


def read_json(name: str) -> Any:
    return json.loads((OLD / name).read_text())


#: Keys of JSON files that later versions added.
NEW_KEYS = {"status", "format", "notes", "ok", "ends"}


#: What belongs to the eigenvalues `values` of a saved result, or to the `eigenvalues` that ``curvop eigs`` writes.
PER_EIGENPAIR = {
    "values": ("values", "vectors", "certificate_residuals", "certificate_bounds", "certificate_estimates", "bounds"),
    "eigenvalues": ("eigenvalues", "eigenvectors", "residuals", "allowed_residuals", "which"),
}


def ascending(tree: Any) -> Any:
    """Return an old file, or a JSON value, with its eigenvalues and all that belongs to them in ascending order."""
    if isinstance(tree, list):
        return [ascending(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    changed = {name: ascending(value) for name, value in tree.items()}
    changed |= {name: np.sort(value) for name, value in tree.items() if name.endswith("atoms")}
    for values, names in PER_EIGENPAIR.items():
        if values in tree:
            order = np.argsort(tree[values], kind="stable")
            changed |= {
                name: [tree[name][index] for index in order] if isinstance(tree[name], list) else tree[name][..., order]
                for name in names
                if name in tree and len(tree[name])
            }
    return changed


def assert_close(actual: Any, expected: Any, tolerances: dict[str, float] | None = None) -> None:
    """Compare arrays and JSON values: floats up to rounding, everything else exactly."""
    if isinstance(expected, dict):
        assert [name for name in actual if name in expected or name not in NEW_KEYS] == list(expected)
        for name, value in expected.items():
            assert_close(actual[name], value, tolerances)
    elif isinstance(expected, list) and any(isinstance(value, dict | list) for value in expected):
        assert len(actual) == len(expected)
        for found, value in zip(actual, expected, strict=True):
            assert_close(found, value, tolerances)
    elif np.asarray(expected).dtype.kind == "f":
        np.testing.assert_allclose(actual, expected, **(tolerances or CLOSE))
    else:
        np.testing.assert_array_equal(actual, expected)


def assert_same_density(found: SpectralDensity, expected: SpectralDensity, tolerances: dict[str, float]) -> None:
    for field in dataclasses.fields(SpectralDensity):
        assert_close(getattr(found, field.name), getattr(expected, field.name), tolerances)


#: Composite operators, which took no tensors and were not known to be symmetric when the files were written.
COMPOSITES = ["sum", "multiple", "product"]


class TestJournals:
    @pytest.mark.parametrize("name", COMPOSITES)
    def test_composites_are_answered_although_they_were_not_known_to_be_symmetric(
        self, old: Callable[[str], Path], name: str
    ) -> None:
        expected = arrays(OLD / "journals" / "expected.npz")[name]
        A = old_problem.OPERATORS[name]()
        with curvop.JournaledLinearOperator(A, old(f"journals/{name}")) as J:
            answered = J @ vectors(A.shape[1], 2)
            assert (J.num_products, J.num_answered) == (0, 2)
        np.testing.assert_array_equal(answered.ravel(), expected[: answered.size])
        np.testing.assert_allclose(answered, A @ vectors(A.shape[1], 2), rtol=1e-6, atol=1e-6 * np.abs(answered).max())

    @pytest.mark.parametrize(
        "name", [name for name in (*old_problem.OPERATORS, old_problem.DISTRIBUTED) if name not in COMPOSITES]
    )
    def test_every_product_is_answered(self, old: Callable[[str], Path], name: str) -> None:
        if name in old_problem.PYTHON_ONLY and not THE_PYTHON:
            pytest.skip(f"the file knows the bytecode of Python {VERSIONS['python']}")
        expected = arrays(OLD / "journals" / "expected.npz")[name]
        with old_problem.operator(name) as A:
            with curvop.JournaledLinearOperator(A, old(f"journals/{name}")) as J:
                count = J.num_recorded
                answered = old_problem.products(J)
                assert (J.num_products, J.num_answered, J.num_recorded) == (0, count, count)
                assert count >= 2
            np.testing.assert_array_equal(np.concatenate([np.ravel(product) for product in answered]), expected)
            # The recorded products agree with those of this version.
            product = A @ vectors(A.shape[1], 2)
            assert product.dtype == answered[0].dtype
            np.testing.assert_allclose(answered[0], product, rtol=1e-6, atol=1e-6 * np.abs(product).max())

    def test_the_operators_of_the_package_multiply_nothing(self, old: Callable[[str], Path]) -> None:
        A = old_problem.hessian()
        with curvop.JournaledLinearOperator(A, old("journals/hessian")) as J:
            old_problem.products(J.recall())
        assert A.num_products == 0

    def test_it_goes_on(self, old: Callable[[str], Path]) -> None:
        folder, x = old("journals/hessian"), vectors(SIZE, 1, seed=20)
        with curvop.JournaledLinearOperator(old_problem.hessian(), folder) as J:
            count, made = J.num_recorded, J @ x
            assert (J.num_products, J.num_recorded) == (1, count + 1)
        with curvop.JournaledLinearOperator(old_problem.hessian(), folder) as J:
            np.testing.assert_array_equal(J @ x, made)
            old_problem.products(J)
            assert (J.num_products, J.num_answered) == (0, count + 1)

    def test_what_was_cut_off_is_made_anew(self, old: Callable[[str], Path]) -> None:
        A = old_problem.hessian()
        with curvop.JournaledLinearOperator(A, old("torn-journal")) as J:
            assert J.num_recorded == 2
            found = J @ vectors(SIZE, 3)
            assert (J.num_products, J.num_answered, J.num_recorded) == (1, 2, 3)
        np.testing.assert_allclose(found, A @ vectors(SIZE, 3), **CLOSE)

    def test_of_another_problem(self, old: Callable[[str], Path]) -> None:
        settings = old_problem.problem()
        with torch.no_grad():
            settings["params"]["0.bias"][0] += 1e-9
        A = curvop.HessianLinearOperator(**settings)
        with pytest.raises(ValueError, match=r"belongs to another problem: params\['0.bias'\] differs"):
            curvop.JournaledLinearOperator(A, old("journals/hessian"))


class TestCheckpoints:
    @pytest.mark.parametrize("stage", old_problem.DENSITY_STAGES)
    def test_a_density(self, old: Callable[[str], Path], stage: str) -> None:
        name = stage.partition("-")[0]
        make, options = old_problem.DENSITIES[name]
        products, A = read_json("densities/products.json"), make()
        found = density(A, **options, checkpoint=old(f"densities/{stage}"), progress=False)
        assert A.num_products == products[stage] < products[name]
        expected = SpectralDensity.load(OLD / "densities" / f"{name}.npz")
        assert_same_density(found, expected, CLOSE_SINGLE if name == "float32" else CLOSE)

    @pytest.mark.parametrize("stage", ["steps", "norms", "columns"])
    def test_blocks(self, old: Callable[[str], Path], stage: str) -> None:
        products = read_json("block-studies/products.json")
        with old_problem.counted_hessian() as (A, bar):
            found = blocks(A, **old_problem.BLOCKS, checkpoint=old(f"block-studies/{stage}"), progress=False)
        assert bar.n == products[stage] < products["fresh"]
        expected = BlockStudy.load(OLD / "block-studies" / "blocks.npz")
        assert (found.names, found.num_products, found.complete) == (expected.names, expected.num_products, True)
        for name in ("sizes", "norms", "norm_errors"):
            assert_close(getattr(found, name), getattr(expected, name))
        for one, other in zip(found.densities, expected.densities, strict=True):
            assert_same_density(one, other, CLOSE)

    @pytest.mark.parametrize("stage", old_problem.DENSITY_STAGES)
    def test_a_density_is_extended(self, old: Callable[[str], Path], stage: str) -> None:
        """Steps of unfinished probes are continued. Those of finished probes were deleted, so these begin again."""
        name = stage.partition("-")[0]
        make, options = old_problem.DENSITIES[name]
        products, A, folder = read_json("densities/products.json"), make(), old(f"densities/{stage}")
        more = options | {"num_probes": options["num_probes"] + 2, "memory": None}
        found = density(A, **more, checkpoint=folder, progress=False)
        tolerances = CLOSE_SINGLE if name == "float32" else CLOSE
        assert A.num_products == products[stage] + 2 * 6
        assert_same_density(found, density(make(), **more, progress=False), tolerances)
        longer = more | {"num_steps": 8}
        extended = density(make(), **longer, checkpoint=folder, progress=False)
        assert_same_density(extended, density(make(), **longer, progress=False), tolerances)

    def test_of_something_else(self, old: Callable[[str], Path]) -> None:
        make, options = old_problem.DENSITIES["hessian"]
        with pytest.raises(ValueError, match="rng differs"):
            density(make(), **options | {"rng": 5}, checkpoint=old("densities/hessian-begun"), progress=False)


class TestResults:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("results/density.npz", SpectralDensity),
            ("studies/finished/density.npz", SpectralDensity),
            ("results/eigen-certified.npz", EigenResult),
            ("results/eigen-plain.npz", EigenResult),
            ("results/eigen-unfinished.npz", EigenResult),
            ("studies/finished/eigenpairs_LA.npz", EigenResult),
            ("results/blocks.npz", BlockStudy),
            ("studies/finished/blocks.npz", BlockStudy),
        ],
    )
    def test_they_are_saved_as_they_were_in_ascending_order(self, tmp_path: Path, path: str, kind: Any) -> None:
        kind.load(OLD / path).save(tmp_path / "again.npz")
        again, expected = arrays(tmp_path / "again.npz"), ascending(arrays(OLD / path))
        computed = ["certificate_remaining", "certificate_innermost"]  # added to old certificates
        assert [name for name in again if name not in computed] == ["format", *expected]
        assert again["format"] == 2
        for name, array in expected.items():
            assert again[name].dtype == array.dtype
            np.testing.assert_array_equal(again[name], array)

    def test_a_density(self) -> None:
        found, expected = SpectralDensity.load(OLD / "results" / "density.npz"), arrays(OLD / "results/expected.npz")
        for name, array in ascending(arrays(OLD / "results" / "density.npz")).items():
            np.testing.assert_array_equal(getattr(found, name), array)
        for name, part in (("trace", found.trace()), ("cdf", found.cdf(old_problem.POINTS))):
            for field in ("value", "error", "low", "high"):
                np.testing.assert_allclose(getattr(part, field), expected[f"density {name} {field}"], **CLOSE)
        assert str(found)

    @pytest.mark.parametrize("name", old_problem.EIGEN)
    def test_eigenpairs(self, name: str) -> None:
        path = OLD / "results" / f"eigen-{name}.npz"
        found, expected = EigenResult.load(path), arrays(OLD / "results/expected.npz")
        assert (np.diff(found.values) >= 0).all()
        assert (np.diff(arrays(path)["values"]) < 0).any() == (name != "plain")  # the order in the file
        for field, array in ascending(arrays(path)).items():
            owner = found.certificate if field.startswith("certificate_") else found
            np.testing.assert_array_equal(getattr(owner, field.removeprefix("certificate_")), array)
        assert (found.certificate is None) == (name == "plain")
        assert found.ok == expected[f"eigen {name} ok"]
        assert str(found)

    @pytest.mark.parametrize("name", old_problem.EIGEN)
    def test_vectors_and_residuals_belong_to_their_eigenvalues(self, name: str) -> None:
        found = EigenResult.load(OLD / "results" / f"eigen-{name}.npz")
        residuals = np.linalg.norm(old_problem.hessian() @ found.vectors - found.vectors * found.values, axis=0)
        if found.certificate is None:
            assert residuals.max() < 1e-12
        else:
            np.testing.assert_allclose(residuals, found.certificate.residuals, rtol=1e-6, atol=1e-13)
            assert (residuals <= found.certificate.bounds + 1e-13).all()

    @pytest.mark.parametrize("name", old_problem.EIGEN)
    def test_pickled_eigenpairs(self, name: str) -> None:
        """Pickles of earlier versions hold the attributes in the order of the files."""
        path = OLD / "results" / f"eigen-{name}.npz"
        expected, raw = EigenResult.load(path), arrays(path)
        certificate = expected.certificate
        if certificate is not None:
            per_pair = {field: raw[f"certificate_{field}"] for field in ("residuals", "bounds", "estimates")}
            certificate = dataclasses.replace(certificate, **per_pair, innermost=None, remaining=None)
        old = EigenResult.__new__(EigenResult)
        state = {"values": raw["values"], "vectors": raw["vectors"], "certificate": certificate}
        old.__setstate__(vars(expected) | state)
        assert str(old) == str(expected)
        assert old.ok == expected.ok
        np.testing.assert_array_equal(old.vectors, expected.vectors)
        if expected.certificate is not None and expected.certificate.remaining is not None:
            np.testing.assert_array_equal(old.certificate.remaining, expected.certificate.remaining)

    def test_files_of_newer_versions_are_refused(self, tmp_path: Path) -> None:
        for kind, name in ((EigenResult, "eigen-plain"), (SpectralDensity, "density"), (BlockStudy, "blocks")):
            np.savez(tmp_path / "newer.npz", format=99, **arrays(OLD / "results" / f"{name}.npz"))
            with pytest.raises(ValueError, match=r"newer\.npz has format 99, .* reads formats up to 2: install"):
                kind.load(tmp_path / "newer.npz")

    def test_blocks(self) -> None:
        path = OLD / "results" / "blocks.npz"
        found, expected, raw = BlockStudy.load(path), arrays(OLD / "results/expected.npz"), arrays(path)
        for name in ("names", "unfinished", "sizes", "norms", "norm_errors", "num_products"):
            np.testing.assert_array_equal(getattr(found, name), raw[name])
        assert (found.names, len(found.unfinished)) == (["0.weight"], 3)
        np.testing.assert_allclose(found.traces.value, expected["blocks traces"], **CLOSE)
        assert str(found)


def test_pickled_operators_without_the_size_of_their_data() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    data = [(torch.ones(3, 2), torch.ones(3, 1))]
    A = curvop.HessianLinearOperator(model, torch.nn.MSELoss(), model.parameters(), data)
    state = vars(A._objective)
    state.pop("data_size", None)  # commit 8eb6f66 had no such attribute
    again = pickle.loads(pickle.dumps(A))
    np.testing.assert_array_equal(again @ np.ones(3), A @ np.ones(3))
    assert "1 batch" in repr(again)


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
        """Run ``python -m curvop`` in this process, which must end with exit code 0, and return the JSON it prints."""

        def command(*arguments: object) -> Any:
            monkeypatch.setattr(sys, "argv", ["curvop", *map(str, arguments)])
            monkeypatch.setattr(sys, "path", sys.path[:])  # the command modifies sys.path
            monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # plots would take most of the time
            monkeypatch.delitem(sys.modules, "curvop.__main__", raising=False)
            with pytest.raises(SystemExit) as end:
                runpy.run_module("curvop", run_name="__main__")
            assert not end.value.code
            return json.loads(capsys.readouterr().out)

        return command

    @pytest.mark.parametrize("name", old_problem.STUDIES)
    def test_a_study_is_resumed(self, old: Callable[[str], Path], run: Callable[..., Any], name: str) -> None:
        folder, expected = old(f"studies/{name}"), read_json("studies/finished/spectrum.json")
        journal_alone = folder.with_name("journal alone")
        shutil.copytree(folder / "journal", journal_alone / "journal")
        by_journal = run(*old_problem.STUDY, "--out", journal_alone, "--resume")["products"]
        found = run(*old_problem.STUDY, "--out", folder, "--resume")
        assert found["ok"]
        # At least the columns of the matrix are read; other vectors may round differently on another machine.
        assert by_journal <= expected["products"] - SIZE
        assert found["products"] == by_journal - old_problem.STUDIES[name][1]
        assert json.loads((folder / "spectrum.json").read_text()) == found
        assert_close(lasting(found), lasting(ascending(expected)), {"rtol": 1e-6, "atol": 1e-8})
        assert_close(SpectralDensity.load(folder / "density.npz").trace().value, expected["density"]["trace"]["value"])
        assert BlockStudy.load(folder / "blocks.npz").names == expected["names"]
        assert EigenResult.load(folder / "eigenpairs_LA.npz").ok

    @pytest.mark.parametrize("name", old_problem.COMMANDS)
    def test_what_is_printed_and_saved_has_its_form(self, run: Callable[..., Any], tmp_path: Path, name: str) -> None:
        out, saved = tmp_path / "saved.npz", name in old_problem.SAVED
        # The earlier version always made the checks of ``curvop eigs --check``.
        more = [*(["--out", out] if saved else []), *(["--check"] if name.startswith("eigs") else [])]
        found, expected = (
            run(*old_problem.COMMANDS[name], *more),
            ascending(read_json(f"commands/{name}.json")),
        )
        assert_close(shape(found), shape(expected))
        for number in ("eigenvalues", "singular_values", "loss", "gradient_norm"):
            assert_close(found.get(number), expected.get(number))
        if saved:
            again, before = arrays(out), ascending(arrays(OLD / "commands" / f"{name}.npz"))
            assert list(again) == ["format", *before]
            for field, array in before.items():
                assert (again[field].dtype, again[field].shape) == (array.dtype, array.shape)
                if (
                    "vectors" not in field and "residuals" not in field
                ):  # signs are arbitrary, residuals are rounding errors
                    assert_close(again[field], array, {"rtol": 1e-4, "atol": 1e-6})


def lasting(tree: Any) -> Any:
    """Return a JSON value without costs, rounded sentences, and quantiles, which can jump at a step of the density."""
    volatile = ("products", "seconds", "journal_bytes", "verdict", "quantiles", "provenance")
    if isinstance(tree, dict):
        return {name: lasting(value) for name, value in tree.items() if name not in volatile}
    return [lasting(value) for value in tree] if isinstance(tree, list) else tree


def shape(tree: Any) -> Any:
    """Return a JSON value with zeros for measured numbers, and without sentences that contain them."""
    if isinstance(tree, dict):
        return {name: 0 if name == "products" else shape(value) for name, value in tree.items() if name != "text"}
    if isinstance(tree, list):
        return [shape(value) for value in tree]
    return 0.0 if isinstance(tree, float) else tree

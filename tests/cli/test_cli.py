"""The ``curvop`` command: its output, files, checks and errors."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import curvop
from curvop.checks.dense_check import dense_check
from curvop.cli.main import main
from curvop.examples.functorch import (
    functorch_empirical_fisher,
    functorch_ggn,
    functorch_hessian,
    functorch_jacobian,
)
from curvop.kernels import recorded
from curvop.kernels.engine import Columns
from curvop.operators.summaries import with_error
from curvop.problems import load

PROBLEMS = """
import torch
from torch import nn

def network(dtype=torch.float64, hidden=4):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2)).to(dtype).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    X = torch.randn(20, 3, generator=generator).to(dtype)
    y = torch.randint(2, (20,), generator=generator)
    params = dict(model.named_parameters())
    return dict(model=model, loss_function=nn.CrossEntropyLoss(), params=params, data=[(X[:7], y[:7]), (X[7:], y[7:])])

def small():
    return network()

def single():
    return network(torch.float32)

def medium():
    return network(hidden=20)

def large():
    return network(hidden=1000)

def listed():
    problem = network()
    return problem | dict(params=problem["model"].parameters())

def functional():
    # Values that differ from the model's own, and a model that is a function.
    problem = network()
    params = {name.replace(".", "_"): 0.5 * param.detach() for name, param in problem["params"].items()}
    def model(params, X):
        hidden = torch.tanh(X @ params["0_weight"].T + params["0_bias"])
        return hidden @ params["2_weight"].T + params["2_bias"]
    return problem | dict(model=model, params={name: param.requires_grad_() for name, param in params.items()})

def chatty():
    print("so much to say")
    return network()

def indefinite():
    problem = network()
    for param in problem["params"].values():
        param.data *= 3
    return problem

def not_additive():
    # The square of a mean is not a mean over batches, whatever their weights.
    return network() | dict(loss_function=lambda prediction, y: prediction.mean() ** 2)

def training():
    # Each batch is normalized by its own statistics.
    problem = network()
    model = nn.Sequential(nn.BatchNorm1d(3), *problem["model"]).double()
    return problem | dict(model=model, params=dict(model.named_parameters()))

class Direction(torch.autograd.Function):
    # x / |x|, with a backward that treats the norm as a constant.
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm()
    @staticmethod
    def backward(ctx, along):
        x, = ctx.saved_tensors
        norm = x.detach().norm()
        return along / norm - x * (x * along).sum() / norm**3

def wrong_derivative():
    problem = network()
    loss = problem["loss_function"]
    return problem | dict(loss_function=lambda prediction, y: loss(Direction.apply(prediction), y))

def dropout():
    problem = network(hidden=20)
    model = nn.Sequential(nn.Dropout(), *problem["model"])
    return problem | dict(model=model, params=dict(model.named_parameters()))

def ragged():
    # Sequences of two lengths, which the dense reference cannot join into one batch.
    class Pooled(nn.Linear):
        def forward(self, X):
            return super().forward(X).tanh().mean(1)
    model = Pooled(3, 2).double()
    data = [(torch.ones(4, length, 3).double(), torch.zeros(4, 2).double()) for length in (2, 5)]
    return dict(model=model, loss_function=nn.MSELoss(), params=dict(model.named_parameters()), data=data)

# The eigenvalues and the dense check run the model ten times. The linear system of the last layer follows.
LATER = 10

def failing(error, always):
    runs = []
    class Failing(nn.Sequential):
        def forward(self, X):
            runs.append(len(X))
            if always or len(runs) > LATER:
                raise error
            return super().forward(X)
    problem = network()
    model = Failing(*problem["model"])
    return problem | dict(model=model, params=dict(model.named_parameters()))

def fails_at_once():
    return failing(RuntimeError("no second floor\\n  in this house"), always=True)

def fails_later():
    return failing(RuntimeError("out of luck"), always=False)

def not_finite_later():
    runs = []
    class Later(nn.Sequential):
        def forward(self, X):
            runs.append(len(X))
            return super().forward(X) * (torch.nan if len(runs) > LATER else 1)
    problem = network()
    model = Later(*problem["model"])
    return problem | dict(model=model, params=dict(model.named_parameters()))

def interrupted():
    return failing(KeyboardInterrupt(), always=False)

def not_finite():
    problem = network()
    problem["data"][0][0][0, 0] = torch.nan
    return problem

def no_data():
    return network() | dict(data=[])

def one_shot():
    problem = network()
    return problem | dict(data=iter(problem["data"]))

def no_reduction():
    return network() | dict(loss_function=nn.CrossEntropyLoss(reduction="none"))

def linear():
    return network() | dict(loss_function=lambda prediction, y: prediction[:, 0].mean())
"""

P = 26


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Write the problems to a file; return a function that gives the name of one for the command line."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "cli_problems.py"
    path.write_text(PROBLEMS)
    yield lambda name: f"{path}:{name}"
    sys.modules.pop("cli_problems", None)


@pytest.fixture
def run(capsys):
    """Run the command; return its exit code, stdout and stderr."""

    def run_command(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.fixture
def run_json(run):
    def run_command(*argv: object) -> tuple[int, dict]:
        code, out, _ = run("eigs", *argv, "--json")
        return code, json.loads(out)

    return run_command


def dense_eigenvalues(problem: dict) -> np.ndarray:
    return np.linalg.eigvalsh(functorch_hessian(**problem).double().numpy())


class TestDigits:
    @pytest.mark.slow
    def test_the_console_entry(self):
        """Run the command in a process, with all 2,410 parameters."""
        command = [sys.executable, "-W", "error", "-m", "curvop", "eigs", "digits", "--check", "--json"]
        source = Path(curvop.__file__).parents[1]
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["problem"], result["P"], result["N"], result["dtype"]) == ("digits", 2410, 2410, "float64")
        assert result["which"] == ["SA"] * 5 + ["LA"] * 10
        assert result["eigenvalues"] == sorted(result["eigenvalues"])
        assert result["converged"]
        assert max(result["residuals"]) < 1e-13
        assert result["dense"]["done"]
        assert result["dense"]["agrees"]
        assert result["dense"]["difference"] < 1e-13
        assert result["solve"]["block"] == ["2.weight", "2.bias"]
        assert result["solve"]["converged"]
        assert result["solve"]["residual"] < 1e-9
        assert result["products"] > result["solve"]["products"] > 0
        assert result["seconds"] > 0
        assert re.search(r"solve: [\d]+ products \[", done.stderr)

    @pytest.mark.slow
    def test_the_report(self, run):
        code, out, err = run("eigs", "digits", "--block", "0.weight", "--block", "0.bias", "--check")
        assert code == 0
        assert "Hessian of digits" in out
        assert "P = 2,410 (float64 on cpu)" in out
        assert "N = 2,080 (0.weight, 0.bias)" in out
        assert "10 of 10 eigenvalues (LA) of a 2,080 x 2,080 matrix" in out
        assert "5 of 5 eigenvalues (SA) of a 2,080 x 2,080 matrix" in out
        assert len(re.findall(r"^\d+ +-?\d\.\d+ +\d\.\de-\d\d +\d\.\de-\d\d$", out, re.MULTILINE)) == 15
        assert re.search(r"^  agrees$", out, re.MULTILINE)
        assert "B is the block of 0.weight, 0.bias" in out
        assert re.search(r"true relative residual  \d\.\de-1\d ", out)
        assert re.search(r"\d+ products in \d+\.\d\d s \([\d,]+ products/s\)", out)
        assert "products/s]" in err
        assert "products/s]" not in out


class TestNumbers:
    @pytest.mark.parametrize("name", ["small", "single", "listed", "functional"])
    def test_the_ends_of_the_spectrum(self, run_json, spec, name):
        code, result = run_json(spec(name), "--k", 4, "--check")
        dense = dense_eigenvalues(load(spec(name)))
        assert code == 0
        assert (result["P"], result["N"], result["block"]) == (P, P, None)
        assert result["which"] == ["SA"] * 4 + ["LA"] * 4
        atol = 1e-5 if name == "single" else 1e-12
        np.testing.assert_allclose(result["eigenvalues"], [*dense[:4], *dense[-4:]], rtol=0, atol=atol)
        assert max(result["residuals"]) < atol
        np.testing.assert_allclose(result["dense"]["spectral_norm"], np.abs(dense).max())

    @pytest.mark.parametrize(
        ("which", "expected"),
        [
            ("LA", lambda dense: dense[-3:]),
            ("SA", lambda dense: dense[:3]),
            ("LM", lambda dense: np.sort(dense[np.argsort(-np.abs(dense))[:3]])),
            ("SM", lambda dense: np.sort(dense[np.argsort(np.abs(dense))[:3]])),
            ("BE", lambda dense: dense[[0, -2, -1]]),
        ],
    )
    def test_which(self, run_json, spec, which, expected):
        # The first layer only: the spectrum of the whole matrix has zeros, of which rounding decides the smallest.
        block = ("--block", "0.weight", "--block", "0.bias")
        code, result = run_json(spec("small"), "--which", which, "--k", 3, *block)
        problem = load(spec("small"))
        problem["params"] = {name: problem["params"][name] for name in ("0.weight", "0.bias")}
        assert code == 0
        assert result["which"] == [which] * 3
        np.testing.assert_allclose(result["eigenvalues"], expected(dense_eigenvalues(problem)), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("name", ["small", "functional"])
    def test_a_block_in_its_own_order(self, run_json, spec, name, tmp_path):
        problem = load(spec(name))
        names = list(problem["params"])
        chosen = [names[3], names[0]]
        file = tmp_path / "block.npz"
        code, result = run_json(spec(name), *(f"--block={each}" for each in chosen), "--k", 3, "--check", "--out", file)
        assert code == 0
        assert (result["P"], result["N"], result["block"], result["solve"]["block"]) == (P, 14, chosen, chosen)
        whole = functorch_hessian(**problem).numpy()
        rows = [*range(24, 26), *range(12)]
        dense = np.linalg.eigvalsh(whole[np.ix_(rows, rows)])
        np.testing.assert_allclose(result["eigenvalues"], [*dense[:3], *dense[-3:]], rtol=0, atol=1e-13)
        saved = np.load(file, allow_pickle=False)
        assert saved["param_names"].tolist() == chosen
        assert saved["param_slices"].tolist() == [[0, 2], [2, 14]]

    def test_vectors_in_single_precision(self, run_json, spec):
        code, result = run_json(spec("medium"), "--dtype", "float32", "--k", 3, "--check")
        assert code == 0
        assert (result["dtype"], result["model_dtype"]) == ("float32", "float64")
        assert max(result["residuals"]) < 1e-12  # Lanczos has vectors in float64
        assert max(result["allowed_residuals"]) > 1e-6
        assert result["dense"]["allowed"] < 1e-4

    def test_a_looser_tolerance_takes_fewer_products(self, run_json, spec):
        argv = (spec("medium"), "--which", "SA", "--k", 3, "--check")
        few = run_json(*argv, "--tol", 1e-1)[1]
        many = run_json(*argv)[1]
        assert few["products"] < many["products"]
        assert few["dense"]["allowed"] == pytest.approx(1e-1)

    @pytest.mark.parametrize("columns", [1, 8])
    def test_runs_repeat(self, run_json, spec, columns, monkeypatch):
        monkeypatch.setattr(Columns, "_seconds", lambda self, size: pytest.fail("it is measured"))
        one, two = (
            self.untimed(run_json(spec("small"), "--k", 3, "--check", "--columns", columns)[1]) for _ in range(2)
        )
        assert one == two

    def test_runs_that_measure_repeat_where_the_same_is_fastest(self, run_json, spec, monkeypatch):
        """The fastest number of columns is measured, and products are recorded if this takes less time.

        Both may change the last digits.
        """
        monkeypatch.setattr(recorded, "_SECONDS_PER_NODE", np.inf)  # records nothing
        monkeypatch.setattr(Columns, "_seconds", lambda self, size: 1 / size)
        one, two = (self.untimed(run_json(spec("small"), "--k", 3, "--check")[1]) for _ in range(2))
        assert one == two
        monkeypatch.setattr(Columns, "_seconds", lambda self, size: size)
        other = self.untimed(run_json(spec("small"), "--k", 3, "--check")[1])
        assert other["solve"] == one["solve"]  # which multiplies single vectors
        np.testing.assert_allclose(other["eigenvalues"], one["eigenvalues"], rtol=1e-12, atol=1e-15)
        assert max(other["residuals"]) < 1e-13
        assert other["dense"]["difference"] < 1e-13

    @staticmethod
    def untimed(result):
        del result["seconds"], result["solve"]["seconds"], result["dense"]["seconds"]
        return result

    def test_cg_solves_with_the_damped_last_layer(self, run_json, spec):
        code, result = run_json(spec("small"), "--k", 3, "--check", "--damping", 0.5)
        assert code == 0
        assert result["solve"]["block"] == ["2.weight", "2.bias"]
        assert (result["solve"]["N"], result["solve"]["damping"]) == (10, 0.5)
        assert result["solve"]["residual"] < 1e-9

    def test_above_the_limit_the_dense_check_is_not_done(self, run, spec):
        code, out, _ = run("eigs", spec("large"), "--which", "LA", "--k", 2, "--check")
        assert code == 0
        assert "dense check: not done; the matrix has 6,002 rows, more than the limit of 5,000" in out

    def test_if_the_dense_reference_fails_the_report_says_why(self, run, run_json, spec):
        code, out, _ = run("eigs", spec("ragged"), "--k", 2, "--check")
        assert code == 0
        assert re.search(
            r"^dense check: not done; the dense matrix cannot be formed: ValueError: .+$", out, re.MULTILINE
        )
        result = run_json(spec("ragged"), "--k", 2, "--check")[1]
        assert not result["dense"]["done"]
        assert "cannot be joined" in result["dense"]["reason"]


class TestFailures:
    """Results that cannot be trusted are printed, and the exit code is 1."""

    @pytest.mark.filterwarnings(
        "ignore:batches 0 and 1. evaluated as one batch:RuntimeWarning"
    )  # the loss couples examples
    def test_a_dense_matrix_that_disagrees(self, run, run_json, spec):
        code, out, _ = run("eigs", spec("not_additive"), "--k", 3, "--check")
        assert code == 1
        assert re.search(r"^  DOES NOT AGREE$", out, re.MULTILINE)
        code, result = run_json(spec("not_additive"), "--k", 3, "--check")
        assert code == 1
        assert not result["dense"]["agrees"]

    def test_modules_in_training_mode_are_the_likely_reason(self, run, spec):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            code, out, err = run("eigs", spec("training"), "--k", 3, "--check")
        assert code == 1
        assert "warning: '0' (BatchNorm1d) normalizes each of the 2 batches" in err
        assert re.search(r"^  DOES NOT AGREE; modules in training mode .+: call model\.eval\(\)$", out, re.MULTILINE)

    @pytest.mark.filterwarnings(
        "ignore:batches 0 and 1. evaluated as one batch:RuntimeWarning"
    )  # the loss couples examples
    def test_there_is_no_dense_matrix_to_agree_with(self, run, run_json, spec):
        code, out, _ = run("eigs", spec("wrong_derivative"), "--k", 3, "--check")
        assert code == 1
        assert re.search(r"^dense check: not done; the Hessian is wrong: it is not symmetric", out, re.MULTILINE)
        code, result = run_json(spec("wrong_derivative"), "--k", 3, "--check")
        assert code == 1
        assert not result["dense"]["done"]

    def test_a_random_loss_fails_the_dense_check(self, spec):
        problem = load(spec("dropout"))
        check = dense_check(problem, functorch_hessian, list(problem["params"]), [], 1.0)
        assert not check.ok
        assert check.reason.startswith("the loss is random")

    @pytest.mark.filterwarnings(
        "ignore:batches 0 and 1. evaluated as one batch:RuntimeWarning"
    )  # the loss couples examples
    def test_without_check_the_certificate_finds_the_matrix_that_is_not_symmetric(self, run, run_json, spec):
        code, out, _ = run("eigs", spec("wrong_derivative"), "--k", 3)
        assert code == 1
        assert "not certified: A is not symmetric" in out
        code, result = run_json(spec("wrong_derivative"), "--k", 3)
        assert (code, result["ok"], result["dense"]) == (1, False, None)

    def test_eigenvalues_that_do_not_converge(self, run, run_json, spec):
        argv = (spec("medium"), "--which", "SA", "--k", 6, "--maxiter", 1)
        code, out, _ = run("eigs", *argv)
        assert code == 1
        assert "not converged (increase maxiter or ncv, or decrease k): 6 eigenvalues within" in out
        assert "Clustered eigenvalues" in out
        code, result = run_json(*argv)
        assert (code, result["converged"], result["ok"]) == (1, False, False)
        assert max(result["residuals"]) > max(result["allowed_residuals"])

    def test_a_model_that_fails_halfway(self, run, spec):
        code, out, err = run("eigs", spec("fails_later"), "--k", 3, "--check")
        assert code == 1
        assert "3 of 3 eigenvalues (LA)" in out
        last = r"curvop: error: RuntimeError: out of luck \(.+cli_problems.py:\d+\). This was at batch 0 of data"
        assert re.fullmatch(last, err.splitlines()[-1])
        assert "Traceback" not in err

    def test_a_product_that_is_not_finite_halfway(self, run, spec):
        code, _, err = run("eigs", spec("not_finite_later"), "--k", 3, "--check")
        assert code == 2
        assert err.splitlines()[-1].startswith("curvop: error: the problem cannot be evaluated: NonFiniteProductError")
        assert "Traceback" not in err

    def test_ctrl_c(self, run, spec):
        code, _, err = run("eigs", spec("interrupted"), "--k", 3, "--check")
        assert code == 130
        assert err.splitlines()[-1] == "curvop: interrupted"
        assert "Traceback" not in err


class TestOut:
    def test_the_file(self, run_json, spec, tmp_path):
        file = tmp_path / "study.npz"
        file.write_text("what an earlier run left")
        code, result = run_json(spec("small"), "--k", 4, "--check", "--out", file)
        assert code == 0
        saved = np.load(file, allow_pickle=False)
        problem = load(spec("small"))
        dense = functorch_hessian(**problem).numpy()
        values, vectors = saved["eigenvalues"], saved["eigenvectors"]
        assert vectors.shape == (P, 8)
        assert values.tolist() == result["eigenvalues"]
        assert saved["which"].tolist() == result["which"]
        np.testing.assert_allclose(dense @ vectors, vectors * values, atol=1e-12)
        np.testing.assert_allclose(saved["residuals"], result["residuals"])
        np.testing.assert_allclose(saved["dense_eigenvalues"], np.linalg.eigvalsh(dense), atol=1e-13)
        assert saved["param_names"].tolist() == list(problem["params"])
        assert saved["param_slices"].tolist() == [[0, 12], [12, 16], [16, 24], [24, 26]]
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["cli_problems.py", "study.npz"]

    def test_the_report_names_it(self, run, spec, tmp_path):
        file = tmp_path / "study.npz"
        assert f"eigenpairs: {file}" in run("eigs", spec("small"), "--k", 3, "--out", file)[1]

    def test_without_a_dense_check_it_has_no_dense_eigenvalues(self, run, spec, tmp_path):
        run("eigs", spec("small"), "--k", 2, "--out", tmp_path / "study.npz")
        assert "dense_eigenvalues" not in np.load(tmp_path / "study.npz", allow_pickle=False)

    def test_a_file_that_cannot_be_written_leaves_nothing_behind(self, run, spec, tmp_path, monkeypatch):
        def full(*args: object, **kwargs: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(np, "savez", full)
        file = tmp_path / "study.npz"
        file.write_text("what an earlier run left")
        code, _, err = run("eigs", spec("small"), "--k", 3, "--out", file)
        assert code == 1
        assert "OSError: no space left on device" in err
        assert file.read_text() == "what an earlier run left"
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["cli_problems.py", "study.npz"]


class TestOutput:
    def test_a_problem_that_prints_does_not_spoil_the_json(self, run, spec):
        code, out, err = run("eigs", spec("chatty"), "--k", 3, "--json")
        assert code == 0
        assert json.loads(out)["problem"] == spec("chatty")
        assert "so much to say" in err

    def test_progress_on_a_terminal_is_cleared_at_the_end(self, spec, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["eigs", spec("small"), "--k", "3", "--check"]) == 0
        text = terminal.getvalue()
        for step in ("eigsh LA", "eigsh SA", "dense check", "solve"):
            assert re.search(rf"{step}: \d+ products \[", text)
        assert "\n" not in text
        assert text.endswith("\r")
        assert text.rstrip("\r").rpartition("\r")[2].strip() == ""

    def test_progress_in_a_log_ends_with_a_line_break(self, run, spec):
        assert run("eigs", spec("small"), "--k", 3)[2].endswith("\n")

    def test_a_module_in_the_current_directory(self, run, spec, tmp_path, monkeypatch):
        spec("small")
        monkeypatch.chdir(tmp_path)
        code, out, _ = run("eigs", "cli_problems:small", "--k", 3)
        assert code == 0
        assert "Hessian of cli_problems:small" in out

    @pytest.mark.parametrize("argv", [["--help"], ["eigs", "--help"]])
    def test_help(self, run, argv):
        code, out, err = run(*argv)
        assert (code, err) == (0, "")
        assert "usage: curvop" in out

    def test_version(self, run):
        code, out, err = run("--version")
        assert (code, err) == (0, "")
        assert out == f"curvop {curvop.__version__}\n"

    def test_alone_it_prints_its_help(self, run):
        code, out, _ = run()
        assert code == 2
        assert "eigs" in out


class TestBadArguments:
    """One clear line on stderr, nothing on stdout, exit code 2."""

    @pytest.fixture
    def refused(self, run):
        def line(*argv: object) -> str:
            code, out, err = run(*argv)
            assert (code, out) == (2, "")
            assert len(err.splitlines()) == 1, err
            assert err.startswith("curvop: error: ")
            assert "Traceback" not in err
            return err.removeprefix("curvop: error: ").strip()

        return line

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["eig", "digits"], "invalid choice: 'eig'"),
            (["--verbose"], "--verbose"),
            (["eigs"], "required: PROBLEM"),
            (["eigs", "digits", "--seed", "3"], "unrecognized arguments: --seed"),
            (["eigs", "digits", "--bloc", "0.weight"], "unrecognized arguments: --bloc"),
            (["eigs", "digits", "more"], "unrecognized arguments: more"),
            (["eigs", "digits", "--k", "0"], "argument --k: must be >= 1, not 0"),
            (["eigs", "digits", "--k", "-3"], "argument --k: must be >= 1, not -3"),
            (["eigs", "digits", "--k", "2.5"], "argument --k: '2.5' is not an integer"),
            (["eigs", "digits", "--k"], "argument --k: expected one argument"),
            (["eigs", "digits", "--which", "XL"], "argument --which: invalid choice: 'XL'"),
            (["eigs", "digits", "--which", "BE", "--k", "1"], "argument --k: must be >= 2 with --which BE"),
            (["eigs", "digits", "--tol", "-0.1"], "argument --tol: must be finite and >= 0, not -0.1"),
            (["eigs", "digits", "--tol=-1e-3"], "argument --tol: must be finite and >= 0, not -1e-3"),
            (["eigs", "digits", "--tol", "-1e-3"], "argument --tol: "),
            (["eigs", "digits", "--tol", "nan"], "argument --tol: must be finite and >= 0, not nan"),
            (["eigs", "digits", "--tol", "small"], "argument --tol: 'small' is not a number"),
            (["eigs", "digits", "--damping", "inf"], "argument --damping: must be finite and >= 0, not inf"),
            (["eigs", "digits", "--damping", "-1"], "argument --damping: must be finite and >= 0, not -1"),
            (["eigs", "digits", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
            (
                ["eigs", "digits", "--columns", "0"],
                "argument --columns: must be an integer >= 1 or 'auto', not '0'",
            ),
            (["eigs", "digits", "--columns", "all"], "argument --columns: must be an integer >= 1"),
            (["eigs", "digits", "--out", "no/such/folder/x.npz"], "argument --out: no folder 'no/such/folder'"),
            (["eigs", "digits", "--out", "x.npy"], "argument --out: 'x.npy' does not end in .npz"),
            (["eigs", "digts"], "did you mean 'digits'?"),
            (["eigs", "no_such_file.py:problem"], "no file 'no_such_file.py'"),
            (["eigs", "no_such_module:problem"], "no module named 'no_such_module'"),
        ],
    )
    def test_before_anything_is_computed(self, refused, argv, said):
        assert said in refused(*argv)

    def test_a_folder_as_the_file(self, refused, tmp_path):
        (tmp_path / "x.npz").mkdir()
        assert "argument --out: cannot write" in refused("eigs", "digits", "--out", tmp_path / "x.npz")

    def test_the_file_is_checked_before_the_problem_is_loaded(self, refused, spec):
        assert "argument --out" in refused("eigs", spec("chatty"), "--out", "x.txt")

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("smal", [], "(did you mean 'small'?)"),
            ("small", ["--k", "27"], "--k = 27 is too large: pass at most 26, the number of rows of the matrix"),
            ("small", ["--k", "3", "--block", "2.bias"], "--k = 3 is too large"),
            (
                *("small", ["--block", "0.weigth"]),
                "--block: no parameter or module is named '0.weigth'; did you mean '0.weight'",
            ),
            ("small", ["--block", "2.bias", "--block", "2.bias"], "--block: names '2.bias' twice"),
            ("fails_at_once", [], "the problem cannot be evaluated: RuntimeError: no second floor in this house ("),
            ("not_finite", [], "the problem cannot be evaluated: NonFiniteProductError"),
            pytest.param(
                *("dropout", [], "the problem cannot be evaluated: NonDeterministicObjectiveError"),
                marks=pytest.mark.filterwarnings("ignore:dropout is active"),  # which is another warning
            ),
            ("no_data", [], "data is empty"),
            ("one_shot", [], "data is a one-shot iterator"),
            ("no_reduction", [], "reduction"),
            ("linear", ["--k", "1", "--block", "2.weight"], "the matrix is zero: the loss is linear"),
        ],
    )
    def test_in_the_light_of_the_problem(self, refused, spec, name, options, said):
        assert said in refused("eigs", spec(name), *options)

    @pytest.mark.parametrize("name", ["not_finite", "dropout"])
    def test_no_place_is_named_that_is_not_the_users(self, refused, spec, name):
        assert ".py:" not in refused("eigs", spec(name))


class TestCost:
    def test_in_the_report_and_in_the_json(self, run, run_json, spec) -> None:
        code, out, _ = run("eigs", spec("small"), "--cost")
        assert code == 0
        assert re.search(r"cost +one product: .* ms \(.* gradients\); all batches cached", out)
        _, result = run_json(spec("small"), "--cost")
        assert result["cost"]["seconds"] > 0
        assert result["cost"]["kept_share"] == 1

    def test_only_where_asked(self, run_json, spec) -> None:
        assert run_json(spec("small"))[1]["cost"] is None

    @pytest.mark.slow
    def test_the_compiled_engine(self, run_json, spec) -> None:
        few = ("--k", 2, "--columns", 1)  # compile no programs for blocks of vectors
        code, result = run_json(spec("small"), "--engine", "compiled", "--cost", *few)
        assert code == 0
        assert result["cost"]["compile_seconds"] > 0


class TestColumns:
    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("eigs", "--k 2"),
            ("eigs", "--matrix jacobian --k 2"),
            ("solve", ""),
            ("check", ""),
            ("check", "--matrix jacobian"),
            ("spectrum", "--k 2 --steps 3"),
        ],
    )
    def test_every_command_passes_the_setting_on(self, run, spec, monkeypatch, command, options) -> None:
        settings = set()
        init = Columns.__init__

        def listen(self, setting, *args):
            settings.add(setting)
            init(self, setting, *args)

        monkeypatch.setattr(Columns, "__init__", listen)
        run(command, spec("small"), *options.split(), "--columns", 3)
        assert settings == {3}


class TestMatrices:
    @pytest.mark.parametrize(
        ("matrix", "reference"),
        [("ggn", functorch_ggn), ("fisher", functorch_ggn), ("ef", functorch_empirical_fisher)],
    )
    def test_their_largest_eigenvalues(self, run_json, spec, matrix, reference):
        code, result = run_json(spec("small"), "--k", 3, "--check", "--matrix", matrix)
        dense = np.linalg.eigvalsh(reference(**load(spec("small"))).numpy())
        assert code == 0
        assert result["matrix"] == matrix
        assert result["which"] == ["LA"] * 3
        np.testing.assert_allclose(result["eigenvalues"], dense[-3:], rtol=0, atol=1e-13)
        assert result["dense"]["agrees"]

    def test_the_report_names_it(self, run, spec):
        code, out, _ = run("eigs", spec("small"), "--k", 2, "--matrix", "ggn")
        assert code == 0
        assert re.match(r"Gauss-Newton matrix of .*cli_problems.py:small", out)

    def test_a_loss_that_is_no_likelihood_has_no_fisher_matrix(self, run, spec):
        code, _, err = run("eigs", spec("not_additive"), "--matrix", "fisher")
        assert code == 2
        assert "no known log-likelihood" in err

    def test_singular_values_of_the_jacobian(self, run, run_json, spec, tmp_path):
        file = tmp_path / "jacobian.npz"
        argv = (spec("small"), "--k", 3, "--check", "--matrix", "jacobian", "--out", file)
        problem = load(spec("small"))
        J = functorch_jacobian(problem["model"], problem["params"], problem["data"]).numpy()
        code, result = run_json(*argv)
        assert code == 0
        assert (result["N"], result["P"], result["loss"]) == (*J.shape, None)
        np.testing.assert_allclose(result["singular_values"], np.linalg.svd(J)[1][:3], rtol=1e-12)
        assert max(result["residuals"]) < 1e-12
        assert result["dense"]["agrees"]
        saved = np.load(file, allow_pickle=False)
        np.testing.assert_allclose(
            J @ saved["right_vectors"], saved["left_vectors"] * saved["singular_values"], atol=1e-12
        )
        code, out, _ = run("eigs", *argv, "--block", "2.weight")
        assert code == 0
        assert re.match(r"Jacobian of .*cli_problems.py:small", out)
        assert "P = 8 (2.weight)" in out
        assert "3 singular values, largest" in out

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--which", "LA"], "leave it out"),
            (["--k", "100"], "is too large: the Jacobian is"),
            (["--block", "nothing"], "--block: no parameter or module is named 'nothing'"),
        ],
    )
    def test_what_a_jacobian_does_not_have(self, run, spec, options, said):
        code, _, err = run("eigs", spec("small"), "--matrix", "jacobian", *options)
        assert code == 2
        assert said in err.splitlines()[-1]


class TestSolve:
    def test_digits(self, run):
        code, out, err = run("solve", "digits", "--matrix", "ggn", "--damping", "1e-3", "--rank", "50")
        assert code == 0
        assert "Gauss-Newton matrix B of digits" in out
        assert "N = 2,410" in out
        assert re.search(r"cg +\d+ products", out)
        assert re.search(r"true relative residual  \d\.\de-0\d \(requested: 1\.0e-05\)\n  converged", out)
        assert "Nystrom of rank 50, 50 products" in out
        assert "products" in err

    def test_one_product_is_no_plural(self, run, spec):
        _, out, _ = run("eigs", spec("medium"), "--k", "1", "--matrix", "jacobian", "--seconds", "0.000001")
        assert "total: 1 product, " in out

    @pytest.mark.parametrize("name", ["kfac", "ekfac"])
    def test_a_preconditioner_is_shown_with_its_error(self, run, spec, name):
        arguments = ("solve", spec("small"), "--matrix", "ggn", "--preconditioner", name)
        code, out, _ = run(*arguments)
        assert code == 0
        shown = re.search(rf"preconditioner +{name.upper()}, relative error (.+) \(from 16 products\)", out)
        code, out, _ = run(*arguments, "--json")
        result = json.loads(out)
        assert (code, result["converged"], result["preconditioner"]) == (0, True, name)
        problem = load(spec("small"))
        K = {"kfac": curvop.KFACLinearOperator, "ekfac": curvop.EKFACLinearOperator}[name](**problem).to_dense()
        G = curvop.GGNLinearOperator(**problem).to_dense()
        error = result["preconditioner_error"]
        expected = np.linalg.norm(K - G) / np.linalg.norm(G)
        assert abs(error["value"] - expected) < 5 * error["error"] < 0.5 * expected
        assert shown[1] == with_error(error["value"], error["error"])
        assert error["products"] == 16
        code, out, _ = run(*arguments, "--block", "2.weight", "--json")
        assert (code, json.loads(out)["N"]) == (0, 8)

    def test_the_solution_is_a_newton_step(self, run, spec, tmp_path):
        file = tmp_path / "step.npz"
        code, out, _ = run("solve", spec("small"), "--damping", "5", "--rtol", "1e-12", "--out", file, "--json")
        result = json.loads(out)
        assert code == 0
        assert (result["converged"], result["solver"], result["N"]) == (True, "cg", P)
        saved = np.load(file, allow_pickle=False)
        dense = functorch_hessian(**load(spec("small"))).numpy()
        residual = dense @ saved["solution"] + 5 * saved["solution"] - saved["gradient"]
        assert np.linalg.norm(residual) <= 1e-12 * np.linalg.norm(saved["gradient"])
        assert saved["param_names"].tolist() == ["0.weight", "0.bias", "2.weight", "2.bias"]

    def test_a_block(self, run, spec):
        code, out, _ = run("solve", spec("small"), "--block", "2.weight", "--json")
        result = json.loads(out)
        assert code == 0
        assert (result["block"], result["N"]) == (["2.weight"], 8)

    @pytest.mark.parametrize(
        ("limit", "status", "advice"),
        [
            (["--maxiter", "1"], "maxiter", "increase --maxiter"),
            (["--seconds", "0.000001"], "seconds", "increase --seconds"),
        ],
    )
    def test_limits(self, run, spec, limit, status, advice):
        arguments = ("solve", spec("small"), "--damping", "5", "--rtol", "1e-12", *limit)
        code, out, _ = run(*arguments, "--json")
        assert code == (3 if status == "seconds" else 1)
        assert json.loads(out)["status"] == status
        assert advice in run(*arguments)[1]

    def test_an_indefinite_matrix_is_reported(self, run, spec):
        code, out, _ = run("solve", spec("indefinite"), "--damping", "1e-6", "--rtol", "1e-8")
        assert code == 1
        assert "INDEFINITE" in out
        assert "a larger --damping, or --matrix ggn" in out
        assert "minres" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rtol", "0"], "argument --rtol: must be between 0 and 1"),
            (["--rtol", "5"], "argument --rtol: must be between 0 and 1"),
            (["--matrix", "jacobian"], "argument --matrix: invalid choice"),
            (["--rank", "0"], "argument --rank: must be >= 1"),
            (["--maxiter", "0"], "argument --maxiter: must be >= 1"),
            (["--seconds", "soon"], "argument --seconds: 'soon' is not a duration > 0"),
            (["--out", "step.txt"], "does not end in .npz"),
            (["--block", "2.weigth"], "--block"),
            (["--preconditioner", "kfac"], "argument --preconditioner: needs --matrix ggn, ef or fisher"),
            (["--matrix", "ggn", "--preconditioner", "kfac", "--rank", "5"], "cannot be combined with --rank"),
            (["--matrix", "ggn", "--preconditioner", "kfac", "--damping", "0"], "--preconditioner: the damping is 0"),
        ],
    )
    def test_bad_arguments(self, run, spec, arguments, message):
        code, _, err = run("solve", spec("small"), *arguments)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1

    @pytest.mark.parametrize(("rank", "damping"), [("1000", "0.1"), ("5", "0")])
    def test_invalid_preconditioners(self, run, spec, rank, damping):
        code, _, err = run("solve", spec("small"), "--matrix", "ggn", "--rank", rank, "--damping", damping)
        assert code == 2
        assert re.search(r"(rank|damping) is", err)

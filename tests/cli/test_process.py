"""The command as a process: limits, signals, warnings, exit codes, completion, and data in another order each time."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import PROBLEMS
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import curvop
from curvop.checks import dense_check
from curvop.cli.arguments import parse
from curvop.cli.data_order import in_order
from curvop.cli.exit_codes import ExitCode
from curvop.cli.main import main
from curvop.cli.problem_loading import moved
from curvop.cli.process import resume_line
from curvop.problems import load
from curvop.spectrum import EigenResult, eigsh

MORE = """
import os, time, warnings
from torch.utils.data import DataLoader, Dataset, TensorDataset

def examples(problem):
    return TensorDataset(*(torch.cat(part) for part in zip(*problem["data"])))

def shuffled():
    torch.seed()
    problem = network()
    return problem | dict(data=DataLoader(examples(problem), batch_size=6, shuffle=True))

def seeded():
    problem = network()
    generator = torch.Generator().manual_seed(0)
    return problem | dict(data=DataLoader(examples(problem), batch_size=6, shuffle=True, generator=generator))

def shuffles_and_drops():
    problem = network()
    return problem | dict(data=DataLoader(examples(problem), batch_size=6, shuffle=True, drop_last=True))

class Batches:
    # The batches in a random order.
    def __init__(self, data):
        self.data = data
    def __iter__(self):
        return iter([self.data[i] for i in torch.randperm(len(self.data))])

def custom():
    torch.seed()
    problem = network()
    pairs = [(X[i : i + 1], y[i : i + 1]) for X, y in problem["data"] for i in range(len(X))]
    return problem | dict(data=Batches(pairs))

class Napping(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("CURVOP_TEST_NAP", "0")))
        return Nap.apply(x)

class Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(float(os.environ.get("CURVOP_TEST_NAP", "0")))
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        return Nap.apply(gradient)

def slow():
    problem = network(hidden=40)
    problem["model"] = nn.Sequential(*problem["model"], Napping())
    return problem

class Exits(nn.Module):
    def forward(self, x):
        raise SystemExit(0)

def exits():
    problem = network()
    problem["model"] = nn.Sequential(*problem["model"], Exits())
    return problem

def warns():
    warnings.warn("this is\\n    an old model", UserWarning)
    return network()

def listed_loss():
    problem = network()
    loss_function = nn.CrossEntropyLoss(torch.ones(2).double())
    return problem | dict(params=list(problem["params"].values()), loss_function=loss_function)
"""


class FirstHalf(RandomSampler):
    """A sampler with the attributes of its base class, which draws other examples."""

    def __iter__(self):
        return iter(range(len(self.data_source) // 2))


class FirstHalfOf(SubsetRandomSampler):
    """A sampler with the attributes of its base class, which draws other examples."""

    def __iter__(self):
        return iter(self.indices[: len(self.indices) // 2])


COMMANDS = ("eigs", "solve", "spectrum", "check")


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "process_problems.py"
    path.write_text(PROBLEMS + MORE)
    yield lambda name: f"{path}:{name}"
    sys.modules.pop("process_problems", None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def command(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def environment(**more: str) -> dict[str, str]:
    source = str(Path(curvop.__file__).parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source} | more


def process(*argv: object, **settings: Any) -> subprocess.Popen[str]:
    """Start ``python -m curvop`` as a process."""
    command = [sys.executable, "-m", "curvop", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


class TestEigsAlone:
    """``curvop eigs`` computes and certifies eigenvalues, and does nothing else."""

    def test_the_certificate_is_that_of_eigsh(self, run, spec) -> None:
        code, out, _ = run("eigs", spec("medium"), "--k", 3)
        H = curvop.HessianLinearOperator(**load(spec("medium")))
        assert code == 0
        for which in ("LA", "SA"):
            assert str(eigsh(H, 3, which, method="lanczos", progress=False)) in out
        assert "dense check" not in out
        assert "solve" not in out

    def test_the_json_has_the_certificate_and_no_check(self, run, spec) -> None:
        code, out, _ = run("eigs", spec("medium"), "--k", 3, "--json")
        found = json.loads(out)
        assert (code, found["ok"], found["converged"]) == (0, True, True)
        assert (found["dense"], found["solve"]) == (None, None)
        assert [(end["which"], end["ok"], end["converged"]) for end in found["ends"]] == [
            ("LA", True, 3),
            ("SA", True, 3),
        ]
        assert max(found["ends"][0]["bounds"]) < 1e-12
        assert "none missed" in found["ends"][0]["verdict"]
        assert found["eigenvalues"] == found["ends"][1]["values"] + found["ends"][0]["values"]

    def test_the_dense_matrix_is_formed_with_check_only(self, run, spec, monkeypatch) -> None:
        formed = []
        monkeypatch.setattr(
            "curvop.cli.eigs_study.dense_check", lambda *args: formed.append(args) or dense_check.dense_check(*args)
        )
        run("eigs", spec("small"), "--k", 3)
        assert not formed
        assert "agrees" in run("eigs", spec("small"), "--k", 3, "--check")[1]
        assert len(formed) == 1

    def test_all_eigenvalues_of_a_small_block(self, run, spec) -> None:
        code, out, _ = run("eigs", spec("small"), "--block", "2.bias", "--k", 2, "--which", "LA", "--check")
        assert code == 0
        assert "2 of 2 eigenvalues (LA) of a 2 x 2 matrix" in out

    def test_singular_values(self, run, spec) -> None:
        code, out, _ = run("eigs", spec("small"), "--matrix", "jacobian", "--k", 3, "--json")
        assert code == 0
        assert json.loads(out)["dense"] is None


class TestLimits:
    def test_time_that_runs_out_leaves_what_there_is(self, run, spec, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("CURVOP_TEST_NAP", "0.004")
        file = tmp_path / "found.npz"
        argv = ("eigs", spec("slow"), "--k", 8, "--which", "SA", "--seconds", "1s", "--out", file)
        code, out, err = run(*argv)
        assert code == ExitCode.TIME_UP
        assert "before time was up" in out
        assert err.splitlines()[-1] == "curvop: time is up: increase --seconds"
        with np.load(file, allow_pickle=False) as saved:
            assert len(saved["eigenvalues"]) == 8
            assert saved["residuals"].max() > saved["allowed_residuals"].max()

    @pytest.mark.parametrize("which", ["SM", "LA"])
    def test_no_time_at_all(self, run, spec, which) -> None:
        """A small matrix is formed, and 'SM' has another solver. Neither has partial results."""
        argv = ("eigs", spec("medium" if which == "SM" else "small"), "--k", 2, "--which", which)
        code, out, _ = run(*argv, "--seconds", "0.000001")
        assert code == ExitCode.TIME_UP
        assert f"0 of 2 eigenvalues ({which})" in out
        code, out, _ = run(*argv, "--seconds", "0.000001", "--json")
        found = json.loads(out)
        assert (code, found["eigenvalues"], found["ok"]) == (ExitCode.TIME_UP, [], False)
        assert "time was up" in found["ends"][0]["verdict"]

    def test_products_without_a_result_are_counted(self, run, spec, monkeypatch) -> None:
        monkeypatch.setenv("CURVOP_TEST_NAP", "0.004")
        code, out, _ = run("eigs", spec("slow"), "--k", 2, "--which", "SM", "--seconds", "0.1s")
        assert code == ExitCode.TIME_UP
        first, solver, total = (int(count) for count in re.findall(r"(\d+) products?\b(?!/)", out))
        assert first + solver == total
        assert solver > 1

    @pytest.mark.parametrize(
        ("name", "limit", "code", "said"),
        [
            ("medium", ("--seconds", "0.000001"), ExitCode.TIME_UP, "before time was up: increase --seconds"),
            pytest.param(
                *(None, ("--maxiter", "1"), ExitCode.FAILED, "not converged: increase --maxiter, or decrease --k"),
                marks=pytest.mark.slow,
            ),
        ],
        ids=["seconds", "maxiter"],
    )
    def test_limits_of_singular_values(self, run, spec, name, limit, code, said) -> None:
        argv = ("eigs", spec(name) if name else "digits", "--matrix", "jacobian", *limit)
        found, out, _ = run(*argv)
        assert found == code
        assert said in out
        found, out, _ = run(*argv, "--json")
        assert (found, json.loads(out)["singular_values"], json.loads(out)["ok"]) == (code, [], False)

    def test_spectrum_takes_maxiter_and_seconds(self, run, spec, monkeypatch) -> None:
        code, out, _ = run("spectrum", spec("slow"), "--k", 6, "--maxiter", 1, "--probes", 2, "--steps", 5)
        assert code == ExitCode.FAILED
        assert "not converged (increase maxiter" in out
        options = parse(["spectrum", "digits", "--seconds", "2m"])
        assert options is not None
        assert options.deadline == 120

    def test_a_deadline_prints_the_line_that_continues(self, run, spec, tmp_path) -> None:
        out = tmp_path / "a study"
        argv = ["spectrum", spec("small"), "--k", "2", "--deadline", "0.001s", "--out", str(out)]
        code, _, err = run(*argv)
        assert code == ExitCode.TIME_UP
        line = err.splitlines()[-1].removeprefix("curvop: time is up; to continue: ")
        assert shlex.split(line) == ["curvop", *argv, "--resume"]
        code, text, _ = run(*shlex.split(line.replace("0.001s", "2m"))[1:])
        assert code == 0
        assert "all steps are complete" in text


class TestDevice:
    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize(
        ("device", "said"),
        [("cuda:64", "'cuda:64' is not available: torch finds"), ("gpu", "'gpu' is not a device: pass cpu")],
    )
    def test_one_that_is_not_there(self, run, command, device, said) -> None:
        code, out, err = run(command, "digits", "--device", device)
        assert (code, out) == (2, "")
        assert err.startswith(f"curvop: error: argument --device: {said}")
        assert len(err.splitlines()) == 1

    def test_no_cuda(self, run, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        _, _, err = run("eigs", "digits", "--device", "cuda")
        reason = "argument --device: 'cuda' is not available: torch finds no CUDA device"
        assert err == f"curvop: error: {reason}; leave it out, or pass cpu\n"

    @pytest.mark.parametrize("device", ["meta", "hpu"])
    def test_a_device_without_values_or_without_its_package(self, run, device) -> None:
        code, _, err = run("eigs", "digits", "--device", device)
        assert code == ExitCode.INVALID
        assert f"argument --device: '{device}' is not available" in err

    @pytest.mark.parametrize("name", ["listed_loss", "functional"])
    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_cpu(self, run, spec, command, name) -> None:
        assert run(command, spec(name), "--device", "cpu")[0] == run(command, spec(name))[0]

    def test_everything_is_moved(self, spec) -> None:
        """The values of tensors on the device 'meta' are not computed, so every machine has this device."""
        device = torch.device("meta")
        problem = moved(load(spec("listed_loss")), device)
        own = list(problem["model"].parameters())
        assert all(one is other for one, other in zip(problem["params"], own, strict=True))  # also after the move
        assert {tensor.device for tensor in (*own, problem["loss_function"].weight)} == {device}
        params = moved(load(spec("functional")), device)["params"]
        assert list(params) == ["0_weight", "0_bias", "2_weight", "2_bias"]
        assert all(param.device == device and param.requires_grad and param.is_leaf for param in params.values())


class TestOrder:
    """A study reads the same batches in every run, or is refused at its start."""

    ARGUMENTS = ("--k", 2, "--probes", 2, "--steps", 5, "--json")

    @pytest.mark.parametrize("name", ["shuffled", "seeded"])
    def test_a_study_of_a_shuffled_loader_is_resumed(self, run, spec, tmp_path, name) -> None:
        argv = ("spectrum", spec(name), *self.ARGUMENTS, "--out", tmp_path / "study")
        code, first, _ = run(*argv)
        assert code == 0
        code, again, _ = run(*argv, "--resume")
        assert (code, json.loads(again)["products"]) == (0, 0)
        plain = json.loads(run("spectrum", spec("small"), *self.ARGUMENTS)[1])
        np.testing.assert_allclose(json.loads(first)["ends"][0]["values"], plain["ends"][0]["values"], rtol=1e-9)

    @pytest.mark.parametrize("matrix", ["hessian", "kfac"])
    def test_other_random_data_are_refused_at_the_start(self, run, spec, tmp_path, matrix) -> None:
        argv = ("spectrum", spec("custom"), *self.ARGUMENTS, "--matrix", matrix)
        code, out, err = run(*argv, "--out", tmp_path / "study")
        assert (code, out) == (2, "")
        assert re.search(r"data yields different batches in two passes \(batches .*\), so a study with --out", err)
        assert "seed the random numbers at the start of each pass" in err
        assert not (tmp_path / "study").exists()
        if matrix == "hessian":
            assert run(*argv)[0] == 0  # without --out, the order does not matter

    def test_examples_that_are_left_out_are_refused(self, run, spec, tmp_path) -> None:
        code, _, err = run("spectrum", spec("shuffles_and_drops"), *self.ARGUMENTS, "--out", tmp_path / "study")
        assert code == 2
        assert "drops 2 of 20 examples" in err

    def test_check_still_reports_the_order(self, run, spec) -> None:
        assert "each pass yields different batches" in run("check", spec("shuffled"))[1]

    DATA = TensorDataset(torch.arange(10))

    @pytest.mark.parametrize(
        ("loader", "expected"),
        [
            (DataLoader(DATA, batch_size=4, shuffle=True), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
            (DataLoader(DATA, batch_size=5, shuffle=True, drop_last=True), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
            (DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler([7, 1, 3, 5, 0])), [[7, 1, 3, 5], [0]]),
            (DataLoader(DATA, batch_size=None, shuffle=True), list(range(10))),
            (DataLoader(DATA, batch_size=10, sampler=RandomSampler(DATA, num_samples=20)), [list(range(10))] * 2),
        ],
        ids=["shuffle", "drop_last without effect", "subset", "no batches", "twice"],
    )
    def test_the_order_of_the_data_set(self, loader, expected) -> None:
        before = dict(vars(loader))
        ordered = in_order(loader)
        for _ in range(2):
            assert [batch[0].tolist() for batch in ordered] == expected
        assert vars(loader) == before
        assert isinstance(ordered, DataLoader)
        assert len(ordered) == len(loader)

    @pytest.mark.parametrize(
        "data",
        [
            [1, 2],
            DataLoader(DATA, batch_size=4),
            DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True),
            DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, replacement=True)),
            DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, num_samples=8)),
            DataLoader(DATA, batch_size=4, sampler=FirstHalf(DATA)),
            DataLoader(DATA, batch_size=4, sampler=FirstHalfOf(range(10))),
            DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler(torch.ones(10), 10)),
            DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, num_replicas=2, rank=0)),
            DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, drop_last=False)),
        ],
    )
    def test_other_data_stay_as_they_are(self, data) -> None:
        assert in_order(data) is data


class TestSignals:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "code", "word"),
        [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
        ids=["ctrl-c", "sigterm"],
    )
    def test_a_process_prints_the_line_that_continues_it(self, run, spec, tmp_path, number, code, word) -> None:
        out = tmp_path / "a study"
        argv = ["spectrum", spec("slow"), "--k", "2", "--probes", "2", "--steps", "20", "--out", str(out)]
        child = process(*argv, env=environment(CURVOP_TEST_NAP="0.003"))
        while child.poll() is None and not (out / "spectrum.json").exists():
            time.sleep(0.01)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
        assert child.returncode == code
        last = err.splitlines()[-1]
        assert last.startswith(f"curvop: {word}; to continue: ")
        line = shlex.split(last.partition("to continue: ")[2])
        assert line == [Path(sys.executable).name, "-m", "curvop", *argv, "--resume"]
        assert "Traceback" not in err
        assert any("interrupted" in step for step in json.loads((out / "spectrum.json").read_text())["undone"])
        code, text, _ = run(*line[3:])
        assert code == 0
        assert "continued" in text or "all steps are complete" in text

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
    def test_the_last_line_says_how_to_continue(self, run, spec, tmp_path, monkeypatch, number) -> None:
        def interrupt(*args: object, **options: object) -> None:
            os.kill(os.getpid(), number)

        monkeypatch.setattr("curvop.cli.spectrum_study.frobenius_norm", interrupt)
        argv = ["spectrum", spec("small"), "--k", "1"]
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
        code, _, err = run(*argv)
        assert (code, err.splitlines()[-1]) == (128 + number, f"curvop: {word}; nothing is saved without --out")
        argv += ["--out", str(tmp_path / "a study")]
        code, _, err = run(*argv)
        line = err.splitlines()[-1].removeprefix(f"curvop: {word}; to continue: curvop ")
        assert (code, shlex.split(line)) == (128 + number, [*argv, "--resume"])
        monkeypatch.undo()
        code, text, _ = run(*shlex.split(line))
        assert code == 0
        assert "all steps are complete" in text

    def test_options_end_at_two_dashes(self) -> None:
        assert resume_line("curvop", ["spectrum", "--out", "x", "--", "p.py:f"]) == (
            "curvop spectrum --out x --resume -- p.py:f"
        )
        assert resume_line("curvop", ["spectrum", "p.py:f", "--resume"]) == "curvop spectrum p.py:f --resume"

    def test_eigenvalues_that_were_found_before_are_saved(self, run, spec, tmp_path, monkeypatch) -> None:
        def second(A: Any, k: int, which: str, **options: Any) -> EigenResult:
            if which == "SA":
                os.kill(os.getpid(), signal.SIGTERM)
            return eigsh(A, k, which, **options)

        monkeypatch.setattr("curvop.cli.eigs_study.eigsh", second)
        before = signal.getsignal(signal.SIGTERM)
        code, out, err = run("eigs", spec("small"), "--k", 2, "--out", tmp_path / "found.npz")
        assert (code, err.splitlines()[-1]) == (143, "curvop: terminated")
        assert "2 of 2 eigenvalues (LA)" in out
        with np.load(tmp_path / "found.npz", allow_pickle=False) as saved:
            assert saved["which"].tolist() == ["LA", "LA"]
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_handler_of_the_caller_stays(self, run, spec) -> None:
        received: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        try:
            assert run("check", spec("small"))[0] == 0
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert received == [signal.SIGTERM]


class TestWarnings:
    def test_a_warning_is_one_line(self, run, spec) -> None:
        shown = warnings.showwarning
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            _, _, err = run("solve", spec("warns"))
        assert err.splitlines()[0] == "warning: this is an old model"
        assert ".py" not in err
        assert warnings.showwarning is shown

    def test_a_library_call_does_not_change_warnings(self, spec) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            with pytest.warns(UserWarning, match="this is\n +an old model") as shown:
                load(spec("warns"))
        assert shown[0].filename.endswith("process_problems.py")


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_exit_codes_with_their_meaning(self, run, monkeypatch, command) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = run(command, "--help")
        assert code == 0
        table = out.partition("exit codes:\n")[2]
        codes = [int(line.split()[0]) for line in table.splitlines()]
        assert codes == [each for each in ExitCode if command != "check" or each != ExitCode.TIME_UP]
        assert max(map(len, out.splitlines())) <= 80

    def test_k_says_what_is_computed(self, run, monkeypatch) -> None:
        monkeypatch.setenv("COLUMNS", "300")
        out = run("eigs", "--help")[1]
        assert "the k largest, and for --matrix hessian also the min(5, k) smallest; with --which, k at this end" in out
        assert "the k largest, and for --matrix hessian also the min(5, k) smallest" in run("spectrum", "--help")[1]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_order_of_the_data(self, run, monkeypatch, command) -> None:
        monkeypatch.setenv("COLUMNS", "1000")
        said = (
            "examples of a DataLoader that shuffles are read in the order of the data set" in run(command, "--help")[1]
        )
        assert said == (command != "check")

    def test_a_narrow_terminal(self, run, spec, monkeypatch) -> None:
        monkeypatch.setenv("COLUMNS", "1")
        assert run("eigs", "--help")[0] == 0
        assert run("eigs", spec("small"), "--k", 1)[0] == 0

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_model_that_exits_is_no_success(self, run, spec, command) -> None:
        code, out, err = run(command, spec("exits"))
        assert (code, out) == (ExitCode.INVALID, "")
        assert err.splitlines()[-1].startswith("curvop: error: the problem cannot be evaluated: SystemExit: 0 (")

    def test_python_m(self) -> None:
        child = process("eigs", "--help", env=environment())
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, "")
        assert out.startswith(f"usage: {Path(sys.executable).name} -m curvop eigs ")


class TestCompletion:
    SEPARATOR = "\v"

    def completions(self, line: str, tmp_path: Path) -> list[str]:
        """Ask as the shell does, which reads the answer from a file descriptor or file."""
        answer = tmp_path / "answer"
        asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
        settings = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": self.SEPARATOR, "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
        script = "import sys; from curvop.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", script]
        subprocess.run(command, env=environment(**asked, **settings), capture_output=True, timeout=60, check=True)
        return answer.read_text().split(self.SEPARATOR)

    def test_options(self, tmp_path) -> None:
        pytest.importorskip("argcomplete")
        assert self.completions("curvop eigs --ma", tmp_path) == ["--matrix", "--maxiter"]

    def test_the_command_works_without_the_package(self, run, spec, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "argcomplete", None)
        monkeypatch.setenv("_ARGCOMPLETE", "1")
        assert run("check", spec("small"))[0] == 0

    @pytest.mark.parametrize("module", ["cli/main.py", "__main__.py"])
    def test_global_completion_finds_its_marker(self, module) -> None:
        assert "PYTHON_ARGCOMPLETE_OK" in (Path(curvop.__file__).parent / module).read_text()[:1024]

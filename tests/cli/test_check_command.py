"""``curvop check``: its output and exit code."""

from __future__ import annotations

import json
import sys

import pytest

from curvop.cli.main import main

PROBLEMS = """
import torch
from torch import nn

def sound():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    X, y = torch.randn(20, 3, generator=generator).double(), torch.randint(2, (20,), generator=generator)
    params = dict(model.named_parameters())
    return dict(model=model, loss_function=nn.CrossEntropyLoss(), params=params, data=[(X[:7], y[:7]), (X[7:], y[7:])])

def chatty():
    print("so much to say")
    return sound()

def dropout():
    problem = sound()
    return problem | dict(model=nn.Sequential(*problem["model"], nn.Dropout()).train())

def normalized():
    problem = sound()
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), *problem["model"]).double().train()
    return problem | dict(model=model, params=dict(model.named_parameters()))

def empty():
    return sound() | dict(data=[])

def fails():
    problem = sound()
    def loss(prediction, y):
        raise RuntimeError("no second floor\\n  in this house")
    return problem | dict(loss_function=loss)
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "check_problems.py"
    path.write_text(PROBLEMS)
    yield lambda name: f"{path}:{name}"
    sys.modules.pop("check_problems", None)


@pytest.fixture
def run(capsys):
    def run_command(*argv: str) -> tuple[int, str, str]:
        code = main(["check", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def test_digits(run) -> None:
    code, out, _ = run("digits")
    assert code == 0
    assert out.startswith("Hessian of digits\ncheck of HessianLinearOperator, 2,410 by 2,410, float64: 7 products")
    assert out.endswith("sound: 16 checks passed\n")


@pytest.mark.parametrize("matrix", ["kfac", "ekfac"])
def test_approximations(run, spec, matrix: str) -> None:
    code, out, _ = run(spec("sound"), "--matrix", matrix)
    assert code == 0
    assert out.startswith(f"{matrix.upper()} of the Gauss-Newton matrix of ")
    assert "of the approximation (Frobenius norm)" in out


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "ef", "fisher", "jacobian"])
@pytest.mark.parametrize("block", [[], ["--block", "2.weight", "--block", "0.bias"]])
def test_every_matrix(run, spec, matrix: str, block: list[str]) -> None:
    code, out, _ = run(spec("sound"), "--matrix", matrix, *block, "--json")
    parsed = json.loads(out)
    passed = 16 if matrix == "hessian" else 15
    assert (code, parsed["ok"], parsed["verdict"]) == (0, True, f"sound: {passed} checks passed")
    assert (parsed["matrix"], parsed["block"]) == (matrix, ["2.weight", "0.bias"] if block else None)
    assert {finding["status"] for finding in parsed["findings"]} == {"ok", "not applicable"}


def test_the_block_of_a_module(run, spec) -> None:
    names = ("--block", "2.weight", "--block", "2.bias")
    by_name, by_module = (json.loads(run(spec("sound"), *block, "--json")[1]) for block in (names, ("--block", "2")))
    limits, expected = ([finding["limit"] for finding in found["findings"]] for found in (by_module, by_name))
    assert limits == pytest.approx(expected, nan_ok=True)  # they depend on the norm of the block
    assert by_module["ok"]


def test_settings(run, spec) -> None:
    code, out, _ = run(spec("sound"), "--dtype", "float32", "--probes", "4", "--json")
    parsed = json.loads(out)
    assert (code, parsed["products"]) == (0, 11)
    assert next(finding["limit"] for finding in parsed["findings"] if finding["name"] == "symmetry") > 1e-5


def test_what_is_wrong_is_an_exit_code_and_a_warning_is_none(run, spec) -> None:
    code, out, err = run(spec("dropout"))
    assert (code, err) == (1, "")
    assert "WRONG    dropout              active in '3' (Dropout, p = 0.5)\n" in out
    assert "to do: call model.eval()\n" in out
    code, out, _ = run(spec("normalized"))
    assert code == 0
    assert out.endswith("nothing is wrong, with 1 warning: batch normalisation\n")


def test_what_a_problem_prints_does_not_mix_with_json(run, spec) -> None:
    code, out, err = run(spec("chatty"), "--json")
    assert (code, json.loads(out)["ok"], err) == (0, True, "so much to say\n")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("empty", [], "the problem cannot be evaluated: ValueError: data is empty"),
        ("fails", [], "the problem cannot be evaluated: RuntimeError: no second floor in this house (/"),
        ("nowhere", [], "no function 'nowhere'"),
        (
            *("sound", ["--block", "2.wieght"]),
            "--block: no parameter or module is named '2.wieght'; did you mean '2.weight'",
        ),
        (
            *("sound", ["--matrix", "jacobian", "--block", "2.wieght"]),
            "--block: no parameter or module is named '2.wieght'",
        ),
        ("sound", ["--probes", "0"], "argument --probes: must be >= 1"),
        ("sound", ["--matrix", "hesian"], "argument --matrix: invalid choice"),
        ("sound", ["--out", "file.npz"], "unrecognized arguments: --out"),
    ],
)
def test_what_is_refused(run, spec, name: str, options: list[str], said: str) -> None:
    code, out, err = run(spec(name), *options)
    assert (code, out) == (2, "")
    assert err.startswith("curvop: error: ")
    assert said in err
    assert len(err.splitlines()) == 1

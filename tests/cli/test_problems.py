"""Problems: the built-in digits classifier, and problems of the user."""

import json
import sys
from pathlib import Path

import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn

from curvop.cli.problem_loading import last_layer
from curvop.operators.error_text import describe_error
from curvop.problems import ProblemError, digits, load

KEYS = ["model", "loss_function", "params", "data"]

PROBLEM = """
import torch
from torch import nn

def problem():
    model = nn.Linear(3, 2)
    data = [(torch.ones(4, 3), torch.zeros(4, 2))]
    return dict(data=data, loss_function=nn.MSELoss(), model=model, params=dict(model.named_parameters()))
"""


@pytest.fixture(scope="module")
def trained():
    return digits()


@pytest.fixture(autouse=True)
def imports_restored(monkeypatch, tmp_path):
    """Restore the import path and the loaded modules, which loading a problem extends."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = set(sys.modules)
    yield
    for name in set(sys.modules) - loaded:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "user_problem.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def error_of(spec: str) -> str:
    """Return the error message of a problem, which must be one line."""
    with pytest.raises(ProblemError) as caught:
        load(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestDigits:
    def test_is_a_trained_network_on_all_images(self, trained):
        inputs = torch.cat([X for X, _ in trained["data"]])
        targets = torch.cat([y for _, y in trained["data"]])
        assert inputs.shape == (1797, 64)
        assert (inputs.min(), inputs.max()) == (0, 1)
        accuracy = (trained["model"](inputs).argmax(1) == targets).double().mean()
        assert accuracy > 0.97

    def test_has_what_an_operator_is_built_from(self, trained):
        assert list(trained) == KEYS
        assert [len(X) for X, _ in trained["data"]] == [1000, 797]
        assert isinstance(trained["loss_function"], nn.CrossEntropyLoss)
        assert trained["loss_function"].reduction == "mean"
        assert list(trained["params"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert all(
            param is dict(trained["model"].named_parameters())[name] for name, param in trained["params"].items()
        )
        assert sum(param.numel() for param in trained["params"].values()) == 2410
        assert all(param.dtype == torch.float64 and param.grad is None for param in trained["params"].values())
        assert not trained["model"].training

    def test_the_seed_fixes_it_and_the_global_random_state_is_left_alone(self, trained):
        state = torch.get_rng_state()
        torch.rand(3)
        again = digits()
        torch.set_rng_state(state)
        same = digits(seed=0)
        assert torch.equal(torch.get_rng_state(), state)
        for name, param in trained["params"].items():
            assert torch.equal(param, again["params"][name])
            assert torch.equal(param, same["params"][name])

    def test_another_seed_gives_another_network(self, trained):
        assert not torch.equal(digits(seed=1)["params"]["0.weight"], trained["params"]["0.weight"])

    def test_without_scikit_learn_the_remedy_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r'pip install "curvop\[demo\]"'):
            digits()
        assert 'pip install "curvop[demo]"' in error_of("digits")


class TestLoad:
    def test_digits(self, trained):
        assert torch.equal(load("digits")["params"]["2.bias"], trained["params"]["2.bias"])

    def test_a_function_of_a_file(self, tmp_path):
        problem = load(write(tmp_path, PROBLEM) + ":problem")
        assert list(problem) == KEYS
        assert isinstance(problem["model"], nn.Linear)

    def test_a_relative_path(self, tmp_path, monkeypatch):
        write(tmp_path, PROBLEM)
        monkeypatch.chdir(tmp_path)
        assert list(load("user_problem.py:problem")) == KEYS

    def test_the_file_imports_its_neighbours(self, tmp_path):
        write(tmp_path, PROBLEM, "neighbour_of_problem.py")
        spec = write(tmp_path, "from neighbour_of_problem import problem") + ":problem"
        assert list(load(spec)) == KEYS

    def test_a_file_is_read_anew(self, tmp_path):
        spec = write(tmp_path, PROBLEM) + ":problem"
        assert load(spec)["model"].in_features == 3
        write(tmp_path, PROBLEM.replace("nn.Linear(3, 2)", "nn.Linear(5, 2, bias=False)"))
        assert load(spec)["model"].in_features == 5

    def test_a_file_never_replaces_another_module(self, tmp_path):
        spec = write(tmp_path, PROBLEM, "torch.py") + ":problem"
        assert list(load(spec)) == KEYS
        assert sys.modules["torch"] is torch

    def test_a_function_of_a_module_in_the_current_directory(self, tmp_path, monkeypatch):
        (tmp_path / "user_package").mkdir()
        (tmp_path / "user_package" / "__init__.py").touch()
        write(tmp_path / "user_package", PROBLEM, "curvature.py")
        monkeypatch.chdir(tmp_path)
        assert list(load("user_package.curvature:problem")) == KEYS

    def test_params_from_a_generator_become_a_list(self, tmp_path):
        text = PROBLEM.replace("params=dict(model.named_parameters())", "params=model.parameters()")
        problem = load(write(tmp_path, text) + ":problem")
        assert problem["params"] == list(problem["model"].parameters())


class TestRefusals:
    @pytest.mark.parametrize("spec", ["nothing", "", ":", "a.b:", ":f"])
    def test_what_is_no_problem_at_all(self, spec):
        assert "'package.module:function'" in error_of(spec)

    def test_a_misspelt_name(self):
        assert "did you mean 'digits'?" in error_of("digit")

    def test_a_file_without_a_function(self, tmp_path):
        path = write(tmp_path, PROBLEM)
        assert f"name its function: '{path}:function'" in error_of(path)

    def test_a_missing_file_with_its_nearest_neighbour(self, tmp_path):
        write(tmp_path, PROBLEM)
        message = error_of(f"{tmp_path}/user_prblem.py:problem")
        assert message.startswith(f"no file '{tmp_path}/user_prblem.py'")
        assert message.endswith("(did you mean 'user_problem.py'?)")

    def test_a_missing_folder(self, tmp_path):
        assert error_of(f"{tmp_path}/nowhere/x.py:problem") == f"no file '{tmp_path}/nowhere/x.py'"

    def test_a_missing_module(self):
        assert "no module named 'no_such_package.module'" in error_of("no_such_package.module:problem")

    def test_a_missing_function_with_the_nearest(self, tmp_path):
        path = write(tmp_path, PROBLEM)
        assert error_of(f"{path}:problen") == f"no function 'problen' in '{path}' (did you mean 'problem'?)"

    def test_what_is_not_a_function(self, tmp_path):
        assert "not a function but of type int" in error_of(write(tmp_path, "problem = 3") + ":problem")

    def test_a_function_that_needs_arguments(self, tmp_path):
        message = error_of(write(tmp_path, "def problem(size): pass") + ":problem")
        assert "callable without arguments" in message
        assert "'size'" in message

    def test_an_error_in_the_function_with_its_place(self, tmp_path):
        path = write(tmp_path, "def problem():\n    rows = {}\n    return rows['x']\n")
        assert error_of(f"{path}:problem") == f"'{path}:problem' failed: KeyError: 'x' ({path}:3)"

    def test_an_error_of_several_lines_becomes_one(self, tmp_path):
        path = write(tmp_path, "def problem():\n    raise RuntimeError('one\\n  two')\n")
        assert "RuntimeError: one two (" in error_of(f"{path}:problem")

    def test_an_error_without_a_message(self, tmp_path):
        path = write(tmp_path, "def problem():\n    assert False\n")
        assert error_of(f"{path}:problem").endswith(f"failed: AssertionError ({path}:2)")

    def test_an_error_deep_in_a_library_is_placed_where_the_user_called_it(self, tmp_path):
        path = write(tmp_path, "import torch\ndef problem():\n    return torch.nn.Linear(2, 3)(torch.ones(4))\n")
        message = error_of(f"{path}:problem")
        assert "RuntimeError" in message
        assert message.endswith(f"({path}:3)")

    def test_a_function_that_exits(self, tmp_path):
        assert "SystemExit: 3" in error_of(write(tmp_path, "def problem():\n    raise SystemExit(3)\n") + ":problem")

    def test_an_error_while_importing_a_file(self, tmp_path):
        path = write(tmp_path, "x = 1\ny = x / 0\n")
        assert (
            error_of(f"{path}:problem") == f"importing '{path}' failed: ZeroDivisionError: division by zero ({path}:2)"
        )
        assert "user_problem" not in sys.modules

    def test_a_syntax_error(self, tmp_path):
        message = error_of(write(tmp_path, "def problem(:\n") + ":problem")
        assert "SyntaxError: invalid syntax (user_problem.py, line 1)" in message

    def test_an_error_while_importing_a_module(self, tmp_path, monkeypatch):
        write(tmp_path, "import no_such_module\n", "imports_in_vain.py")
        monkeypatch.chdir(tmp_path)
        message = error_of("imports_in_vain:problem")
        assert "importing 'imports_in_vain' failed: ModuleNotFoundError: No module named 'no_such_module'" in message
        assert message.endswith("imports_in_vain.py:1)")

    def test_ctrl_c_in_the_function_is_not_an_error_of_it(self, tmp_path):
        path = write(tmp_path, "def problem():\n    raise KeyboardInterrupt\n")
        with pytest.raises(KeyboardInterrupt):
            load(f"{path}:problem")

    @pytest.mark.parametrize(
        ("returned", "said"),
        [
            ("None", "returned an object of type NoneType; it must be a dict with the keys model, loss_function"),
            ("[1, 2]", "returned an object of type list"),
            ("dict()", "returned no 'model'; it must be a dict"),
            ("dict(model=1, loss_function=2, data=4)", "params=dict(model.named_parameters())"),
            ("dict(model=1, loss=2, params=3, data=4)", "unknown key 'loss' (did you mean 'loss_function'?)"),
            ("dict(model=1, loss_function=2, params=3, data=4, seed=5)", "unknown key 'seed'; it must be"),
        ],
    )
    def test_what_is_not_a_problems_dictionary(self, tmp_path, returned, said):
        assert said in error_of(write(tmp_path, f"def problem():\n    return {returned}\n") + ":problem")


@pytest.mark.parametrize(
    ("call", "described"),
    [
        (lambda: json.loads("]"), "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        (lambda: aslinearoperator("text"), "TypeError: type not understood"),
    ],
    ids=["standard library", "installed"],
)
def test_a_place_inside_a_library_is_not_named(call, described):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    frames = caught.tb.tb_next.tb_next  # skip the frames of this file
    assert describe_error(caught.value.with_traceback(frames)) == described


def test_notes_are_part_of_the_description():
    error = ValueError("it is too late")
    error.add_note("This was at batch 3 of data.")
    assert describe_error(error) == "ValueError: it is too late. This was at batch 3 of data"


def test_the_last_layer_of_params_without_modules_is_all_of_them():
    assert last_layer(["w", "b"]) == ("w", "b")
    assert last_layer(["a.w", "a.b", "a.c.w", "a.c.b"]) == ("a.c.w", "a.c.b")


def test_an_error_of_this_package_is_described_without_a_place():
    try:
        load("nothing")
    except ProblemError as error:
        frames = error.__traceback__.tb_next  # as seen by a caller inside this package
        described = describe_error(error.with_traceback(frames))
    assert described == f"ProblemError: {error_of('nothing')}"

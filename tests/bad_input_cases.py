"""Every bad input that is tried, and what it gets.

``python tests/bad_input_cases.py > docs/bad_input.rst`` writes the page of the documentation that lists them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvop import (
    DampedLinearOperator,
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    JournaledLinearOperator,
    SubmatrixLinearOperator,
    check,
    preconditioner,
    select,
    solve,
    spectrum,
)
from curvop.cli import main
from curvop.fingerprint import OtherProblemError
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.records import RecordFileError


class CommandError(Exception):
    """What the command said before it ended with exit code 2."""


@dataclass(frozen=True)
class Row:
    """A bad input: in words, as code that is given an empty directory, and what is to come of it."""

    area: str
    tried: str
    attempt: Callable[[Path], Any]
    error: type[BaseException]
    message: str


def made(*layers: Callable[[], nn.Module]) -> nn.Sequential:
    """Return a model whose making leaves the generator of random numbers alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers)).double()


def mlp() -> nn.Sequential:
    return made(lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Linear(5, 3))


MODEL = mlp()
PARAMS = dict(MODEL.named_parameters())
X, Y = torch.linspace(-1, 1, 16).double().view(4, 4), torch.linspace(0, 1, 12).double().view(4, 3)
DATA = [(X, Y)]
ONES = np.ones(43)
DENSE = aslinearoperator(np.diag([3.0, 2.0, 1.0, 0.5]))
INDEFINITE = aslinearoperator(np.diag([3.0, 2.0, -1.0, 0.5]))
COMPLEX = aslinearoperator(np.diag([3.0, 1j, 1.0, 0.5]))
WIDE = aslinearoperator(np.ones((3, 4)))


def hessian(**changed: Any) -> HessianLinearOperator:
    return HessianLinearOperator(**dict(model=MODEL, loss_function=nn.MSELoss(), params=PARAMS, data=DATA) | changed)


def first_product(**changed: Any) -> Any:
    return hessian(**changed) @ ONES


H = hessian()
DENSITY = spectrum.density(DENSE, rng=0, progress=False)


def replaced(name: str, value: Any) -> dict[str, Any]:
    return {**PARAMS, name: value}


def with_bias(value: Any) -> HessianLinearOperator:
    return hessian(params=replaced("0.bias", value))


def tied() -> nn.Module:
    model = made(lambda: nn.Linear(4, 4, bias=False), lambda: nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def lazy() -> Any:
    model = nn.LazyLinear(3)
    return hessian(model=model, params=dict(model.named_parameters()))


def in_inference_mode() -> Any:
    with torch.inference_mode():
        model = mlp()
    return hessian(model=model, params=dict(model.named_parameters()))


def on_meta() -> Any:
    model = nn.Linear(4, 3, device="meta")
    return HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X.float(), Y.float())])


def sparse() -> Tensor:
    return torch.ones(5).double().to_sparse().requires_grad_()


def replaced_in_the_model() -> Any:
    model = mlp()
    A = hessian(model=model, params=dict(model.named_parameters()))
    A @ ONES
    model.load_state_dict(mlp().state_dict(), assign=True)
    return A @ ONES


def dropping() -> Any:
    model = made(lambda: nn.Linear(4, 3), lambda: nn.Dropout(0.5))
    A = hessian(model=model, params=dict(model.named_parameters()), cache=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            A @ np.ones(15)


def shuffled() -> Any:
    data = DataLoader(TensorDataset(X, Y), batch_size=1, shuffle=True)
    J = JacobianLinearOperator(MODEL, PARAMS, data)
    for _ in range(8):
        J @ ONES


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].exp()


def called(params: dict[str, Tensor], X: Any) -> Tensor:
    return torch.func.functional_call(MODEL, params, (X,))


def cubes(prediction: Tensor, y: Tensor) -> Tensor:
    return ((prediction - y) ** 3).mean()


def journal(directory: Any, A: LinearOperator = DENSE, **options: Any) -> JournaledLinearOperator:
    return JournaledLinearOperator(A, directory, **options)


def journal_of_another(tmp: Path) -> None:
    with journal(tmp) as J:
        J @ np.ones(4)
    journal(tmp, INDEFINITE)


def journal_in_use(tmp: Path) -> None:
    with journal(tmp):
        journal(tmp)


def journal_of_text(tmp: Path) -> None:
    (tmp / "products.records").write_bytes(b"hello, this is no file of records")
    journal(tmp)


def journal_after_a_step(tmp: Path) -> None:
    model = mlp()
    with journal(tmp, hessian(model=model, params=dict(model.named_parameters()))) as J:
        J @ ONES
        with torch.no_grad():
            model[0].bias += 1
        J @ ONES


def journal_closed(tmp: Path) -> None:
    with journal(tmp) as J:
        pass
    J @ np.ones(4)


def journal_among_other_files(tmp: Path) -> None:
    (tmp / "notes.txt").write_text("mine")
    journal(tmp)


def journal_without_fingerprint(tmp: Path) -> None:
    with journal(tmp) as J:
        J @ np.ones(4)
    (tmp / "fingerprint.json").unlink()
    journal(tmp)


def file_with(tmp: Path, content: bytes) -> Path:
    path = tmp / "file"
    path.write_bytes(content)
    return path


def checkpoint_of_something_else(tmp: Path) -> None:
    spectrum.density(DENSE, num_probes=2, rng=0, checkpoint=tmp, progress=False)
    spectrum.density(DENSE, num_probes=3, rng=0, checkpoint=tmp, progress=False)


def checkpoint_in_a_file(tmp: Path) -> None:
    spectrum.density(DENSE, checkpoint=file_with(tmp, b"x"), progress=False)


def torn(tmp: Path) -> None:
    DENSITY.save(tmp / "torn.npz")
    content = (tmp / "torn.npz").read_bytes()
    (tmp / "torn.npz").write_bytes(content[: len(content) // 2])
    spectrum.SpectralDensity.load(tmp / "torn.npz")


def archive(tmp: Path, **arrays: Any) -> Path:
    np.savez(tmp / "archive.npz", **arrays)
    return tmp / "archive.npz"


def pickled(tmp: Path) -> Path:
    fields = ("size", "nodes", "weights", "atoms", "num_products", "complete")
    return archive(tmp, **{name: np.array([print], dtype=object) for name in fields})


PROBLEM = """
import torch
from torch import nn

def bare():
    return 3

def incomplete():
    return dict(model=nn.Identity(), loss_function=nn.MSELoss(), data=[])

def misspelt():
    return dict(model=nn.Identity(), loss=nn.MSELoss(), params={}, data=[])

def failing():
    raise RuntimeError("no such data")

def needing(path):
    pass

number = 3
"""


def command(*arguments: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    assert code == 2, (code, out.getvalue(), err.getvalue())
    raise CommandError(err.getvalue().strip())


def of_file(tmp: Path, function: str) -> None:
    (tmp / "problem.py").write_text(PROBLEM)
    command("eigs", f"{tmp / 'problem.py'}:{function}")


ROWS: list[Row] = []


def area(name: str, *rows: tuple[str, Callable[..., Any], type[BaseException], str]) -> None:
    """Add rows; an attempt that takes an argument gets an empty directory."""
    for tried, attempt, error, message in rows:
        takes = attempt.__code__.co_argcount
        ROWS.append(Row(name, tried, attempt if takes else functools.partial(_without, attempt), error, message))


def _without(attempt: Callable[[], Any], tmp: Path) -> Any:
    return attempt()


area(
    "Parameters",
    ("an empty dict", lambda: hessian(params={}), ValueError, "params is empty"),
    ("an empty list", lambda: hessian(params=[]), ValueError, "params is empty"),
    ("``None``", lambda: hessian(params=None), TypeError, "params is a NoneType"),
    ("one tensor", lambda: hessian(params=PARAMS["0.weight"]), TypeError, "params is one tensor"),
    (
        "``model.named_parameters()``, pairs",
        lambda: hessian(params=MODEL.named_parameters()),
        TypeError,
        "params[0] is a tuple",
    ),
    ("names alone", lambda: hessian(params=["0.weight"]), TypeError, "params[0] is a str"),
    (
        "a misspelt name",
        lambda: hessian(params={"0.wieght": PARAMS["0.weight"]}),
        ValueError,
        "params: no parameter is named '0.wieght'; did you mean '0.weight'",
    ),
    (
        "another model's parameters",
        lambda: hessian(params=list(mlp().parameters())),
        ValueError,
        "params[0] is not one",
    ),
    ("one of them twice", lambda: hessian(params=[PARAMS["0.weight"]] * 2), ValueError, "params[1] stands in the list"),
    (
        "another shape than the model's",
        lambda: with_bias(torch.ones(4, 4, dtype=torch.float64, requires_grad=True)),
        ValueError,
        "params['0.bias'] has shape (4, 4)",
    ),
    ("an array", lambda: with_bias(np.ones(5)), TypeError, "params['0.bias'] is a ndarray"),
    (
        "integers",
        lambda: with_bias(torch.ones(5, dtype=torch.int)),
        ValueError,
        "params['0.bias'] has dtype torch.int32",
    ),
    (
        "half precision",
        lambda: with_bias(torch.ones(5, dtype=torch.bfloat16, requires_grad=True)),
        ValueError,
        "params['0.bias'] is torch.bfloat16, too coarse",
    ),
    (
        "complex numbers",
        lambda: with_bias(torch.ones(5, dtype=torch.cfloat)),
        ValueError,
        "params['0.bias'] has dtype torch.complex64",
    ),
    (
        "one that is frozen",
        lambda: with_bias(torch.ones(5).double()),
        ValueError,
        "params['0.bias'] does not require grad",
    ),
    (
        "two dtypes",
        lambda: with_bias(torch.ones(5, requires_grad=True)),
        ValueError,
        "params must share one dtype, but '0.weight' has torch.float64",
    ),
    (
        "one that is offloaded",
        lambda: with_bias(torch.ones(5, device="meta", dtype=torch.float64, requires_grad=True)),
        ValueError,
        "params must have values",
    ),
    ("a sparse tensor", lambda: with_bias(sparse()), ValueError, "params['0.bias'] has layout torch.sparse_coo"),
    (
        "a quantised tensor",
        lambda: with_bias(torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)),
        ValueError,
        "params['0.bias'] is quantised",
    ),
    ("a model on the meta device", lambda: on_meta(), ValueError, "params['weight'] is on the meta device"),
    ("a lazy layer that has not been called", lambda: lazy(), ValueError, "params['weight'] has no shape yet"),
    (
        "made under ``torch.inference_mode()``",
        lambda: in_inference_mode(),
        ValueError,
        "params['0.weight'] was made under torch.inference_mode()",
    ),
    (
        "a tied tensor under both names",
        lambda: hessian(model=tied(), params=dict(tied().named_parameters(remove_duplicate=False))),
        ValueError,
        "params '0.weight' and '1.weight' are one tied tensor",
    ),
    (
        "a list, of a model that is a function",
        lambda: hessian(model=called, params=list(PARAMS.values())),
        TypeError,
        "params must be a dict",
    ),
    (
        "a parameter that another has replaced in the model since",
        lambda: replaced_in_the_model(),
        RuntimeError,
        "params['0.weight'] was the model's own parameter",
    ),
)
area(
    "Model and loss",
    ("a model that is a number", lambda: hessian(model=3), TypeError, "model is a int"),
    ("a model that is a class", lambda: hessian(model=nn.Linear), TypeError, "model is the class Linear"),
    ("a loss that is a word", lambda: hessian(loss_function="mse"), TypeError, "loss_function is a str"),
    (
        "a loss that is a class",
        lambda: hessian(loss_function=nn.MSELoss),
        TypeError,
        "loss_function is the class MSELoss",
    ),
    (
        "``reduction='none'``",
        lambda: hessian(loss_function=nn.MSELoss(reduction="none")),
        ValueError,
        "loss_function has reduction='none'",
    ),
    (
        "a reduction by a keyword of old",
        lambda: hessian(loss_function=functools.partial(F.mse_loss, size_average=False)),
        ValueError,
        "loss_function has size_average=",
    ),
    (
        "a loss that is not a scalar",
        lambda: first_product(loss_function=lambda z, y: F.mse_loss(z, y, reduction="none")),
        ValueError,
        "the loss of batch 0 has shape (4, 3)",
    ),
    (
        "a loss that is a number",
        lambda: first_product(loss_function=lambda z, y: 1.0),
        TypeError,
        "the loss of batch 0 is a float",
    ),
    (
        "a loss of integers",
        lambda: first_product(loss_function=lambda z, y: y.long().sum()),
        ValueError,
        "dtype torch.int64",
    ),
    (
        "a complex loss",
        lambda: first_product(loss_function=lambda z, y: (z * 1j).sum()),
        ValueError,
        "dtype torch.complex128",
    ),
    (
        "a prediction without a tensor, of a Gauss-Newton matrix",
        lambda: GGNLinearOperator(lambda p, X: 3.0, lambda z, y: torch.tensor(1.0), PARAMS, DATA) @ ONES,
        TypeError,
        "a prediction holds no tensor",
    ),
    (
        "a function with a gradient, but no Hessian",
        lambda: hessian(model=lambda p, X: OnceDifferentiable.apply(called(p, X))) @ ONES,
        RuntimeError,
        "the model uses an autograd function that is once_differentiable",
    ),
    ("dropout that is active", lambda: dropping(), NonDeterministicObjectiveError, "dropout is active in '1'"),
    (
        "data that holds NaN",
        lambda: first_product(data=[(X * float("nan"), Y)]),
        NonFiniteProductError,
        "the product is not finite at batch 0 in parameter '0.weight'",
    ),
    (
        "an objective that is a number",
        lambda: HessianLinearOperator.from_objective(3, PARAMS, DATA),
        TypeError,
        "objective is a int",
    ),
    (
        "an objective that returns a pair",
        lambda: HessianLinearOperator.from_objective(lambda p, batch: (1, 2), PARAMS, DATA) @ ONES,
        TypeError,
        "the loss of batch 0 is a tuple",
    ),
    (
        "a Fisher matrix of a loss that is no likelihood",
        lambda: FisherLinearOperator(MODEL, nn.L1Loss(), PARAMS, DATA),
        ValueError,
        "loss_function is no known log-likelihood",
    ),
    (
        "a number of draws that is none",
        lambda: FisherLinearOperator(MODEL, nn.MSELoss(), PARAMS, DATA, mc_samples=1.5),
        ValueError,
        "mc_samples is 1.5",
    ),
    (
        "a seed that is a word",
        lambda: FisherLinearOperator(MODEL, nn.MSELoss(), PARAMS, DATA, mc_samples=1, rng="x"),
        TypeError,
        "rng is 'x'",
    ),
    (
        "examples that are not told apart",
        lambda: EFLinearOperator(lambda p, X: called(p, X).sum(), lambda z, y: z**2, PARAMS, DATA) @ ONES,
        ValueError,
        "per-example gradients need predictions with the examples along dimension 0",
    ),
)
area(
    "Data",
    ("a number", lambda: hessian(data=3), TypeError, "data is a int"),
    ("a one-shot iterator", lambda: hessian(data=iter(DATA)), TypeError, "data is a one-shot iterator"),
    ("a generator", lambda: hessian(data=(batch for batch in DATA)), TypeError, "data is a one-shot iterator"),
    ("no batch", lambda: first_product(data=[]), ValueError, "data is empty"),
    (
        "a loader without rows",
        lambda: first_product(data=DataLoader(TensorDataset(X[:0], Y[:0]))),
        ValueError,
        "data is empty",
    ),
    ("batches that are no pairs", lambda: first_product(data=[X]), TypeError, "data must yield pairs (X, y)"),
    ("one pair, not in a list", lambda: first_product(data=(X, Y)), TypeError, "data must yield pairs (X, y)"),
    ("batches of three", lambda: first_product(data=[(X, Y, Y)]), TypeError, "data must yield pairs (X, y)"),
    (
        "a batch on the meta device",
        lambda: first_product(data=[(X.to("meta"), Y)]),
        ValueError,
        "data holds a tensor on the meta device",
    ),
    (
        "nothing but targets that are ignored",
        lambda: first_product(loss_function=nn.CrossEntropyLoss(), data=[(X, torch.full((4,), -100))]),
        ValueError,
        "data has total weight 0",
    ),
    (
        "a loader that shuffles, for a Jacobian",
        lambda: shuffled(),
        NonDeterministicObjectiveError,
        "than in the first pass, but the matrix depends on the order of the data",
    ),
    (
        "batches whose size cannot be told",
        lambda: (
            hessian(model=lambda p, tree: called(p, tree[0]), loss_function=cubes, data=[((X, X[:2]), Y)] * 2) @ ONES
        ),
        ValueError,
        "the batch size of batch 0 cannot be told",
    ),
    ("``batch_weight`` that is a number", lambda: hessian(batch_weight=3), TypeError, "batch_weight is a int"),
    (
        "``batch_weight`` of a sum",
        lambda: hessian(loss_function=nn.MSELoss(reduction="sum"), batch_weight=len),
        ValueError,
        "batch_weight has no meaning with reduction='sum'",
    ),
    (
        "a negative weight",
        lambda: first_product(batch_weight=lambda batch: -1),
        ValueError,
        "batch_weight returned -1.0 for batch 0",
    ),
    (
        "a weight that is a word",
        lambda: first_product(batch_weight=lambda batch: "x"),
        TypeError,
        "batch_weight returned a str for batch 0",
    ),
    (
        "a weight that is a matrix",
        lambda: first_product(batch_weight=lambda batch: batch[1]),
        TypeError,
        "batch_weight returned a Tensor for batch 0",
    ),
)
area(
    "Settings",
    ("half precision", lambda: hessian(dtype=np.float16), ValueError, "dtype is <class 'numpy.float16'>"),
    ("a dtype in words", lambda: hessian(dtype="double precision"), ValueError, "dtype is 'double precision'"),
    ("torch's dtype", lambda: hessian(dtype=torch.float64), ValueError, "dtype is torch.float64"),
    ("a negative cache", lambda: hessian(cache=-1), ValueError, "cache is -1"),
    ("a cache in words", lambda: hessian(cache="all"), ValueError, "cache is 'all'"),
    ("another engine", lambda: hessian(engine="warp"), ValueError, "engine is 'warp'"),
    ("no column at a time", lambda: hessian(columns=0), ValueError, "columns is 0"),
    ("a bar in words", lambda: hessian(progress="yes"), TypeError, "progress is a str"),
    ("a cost measured never", lambda: H.cost(repeats=0), ValueError, "repeats is 0"),
)
area(
    "Vectors",
    ("another length", lambda: H @ np.ones(42), ValueError, "x has shape (42,), but A has shape (43, 43)"),
    ("a matrix of other rows", lambda: H.matmat(np.ones((42, 2))), ValueError, "x has shape (42, 2)"),
    ("a tensor of another length", lambda: H @ torch.ones(42), ValueError, "x has shape (42,)"),
    (
        "another length, for the adjoint of a block",
        lambda: H.block("0.bias", "2.bias").rmatvec(np.ones(4)),
        ValueError,
        "x has shape (4,), but A has shape (3, 5)",
    ),
    ("a matrix where a vector is asked", lambda: H.matvec(np.ones((43, 2))), ValueError, "x has shape (43, 2)"),
    ("a vector where a matrix is asked", lambda: H.matmat(ONES), ValueError, "x has shape (43,)"),
    ("``None``", lambda: H @ None, ValueError, "x has shape ()"),
    ("complex numbers", lambda: H @ (1j * ONES), TypeError, "x has dtype complex128, but A is real"),
    (
        "a complex tensor",
        lambda: H @ torch.ones(43, dtype=torch.cfloat),
        TypeError,
        "x has dtype torch.complex64, but A is real",
    ),
    ("objects", lambda: H @ np.array([None] * 43), TypeError, "x has dtype object"),
    ("words", lambda: H @ np.array(["a"] * 43), TypeError, "x has dtype <U1"),
    ("a sparse tensor", lambda: H @ torch.eye(43).to_sparse(), TypeError, "x is a tensor that is torch.sparse_coo"),
    (
        "a quantised tensor",
        lambda: H @ torch.quantize_per_tensor(torch.ones(43), 0.1, 0, torch.qint8),
        TypeError,
        "x is a tensor that is quantised",
    ),
    (
        "a tensor on the meta device",
        lambda: H @ torch.ones(43, device="meta"),
        TypeError,
        "x is a tensor that is on the meta device",
    ),
    ("NaN", lambda: H @ (np.nan * ONES), NonFiniteProductError, "x, the vector handed in, is not finite"),
    (
        "a dict that lacks a parameter",
        lambda: H.ravel({"0.weight": np.ones((5, 4))}),
        ValueError,
        "params lacks '0.bias'",
    ),
    (
        "a dict with an unknown name",
        lambda: H.ravel({"0.wieght": 1}),
        ValueError,
        "params: no parameter is named '0.wieght'; did you mean '0.weight'",
    ),
    (
        "a dict with another shape",
        lambda: H.ravel(replaced("0.bias", np.ones(4))),
        ValueError,
        "params['0.bias'] has shape (4,)",
    ),
    ("a dict with a word", lambda: H.ravel(replaced("0.bias", "abc")), TypeError, "params['0.bias'] has dtype <U3"),
    ("no dict", lambda: H.ravel(None), TypeError, "params is a NoneType"),
    ("another length, to unravel", lambda: H.unravel(np.ones(4)), ValueError, "vector has shape (4,)"),
    ("complex numbers, to unravel", lambda: H.unravel(1j * ONES), TypeError, "vector is complex"),
)
area(
    "Blocks and damping",
    ("a number for a name", lambda: H.block(0), TypeError, "rows is a int"),
    (
        "a misspelt name",
        lambda: H.block("0.bias", "2.bais"),
        ValueError,
        "cols: no parameter is named '2.bais'; did you mean '2.bias'",
    ),
    ("no name", lambda: H.block([]), ValueError, "rows names no parameter"),
    ("a name twice", lambda: H.block(["0.bias"] * 2), ValueError, "rows names '0.bias' twice"),
    (
        "a misspelt name, of a Jacobian",
        lambda: JacobianLinearOperator(MODEL, PARAMS, DATA).block("0.bais"),
        ValueError,
        "params: no parameter is named '0.bais'; did you mean '0.bias'",
    ),
    (
        "diagonal blocks of a block off the diagonal",
        lambda: H.block("0.bias", "2.bias").blocks(),
        ValueError,
        "A has other parameters for rows than for columns",
    ),
    ("damping in words", lambda: H.damped("much"), TypeError, "damping is a str"),
    ("damping without bound", lambda: H.damped(np.inf), ValueError, "damping is inf"),
    ("damping of each entry", lambda: H.damped(ONES), TypeError, "damping is a ndarray"),
    (
        "another package's operator, to be damped",
        lambda: DampedLinearOperator(DENSE, 1.0),
        TypeError,
        "A is a MatrixLinearOperator",
    ),
)
area(
    "Indices",
    ("one beyond the end", lambda: H.submatrix([43]), IndexError, "row_idxs holds 43"),
    ("one before the beginning", lambda: H.submatrix([-44]), IndexError, "row_idxs holds -44"),
    ("one beyond 64 bits", lambda: H.submatrix([2**70]), IndexError, "row_idxs holds 1180591620717411303424"),
    ("floats", lambda: H.submatrix([1.0]), TypeError, "row_idxs has dtype float64"),
    ("a tensor of floats", lambda: H.submatrix(torch.ones(2)), TypeError, "row_idxs has dtype torch.float32"),
    ("a mask of another length", lambda: H[:, np.ones(42, bool)], IndexError, "col_idxs is a mask of length 42"),
    ("a matrix of them", lambda: H.submatrix([[0, 1]]), IndexError, "row_idxs has shape (1, 2)"),
    ("rows of different lengths", lambda: H.submatrix([[0], [1, 2]]), IndexError, "row_idxs holds sequences"),
    ("a single one", lambda: H[3, :], IndexError, "row_idxs has shape ()"),
    ("two lists at once", lambda: H[[0, 1], [0, 1]], IndexError, "A[rows, cols] with two index arrays"),
    ("three", lambda: H[:, :, 0], IndexError, "A has two axes, but 3 indices were given"),
    ("a set", lambda: H.submatrix({1, 2}), TypeError, "row_idxs is a set"),
    ("names", lambda: H.submatrix("0.bias"), TypeError, "row_idxs is a str"),
    ("a slice of floats", lambda: H[0.5:2, :], TypeError, "row_idxs is slice(0.5, 2, None)"),
    (
        "of a matrix that is no operator",
        lambda: SubmatrixLinearOperator(np.eye(3), [0], [0]),
        TypeError,
        "A is a ndarray, not a LinearOperator",
    ),
)
area(
    "Solves and preconditioners",
    (
        "a right-hand side of another length",
        lambda: solve(DENSE, np.ones(3), damping=1.0),
        ValueError,
        "b has shape (3,)",
    ),
    ("a matrix that is not square", lambda: solve(WIDE, np.ones(3), damping=1.0), ValueError, "A has shape (3, 4)"),
    ("a complex matrix", lambda: solve(COMPLEX, np.ones(4), damping=1.0), TypeError, "A has dtype complex128"),
    (
        "a right-hand side with NaN",
        lambda: solve(DENSE, np.full(4, np.nan), damping=1.0),
        ValueError,
        "b is not finite",
    ),
    ("damping in words", lambda: solve(DENSE, np.ones(4), damping="much"), TypeError, "damping is a str"),
    ("a tolerance of 0", lambda: solve(DENSE, np.ones(4), damping=1.0, rtol=0), ValueError, "rtol is 0"),
    ("half a step", lambda: solve(DENSE, np.ones(4), damping=1.0, maxiter=0.5), ValueError, "maxiter is 0.5"),
    (
        "a preconditioner of another size",
        lambda: solve(DENSE, np.ones(4), damping=1.0, preconditioner=aslinearoperator(np.eye(3))),
        ValueError,
        "preconditioner has shape (3, 3)",
    ),
    (
        "a preconditioner that is indefinite",
        lambda: solve(DENSE, np.ones(4), damping=1.0, preconditioner=-1.0 * DENSE, progress=False),
        ValueError,
        "preconditioner is not positive definite",
    ),
    ("a rank of 0", lambda: preconditioner.nystrom(DENSE, 0, 1.0), ValueError, "rank is 0"),
    ("a rank that is no number", lambda: preconditioner.nystrom(DENSE, 1.5, 1.0), ValueError, "rank is 1.5"),
    ("no damping for a preconditioner", lambda: preconditioner.nystrom(DENSE, 2, 0.0), ValueError, "damping is 0.0"),
    (
        "an indefinite matrix to precondition",
        lambda: preconditioner.nystrom(INDEFINITE, 3, 1.0, rng=0),
        ValueError,
        "A is indefinite",
    ),
    (
        "a complex matrix to precondition",
        lambda: preconditioner.nystrom(COMPLEX, 2, 1.0),
        TypeError,
        "A has dtype complex128",
    ),
    (
        "no matrix to precondition",
        lambda: preconditioner.nystrom(3, 2, 1.0),
        TypeError,
        "A is a int",
    ),
)
area(
    "Selections",
    ("from what is no model", lambda: select(3, "*"), TypeError, "model is a int"),
    ("a pattern that fits nothing", lambda: select(MODEL, "encoder*"), ValueError, "patterns has 'encoder*'"),
    ("a pattern that is a number", lambda: select(MODEL, 3), TypeError, "patterns is 3"),
    ("a type in words", lambda: select(MODEL, "*", types="Linear"), TypeError, "types is ("),
    ("a type that the model lacks", lambda: select(MODEL, "*", types=nn.Conv2d), ValueError, "types is ("),
    ("everything but everything", lambda: select(MODEL, "*", exclude="*"), ValueError, "no parameter is selected"),
)
area(
    "Eigenvalues and certificates",
    ("none of them", lambda: spectrum.eigsh(DENSE, 0), ValueError, "k is 0"),
    ("more than there are", lambda: spectrum.eigsh(DENSE, 5), ValueError, "k is 5"),
    ("half of one", lambda: spectrum.eigsh(DENSE, 1.5), TypeError, "k is a float"),
    ("another end", lambda: spectrum.eigsh(DENSE, 1, "XX"), ValueError, "which is 'XX'"),
    ("another method", lambda: spectrum.eigsh(DENSE, 1, method="qr"), ValueError, "method is 'qr'"),
    (
        "an end that a method does not find",
        lambda: spectrum.eigsh(DENSE, 1, "LM", method="lobpcg"),
        ValueError,
        "which is 'LM'",
    ),
    ("a negative tolerance", lambda: spectrum.eigsh(DENSE, 1, tol=-1), ValueError, "tol is -1"),
    ("a tolerance in words", lambda: spectrum.eigsh(DENSE, 1, tol="low"), TypeError, "tol is a str"),
    ("a basis that is too small", lambda: spectrum.eigsh(DENSE, 2, ncv=1), ValueError, "ncv is 1"),
    (
        "a starting vector of another length",
        lambda: spectrum.eigsh(DENSE, 1, v0=np.ones(3)),
        ValueError,
        "v0 has shape",
    ),
    ("a starting vector of zeros", lambda: spectrum.eigsh(DENSE, 1, v0=np.zeros(4)), ValueError, "v0 must be finite"),
    ("a matrix that is not square", lambda: spectrum.eigsh(WIDE, 1), ValueError, "A has shape (3, 4)"),
    ("a complex matrix", lambda: spectrum.eigsh(COMPLEX, 1), TypeError, "A has dtype complex128"),
    ("no matrix", lambda: spectrum.eigsh(3, 1), TypeError, "A is a int"),
    (
        "too little memory",
        lambda: spectrum.eigsh(DENSE, 1, method="device", memory=1, progress=False),
        MemoryError,
        "the matrix of 4 rows",
    ),
    ("negative time", lambda: spectrum.eigsh(DENSE, 1, seconds=-1), ValueError, "seconds is -1"),
    (
        "more vectors than values, to certify",
        lambda: spectrum.certify(DENSE, [3.0], np.eye(4)),
        ValueError,
        "values has shape (1,) and vectors (4, 4)",
    ),
    (
        "complex values, to certify",
        lambda: spectrum.certify(DENSE, [3j], np.eye(4)[:, :1]),
        TypeError,
        "values has dtype complex128",
    ),
    (
        "a certificate of no accuracy",
        lambda: spectrum.certify(DENSE, [3.0], np.eye(4)[:, :1], tol=0),
        ValueError,
        "tol is 0",
    ),
)
area(
    "Spectra",
    ("no probe", lambda: spectrum.density(DENSE, num_probes=0), ValueError, "num_probes is 0"),
    ("half a step", lambda: spectrum.density(DENSE, num_steps=0.5), ValueError, "num_steps is 0.5"),
    ("deflating everything", lambda: spectrum.density(DENSE, deflate=4), ValueError, "deflate is 4"),
    ("a matrix that is not square", lambda: spectrum.density(WIDE), ValueError, "A has shape (3, 4)"),
    ("a seed in words", lambda: spectrum.density(DENSE, rng="x", progress=False), TypeError, "rng is 'x'"),
    ("a checkpoint that is a file", checkpoint_in_a_file, ValueError, "checkpoint is DIRECTORY/file"),
    ("the checkpoint of something else", checkpoint_of_something_else, OtherProblemError, "num_probes differ"),
    ("no width", lambda: DENSITY.pdf(np.zeros(1), sigma=0), ValueError, "sigma is 0"),
    (
        "the logarithm of what is negative",
        lambda: spectrum.density(INDEFINITE, rng=0, progress=False).logdet(0.5),
        ValueError,
        "damping is 0.5",
    ),
    ("a trace from one product", lambda: spectrum.trace(DENSE, 1), ValueError, "num_products is 1"),
    ("a trace of what is not square", lambda: spectrum.trace(WIDE, 4), ValueError, "A has shape (3, 4)"),
    ("a trace of a complex matrix", lambda: spectrum.trace(COMPLEX, 4), TypeError, "A has dtype complex128"),
    ("a diagonal from half products", lambda: spectrum.diagonal(DENSE, 2.5), ValueError, "num_products is 2.5"),
    ("blocks of another operator", lambda: spectrum.blocks(DENSE), TypeError, "A is a MatrixLinearOperator"),
    ("no group of blocks", lambda: spectrum.blocks(H, groups={}), ValueError, "groups is empty"),
    ("groups without names", lambda: spectrum.blocks(H, groups=["0.bias"]), TypeError, "groups is a list"),
    (
        "a parameter in two groups",
        lambda: spectrum.blocks(H, groups={"a": "0.bias", "b": ["0.bias"]}),
        ValueError,
        "groups has '0.bias' twice",
    ),
    (
        "a group with a misspelt name",
        lambda: spectrum.blocks(H, groups={"a": "0.bais"}),
        ValueError,
        "groups['a']: no parameter is named '0.bais'",
    ),
    ("tracking every zeroth step", lambda: spectrum.track(DENSE, every=0), ValueError, "every is 0"),
    ("tracking an end that is inside", lambda: spectrum.track(DENSE, which="SM"), ValueError, "which is 'SM'"),
    ("tracking what is no matrix", lambda: spectrum.track(3), TypeError, "A is a int"),
    ("checking what is no operator", lambda: check(np.eye(3)), TypeError, "A is a ndarray"),
    ("checking without probes", lambda: check(DENSE, num_probes=0), ValueError, "num_probes is 0"),
)
area(
    "Files and journals",
    (
        "a file with pickled objects",
        lambda tmp: spectrum.SpectralDensity.load(pickled(tmp)),
        ValueError,
        "DIRECTORY/archive.npz was not written by SpectralDensity.save",
    ),
    (
        "a file of something else",
        lambda tmp: spectrum.EigenResult.load(archive(tmp, a=1)),
        ValueError,
        "DIRECTORY/archive.npz was not written by EigenResult.save",
    ),
    (
        "a file of text",
        lambda tmp: spectrum.BlockStudy.load(file_with(tmp, b"hello")),
        ValueError,
        "DIRECTORY/file was not written by BlockStudy.save",
    ),
    ("a file that is torn", torn, ValueError, "DIRECTORY/torn.npz was not written by SpectralDensity.save"),
    ("a journal of a matrix", lambda tmp: journal(tmp, np.eye(4)), TypeError, "A is a ndarray, not a LinearOperator"),
    ("a journal nowhere", lambda: journal(None), TypeError, "directory is a NoneType"),
    ("a journal in a file", lambda tmp: journal(file_with(tmp, b"x")), ValueError, "DIRECTORY/file is a file"),
    ("a journal among other files", journal_among_other_files, ValueError, "DIRECTORY holds 'notes.txt'"),
    ("the journal of another matrix", journal_of_another, OtherProblemError, "the journal in DIRECTORY is of another"),
    ("a journal that is in use", journal_in_use, RecordFileError, "DIRECTORY/products.records is in use"),
    ("a journal that is closed", journal_closed, RecordFileError, "DIRECTORY/products.records is closed"),
    ("a journal without its fingerprint", journal_without_fingerprint, ValueError, "lacks its fingerprint.json"),
    ("a journal of what has changed since", journal_after_a_step, RuntimeError, "params['0.bias'] changed"),
    (
        "records of something else",
        journal_of_text,
        RecordFileError,
        "DIRECTORY/products.records is not a file of records",
    ),
    ("a journal of negative size", lambda tmp: journal(tmp, max_bytes=-1), ValueError, "max_bytes is -1"),
    ("objects to record", lambda tmp: journal(tmp) @ np.array([None] * 4), TypeError, "x has dtype object"),
    (
        "tensors for an operator that takes none",
        lambda tmp: journal(tmp) @ torch.ones(4),
        TypeError,
        "takes NumPy arrays",
    ),
)
area(
    "The command",
    (
        "a misspelt problem",
        lambda: command("eigs", "digit"),
        CommandError,
        "no problem 'digit' (did you mean 'digits'?)",
    ),
    (
        "a file that is not there",
        lambda tmp: command("eigs", f"{tmp}/p.py:f"),
        CommandError,
        "no file 'DIRECTORY/p.py'",
    ),
    ("a module that is not there", lambda: command("eigs", "no_module:f"), CommandError, "no module named 'no_module'"),
    (
        "a file without a function's name",
        lambda: command("eigs", "p.py"),
        CommandError,
        "name its function: 'p.py:function'",
    ),
    ("a misspelt function", lambda tmp: of_file(tmp, "incompleet"), CommandError, "no function 'incompleet'"),
    ("a problem that is no dict", lambda tmp: of_file(tmp, "bare"), CommandError, "returned an object of type int"),
    ("a problem that lacks a key", lambda tmp: of_file(tmp, "incomplete"), CommandError, "returned no 'params'"),
    (
        "a problem with an unknown key",
        lambda tmp: of_file(tmp, "misspelt"),
        CommandError,
        "returned the unknown key 'loss'",
    ),
    (
        "a function with arguments",
        lambda tmp: of_file(tmp, "needing"),
        CommandError,
        "must be callable without arguments",
    ),
    (
        "something that is no function",
        lambda tmp: of_file(tmp, "number"),
        CommandError,
        "not a function but of type int",
    ),
    ("an unknown option", lambda: command("eigs", "digits", "--kk", "3"), CommandError, "unrecognized arguments: --kk"),
    ("a number in words", lambda: command("eigs", "digits", "--k", "ten"), CommandError, "argument --k: 'ten'"),
    ("no eigenvalue", lambda: command("eigs", "digits", "--k", "0"), CommandError, "argument --k: must be 1 or more"),
    ("too many", lambda: command("eigs", "digits", "--k", "99999"), CommandError, "--k = 99999 is too large"),
    (
        "a misspelt block",
        lambda: command("eigs", "digits", "--block", "0.wight"),
        CommandError,
        "--block: no parameter",
    ),
    (
        "negative damping",
        lambda: command("solve", "digits", "--damping", "-1"),
        CommandError,
        "argument --damping: must be",
    ),
    (
        "a file of another kind",
        lambda: command("eigs", "digits", "--out", "x.txt"),
        CommandError,
        "argument --out: 'x.txt'",
    ),
    (
        "a folder that is not there",
        lambda tmp: command("eigs", "digits", "--out", f"{tmp}/no/x.npz"),
        CommandError,
        "argument --out: no folder 'DIRECTORY/no'",
    ),
    (
        "resuming nothing",
        lambda: command("spectrum", "digits", "--resume"),
        CommandError,
        "argument --resume: needs --out",
    ),
    (
        "a deadline in the past",
        lambda: command("spectrum", "digits", "--deadline", "-5"),
        CommandError,
        "argument --deadline",
    ),
)


def told(row: Row) -> tuple[type[BaseException], str]:
    """Return what a row's attempt gets: the error's type, and its message without what differs from run to run."""
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row.attempt(Path(tmp).resolve())
        except Exception as error:
            text = str(error).replace(str(Path(tmp).resolve()), "DIRECTORY")
            return type(error), re.sub(r"-?\d+\.\d{2,}(e-?\d+)?", "0.123", text)
    raise AssertionError(f"{row.area}, {row.tried}: no error")


def table() -> str:
    """Return the page of the documentation that lists all rows."""
    lines = [
        "Bad input",
        "=========",
        "",
        f"What {len(ROWS)} mistakes get: one line that names the argument and the remedy. Nothing is lost by them, and",
        "nothing is left changed. This page is written by the tests, which make each of the mistakes.",
    ]
    for name in dict.fromkeys(row.area for row in ROWS):
        lines += ["", name, "-" * len(name), "", ".. list-table::", "   :header-rows: 1", "   :widths: 25 15 60", ""]
        lines += ["   * - tried", "     - error", "     - message"]
        for row in (row for row in ROWS if row.area == name):
            error, message = told(row)
            kind = "exit code 2" if error is CommandError else f"``{error.__name__}``"
            lines += [f"   * - {row.tried}", f"     - {kind}", f"     - ``{message}``"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(table(), end="")

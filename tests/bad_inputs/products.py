"""Data, settings, vectors and indices that products cannot be made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bad_inputs.rows import (
    DATA,
    DENSE,
    MODEL,
    ONES,
    PARAMS,
    H,
    X,
    Y,
    area,
    called,
    cubes,
    first_product,
    hessian,
    replaced,
)
from curvop import (
    BlockDiagonalLinearOperator,
    DampedLinearOperator,
    DiagonalLinearOperator,
    HessianLinearOperator,
    InverseLinearOperator,
    JacobianLinearOperator,
    NotConvergedError,
    PerExampleGradientLinearOperator,
    SubmatrixLinearOperator,
)
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError, UnknownNameError


def shuffled() -> Any:
    class TurnedAround:
        data = (X[:2], Y[:2]), (X[2:], Y[2:])

        def __iter__(self) -> Any:
            self.data = self.data[::-1]
            return iter(self.data)

    J = JacobianLinearOperator(MODEL, PARAMS, TurnedAround())
    for _ in range(2):
        J @ ONES


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
        "batches of unknown size",
        lambda: (
            hessian(model=lambda p, tree: called(p, tree[0]), loss_function=cubes, data=[((X, X[:2]), Y)] * 2) @ ONES
        ),
        ValueError,
        "the size of batch 0 is not known",
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
    (
        "a keyword of curvlinops",
        lambda: hessian(batch_size_fn=len),
        TypeError,
        "HessianLinearOperator got an unexpected keyword argument 'batch_size_fn': pass batch_weight=",
    ),
    (
        "a keyword that is not needed",
        lambda: HessianLinearOperator.from_objective(cubes, PARAMS, DATA, check_deterministic=False),
        TypeError,
        "HessianLinearOperator.from_objective got an unexpected keyword argument 'check_deterministic': leave it out",
    ),
    ("a misspelt keyword", lambda: hessian(colums=2), TypeError, "did you mean columns=?"),
    (
        "an argument too few",
        lambda: JacobianLinearOperator(MODEL, PARAMS),
        TypeError,
        "JacobianLinearOperator: missing a required argument: 'data'",
    ),
    (
        "an unknown kind of examples",
        lambda: PerExampleGradientLinearOperator(MODEL, nn.MSELoss(), PARAMS, DATA, examples="rows"),
        ValueError,
        "examples is 'rows', but must be 'terms' or 'items'",
    ),
    (
        "items that the terms of the loss do not belong to",
        lambda: PerExampleGradientLinearOperator(
            lambda params, tensor: called(params, tensor)[:3], nn.MSELoss(), PARAMS, [(X, Y[:3])], examples="items"
        ),
        ValueError,
        "the data items of a batch are not known",
    ),
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
        "a quantized tensor",
        lambda: H @ torch.quantize_per_tensor(torch.ones(43), 0.1, 0, torch.qint8),
        TypeError,
        "x is a tensor that is quantized",
    ),
    (
        "a tensor on the meta device",
        lambda: H @ torch.ones(43, device="meta"),
        TypeError,
        "x is a tensor that is on the meta device",
    ),
    ("NaN", lambda: H @ (np.nan * ONES), NonFiniteProductError, "x, the vector to multiply, is not finite"),
    (
        "a complex vector, of a Jacobian",
        lambda: JacobianLinearOperator(MODEL, PARAMS, DATA) @ (1j * ONES),
        TypeError,
        "x has dtype complex128, but A is real",
    ),
    ("arrays of different lengths", lambda: H @ [ONES, ONES[:2]], ValueError, "x holds sequences of different lengths"),
    ("a tensor too few", lambda: H @ list(PARAMS.values())[:3], ValueError, "x holds 3 tensors, but A has 4"),
    (
        "a tensor of another shape",
        lambda: H @ list(replaced("0.bias", torch.ones(5, 1)).values()),
        ValueError,
        "x[1] has shape (5, 1), but parameter '0.bias' has shape (5,)",
    ),
    (
        "a gradient that is ``None``",
        lambda: H @ [p.grad if p.ndim == 1 else p for p in PARAMS.values()],
        TypeError,
        "x[1] is a NoneType",
    ),
    (
        "a dict of tensors with an unknown name",
        lambda: H @ {**PARAMS, "0.wieght": ONES},
        ValueError,
        "x: no parameter is named '0.wieght'; did you mean '0.weight'",
    ),
    (
        "a dict of tensors that lacks a parameter",
        lambda: H @ {"0.bias": PARAMS["0.bias"]},
        ValueError,
        "x lacks '0.weight'",
    ),
    (
        "a dict of tensors, of a submatrix",
        lambda: H[:5, :] @ PARAMS,
        TypeError,
        "the columns of A, a SubmatrixLinearOperator, are not whole parameters",
    ),
    ("a matrix, to be added", lambda: H + np.eye(43), TypeError, "write A.damped(lam) for A + lam * I, or A + scipy."),
    ("a number, to be added", lambda: 1.0 + H, TypeError, "write A.damped(lam) for A + lam * I"),
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
    (
        "a dict of complex numbers",
        lambda: H.ravel(replaced("0.bias", 1j * np.ones(5))),
        TypeError,
        "params['0.bias'] is complex",
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
        UnknownNameError,
        "cols: no parameter or module is named '2.bais'; did you mean '2.bias'",
    ),
    (
        "a misspelt module",
        lambda: H.block("linear0"),
        UnknownNameError,
        "rows: no parameter or module is named 'linear0'; known are '0.weight', '0.bias', '2.weight', '2.bias'",
    ),
    (
        "a pattern that matches nothing",
        lambda: H.block("*.wieght"),
        UnknownNameError,
        "rows: no parameter or module is named '*.wieght'; did you mean '2.weight' or '0.weight'",
    ),
    (
        "a module and a parameter in it",
        lambda: H.block(["0", "0.bias"]),
        ValueError,
        "rows names '0.bias' twice",
    ),
    ("blocks of modules", lambda: H.blocks("modules"), TypeError, "groups is a str"),
    ("no name", lambda: H.block([]), ValueError, "rows names no parameter"),
    ("a name twice", lambda: H.block(["0.bias"] * 2), ValueError, "rows names '0.bias' twice"),
    (
        "a misspelt name, of a Jacobian",
        lambda: JacobianLinearOperator(MODEL, PARAMS, DATA).block("0.bais"),
        UnknownNameError,
        "params: no parameter or module is named '0.bais'; did you mean '0.bias'",
    ),
    (
        "diagonal blocks of a block off the diagonal",
        lambda: H.block("0.bias", "2.bias").blocks(),
        ValueError,
        "A has different row and column parameters",
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
    (
        "an array of objects that are booleans",
        lambda: H[np.array([True] * 43, dtype=object), :],
        IndexError,
        "row_idxs holds booleans, but has dtype object: pass mask.astype(bool)",
    ),
    (
        "an array of objects that are not integers",
        lambda: H[:, np.array([0, None], dtype=object)],
        TypeError,
        "col_idxs has dtype object",
    ),
    ("a sparse tensor", lambda: H[torch.ones(2, dtype=int).to_sparse(), :], TypeError, "row_idxs is a tensor that is"),
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

J = JacobianLinearOperator(MODEL, PARAMS, DATA)

area(
    "Combinations of operators",
    ("a sum of different shapes", lambda: H + J, ValueError, "so they cannot be added"),
    ("a product of shapes that do not fit", lambda: H @ J, ValueError, "so they cannot be multiplied"),
    ("the sum with a number", lambda: H + 1.0, TypeError, "A.damped(lam)"),
    ("a negative power", lambda: H**-1, ValueError, "the power is -1"),
    ("a power of a rectangular matrix", lambda: J**2, ValueError, "must be square to have powers"),
    ("a quotient of operators", lambda: H / H, ValueError, "the divisor must be a number"),
    ("damping of a rectangular matrix", lambda: J.damped(1.0), ValueError, "must be square to be damped"),
    ("an operator as an array", lambda: np.asarray(H), TypeError, "call A.to_dense()"),
    ("a dense matrix that is too large", lambda: H.to_dense(memory=10), MemoryError, "a dense matrix of shape"),
    ("a block of a kernel", lambda: (J @ J.T).block("weight"), TypeError, "use A.submatrix(rows, cols)"),
    ("groups with an unknown name", lambda: H.block_diagonal({"a": "wieght"}), UnknownNameError, "groups['a']"),
    (
        "groups that lack a parameter",
        lambda: H.block_diagonal({"a": next(iter(PARAMS))}, complete=True),
        ValueError,
        "groups lacks",
    ),
    ("blocks off the diagonal", lambda: J.block_diagonal(), ValueError, "no diagonal blocks"),
    ("no blocks", lambda: BlockDiagonalLinearOperator([]), ValueError, "blocks is empty"),
    ("an array as a block", lambda: BlockDiagonalLinearOperator([np.eye(2)]), TypeError, "blocks[0] is a ndarray"),
    ("a matrix as a diagonal", lambda: DiagonalLinearOperator(np.eye(2)), ValueError, "d has shape"),
    ("a complex diagonal", lambda: DiagonalLinearOperator(np.ones(2) * 1j), TypeError, "d is complex"),
    (
        "a diagonal of another length",
        lambda: DiagonalLinearOperator(np.ones(2), PARAMS),
        ValueError,
        "d has 2 entries, but must have",
    ),
    ("the inverse of a rectangular matrix", lambda: InverseLinearOperator(J, 1.0), ValueError, "must be square"),
    ("on_failure", lambda: InverseLinearOperator(H, 1.0, on_failure="ignore"), ValueError, "on_failure is 'ignore'"),
    (
        "an inverse that does not converge",
        lambda: InverseLinearOperator(H, 10.0, rtol=1e-12, maxiter=1) @ ONES,
        NotConvergedError,
        "not converged: relative residual",
    ),
)

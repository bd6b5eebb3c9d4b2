"""Bad input ends in one clear error that names the argument and the remedy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from cases import cut, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvop import HessianLinearOperator

MODEL = mlp().double()
PARAMS = dict(MODEL.named_parameters())
X, Y = torch.ones(4, 4).double(), torch.ones(4, 3).double()
DATA = [(X, Y)]


def replaced(name: str, value: Any) -> dict[str, Any]:
    return {**PARAMS, name: value}


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


CONSTRUCTION = {
    "no parameters": (dict(params={}), ValueError, "params is empty"),
    "no parameters in a list": (dict(params=[]), ValueError, "params is empty"),
    "nothing": (dict(params=None), TypeError, r"params is a NoneType: pass dict\(model.named_parameters"),
    "a parameter without a shape": (
        dict(model=nn.LazyLinear(3), params=dict(nn.LazyLinear(3).named_parameters())),
        ValueError,
        "'weight'.*no shape yet: call the model once",
    ),
    "one tensor": (dict(params=PARAMS["0.weight"]), TypeError, "params is one tensor"),
    "a pair": (
        dict(params=MODEL.named_parameters()),
        TypeError,
        r"params\[0\] is a tuple.*dict\(model.named_parameters",
    ),
    "an unknown name": (dict(params={"0.wieght": PARAMS["0.weight"]}), ValueError, "did you mean '0.weight'"),
    "another model's": (dict(params=list(mlp().parameters())), ValueError, r"params\[0\] is not one of the model's"),
    "one twice": (dict(params=[PARAMS["0.weight"]] * 2), ValueError, r"params\[1\] stands in the list twice"),
    "another shape": (
        dict(params=replaced("0.bias", X.clone().requires_grad_())),
        ValueError,
        r"'0.bias'.*shape \(4, 4\)",
    ),
    "not a tensor": (dict(params=replaced("0.bias", np.ones(5))), TypeError, "'0.bias'.*ndarray"),
    "integers": (dict(params=replaced("0.bias", torch.ones(5, dtype=torch.int))), ValueError, "'0.bias'.*torch.int32"),
    "complex": (dict(params=replaced("0.bias", torch.ones(5, dtype=torch.cfloat))), ValueError, "'0.bias'.*complex64"),
    "no gradient": (
        dict(params=replaced("0.bias", torch.ones(5).double())),
        ValueError,
        r"'0.bias'\] does not require grad",
    ),
    "two dtypes": (
        dict(params=replaced("0.bias", torch.ones(5, requires_grad=True))),
        ValueError,
        "one dtype.*'0.weight' has torch.float64 and '0.bias' has torch.float32",
    ),
    "offloaded": (
        dict(params=replaced("0.bias", torch.ones(5, device="meta", dtype=torch.float64, requires_grad=True))),
        ValueError,
        "must have values.*'0.bias' is on meta",
    ),
    "tied parameters under both names": (
        dict(model=tied(), params=dict(tied().named_parameters(remove_duplicate=False))),
        ValueError,
        "'0.weight' and '1.weight' are one tied tensor",
    ),
    "a list for a callable model": (
        dict(model=lambda p, X: X, params=list(PARAMS.values())),
        TypeError,
        "must be a dict",
    ),
    "a model that cannot be called": (dict(model=3), TypeError, "model is a int"),
    "a loss that cannot be called": (dict(loss_function="mse"), TypeError, "loss_function is a str"),
    "reduction none": (
        dict(loss_function=nn.MSELoss(reduction="none")),
        ValueError,
        "reduction='none'.*reduction='mean'",
    ),
    "a mean by a keyword of old": (
        dict(loss_function=functools.partial(F.mse_loss, size_average=False)),
        ValueError,
        "loss_function has size_average=.*use reduction=",
    ),
    "a batch weight that is no function": (dict(batch_weight=3), TypeError, "batch_weight is a int: pass a function"),
    "data that is no iterable": (dict(data=3), TypeError, "data is a int"),
    "a one-shot iterator": (dict(data=iter(DATA)), TypeError, "one-shot iterator.*list"),
    "a generator": (dict(data=(batch for batch in DATA)), TypeError, "one-shot iterator"),
    "another dtype": (dict(dtype=np.float16), ValueError, "dtype is .*float16.*numpy.float64"),
    "no dtype": (dict(dtype="double precision"), ValueError, "dtype is 'double precision'"),
    "a negative cache": (dict(cache=-1), ValueError, "cache is -1.*bytes"),
    "a cache in words": (dict(cache="all"), ValueError, "cache is 'all'"),
    "another engine": (dict(engine="warp"), ValueError, "engine is 'warp'"),
    "progress": (dict(progress="yes"), TypeError, "progress is a str"),
    "weights of a sum": (
        dict(loss_function=nn.MSELoss(reduction="sum"), batch_weight=len),
        ValueError,
        "batch_weight.*reduction='sum'",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_when_the_operator_is_constructed(case: str) -> None:
    changed, error, message = CONSTRUCTION[case]
    arguments = dict(model=MODEL, loss_function=nn.MSELoss(), params=PARAMS, data=DATA) | changed
    with pytest.raises(error, match=message):
        HessianLinearOperator(**arguments)


def cubes(prediction: Tensor, y: Tensor) -> Tensor:
    return ((prediction - y) ** 3).mean()


PRODUCT = {
    "no data": (dict(data=[]), ValueError, "data is empty"),
    "an empty loader": (dict(data=DataLoader(TensorDataset(X[:0], Y[:0]))), ValueError, "data is empty"),
    "a batch that is no pair": (dict(data=[X]), TypeError, r"pairs \(X, y\).*Tensor"),
    "data that is one pair": (dict(data=(X, Y)), TypeError, r"pairs \(X, y\).*Tensor"),
    "a loss that is not a scalar": (
        dict(loss_function=lambda z, y: F.mse_loss(z, y, reduction="none")),
        ValueError,
        r"loss of batch 0 has shape \(4, 3\)",
    ),
    "a loss that is a number": (dict(loss_function=lambda z, y: 1.0), TypeError, "loss of batch 0 is a float"),
    "a loss of integers": (dict(loss_function=lambda z, y: y.long().sum()), ValueError, "dtype torch.int64"),
    "a batch size that cannot be told": (
        dict(
            model=lambda p, tree: torch.func.functional_call(MODEL, p, (tree[0],)),
            loss_function=cubes,
            data=[((X, X[:2]), Y)] * 2,
        ),
        ValueError,
        "batch size of batch 0 cannot be told.*batch_weight=",
    ),
    "a batch weight that is negative": (dict(batch_weight=lambda batch: -1), ValueError, r"batch_weight returned -1.0"),
    "only ignored targets": (
        dict(loss_function=nn.CrossEntropyLoss(), data=[(X, torch.full((4,), -100))]),
        ValueError,
        "total weight 0",
    ),
}


@pytest.mark.parametrize("case", PRODUCT)
def test_at_the_first_product(case: str) -> None:
    changed, error, message = PRODUCT[case]
    H = HessianLinearOperator(**dict(model=MODEL, loss_function=nn.MSELoss(), params=PARAMS, data=DATA) | changed)
    for _ in range(2):  # and the operator does not take the failure for a result
        with pytest.raises(error, match=message):
            H @ np.ones(43)


def test_an_unlimited_cache() -> None:
    H = HessianLinearOperator(MODEL, nn.MSELoss(), PARAMS, DATA, cache=np.inf)
    assert (H @ np.ones(43)).any()


def test_an_only_batch_needs_no_batch_size() -> None:
    def model(params, tree):
        return torch.func.functional_call(MODEL, params, (tree[0],))

    H = HessianLinearOperator(model, cubes, PARAMS, [((X, X[:2]), 0 * Y)])
    plain = HessianLinearOperator(MODEL, cubes, PARAMS, [(X, 0 * Y)])
    np.testing.assert_allclose(H @ np.ones(43), plain @ np.ones(43), rtol=1e-12)


@pytest.fixture(scope="module")
def H() -> HessianLinearOperator:
    return HessianLinearOperator(MODEL, nn.MSELoss(), PARAMS, DATA)


class TestVectors:
    @pytest.mark.parametrize("kind", [np.ones, torch.ones])
    @pytest.mark.parametrize("shape", [(42,), (44, 1), (44, 3), (1, 42), (42, 43)])
    def test_of_the_wrong_length(self, H, kind, shape) -> None:
        with pytest.raises(ValueError, match=r"x has shape .* but A has shape \(43, 43\).*\(43,\) or \(43, K\)"):
            H @ kind(shape)
        with pytest.raises(ValueError, match=r"\(43, 43\)"):
            H.matmat(kind(shape))

    def test_of_the_wrong_length_for_the_adjoint(self, H) -> None:
        with pytest.raises(ValueError, match=r"\(4,\).*\(3, 5\)"):
            H.block("0.bias", "2.bias").rmatvec(np.ones(4))

    @pytest.mark.parametrize("x", [1j * np.ones(43), torch.ones(43, dtype=torch.cfloat), np.ones((43, 2), complex)])
    def test_complex(self, H, x) -> None:
        for A in (H, H.damped(1.0), H[:40, :]):
            with pytest.raises(TypeError, match=r"complex.*but A is real"):
                A @ x

    def test_objects_and_sparse_matrices(self, H) -> None:
        import scipy.sparse

        with pytest.raises(TypeError):
            H @ np.array([None] * 43)
        with pytest.raises(TypeError):
            H @ scipy.sparse.eye_array(43).tocsr()


class TestBlockNames:
    def test_what_is_no_name(self, H) -> None:
        with pytest.raises(TypeError, match="rows is a int: pass the name of a parameter"):
            H.block(0)

    def test_a_rectangular_block_has_no_diagonal_blocks(self, H) -> None:
        with pytest.raises(ValueError, match=r"no diagonal blocks: use A.block"):
            H.block("0.bias", "2.bias").blocks()

    @pytest.mark.parametrize(
        ("rows", "cols", "message"),
        [
            ("0.wight", None, "rows: no parameter is named '0.wight'; did you mean '0.weight'"),
            ("0.bias", ["2.bais"], "cols: no parameter is named '2.bais'; did you mean '2.bias'"),
            ("zzz", None, r"known are '0.weight'"),
            ([], None, "rows names no parameter"),
            (["0.bias", "0.bias"], None, "rows names '0.bias' twice"),
        ],
    )
    def test_unknown_none_or_twice(self, H, rows, cols, message) -> None:
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

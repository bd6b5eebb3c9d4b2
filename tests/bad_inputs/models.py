"""Parameters, models and losses that have no matrix."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bad_inputs.rows import (
    DATA,
    MODEL,
    ONES,
    PARAMS,
    X,
    Y,
    area,
    called,
    first_product,
    hessian,
    made,
    mlp,
    with_bias,
)
from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    TargetLoss,
    huggingface,
)
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError


def two_lengths(params: dict[str, Tensor], X: Tensor) -> tuple[Tensor, Tensor]:
    prediction = called(params, X)
    return prediction, prediction[:1]


def mapped(**X: Tensor) -> Any:
    """Return a product of a model with one input over a mapping of several."""

    class TwoInputs(nn.Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return super().forward(a * b)

    model = made(lambda: TwoInputs(4, 3))[0]
    return hessian(model=model, params=dict(model.named_parameters()), data=[(X, Y)]) @ np.ones(15)


def of_functions(predict: Any = called, loss: Any = F.mse_loss, data: Any = DATA, **options: Any) -> Any:
    return GGNLinearOperator.from_functions(predict, loss, PARAMS, data, **options) @ ONES


def by_input(params: dict[str, Tensor], batch: Any) -> Tensor:
    return called(params, batch["X"])


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


def with_buffers() -> Any:
    model = made(lambda: nn.Linear(4, 3), lambda: nn.BatchNorm1d(3))
    return hessian(model=model, params=model.state_dict())


def compiled(part: str) -> Any:
    model = mlp()
    if part == "all":
        return hessian(model=torch.compile(model, backend="eager"))
    if part == "layer":
        model[0] = torch.compile(model[0], backend="eager")
    if part == "in place":
        model[0].compile(backend="eager")
    return hessian(model=model, params=dict(model.named_parameters()))


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


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].exp()


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
    (
        "one of them twice",
        lambda: hessian(params=[PARAMS["0.weight"]] * 2),
        ValueError,
        "params[1] is in the list twice",
    ),
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
        "``model.state_dict()`` with buffers",
        lambda: with_buffers(),
        ValueError,
        "params contains buffers of the model, '1.running_mean', '1.running_var', '1.num_batches_tracked'",
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
        "a quantized tensor",
        lambda: with_bias(torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)),
        ValueError,
        "params['0.bias'] is quantized",
    ),
    ("a model on the meta device", lambda: on_meta(), ValueError, "params['weight'] is on the meta device"),
    ("a lazy layer that has not been called", lambda: lazy(), ValueError, "params['weight'] has no shape yet"),
    (
        "made under ``torch.inference_mode()``",
        lambda: in_inference_mode(),
        ValueError,
        "params['0.weight'] was created under torch.inference_mode()",
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
    ("a model that torch.compile has made", lambda: compiled("all"), TypeError, "pass model._orig_mod"),
    ("a layer that torch.compile has made", lambda: compiled("layer"), TypeError, "model, layer '0', is compiled"),
    ("a layer that is compiled in place", lambda: compiled("in place"), TypeError, "model, layer '0', was compiled in"),
    (
        "a loss that torch.compile has made",
        lambda: hessian(loss_function=torch.compile(F.mse_loss, backend="eager")),
        TypeError,
        "loss_function is compiled by torch.compile: pass the function",
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
        "a mapping whose keys do not fit the model",
        lambda: mapped(a=X, c=X),
        TypeError,
        "fits the model's forward(a, b) neither as one argument, model(X), nor as keywords, model(**X)",
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
        lambda: EFLinearOperator(two_lengths, lambda z, y: sum((part**2).sum() for part in z), PARAMS, DATA) @ ONES,
        ValueError,
        "per-example gradients need predictions with the examples along dimension 0",
    ),
)
area(
    "A prediction and a loss",
    ("a prediction that is a number", lambda: of_functions(predict=3), TypeError, "predict is a int"),
    (
        "a module in place of a function",
        lambda: of_functions(predict=MODEL),
        TypeError,
        "predict is a module, Sequential",
    ),
    ("a loss that is a word", lambda: of_functions(loss="mse"), TypeError, "loss is a str"),
    (
        "a loss of ``torch.nn`` that receives a dict",
        lambda: of_functions(by_input, nn.MSELoss(), [{"X": X, "y": Y}]),
        TypeError,
        "loss is a loss function of torch.nn, but batch 0 is a dict",
    ),
    (
        "``reduction='none'``",
        lambda: of_functions(loss=TargetLoss(nn.MSELoss(reduction="none"), lambda batch: batch[1])),
        ValueError,
        "loss has reduction='none'",
    ),
    ("targets that are a name", lambda: TargetLoss(nn.MSELoss(), "y"), TypeError, "targets is a str"),
    ("a loss that is a class", lambda: TargetLoss(nn.MSELoss, len), TypeError, "loss_function is the class MSELoss"),
    (
        "a weight for a sum",
        lambda: of_functions(loss=TargetLoss(nn.MSELoss(reduction="sum"), len), batch_weight=len),
        ValueError,
        "batch_weight has no meaning with reduction='sum'",
    ),
    (
        "parameters in a list",
        lambda: GGNLinearOperator.from_functions(called, F.mse_loss, list(PARAMS.values()), DATA),
        TypeError,
        "params must be a dict of names to tensors",
    ),
    (
        "targets that are no tensor",
        lambda: of_functions(loss=TargetLoss(nn.MSELoss(), lambda batch: None)) @ ONES,
        TypeError,
        "targets returned a NoneType, but the loss function of TargetLoss needs a tensor",
    ),
    (
        "a ``TargetLoss`` for pairs (X, y)",
        lambda: GGNLinearOperator(MODEL, TargetLoss(nn.MSELoss(), len), PARAMS, DATA),
        TypeError,
        "loss_function is a TargetLoss, which takes a whole batch",
    ),
    (
        "a Fisher matrix of a function",
        lambda: FisherLinearOperator.from_functions(called, lambda z, batch: z.sum(), PARAMS, DATA),
        ValueError,
        "loss is no known log-likelihood",
    ),
    ("a name in place of a model", lambda: huggingface.causal_lm("gpt2"), TypeError, "model is a str"),
    (
        "a model without a configuration",
        lambda: huggingface.sequence_classification(MODEL),
        TypeError,
        "model is a Sequential without config: pass a model of transformers",
    ),
)

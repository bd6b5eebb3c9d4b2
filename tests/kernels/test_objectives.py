"""Realistic objectives: Hugging Face models, weight decay, and losses that contain derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_matrix, close
from cases import BATCHINGS, Problem, loss_problem, mlp, seeded
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader

import curvop
from curvop.examples import functorch

transformers = pytest.importorskip("transformers")


@seeded
def hugging_face_model(name: str) -> nn.Module:
    small = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    if name == "gpt2":
        config = transformers.GPT2Config(n_positions=8, bos_token_id=0, eos_token_id=0, **small)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.BertConfig(intermediate_size=8, max_position_embeddings=8, num_labels=3, **small)
    return transformers.BertForSequenceClassification(config).eval()


CHOSEN = {
    "gpt2": ["*wte.weight", "*ln_1.*", "*c_attn.bias", "*mlp.c_proj.bias"],  # wte.weight is tied to the head
    "bert": ["*word_embeddings.weight", "*attention*LayerNorm.*", "*query.bias", "*classifier.*"],
}
LENGTHS = (3, 2, 6, 4, 5)
PARTS = (slice(0, 2), slice(2, 3), slice(3, 5))  # all ignored, one sentence, two of different lengths


@seeded
def sentences(name: str) -> Any:
    """Return five sentences as one padded batch; the targets of the first two are ignored."""
    real = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(1, 11, real.shape).where(real, 0)
    labels = tokens.where(real, -100) if name == "gpt2" else torch.tensor([0, 1, 1, 0, 2])
    labels[:2] = -100
    if name == "gpt2":
        labels[2, :3] = -100  # the third begins with a prompt
    return transformers.BatchEncoding({"input_ids": tokens, "attention_mask": real.long(), "labels": labels})


def ragged(name: str) -> list[Any]:
    """Cut the padded batch into three, each as long as its longest sentence."""
    whole = sentences(name).items()
    return [transformers.BatchEncoding({key: x[part][..., : max(LENGTHS[part])] for key, x in whole}) for part in PARTS]


def pair(batch: Any) -> tuple[Any, Tensor]:
    """Return a batch as inputs and targets; the first token has no predecessors, so it is not a target."""
    X = transformers.BatchEncoding({key: value for key, value in batch.items() if key != "labels"})
    return X, batch["labels"][:, 1:] if batch["labels"].ndim == 2 else batch["labels"]


def not_ignored(batch: tuple[Any, Tensor]) -> float:
    return float((batch[1] != -100).sum())


def scores(output: Any) -> Tensor:
    """Return the logits with the classes along axis 1, as torch's losses expect, without those after the last token."""
    return output.logits[:, :-1].transpose(1, 2) if output.logits.ndim == 3 else output.logits


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, X: Any) -> Tensor:
        return scores(self.model(**X))


def padded(name: str) -> Problem:
    model = Logits(hugging_face_model(name))
    return Problem(model, nn.CrossEntropyLoss(), [pair(sentences(name))], curvop.select(model, CHOSEN[name]))


def own(problem: Problem) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the original model, with the parameters by its own names."""
    return problem.model.model, {name.removeprefix("model."): value for name, value in problem.params.items()}


def build(operator: Any, problem: Problem, **options: Any) -> Any:
    return operator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def reference(dense: Callable[..., Tensor], problem: Problem) -> np.ndarray:
    return dense(problem.model, problem.loss_function, problem.params, problem.data).numpy()


def covariance(*problem: Any) -> Tensor:
    """Return the centered empirical Fisher matrix; the loss averages over the examples."""
    gradient, _ = functorch.functorch_gradient_and_loss(*problem)
    return functorch.functorch_empirical_fisher(*problem) - gradient.outer(gradient)


MATRICES = {
    curvop.HessianLinearOperator: functorch.functorch_hessian,
    curvop.GGNLinearOperator: functorch.functorch_ggn,
    curvop.FisherLinearOperator: functorch.functorch_ggn,
    curvop.EFLinearOperator: functorch.functorch_empirical_fisher,
    curvop.GradientCovarianceLinearOperator: covariance,
}


@pytest.mark.parametrize("name", CHOSEN)
class TestHuggingFace:
    @pytest.mark.default_cases("GGNLinearOperator-gpt2")
    @pytest.mark.parametrize("operator", MATRICES)
    def test_ragged_batches_have_the_matrix_of_one_padded_batch(self, name: str, operator: Any) -> None:
        problem = padded(name)
        expected = reference(MATRICES[operator], problem)
        problem.data = [pair(batch) for batch in ragged(name)]
        assert_matrix(functools.partial(build, operator, problem), expected, diagonal=False)

    def test_ragged_batches_have_the_rows_of_the_jacobian_that_are_not_cut_off(self, name: str) -> None:
        problem = padded(name)
        whole = functorch.functorch_jacobian(problem.model, problem.params, problem.data)
        whole = whole.view(*problem.model(problem.data[0][0]).shape, -1)  # sentences, classes, positions, parameters
        kept = [whole[part, :, : max(LENGTHS[part]) - 1] if name == "gpt2" else whole[part] for part in PARTS]
        dense = torch.cat([part.reshape(-1, whole.shape[-1]) for part in kept]).numpy()
        J = curvop.JacobianLinearOperator(problem.model, problem.params, [pair(batch) for batch in ragged(name)])
        close(J @ np.eye(dense.shape[1]), dense)
        close(J.T @ np.ones(len(dense)), dense.sum(0))

    def test_the_models_own_loss_has_the_same_hessian(self, name: str) -> None:
        model, params = own(padded(name))
        H = curvop.HessianLinearOperator.from_objective(
            lambda params, batch: functional_call(model, params, (), dict(batch)).loss,
            params,
            ragged(name),
            batch_weight=lambda batch: not_ignored(pair(batch)),
        )
        # GPT-2's own loss casts the logits to float32, whatever the model's dtype.
        error = 1e-6 if name == "gpt2" else 1e-13
        dense = reference(functorch.functorch_hessian, padded(name))
        assert np.linalg.norm(H @ np.eye(len(dense)) - dense) <= error * np.linalg.norm(dense)
        np.testing.assert_allclose(H.gradient_and_loss()[1], model(**sentences(name)).loss.item(), rtol=error)

    def test_the_examples_of_a_function_are_sentences(self, name: str) -> None:
        problem = padded(name)
        expected, problem.loss_function = by_sentence(problem), lambda scores, y: F.cross_entropy(scores, y)
        problem.data = [pair(batch) for batch in ragged(name)]
        A = functools.partial(build, curvop.EFLinearOperator, problem, batch_weight=not_ignored)
        assert_matrix(A, expected, diagonal=False)

    @pytest.mark.default_cases("bert")
    def test_the_models_own_output_is_a_prediction(self, name: str) -> None:
        model, params = own(padded(name))

        def predict(params: dict[str, Tensor], X: Any) -> Any:
            return functional_call(model, params, (), dict(X, use_cache=False) if name == "gpt2" else dict(X))

        data = [pair(batch) for batch in ragged(name)]
        problem = predict, lambda output, y: F.cross_entropy(scores(output), y), params, data

        for operator, dense in [
            (curvop.HessianLinearOperator, reference(functorch.functorch_hessian, padded(name))),
            (curvop.GGNLinearOperator, reference(functorch.functorch_ggn, padded(name))),
        ]:
            assert_matrix(functools.partial(operator, *problem, batch_weight=not_ignored), dense, diagonal=False)
        dense = torch.cat([rows_of(predict(params, X).logits, params) for X, _ in data]).numpy()
        close(curvop.JacobianLinearOperator(predict, params, data) @ np.eye(dense.shape[1]), dense)


def test_a_loss_less_precise_than_the_parameters_is_not_random() -> None:
    # GPT-2's own loss is in float32. In another order of summation it changes by more than float64 rounding.
    model = hugging_face_model("gpt2")
    tokens = torch.randint(1, 11, (40, 6), generator=torch.Generator().manual_seed(0))
    H = curvop.HessianLinearOperator.from_objective(
        lambda params, batch: functional_call(model, params, (), dict(input_ids=batch, labels=batch)).loss,
        curvop.select(model, "*ln_1.*"),
        DataLoader(tokens, batch_size=5, shuffle=True),
        cache=0,
    )
    products = np.stack([H @ np.ones(16) for _ in range(8)])
    assert np.linalg.norm(products - products[0]) < 1e-5 * np.linalg.norm(products)  # float32 again


def rows_of(values: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Return the gradients of scalars as rows."""
    rows = [torch.autograd.grad(value, list(params.values()), retain_graph=True) for value in values.reshape(-1)]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def by_sentence(problem: Problem) -> np.ndarray:
    """Return the empirical Fisher matrix with sentences as examples, from their gradients one by one."""
    [(X, y)] = problem.data
    losses = F.cross_entropy(problem.model(X), y, reduction="none").reshape(len(y), -1).sum(1)
    G = rows_of(losses, problem.params).numpy()
    return G.T @ G / not_ignored((X, y))


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("loss", ["mse", "ce-ignored"])
def test_weight_decay_on_weights_but_not_on_biases(loss: str, batching: str) -> None:
    problem = loss_problem(loss, batching)

    def objective(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        X, y = batch
        penalty = sum(value.square().sum() for name, value in params.items() if name.endswith("weight"))
        return problem.loss_function(functional_call(problem.model, params, (X,)), y) + 0.05 * penalty

    H = functools.partial(curvop.HessianLinearOperator.from_objective, objective, problem.params, problem.data)
    if loss == "ce-ignored":
        H = functools.partial(H, batch_weight=not_ignored)
    sizes = [value.numel() for value in problem.params.values()]
    diagonal = np.repeat([0.1 * name.endswith("weight") for name in problem.params], sizes)
    assert_matrix(H, reference(functorch.functorch_hessian, problem) + np.diag(diagonal))
    of_data = reference(lambda *problem: functorch.functorch_gradient_and_loss(*problem)[0], problem)
    close(H().gradient_and_loss()[0], of_data + diagonal * H().ravel(problem.params))


def laplacian(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Laplacian of u with respect to its inputs at the points `x` (N, D)."""
    x = x.detach().requires_grad_()
    [slopes] = torch.autograd.grad(u(x).sum(), x, create_graph=True)
    seconds = [torch.autograd.grad(slopes[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(x.shape[1])]
    return torch.stack(seconds).sum(0)


def source(x: Tensor) -> Tensor:
    return (3 * x).sin().sum(-1)


POINTS = torch.rand(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (1,) * 7])
def test_physics_informed_loss_with_boundary_values(sizes: tuple[int, ...]) -> None:  # of -u'' = f
    model, X = seeded(mlp)(1, 1), POINTS[:, :1]
    params = dict(model.named_parameters())
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def objective(params: dict[str, Tensor], x: Tensor) -> Tensor:
        u = functools.partial(functional_call, model, params)
        return (laplacian(u, x) + source(x)).square().mean() + u(ends).square().sum()

    def by_hand(theta: Tensor) -> Tensor:
        # u(x) = a . tanh(w x + b) + c, and tanh'' = -2 tanh (1 - tanh^2).
        w, b, a, c = theta.split([5, 5, 5, 1])
        t, boundary = (X * w + b).tanh(), (ends * w + b).tanh() @ a + c
        return ((-2 * t * (1 - t**2) * w**2) @ a + source(X)).square().mean() + boundary.square().sum()

    theta = torch.cat([value.detach().reshape(-1) for value in params.values()])
    H = functools.partial(curvop.HessianLinearOperator.from_objective, objective, params, list(X.split(list(sizes))))
    assert_matrix(H, jacfwd(grad(by_hand))(theta).numpy())


class Laplacian(nn.Module):
    """The network's Laplacian as a prediction, so that the residual of the equation is an ordinary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return laplacian(self.u, x)


@seeded
def poisson_equation() -> Problem:
    return Problem(Laplacian(), nn.MSELoss(), [(x, -source(x)) for x in POINTS.split([4, 3])])


def test_physics_informed_residuals_have_every_matrix() -> None:
    problem = poisson_equation()
    shapes = {name.removeprefix("u."): value.shape for name, value in problem.params.items()}

    def residuals(theta: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in shapes.values()])
        params = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        u = functools.partial(functional_call, problem.model.u, params)
        return vmap(lambda point: jacfwd(jacfwd(u))(point)[0].trace())(POINTS) + source(POINTS)

    theta = torch.cat([value.detach().reshape(-1) for value in problem.params.values()])
    J, r = jacfwd(residuals)(theta).numpy(), residuals(theta).detach().numpy()
    H = jacfwd(grad(lambda theta: residuals(theta).square().mean()))(theta).numpy()
    assert_matrix(functools.partial(build, curvop.HessianLinearOperator, problem), H)
    assert_matrix(functools.partial(build, curvop.GGNLinearOperator, problem), 2 / 7 * J.T @ J, diagonal=False)
    assert_matrix(functools.partial(build, curvop.EFLinearOperator, problem), 4 / 7 * (J.T * r**2) @ J, diagonal=False)
    close(curvop.JacobianLinearOperator(problem.model, problem.params, problem.data) @ np.eye(len(theta)), J)


@pytest.mark.nightly
def test_physics_informed_residuals_compile() -> None:
    compiled, plain = (build(curvop.GGNLinearOperator, poisson_equation(), engine=e) for e in ("compiled", "autograd"))
    close(compiled @ np.ones(31), plain @ np.ones(31))

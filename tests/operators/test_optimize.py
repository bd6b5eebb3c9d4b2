"""SciPy's optimizers minimize a real objective with the Hessian as an operator."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from torch.nn import functional

from curvop import HessianLinearOperator

# With less decay, the last steps change the loss by less than its rounding error, and trust-krylov fails.
IMAGES, PIXELS, CLASSES, DECAY = 150, 16, 10, 0.1


class SoftmaxRegression:
    """Cross-entropy with weight decay on handwritten digits of 4 x 4 pixels: strictly convex, with one minimum."""

    def __init__(self):
        pixels, labels = load_digits(return_X_y=True)
        small = pixels[:IMAGES].reshape(IMAGES, 4, 2, 4, 2).mean((2, 4)).reshape(IMAGES, PIXELS) / 16
        self.X, self.y = torch.from_numpy(small), torch.from_numpy(labels[:IMAGES])
        self.params = {
            "weight": torch.zeros(CLASSES, PIXELS, dtype=torch.float64, requires_grad=True),
            "bias": torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True),
        }
        data = [(self.X[:100], self.y[:100]), (self.X[100:], self.y[100:])]
        self.hessian = HessianLinearOperator.from_objective(self.objective, self.params, data)

    @staticmethod
    def objective(params, batch):
        X, y = batch
        decay = sum((value**2).sum() for value in params.values())
        return functional.cross_entropy(functional.linear(X, **params), y) + DECAY / 2 * decay

    def move_to(self, theta):
        with torch.no_grad():
            for name, value in self.hessian.unravel(theta).items():
                self.params[name].copy_(value)

    def value_and_gradient(self, theta):
        self.move_to(theta)
        gradient, loss = self.hessian.gradient_and_loss()
        return loss, gradient

    def hessian_at(self, theta):
        self.move_to(theta)
        return self.hessian

    def hessian_product(self, theta, v):
        return self.hessian_at(theta) @ v

    def exact_gradient(self, theta):
        """The closed form ``(softmax(Z) - onehot(y))' X / n + decay * theta``, in NumPy."""
        weight, bias = theta[: CLASSES * PIXELS].reshape(CLASSES, PIXELS), theta[CLASSES * PIXELS :]
        X = self.X.numpy()
        odds = np.exp(X @ weight.T + bias)
        error = odds / odds.sum(1, keepdims=True) - np.eye(CLASSES)[self.y.numpy()]
        return np.concatenate([(error.T @ X).ravel(), error.sum(0)]) / IMAGES + DECAY * theta


OPTIONS = {
    "Newton-CG": {"xtol": 1e-10},
    "trust-ncg": {"gtol": 1e-8},
    "trust-krylov": {"gtol": 1e-8},
    "trust-constr": {"gtol": 1e-9, "xtol": 1e-14},
}


@pytest.mark.parametrize(
    ("method", "given"),
    [*((method, "hessp") for method in OPTIONS), ("Newton-CG", "hess"), ("trust-constr", "hess")],
)
def test_minimize_reaches_the_minimum_of_softmax_regression(method, given):
    problem = SoftmaxRegression()
    start = np.zeros(CLASSES * (PIXELS + 1))
    hessian = {"hess": problem.hessian_at} if given == "hess" else {"hessp": problem.hessian_product}
    result = minimize(problem.value_and_gradient, start, jac=True, method=method, options=OPTIONS[method], **hessian)
    assert result.success
    assert np.linalg.norm(problem.exact_gradient(result.x)) < 1e-8
    assert_allclose(problem.value_and_gradient(result.x)[1], problem.exact_gradient(result.x), rtol=1e-6, atol=1e-14)
    assert result.fun < np.log(CLASSES) - 0.1
    assert 0 < problem.hessian.num_products < 500

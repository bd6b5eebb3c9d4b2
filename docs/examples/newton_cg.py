r"""
Training by Newton's method
===========================

``scipy.optimize`` trains a network as it minimises anything else: it wants the loss and its gradient at a point, and
products with the Hessian there. ``trust-krylov`` (Gould, Lucidi, Roma, Toint, 1999) needs nothing more, and copes with
a Hessian that is indefinite, as it is on the way to a minimum.

The operator shows the parameters as they are now: write a new point into them, and the next product is there.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from torch import nn

from curvop import HessianLinearOperator

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
X, y = torch.from_numpy(pixels / 16), torch.from_numpy(labels)
model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
params = dict(model.named_parameters())
decay = 1e-3

# %%
# The objective is a function of the parameters and a batch, so that weight decay belongs to it.


def objective(params, batch):
    """Return the regularised loss of a batch."""
    X, y = batch
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, params, (X,)), y)
    return loss + decay / 2 * sum((value**2).sum() for value in params.values())


data = list(zip(X.split(600), y.split(600), strict=True))
H = HessianLinearOperator.from_objective(objective, params, data)

# %%
# From SciPy's vectors to the parameters
# --------------------------------------


def move_to(x):
    """Write the vector `x` into the parameters."""
    with torch.no_grad():
        for name, value in H.unravel(x).items():
            params[name].copy_(value)


def gradient_and_loss(x):
    """Return the loss at `x`, and its gradient."""
    move_to(x)
    gradient, loss = H.gradient_and_loss()
    return loss, gradient


def product(x, v):
    """Return the Hessian at `x` times `v`."""
    move_to(x)
    return H @ v


start = H.ravel(params)
losses = [gradient_and_loss(start)[0]]
norms = [np.linalg.norm(gradient_and_loss(start)[1])]


def record(x):
    """Keep the loss, and the gradient's norm, after every step."""
    loss, gradient = gradient_and_loss(x)
    losses.append(loss)
    norms.append(np.linalg.norm(gradient))


result = minimize(
    gradient_and_loss,
    start,
    jac=True,
    hessp=product,
    method="trust-krylov",
    callback=record,
    options={"gtol": 1e-7, "maxiter": 200},
)
print(f"{result.nit} steps, {H.num_products} products: loss {result.fun:.6f}, gradient {norms[-1]:.1e}")
assert norms[-1] < 1e-6

# %%
# L-BFGS, which knows gradients alone, takes many more steps to get as near.

quasi_losses, quasi_norms = [losses[0]], [norms[0]]


def record_quasi(x):
    """Do as `record`, for the other method."""
    loss, gradient = gradient_and_loss(x)
    quasi_losses.append(loss)
    quasi_norms.append(np.linalg.norm(gradient))


minimize(gradient_and_loss, start, jac=True, method="L-BFGS-B", callback=record_quasi, options={"maxiter": 400})

move_to(result.x)
print(f"accuracy on the training images: {(model(X).argmax(1) == y).double().mean():.1%}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for axis, newton, quasi, title in ((left, losses, quasi_losses, "loss"), (right, norms, quasi_norms, "gradient norm")):
    axis.semilogy(newton, label="trust-krylov, with products")
    axis.semilogy(quasi, label="L-BFGS, gradients alone")
    axis.set(xlabel="step", title=title)
left.legend()
figure.suptitle("Newton's method ends in a few quadratic steps")
plt.show()

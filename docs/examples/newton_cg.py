r"""
Training by Newton's method
===========================

``scipy.optimize`` can train a network like any other function: it needs the loss, the gradient, and products with the
Hessian at a point. The method ``trust-krylov`` (Gould, Lucidi, Roma, Toint, 1999) uses the loss, the gradient and the
products. This method can handle an indefinite Hessian. The Hessian of a network is often indefinite
before the minimum is reached.

The operator always uses the current parameters: if you write a new point into the parameters, the next product is
computed at this point.
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
# The objective is a function of the parameters and a batch, and can include weight decay.


def objective(params, batch):
    """Return the loss of a batch, including weight decay."""
    X, y = batch
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, params, (X,)), y)
    return loss + decay / 2 * sum((value**2).sum() for value in params.values())


data = list(zip(X.split(600), y.split(600), strict=True))
H = HessianLinearOperator.from_objective(objective, params, data)

# %%
# From SciPy's vectors to the parameters
# --------------------------------------


def move_to(x):
    """Set the parameters to `x`. Do nothing if they equal `x`, because a write makes the operator re-linearize."""
    if np.array_equal(x, H.ravel(params)):
        return
    with torch.no_grad():
        for name, value in H.unravel(x).items():
            params[name].copy_(value)


gradients = 0


def gradient_and_loss(x):
    """Return the loss and the gradient at `x`."""
    global gradients
    gradients += 1
    move_to(x)
    gradient, loss = H.gradient_and_loss()
    return loss, gradient


def product(x, v):
    """Return the Hessian at `x` times `v`."""
    move_to(x)
    return H @ v


start = H.ravel(params)


def train(method, **options):
    """Minimize from `start`. Return SciPy's result and an array with rows for cost, loss and gradient norm per step."""
    global gradients
    gradients, products, path = 0, H.num_products, []

    def record(x):
        move_to(x)
        gradient, loss = H.gradient_and_loss()
        path.append((gradients + 2 * (H.num_products - products), loss, np.linalg.norm(gradient)))

    record(start)
    result = minimize(gradient_and_loss, start, jac=True, method=method, callback=record, **options)
    return result, np.array(path).T


result, newton = train("trust-krylov", hessp=product, options={"gtol": 1e-7, "maxiter": 200})
print(f"{result.nit} steps, {H.num_products} products: loss {result.fun:.6f}, gradient {newton[2, -1]:.1e}")
assert newton[2, -1] < 1e-6
print(f"accuracy on the training images: {(model(X).argmax(1) == y).double().mean():.1%}")

# %%
# L-BFGS uses only gradients; a product costs about two gradients. For a small network such as this one, L-BFGS reaches
# a lower loss at equal cost, until its line search no longer finds a lower loss. Newton's method is better at the end:
# it converges quadratically, and the gradient continues to decrease.

quasi = train("L-BFGS-B", options={"maxiter": 1500, "maxfun": 4000, "ftol": 0, "gtol": 1e-7})[1]
print(f"L-BFGS: {quasi[0, -1]:.0f} gradients, final gradient norm {quasi[2, -1]:.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for axis, row, title in ((left, 1, "loss"), (right, 2, "gradient norm")):
    axis.semilogy(newton[0], newton[row], label="trust-krylov, with Hessian products")
    axis.semilogy(quasi[0], quasi[row], label="L-BFGS, gradients only")
    axis.set(xlabel="cost in gradients (a product: 2)", title=title)
left.legend()
figure.suptitle("Newton's method converges quadratically at the end")
plt.show()

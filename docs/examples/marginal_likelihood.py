r"""
How much weight decay?
======================

The Laplace approximation (:doc:`/gallery/laplace`) also estimates how probable the training data are under the prior,
which is a normal distribution of variance :math:`1 / (N \lambda)` for weight decay :math:`\lambda` and `N` training
images. Choosing the weight decay with the largest marginal likelihood needs no validation data (MacKay, 1992, "A
practical Bayesian framework for backpropagation networks", Neural Computation 4(3); Immer et al., 2021, "Scalable
marginal likelihood estimation for model selection in deep learning", arXiv:2104.04975). The logarithm of the marginal
likelihood is approximately

.. math:: -N \left( L(\theta) + \tfrac{\lambda}{2} \|\theta\|^2 \right) + \tfrac{P}{2} \log \lambda
          - \tfrac{1}{2} \log\det (G + \lambda I),

where :math:`\theta` are the `P` trained parameters, `L` is the mean loss, and `G` is its Gauss-Newton matrix. For a
large network, only the determinant is hard to compute. KFAC and EKFAC have a determinant in closed form. This example
compares the weight decays that they choose with the choice of the exact matrix.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvop import EKFACLinearOperator, GGNLinearOperator, JacobianLinearOperator, KFACLinearOperator

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
X, y = torch.from_numpy(pixels / 16), torch.from_numpy(labels)
order = torch.randperm(len(X))
train, test = order[:1000], order[1000:]
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
params = dict(model.named_parameters())
loss_function = nn.CrossEntropyLoss()
problem = model, loss_function, params, [(X[train], y[train])]
G = GGNLinearOperator(*problem)
N, P = len(train), G.shape[0]


def fit(decay):
    """Continue the training with another weight decay, until the gradient is nearly zero."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        penalty = sum((value**2).sum() for value in params.values())
        loss = loss_function(model(X[train]), y[train]) + decay / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(objective)


# %%
# The marginal likelihood for different weight decays
# ---------------------------------------------------
#
# ``logdet`` computes the determinant from the factors. The factors belong to the parameters for which they were
# computed, so that each weight decay needs new factors. ``G`` always uses the current parameters. For this small
# network, we can also compute all eigenvalues of ``G``. The last method replaces ``G`` by its diagonal.


def log_determinants(decay):
    """Return the logarithm of the determinant of each damped matrix."""
    return {
        "Gauss-Newton": np.linalg.slogdet(G.to_dense() + decay * np.eye(P))[1],
        "KFAC": KFACLinearOperator(*problem).logdet(decay),
        "EKFAC": EKFACLinearOperator(*problem).logdet(decay),
        "diagonal": np.log(G.diagonal() + decay).sum(),
    }


decays = np.geomspace(1e-1, 1e-5, 13)
evidence, test_loss = [], []
for decay in decays:
    fit(decay)
    with torch.no_grad():
        loss, squares = loss_function(model(X[train]), y[train]), sum((value**2).sum() for value in params.values())
        test_loss.append(float(loss_function(model(X[test]), y[test])))
    first_terms = -N * float(loss + decay / 2 * squares) + P / 2 * np.log(decay)
    evidence.append({name: first_terms - value / 2 for name, value in log_determinants(decay).items()})

curves = {name: np.array([row[name] for row in evidence]) for name in evidence[0]}
chosen = {name: int(curve.argmax()) for name, curve in curves.items()}
for name, index in chosen.items():
    print(f"{name:<14} chooses {decays[index]:.1e}, with a test loss of {test_loss[index]:.4f}")
print(f"the smallest test loss is {min(test_loss):.4f}, at {decays[np.argmin(test_loss)]:.1e}")

# %%
# The exact matrix chooses the weight decay that is best for the test images, or nearly so. KFAC and EKFAC choose a
# larger one, and the diagonal an even larger one. The reason is that their determinants are too large. For the diagonal
# and for EKFAC, this holds for every network: the determinant of a positive semidefinite matrix is at most the
# determinant of its diagonal blocks (Fischer's inequality), and at most the product of its diagonal entries in any
# orthonormal basis (Hadamard's inequality). The error grows as the weight decay decreases, because small eigenvalues
# count more.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
sizes = {"Gauss-Newton": 6, "KFAC": 10, "EKFAC": 5, "diagonal": 6}  # KFAC and EKFAC may choose the same
for position, (name, curve) in enumerate(curves.items()):
    index, style = chosen[name], {"color": f"C{position}", "markersize": sizes[name]}
    left.semilogx(decays, curve, color=style["color"], label=name)
    left.plot(decays[index], curve[index], "o", **style)
    right.plot(decays[index], test_loss[index], "o", **style)
left.set(xlabel="weight decay", ylabel="log marginal likelihood", ylim=(-1300, -200))
left.legend(frameon=False, fontsize=9)
right.loglog(decays, test_loss, color="black", zorder=0)
right.set(xlabel="weight decay", ylabel="test loss")
plt.show()

assert all(curves["EKFAC"] <= curves["Gauss-Newton"])
assert all(curves["diagonal"] <= curves["Gauss-Newton"])

# %%
# The posterior distribution
# --------------------------
#
# Train with the weight decay that KFAC has chosen. The approximate posterior distribution of the parameters has the
# covariance :math:`\Sigma = \frac{1}{N} (K + \lambda I)^{-1}`, where `K` is KFAC. ``K.inverse_sqrt(decay) @ z`` draws
# samples from it, for standard normal vectors `z`.

decay = decays[chosen["KFAC"]]
fit(decay)
K, E = KFACLinearOperator(*problem), EKFACLinearOperator(*problem)
z = torch.randn(P, 200, dtype=torch.float64)
samples = K.inverse_sqrt(decay) @ z / N**0.5

# %%
# The linear model of the network (see :doc:`/gallery/laplace`) has scores with the covariance :math:`J \Sigma J^\top`,
# where `J` is the Jacobian. Compare the standard deviations of the scores of 40 test images under KFAC, under EKFAC and
# under the exact matrix.

images = X[test[:40]]
J = JacobianLinearOperator(model, params, [(images, torch.zeros(len(images)))])
rows = J.to_dense()
inverses = {
    "KFAC": K.inverse(decay),
    "EKFAC": E.inverse(decay),
    "exact": np.linalg.inv(G.to_dense() + decay * np.eye(P)),
}
deviations = {name: np.sqrt(np.einsum("np,pn->n", rows, M @ rows.T) / N) for name, M in inverses.items()}
sampled = (J @ samples).std(dim=1).numpy()
print(f"samples and closed form agree: ratio {np.mean(sampled / deviations['KFAC']):.3f}")
for name in ("KFAC", "EKFAC"):
    low, middle, high = np.quantile(deviations[name] / deviations["exact"], (0.1, 0.5, 0.9))
    print(f"{name} / exact standard deviation: median {middle:.2f}, {low:.2f} to {high:.2f} for 80% of the scores")

# %%
# Each point is a score of an image. Points on the line are exact. Both approximations rank the scores by their
# uncertainty, but most of their standard deviations are too small.

figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharex=True, sharey=True, layout="constrained")
for axis, name in zip(axes, ("KFAC", "EKFAC"), strict=True):
    axis.axline((0, 0), slope=1, color="lightgray")
    axis.plot(deviations["exact"], deviations[name], "o", markersize=3)
    axis.set(title=name, xlabel="exact standard deviation")
axes[0].set(ylabel="approximation")
plt.show()

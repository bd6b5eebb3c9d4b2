r"""
The spectrum of the neural tangent kernel
=========================================

For small changes of its parameters, a network is approximately a linear model with the features :math:`J = \partial z /
\partial \theta`. Gradient descent on a squared error then fits the component of the targets along the left singular
vector :math:`u_i` of `J` at the rate :math:`\sigma_i^2`, where :math:`\sigma_i` is the corresponding singular value of
`J`. The components along the leading singular vectors are therefore learned first. The squared singular values of `J`
are the eigenvalues of the empirical neural tangent kernel :math:`J J^\top` (Jacot, Gabriel, Hongler, 2018).

SciPy's ``svds`` computes the singular values from products with the Jacobian operator. The kernel is never formed.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import svds
from sklearn.datasets import load_digits
from torch import nn

from curvop import JacobianLinearOperator

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
chosen = np.flatnonzero(labels < 2)[:300]  # zeros and ones
X, y = torch.from_numpy(pixels[chosen] / 16), torch.from_numpy(labels[chosen]).double() * 2 - 1


def network(width):
    """Return a network with one output."""
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 1)).double()


# %%
# The largest singular values and vectors
# ---------------------------------------

model = network(64)
J = JacobianLinearOperator(model, dict(model.named_parameters()), [(X, y)])
print(f"J has {J.shape[0]} predictions by {J.shape[1]} parameters; {J.cost()}")
U, singular, Vt = svds(J, k=20, rng=0)
order = np.argsort(-singular)
U, singular = U[:, order], singular[order]

dense = np.linalg.svd(J @ np.eye(J.shape[1]), compute_uv=False)
difference = np.abs(dense[:20] - singular).max() / dense[0]
print(f"largest difference to the dense singular values: {difference:.1e} of the norm")
assert difference < 1e-8

# %%
# The targets lie mostly in the span of the first few left singular vectors, so they are learned fast. Shuffled targets
# do not lie in this span, so they are learned slowly.

along = np.cumsum((U.T @ y.numpy()) ** 2) / (y @ y).item()
shuffled = y[torch.randperm(len(y))]
along_shuffled = np.cumsum((U.T @ shuffled.numpy()) ** 2) / (y @ y).item()
print(f"share of the targets in the first 5 vectors: {along[4]:.0%}; shuffled: {along_shuffled[4]:.0%}")
assert along[4] > 2 * along_shuffled[4]

# %%
# The kernel hardly changes in wide networks
# ------------------------------------------
#
# Train networks of several widths, and measure how much the kernel changes. The measure is the cosine of the angle
# between the kernels before and after training, ``<K, K'> / (|K| |K'|)``. The cosine is estimated from products of the
# kernels with random vectors.

rng = np.random.default_rng(0)
probes = rng.choice([-1.0, 1.0], (len(X), 40))
widths, cosines = (8, 32, 128, 512), []
for width in widths:
    model = network(width)
    J = JacobianLinearOperator(model, dict(model.named_parameters()), [(X, y)])
    before = J @ (J.T @ probes)
    optimizer = torch.optim.SGD(model.parameters(), 0.5 / width**0.5)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X)[:, 0], y).backward()
        optimizer.step()
    after = J @ (J.T @ probes)  # the operator uses the current parameters
    cosines.append((before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after))
    print(f"width {width:3d}: cosine {cosines[-1]:.4f}")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
left.semilogy(np.arange(1, 21), singular**2, "o-")
left.set(xlabel="index", title="largest eigenvalues of the kernel")
middle.plot(np.arange(1, 21), along, "o-", label="labels")
middle.plot(np.arange(1, 21), along_shuffled, "o-", label="shuffled labels")
middle.set(xlabel="vectors", title="share of the targets", ylim=(0, 1))
middle.legend()
right.semilogx(widths, cosines, "o-", base=2)
right.set(xlabel="width", title="cosine to the kernel before training")
plt.show()

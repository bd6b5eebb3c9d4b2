r"""
Adam at the edge of stability
=============================

Adam divides each entry of its momentum by the square root of the second moment of the gradient. On a quadratic, its
stability does not depend on the largest eigenvalue of the Hessian `H`, but on that of the preconditioned matrix

.. math:: P^{-1/2} H P^{-1/2}, \qquad P = (1 - \beta_1^t) \left(\sqrt{v / (1 - \beta_2^t)} + \epsilon\right) / \eta,

where `v` contains the second moments, and :math:`\eta` is the learning rate. With the default momentum
:math:`\beta_1 = 0.9`, Adam is stable if this eigenvalue is less than 38. During full-batch training, the eigenvalue
grows to this threshold, and then stays there (Cohen et al., 2022, "Adaptive gradient methods at the edge of stability",
arXiv:2207.14484).

``track(..., optimizer=optimizer)`` follows this eigenvalue. It reads the second moments and the settings of the
optimizer at each computation.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvop import HessianLinearOperator
from curvop.spectrum import track

pixels, labels = load_digits(return_X_y=True)
X = torch.from_numpy(pixels / 16)
y = nn.functional.one_hot(torch.from_numpy(labels), 10).double()
loss_function = nn.MSELoss()


def train(learning_rate, steps=1200):
    """Train with full-batch Adam; return the trackers with and without the optimizer, and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    H = HessianLinearOperator(model, loss_function, model.parameters(), [(X, y)])
    preconditioned, plain = track(H, every=20, optimizer=optimizer), track(H, every=20)
    losses = []
    for _ in range(steps):
        preconditioned.step()
        plain.step()
        optimizer.zero_grad()
        loss = loss_function(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return preconditioned, plain, losses


# %%
# Train with three learning rates. The learning rate is part of `P`, so there is one threshold for all of them. The
# preconditioned eigenvalue settles at this threshold. It gets there faster with a larger learning rate.

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for learning_rate in (0.008, 0.012, 0.02):
    preconditioned, plain, losses = train(learning_rate)
    late, threshold = preconditioned.values[-10:, 0], preconditioned.thresholds[-1]
    print(f"learning rate {learning_rate}: {late.min():.1f} to {late.max():.1f} at the end, threshold {threshold:.1f}")
    assert abs(late.mean() / threshold - 1) < 0.05
    label = f"learning rate {learning_rate}"
    for axis, tracker in zip(axes, (preconditioned, plain), strict=False):
        axis.plot(tracker.steps, tracker.values[:, 0], linewidth=1.2, label=label)
    axes[2].semilogy(losses, linewidth=0.8, label=label)

# %%
# The eigenvalues of the Hessian itself do not show the edge: they are about the same for all learning rates.
#
# To plot a single tracker with its threshold, call ``tracker.plot()``.

axes[0].axhline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
axes[0].set(title="largest eigenvalue, preconditioned")
axes[1].set(title="largest eigenvalue of H", ylim=(0, None))
axes[2].set(title="loss")
for axis in axes:
    axis.set(xlabel="step")
axes[0].legend(frameon=False, fontsize=8, loc="lower right")
plt.show()

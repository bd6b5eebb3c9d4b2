r"""
Adam at the edge of stability
=============================

Adam divides each entry of its momentum by the square root of the second moment of the gradient. If the loss is
quadratic, the stability of Adam does not depend on the largest eigenvalue of the Hessian `H`, but on the largest
eigenvalue of the preconditioned matrix

.. math:: P^{-1/2} H P^{-1/2}, \qquad P = (1 - \beta_1^t) \left(\sqrt{v / (1 - \beta_2^t)} + \epsilon\right) / \eta,

where `P` is a diagonal matrix, `v` contains the second moments after `t` steps, and :math:`\eta` is the learning rate.
With the default momentum :math:`\beta_1 = 0.9`, Adam is stable if the largest eigenvalue of the preconditioned matrix
is less than 38. During full-batch training, this eigenvalue grows to the threshold of 38, and then stays close to 38
(Cohen et al., 2022, "Adaptive gradient methods at the edge of stability", arXiv:2207.14484).

``track(..., optimizer=optimizer)`` computes this eigenvalue at regular intervals. Each computation uses the current
second moments and settings of the optimizer.
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
    """Train with full-batch Adam. Return trackers of the preconditioned and the plain Hessian, and the losses."""
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
# Train with three learning rates. The threshold is the same for all learning rates, because `P` includes the learning
# rate. The largest preconditioned eigenvalue settles at this threshold. With a larger learning rate, the eigenvalue
# reaches the threshold in fewer steps.

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for learning_rate in (0.008, 0.012, 0.02):
    preconditioned, plain, losses = train(learning_rate)
    late, threshold = preconditioned.largest[-10:], preconditioned.thresholds[-1]
    print(f"learning rate {learning_rate}: {late.min():.1f} to {late.max():.1f} at the end, threshold {threshold:.1f}")
    assert abs(late.mean() / threshold - 1) < 0.05
    label = f"learning rate {learning_rate}"
    for axis, tracker in zip(axes, (preconditioned, plain), strict=False):
        axis.plot(tracker.steps, tracker.largest, linewidth=1.2, label=label)
    axes[2].semilogy(losses, linewidth=0.8, label=label)

axes[0].axhline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
axes[0].set(title="largest eigenvalue, preconditioned")
axes[1].set(title="largest eigenvalue of H", ylim=(0, None))
axes[2].set(title="loss")
for axis in axes:
    axis.set(xlabel="step")
axes[0].legend(frameon=False, fontsize=8, loc="lower right")
plt.show()

# %%
# The largest eigenvalue of the Hessian itself does not show the edge of stability: this eigenvalue is about the same
# for all learning rates.
#
# To plot a single tracker with its threshold, call ``tracker.plot()``.

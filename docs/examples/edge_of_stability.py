r"""
The edge of stability
=====================

If the loss is quadratic, gradient descent with a learning rate :math:`\eta` is stable only if the largest eigenvalue of
the Hessian, the sharpness, is below :math:`2 / \eta`. The sharpness of a network grows during training until it reaches
:math:`2 / \eta`, the edge of stability, and then stays close to this edge. The loss continues to fall, but not in every
step (Cohen, Kaur, Li, Kolter, Talwalkar, 2021).

``track`` follows the largest eigenvalue during a training loop. The operator always uses the current parameters. Each
computation starts from the previous eigenvector.
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


def train(learning_rate, steps=1500):
    """Train by full-batch gradient descent; return the tracker and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    tracker = track(HessianLinearOperator(model, loss_function, model.parameters(), [(X, y)]), every=20)
    losses = []
    for _ in range(steps):
        tracker.step()
        optimizer.zero_grad()
        loss = loss_function(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return tracker, losses


# %%
# Train with two learning rates. With each learning rate, the sharpness settles near the edge for this learning rate,
# ``2 / learning_rate``.

figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for axis, learning_rate in zip(axes, (0.7, 0.85), strict=False):
    tracker, losses = train(learning_rate)
    edge = 2 / learning_rate
    late = tracker.largest[-20:]
    print(f"learning rate {learning_rate}: edge {edge:.2f}, final sharpness {late.min():.2f} to {late.max():.2f}")
    print(f"  {len(tracker.steps)} eigenvalues, {tracker.products / len(tracker.steps):.0f} products each")
    assert abs(late.mean() / edge - 1) < 0.1
    tracker.plot(axis, learning_rate)
    axis.set_title(f"learning rate {learning_rate}")
    axes[2].semilogy(losses, linewidth=0.8, label=f"learning rate {learning_rate}")
axes[2].set(xlabel="step", title="loss")
axes[2].legend(frameon=False)
plt.show()

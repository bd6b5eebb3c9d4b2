r"""
Which training images are harmful?
==================================

How would the test loss change if one training image were left out? To first order (Koh and Liang, 2017,
"Understanding black-box predictions via influence functions", eq. (2)), leaving out image `n` changes the test loss by

.. math:: \frac{1}{N} \, \nabla L_\text{test}^\top \, (G + \lambda I)^{-1} \, \nabla \ell_n,

where `G` is the Gauss-Newton matrix of the training loss. The original formula uses the Hessian, which may be
indefinite. One linear system and one product are enough for all training images: solve the system with the gradient of
the test loss as the right-hand side, and multiply the matrix of all training gradients by the solution.

To have harmful images to find, we give wrong labels to 50 of the 1,000 training images, which are scikit-learn's
handwritten digits.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvop import GGNLinearOperator, PerExampleGradientLinearOperator, preconditioner, solve

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
X, y = torch.from_numpy(pixels / 16), torch.from_numpy(labels)
order = torch.randperm(len(X))
train, test = order[:1000], order[1000:]

wrong = train[:50]
y[wrong] = (y[wrong] + torch.randint(1, 10, (50,))) % 10

# %%
# Train a network with weight decay. The penalty is part of the objective, and its Hessian is added to `G` as damping.

model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
params = dict(model.named_parameters())
loss_function = nn.CrossEntropyLoss()
decay = 5e-3


def fit(network, X, y, steps):
    """Minimize the penalized loss. The divisor of the loss stays ``len(train)`` if an image is left out."""
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=steps, tolerance_grad=1e-7, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        penalty = sum((value**2).sum() for value in network.parameters())
        loss = nn.functional.cross_entropy(network(X), y, reduction="sum") / len(train) + decay / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    assert max(value.grad.abs().max() for value in network.parameters()) < 1e-5  # converged


fit(model, X[train], y[train], 1000)
accuracy = (model(X[test]).argmax(1) == y[test]).double().mean()
print(f"accuracy on {len(test)} test images: {accuracy:.1%}")

# %%
# One linear system
# -----------------
#
# ``gradient_and_loss`` returns the gradient of the test loss in the order of the operator's columns. ``solve`` reports
# the true residual of its solution. The preconditioner takes 200 products, in one block. For a single system, these
# products take more time than they save. However, the preconditioner can be reused, for example to solve one system for
# each test image.

data = list(zip(X[train].split(500), y[train].split(500), strict=True))
G = GGNLinearOperator(model, loss_function, params, data)
test_gradient, test_loss = GGNLinearOperator(model, loss_function, params, [(X[test], y[test])]).gradient_and_loss()

M = preconditioner.nystrom(G, 200, decay, rng=0)
plain = solve(G, test_gradient, damping=decay, rtol=1e-8, progress=False)
result = solve(G, test_gradient, damping=decay, rtol=1e-8, preconditioner=M, progress=False)
print(f"without preconditioner: {plain}")
print(f"preconditioner of rank 200: {result}, and 200 products to construct it")

# %%
# One product gives the influence of all training images: ``PerExampleGradientLinearOperator`` is the matrix of the
# gradients of all images. The gradient of a single image is never formed.

gradients = PerExampleGradientLinearOperator(model, loss_function, params, data)
influence = gradients @ result.solution / len(train)

# %%
# Compare the predicted changes with actual changes: leave one image out, continue the training, and evaluate the test
# loss.


def retrained_without(image):
    """Continue the training without one training image, and return the change of the test loss."""
    rest = torch.arange(len(train)) != image
    twin = copy.deepcopy(model)
    fit(twin, X[train][rest], y[train][rest], 200)
    return float(loss_function(twin(X[test]), y[test]).detach()) - test_loss


ranked = np.argsort(influence)
sample = [*ranked[:4], *ranked[-4:], *ranked[300:700:100]]  # the most harmful, the most helpful, and some in between
actual = np.array([retrained_without(image) for image in sample])
correlation = np.corrcoef(influence[sample], actual)[0, 1]
print(f"predicted and actual changes of the test loss: correlation {correlation:.3f}")
assert correlation > 0.9

# %%
# The most harmful images
# -----------------------
#
# These are the images whose removal lowers the test loss the most. Most of these images have a label that we changed.

harmful = ranked[:12]
planted = set(wrong.tolist())
hits = [int(train[index]) in planted for index in ranked[:50]]
print(f"{sum(hits)} of the 50 most harmful images have a wrong label (5 % of all images do)")
assert sum(hits) >= 25

figure, axes = plt.subplots(2, 6, figsize=(9, 3.8), layout="constrained")
for axis, index in zip(axes.flat, harmful, strict=True):
    image = int(train[index])
    axis.imshow(pixels[image].reshape(8, 8), cmap="gray_r")
    axis.set_title(f"labeled {y[image]}", color="tab:red" if image in planted else "black", fontsize=10)
    axis.set_axis_off()
figure.suptitle("The most harmful training images (red: the label was changed)")
plt.show()

r"""
Which training images are harmful?
==================================

How would the test loss change if one training image were left out? Koh and Liang (2017, "Understanding black-box
predictions via influence functions", eq. (2)) derive a first-order approximation: leaving out image `n` changes the
test loss by

.. math:: \frac{1}{N} \, \nabla L_\text{test}^\top \, (G + \lambda I)^{-1} \, \nabla \ell_n,

where `N` is the number of training images, `G` is the Gauss-Newton matrix of the training loss, :math:`\lambda` is the
weight decay, and :math:`\ell_n` is the loss of image `n`. The original formula uses the Hessian instead of `G`, but the
Hessian may be indefinite. One linear system and one matrix-vector product are enough for all training images: solve the
system with the gradient of the test loss as the right-hand side, and multiply the matrix of all training gradients by
the solution.

The images are scikit-learn's handwritten digits. To create harmful images, we give wrong labels to 50 of the 1,000
training images.
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
# Train a network with weight decay. The objective includes the penalty of the weight decay. The Hessian of the penalty
# is ``decay`` times the identity matrix, so `G` is damped by ``decay``.

model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
params = dict(model.named_parameters())
loss_function = nn.CrossEntropyLoss()
decay = 5e-3


def fit(network, X, y, steps):
    """Minimize the penalized loss. The loss is divided by ``len(train)``, even if an image is left out."""
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
# ``gradient_and_loss`` returns the gradient of the test loss as a vector, in the order of the operator's columns.
# ``solve`` reports the true residual of its solution. The construction of the preconditioner takes one block product
# with 200 columns. For a single system, this block product takes more time than the preconditioner saves. However, the
# preconditioner can be reused, for example to solve one system for each test image.

data = list(zip(X[train].split(500), y[train].split(500), strict=True))
G = GGNLinearOperator(model, loss_function, params, data)
test_gradient, test_loss = GGNLinearOperator(model, loss_function, params, [(X[test], y[test])]).gradient_and_loss()

M = preconditioner.nystrom(G, 200, decay, rng=0)
plain = solve(G, test_gradient, damping=decay, rtol=1e-8, progress=False)
result = solve(G, test_gradient, damping=decay, rtol=1e-8, preconditioner=M, progress=False)
print(f"without preconditioner: {plain}")
print(f"preconditioner of rank 200: {result}, and 200 products to construct it")

# %%
# One product gives the influence of all training images: the rows of ``PerExampleGradientLinearOperator`` are the
# gradients of all images. The product is computed without forming these gradients.

gradients = PerExampleGradientLinearOperator(model, loss_function, params, data)
influence = gradients @ result.solution / len(train)

# %%
# Compare the predicted changes of the test loss with actual changes: leave one image out, continue the training, and
# evaluate the test loss. Repeat this for 12 images.


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
# Plot the 12 images whose removal would lower the test loss the most, according to the predictions. We changed the
# labels of most of these images.

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

r"""
How sure is the network?
========================

A trained network is often too confident about images that are unlike its training data. The Laplace approximation
(MacKay, 1992, "A practical Bayesian framework for backpropagation networks", Neural Computation 4(3)) replaces the
trained parameters :math:`\theta` by a normal distribution,

.. math:: \theta + \frac{1}{\sqrt N} \, (G + \lambda I)^{-1/2} z, \qquad z \sim \mathcal{N}(0, I),

where `G` is the Gauss-Newton matrix of the mean loss over `N` training images, and :math:`\lambda` is the weight decay
of the training. The samples of the parameters vary most in directions that the training data do not determine.

``apply`` computes the product of the inverse square root with many vectors `z` at once, without forming the matrix.
``apply`` also estimates the error of each product.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvop import GGNLinearOperator, JacobianLinearOperator
from curvop.spectrum import apply

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
X, y = torch.from_numpy(pixels / 16), torch.from_numpy(labels)
order = torch.randperm(len(X))
train, test = order[:1000], order[1000:]

# %%
# Train a network with weight decay, until the gradient is nearly zero.

model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
params = dict(model.named_parameters())
loss_function = nn.CrossEntropyLoss()
decay = 3e-3
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")


def objective():
    """Compute the penalized loss and its gradient."""
    optimizer.zero_grad()
    penalty = sum((value**2).sum() for value in model.parameters())
    loss = loss_function(model(X[train]), y[train]) + decay / 2 * penalty
    loss.backward()
    return loss


optimizer.step(objective)
print(f"accuracy on {len(test)} test images: {(model(X[test]).argmax(1) == y[test]).double().mean():.1%}")

# %%
# Draw 50 samples
# ---------------
#
# Each column of ``samples`` is one sample of the change of the parameters. ``print(result)`` shows the largest
# estimated error of all columns.

G = GGNLinearOperator(model, loss_function, params, [(X[train], y[train])])
z = torch.randn(G.shape[0], 50, dtype=torch.float64)
result = apply(G.damped(decay), "inv_sqrt", z, num_steps=200, rtol=1e-4, progress=False)
print(result)
assert result.converged
samples = result.value / len(train) ** 0.5

# %%
# Predict
# -------
#
# For sampled parameters :math:`\theta'`, use the linear model :math:`f(\theta) + J (\theta' - \theta)`, where `J` is
# the Jacobian of the network, instead of the network itself. The reason is that the Gauss-Newton matrix is the Hessian
# of the loss of this linear model (Immer, Korzepa, Bauer, 2021, "Improving predictions of Bayesian neural nets via
# local linearization", arXiv:2008.08400). One block product with the Jacobian gives the changes of all predictions for
# all samples.


def predict(images):
    """Return the class probabilities of the trained network, shape (n, 10), and of all samples, shape (50, n, 10)."""
    scores = model(images).detach()
    J = JacobianLinearOperator(model, params, [(images, torch.zeros(len(images)))])
    changes = (J @ samples).T.reshape(-1, len(images), 10)
    return scores.softmax(1), (scores + changes).softmax(2)


def entropy(probabilities):
    """Return the entropy of each prediction in bits."""
    return -(probabilities * probabilities.clamp(min=1e-30).log2()).sum(-1)


# %%
# Compare three kinds of images: test images, test images that are turned by 90 degrees, and noise. The entropy of the
# network's own prediction is about the same for upright and turned digits, but the samples disagree more about the
# turned digits. The disagreement of the samples is the mutual information between the prediction and the parameters:
# the entropy of the mean prediction, minus the mean entropy of the predictions.


def uncertainty(images):
    """Return the entropy of the network's prediction and the disagreement of the samples for each image, in bits."""
    trained, sampled = predict(images)
    return entropy(trained), entropy(sampled.mean(0)) - entropy(sampled).mean(0)


upright = X[test]
turned = upright.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
noise = torch.rand(len(test), 64, dtype=torch.float64)
kinds = {"test images": upright, "turned by 90 degrees": turned, "noise": noise}
found = {name: uncertainty(images) for name, images in kinds.items()}

titles = ("entropy of the network", "disagreement of the samples")
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for index, (axis, title) in enumerate(zip(axes, titles, strict=True)):
    for name, values in found.items():
        axis.hist(values[index].numpy(), bins=np.linspace(0, 3.2, 33), alpha=0.6, label=name)
    axis.set(xlabel="bits", title=title)
axes[0].set(ylabel="images")
axes[0].legend(frameon=False)
plt.show()

# %%
# How well do the entropy of the network and the disagreement of the samples separate turned from upright digits?
# Consider all pairs of one turned and one upright image. For each of the two measures, compute the fraction of pairs in
# which the turned image has the larger value.

shares = []
for index, title in enumerate(titles):
    pairs = found["turned by 90 degrees"][index][:, None] > found["test images"][index]
    shares.append(pairs.double().mean())
    print(f"{title}: {shares[-1]:.0%} of all pairs")
assert shares[1] > 0.8 > 0.6 > shares[0]

# %%
# Plot the predictions for one image, upright and turned. The bars are the probabilities of the network, and the dots
# are the mean probabilities of the samples. Each vertical line is the range of the middle 80% of the samples.

chosen = int((found["turned by 90 degrees"][1] - found["turned by 90 degrees"][0]).argmax())
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), width_ratios=(1, 2.4, 1, 2.4), layout="constrained")
for left, right, images in ((*axes[:2], upright), (*axes[2:], turned)):
    image = images[chosen : chosen + 1]
    trained, sampled = predict(image)
    mean, (low, high) = sampled[:, 0].mean(0), np.quantile(sampled[:, 0].numpy(), (0.1, 0.9), axis=0)
    left.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
    left.set_axis_off()
    right.bar(range(10), trained[0].numpy(), color="tab:blue", alpha=0.5, label="network")
    right.vlines(range(10), low, high, color="black", linewidth=1)
    right.plot(range(10), mean.numpy(), "o", color="black", markersize=4, label="samples")
    right.set(xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
axes[1].legend(frameon=False)
plt.show()

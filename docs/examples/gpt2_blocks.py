r"""
GPT-2, block by block
=====================

Which layers of a transformer are sharp, and how do they depend on each other? The diagonal blocks of the Hessian show
how sharp the loss is in each parameter. The off-diagonal blocks show how two parameters depend on each other. Each
block is an operator whose products involve only the parameters of the block.

The model is a small Hugging Face ``GPT2LMHeadModel`` with random weights, trained briefly on the text of this file. To
study GPT-2 with the same code, replace this model by ``GPT2LMHeadModel.from_pretrained("gpt2")``.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from transformers import GPT2Config, GPT2LMHeadModel

from curvop import HessianLinearOperator, select

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=128,
    n_positions=32,
    n_embd=32,
    n_layer=2,
    n_head=2,
    resid_pdrop=0,
    embd_pdrop=0,
    attn_pdrop=0,
    bos_token_id=0,
    eos_token_id=0,
)
model = GPT2LMHeadModel(config).eval()
model.loss_type = "ForCausalLM"  # transformers cannot infer the loss type from the class name

source = globals().get("__file__", "gpt2_blocks.py")
codes = torch.tensor([min(byte, 127) for byte in Path(source).read_bytes()])
tokens = codes[: len(codes) // 32 * 32].view(-1, 32)[:16]
data = [{"input_ids": part, "labels": part} for part in tokens.split(8)]

# %%
# The model computes its own loss, so the objective calls the model. The loss is a mean over the predicted tokens, so
# the weight of a batch is its number of predicted tokens.


def objective(params, batch):
    """Return the loss of a batch, which the model computes itself."""
    return torch.func.functional_call(model, params, (), batch).loss


def predicted(batch):
    """Return the number of predicted tokens; the first token of a sequence is not predicted."""
    return batch["labels"][:, 1:].numel()


optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for step in range(60):
    optimizer.zero_grad()
    loss = objective(dict(model.named_parameters()), data[step % len(data)])
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.2f}")

# %%
# The largest eigenvalue of each block
# ------------------------------------
#
# ``select`` accepts patterns. The pattern below selects all weights of both transformer layers, except those of the
# layer norms. The smallest eigenvalue of a block is tiny compared with the largest, and SciPy's ``tol`` is relative to
# the wanted eigenvalue. To compute the smallest eigenvalue, we therefore subtract the largest eigenvalue from the
# diagonal: the smallest eigenvalue of the shifted block is far from zero.

params = select(model, "transformer.h.*.weight", exclude="*ln_*")
H = HessianLinearOperator.from_objective(objective, params, data, batch_weight=predicted)
print(f"{H.shape[0]:,} parameters: {H.cost()}")

names, largest, smallest = [], [], []
for name in params:
    B = H.block(name)
    names.append(name.removeprefix("transformer.h.").removesuffix(".weight"))
    largest.append(eigsh(B, k=1, which="LA", tol=1e-2, rng=0, return_eigenvectors=False)[0])
    shifted = eigsh(B.damped(-largest[-1]), k=1, which="SA", tol=1e-4, rng=0, return_eigenvectors=False)[0]
    smallest.append(largest[-1] + shifted)
    print(f"{names[-1]:16s} {smallest[-1]:8.3f} to {largest[-1]:8.3f}")
whole = eigsh(H, k=1, which="LA", tol=1e-2, rng=0, return_eigenvectors=False)[0]
print(f"{'whole matrix':16s} {'':11s} {whole:8.3f}")
assert whole >= max(largest) * 0.98  # a block's eigenvalues lie between those of the whole matrix (Cauchy interlacing)

# %%
# How layers depend on each other
# -------------------------------
#
# The squared Frobenius norm of ``H[i, j]`` is the mean of ``|H[i, j] v|^2`` over vectors `v` of random signs
# (Hutchinson, 1989). One block product estimates the norms of all blocks that have the same columns.

rng = np.random.default_rng(0)
norms = np.empty((len(params), len(params)))
for j, col in enumerate(params):
    probes = rng.choice([-1.0, 1.0], (H.params_slices[col].stop - H.params_slices[col].start, 4))
    products = np.asarray(H.block(list(params), col) @ probes)
    for i, row in enumerate(params):
        norms[i, j] = np.sqrt((products[H.params_slices[row]] ** 2).sum() / 4)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.barh(names, largest, color="tab:red", label="largest")
left.barh(names, smallest, color="tab:blue", label="smallest")
left.axvline(whole, color="black", linestyle=":", label="largest of the whole matrix")
left.set(title="extreme eigenvalues of each block")
left.invert_yaxis()
left.legend()
image = right.imshow(np.log10(norms), cmap="viridis")
right.set_xticks(range(len(names)), names, rotation=90)
right.set_yticks(range(len(names)), names)
right.set(title=r"$\log_{10} \|H_{ij}\|_F$")
figure.colorbar(image)
plt.show()

"""Differentiable operations of torch, each a function of one tensor ``(3, 4)`` of numbers between -1 and 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Operation = Callable[[Tensor], Tensor]


def positive(x: Tensor) -> Tensor:
    """Return numbers between 1/2 and 5/2, given some between -1 and 1."""
    return 1.5 + x


def inside(x: Tensor) -> Tensor:
    """Return numbers between 0 and 1, given some between -1 and 1."""
    return 0.5 + 0.4 * x


def square(x: Tensor) -> Tensor:
    """Return a well-conditioned square matrix."""
    return x[:, :3] + 3 * torch.eye(3, dtype=x.dtype)


def spd(x: Tensor) -> Tensor:
    """Return a symmetric positive definite matrix of distinct eigenvalues."""
    return x[:, :3] @ x[:, :3].T + torch.diag(torch.arange(1.0, 4.0, dtype=x.dtype))


def image(x: Tensor) -> Tensor:
    """Return ``(1, 1, 3, 4)``."""
    return x[None, None]


def other(x: Tensor) -> Tensor:
    """Return a tensor of its own of the shape of `x`."""
    return torch.linspace(0.3, 1.1, x.numel(), dtype=x.dtype).view_as(x)


POINTWISE: dict[str, Operation] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "acosh": lambda x: torch.acosh(positive(x) + 1),
    "add": lambda x: torch.add(x, x.square(), alpha=2),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), positive(x)),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x.cos()),
    "asin": torch.asin,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "atan2": lambda x: torch.atan2(x, positive(x).square()),
    "atanh": torch.atanh,
    "celu": F.celu,
    "clamp": lambda x: torch.clamp(x, -0.45, 0.55),
    "copysign": lambda x: torch.copysign(x.square(), x.sin()),
    "cos": torch.cos,
    "cosh": torch.cosh,
    "digamma": lambda x: torch.digamma(positive(x)),
    "div": lambda x: torch.div(x, positive(x)),
    "elu": F.elu,
    "entr": lambda x: torch.special.entr(inside(x)),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfcx": torch.special.erfcx,
    "erfinv": torch.erfinv,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "float_power": lambda x: torch.float_power(positive(x), 1.7),
    "fmod": lambda x: torch.fmod(3 * x, 1.3),
    "frac": lambda x: torch.frac(3 * x),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "hardswish": F.hardswish,
    "hardtanh": lambda x: F.hardtanh(x, -0.45, 0.55),
    "hypot": lambda x: torch.hypot(x, positive(x)),
    "i0": torch.i0,
    "i0e": torch.special.i0e,
    "i1": torch.special.i1,
    "i1e": torch.special.i1e,
    "igammac by x": lambda x: torch.special.gammaincc(other(x), positive(x)),
    "ldexp": lambda x: torch.ldexp(x.sin(), x.cos()),
    "leaky_relu": F.leaky_relu,
    "lerp": lambda x: torch.lerp(x, x.square(), x.sin()),
    "lgamma": lambda x: torch.lgamma(positive(x)),
    "log": lambda x: torch.log(positive(x)),
    "log10": lambda x: torch.log10(positive(x)),
    "log1p": torch.log1p,
    "log2": lambda x: torch.log2(positive(x)),
    "log_ndtr": torch.special.log_ndtr,
    "logaddexp": lambda x: torch.logaddexp(x, x.square()),
    "logaddexp2": lambda x: torch.logaddexp2(x, x.square()),
    "logit": lambda x: torch.logit(inside(x)),
    "logsigmoid": F.logsigmoid,
    "masked_fill": lambda x: x.square().masked_fill(x.detach() > 0, 1.0),
    "maximum": lambda x: torch.maximum(x, x.square()),
    "minimum": lambda x: torch.minimum(x, x.square()),
    "mish": F.mish,
    "mul": lambda x: torch.mul(x, x.flip(0)),
    "mvlgamma": lambda x: torch.mvlgamma(positive(x) + 1, 2),
    "nan_to_num": lambda x: torch.nan_to_num(x.square()),
    "ndtr": torch.special.ndtr,
    "ndtri": lambda x: torch.special.ndtri(inside(x)),
    "polygamma": lambda x: torch.polygamma(1, positive(x)),
    "pow": lambda x: torch.pow(positive(x), x),
    "prelu": lambda x: F.prelu(x, x[0, :1].square()),
    "reciprocal": lambda x: torch.reciprocal(positive(x)),
    "relu": F.relu,
    "relu6": F.relu6,
    "remainder": lambda x: torch.remainder(3 * x, 1.3),
    "rsqrt": lambda x: torch.rsqrt(positive(x)),
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "sinc": torch.sinc,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "softsign": F.softsign,
    "sqrt": lambda x: torch.sqrt(positive(x)),
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 20),
    "where": lambda x: torch.where(x.detach() > 0, x.exp(), x.square()),
    "xlog1py": lambda x: torch.special.xlog1py(x, inside(x)),
    "xlogy": lambda x: torch.xlogy(x, positive(x)),
}
REDUCTIONS: dict[str, Operation] = {
    "amax": lambda x: torch.amax(x, 1),
    "amin": lambda x: torch.amin(x, 0),
    "cummax": lambda x: torch.cummax(x, 1).values,
    "cummin": lambda x: torch.cummin(x, 0).values,
    "cumprod": lambda x: torch.cumprod(x, 1),
    "cumprod, a zero": lambda x: torch.cumprod(x * (other(x) > 0.5), 1),
    "cumsum": lambda x: torch.cumsum(x, 1).sin(),
    "cumulative_trapezoid": lambda x: torch.cumulative_trapezoid(x.square(), x),
    "kthvalue": lambda x: torch.kthvalue(x, 2, 1).values,
    "log_softmax": lambda x: torch.log_softmax(x, 1),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "logcumsumexp, masked": lambda x: torch.logcumsumexp(x, 1)[:, ::2] * torch.tensor([0.0, 1.0], dtype=x.dtype),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "max": lambda x: torch.max(x, 1).values,
    "mean": lambda x: torch.mean(x.square(), 1),
    "median": lambda x: torch.median(x, 1).values,
    "nanmean": lambda x: torch.nanmean(x.square(), 0),
    "nansum": lambda x: torch.nansum(x.square(), 0),
    "norm 1": lambda x: torch.linalg.vector_norm(x, 1, 1),
    "norm 2": lambda x: torch.linalg.vector_norm(x, 2, 1),
    "norm 3": lambda x: torch.linalg.vector_norm(x, 3, 1),
    "norm inf": lambda x: torch.linalg.vector_norm(x, torch.inf, 1),
    "normalize": lambda x: F.normalize(x),
    "prod": lambda x: torch.prod(x, 1),
    "prod, a zero": lambda x: torch.prod(x * (other(x) > 0.5), 1),
    "prod, two zeros": lambda x: torch.prod(x * (other(x) > 0.6)),
    "quantile": lambda x: torch.quantile(x, 0.3, 1),
    "renorm": lambda x: torch.renorm(x, 2, 0, 0.7),
    "softmax": lambda x: torch.softmax(x, 1),
    "softmin": lambda x: F.softmin(x, 1),
    "sort": lambda x: torch.sort(x, 1).values.square(),
    "std": lambda x: torch.std(x, 1),
    "sum": lambda x: torch.sum(x.square(), 1),
    "topk": lambda x: torch.topk(x.square(), 2, 1).values,
    "trapezoid": lambda x: torch.trapezoid(x.square(), x),
    "var": lambda x: torch.var(x, 1),
}
LINEAR_ALGEBRA: dict[str, Operation] = {
    "addmm": lambda x: torch.addmm(x[:, :3], x, x.T),
    "baddbmm": lambda x: torch.baddbmm(x[None, :, :3], x[None], x.T[None]),
    "bilinear": lambda x: F.bilinear(x, x.sin(), x[:2, :, None] * x[0]),
    "bmm": lambda x: torch.bmm(x[None], x.T[None]),
    "cdist": lambda x: torch.cdist(x, x.sin() + 2),
    "cdist 1": lambda x: torch.cdist(x, x.sin() + 2, p=1),
    "cdist 3": lambda x: torch.cdist(x, x.sin() + 2, p=3),
    "cholesky": lambda x: torch.linalg.cholesky(spd(x)),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(spd(x))),
    "cholesky_solve": lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(spd(x))),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.sin() + 0.5),
    "cov": torch.cov,
    "corrcoef": torch.corrcoef,
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:].sin()),
    "det": lambda x: torch.linalg.det(square(x)),
    "eigh": lambda x: torch.linalg.eigh(spd(x)).eigenvalues,
    "eigh vectors": lambda x: torch.linalg.eigh(spd(x)).eigenvectors.abs(),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(spd(x)),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "inv": lambda x: torch.linalg.inv(square(x)),
    "kron": lambda x: torch.kron(x[:2, :2], x[:2]),
    "linear": lambda x: F.linear(x, x, x[:, 0]),
    "logdet": lambda x: torch.logdet(spd(x)),
    "lstsq": lambda x: torch.linalg.lstsq(x.T + torch.eye(4, 3, dtype=x.dtype), x.T.sin()).solution,
    "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(x)), x),
    "matmul": lambda x: x @ x.T,
    "matrix_exp": lambda x: torch.linalg.matrix_exp(x[:, :3]),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(x),
    "matrix_norm nuc": lambda x: torch.linalg.matrix_norm(x, "nuc"),
    "matrix_norm 2": lambda x: torch.linalg.matrix_norm(x, 2),
    "matrix_power": lambda x: torch.linalg.matrix_power(square(x), 3),
    "multi_dot": lambda x: torch.linalg.multi_dot([x, x.T, x]),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.sin() + 1),
    "pdist": F.pdist,
    "pinv": lambda x: torch.linalg.pinv(x),
    "qr": lambda x: torch.linalg.qr(x.T).Q.abs(),
    "slogdet": lambda x: torch.linalg.slogdet(square(x)).logabsdet,
    "solve": lambda x: torch.linalg.solve(square(x), x),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(square(x).tril(), x, upper=False),
    "svdvals": torch.linalg.svdvals,
    "svd vectors": lambda x: torch.linalg.svd(x, full_matrices=False).U.abs(),
    "tensordot": lambda x: torch.tensordot(x, x, ([1], [1])),
    "trace": lambda x: torch.trace(x @ x.T),
    "vdot": lambda x: torch.vdot(x[0], x[1]),
}
SHAPES: dict[str, Operation] = {
    "as_strided": lambda x: torch.as_strided(x.square(), (2, 3), (1, 2)),
    "cat": lambda x: torch.cat([x, x.square()]),
    "diag_embed": lambda x: torch.diag_embed(x.square()),
    "diagonal": lambda x: torch.diagonal(x.square()),
    "diff": lambda x: torch.diff(x.square()),
    "expand": lambda x: x.square()[:, :1].expand(3, 2),
    "fold": lambda x: F.fold(x.square().reshape(1, 4, 3)[:, :, :2], (2, 3), (2, 2)),
    "gather": lambda x: torch.gather(x.square(), 1, torch.tensor([[0, 0], [3, 1], [2, 2]])),
    "getitem": lambda x: x.square()[[2, 0, 0], [1, 1, 3]],
    "grid_sample": lambda x: F.grid_sample(image(x), x.reshape(1, 2, 3, 2) * 0.8, align_corners=True),
    "index_add": lambda x: torch.index_add(x, 0, torch.tensor([0, 0, 2]), x.square()),
    "index_put": lambda x: x.square().index_put(
        (torch.tensor([0, 0]), torch.tensor([1, 1])), x[0, :2], accumulate=True
    ),
    "index_select": lambda x: torch.index_select(x.square(), 1, torch.tensor([0, 0, 3])),
    "interpolate": lambda x: F.interpolate(image(x), size=(5, 5), mode="bilinear"),
    "interpolate, cubic": lambda x: F.interpolate(image(x), size=(5, 5), mode="bicubic"),
    "masked_select": lambda x: torch.masked_select(x.square(), other(x) > 0.7),
    "pad": lambda x: F.pad(x.square(), (1, 2)),
    "pad, reflect": lambda x: F.pad(image(x).square(), (1, 1, 1, 1), mode="reflect"),
    "pad, replicate": lambda x: F.pad(image(x).square(), (1, 1, 1, 1), mode="replicate"),
    "permute": lambda x: x.square().permute(1, 0),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.square().reshape(1, 4, 3, 1), 2),
    "repeat": lambda x: x.square().repeat(2, 1),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.square(), 2, 1),
    "roll": lambda x: torch.roll(x.square(), 1, 1),
    "scatter": lambda x: torch.scatter(x, 1, torch.tensor([[0, 1], [2, 0], [3, 1]]), x[:, :2].square()),
    "scatter_add": lambda x: torch.scatter_add(x, 1, torch.tensor([[0, 0], [2, 1], [3, 3]]), x[:, :2].square()),
    "scatter_reduce": lambda x: torch.scatter_reduce(
        positive(x), 1, torch.tensor([[0, 0], [2, 1], [3, 3]]), positive(x[:, :2]).square(), "prod"
    ),
    "stack": lambda x: torch.stack([x, x.sin()], 1),
    "take_along_dim": lambda x: torch.take_along_dim(x.square(), torch.tensor([[0], [2], [1]]), 1),
    "tril": lambda x: torch.tril(x.square()),
    "unfold": lambda x: F.unfold(image(x).square(), 2),
    "view_as_real": lambda x: torch.view_as_real(torch.complex(x.sin(), x.cos()).square()),
}
LAYERS: dict[str, Operation] = {
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(image(x).square(), 2),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(image(x), 2),
    "avg_pool": lambda x: F.avg_pool2d(image(x).square(), 2, stride=1),
    "batch_norm": lambda x: F.batch_norm(x, None, None, x[0].cos(), x[1], training=True),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(inside(x), other(x).clamp(max=1), reduction="none"),
    "conv": lambda x: F.conv2d(image(x), image(x)[..., :2, :2]),
    "conv_transpose": lambda x: F.conv_transpose1d(x[None], x[:, None, :2]),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 3, 1]), reduction="none"),
    "ctc_loss": lambda x: F.ctc_loss(
        torch.log_softmax(x.T[:, None], -1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
    ),
    "embedding": lambda x: F.embedding(torch.tensor([[0, 2], [2, 1]]), x.square()),
    "embedding_bag": lambda x: F.embedding_bag(torch.tensor([[0, 2], [2, 1]]), x.square(), mode="sum"),
    "glu": lambda x: F.glu(x),
    "group_norm": lambda x: F.group_norm(x[None, :2], 1, x[2, :2], x[0, :2]),
    "huber_loss": lambda x: F.huber_loss(x, other(x), reduction="none", delta=0.5),
    "instance_norm": lambda x: F.instance_norm(x[None], weight=x[:, 0], bias=x[:, 1]),
    "kl_div": lambda x: F.kl_div(x, other(x), reduction="none"),
    "layer_norm": lambda x: F.layer_norm(x, [4], x[0].cos(), x[1]),
    "local_response_norm": lambda x: F.local_response_norm(x[None], 2),
    "lp_pool": lambda x: F.lp_pool2d(image(positive(x)), 3, 2, stride=1),
    "margin_ranking_loss": lambda x: F.margin_ranking_loss(x[0], x[1], torch.ones(4, dtype=x.dtype), reduction="none"),
    "max_pool": lambda x: F.max_pool2d(image(x), 2, stride=1),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, torch.tensor([0, 3, 1]), p=2, reduction="none"),
    "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, other(x), reduction="none"),
    "rms_norm": lambda x: F.rms_norm(x, [4], x[0].cos()),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x[None], x.sin()[None], x.cos()[None]),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, other(x), reduction="none", beta=0.5),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, other(x).sub(0.7).sign(), reduction="none"),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, x.sin() + 0.5, x.cos(), reduction="none"),
    "weight_norm": lambda x: torch._weight_norm(x, x[:, :1].cos(), 0),
}
SIGNALS: dict[str, Operation] = {
    "complex abs": lambda x: torch.complex(positive(x), x.sin()).abs(),
    "complex angle": lambda x: torch.complex(positive(x), x.sin()).angle(),
    "fft": lambda x: torch.view_as_real(torch.fft.fft(x.square())),
    "irfft": lambda x: torch.fft.irfft(torch.complex(x, x.square())),
    "polar": lambda x: torch.view_as_real(torch.polar(positive(x), x)),
    "rfft": lambda x: torch.fft.rfft(x.square()).abs(),
    "stft": lambda x: torch.view_as_real(
        torch.stft(x.reshape(-1), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True)
    ),
}
OPERATIONS: dict[str, Operation] = POINTWISE | REDUCTIONS | LINEAR_ALGEBRA | SHAPES | LAYERS | SIGNALS

_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

#: Those whose gradient torch cannot differentiate.
ONCE_DIFFERENTIABLE = ["ctc_loss", "embedding_bag", "hardsigmoid", "multi_margin_loss"]
if _TORCH < (2, 13):
    ONCE_DIFFERENTIABLE += ["grid_sample"]
if _TORCH < (2, 14):
    ONCE_DIFFERENTIABLE += ["cdist", "cdist 1", "cdist 3", "pdist"]


class Operated(nn.Module):
    """Predict by one operation: its result, without dimensions the sum of that, and one entry of it squeezed."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation, self.theta = operation, nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
        # No two are near each other, nor are their squares, and none is near zero.
        numbers = [-0.83, 0.61, -0.12, 0.37, 0.9, -0.55, 0.23, -0.31, 0.07, 0.74, -0.68, 0.48]
        self.register_buffer("offset", torch.tensor(numbers, dtype=torch.float64))

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.operation((self.offset + 0.02 * X @ self.theta).view(3, 4))
        return z, z.sum(), z.reshape(-1)[:1].squeeze()

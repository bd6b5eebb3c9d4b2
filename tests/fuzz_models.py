"""Random small problems as plain data, which hypothesis draws, prints and shrinks, and what they stand for in torch."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TOKENS = 5
LENGTH = 3
IGNORED = -100

# Models.


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Twice(nn.Module):
    """One module used twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Tied(nn.Module):
    """One Parameter in two modules."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sigmoid())


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1 if width % 2 else 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class FusedAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1), is_causal=True)


class Transposed(nn.Module):
    """A layer over channels, applied to a sequence ``[B, T, D]``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Doubled(nn.Module):
    """A new tensor, which the layer after it may overwrite."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Mean(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axis)


class Positions(nn.Module):
    """Scores ``[B, C, T]`` of a sequence ``[B, T, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "relu-inplace": lambda: nn.Sequential(Doubled(), nn.ReLU(inplace=True)),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "leaky-relu": nn.LeakyReLU,
    "dropout": lambda: nn.Dropout(0.5),
}


def transformer(width: int, norm_first: bool) -> nn.Module:
    heads = 1 if width % 2 else 2
    return nn.TransformerEncoderLayer(width, heads, 3, 0.1, batch_first=True, norm_first=norm_first)


#: By name: the layer for an input of the shape given, without the batch.
VECTOR: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda d: nn.Linear(d, 4),
    "linear-narrow": lambda d: nn.Linear(d, 3, bias=False),
    "residual": lambda d: Residual(nn.Linear(d, d)),
    "twice": lambda d: Twice(nn.Linear(d, d)),
    "tied": lambda d: Tied(nn.Linear(d, d), nn.Linear(d, d)),
    "layer-norm": lambda d: nn.LayerNorm(d),
    "rms-norm": lambda d: nn.RMSNorm(d),
    "batch-norm": lambda d: nn.BatchNorm1d(d),
    "group-norm": lambda d: nn.GroupNorm(1, d),
}
IMAGE: dict[str, Callable[[int, int, int], nn.Module]] = {
    "conv": lambda c, h, w: nn.Conv2d(c, 2, 3, padding=1),
    "conv-strided": lambda c, h, w: nn.Conv2d(c, 3, 2, stride=2, padding=1, bias=False),
    "conv-grouped": lambda c, h, w: nn.Conv2d(c, 2 * c, 2, padding=1, groups=c, dilation=2),
    "conv-transposed": lambda c, h, w: nn.ConvTranspose2d(c, 2, 2),
    "residual": lambda c, h, w: Residual(nn.Conv2d(c, c, 3, padding=1)),
    "twice": lambda c, h, w: Twice(nn.Conv2d(c, c, 3, padding=1)),
    "tied": lambda c, h, w: Tied(nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)),
    "max-pool": lambda c, h, w: nn.MaxPool2d(2, stride=1, padding=1),
    "average-pool": lambda c, h, w: nn.AvgPool2d(2, ceil_mode=True),
    "layer-norm": lambda c, h, w: nn.LayerNorm([c, h, w]) if c * h * w > 3 else nn.Identity(),
    "batch-norm": lambda c, h, w: nn.BatchNorm2d(c),
    "group-norm": lambda c, h, w: nn.GroupNorm(1 if c % 2 or h * w < 4 else 2, c) if c * h * w > 3 else nn.Identity(),
    "instance-norm": lambda c, h, w: nn.InstanceNorm2d(c, affine=True) if h * w > 3 else nn.Identity(),
    "instance-norm-plain": lambda c, h, w: nn.InstanceNorm2d(c) if h * w > 3 else nn.Identity(),
    "dropout-2d": lambda c, h, w: nn.Dropout2d(0.5),
}
SEQUENCE: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda t, d: nn.Linear(d, 4),
    "residual": lambda t, d: Residual(nn.Linear(d, d)),
    "twice": lambda t, d: Twice(nn.Linear(d, d)),
    "tied": lambda t, d: Tied(nn.Linear(d, d), nn.Linear(d, d)),
    "conv": lambda t, d: Transposed(nn.Conv1d(d, 3, 3, padding=1)),
    "attention": lambda t, d: SelfAttention(d),
    "attention-residual": lambda t, d: Residual(SelfAttention(d)),
    "attention-fused": lambda t, d: FusedAttention(d),
    "transformer": lambda t, d: transformer(d, norm_first=False),
    "transformer-norm-first": lambda t, d: transformer(d, norm_first=True),
    "layer-norm": lambda t, d: nn.LayerNorm(d),
    "rms-norm": lambda t, d: nn.RMSNorm(d),
    "batch-norm": lambda t, d: Transposed(nn.BatchNorm1d(d)),
    "group-norm": lambda t, d: Transposed(nn.GroupNorm(1, d)),
    "instance-norm": lambda t, d: Transposed(nn.InstanceNorm1d(d, affine=True)),
}
LAYERS: dict[str, dict[str, Any]] = {"vector": VECTOR, "image": IMAGE, "sequence": SEQUENCE, "tokens": SEQUENCE}
HEADS = {
    "vector": ("linear", "scalar"),
    "image": ("linear", "scalar", "pooled"),
    "sequence": ("linear", "scalar", "pooled", "positions"),
    "tokens": ("linear", "pooled", "positions", "decoder"),
}

# Losses: each with the terms of its examples, and what a mean divides them by, written out by hand.


@dataclass
class Loss:
    """A loss function, its targets, and what it is by hand.

    `terms` gives the unreduced loss of every example; their sum over `divisor` is the loss of the whole data set.
    """

    function: Any
    y: Tensor
    terms: Callable[[Tensor, Tensor], Tensor]
    divisor: float
    counted: int
    weight: Callable[[Any], float] | None = None


class FourthPowers:
    """A function of one's own: the sum of an example's entries, averaged or added over the examples."""

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return getattr(self.terms(z, y), self.reduction)()

    def terms(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y) ** 4).reshape(len(z), -1).sum(1)


class Masked:
    """A function of one's own that averages over the rows whose target is there (above -50)."""

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return self.terms(z, y).sum() / there(y).sum()

    def terms(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > -50, z - y, 0.0).cosh().log().reshape(len(z), -1).sum(1)


def there(y: Tensor) -> Tensor:
    return (y.reshape(len(y), -1) > -50).all(1)


def weight_of_those_there(batch: Any) -> float:
    return float(there(batch[1]).sum())


#: ``(z, y) -> l``, entry by entry.
ENTRIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda z, y: (z - y) ** 2,
    "f-mse": lambda z, y: (z - y) ** 2,
    "huber": lambda z, y: torch.where((z - y).abs() < 0.5, (z - y) ** 2 / 2, 0.5 * (z - y).abs() - 0.125),
    "smooth-l1": lambda z, y: torch.where((z - y).abs() < 0.7, (z - y) ** 2 / 1.4, (z - y).abs() - 0.35),
    "bce": lambda z, y: torch.logaddexp(z, 0 * z) - y * z,
    "bce-weights": lambda z, y: positive(z) * y * torch.logaddexp(-z, 0 * z) + (1 - y) * torch.logaddexp(z, 0 * z),
    "soft-margin": lambda z, y: torch.logaddexp(-y * z, 0 * z),
    "poisson": lambda z, y: z.exp() - y * z,
    "kl": lambda z, y: y * (y.log() - z),
    "kl-mean": lambda z, y: y * (y.log() - z),
}


def positive(z: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, z.shape[-1] if z.ndim > 1 else 1, dtype=z.dtype)


def entries_by_row(name: str, z: Tensor, y: Tensor) -> Tensor:
    terms = ENTRIES[name](z, y)
    return (terms.sum(-1) if terms.ndim > 1 else terms).reshape(-1)


def classes_by_position(
    z: Tensor, y: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0, is_log: bool = False
) -> Tensor:
    """Cross-entropy position by position, with class weights inside the sum over the classes."""
    log_p = (z if is_log else z - z.logsumexp(1, keepdim=True)).movedim(1, -1)
    w = torch.ones_like(log_p[0].reshape(-1, log_p.shape[-1])[0]) if weight is None else weight.to(z.dtype)
    if y.is_floating_point():
        return -(y.movedim(1, -1) * w * log_p).sum(-1).reshape(-1)
    known = y != IGNORED
    one_hot = F.one_hot(torch.where(known, y, 0), len(w)).to(z.dtype)
    p = (1 - label_smoothing) * one_hot + label_smoothing / len(w)
    return (-(p * w * log_p).sum(-1) * known).reshape(-1)


CONTINUOUS = ("mse", "huber", "smooth-l1", "bce", "bce-weights", "soft-margin", "poisson", "own", "own-masked", "f-mse")
CROSS_ENTROPY = ("ce", "ce-weights", "ce-smoothed", "ce-everything", "ce-probabilities")
CLASSES = (*CROSS_ENTROPY, "nll", "nll-weights", "kl", "kl-mean")
LIKELIHOODS = ("mse", "f-mse", "bce", "bce-weights", *CROSS_ENTROPY)


def loss_of(case: Case, z: Tensor) -> Loss:
    name, reduction = case.loss, case.reduction
    ignored = list(itertools.chain.from_iterable(case.rows(index) for index in case.ignored_batches))
    if name in CONTINUOUS:
        y = torch.randn(z.shape)
        if name in ("bce", "bce-weights", "poisson"):
            y = torch.rand(z.shape)
        if name == "soft-margin":
            y = y.sign()
        if name == "own":
            own = FourthPowers(reduction)
            return Loss(own, y, own.terms, float(len(z)) if reduction == "mean" else 1.0, len(z))
        if name == "own-masked":
            y[ignored] = -99.0
            masked, divisor = Masked(), float(len(z) - len(ignored))
            return Loss(masked, y, masked.terms, divisor, len(z), weight_of_those_there)
        rows = z.numel() // (z.shape[-1] if z.ndim > 1 else 1)
        divisor = float(z.numel()) if reduction == "mean" else 1.0
        return Loss(torch_loss(name, reduction, z), y, functools.partial(entries_by_row, name), divisor, rows)
    classes, shape = z.shape[1], (len(z), *z.shape[2:])
    weights = torch.linspace(0.3, 2.0, classes)
    if name in ("kl", "kl-mean"):
        how = {"mean": {"kl": "batchmean", "kl-mean": "mean"}[name], "sum": "sum"}[reduction]
        divisor = {"batchmean": float(len(z)), "mean": float(z.numel()), "sum": 1.0}[how]
        y = torch.rand(z.shape).softmax(1)
        rows = z.numel() // z.shape[-1]
        return Loss(nn.KLDivLoss(reduction=how), y, functools.partial(entries_by_row, name), divisor, rows)
    if name == "ce-probabilities":
        y, counted = torch.rand(z.shape).softmax(1), z.numel() // classes
        divisor = float(counted)
        options: dict[str, Any] = {"weight": weights}
    else:
        y = torch.randint(0, classes, shape)
        if case.scattered:
            y[torch.rand(shape) < 0.3] = IGNORED
        y[ignored] = IGNORED
        if (y == IGNORED).all():
            y.view(-1)[0] = 0
        options = {}
        if name.endswith(("weights", "everything")):
            options["weight"] = weights
        if name.endswith(("smoothed", "everything")):
            options["label_smoothing"] = 0.2
        known = y[y != IGNORED]
        counted = known.numel()
        divisor = float(sum(weights[int(c)] for c in known)) if "weight" in options else float(counted)
    is_log = name.startswith("nll")
    kind = nn.NLLLoss if is_log else nn.CrossEntropyLoss
    terms = functools.partial(classes_by_position, is_log=is_log, **options)
    return Loss(kind(**options, reduction=reduction), y, terms, divisor if reduction == "mean" else 1.0, counted)


def torch_loss(name: str, reduction: str, z: Tensor) -> Any:
    return {
        "mse": lambda: nn.MSELoss(reduction=reduction),
        "f-mse": lambda: functools.partial(F.mse_loss, reduction=reduction),
        "huber": lambda: nn.HuberLoss(reduction, delta=0.5),
        "smooth-l1": lambda: nn.SmoothL1Loss(reduction=reduction, beta=0.7),
        "bce": lambda: nn.BCEWithLogitsLoss(reduction=reduction),
        "bce-weights": lambda: nn.BCEWithLogitsLoss(pos_weight=positive(z), reduction=reduction),
        "soft-margin": lambda: nn.SoftMarginLoss(reduction=reduction),
        "poisson": lambda: nn.PoissonNLLLoss(reduction=reduction),
    }[name]()


# Cases.


@dataclass(frozen=True)
class Case:
    """One problem and how it is handed over; everything else is drawn with `seed`."""

    kind: str
    layers: tuple[str, ...]
    head: str
    outputs: int
    loss: str
    reduction: str = "mean"
    sizes: tuple[int, ...] = (4,)
    ignored_batches: tuple[int, ...] = ()
    scattered: bool = False
    batch_statistics: bool = False
    model_dtype: str = "float64"
    dtype: str = "float64"
    cache: int | str = "auto"
    columns: int | str = "auto"
    matrix: str = "Hessian"
    whole: bool = True
    hand_over: str = "module"
    loader: bool = False
    moves: bool = False
    engine: str = "autograd"
    seed: int = 0

    def rows(self, index: int) -> range:
        start = sum(self.sizes[:index])
        return range(start, start + self.sizes[index])

    def build(self) -> Problem:
        default = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            torch.set_default_dtype(torch.float64)
            try:
                return self._build()
            finally:
                torch.set_default_dtype(default)

    def _build(self) -> Problem:
        count = sum(self.sizes)
        shape = {"vector": (3,), "image": (1, 3, 4), "sequence": (LENGTH, 4), "tokens": (LENGTH,)}[self.kind]
        X = torch.randint(0, TOKENS, (count, *shape)) if self.kind == "tokens" else torch.randn(count, *shape)
        if self.kind == "tokens" and "instance-norm" in self.layers:
            # Of a token that is repeated nothing but rounding errors are left, which each of them divides by the root
            # of its epsilon: after three, two routes in float64 differ by 1e-8.
            repeated = (X[:, :1] == X).all(1)
            X[repeated, 1] = (X[repeated, 0] + 1) % TOKENS
        model = _model(self, X)
        with torch.no_grad():
            z = model(X)
        loss = loss_of(self, z)
        dtype = getattr(torch, self.model_dtype)
        # What a float32 model is given is what the float64 one of the oracle has, exactly.
        model = model.to(dtype).double()
        X, y = (part.to(dtype).double() if part.is_floating_point() else part for part in (X, loss.y))
        return Problem(self, model, loss, X, y)


@dataclass
class Problem:
    """A case in float64, as the oracle sees it."""

    case: Case
    model: nn.Module
    loss: Loss
    X: Tensor
    y: Tensor

    def handed_over(self) -> tuple[nn.Module, Any, Any]:
        """Return the model, the loss function and the data in the model's dtype, cut into batches."""
        dtype = getattr(torch, self.case.model_dtype)
        function = copy.deepcopy(self.loss.function)
        if isinstance(function, nn.Module):
            function = function.to(dtype)
        X, y = (part.to(dtype) if part.is_floating_point() else part.clone() for part in (self.X, self.y))
        sizes = self.case.sizes
        model = copy.deepcopy(self.model).to(dtype)
        if self.case.loader:
            return model, function, DataLoader(TensorDataset(X, y), batch_size=sizes[0])
        return model, function, list(zip(X.split(sizes), y.split(sizes), strict=True))


def _model(case: Case, X: Tensor) -> nn.Module:
    layers: list[nn.Module] = []
    if case.kind == "tokens":
        layers.append(nn.Embedding(TOKENS, 4, padding_idx=0 if case.seed % 2 else None))

    def now() -> tuple[int, ...]:
        model = nn.Sequential(*layers).eval()
        with torch.no_grad():
            return tuple(model(X.clone()).shape[1:])

    for name in case.layers:
        make = ACTIVATIONS.get(name)
        layers.append(make() if make else LAYERS[case.kind][name](*now()))
    if case.head == "pooled":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if case.kind == "image" else [Mean(1)]
    elif case.head in ("linear", "scalar"):
        layers.append(nn.Flatten())
    width = now()[-1]
    if case.head == "decoder":
        layers += [nn.Linear(width, 4), nn.Linear(4, TOKENS, bias=False)]
        layers[-1].weight = layers[0].weight
    else:
        layers.append(nn.Linear(width, case.outputs))
    if case.head in ("positions", "decoder"):
        layers.append(Positions())
    if case.head == "scalar":
        layers[-1] = nn.Linear(width, 1)
        layers.append(nn.Flatten(0))
    if case.loss.startswith(("nll", "kl")):
        layers.append(nn.LogSoftmax(1))
    model = nn.Sequential(*layers).eval()
    for part in model.modules():
        if isinstance(part, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase):
            for parameter in part.parameters(recurse=False):
                nn.init.normal_(parameter, 1.0, 0.5)
            for buffer in part.buffers(recurse=False):
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5)
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train(case.batch_statistics)
    return model


MATRICES = ("Hessian", "objective", "GGN", "EF", "Fisher", "Covariance", "Jacobian")


@st.composite
def cases(draw: Any, kind: str, engine: str = "autograd") -> Case:
    """Draw a case whose input is of the kind named."""
    names = (*LAYERS[kind], *ACTIVATIONS)
    layers = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)))
    # One such layer has more parameters than the rest together.
    heavy = [index for index, name in enumerate(layers) if name.startswith(("attention", "transformer"))][1:]
    layers = tuple(name for index, name in enumerate(layers) if index not in heavy)
    head = draw(st.sampled_from(HEADS[kind]))
    losses = CONTINUOUS if head == "scalar" else CONTINUOUS + CLASSES
    loss = draw(st.sampled_from(losses))
    outputs = draw(st.integers(2 if loss in CLASSES else 1, 3))
    batch_statistics = "batch-norm" in layers and draw(st.booleans())
    sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    ragged_loader = False
    if batch_statistics:
        sizes = (6,)
    else:
        ragged_loader = draw(st.booleans()) and all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]
    reduction = draw(st.sampled_from(["mean", "sum"])) if loss != "own-masked" else "mean"
    few = st.sampled_from([(), (0,), (len(sizes) - 1,)]) if len(sizes) > 1 else st.just(())
    matrices = [name for name in MATRICES if name != "Fisher" or loss in LIKELIHOODS]
    if loss == "own-masked":
        matrices.remove("Covariance")  # what counts as an example is not told by batch_weight
    return Case(
        kind=kind,
        layers=layers,
        head=head,
        outputs=outputs,
        loss=loss,
        reduction=reduction,
        sizes=sizes,
        ignored_batches=draw(few),
        scattered=draw(st.booleans()),
        batch_statistics=batch_statistics,
        model_dtype=draw(st.sampled_from(["float64", "float64", "float32"])),
        dtype=draw(st.sampled_from(["float64", "float64", "float32"])),
        cache=draw(st.sampled_from(["auto", 0, 2000])),
        columns=draw(st.sampled_from(["auto", 1, 2])),
        matrix=draw(st.sampled_from(matrices)),
        whole=draw(st.booleans()),
        hand_over=draw(st.sampled_from(["module", "list", "elsewhere", "callable"])),
        loader=ragged_loader,
        moves=draw(st.booleans()) and draw(st.booleans()),
        engine=engine,
        seed=draw(st.integers(0, 2**16)),
    )

"""Predictions and losses of Hugging Face models, for the class methods ``from_functions`` of the operators.

The models of ``transformers`` compute their own loss if a batch contains labels. This loss is not suited to curvature
matrices, for three reasons. It casts the logits to float32. It is not computed by a separate function of the
prediction, although most curvature matrices need such a function. It divides by the number of valid labels of a batch,
but does not return this number, which the operators need as the weight of the batch.

The functions in this module therefore call the model without labels, and compute the same loss from the logits of the
model, in the precision of the model. For the first batch, they compare this loss with the loss that the model itself
computes. The functions only use the model object, and do not import ``transformers``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvop.kernels.parameters import unknown_name
from curvop.kernels.target_loss import TargetLoss

__all__ = ["causal_lm", "masked_lm", "seq2seq_lm", "sequence_classification"]

#: Keyword arguments of ``from_functions``: ``predict``, ``loss`` and ``batch_weight``.
Functions = dict[str, Callable[..., Any]]
#: The label of tokens that the loss ignores.
_IGNORED = -100


def causal_lm(model: nn.Module) -> Functions:
    """Return the prediction and the loss of a language model that predicts the next token.

    Pass the result to the class method ``from_functions`` of an operator. The batches may come directly from a data
    collator of ``transformers``. The loss of the data set is then the mean over all its valid labels. This loss does
    not depend on how the data set is padded and divided into batches.

    Parameters
    ----------
    model : nn.Module
        A model of ``transformers`` with a language modeling head (``AutoModelForCausalLM``), or such a model with the
        adapters of ``peft``. In most cases, the model should be in evaluation mode.

    Returns
    -------
    dict
        Arguments of ``from_functions``:

        - ``predict``: function ``(params, batch) -> logits`` of shape ``(B, V, T - 1)``, for B sequences, V tokens in
          the vocabulary and T positions. The last position is left out, because it has no next token. The names of the
          parameters are those of ``model.named_parameters()``.
        - ``loss``: `curvop.TargetLoss` with the cross-entropy of the labels after the first position. Labels of -100
          are ignored.
        - ``batch_weight``: function that returns the number of labels that are not ignored.

    Raises
    ------
    TypeError
        If ``model`` is not a module with an attribute ``config``.

    See Also
    --------
    masked_lm, seq2seq_lm, sequence_classification
    curvop.GGNLinearOperator.from_functions : Construct an operator from the two functions.

    Notes
    -----
    A batch is a mapping with the arguments of the model (such as ``input_ids`` and ``attention_mask``) and with
    ``labels`` of shape ``(B, T)``. The model is called without the labels and without a cache of keys and values. The
    configuration of the model is not modified.

    Some models compute a different loss: ``BartForCausalLM`` does not shift the labels, and mixtures of experts with
    ``output_router_logits=True`` add a load-balancing loss. The first evaluation therefore also computes the model's
    own loss, ``model(**batch).loss``, in one more forward pass. If the relative difference of the two losses exceeds
    1e-4 (plus a bound on float32 rounding errors), ``predict`` raises a ValueError that contains both values.

    For empirical Fisher matrices, an example is a token with a valid label (not -100). To make each sequence an
    example, replace ``loss`` by a function that computes the same loss, such as ``lambda z, batch: cross_entropy(z,
    batch["labels"][:, 1:])``. The matrix is still divided by the number of valid labels.

    ``predict`` turns gradient checkpointing off while the model is evaluated, so checkpointing saves no memory here.
    Between products, the operators keep the intermediate results of all batches that fit into the memory budget
    ``cache``. To save memory, use small batches and a small budget.

    Examples
    --------
    Compute the largest eigenvalue of the generalized Gauss-Newton matrix of a randomly initialized GPT-2. The second
    sequence is padded:

    >>> import torch
    >>> import curvop
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> _ = torch.manual_seed(0)
    >>> config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    >>> model = GPT2LMHeadModel(config).double().eval()
    >>> tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 0, 0]])
    >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    >>> batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    >>> functions = curvop.huggingface.causal_lm(model)
    >>> functions["batch_weight"](batch)
    4.0
    >>> params = curvop.select(model, "*attn*")
    >>> G = curvop.GGNLinearOperator.from_functions(**functions, params=params, data=[batch])
    >>> curvop.spectrum.eigsh(G, 1, "LA", progress=False).largest > 0
    True
    """
    _check_module(model)
    return _of_tokens("causal_lm", model, _without_labels, _before_last, _next_tokens)


def masked_lm(model: nn.Module) -> Functions:
    """Return the prediction and the loss of a language model that predicts masked tokens.

    Parameters
    ----------
    model : nn.Module
        A model of ``transformers`` with a masked language modeling head (``AutoModelForMaskedLM``), or such a model
        with the adapters of ``peft``. In most cases, the model should be in evaluation mode.

    Returns
    -------
    dict
        Arguments of ``from_functions``, as for `causal_lm`. The logits have shape ``(B, V, T)``. Labels of -100 are
        ignored.

    Raises
    ------
    TypeError
        If ``model`` is not a module with an attribute ``config``.

    See Also
    --------
    causal_lm : The format of batches, and the examples of empirical Fisher matrices.

    Notes
    -----
    ``DataCollatorForLanguageModeling`` draws new masks in each pass over the data, so the loss is random. Pass a list
    of its batches as ``data``: ``data=list(loader)``.
    """
    _check_module(model)
    return _of_tokens("masked_lm", model, _without_labels, _classes_first, _labels)


def seq2seq_lm(model: nn.Module) -> Functions:
    """Return the prediction and the loss of an encoder-decoder language model.

    Parameters
    ----------
    model : nn.Module
        A model of ``transformers`` with an encoder and a decoder (``AutoModelForSeq2SeqLM``), or such a model with the
        adapters of ``peft``. In most cases, the model should be in evaluation mode.

    Returns
    -------
    dict
        Arguments of ``from_functions``, as for `causal_lm`. If the labels have T positions, the logits have shape
        ``(B, V, T)``. Labels of -100 are ignored.

    Raises
    ------
    TypeError
        If ``model`` is not a module with an attribute ``config``.

    See Also
    --------
    causal_lm : The format of batches, and the examples of empirical Fisher matrices.

    Notes
    -----
    If a batch has neither ``decoder_input_ids`` nor ``decoder_inputs_embeds``, the decoder receives the labels shifted
    by one position, as computed by ``model.prepare_decoder_input_ids_from_labels``.
    """
    _check_module(model)
    return _of_tokens("seq2seq_lm", model, _with_decoder_inputs, _classes_first, _labels)


def sequence_classification(model: nn.Module, problem_type: str | None = None) -> Functions:
    """Return the prediction and the loss of a model that predicts classes or numbers for each sequence.

    Parameters
    ----------
    model : nn.Module
        A model of ``transformers`` with a classification head (``AutoModelForSequenceClassification``), or such a model
        with the adapters of ``peft``. In most cases, the model should be in evaluation mode.
    problem_type : {'single_label_classification', 'multi_label_classification', 'regression'}, optional
        The problem type determines the loss: cross-entropy for 'single_label_classification', binary cross-entropy for
        'multi_label_classification', and mean squared error for 'regression'. The default is
        ``model.config.problem_type``. If the configuration does not set a problem type, the loss is selected by the
        rule of ``transformers``. According to this rule, the loss is mean squared error if ``model.config.num_labels``
        is 1. Otherwise, the loss is cross-entropy for integer labels, and binary cross-entropy for other labels.

    Returns
    -------
    dict
        Arguments of ``from_functions``, as for `causal_lm`. For C classes or numbers, the logits have shape ``(B, C)``.
        For cross-entropy, the weight of a batch is the number of labels that are not -100. For the other losses, the
        weight is the number of all labels.

    Raises
    ------
    TypeError
        If ``model`` is not a module with an attribute ``config``.
    ValueError
        If the problem type is unknown.

    See Also
    --------
    causal_lm : The format of batches.

    Notes
    -----
    For empirical Fisher matrices, an example is a sequence. `curvop.FisherLinearOperator` must know the loss in
    advance. If the configuration does not determine the loss, pass ``problem_type``.

    If ``problem_type`` is not passed, the first evaluation compares the loss with the model's own loss, as for
    `causal_lm`. For DeBERTa, for example, the losses differ if the labels are not integers.

    Unlike ``transformers``, this function does not store the selected problem type in the configuration.
    """
    _check_module(model)
    config: Any = model.config
    kind: str | None = problem_type or config.problem_type or ("regression" if config.num_labels == 1 else None)
    if kind is not None and kind not in _PROBLEMS:
        raise ValueError(
            f"problem_type is {kind!r}, but must be one of {', '.join(map(repr, _PROBLEMS))}, or None, which selects "
            "the loss by the number and the dtype of the labels"
        )
    loss: Callable[[Any, Any], Tensor] = _classification_loss
    if kind is not None:
        loss = TargetLoss(_PROBLEMS[kind](), functools.partial(_class_labels, kind))
    comparison = _Comparison("sequence_classification", loss)
    comparison.done = problem_type is not None  # a loss selected by the user may differ from the model's own
    return {
        "predict": functools.partial(_scores, model, _without_labels, _unchanged, comparison),
        "loss": loss,
        "batch_weight": functools.partial(_classification_weight, kind),
    }


# The functions below are at the top level, because operators must be picklable.


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        missing = " without config" if isinstance(model, nn.Module) else ""
        raise TypeError(
            f"model is a {type(model).__name__}{missing}: pass a model of transformers, such as GPT2LMHeadModel"
        )


def _of_tokens(
    name: str,
    model: nn.Module,
    inputs_of: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]],
    arranged: Callable[[Tensor], Tensor],
    targets: Callable[[Any], Tensor],
) -> Functions:
    """Return the arguments of ``from_functions`` for a model that predicts a token for each target."""
    loss = TargetLoss(nn.CrossEntropyLoss(ignore_index=_IGNORED), targets)
    predict = functools.partial(_scores, model, inputs_of, arranged, _Comparison(name, loss))
    return {"predict": predict, "loss": loss, "batch_weight": functools.partial(_number_of_valid, targets)}


def _scores(
    model: nn.Module,
    inputs_of: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]],
    arranged: Callable[[Tensor], Tensor],
    comparison: _Comparison,
    params: Mapping[str, Tensor],
    batch: Any,
) -> Tensor:
    """Return the logits of a batch, in the shape that the loss function expects.

    `inputs_of` returns the keyword arguments of the model for a batch, and `arranged` changes the shape of the logits.
    """
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"the {type(model).__name__} adds a load-balancing loss of its experts to its own loss, which depends on "
            "more than the logits: set model.config.output_router_logits = False to leave it out, or use "
            "HessianLinearOperator.from_objective"
        )
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := [name for name in params if name not in known]:
        raise ValueError(unknown_name("params", unknown[0], sorted(known)))
    inputs = inputs_of(model, _checked(batch)) | {"return_dict": True}
    if _takes_cache(model):
        inputs["use_cache"] = False
    with _without_checkpointing(model):
        # Compute the model's own loss first, so that dropout draws the same numbers in both evaluations.
        own = None if comparison.done else _own_loss(model, params, batch)
        output = functional_call(model, dict(params), (), inputs)
    if not hasattr(output, "logits"):
        raise TypeError(
            f"a {type(model).__name__} returns no logits: pass a model with a head, such as GPT2LMHeadModel in place "
            "of GPT2Model"
        )
    logits: Tensor = output.logits
    labels = batch.get("labels")
    if arranged is not _unchanged and isinstance(labels, Tensor) and labels.shape[1:2] != logits.shape[1:2]:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, but the labels have shape {tuple(labels.shape)}: prompts of "
            "peft, which add positions, are not supported; write predict and loss yourself, as the page 'Models that "
            "compute their own loss' of the documentation shows"
        )
    scores = arranged(logits)
    if own is not None:
        comparison.compare(model, own, scores, batch)
    return scores


class _Comparison:
    """Compares a loss with the loss that the model itself computes. The first batch with two finite losses is used.

    The class is not callable, so that fingerprints of the function `_scores` do not depend on `done`.

    Attributes
    ----------
    done : bool
        Whether the comparison has been made.
    """

    def __init__(self, name: str, loss: Callable[[Any, Any], Tensor]) -> None:
        self._name, self._loss = name, loss
        self.done = False

    def compare(self, model: nn.Module, own: float, scores: Tensor, batch: Any) -> None:
        """Raise a ValueError if the loss differs from `own`, the loss that the model computes."""
        try:
            with torch.no_grad():
                loss = float(self._loss(scores, batch))
        except IndexError as error:
            raise ValueError(
                f"{str(error).strip().rstrip('.')}: labels must be numbers of classes, or {_IGNORED} if they are to be "
                "ignored"
            ) from error
        if not math.isfinite(own) or not math.isfinite(loss):  # for example, because no label is valid
            return
        if abs(own - loss) > _ALIKE * abs(own) + _ROUNDING * float(scores.detach().abs().max()):
            raise ValueError(
                f"the loss of the first batch is {loss:.6g}, but the {type(model).__name__} itself computes {own:.6g}: "
                f"{_REMEDIES.get(self._name, '')}write predict and loss yourself, as the page 'Models that compute "
                "their own loss' of the documentation shows, or use HessianLinearOperator.from_objective"
            )
        self.done = True


#: Largest accepted relative difference between a loss and the loss that a model computes in float32.
_ALIKE = 1e-4
#: A bound on the rounding error of a loss in float32, relative to the largest logit.
_ROUNDING = 1e-6
_REMEDIES = {
    "causal_lm": "if the model does not shift the labels, use curvop.huggingface.masked_lm; otherwise, ",
    "sequence_classification": "pass problem_type=, which selects the loss; or ",
}


def _own_loss(model: nn.Module, params: Mapping[str, Tensor], batch: Mapping[str, Any]) -> float | None:
    """Return the loss that the model computes for a batch, or None if it cannot be computed.

    The configuration is restored afterwards, because ``transformers`` stores the problem type in the configuration.
    """
    labels = batch.get("labels")
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if not isinstance(labels, Tensor) or any(map(wrapped, params.values())) or bool((labels == _IGNORED).all()):
        return None
    settings: dict[str, Any] = vars(model.config)
    before = dict(settings)
    devices = {value.device for value in params.values() if value.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings(action="ignore"):
            loss = functional_call(model, dict(params), (), dict(batch) | {"return_dict": True}).loss
        return None if loss is None else float(loss)
    except Exception:  # the model has no loss for such batches
        return None
    finally:
        settings.clear()
        settings.update(before)


@contextlib.contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Turn gradient checkpointing off while the context is active.

    Checkpointed layers would be recomputed in each backward pass with the parameters and ``requires_grad`` flags of the
    model, and not with those of the evaluation.
    """
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False) is True]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


def _takes_cache(model: Any) -> bool:
    """Return True if the model accepts the argument ``use_cache``. Models without a decoder do not accept it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft has a generic signature
    return "use_cache" in inspect.signature(base.forward).parameters


def _without_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _with_decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    inputs = _without_labels(model, batch)
    if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        shifted: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shifted is None:
            raise TypeError(
                f"a batch has no 'decoder_input_ids', and a {type(model).__name__} cannot compute them: add them to "
                "the batches, or pass a model with prepare_decoder_input_ids_from_labels"
            )
        inputs["decoder_input_ids"] = shifted(labels=_labels(batch))
    return inputs


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _classes_first(logits: Tensor) -> Tensor:
    return logits.transpose(1, 2)


def _before_last(logits: Tensor) -> Tensor:
    return _classes_first(logits[:, :-1])


def _labels(batch: Any) -> Any:
    labels = _checked(batch).get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"a batch has no tensor 'labels' (it has {', '.join(map(repr, batch))}): use a data collator that adds "
            "labels, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    return labels


def _checked(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}, but must be a mapping with the arguments of the model and labels, "
            "such as a data collator returns"
        )
    return batch


def _next_tokens(batch: Any) -> Tensor:
    labels: Tensor = _labels(batch)[:, 1:]
    return labels


def _number_of_valid(targets: Callable[[Any], Tensor], batch: Any) -> float:
    return float((targets(batch) != _IGNORED).sum())


# Sequence classification.

_PROBLEMS: dict[str, Callable[[], nn.Module]] = {
    "single_label_classification": functools.partial(nn.CrossEntropyLoss, ignore_index=_IGNORED),
    "multi_label_classification": nn.BCEWithLogitsLoss,
    "regression": nn.MSELoss,
}


def _problem_of(kind: str | None, labels: Tensor) -> str:
    """Return `kind`. If it is None, return the type that ``transformers`` selects by the dtype of the labels."""
    if kind is not None:
        return kind
    integers = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if integers else "multi_label_classification"


def _class_labels(kind: str, batch: Any) -> Tensor:
    """Return the labels in the shape that the loss function expects."""
    labels: Tensor = _labels(batch)
    if kind == "single_label_classification":
        return labels.reshape(-1)
    return labels.reshape(len(labels), -1)


def _classification_loss(logits: Tensor, batch: Any) -> Tensor:
    """Return the loss of a batch for the problem type that the dtype of its labels determines."""
    kind = _problem_of(None, _labels(batch))
    loss: Tensor = _PROBLEMS[kind]()(logits, _class_labels(kind, batch))
    return loss


def _classification_weight(kind: str | None, batch: Any) -> float:
    kind = _problem_of(kind, _labels(batch))
    labels = _class_labels(kind, batch)
    valid = labels != _IGNORED if kind == "single_label_classification" else torch.ones_like(labels)
    return float(valid.sum())

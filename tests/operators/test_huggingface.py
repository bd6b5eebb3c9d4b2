"""Hugging Face models over batches of a data collator: the matrix of the padded data set, weighted by valid labels.

The references are derivatives of the models' own logits by double backward, for the whole data set as one batch.
"""

from __future__ import annotations

import functools
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agreement import close
from cases import seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import curvop
from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvop.huggingface import causal_lm, masked_lm, seq2seq_lm, sequence_classification

transformers = pytest.importorskip("transformers")

VOCABULARY = 11
SMALL = dict(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
LENGTHS = (3, 2, 6, 4, 5)
PARTS = (slice(0, 2), slice(2, 3), slice(3, 5))  # all ignored, one sentence, two of different lengths


class InDouble(TorchFunctionMode):
    """Do not cast float64 tensors to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in args[1:]):
                return args[0]
            if kwargs.get("dtype") == torch.float32 and func in (F.softmax, Tensor.to):
                del kwargs["dtype"]
                return args[0] if func is Tensor.to else func(*args, **kwargs)
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let float64 models compute in float64: transformers computes some norms and softmaxes in float32."""
    from transformers.models.llama import modeling_llama
    from transformers.models.t5 import modeling_t5

    def patched(forward: Any) -> Any:
        @functools.wraps(forward)
        def forward_in_double(*args: Any, **kwargs: Any) -> Any:
            with InDouble():
                return forward(*args, **kwargs)

        return forward_in_double

    kinds = (
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaAttention,
        modeling_t5.T5LayerNorm,
        modeling_t5.T5Attention,
    )
    for kind in kinds:
        monkeypatch.setattr(kind, "forward", patched(kind.forward))


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Silence the hints that transformers logs, such as about checkpointing and the cache of keys and values."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


@seeded
def gpt2() -> nn.Module:
    rates = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=8, bos_token_id=0, eos_token_id=0, **rates, **SMALL)
    ).eval()


@seeded
def llama() -> nn.Module:
    sizes = dict(intermediate_size=12, max_position_embeddings=8, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(pad_token_id=0, **sizes, **SMALL)).eval()


def bert_config(**settings: Any) -> Any:
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertConfig(intermediate_size=8, max_position_embeddings=8, **rates, **SMALL, **settings)


@seeded
def bert() -> nn.Module:
    return transformers.BertForMaskedLM(bert_config()).eval()


@seeded
def t5() -> nn.Module:
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


#: The functions for each model, and some parameters. The embeddings of GPT-2, BERT and T5 are tied to the head.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], list[str]]] = {
    "gpt2": (gpt2, causal_lm, ["*wte.weight", "*h.0.ln_1.*", "*h.1.attn.c_attn.bias", "*h.0.mlp.c_proj.bias"]),
    "llama": (
        llama,
        causal_lm,
        ["*embed_tokens.weight", "*layers.0.*norm.weight", "*layers.1.self_attn.k_proj.weight"],
    ),
    "bert": (bert, masked_lm, ["*word_embeddings.weight", "*layer.0.attention*LayerNorm.*", "*layer.1*query.bias"]),
    "t5": (t5, seq2seq_lm, ["shared.weight", "decoder*layer_norm.weight", "encoder*SelfAttention.k.weight"]),
}


@seeded
def sentences() -> Any:
    """Return five sentences as one padded batch; the labels of the first two are ignored."""
    real = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(1, VOCABULARY, real.shape).where(real, 0)
    labels = tokens.where(real, -100)
    labels[:2] = -100
    labels[2, :3] = -100  # the third begins with a prompt
    return transformers.BatchEncoding({"input_ids": tokens, "attention_mask": real.long(), "labels": labels})


def ragged(whole: Any) -> list[Any]:
    """Cut the padded batch into three, each as long as its longest sentence, as a data collator does."""
    return [
        transformers.BatchEncoding(
            {
                key: value[part][:, : max(LENGTHS[part])] if value.ndim > 1 else value[part]
                for key, value in whole.items()
            }
        )
        for part in PARTS
    ]


def logits_and_labels(name: str, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of all positions and their targets, by calling the model as its user does."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if name == "t5":  # the targets after the start token, without -100
        start = torch.zeros(len(labels), 1, dtype=torch.long)
        inputs["decoder_input_ids"] = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
    logits = model(**inputs).logits
    if name in ("gpt2", "llama"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.flatten(0, 1), labels.flatten()


def own_loss(name: str, model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(*logits_and_labels(name, model, batch))


def rows(values: Tensor, params: dict[str, Tensor]) -> Tensor:
    found = [
        torch.autograd.grad(value, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in values.reshape(-1)
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in found])


def product_by_hand(loss: Tensor, params: dict[str, Tensor], v: Tensor) -> Tensor:
    own = list(params.values())
    gradient = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True, materialize_grads=True)
    inner = torch.cat([part.reshape(-1) for part in gradient]) @ v
    return rows(inner[None], params)[0]


def chosen(model: nn.Module, patterns: list[str]) -> dict[str, Tensor]:
    params = curvop.select(model, patterns)
    assert len(params) >= len(patterns)
    return params


def vector(size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_equal(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert np.linalg.norm(np.asarray(found) - np.asarray(expected)) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("name", MODELS)
class TestLanguageModels:
    def test_the_hessian_is_that_of_the_padded_data_set(self, name: str) -> None:
        make, functions, patterns = MODELS[name]
        model = make()
        params, config = chosen(model, patterns), model.config.to_dict()
        H = HessianLinearOperator.from_functions(**functions(model), params=params, data=ragged(sentences()))
        v = vector(H.shape[1])
        with sdpa_kernel(SDPBackend.MATH):
            loss = own_loss(name, model, sentences())
            assert_equal(H @ v.numpy(), product_by_hand(loss, params, v))
        assert abs(H.gradient_and_loss()[1] - loss.item()) < 1e-12
        assert model.config.to_dict() == config

    @pytest.mark.default_cases("gpt2", "t5")
    def test_the_gauss_newton_and_fisher_matrices_of_the_padded_data_set(self, name: str) -> None:
        make, functions, patterns = MODELS[name]
        model = make()
        params = chosen(model, patterns[1:])
        arguments = dict(**functions(model), params=params, data=ragged(sentences()))
        with sdpa_kernel(SDPBackend.MATH):
            logits, labels = logits_and_labels(name, model, sentences())
            valid = labels != -100
            J, p = (
                rows(logits[valid], params).view(-1, VOCABULARY, sum(map(Tensor.numel, params.values()))),
                logits[valid],
            )
            terms = rows(F.cross_entropy(logits[valid], labels[valid], reduction="none"), params)
        p = p.detach().softmax(1)
        v = vector(J.shape[2])
        Jv = J @ v
        middle = p * Jv - p * (p * Jv).sum(1, keepdim=True)
        expected = torch.einsum("nip,ni->p", J, middle) / valid.sum()
        for operator in (GGNLinearOperator, FisherLinearOperator):
            assert_equal(operator.from_functions(**arguments) @ v.numpy(), expected)
        second, mean = terms.T @ (terms @ v) / valid.sum(), terms.mean(0)  # an example is a token
        assert_equal(EFLinearOperator.from_functions(**arguments) @ v.numpy(), second)
        C = GradientCovarianceLinearOperator.from_functions(**arguments)
        assert_equal(C @ v.numpy(), second - mean * (mean @ v))

    @pytest.mark.default_cases("gpt2", "t5")
    def test_the_models_own_loss_is_the_same(self, name: str) -> None:
        make, functions, patterns = MODELS[name]
        model = make()
        params = chosen(model, patterns)
        H = HessianLinearOperator.from_functions(**functions(model), params=params, data=ragged(sentences()))
        gradient, loss = H.gradient_and_loss()
        with sdpa_kernel(SDPBackend.MATH):
            own = model(**sentences()).loss
        assert abs(loss - own.item()) < 1e-5 * loss
        assert_equal(gradient, rows(own[None], params)[0], 1e-5)
        assert_equal(H @ vector(H.shape[1]).numpy(), product_by_hand(own, params, vector(H.shape[1])), 1e-5)

    @pytest.mark.default_cases("gpt2", "t5")
    def test_gradient_checkpointing(self, name: str) -> None:
        make, functions, patterns = MODELS[name]
        model = make()
        params = chosen(model, patterns)
        arguments = dict(**functions(model), params=params, data=ragged(sentences()))
        v = vector(sum(map(Tensor.numel, params.values()))).numpy()
        expected = [kind.from_functions(**arguments) @ v for kind in (HessianLinearOperator, GGNLinearOperator)]
        model.train()  # transformers recomputes layers in training mode only; there is no dropout
        model._activation_checkpointing_enable()
        layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
        assert layers
        for kind, product in zip((HessianLinearOperator, GGNLinearOperator), expected, strict=True):
            close(kind.from_functions(**arguments) @ v, product)
        assert model.training
        assert all(layer.gradient_checkpointing for layer in layers)

    @pytest.mark.default_cases("gpt2")
    def test_operators_and_functions_pickle(self, name: str) -> None:
        make, functions, patterns = MODELS[name]
        model = make()
        G = GGNLinearOperator.from_functions(
            **functions(model), params=chosen(model, patterns), data=ragged(sentences())
        )
        v = vector(G.shape[1]).numpy()
        close(pickle.loads(pickle.dumps(G)) @ v, G @ v)


@pytest.mark.parametrize("both_names", [False, True])
def test_tied_embeddings_are_one_parameter(both_names: bool) -> None:
    model = gpt2()
    weight = model.transformer.wte.weight
    assert model.lm_head.weight is weight
    name = "lm_head.weight" if both_names else "transformer.wte.weight"
    H = HessianLinearOperator.from_functions(**causal_lm(model), params={name: weight}, data=ragged(sentences()))
    v = vector(H.shape[1])
    with sdpa_kernel(SDPBackend.MATH):
        loss = own_loss("gpt2", model, sentences())
        assert_equal(H @ v.numpy(), product_by_hand(loss, {name: weight}, v))


def test_the_jacobian_of_the_logits() -> None:
    model = gpt2()
    params, data = curvop.select(model, "*h.0.ln_1.*"), ragged(sentences())
    J = JacobianLinearOperator.from_functions(**causal_lm(model), params=params, data=data)
    with sdpa_kernel(SDPBackend.MATH):
        logits = [model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for batch in data]
        expected = torch.cat([rows(part[:, :-1].transpose(1, 2), params) for part in logits])
    assert_equal(J @ np.eye(J.shape[1]), expected)


def test_sentences_as_examples() -> None:
    """A plain function as the loss makes each index of the first dimension an example."""
    model = gpt2()
    params, whole = curvop.select(model, "*h.0.ln_1.*"), sentences()
    functions = causal_lm(model) | {"loss": lambda logits, batch: F.cross_entropy(logits, batch["labels"][:, 1:])}
    E = EFLinearOperator.from_functions(**functions, params=params, data=ragged(whole))
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits[:, :-1]
        terms = F.cross_entropy(logits.transpose(1, 2), whole["labels"][:, 1:], reduction="none").sum(1)
        G = rows(terms, params)
    assert_equal(E @ np.eye(E.shape[1]), G.T @ G / (whole["labels"][:, 1:] != -100).sum())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.slow_cases("t5")
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_adapters_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    make, functions, _ = MODELS[name]
    task, targets = ("CAUSAL_LM", ["c_attn"]) if name == "gpt2" else ("SEQ_2_SEQ_LM", ["q", "v"])
    adapters = peft.LoraConfig(
        r=2, target_modules=targets, fan_in_fan_out=name == "gpt2", lora_dropout=0.0, task_type=task
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(make(), adapters).double().eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # half of them are zero initially
                nn.init.normal_(parameter, std=0.1)
    params = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all("lora" in name for name in params)
    arguments = dict(**functions(model), params=params, data=ragged(sentences()))
    H, G = HessianLinearOperator.from_functions(**arguments), GGNLinearOperator.from_functions(**arguments)
    v = vector(H.shape[1])
    with sdpa_kernel(SDPBackend.MATH):
        loss = own_loss(name, model, sentences())
        assert_equal(H @ v.numpy(), product_by_hand(loss, params, v))
    assert curvop.check(G, rng=0, progress=False).verdict.startswith("sound")
    model.train()
    model.get_base_model()._activation_checkpointing_enable()
    assert_equal(HessianLinearOperator.from_functions(**arguments) @ v.numpy(), H @ v.numpy())


def test_batches_of_a_data_collator() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *"abcdefghi"])}
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=level, pad_token="<pad>", unk_token="<unk>")
    texts = ["a b c", "d e", "f g h i a", "b d f h"]
    features = [tokenizer(text, return_token_type_ids=False) for text in texts]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = torch.utils.data.DataLoader(features, batch_size=2, collate_fn=collate)
    model = gpt2()
    params = curvop.select(model, "*h.0.ln_1.*")
    functions = causal_lm(model)
    assert [functions["batch_weight"](batch) for batch in loader] == [3, 7]
    H = HessianLinearOperator.from_functions(**functions, params=params, data=loader)
    with sdpa_kernel(SDPBackend.MATH):
        terms = []
        for text in texts:  # sentence by sentence, without padding
            tokens = torch.tensor([[words[word] for word in text.split()]])
            terms.append(F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum"))
        loss = torch.stack(terms).sum() / 10
        v = vector(H.shape[1])
        assert_equal(H @ v.numpy(), product_by_hand(loss, params, v))


#: Settings of the configuration, labels, and the loss by hand.
CLASSIFICATION: dict[str, tuple[dict[str, Any], Tensor, Any]] = {
    "single label": (dict(num_labels=3), torch.tensor([0, 2, -100, 1, 1]), F.cross_entropy),
    "single label, given": (
        dict(num_labels=3, problem_type="single_label_classification"),
        torch.tensor([0, 2, -100, 1, 1]),
        F.cross_entropy,
    ),
    "multi label": (
        dict(num_labels=3),
        (torch.arange(15).view(5, 3) % 2).double(),
        F.binary_cross_entropy_with_logits,
    ),
    "regression": (
        dict(num_labels=1),
        torch.linspace(-1, 1, 5).double(),
        lambda z, y: F.mse_loss(z.squeeze(), y),
    ),
    "regression of several": (
        dict(num_labels=2, problem_type="regression"),
        torch.linspace(-1, 1, 10).double().view(5, 2),
        F.mse_loss,
    ),
}


class TestSequenceClassification:
    @pytest.mark.parametrize("kind", CLASSIFICATION)
    def test_the_loss_is_that_of_transformers(self, kind: str) -> None:
        settings, labels, loss_function = CLASSIFICATION[kind]
        model = seeded(lambda: transformers.BertForSequenceClassification(bert_config(**settings)).eval())()
        config, functions = model.config.to_dict(), sequence_classification(model)
        whole = transformers.BatchEncoding({**sentences(), "labels": labels})
        params = curvop.select(model, ["*layer.0*LayerNorm.*", "classifier.*"])
        H = HessianLinearOperator.from_functions(**functions, params=params, data=ragged(whole))
        v = vector(H.shape[1])
        inputs = {key: value for key, value in whole.items() if key != "labels"}
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_function(model(**inputs).logits, labels)
            assert_equal(H @ v.numpy(), product_by_hand(loss, params, v))
        assert abs(H.gradient_and_loss()[1] - loss.item()) < 1e-12
        assert model.config.to_dict() == config
        assert abs(model(**whole).loss.item() - loss.item()) < 1e-12  # transformers changes the configuration here

    def test_the_examples_are_sequences(self) -> None:
        settings, labels, *_ = CLASSIFICATION["multi label"]
        model = seeded(lambda: transformers.BertForSequenceClassification(bert_config(**settings)).eval())()
        whole = transformers.BatchEncoding({**sentences(), "labels": labels})
        params = curvop.select(model, "classifier.*")
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(**{key: value for key, value in whole.items() if key != "labels"}).logits
            G = rows(F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1), params)
        for kind in (None, "multi_label_classification"):  # a function, or a loss of torch.nn
            functions = sequence_classification(model, kind)
            E = EFLinearOperator.from_functions(**functions, params=params, data=ragged(whole))
            assert_equal(E @ np.eye(E.shape[1]), G.T @ G / labels.numel())

    def test_fisher_matrices_need_the_problem_type(self) -> None:
        model = seeded(lambda: transformers.BertForSequenceClassification(bert_config(num_labels=3)).eval())()
        arguments = dict(params=curvop.select(model, "classifier.*"), data=ragged(sentences()))
        with pytest.raises(ValueError, match="loss is no known log-likelihood"):
            FisherLinearOperator.from_functions(**sequence_classification(model), **arguments)
        functions = sequence_classification(model, "single_label_classification")
        FisherLinearOperator.from_functions(**functions, **arguments)
        with pytest.raises(ValueError, match="problem_type is 'single', but must be one of 'single_label"):
            sequence_classification(model, "single")


@seeded
def bart() -> nn.Module:
    sizes = dict(d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, max_position_embeddings=16)
    return transformers.BartForCausalLM(transformers.BartConfig(vocab_size=VOCABULARY, dropout=0.0, **sizes)).eval()


class TestTheOwnLossOfTheModel:
    """The loss is compared with the loss that the model computes, once."""

    def gradient_and_loss(self, functions: Any, data: Any, params: Any) -> Any:
        return HessianLinearOperator.from_functions(**functions, params=params, data=data).gradient_and_loss()

    def test_labels_that_the_model_does_not_shift(self) -> None:
        model, batch = bart(), sentences()
        params = curvop.select(model, "*final_layer_norm.*")
        own = model(**batch).loss
        expected = torch.cat([part.reshape(-1) for part in torch.autograd.grad(own, list(params.values()))])
        match = rf"BartForCausalLM itself computes {str(own.item())[:5]}.*use .*masked_lm"
        with pytest.raises(ValueError, match=match):
            self.gradient_and_loss(causal_lm(model), [batch], params)
        gradient, loss = self.gradient_and_loss(masked_lm(model), [batch], params)
        assert abs(loss - own.item()) < 1e-5 * loss
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    def test_losses_of_experts(self) -> None:
        model = gpt2()
        model.config.output_router_logits = True
        with pytest.raises(ValueError, match=r"load-balancing loss.*output_router_logits = False"):
            self.gradient_and_loss(causal_lm(model), ragged(sentences()), curvop.select(model, "*h.0.ln_1.*"))

    def test_classes_as_probabilities(self) -> None:
        """DeBERTa computes a cross-entropy with probabilities where other models compute a binary cross-entropy."""
        config = transformers.DebertaV2Config(
            **SMALL | dict(num_hidden_layers=1), intermediate_size=8, max_position_embeddings=8, num_labels=3
        )
        model = seeded(lambda: transformers.DebertaV2ForSequenceClassification(config).eval())()
        settings = model.config.to_dict()
        labels = (torch.arange(15).view(5, 3) % 2).double()
        whole = transformers.BatchEncoding({**sentences(), "labels": labels})
        params = curvop.select(model, "classifier.*")
        with pytest.raises(ValueError, match=r"DebertaV2ForSequenceClassification itself computes.*problem_type="):
            self.gradient_and_loss(sequence_classification(model), [whole], params)
        functions = sequence_classification(model, "multi_label_classification")
        logits = model(**{key: value for key, value in whole.items() if key != "labels"}).logits
        expected = F.binary_cross_entropy_with_logits(logits, labels)
        assert abs(self.gradient_and_loss(functions, [whole], params)[1] - expected.item()) < 1e-12
        assert model.config.to_dict() == settings
        whole["labels"] = torch.tensor([0, 1, -1, 2, 0])
        with pytest.raises(ValueError, match=r"Target -1 .*labels must be numbers of classes, or -100"):
            self.gradient_and_loss(sequence_classification(model), [whole], params)

    def test_is_computed_once(self) -> None:
        model, with_labels = gpt2(), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: with_labels.append("labels" in kwargs), with_kwargs=True
        )
        params = curvop.select(model, "*h.0.ln_1.*")
        G = GGNLinearOperator.from_functions(**causal_lm(model), params=params, data=ragged(sentences()), cache=0)
        G @ np.ones(16)
        first = len(with_labels)
        assert sum(with_labels) == 1
        G @ np.ones(16)
        assert sum(with_labels[first:]) == 0

    def test_dropout_is_named(self) -> None:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=8, bos_token_id=0, **SMALL)).double()
        G = GGNLinearOperator.from_functions(
            **causal_lm(model), params=curvop.select(model, "*h.0.ln_1.*"), data=ragged(sentences()), cache=0
        )
        with pytest.raises(curvop.NonDeterministicObjectiveError, match="dropout is active"):
            G @ np.ones((16, 2))

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    def test_positions_of_prompts(self) -> None:
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(gpt2(), config).double().eval()
        params = {name: value for name, value in model.named_parameters() if value.requires_grad}
        with pytest.raises(ValueError, match=r"logits have shape \(5, 8, 11\), but .* \(5, 6\): prompts of peft"):
            self.gradient_and_loss(causal_lm(model), [sentences()], params)

    def test_models_without_a_head(self) -> None:
        model = gpt2().transformer
        with pytest.raises(TypeError, match="a GPT2Model returns no logits: pass a model with a head"):
            self.gradient_and_loss(causal_lm(model), ragged(sentences()), curvop.select(model, "h.0.ln_1.*"))


class TestErrors:
    def product(self, data: Any = None, params: Any = None) -> Any:
        model = gpt2()
        H = HessianLinearOperator.from_functions(
            **causal_lm(model),
            params=params or curvop.select(model, "*h.0.ln_1.*"),
            data=ragged(sentences()) if data is None else data,
        )
        return H @ np.ones(H.shape[1])

    def test_no_labels(self) -> None:
        data = [{key: value for key, value in sentences().items() if key != "labels"}]
        with pytest.raises(ValueError, match=r"has no tensor 'labels' .*'input_ids'.*DataCollatorForLanguageModeling"):
            self.product(data)

    def test_batches_that_are_no_mappings(self) -> None:
        with pytest.raises(TypeError, match="a batch is a tuple, but must be a mapping"):
            self.product([(sentences()["input_ids"], sentences()["labels"])])

    def test_parameters_that_the_model_does_not_have(self) -> None:
        with pytest.raises(ValueError, match=r"no parameter is named 'h.0.ln_1.weight'; did you mean 'transformer"):
            self.product(params={"h.0.ln_1.weight": torch.ones(8, dtype=torch.float64)})

    @pytest.mark.parametrize("functions", [causal_lm, masked_lm, seq2seq_lm, sequence_classification])
    def test_names_instead_of_models(self, functions: Any) -> None:
        with pytest.raises(TypeError, match="model is a str: pass a model of transformers"):
            functions("gpt2")

    def test_no_inputs_of_the_decoder(self) -> None:
        model = gpt2()
        H = HessianLinearOperator.from_functions(
            **seq2seq_lm(model), params=curvop.select(model, "*h.0.ln_1.*"), data=ragged(sentences())
        )
        with pytest.raises(TypeError, match="no 'decoder_input_ids', and a GPT2LMHeadModel cannot compute them"):
            H @ np.ones(16)


def test_transformers_is_not_imported() -> None:
    code = "import sys, curvop; print(curvop.huggingface.causal_lm, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "False"

"""Predictions and losses of Hugging Face models, for the class methods ``from_functions`` of the operators."""

from curvop.operators.huggingface_objectives import causal_lm, masked_lm, seq2seq_lm, sequence_classification

__all__ = ["causal_lm", "masked_lm", "seq2seq_lm", "sequence_classification"]

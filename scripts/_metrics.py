"""Metrics of finetune.py as evaluate.Metric classes of its own: evaluate.load would fetch them from the Hub."""

from __future__ import annotations

import math

import evaluate
import numpy as np
from datasets import Features, Value


class Accuracy(evaluate.Metric):
    """Share of predicted labels that are right. Predictions and references: integer labels."""

    def _info(self):
        features = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TokenLikelihood(evaluate.Metric):
    """Perplexity and bits per token.

    Predictions: summed negative log-likelihood of each sequence, in nats. References: how many tokens it predicts.
    """

    def _info(self):
        features = Features({"predictions": Value("float64"), "references": Value("int64")})
        return evaluate.MetricInfo(self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        nats = float(np.sum(predictions) / np.sum(references))
        return {"perplexity": math.exp(min(nats, 700.0)), "bits_per_token": nats / math.log(2)}  # exp(710) overflows

"""Metrics of finetune.py as evaluate.Metric classes of its own: evaluate.load would fetch them from the Hub."""

from __future__ import annotations

import math

import evaluate
import numpy as np
from datasets import Features, List, Value


class _Metric(evaluate.Metric):
    """An evaluate.Metric of which only the types of a prediction and a reference need to be said."""

    prediction = reference = Value("int64")

    def _info(self):
        features = Features({"predictions": self.prediction, "references": self.reference})
        return evaluate.MetricInfo(self.__doc__, citation="", inputs_description="", features=features)


class Accuracy(_Metric):
    """Share of predicted labels that are right. Predictions and references: integer labels."""

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TokenLikelihood(_Metric):
    """Perplexity and bits per token.

    Predictions: summed negative log-likelihood of each sequence, in nats. References: how many tokens it predicts.
    """

    prediction = Value("float64")

    def _compute(self, predictions, references):
        nats = float(np.sum(predictions) / np.sum(references))
        return {"perplexity": math.exp(min(nats, 700.0)), "bits_per_token": nats / math.log(2)}  # exp(710) overflows


class WordLabels(_Metric):
    """Share of words whose label is right, and, if the labels mark entities (B-PER, I-PER, ..., O), the precision,
    recall and F1 of whole entities (as CoNLL 2000 scores them, by seqeval).

    Predictions and references: the names of each sequence's labels.
    """

    prediction = reference = List(Value("string"))

    def _compute(self, predictions, references):
        pairs = [pair for both in zip(predictions, references, strict=True) for pair in zip(*both, strict=True)]
        scores = {"accuracy": sum(ours == theirs for ours, theirs in pairs) / max(len(pairs), 1)}
        if all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for pair in pairs for name in pair):
            from seqeval.metrics import f1_score, precision_score, recall_score

            scored = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
            scores |= {name: float(score(references, predictions, zero_division=0)) for name, score in scored.items()}
        return scores


class GeneratedText(_Metric):
    """BLEU and chrF, 0 to 100 (sacrebleu), and the share of texts that are exactly right."""

    prediction = reference = Value("string")

    def _compute(self, predictions, references):
        import sacrebleu

        return {
            "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
            "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
            "exact_match": sum(map(str.__eq__, predictions, references)) / len(references),
        }


class Cosine(_Metric):
    """Mean cosine of embeddings and their targets. Predictions: the cosines; references are not used."""

    prediction = Value("float64")

    def _compute(self, predictions, references):
        return {"cosine": float(np.mean(predictions))}


# for these the lower is the better; for all other metrics the higher
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_token")

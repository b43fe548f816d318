"""What tasks are judged by, as their benchmarks define it."""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["classification", "correlation", "exact_match", "rouge_l"]


def classification(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """accuracy and mcc (Matthews correlation, CoLA's metric; 0 for a constant answer).

    Of two classes also f1, that of class 1: with accuracy the metric of MRPC and QQP.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    out = {
        "accuracy": float(np.mean(truth == predicted)),
        "mcc": float(matthews_corrcoef(truth, predicted)),
    }
    if classes == 2:
        out["f1"] = float(f1_score(truth, predicted, zero_division=0))
    return out


def correlation(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """pearson and spearman, and their mean (STS-B's metric); 0 for a constant answer."""
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant answer has no correlation
        found = [pearsonr(truth, predicted)[0], spearmanr(truth, predicted)[0]]
    pearson, spearman = (float(np.nan_to_num(x)) for x in found)
    return {"pearson": pearson, "spearman": spearman, "correlation": (pearson + spearman) / 2}


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Largest Rouge-L F1 over the references, stemmed, as Natural Instructions scores it."""
    score = _rouge_scorer().score
    return max(float(score(target=r, prediction=prediction)["rougeL"].fmeasure) for r in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references up to case, punctuation and spaces."""
    return float(any(_plain(prediction) == _plain(reference) for reference in references))


def _plain(text: str) -> str:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(kept.split())


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    build: Callable[..., Any] = RougeScorer
    return build(["rougeL"], use_stemmer=True)

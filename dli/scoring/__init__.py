"""Counts, scores and comparisons."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "metrics": "Comparison Counts compare count_batch counts_table influence scores summarize",
    "scorer": "BadPredictions fold_table read_folds score score_counts",
})

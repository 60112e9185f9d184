"""Metrics of a classifier's predictions, as the paper reports them (arXiv 2401.11647 v4)."""

import warnings

import numpy as np
from sklearn import metrics

from lwfedssl_jax.base import Int


def classification_metrics(labels: Int[np.ndarray, ' N'], predicted: Int[np.ndarray, ' N']) -> dict[str, float]:
  """Compares predictions with labels, both class numbers.

  Returns:
    `accuracy`; `mean_per_class_accuracy` over the classes among the labels; `macro_precision`, `macro_recall` and
    `macro_f1` over all classes among labels or predictions, with 0 for a class without predictions (or without labels).
    All in [0, 1].
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # classes that are only predicted, or one class alone
    balanced = metrics.balanced_accuracy_score(labels, predicted)
  precision, recall, f1, _ = metrics.precision_recall_fscore_support(
    labels, predicted, average='macro', zero_division=0
  )
  return {
    'accuracy': float((labels == predicted).mean()),
    'mean_per_class_accuracy': float(balanced),
    'macro_precision': float(precision),
    'macro_recall': float(recall),
    'macro_f1': float(f1),
  }

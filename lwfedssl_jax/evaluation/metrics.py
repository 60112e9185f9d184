"""Metrics of a classifier's predictions, as the paper reports them (arXiv 2401.11647 v4)."""

import numpy as np
from sklearn import metrics

from lwfedssl_jax.base import Int


def classification_metrics(
  labels: Int[np.ndarray, ' N'], predicted: Int[np.ndarray, ' N'], num_classes: int
) -> dict[str, float]:
  """Compares predictions with labels, both 0 .. num_classes - 1.

  Returns:
    `accuracy`; `mean_per_class_accuracy` over the classes among the labels; `macro_precision`, `macro_recall` and
    `macro_f1` over all classes among labels or predictions, with 0 for a class without predictions (or without labels).
    All in [0, 1].
  """
  counts = metrics.confusion_matrix(labels, predicted, labels=np.arange(num_classes))
  occurs = counts.sum(axis=1) > 0
  precision, recall, f1, _ = metrics.precision_recall_fscore_support(
    labels, predicted, average='macro', zero_division=0
  )
  return {
    'accuracy': float((labels == predicted).mean()),
    'mean_per_class_accuracy': float((np.diagonal(counts)[occurs] / counts.sum(axis=1)[occurs]).mean()),
    'macro_precision': float(precision),
    'macro_recall': float(recall),
    'macro_f1': float(f1),
  }

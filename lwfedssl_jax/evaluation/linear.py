"""Linear probe: multinomial logistic regression on frozen, standardized embeddings."""

import warnings

import numpy as np
from sklearn import exceptions, linear_model, model_selection, pipeline, preprocessing

from lwfedssl_jax import rng

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
DEFAULT_INVERSE_PENALTY = 0.1
VALIDATION_SHARE = 0.2


def _fit(inverse_penalty: float, rows: np.ndarray, labels: np.ndarray) -> pipeline.Pipeline:
  classifier = linear_model.LogisticRegression(C=inverse_penalty, max_iter=300)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)  # the weakest penalties may not converge
    return pipeline.make_pipeline(preprocessing.StandardScaler(), classifier).fit(rows, labels)


def choose_inverse_penalty(rows: np.ndarray, labels: np.ndarray, seed: int) -> float:
  """Returns the best candidate on a stratified, held-out fifth of the rows (N, D); ties go to the strongest penalty.

  If a class has fewer than five rows, nothing can be held out, and the default is returned.
  """
  if np.bincount(labels)[np.unique(labels)].min() < 1 / VALIDATION_SHARE:
    return DEFAULT_INVERSE_PENALTY
  parts = model_selection.train_test_split(
      rows, labels, test_size=VALIDATION_SHARE, stratify=labels,
      random_state=rng.host_seed(seed, rng.Stream.PROBE_SPLIT))
  train_rows, valid_rows, train_labels, valid_labels = parts
  score = lambda inverse: _fit(inverse, train_rows, train_labels).score(valid_rows, valid_labels)
  return max(INVERSE_PENALTIES, key=score)


def predict(rows: np.ndarray, labels: np.ndarray, queries: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
  """Fits on rows (N, D) and labels (N,), with the penalty chosen on a held-out part; classifies queries (Q, D).

  Args:
    rows: float32 embeddings.
    labels: int; with one class, all queries are assigned to it.
    queries: float32 embeddings, not used for any choice.
    seed: of the held-out part.

  Returns:
    (Q,) predicted labels, and the chosen inverse penalty C.
  """
  if len(np.unique(labels)) == 1:
    return np.full(len(queries), labels[0]), DEFAULT_INVERSE_PENALTY
  inverse = choose_inverse_penalty(rows, labels, seed)
  return _fit(inverse, rows, labels).predict(queries), inverse

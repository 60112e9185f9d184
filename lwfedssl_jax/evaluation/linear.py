"""Linear probe: multinomial logistic regression on frozen, standardized embeddings."""

import warnings

import numpy as np
from sklearn import exceptions, linear_model, model_selection, pipeline, preprocessing

from lwfedssl_jax import rng
from lwfedssl_jax.base import Float, Int

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
DEFAULT_INVERSE_PENALTY = 0.1
VALIDATION_SHARE = 0.2


def _fit(inverse_penalty: float, rows: Float[np.ndarray, 'N D'], labels: Int[np.ndarray, ' N']) -> pipeline.Pipeline:
  classifier = linear_model.LogisticRegression(C=inverse_penalty, max_iter=300)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)  # the weakest penalties may not converge
    return pipeline.make_pipeline(preprocessing.StandardScaler(), classifier).fit(rows, labels)


def choose_inverse_penalty(rows: Float[np.ndarray, 'N D'], labels: Int[np.ndarray, ' N'], seed: int) -> float:
  """Returns the candidate that does best on a fifth of the rows, held out by class; ties go to the strongest.

  If a class has fewer than five rows, nothing can be held out, and the default is returned.
  """
  if np.bincount(labels)[np.unique(labels)].min() < 1 / VALIDATION_SHARE:
    return DEFAULT_INVERSE_PENALTY
  parts = model_selection.train_test_split(
    rows, labels, test_size=VALIDATION_SHARE, stratify=labels, random_state=rng.host_seed(seed, rng.Stream.PROBE_SPLIT)
  )
  train_rows, valid_rows, train_labels, valid_labels = parts

  def score(inverse):
    return _fit(inverse, train_rows, train_labels).score(valid_rows, valid_labels)

  return max(INVERSE_PENALTIES, key=score)


def predict(
  rows: Float[np.ndarray, 'N D'], labels: Int[np.ndarray, ' N'], queries: Float[np.ndarray, 'Q D'], seed: int
) -> tuple[Int[np.ndarray, ' Q'], float]:
  """Fits on rows and labels, the penalty chosen on a held-out part of them; classifies queries.

  Args:
    rows: embeddings.
    labels: at least two classes, or all queries get the one there is.
    queries: embeddings that take no part in any choice.
    seed: of the held-out part.

  Returns:
    The predicted labels, and the inverse penalty C that was chosen.
  """
  if len(np.unique(labels)) == 1:
    return np.full(len(queries), labels[0]), DEFAULT_INVERSE_PENALTY
  inverse = choose_inverse_penalty(rows, labels, seed)
  return _fit(inverse, rows, labels).predict(queries), inverse

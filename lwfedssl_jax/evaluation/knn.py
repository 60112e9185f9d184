"""Weighted k-nearest-neighbor classification on frozen embeddings (Wu et al. 2018, arXiv 1805.01978)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.evaluation import embeddings

NEIGHBORS = 200
TEMPERATURE = 0.1


@functools.partial(jax.jit, static_argnums=(3, 4))
def _votes(bank, bank_labels, queries, neighbors, num_classes):
  # In bfloat16, a TPU's default, embeddings with a large common mean lose most of their nearest neighbors.
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  similarity, index = jax.lax.top_k(product('qd,nd->qn', queries, bank), neighbors)
  weights = jnp.exp(similarity / TEMPERATURE)
  return product('qk,qkc->qc', weights, jax.nn.one_hot(bank_labels[index], num_classes)).argmax(axis=1)


def knn_predict(bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, num_classes: int) -> np.ndarray:
  """Classifies queries (Q, D) by the labeled bank (N, D): cosine, k = min(200, N), weights exp(similarity / 0.1).

  Returns:
    (Q,) int predicted labels.
  """
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  bank, queries = jnp.asarray(unit(bank)), unit(queries)
  bank_labels, neighbors = jnp.asarray(bank_labels), min(NEIGHBORS, len(bank))
  return embeddings.in_batches(lambda batch: _votes(bank, bank_labels, batch, neighbors, num_classes), queries)


def knn_accuracy(
    bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, num_classes: int
) -> float:
  """Returns the share of queries that `knn_predict` classifies correctly, in [0, 1]."""
  return float((knn_predict(bank, bank_labels, queries, num_classes) == query_labels).mean())

"""Weighted k-nearest-neighbor classification on frozen embeddings (Wu et al. 2018, arXiv 1805.01978)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Array, Float, Int
from lwfedssl_jax.evaluation import embeddings

NEIGHBORS = 200
TEMPERATURE = 0.1


@functools.partial(jax.jit, static_argnums=(3, 4))
def _votes(
  bank: Float[Array, 'N D'],
  bank_labels: Int[Array, ' N'],
  queries: Float[Array, 'Q D'],
  neighbors: int,
  num_classes: int,
) -> Int[Array, ' Q']:
  # In bfloat16, the default on TPU, embeddings with a large common mean lose most of their true neighbors.
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  similarity, index = jax.lax.top_k(product('qd,nd->qn', queries, bank), neighbors)
  weights = jnp.exp(similarity / TEMPERATURE)
  return product('qk,qkc->qc', weights, jax.nn.one_hot(bank_labels[index], num_classes)).argmax(axis=1)


def knn_predict(
  bank: Float[np.ndarray, 'N D'],
  bank_labels: Int[np.ndarray, ' N'],
  queries: Float[np.ndarray, 'Q D'],
  num_classes: int,
) -> Int[np.ndarray, ' Q']:
  """Classifies queries by the labeled bank: cosine, k = min(200, N), weights exp(similarity / 0.1).

  Returns:
    The predicted labels.
  """
  unit_bank, unit_queries = jnp.asarray(_unit(bank)), _unit(queries)
  labels, neighbors = jnp.asarray(bank_labels), min(NEIGHBORS, len(bank))
  return embeddings.in_batches(lambda batch: _votes(unit_bank, labels, batch, neighbors, num_classes), unit_queries)


def _unit(rows: Float[np.ndarray, 'N D']) -> Float[np.ndarray, 'N D']:
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def knn_accuracy(
  bank: Float[np.ndarray, 'N D'],
  bank_labels: Int[np.ndarray, ' N'],
  queries: Float[np.ndarray, 'Q D'],
  query_labels: Int[np.ndarray, ' Q'],
  num_classes: int,
) -> float:
  """Share of queries that `knn_predict` gets right, in [0, 1]."""
  return float((knn_predict(bank, bank_labels, queries, num_classes) == query_labels).mean())

"""Pooled embeddings of images, in batches; one executable serves every depth of equal blocks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lwfedssl_jax import block_trees, devices
from lwfedssl_jax.base import Array, Encoder, Float, Integer, Params, Shaped, UInt8
from lwfedssl_jax.data import augment

jitted = functools.lru_cache(maxsize=8)(jax.jit)  # callers share compiled functions


def in_batches(
  run: Callable[[np.ndarray], Any], rows: Shaped[np.ndarray, 'N ...'], batch_size: int = 256
) -> Shaped[np.ndarray, 'N ...']:
  """Applies `run` to rows, N at least 1, in batches of one size, the last one padded; joins the results."""
  results = []
  for first in range(0, len(rows), batch_size):
    batch = rows[first : first + batch_size]
    padding = [(0, batch_size - len(batch))] + [(0, 0)] * (rows.ndim - 1)
    results.append(run(np.pad(batch, padding)))
    if len(results) > 1:  # fetched while the next batch is computed
      results[-2] = np.asarray(results[-2])
  return np.concatenate(results)[: len(rows)]


@functools.lru_cache(maxsize=4)
def make_embedder(
  encoder: Encoder, mesh: Mesh | None = None, batch_size: int = 256
) -> Callable[[Params, UInt8[np.ndarray, 'N H W C'], int], Float[np.ndarray, 'N D']]:
  """Builds (params, images, depth) -> embeddings, float32, after `depth` blocks.

  Every batch is sharded over the mesh; in every process the caller receives all embeddings.
  """
  is_sharded = mesh is not None and batch_size % mesh.size == 0
  batch_sharding = devices.sharding(mesh, PartitionSpec(devices.AXIS) if is_sharded else PartitionSpec())

  @functools.partial(jax.jit, out_shardings=devices.sharding(mesh))
  def embed_batch(params: Params, images: UInt8[Array, 'B H W C'], depth: Integer) -> Float[Array, 'B D']:
    tokens = encoder.embed(params['embedding'], augment.normalize(augment.to_float(images)))
    return encoder.pool(params['norm'], encoder.prefix(params['blocks'], tokens, depth))

  def embed(params: Params, images: UInt8[np.ndarray, 'N H W C'], depth: int) -> Float[np.ndarray, 'N D']:
    if not len(images):
      return np.zeros((0, encoder.width), np.float32)

    read = dict(params, blocks=block_trees.readable(params['blocks'], depth))

    def run(batch):
      return embed_batch(read, devices.put(batch, batch_sharding), np.int32(depth))

    return in_batches(run, images, batch_size)

  return embed


def collapse_metrics(embeddings: Float[np.ndarray, 'N D']) -> dict[str, float]:
  """Collapse metrics of embeddings.

  Returns:
    `embedding_std`: mean over dimensions of the standard deviation of the l2-normalized rows, times sqrt(D): near 1
      for uniformly distributed directions, 0 for a collapse to one point (SimSiam, arXiv 2011.10566).
    `effective_rank`: exp of the entropy of the normalized singular values of the centered rows, between 1 and D
      (RankMe, arXiv 2210.02885, on centered rows).
  """
  rows = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
  singular = np.linalg.svd(embeddings - embeddings.mean(axis=0), compute_uv=False)
  shares = singular / max(singular.sum(), 1e-12)
  entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-12)))
  return {
    'embedding_std': float(rows.std(axis=0).mean() * np.sqrt(rows.shape[1])),
    'effective_rank': float(np.exp(entropy)),
  }

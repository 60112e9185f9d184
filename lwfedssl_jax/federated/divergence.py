"""Distance between client models: from the accepted clients' uploads to their weighted mean, relative to its norm.

`sqrt(sum_k p_k ||w_k - m||^2) / ||m||` with `m = sum_k p_k w_k`, over all active parameters; weights p_k are shares of
images. Relative as the weight divergence of arXiv 1806.00582, which compares with centrally trained weights instead.

Sums over clients suffice, so uploads are added a chunk at a time and none is kept. With d_k = w_k - w from the global
parameters w: `sum_k p_k ||w_k - m||^2 = sum_k p_k ||d_k||^2 - ||m - w||^2`. Differences from w are small, which keeps
the float32 subtraction exact enough: an error of 1e-6 of the larger term.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax.base import Array, Float, Raveled, Scalar
from lwfedssl_jax.federated import aggregation
from lwfedssl_jax.federated.aggregation import Aggregator, Tally, Uploads


class DivergenceSums(NamedTuple):
  """Sums over the clients of a round that are added so far, with their weights.

  Attributes:
    squares: squared distances from the global parameters.
    params: parameters; None where the aggregator returns their mean.
  """

  squares: Scalar
  params: Raveled | None


def init(aggregator: Aggregator, global_params: Raveled) -> DivergenceSums:
  """Returns sums over no client."""
  params = None if aggregator.returns_mean else jax.tree.map(jnp.zeros_like, global_params)
  return DivergenceSums(jnp.float32(0), params)


def add(sums: DivergenceSums, uploads: Uploads, global_params: Raveled) -> DivergenceSums:
  """Adds clients; those that are not accepted count nothing, even if not finite."""
  weights = jnp.where(uploads.accepted, uploads.weights, 0)
  squares = sum(
    jnp.square(leaf - start).sum(axis=1)
    for leaf, start in zip(jax.tree.leaves(uploads.params), jax.tree.leaves(global_params), strict=True)
  )
  total = sums.squares + jnp.where(weights > 0, weights * squares, 0).sum()
  if sums.params is None:
    return DivergenceSums(total, None)
  return DivergenceSums(total, jax.tree.map(jnp.add, sums.params, aggregation.weighted_sum(weights, uploads.params)))


def finish(
  sums: DivergenceSums,
  tally: Tally,
  aggregated: Raveled,
  global_params: Raveled,
  axis: str | None = None,
  exists: Raveled | None = None,
) -> Float[Array, '']:
  """Returns the relative distance, at least 0; 0 for fewer than two accepted clients.

  Args:
    sums: over this device's clients.
    tally: over all clients.
    aggregated: what the aggregator returned.
    global_params: the parameters that clients received.
    axis: mesh axis over which clients are sharded.
    exists: 1 for a parameter that exists in the stage, 0 for one that does not; None: all exist.
  """
  share = jnp.maximum(tally.accepted_weight, 1e-12)
  total = DivergenceSums(*(sums if axis is None else jax.lax.psum(sums, axis)))
  mean = aggregated if total.params is None else jax.tree.map(lambda leaf: leaf / share, total.params)
  if exists is not None:
    mean, global_params = (jax.tree.map(jnp.multiply, tree, exists) for tree in (mean, global_params))
  moved = optax.tree.norm(jax.tree.map(jnp.subtract, mean, global_params), squared=True)
  square = jnp.maximum(total.squares / share - moved, 0)
  distance = jnp.sqrt(square) / jnp.maximum(optax.tree.norm(mean), 1e-12)
  return jnp.where(tally.num_accepted > 1, distance, 0)

"""What the server makes of the clients' updates: which it trusts, and how it puts them together.

FedAvg's mean weighted by images (arXiv 1602.05629) needs one client at a time. The coordinate-wise median and trimmed
mean (arXiv 1803.01498) bear clients that lie, weigh all alike, and need all updates side by side.
"""

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Params


def is_sound(update: Params, loss: jax.Array, loss_limit: jax.Array) -> jax.Array:
  """Whether a client's parameters are finite and its loss is finite and at most the limit; () bool."""
  finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(update)]).all()
  return finite & jnp.isfinite(loss) & (loss <= loss_limit)


def clip_update(trained: Params, received: Params, max_norm: float) -> Params:
  """Shortens trained - received to `max_norm` in the l2 norm over all leaves; 0 leaves it alone."""
  if not max_norm:
    return trained
  update = jax.tree.map(jnp.subtract, trained, received)
  norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(update)))
  scale = jnp.minimum(1, max_norm / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda start, change: start + scale * change, received, update)


def weighted_sum(weights: jax.Array, stacked: Params) -> Params:
  """Sums leaves (K, ...) with weights (K,) in float32; a client of weight 0 is never multiplied in."""
  def leaf_sum(leaf):
    per_client = weights.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(per_client > 0, per_client * leaf, 0).sum(axis=0)

  return jax.tree.map(leaf_sum, stacked)


def order_statistic(rule: str, trim_fraction: float, accepted: jax.Array, stacked: Params) -> Params:
  """Coordinate-wise median or trimmed mean over the accepted clients.

  Args:
    rule: `median` or `trimmed_mean`.
    trim_fraction: of `trimmed_mean`, the share of clients left out at either end, rounded down; below 0.5.
    accepted: (K,) bool, at least one.
    stacked: leaves (K, ...).
  """
  count = accepted.sum()
  trim = (count - 1) // 2 if rule == 'median' else jnp.floor(trim_fraction * count).astype(count.dtype)

  def leaf_statistic(leaf):
    mask = accepted.reshape((-1,) + (1,) * (leaf.ndim - 1))
    ascending = jnp.sort(jnp.where(mask, leaf, jnp.inf), axis=0)  # the others last
    rank = jnp.arange(len(accepted)).reshape(mask.shape)
    kept = (rank >= trim) & (rank < count - trim)
    return jnp.where(kept, ascending, 0).sum(axis=0) / jnp.maximum(count - 2 * trim, 1)

  return jax.tree.map(leaf_statistic, stacked)

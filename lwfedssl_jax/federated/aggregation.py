"""Validity and aggregation of client updates.

FedAvg's mean weighted by images (arXiv 1602.05629) adds one client at a time. The coordinate-wise median and trimmed
mean (arXiv 1803.01498) are robust to Byzantine clients, are unweighted, and hold all of a round's parameters at once.
L-DAWA scales a client's tensors before the mean (ldawa.py).

An aggregator is `init`, `add` and `finish`; `register_aggregator` adds a further rule (docs/extending.md).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import trees
from lwfedssl_jax.base import Array, Bool, Float, Int, Integer, Number, Params, Raveled, Scalar, Shaped, Stacked
from lwfedssl_jax.catalog import AGGREGATIONS
from lwfedssl_jax.config_groups import MethodConfig
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import ldawa


class Uploads(NamedTuple):
  """The uploads of K clients of a round.

  Attributes:
    params: their active parameters, raveled and stacked, (K, n) each.
    weights: share of the images of all clients that returned; 0 for a client that did not.
    accepted: False for a client that did not return, or whose parameters or loss are not valid.
    kept: the numbers of the blocks that each trained, where they differ (`aggregation_by_block`).
  """

  params: Stacked
  weights: Float[Array, ' K']
  accepted: Bool[Array, ' K']
  kept: Int[Array, 'K n'] | None = None


class Tally(NamedTuple):
  """Sums over all clients of a round: accepted, rejected, and the weight of the accepted."""

  num_accepted: Scalar
  num_rejected: Scalar
  accepted_weight: Scalar


class Aggregator(NamedTuple):
  """A rule of aggregation, over any number of calls of `add`.

  Attributes:
    init: (global params, raveled; number of clients) -> state.
    add: (state, Uploads of some clients, position of the first of them) -> state.
    finish: (state, accepted (K,) of all clients, Tally) -> aggregated parameters, raveled; undefined if no client is
      accepted (see `aggregate_or_keep`).
    weigh: (images of each client (K,), 0-based round of the stage) -> numbers that stand for them in the clients'
      weights; None: the images.
    prepare: (a client's active parameters, those that it received, round of the stage) -> parameters to add, all of
      them trees; None: as they are.
    returns_mean: `finish` returns the mean of the accepted uploads by weight, so that the round need not sum them once
      more for their distance (see divergence.py).
  """

  init: Callable[[Raveled, int], Any]
  add: Callable[[Any, Uploads, Any], Any]
  finish: Callable[[Any, Bool[Array, ' K'], Tally], Raveled]
  weigh: Callable[[Int[Array, ' K'], Integer], Int[Array, ' K']] | None = None
  prepare: Callable[[Params, Params, Integer], Params] | None = None
  returns_mean: bool = False


def is_valid_update(params: Params, loss: Scalar, loss_limit: Number) -> Bool[Array, '']:
  """Whether a client's parameters are finite and its loss is finite and at most the limit."""
  finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
  return finite & jnp.isfinite(loss) & (loss <= loss_limit)


def clip_update(client_params: Raveled, global_params: Raveled, max_norm: float) -> Raveled:
  """Clips client - global parameters to the l2 norm `max_norm` over all leaves; 0: no clipping."""
  if not max_norm:
    return client_params
  delta = jax.tree.map(jnp.subtract, client_params, global_params)
  norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(delta)))
  scale = jnp.minimum(1, max_norm / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda start, change: start + scale * change, global_params, delta)


def _per_client(values: Shaped[Array, ' K'], leaf: Float[Array, 'K ...']) -> Shaped[Array, 'K ...']:
  return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def weighted_sum(weights: Float[Array, ' K'], stacked: Stacked) -> Raveled:
  """Sums leaves (K, ...) with weights in float32; a client of weight 0 is masked, even if not finite."""
  return jax.tree.map(
    lambda leaf: jnp.where(_per_client(weights, leaf) > 0, _per_client(weights, leaf) * leaf, 0).sum(axis=0), stacked
  )


def order_statistic(trim: Integer, accepted: Bool[Array, ' K'], stacked: Stacked) -> Raveled:
  """Mean of each coordinate over the accepted clients without the `trim` lowest and highest."""
  count = accepted.sum()

  def leaf_statistic(leaf):
    ascending = jnp.sort(jnp.where(_per_client(accepted, leaf), leaf, jnp.inf), axis=0)  # rejected clients last
    rank = _per_client(jnp.arange(len(accepted)), leaf)
    kept = (rank >= trim) & (rank < count - trim)
    return jnp.where(kept, ascending, 0).sum(axis=0) / jnp.maximum(count - 2 * trim, 1)

  return jax.tree.map(leaf_statistic, stacked)


def median_trim(count: Int[Array, ''], config: MethodConfig) -> Int[Array, '']:
  """Returns the clients trimmed at either end by the median of `count`."""
  del config
  return (count - 1) // 2


def trimmed_mean_trim(count: Int[Array, ''], config: MethodConfig) -> Int[Array, '']:
  """Returns the clients trimmed at either end by the trimmed mean: --trim_fraction of them, rounded down."""
  return jnp.floor(config.trim_fraction * count).astype(count.dtype)


def make_mean(config: MethodConfig, axis: str | None) -> Aggregator:
  """Builds FedAvg's mean; memory does not grow with the number of clients."""
  del config

  def init(global_params, num_clients):
    del num_clients
    return jax.tree.map(jnp.zeros_like, global_params)

  def add(total, uploads, first):
    del first
    return jax.tree.map(jnp.add, total, weighted_sum(jnp.where(uploads.accepted, uploads.weights, 0), uploads.params))

  def finish(total, accepted, tally):
    del accepted
    # If all are accepted the weights sum to one already; dividing would only round.
    share = jnp.where(tally.num_rejected == 0, 1, jnp.maximum(tally.accepted_weight, 1e-12))
    total = total if axis is None else jax.lax.psum(total, axis)
    return jax.tree.map(lambda leaf: leaf / share, total)

  return Aggregator(init, add, finish, returns_mean=True)


def make_order_statistic(config: MethodConfig, axis: str | None, trim: Callable[..., Array]) -> Aggregator:
  """Builds a coordinate-wise order statistic; the state stores the parameters of all clients."""

  def init(global_params, num_clients):
    return jax.tree.map(lambda leaf: jnp.zeros((num_clients, *leaf.shape), leaf.dtype), global_params)

  def add(stacked, uploads, first):
    return jax.tree.map(
      lambda rows, new: jax.lax.dynamic_update_slice_in_dim(rows, new, first, 0), stacked, uploads.params
    )

  def finish(stacked, accepted, tally):
    del tally
    if axis is not None:
      accepted, stacked = (
        jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), tree) for tree in (accepted, stacked)
      )
    return order_statistic(trim(accepted.sum(), config), accepted, stacked)

  return Aggregator(init, add, finish)


Builder = Callable[[MethodConfig, str | None], Aggregator]

# (configuration, name of the mesh axis over which clients are sharded or None) -> aggregator
BUILDERS: dict[str, Builder] = {
  'mean': make_mean,
  'median': lambda config, axis: make_order_statistic(config, axis, median_trim),
  'trimmed_mean': lambda config, axis: make_order_statistic(config, axis, trimmed_mean_trim),
  'ldawa': lambda config, axis: make_mean(config, axis)._replace(**ldawa.make_hooks(config)),
}


def register_aggregator(name: str, builder: Builder) -> None:
  """Adds a rule of aggregation under a new name, before a configuration or flags name it (docs/extending.md).

  Raises:
    UsageError: the name is taken.
  """
  if name in AGGREGATIONS:
    raise UsageError(f'--aggregation: expected a new name, {name!r} is taken')
  AGGREGATIONS.append(name)
  BUILDERS[name] = builder


def make_aggregator(config: MethodConfig, axis: str | None = None) -> Aggregator:
  """Builds the configured aggregator."""
  return BUILDERS[config.aggregation](config, axis)


def tally_clients(weights: Float[Array, ' K'], accepted: Bool[Array, ' K'], axis: str | None = None) -> Tally:
  """Counts the clients of a round, over the devices of a mesh axis where one is given."""
  sums = jnp.array([accepted.sum(), (accepted != (weights > 0)).sum(), jnp.where(accepted, weights, 0).sum()])
  return Tally(*(sums if axis is None else jax.lax.psum(sums, axis)))


def weigh_clients(aggregator: Aggregator, num_images: Int[Array, ' K'], stage_round: Integer) -> Int[Array, ' K']:
  """Returns what stands for the clients' images in their weights; see Aggregator."""
  return num_images if aggregator.weigh is None else aggregator.weigh(num_images, stage_round)


def prepare_uploads(
  aggregator: Aggregator, raveler: trees.Raveler, uploads: Uploads, global_params: Params, stage_round: Integer
) -> Uploads:
  """Returns the uploads as the aggregator adds them; `global_params` are the active ones; see Aggregator."""
  change = aggregator.prepare
  if change is None:
    return uploads

  def prepare(vectors):
    return raveler.ravel(change(raveler.unravel(vectors, global_params), global_params, stage_round))

  return uploads._replace(params=jax.vmap(prepare)(uploads.params))


def aggregate_or_keep(
  aggregator: Aggregator, state: Any, accepted: Bool[Array, ' K'], tally: Tally, global_params: Raveled
) -> Raveled:
  """Finishes an aggregation; if no client is accepted, the global parameters are unchanged."""
  return optax.tree.where(tally.num_accepted > 0, aggregator.finish(state, accepted, tally), global_params)


def client_weights(
  num_images: Int[Array, ' K'], returned: Bool[Array, ' K'], axis: str | None = None
) -> Float[Array, ' K']:
  """Returns each client's share of the images of all that returned; over all devices they sum to 1 (or are all 0)."""
  weights = jnp.where(returned, num_images, 0).astype(jnp.float32)
  total = weights.sum()
  return weights / jnp.maximum(total if axis is None else jax.lax.psum(total, axis), 1)


def mean_over_accepted(
  values: Sequence[Float[Array, ' K']],
  weights: Float[Array, ' K'],
  accepted: Bool[Array, ' K'],
  tally: Tally,
  axis: str | None = None,
) -> Float[Array, ' V']:
  """Returns the weighted means of V values over the accepted clients of all devices; 0 if there are none."""
  weights = jnp.where(accepted, weights, 0) / jnp.maximum(tally.accepted_weight, 1e-12)
  sums = jnp.stack([jnp.where(weights > 0, weights * value, 0).sum() for value in values])
  return sums if axis is None else jax.lax.psum(sums, axis)

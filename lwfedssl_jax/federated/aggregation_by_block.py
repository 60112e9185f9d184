"""Aggregation of clients that trained different blocks: every block over those that trained it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import stages, trees
from lwfedssl_jax.base import Array, Float, Integer, Params, Raveled, Scalar
from lwfedssl_jax.federated import aggregation, optimizer
from lwfedssl_jax.federated.aggregation import Aggregator, Tally, Uploads


class _Cut(NamedTuple):
  """What a tree is cut into, each raveled: blocks, with a leading axis of them, and all else."""

  blocks: Raveled
  rest: Raveled


class _State(NamedTuple):
  """The aggregator's states of all blocks and of the rest; weights (K, L), 0 where a client did not train a block."""

  blocks: Any
  rest: Any
  weights: Float[Array, 'K L']
  global_params: _Cut


def _cut(raveler: trees.Raveler, tree: Params) -> _Cut:
  rest = {name: part for name, part in tree.items() if name != 'blocks'}
  return _Cut(jax.vmap(lambda block: raveler.ravel({'blocks': block}))(tree['blocks']), raveler.ravel(rest))


def _join(raveler: trees.Raveler, active: Params, parts: _Cut) -> Raveled:
  rest = {name: part for name, part in active.items() if name != 'blocks'}
  one = {'blocks': jax.tree.map(lambda leaf: leaf[0], active['blocks'])}
  blocks = jax.vmap(lambda vectors: raveler.unravel(vectors, one))(parts.blocks)
  return raveler.ravel({name: (blocks | raveler.unravel(parts.rest, rest))[name] for name in active})


def _finish_block(
  aggregator: Aggregator, axis: str | None, num_returned: Scalar, state: Any, weights: Any, global_block: Raveled
) -> Raveled:
  sums = jnp.array([(weights > 0).sum(), weights.sum()])
  count, weight = sums if axis is None else jax.lax.psum(sums, axis)
  tally = Tally(count, num_returned - count, weight)
  return aggregation.aggregate_or_keep(aggregator, state, weights > 0, tally, global_block)


def by_block(aggregator: Aggregator, raveler: trees.Raveler, active: Params, axis: str | None = None) -> Aggregator:
  """Applies a rule of aggregation to every block and to the rest by itself.

  For a block, a client that did not train it counts as one that is not accepted. A block that no accepted client
  trained is unchanged.

  Args:
    aggregator: the rule.
    raveler: of the model.
    active: the global model's active part with all L blocks; its shapes are used.
    axis: name of the mesh axis over which clients are sharded, or None.

  Returns:
    A rule on the raveled `active`. Its `Uploads` have `kept`, the numbers of the blocks that each client trained.
  """
  depth = jax.tree.leaves(active['blocks'])[0].shape[0]

  def init(global_params, num_clients):
    parts = _cut(raveler, raveler.unravel(global_params, active))
    return _State(
      jax.vmap(lambda block: aggregator.init(block, num_clients))(parts.blocks),
      aggregator.init(parts.rest, num_clients),
      jnp.zeros((num_clients, depth)),
      parts,
    )

  def add(state, uploads, first):
    parts = jax.vmap(lambda vectors: _cut(raveler, raveler.unravel(vectors, active)))(uploads.params)
    trained = jax.nn.one_hot(uploads.kept, depth, dtype=bool).any(axis=1)
    accepted = uploads.accepted[:, None] & trained
    weights = jnp.where(accepted, uploads.weights[:, None], 0)

    def add_block(block_state, params, block_accepted):
      return aggregator.add(block_state, Uploads(params, uploads.weights, block_accepted), first)

    return state._replace(
      blocks=jax.vmap(add_block, in_axes=(0, 1, 1))(state.blocks, parts.blocks, accepted),
      rest=aggregator.add(state.rest, Uploads(parts.rest, uploads.weights, uploads.accepted), first),
      weights=jax.lax.dynamic_update_slice_in_dim(state.weights, weights, first, 0),
    )

  def finish(state, accepted, tally):
    finish_block = functools.partial(_finish_block, aggregator, axis, tally.num_accepted + tally.num_rejected)
    blocks = jax.vmap(finish_block, in_axes=(0, 1, 0))(state.blocks, state.weights, state.global_params.blocks)
    return _join(raveler, active, _Cut(blocks, aggregator.finish(state.rest, accepted, tally)))

  return aggregator._replace(init=init, add=add, finish=finish, returns_mean=False)


def mark_existing(raveler: trees.Raveler, active: Params, stop: Integer) -> Raveled:
  """Returns 1 for the parameters of an active part with all L blocks, 0 for those of absent blocks, from `stop` on."""
  labels = stages.labels(active, 0, stop, trains_embedding=True)
  return raveler.ravel(optimizer.layer_factors(active, labels, block_decay=1.0))

"""AdamW on the active parameters only, with rules per layer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import trees
from lwfedssl_jax.base import Params

REFERENCE_BATCH_SIZE = 256


def is_matrix(params: Params) -> Params:
  """Marks the leaves that weight decay applies to: kernels, not biases, norms or position tables."""
  return jax.tree_util.tree_map_with_path(lambda path, _: trees.path_name(path).endswith('kernel'), params)


def block_scales(params: Params, decay: float) -> Params:
  """Learning-rate factors per layer: decay ** (distance below the newest active block), one per stacked block.

  The embedding lies one step below the lowest active block; norm and heads have factor 1.
  """
  count = jax.tree.leaves(params['blocks'])[0].shape[0]
  per_block = decay ** jnp.arange(count - 1, -1, -1, dtype=jnp.float32)

  def scale(name, leaf):
    if name == 'blocks':
      return per_block.reshape((count,) + (1,) * (leaf.ndim - 1))
    return jnp.float32(decay ** count if name == 'embedding' else 1.0)

  return {name: jax.tree.map(lambda leaf, name=name: scale(name, leaf), tree) for name, tree in params.items()}


def scale_by_block(decay: float) -> optax.GradientTransformation:
  """Scales updates by `block_scales`; the identity for decay 1."""
  if decay == 1.0:
    return optax.identity()
  update = lambda updates, params=None: jax.tree.map(jnp.multiply, updates, block_scales(updates, decay))
  return optax.stateless(lambda updates, params: update(updates))


def make_optimizer(
    base_learning_rate: float, batch_size: int, weight_decay: float, block_learning_rate_decay: float = 1.0
) -> optax.GradientTransformation:
  """Builds AdamW (arXiv 1711.05101) with learning rate base * batch_size / 256.

  Its state covers what it is given, which is the active part of the parameters: a frozen parameter has no
  moments and is never decayed.
  """
  learning_rate = base_learning_rate * batch_size / REFERENCE_BATCH_SIZE
  return optax.chain(
      optax.scale_by_adam(),
      optax.add_decayed_weights(weight_decay, mask=is_matrix),
      scale_by_block(block_learning_rate_decay),
      optax.scale(-learning_rate),
  )


def drop_absent(updates: Params, depth: Any, block_learning_rate_decay: float = 1.0) -> Params:
  """Fits updates of all stacked blocks to an encoder of which only `depth` (traced) exist.

  Updates of absent blocks become zero, so that weight decay does not move them, and distances are measured from the
  newest block that exists instead of the last of the stack.
  """
  count = jax.tree.leaves(updates['blocks'])[0].shape[0]
  nearer = 1.0 if block_learning_rate_decay == 1.0 else block_learning_rate_decay ** (depth - count)

  def keep(leaf):
    present = jnp.arange(count) < depth
    return jnp.where(present.reshape((-1,) + (1,) * (leaf.ndim - 1)), nearer * leaf, 0)

  embedding = jax.tree.map(lambda leaf: nearer * leaf, updates['embedding'])
  return dict(updates, blocks=jax.tree.map(keep, updates['blocks']), embedding=embedding)

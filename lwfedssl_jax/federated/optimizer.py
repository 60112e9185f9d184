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


def block_scales(params: Params, decay: float, depth: Any = None) -> Params:
  """Learning-rate factors per layer: decay ** (distance below the newest block), one per stacked block.

  The embedding lies one step below the lowest active block; norm and heads have factor 1.

  Args:
    params: active parameters, blocks stacked (n, ...).
    decay: in (0, 1].
    depth: how many of the stacked blocks exist, may be traced; None: all n. Absent blocks have factor 1.

  Returns:
    A tree like `params`, of its shapes, float32.
  """
  count = jax.tree.leaves(params['blocks'])[0].shape[0]
  depth = count if depth is None else depth
  per_block = jnp.float32(decay) ** jnp.maximum(depth - 1 - jnp.arange(count), 0)

  def scale(name, leaf):
    if name == 'blocks':
      return jnp.broadcast_to(per_block.reshape((count,) + (1,) * (leaf.ndim - 1)), leaf.shape)
    return jnp.full(leaf.shape, jnp.float32(decay) ** depth if name == 'embedding' else 1.0, jnp.float32)

  return {name: jax.tree.map(lambda leaf, name=name: scale(name, leaf), tree) for name, tree in params.items()}


def make_optimizer(base_learning_rate: float, batch_size: int, weight_decay: float) -> optax.GradientTransformation:
  """Builds AdamW (arXiv 1711.05101) with learning rate base * batch_size / 256.

  Its state covers what it is given, which is the active part of the parameters: a frozen parameter has no
  moments and is never decayed.
  """
  learning_rate = base_learning_rate * batch_size / REFERENCE_BATCH_SIZE
  return optax.chain(
      optax.scale_by_adam(),
      optax.add_decayed_weights(weight_decay, mask=is_matrix),
      optax.scale(-learning_rate),
  )

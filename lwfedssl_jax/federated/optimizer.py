"""Per-layer masked optax updates: AdamW whose rules per layer come from the stage plan's labels.

The state covers the active part of the parameters only: a frozen layer has no moments and no decay. Absent blocks that
are stacked with the others (calibration) have factor 0.
"""

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import block_trees, stages, trees
from lwfedssl_jax.base import Labels, Params, PyTree

REFERENCE_BATCH_SIZE = 256


def is_matrix(params: Params) -> PyTree[bool]:
  """Marks the leaves with weight decay: kernels, not biases, norms or position tables."""
  return jax.tree_util.tree_map_with_path(lambda path, _: trees.path_name(path).endswith('kernel'), params)


def layer_factors(params: Params, labels: Labels, block_decay: float) -> Params:
  """Returns factors on the updates: 0 where a layer is not active, block_decay ** distance below the newest block.

  The embedding counts as the block below the lowest active one; norm and heads have factor 1.

  Args:
    params: the parameters, or an active part.
    labels: from `stages.labels`, of the same tree.
    block_decay: in (0, 1].

  Returns:
    A tree like `params`, of its shapes, float32.
  """
  active = block_trees.gather(labels['blocks']) == stages.ACTIVE
  newest = jnp.where(active, jnp.arange(len(active)), -1).max()
  of_blocks, of_embedding = jnp.maximum(newest - jnp.arange(len(active)), 0), active.sum()
  powers = jax.tree.map(lambda _: 0, labels) | {
    'blocks': block_trees.spread(labels['blocks'], of_blocks),
    'embedding': jax.tree.map(lambda _: of_embedding, labels.get('embedding', {})),
  }

  def factor(leaf, label, power):
    value = jnp.where(label == stages.ACTIVE, jnp.float32(block_decay) ** power, 0)
    return jnp.broadcast_to(value.reshape(value.shape + (1,) * (leaf.ndim - value.ndim)), leaf.shape)

  return {name: jax.tree.map(factor, tree, labels[name], powers[name]) for name, tree in params.items()}


def make_optimizer(
  learning_rate: float,
  batch_size: int,
  weight_decay: float,
  factors: Params | None = None,
  scale: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Builds AdamW (arXiv 1711.05101) with learning rate `learning_rate * batch_size / 256`.

  Args:
    learning_rate: base rate, per 256 images.
    batch_size: images per step.
    weight_decay: of matrices (`is_matrix`).
    factors: on the updates, a tree like the parameters (`layer_factors`); None: 1 everywhere.
    scale: the transformation before weight decay; None: `optax.scale_by_adam()`.
  """
  per_layer = (
    optax.identity()
    if factors is None
    else optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, factors))
  )
  return optax.chain(
    scale or optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay, mask=is_matrix),
    optax.scale(-learning_rate * batch_size / REFERENCE_BATCH_SIZE),
    per_layer,
  )

"""Parts that objectives with an online and a target branch share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lwfedssl_jax import trees
from lwfedssl_jax.base import Key, Objective, Params
from lwfedssl_jax.models.heads import Head


def init_head(head: Head, key: Key, width: int) -> Params:
  """Initializes a head for inputs of a given width."""
  return head.init(key, jnp.zeros((2, width)), jnp.ones((2,), bool))['params']


def make_predictive(
    name: str,
    projector: Head,
    predictor: Head,
    pair_loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    target_decay: float,
) -> Objective:
  """Builds an objective that compares each view's prediction with the other view's target projection.

  Args:
    name: as on the command line.
    projector: H, applied in both branches.
    predictor: P, applied in the online branch only.
    pair_loss: (predictions (B, P), target projections (B, P), mask (B,)) -> scalar.
    target_decay: mu of target <- mu * target + (1 - mu) * online, after each step.
  """

  def init(key, width):
    return {
        'projector': init_head(projector, jax.random.fold_in(key, 0), width),
        'predictor': init_head(predictor, jax.random.fold_in(key, 1), projector.output),
    }

  def project(heads, embeddings, mask):
    return projector.apply({'params': heads['projector']}, embeddings, mask)

  def loss(heads, projections, target_projections, mask):
    predictions = predictor.apply({'params': heads['predictor']}, projections, mask)
    return (pair_loss(predictions[0], target_projections[1], mask)
            + pair_loss(predictions[1], target_projections[0], mask))

  def update_target(target: Params, online: Params) -> Params:
    return trees.interpolate(target_decay, target, {name: online[name] for name in target})

  return Objective(name, init, project, loss, update_target, head_names=('projector', 'predictor'),
                   online_only=('predictor',))

"""Parts that objectives with an online and a target branch share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lwfedssl_jax import trees
from lwfedssl_jax.base import Array, Float, Function, Key, Mask, Objective, Params, Projections, Raveled, Scalar
from lwfedssl_jax.models.heads import Head


def init_head(head: Head, key: Key, width: int) -> Params:
  """Initializes a head for inputs of a given width."""
  return head.init(key, jnp.zeros((2, width)), jnp.ones((2,), bool))['params']


def make_predictive(
  name: str,
  projector: Head,
  predictor: Head,
  pair_loss: Callable[[Float[Array, 'B P'], Float[Array, 'B P'], Mask], Scalar],
  target_decay: float,
) -> Objective:
  """Builds an objective that compares each view's prediction with the other view's target projection.

  Args:
    name: as on the command line.
    projector: H, applied in both branches.
    predictor: P, applied in the online branch only.
    pair_loss: (predictions, target projections, mask) -> scalar.
    target_decay: mu of target <- mu * target + (1 - mu) * online, after each step.
  """
  apply_projector: Function = projector.apply
  apply_predictor: Function = predictor.apply

  def init(key: Key, width: int) -> Params:
    return {
      'projector': init_head(projector, jax.random.fold_in(key, 0), width),
      'predictor': init_head(predictor, jax.random.fold_in(key, 1), projector.output),
    }

  def project(heads: Params, embeddings: Float[Array, '2 B D'], mask: Mask) -> Projections:
    return apply_projector({'params': heads['projector']}, embeddings, mask)

  def loss(heads: Params, projections: Projections, target_projections: Projections | None, mask: Mask) -> Scalar:
    assert target_projections is not None
    predictions = apply_predictor({'params': heads['predictor']}, projections, mask)
    return pair_loss(predictions[0], target_projections[1], mask) + pair_loss(
      predictions[1], target_projections[0], mask
    )

  def update_target(target: Raveled, online: Raveled) -> Raveled:
    return trees.interpolate(target_decay, target, {name: online[name] for name in target})

  return Objective(
    name, init, project, loss, update_target, head_names=('projector', 'predictor'), online_only=('predictor',)
  )

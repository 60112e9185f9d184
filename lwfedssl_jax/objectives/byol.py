"""BYOL (arXiv 2006.07733): predict the target branch's projection of the other view."""

from lwfedssl_jax.base import Array, Float, Mask, Objective, Scalar
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives import branches, losses


def make_byol(projector: Head, predictor: Head, target_decay: float) -> Objective:
  """Builds 2 - 2 cos(q1, k2) + 2 - 2 cos(q2, k1)."""

  def pair_loss(predictions: Float[Array, 'B P'], targets: Float[Array, 'B P'], mask: Mask) -> Scalar:
    return 2 * losses.cosine_distance(predictions, targets, mask)

  return branches.make_predictive('byol', projector, predictor, pair_loss, target_decay)

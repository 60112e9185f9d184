"""MoCo v3 (arXiv 2104.02057) as LW-FedSSL uses it (arXiv 2401.11647, Eq. 1 and 2)."""

from lwfedssl_jax.base import Array, Float, Mask, Objective, Scalar
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives import branches, losses


def make_moco_v3(projector: Head, predictor: Head, temperature: float, target_decay: float) -> Objective:
  """Builds info_nce(q1, k2) + info_nce(q2, k1), with queries from the predictor and keys from the target branch."""

  def pair_loss(predictions: Float[Array, 'B P'], targets: Float[Array, 'B P'], mask: Mask) -> Scalar:
    return losses.info_nce(predictions, targets, temperature, mask)

  return branches.make_predictive('moco_v3', projector, predictor, pair_loss, target_decay)

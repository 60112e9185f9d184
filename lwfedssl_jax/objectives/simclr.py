"""SimCLR (arXiv 2002.05709): one branch, no predictor."""

import jax.numpy as jnp

from lwfedssl_jax.base import Array, Float, Function, Key, Mask, Objective, Params, Projections, Scalar
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives import branches, losses


def make_simclr(projector: Head, temperature: float) -> Objective:
  """Builds NT-Xent over the 2B projections of a batch."""
  apply_projector: Function = projector.apply

  def init(key: Key, width: int) -> Params:
    return {'projector': branches.init_head(projector, key, width)}

  def project(heads: Params, embeddings: Float[Array, '2 B D'], mask: Mask) -> Projections:
    return apply_projector({'params': heads['projector']}, embeddings, mask)

  def loss(heads: Params, projections: Projections, target_projections: Projections | None, mask: Mask) -> Scalar:
    del heads, target_projections
    return losses.nt_xent(projections.astype(jnp.float32), temperature, mask)

  return Objective('simclr', init, project, loss, update_target=None, head_names=('projector',))

"""SimCLR (arXiv 2002.05709): one branch, no predictor."""

import jax.numpy as jnp

from lwfedssl_jax.base import Objective
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives import branches, losses


def make_simclr(projector: Head, temperature: float) -> Objective:
  """Builds NT-Xent over the 2B projections of a batch."""

  def init(key, width):
    return {'projector': branches.init_head(projector, key, width)}

  def project(heads, embeddings, mask):
    return projector.apply({'params': heads['projector']}, embeddings, mask)

  def loss(heads, projections, target_projections, mask):
    del heads, target_projections
    return losses.nt_xent(projections.astype(jnp.float32), temperature, mask)

  return Objective('simclr', init, project, loss, update_target=None, head_names=('projector',))

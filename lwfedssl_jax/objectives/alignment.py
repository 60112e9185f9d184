"""Representation alignment: a regularizer between local projections and those of the global model.

The mechanism is LW-FedSSL's (arXiv 2401.11647 v1-v3); its form is our choice (docs/architecture.md). MOON's compares
with the client's previous model too (arXiv 2103.16257 v1, equation 3).
"""

import jax.numpy as jnp

from lwfedssl_jax.base import Array, Bool, Function, Mask, Projections, Scalar
from lwfedssl_jax.objectives import losses


def make_alignment(kind: str, temperature: float) -> Function:
  """Builds the regularizer (local, global_projections, mask) -> scalar float32.

  Mean over the two views, each compared with the same view: InfoNCE for `contrastive`, 1 - cos for `cosine`; for `moon`
  see `make_moon`. Global and previous projections have no gradient.
  """
  if kind == 'moon':
    return make_moon(temperature)
  pairwise = {
    'contrastive': lambda z, g, mask: losses.info_nce(z, g, temperature, mask),
    'cosine': losses.cosine_distance,
  }[kind]

  def alignment(local: Projections, global_projections: Projections, mask: Mask) -> Scalar:
    return (pairwise(local[0], global_projections[0], mask) + pairwise(local[1], global_projections[1], mask)) / 2

  return alignment


def make_moon(temperature: float) -> Function:
  """Builds MOON's regularizer (local, global_projections, mask, previous_projections, exists) -> scalar float32.

  Mean over the two views of -log(e^(cos(z, g) / t) / (e^(cos(z, g) / t) + e^(cos(z, p) / t))): towards the global model
  and away from the client's own of its last round. Without one (`exists` False) it is a cross entropy of one class, 0.
  """

  def alignment(
    local: Projections, global_projections: Projections, mask: Mask, previous: Projections, exists: Bool[Array, '']
  ) -> Scalar:
    first, second = (
      losses.two_way_contrast(*views, temperature, mask) for views in zip(local, global_projections, previous)
    )
    return jnp.where(exists, (first + second) / 2, 0)

  return alignment

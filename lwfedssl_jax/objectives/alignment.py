"""Representation alignment: a regularizer between local projections and those of the global model.

The mechanism is LW-FedSSL's (arXiv 2401.11647 v1-v3); its form is our choice (docs/architecture.md).
"""

from collections.abc import Callable

from lwfedssl_jax.base import Mask, Projections, Scalar
from lwfedssl_jax.objectives import losses


def make_alignment(kind: str, temperature: float) -> Callable[[Projections, Projections, Mask], Scalar]:
  """Builds the regularizer (local, global_projections, mask) -> scalar float32.

  Mean over the two views, each compared with the same view: InfoNCE for `contrastive`, 1 - cos for `cosine`.
  The global projections have no gradient.
  """
  pairwise = {
    'contrastive': lambda z, g, mask: losses.info_nce(z, g, temperature, mask),
    'cosine': losses.cosine_distance,
  }[kind]

  def alignment(local: Projections, global_projections: Projections, mask: Mask) -> Scalar:
    return (pairwise(local[0], global_projections[0], mask) + pairwise(local[1], global_projections[1], mask)) / 2

  return alignment

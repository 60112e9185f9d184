"""SimSiam (arXiv 2011.10566): predict the other view's own projection, under stop-gradient; no target branch."""

import jax

from lwfedssl_jax.base import Array, Float, Function, Key, Mask, Objective, Params, Projections, Scalar
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives import branches, losses


def make_simsiam(projector: Head, predictor: Head) -> Objective:
  """Builds -(cos(p1, z2) + cos(p2, z1)) / 2, z under stop-gradient (equations 1 to 4)."""
  apply_projector: Function = projector.apply
  apply_predictor: Function = predictor.apply

  def init(key: Key, width: int) -> Params:
    return {
      'projector': branches.init_head(projector, jax.random.fold_in(key, 0), width),
      'predictor': branches.init_head(predictor, jax.random.fold_in(key, 1), projector.output),
    }

  def project(heads: Params, embeddings: Float[Array, '2 B D'], mask: Mask) -> Projections:
    return apply_projector({'params': heads['projector']}, embeddings, mask)

  def loss(heads: Params, projections: Projections, target_projections: Projections | None, mask: Mask) -> Scalar:
    del target_projections
    predictions = apply_predictor({'params': heads['predictor']}, projections, mask)
    return (
      losses.negative_cosine(predictions[0], projections[1], mask)
      + losses.negative_cosine(predictions[1], projections[0], mask)
    ) / 2

  return Objective(
    'simsiam', init, project, loss, None, head_names=('projector', 'predictor'), online_only=('predictor',)
  )
